"""Comparisons: all ways draw the same answers, and the report says what was seen, whatever was drawn before."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Call, same, weights_of
from PIL import Image
from test_processes import launch
from tiny import checked_by, tiny_sd3

from esd_lora.bases import Base, base_of, load_base
from esd_lora.compose import attach
from esd_lora.emoji.vocabulary import STYLES, prompt
from esd_lora.errors import BaseModelError, PatchError, RecipeError
from esd_lora.evaluate import comparing as module
from esd_lora.evaluate import ways
from esd_lora.evaluate.answers import Answers, Ask, emoji_answers
from esd_lora.evaluate.comparing import (
    Comparison,
    Sampling,
    _layers_of,
    compare,
    evaluate_patches,
    judge_of,
    questions,
    shown_places,
    spread,
    ways_of,
)
from esd_lora.evaluate.drift import kid
from esd_lora.evaluate.evaluators import PROFILES, Clip, NudeNet, NudityProfile, Seen
from esd_lora.evaluate.page import Method, Row, Target, make_report, points_of, write_page
from esd_lora.evaluate.ways import BASELINES, Subject, baseline_way
from esd_lora.folder import locked
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate
from esd_lora.recipe import Concept, Recipe
from esd_lora.training import train

CAT = Target(kind="object", label="cat")
ASKS = tuple(
    Ask(f"a {name}", seed, {"object": name}, "target" if name == "cat" else "unrelated")
    for name in ("cat", "dog", "fox")
    for seed in range(8)
)


class Brightness:
    """Sees a cat in the darker half of what there is to see, and a dog in the rest."""

    name, version, digest = "brightness", "1", "0" * 64
    kinds: Mapping[str, tuple[str, ...]] = {"object": ("cat", "dog", "fox")}

    def see(self, pictures: Pictures) -> Seen:
        values = [float(np.asarray(p.convert("L")).mean()) for p in pictures]
        return Seen({"object": ["cat" if v < 128 else "dog" for v in values]}, [{"mean": v} for v in values])


@pytest.fixture
def comparison(base: Base, tmp_path: Path) -> Comparison:
    return Comparison(base, Answers(ASKS, CAT), CAT, Brightness(), tmp_path / "report", Sampling(steps=2))


@pytest.fixture
def subject(base: Base, tiny_folder: Path, tmp_path: Path) -> Subject:
    load = partial(load_base, str(tiny_folder), device="cpu")
    return Subject(base, Concept(erase="cat"), CAT, tmp_path / "report" / "methods", load=load)


@pytest.fixture
def doubtless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of controls: what random weights draw is no worse once it is ruined."""
    monkeypatch.setattr(module, "doubts_of", lambda *_: [])


def test_every_way_draws_the_same_answers_and_controls_do_what_they_must(
    comparison: Comparison, subject: Subject, patch: Patch
) -> None:
    before = weights_of(comparison.base)
    told: list[tuple[int, int]] = []
    found = ways_of(subject, {"runs/cat": patch}, weights=[0.5, 1.0], against=["sld", "negative-prompt"])
    report = compare(comparison, found, title="A cat", command="esd-lora eval", on_picture=lambda *n: told.append(n))
    assert same(weights_of(comparison.base), before)
    assert told[-1] == (len(report["rows"]), len(report["rows"]))
    places = {(p.method.name, p.strength): p for p in points_of(make_report(report))}
    assert {name for name, _ in places} == {"base", "cat", "SLD", "negative prompt", "null", "random", "scrambling"}
    asked = {(a.prompt, a.seed) for a in ASKS}
    for (name, _), point in places.items():
        cells = {(r.prompt, r.seed) for r in point.rows}
        assert cells == asked or (name in ("null", "random", "scrambling") and cells < asked)

    def bytes_of(name: str, strength: float) -> list[bytes]:
        return [(comparison.folder / str(r.picture)).read_bytes() for r in places[name, strength].rows]

    null = places["null", 1.0]
    assert [r.drift for r in null.rows] == [0.0] * len(null.rows)
    assert bytes_of("null", 1.0) == [(comparison.folder / str(r.picture)).read_bytes() for r in null.bare]
    assert bytes_of("cat", 0.5) != bytes_of("cat", 1.0) != bytes_of("base", 0.0)
    assert bytes_of("SLD", 1.0) != bytes_of("SLD", 4.0)
    rulers = make_report(report).rulers
    assert places["scrambling", 1.0].drift(rulers) > places["null", 1.0].drift(rulers)  # type: ignore[operator]
    assert write_page(report, comparison.folder / "report.html").stat().st_size > 10_000
    gaps = {(m["method"], m["about"]): (m["value"], m["low"], m["high"]) for m in report["measures"]}
    assert [method for method, _ in gaps] == ["cat"] * 4 + ["null"] * 4
    assert all((gap == (0, 0, 0)) == (method == "null") for (method, _), gap in gaps.items())  # to the last bit
    again = compare(replace(comparison, gaps=False), found, title="A cat", command="esd-lora eval")
    assert again == {**report, "measures": []}


class Colours(Brightness):
    """Also tells the mean of each channel."""

    def features(self, pictures: Pictures) -> torch.Tensor:
        return torch.tensor(np.array([np.asarray(p.convert("RGB"), np.float32).mean((0, 1)) / 64 for p in pictures]))


def test_kid_is_of_the_kept_pictures_of_every_place_and_can_be_computed_again(
    comparison: Comparison, subject: Subject, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RULED", 4)
    found, judged = ways_of(subject, {"runs/cat": patch}, weights=[0.5, 1.0]), replace(comparison, evaluator=Colours())
    report = compare(judged, found, title="A cat", command="esd-lora eval")
    points = {p.key: p for p in points_of(make_report(report)) if p.method.role != "base"}
    told = {f"{d['method']}@{d['strength']:g}": d for d in report["distances"]}
    assert list(told) == list(points)

    def features(rows: Sequence[Row]) -> torch.Tensor:
        return Colours().features([Image.open(comparison.folder / str(r.picture)) for r in rows if r.group != "target"])

    for key, point in points.items():
        value, error = kid(features(point.bare), features(point.rows), pairs=True)
        assert told[key]["value"] == pytest.approx(value, abs=1e-9)  # nine digits are kept
        assert told[key]["high"] - told[key]["low"] == pytest.approx(2 * 1.96 * error, abs=2e-9)
        assert (told[key]["n"], told[key]["about"]) == (16, "features of brightness")
    assert (told["null@1"]["value"], told["null@1"]["low"], told["null@1"]["high"]) == (0, 0, 0)
    assert told["scrambling@1"]["value"] > told["cat@1"]["value"]

    def counts(changed: Comparison) -> set[int]:
        return {d["n"] for d in compare(changed, found, title="A cat", command="esd-lora eval")["distances"]}

    monkeypatch.setattr(module, "PAIRED", 4)
    assert counts(judged) == {4}
    assert counts(replace(judged, answers=Answers(ASKS[:10], CAT))) == set()  # two without a cat are too few
    assert counts(comparison) == set()  # its evaluator has no features


class Halves(Brightness):
    """Also tells the mean of each half."""

    def maps(self, pictures: Pictures) -> list[torch.Tensor]:
        grey = torch.tensor(np.array([np.asarray(p.convert("L"), np.float32) for p in pictures]))
        return [torch.stack([half.mean((1, 2)) for half in grey.chunk(2, 1)], 1)[:, :, None, None]]


def test_drift_is_of_the_features_of_an_evaluator_that_has_them_else_of_pixels(
    comparison: Comparison, subject: Subject, patch: Patch
) -> None:
    found, moved = [ways.patch_way(comparison.base, "cat", patch)], []
    for judged, about in ((Halves(), "hidden states of brightness"), (Brightness(), "pixels")):
        changed = replace(comparison, evaluator=judged, gaps=False)
        report = make_report(compare(changed, found, title="A cat", command="esd-lora eval"))
        assert report.rulers
        assert report.rulers.about == about
        moved.append([r.drift for r in report.rows])
        for row in report.rows[len(ASKS) :]:
            bare = next(r for r in report.rows if (r.prompt, r.seed) == (row.prompt, row.seed))
            before, after = (Image.open(comparison.folder / str(r.picture)) for r in (bare, row))
            if about == "pixels":
                squares = (np.asarray(before, float) - np.asarray(after, float)) ** 2 / 255**2
                assert row.drift == pytest.approx(squares.mean(), abs=1e-6)  # six digits are kept
            else:
                f, g = (m / m.norm() for m in (Halves().maps([p])[0].flatten() for p in (before, after)))
                assert row.drift == pytest.approx(float((f - g).square().sum()), abs=1e-6)
    assert moved[0] != moved[1]
    assert replace(comparison, base=load_base("emoji", device="cpu"), evaluator=Halves()).ruler[0] == module.SECOND


def test_a_comparison_that_is_made_again_draws_nothing_and_says_the_same(
    comparison: Comparison, subject: Subject, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ways_of(subject, {"runs/cat": patch}, against=["separate-negative"])
    first = compare(comparison, found, title="A cat", command="esd-lora eval")
    text = (comparison.folder / "report.json").read_text()
    assert json.loads(text) == first
    assert sum(line.startswith('{"method"') for line in text.splitlines()) == len(first["rows"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("esd_lora.evaluate.answers.generate", refuse)
    assert compare(comparison, found, title="A cat", command="esd-lora eval") == first


def test_what_a_filter_holds_back_is_black_and_counts_as_gone(comparison: Comparison, patch: Patch) -> None:
    way = ways.patch_way(comparison.base, "cat", patch)
    filtered = ways.Way(
        Method(name="filter", role="baseline"),
        (0.0, 1.0),
        lambda _: nullcontext(ways.Setting(comparison.base)),
        passes=lambda strength, pictures: [strength > 0] * len(pictures),
    )
    report = compare(comparison, [filtered, way], title="A cat", command="esd-lora eval")
    rows = [r for r in report["rows"] if r["method"] == "filter"]
    assert {r["picture"] for r in rows if r["strength"] == 0} == {"pictures/black-16x16.png"}
    # this evaluator would see a cat in black
    assert {r["seen"]["object"] for r in rows if r["strength"] == 0} == {"nothing"}
    none = next(p for p in points_of(make_report(report)) if (p.method.name, p.strength) == ("filter", 0))
    assert (none.erased.value, none.kept.value) == (1, 0)
    bare = {(r["prompt"], r["seed"]): r["picture"] for r in report["rows"] if r["method"] == "base"}
    assert all(r["picture"] == bare[r["prompt"], r["seed"]] for r in rows if r["strength"] == 1)


@pytest.mark.parametrize("name", ["esd-x", "esd-u", "leco"])
def test_what_is_trained_is_trained_once_acts_by_its_weight_and_leaves_the_base_as_it_was(
    name: str, subject: Subject, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short: dict[str, Any] = {"iterations": 2, "lr": 1e-2} if name == "leco" else {"steps": 2, "lr": 1e-2}
    monkeypatch.setattr(ways, "OWN", {**ways.OWN, name: short})
    steps: list[tuple[str, int, int]] = []
    told = replace(subject, on_step=lambda *step: steps.append(step))
    way = baseline_way(name, told)
    assert steps == [(name, 1, 2), (name, 2, 2)]
    assert way.method.cost
    assert way.method.cost.passes > 0

    def refuse() -> Base:
        raise AssertionError("trained again")

    again = baseline_way(name, replace(subject, load=refuse))
    assert again.method == way.method
    before = weights_of(subject.base)
    x, t = subject.base.noise([0]), torch.tensor([500])
    drawn = []
    for strength in (0.0, 0.5, 1.0):
        with again.at(strength) as setting:
            attach(setting.base, setting.patches, setting.weights)
            drawn.append(setting.base.predict(x, t, setting.base.encode(["a cat"])))
            setting.base.remove_adapters()
    bare = subject.base.predict(x, t, subject.base.encode(["a cat"]))
    # at 0 nothing is left but the sum W + 0, which is W
    assert torch.equal(drawn[0], bare)
    assert (drawn[1] - bare).norm() > 0
    assert (drawn[2] - bare).norm() > (drawn[1] - bare).norm()
    assert same(weights_of(subject.base), before)


@pytest.mark.parametrize(
    ("name", "function", "numbers"),
    [
        ("esd-x", "full_esd", {"steps": 200, "lr": 5e-5}),  # esd_sd.py of their repository
        ("esd-u", "full_esd", {"steps": 1000, "lr": 1e-5}),  # arXiv:2303.07345
        ("leco", "leco", {"iterations": 500, "lr": 1e-4}),
    ],
)
def test_what_is_trained_is_trained_by_the_numbers_of_its_authors(
    name: str, function: str, numbers: Mapping[str, Any], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(*_: object, **how: Any) -> None:
        raise RuntimeError({key: how[key] for key in numbers})

    monkeypatch.setattr(ways, function, given)
    with pytest.raises(RuntimeError) as caught:
        baseline_way(name, subject)
    assert caught.value.args == (numbers,)


def test_a_baseline_of_another_concept_or_base_is_trained_apart(subject: Subject) -> None:
    other = replace(subject, concept=Concept(erase="dog"))
    assert subject.place("uce") != other.place("uce")
    assert subject.place("uce") == replace(subject).place("uce")
    assert subject.place("uce") != subject.place("leco")


def test_a_patch_that_cannot_be_compared_is_told_before_anything_is_drawn(subject: Subject, patch: Patch) -> None:
    with pytest.raises(RecipeError, match=r"^--patch: null is what a report calls something else; rename "):
        ways_of(subject, {"runs/null": patch})
    name = f"{next(iter(patch.ranks))}.lora_A.weight"
    wide = Patch({**patch.tensors, name: torch.zeros(2, 99)})
    with pytest.raises(PatchError, match=r"in .* it is "):
        ways_of(subject, {"runs/cat": wide})
    assert ways_of(subject, {"runs/cat": patch}, weights=[1.0, 0.5, 1.0])[0].strengths == (1.0, 0.5)


def test_a_gold_model_is_not_asked_for_what_else_it_lacks(
    comparison: Comparison, subject: Subject, patch: Patch
) -> None:
    ways = ways_of(subject, {"runs/cat": patch}, gold=comparison.base, gold_lacks=["fox"])
    gold = next(way for way in ways if way.method.name == "data filtering")
    report = make_report(compare(comparison, [gold], title="A cat", command="esd-lora eval"))
    bare, found = ({p.method.name: p for p in points_of(report)}[name] for name in ("base", "data filtering"))
    assert {r.prompt for r in bare.rows} - {r.prompt for r in found.rows} == {"a fox"}
    assert (found.erased.n, found.kept.n) == (8, 8)


def test_controls_are_spread_over_both_sides() -> None:
    some = spread(ASKS, 12)
    assert [a.group for a in some].count("target") == 3
    assert {a.prompt for a in some} == {"a cat", "a dog", "a fox"}
    assert spread(ASKS, 1000) == list(ASKS)


@pytest.mark.parametrize("target", ["cat", "neon"])
def test_controls_are_of_every_kind_though_prompts_come_style_by_style(target: str) -> None:
    """Of 36 pictures one of 19 objects may be missed by chance, of five or six styles none."""
    asks = emoji_answers(target, target_seeds=10, kept_seeds=1).asks
    for some in (spread(asks, 48), spread(asks, 24)):
        kept = [a.wanted for a in some if a.group != "target"]
        styles = {style for style in STYLES if style != target}
        assert {w["style"] for w in kept} == styles
        assert len({w["object"] for w in kept}) > 8


def test_a_page_shows_the_first_way_at_all_weights_and_others_at_their_own(subject: Subject, patch: Patch) -> None:
    found = ways_of(subject, {"runs/cat": patch}, weights=[0.5, 0.9], against=["sld"])
    assert [(p.method, p.strength) for p in shown_places(found)] == [("cat", 0.9), ("cat", 0.5), ("SLD", 2.0)]


def test_a_patch_in_the_folder_that_one_is_in_has_its_name(
    subject: Subject, patch: Patch, patch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(patch_folder)
    assert ways_of(subject, {".": patch})[0].method.name == patch_folder.name


def test_what_a_base_does_not_allow_is_told_before_anything_is_drawn_or_trained(tmp_path: Path) -> None:
    subject = Subject(base_of(tiny_sd3()), Concept(erase="cat"), CAT, tmp_path, load=lambda: pytest.fail("loaded"))
    for name in ("sld", "negative-prompt", "separate-negative"):
        with pytest.raises(BaseModelError, match="has no UNet, which this baseline acts on"):
            baseline_way(name, subject)


def test_pictures_that_a_prompt_asks_to_be_explicit_are_blurred_whatever_is_seen_in_them(
    comparison: Comparison, subject: Subject, patch: Patch
) -> None:
    asks = (*ASKS[:4], Ask("a naked fox", 1, {"object": "fox"}, "unrelated"), *ASKS[-4:])
    found = replace(comparison, answers=Answers(asks, CAT), gaps=False)
    report = compare(found, ways_of(subject, {"runs/cat": patch}), title="A cat", command="esd-lora eval")
    assert {r["prompt"] for r in report["rows"] if r.get("nsfw")} == {"a naked fox"}
    target = Target(kind="object", label="nudity")
    bare = tuple(replace(ask, wanted={"object": "nudity"}) if ask.group == "target" else ask for ask in asks)
    nudity = replace(found, answers=Answers(bare, target), target=target, evaluator=Nude())
    report = compare(nudity, ways_of(subject, {"runs/cat": patch}), title="Nudity", command="esd-lora eval")
    assert all(r.get("nsfw", False) == (r["group"] == "target" or "naked" in r["prompt"]) for r in report["rows"])


class Nude(Brightness):
    """Sees nudity nowhere."""

    kinds: Mapping[str, tuple[str, ...]] = {"object": ("nudity", "cat", "dog", "fox")}


def test_as_many_pictures_are_drawn_at_a_time_as_are_asked_for(
    comparison: Comparison, subject: Subject, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()

    def counting(base: Base, prompts: Sequence[str], *arguments: Any, **how: Any) -> Pictures:
        sizes.add(len(prompts))
        return generate(base, prompts, *arguments, **how)

    monkeypatch.setattr("esd_lora.evaluate.answers.generate", counting)
    found = ways_of(subject, {"runs/cat": patch})
    compare(replace(comparison, gaps=False, batch_size=3), found, title="A cat", command="esd-lora eval")
    assert max(sizes) == 3


def test_what_cannot_be_compared_is_one_line(subject: Subject, base: Base, patch: Patch, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--against sdl: unknown; there are sld, negative-prompt, "):
        baseline_way("sdl", subject)
    for name in ("filter:", "sld:x"):
        with pytest.raises(
            RecipeError, match=f"^--against {name}: unknown; there are sld, .*, uce, and filter:PIPELINE$"
        ):
            baseline_way(name, subject)
    with pytest.raises(RecipeError, match="emoji alone has an answer set of its own; give --answers"):
        questions("some/base", patch, None)
    path, told = tmp_path / "set.yaml", replace(patch, info={"recipe": {"concepts": [{"erase": "church"}]}})
    path.write_text("prompts: [{prompt: a church, wanted: {object: church}}]\n")
    with pytest.raises(RecipeError, match="names no target; give --target KIND:LABEL, such as object:church"):
        evaluate_patches("some/base", {"cat": patch}, tmp_path, answers=path, command="esd-lora eval")
    path.write_text("target: {kind: object, label: church}\n" + path.read_text())
    with pytest.raises(
        RecipeError, match=r"^--evaluator emoji: does not know the object church; it has object: 21 labels"
    ):
        judge_of("emoji", questions("some/base", patch, path))
    spelled = tmp_path / "spelled.yaml"
    spelled.write_text(path.read_text().replace("church", "Cat"))
    with pytest.raises(RecipeError, match=r"does not know the object Cat; it has .*; did you mean cat\?$"):
        judge_of("emoji", questions("some/base", patch, spelled))
    with pytest.raises(RecipeError, match=r"set.yaml: no prompt wants something else than the target; a report"):
        evaluate_patches("some/base", {"cat": told}, tmp_path, answers=path, command="esd-lora eval")
    dog, car = (f"{{prompt: a dog, wanted: {{object: {label}}}, seeds: [7]}}" for label in ("dog", "car"))
    path.write_text(path.read_text().replace("}}]", f"}}}}, {dog}, {car}]"))
    with pytest.raises(
        RecipeError, match=r"set.yaml: 'a dog' with seed 7 is there 2 times; a report tells pictures by"
    ):
        evaluate_patches("some/base", {"cat": told}, tmp_path, answers=path, command="esd-lora eval")
    hat = Patch(patch.tensors, {"recipe": {"concepts": [{"erase": "party hat", "from": "cat"}]}})
    with pytest.raises(RecipeError, match="no grid asks for it"):
        questions("emoji", hat, None)


# ---- captions ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("doubtless")
def test_a_csv_and_captions_are_answers_too(
    tiny_folder: Path, patch_folder: Path, clip_folder: Path, call: Call
) -> None:
    """What a caption should show nobody says: it counts for drift, KID and the CLIP score, and for no rate."""
    lines = [*(f"a cat,{k},cat" for k in range(3)), *(f"a dog,{k},dog" for k in range(4)), "a man riding a wave,7,"]
    Path("set.csv").write_text("\n".join(["caption,seed,class", *lines]))
    given = [
        "eval",
        "--base",
        tiny_folder,
        "--patch",
        patch_folder,
        "--answers",
        "set.csv",
        "--device",
        "cpu",
        "--quiet",
    ]
    more = ["--target", "object:cat", "--clip-score", clip_folder, "--steps", 2, "--out", "report", "--dtype", "fp32"]
    told = call(*given, *more, "--evaluator", "emoji")
    assert (told.code, told.err) == (0, "")
    report = make_report(json.loads(Path("report/report.json").read_text()))
    points, fits = points_of(report), {(f.method, f.strength): f for f in report.fits}
    bare, subject = points[:2]
    assert (bare.erased.n, bare.kept.n, bare.ira and bare.ira.n, bare.cra, len(bare.rows)) == (3, 4, 4, None, 8)
    assert [p.kept.n for p in points] == [4] * len(points)  # of controls too, which draw some
    kept = [r for r in subject.rows if r.group != "target"]
    assert [dict(r.wanted) for r in kept] == [{"object": "dog"}] * 4 + [{}]
    pictures = [Image.open(Path("report") / str(r.picture)) for r in kept]
    scores = Clip(clip_folder).clip_scores(pictures, [r.prompt for r in kept])
    found = fits[subject.method.name, subject.strength]
    assert found.n == 5
    assert found.value == pytest.approx(sum(scores) / 5, abs=1e-4)  # the same network on the same pictures
    assert found.low < found.value < found.high
    assert fits.keys() >= {("base", 0.0), ("random", 1.0)}
    assert "CLIP score is 100 · cos" in Path("report/report.html").read_text()
    seen = {line["picture"]: line for line in map(json.loads, Path("report/seen.jsonl").read_text().splitlines())}
    assert seen.keys() == {r.picture for p in points for r in p.rows}
    for row in subject.rows:
        scores_of = seen[str(row.picture)]["object"]
        assert max(scores_of, key=scores_of.__getitem__) == row.seen["object"]


class Boxes(NudeNet):
    """Finds a breast in each picture and, where it is rather bright, another that is less certain."""

    def __init__(self, profile: NudityProfile) -> None:
        self.name, self.profile, self.version, self.digest = f"nudenet:{profile.name}", profile, "1", "0" * 64
        self.kinds = {"object": ("cat", "dog", "fox")}

    def see(self, pictures: Pictures) -> Seen:
        bright = [float(np.asarray(p).mean()) for p in pictures]
        box: dict[str, Any] = {"class": "FEMALE_BREAST_EXPOSED", "box": [0, 0, 8, 8]}
        certain = [(0.9, 0.7) if level > 127 else (0.9,) for level in bright]
        return Seen(
            {"object": ["cat"] * len(pictures)},
            [{"boxes": [{**box, "score": score} for score in scores]} for scores in certain],
        )


@pytest.mark.usefixtures("doubtless")
def test_a_profile_of_boxes_counts_them_in_the_report(comparison: Comparison, subject: Subject, patch: Patch) -> None:
    found = ways_of(subject, {"runs/cat": patch})
    asked = {"title": "A cat", "command": "esd-lora eval"}
    report = compare(replace(comparison, evaluator=Boxes(PROFILES["mace8"])), found, **asked)
    counts = {(c["method"], c["strength"]): c for c in report["counts"]}
    for point in points_of(make_report(report)):
        pictures = [Image.open(comparison.folder / str(r.picture)) for r in point.rows if r.group == "target"]
        boxes = [2 if np.asarray(p).mean() > 127 else 1 for p in pictures]
        told = counts[point.method.name, point.strength]
        assert (told["about"], told["n"]) == ("nudenet:mace8", len(boxes))
        assert told["value"] == sum(boxes) / len(boxes)
        assert told["low"] <= told["value"] <= told["high"]
    page = write_page(report, comparison.folder / "report.html").read_text()
    total = round(counts["base", 0.0]["value"] * counts["base", 0.0]["n"])
    assert f'data-is="count 0">{total}</td>' in page
    report = compare(replace(comparison, evaluator=Boxes(PROFILES["esd"])), found, **asked)
    assert report["counts"] == []
    assert "Box by box" not in write_page(report, comparison.folder / "report.html").read_text()


# ---- safety checkers ---------------------------------------------------------------------------------------------


def cats_on(base: Path, patch_folder: Path, *, seeds: int = 8) -> list[object]:
    """Of `eval`, on a tiny base, into `report`."""
    prompts = [{"prompt": f"a {label}", "wanted": {"object": label}, "seeds": seeds} for label in ("cat", "dog")]
    Path("set.yaml").write_text(yaml.safe_dump({"target": {"kind": "object", "label": "cat"}, "prompts": prompts}))
    given = ["eval", "--base", base, "--patch", patch_folder, "--answers", "set.yaml", "--steps", 2, "--out", "report"]
    return [*given, "--evaluator", "emoji", "--device", "cpu", "--dtype", "fp32", "--quiet"]


@pytest.mark.parametrize("layers", ["of-a-later-version", ["attn2"], {}])
def test_controls_of_a_patch_whose_layers_have_no_name_here_are_of_the_usual_ones(
    layers: object, base: Base, patch: Patch
) -> None:
    """As a stranger's header may have them, or a later version's."""
    other = Patch(patch.tensors, {**patch.info, "recipe": {**patch.info["recipe"], "layers": layers}})
    assert _layers_of(other, base) == "esd-x"
    assert _layers_of(patch, base) == patch.info["recipe"]["layers"]


def test_a_weight_by_which_no_number_comes_is_one_line(tiny_folder: Path, patch_folder: Path, call: Call) -> None:
    told = call(*cats_on(tiny_folder, patch_folder), "--weight", "1e30")
    assert (told.code, told.out) == (2, "")
    assert told.err == (
        "error: with cat at 1e+30 the base predicts what is no number; its numbers, or the weight, are too large\n"
    )
    assert not Path("report/report.json").exists()


@pytest.mark.usefixtures("doubtless")
def test_the_command_line_filters_by_the_safety_checker_of_the_base_or_of_another_pipeline(
    checked_folder: Path, patch_folder: Path, call: Call
) -> None:
    elsewhere = f"filter:{checked_folder}"
    told = call(*cats_on(checked_folder, patch_folder), "--against", "filter", "--against", elsewhere)
    assert (told.code, told.err) == (0, "")
    report = make_report(json.loads(Path("report/report.json").read_text()))
    points = {p.key: p for p in points_of(report)}
    own, other = points["post-filter@0.5"], points[f"post-filter {checked_folder}@0.5"]
    drawn = [Image.open(Path("report") / str(r.picture)) for r in own.bare]
    shown = [r.picture != "pictures/black-16x16.png" for r in own.rows]
    assert shown == checked_by(checked_folder, drawn)
    assert set(shown) == {True, False}
    assert [r.picture for r in other.rows] == [r.picture for r in own.rows]
    assert own.label == ""  # it says 0 or 1, and has no threshold to be swept
    assert "post-filter</th>" in Path("report/report.html").read_text()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("filter", "{base}: has no safety checker"),
        ("filter:nowhere", "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        ("filter:.", ".: no model_index.json in this folder, so it is not a diffusers pipeline"),
    ],
)
def test_a_base_without_a_safety_checker_is_told_what_to_name(
    name: str, told: str, tiny_folder: Path, patch_folder: Path, call: Call
) -> None:
    found = call(*cats_on(tiny_folder, patch_folder), "--against", name)
    remedy = "name a pipeline that has one, as in filter:stable-diffusion-v1-5/stable-diffusion-v1-5"
    expected = f"error: --against filter: {told.format(base=tiny_folder)}; {remedy}\n"
    assert (found.code, found.out, found.err) == (2, "", expected)
    assert not Path("report").exists()


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("doubtless")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_several_processes_make_the_report_of_one(
    tiny_folder: Path, patch_folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "OWN", {name: {"steps": 2, "lr": 1e-2} for name in ("esd-x", "esd-u")})
    monkeypatch.setattr(ways, "TRAINED", (1.0,))
    monkeypatch.setattr(module, "CONTROLS", 8)
    monkeypatch.setattr(module, "RULED", 4)
    asked = [*cats_on(tiny_folder, patch_folder, seeds=18), "--against", "esd-x", "--against", "uce", "--json"]

    def told(text: str) -> dict[str, Any]:
        """A report without what it cost and where it was made."""
        report: dict[str, Any] = json.loads(text)
        return {**report, "made": None, "methods": [{**m, "cost": None} for m in report["methods"]]}

    def work(rank: int) -> None:
        result = call(*asked, "--out", "several")
        assert (result.code, result.err) == (0, "")
        assert bool(result.out) == (rank == 0)

    def again(rank: int) -> None:
        monkeypatch.setattr("esd_lora.evaluate.answers.generate", None)
        monkeypatch.setattr(ways, "full_esd", None)
        work(rank)

    one = told(call(*asked, "--out", "one").out)
    assert sum(row["method"] == "base" for row in one["rows"]) > 32  # more than a batch
    assert launch(work, seconds=300) == [0, 0]
    assert told(Path("several/report.json").read_text()) == one
    files = {"report.json", "report.html", "seen.jsonl"}
    assert {p.name for p in Path("several").iterdir()} == {"methods", "pictures", *files}
    assert Path("several/seen.jsonl").read_bytes() == Path("one/seen.jsonl").read_bytes()
    assert launch(again, seconds=300) == [0, 0]
    assert told(Path("several/report.json").read_text()) == one


def test_a_folder_that_another_run_writes_to_is_refused(tiny_folder: Path, patch_folder: Path, call: Call) -> None:
    with locked(Path("report")):
        found = call(*cats_on(tiny_folder, patch_folder))
    told = "error: report: another run is writing to it; wait for its end, or choose another --out\n"
    assert (found.code, found.out, found.err) == (2, "", told)


# ---- on the embedded base ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cat_on_emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a patch that erases the cat from the embedded base, made without training."""
    recipe = Recipe(base="emoji", concepts=(Concept(erase="cat"),), objective="closed-form")
    out = tmp_path_factory.mktemp("run") / "cat"
    train(recipe, load_base("emoji", device="cpu"), out=out)
    return out


def test_the_command_line_compares_a_patch_with_the_field(cat_on_emoji: Path, call: Call) -> None:
    entries = [
        {"prompt": prompt(obj, style), "wanted": {"object": obj, "style": style}, "seeds": 2}
        for obj, style in [("cat", "ink"), ("cat", "neon"), ("car", "ink"), ("moon", "neon")]
    ]
    answers = {"target": {"kind": "object", "label": "cat"}, "prompts": entries}
    Path("set.yaml").write_text(yaml.safe_dump(answers))
    asked = ["--base", "emoji", "--patch", cat_on_emoji, "--answers", "set.yaml", "--steps", 10, "--out", "report"]
    told = call("eval", *asked, "--weight", 1, "--against", "filter", "--quiet")
    assert (told.code, told.err) == (0, "")
    assert "report/report.html" in told.out
    report = make_report(json.loads(Path("report/report.json").read_text()))
    points = {p.key: p for p in points_of(report)}
    # of four pictures each: the base draws most cats, the closed form and the filter leave hardly any
    assert points["base@0"].erased.value <= 0.25
    assert points["cat@1"].erased.value >= 0.75
    assert points["post-filter@0.5"].erased.value >= 0.75
    assert points["cat@1"].kept.value >= 0.75
    assert points["scrambling@1"].kept.value <= 0.25
    assert points["null@1"].drift(report.rulers) == pytest.approx(0, abs=0.05)
    kids = {d.method: d for d in report.distances if d.strength == 1 or d.method == "post-filter"}
    assert {d.about for d in kids.values()} == {"features of emoji's second evaluator"}
    assert kids["scrambling"].low > 0 == kids["null"].value
    assert report.made.command.startswith("esd-lora eval --base emoji --patch ")
    assert call("report", "report").code == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--against", "sld", "--steps", "20"], "--against, --steps: only with --out, for a report"),
        (["--evaluator", "nonsense"], "--evaluator: only with --out, for a report"),
        (
            ["--base", "{tiny}", "--answers", "set.yaml", "--out", "report"],  # of emoji's own evaluator nobody spoke
            "--base {tiny}: give --answers, --evaluator and --out; emoji alone is measured without",
        ),
        (
            ["--answers", "set.yaml", "--target-seeds", "1", "--kept-seeds", "2", "--out", "report"],
            "--kept-seeds, --target-seeds: not with --answers, whose file says how many pictures there are",
        ),
        (["--base", "nowhere"], "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        (["--base", "{tiny}"], "--base {tiny}: give --answers, --evaluator and --out; emoji alone is measured without"),
        (
            ["--out", "report", "--target", "cat"],
            "--target cat: must be KIND:LABEL, as an evaluator names them, such as ",
        ),
        (["--out", "report", "--target", "object:cat"], "--target: goes with --answers; without, the target is what"),
        (
            ["--out", "report", "--answers", "none.yaml"],
            "none.yaml: cannot read the answer set: No such file or directory",
        ),
        (
            ["--out", "report", "--gold-lacks", "neon"],
            "--gold-lacks: says what the base of --gold lacks; name that, too",
        ),
        (
            ["--out", "report", "--gold", ".", "--gold-lacks", "tiger cub"],
            "--gold-lacks tiger cub: no prompt wants it; there",
        ),
        (
            ["--out", "report", "--gold", ".", "--gold-lacks", "cat"],
            "--gold-lacks cat: leaves no prompt of the target, or none",
        ),
        (["--out", "report", "--evaluator", "eye"], "evaluator eye: unknown; there are emoji, clip:MODEL, "),
        (["--out", "report", "--against", "sdl"], "--against sdl: unknown; there are sld, "),
        (["--out", "report", "--weight", "nan"], "a weight must be a finite number, got nan"),
    ],
)
def test_what_the_command_line_cannot_compare_is_one_line_and_leaves_nothing(
    options: list[str], told: str, cat_on_emoji: Path, tiny_folder: Path, call: Call
) -> None:
    given = [o.format(tiny=tiny_folder) for o in options]
    found = call("eval", "--base", "emoji", "--patch", cat_on_emoji, "--quiet", *given)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"error: {told.format(tiny=tiny_folder)}")
    assert found.err.count("\n") == 1
    assert not Path("report").exists()


def test_the_help_lists_every_baseline() -> None:
    from esd_lora.cli import AGAINST

    assert AGAINST.rstrip(".").split(", ") == list(BASELINES)
