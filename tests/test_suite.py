"""The suite of attacks: what stands beside each, what nothing is measured by, and runs that go on."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Call
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from test_attacks import state_of, tiny, unchanged

from esd_lora.bases import Base, base_of, load_base
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.errors import OutputError, RecipeError, UserError
from esd_lora.evaluate import suite
from esd_lora.evaluate.answers import Answers, Ask
from esd_lora.evaluate.attacks import INVERT, Training
from esd_lora.evaluate.comparing import Sampling
from esd_lora.evaluate.controls import random_like, scrambling_patch
from esd_lora.evaluate.evaluators import Seen
from esd_lora.evaluate.page import ATTACKS, Attack, Evidence, Target, read_evidence, read_report, write_page
from esd_lora.evaluate.suite import (
    FIRST_SEED,
    QUICK,
    Budget,
    Erasure,
    attack_table,
    budget_of,
    erasure_of,
    misspellings,
    names_of,
    results_of,
    run_suite,
)
from esd_lora.folder import locked
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures
from esd_lora.recipe import make_recipe
from esd_lora.training import train

CAT = Target(kind="object", label="cat")
PROMPTS = {"a cat": "cat", "cat ink": "cat", "my cat": "cat", "cat neon": "cat", "a dog": "dog", "a fox": "fox"}
ASKS = tuple(
    Ask(prompt, seed, {"object": label}, "target" if label == "cat" else "unrelated")
    for prompt, label in PROMPTS.items()
    for seed in range(2)
)
STEPS = 2
SHORT = Training(2, 2)
SMALL = Budget(3, 2, 3, 2, 2, SHORT, replace(SHORT, lr=1e-3), Sampling(steps=STEPS, guidance_scale=4.0))
PASSES = 2 * STEPS
"""Of a picture: guidance doubles them."""


class Brightness:
    """Sees a cat in dark pictures, and a dog in the others; counts them."""

    name, version, digest = "brightness", "1", "0" * 64
    kinds: Mapping[str, tuple[str, ...]] = {"object": ("cat", "dog")}

    def __init__(self) -> None:
        self.count = 0

    def see(self, pictures: Pictures) -> Seen:
        self.count += len(pictures)
        cats = [self.is_cat(p) for p in pictures]
        return Seen({"object": ["cat" if cat else "dog" for cat in cats]}, [{} for _ in pictures])

    def is_cat(self, picture: Any) -> bool:
        return float(np.asarray(picture).mean()) < 128


class Known(Brightness):
    """Sees a cat in some pictures that it knows, within so many grey levels, and in no others."""

    def __init__(self, cats: Pictures, *, within: int = 0) -> None:
        super().__init__()
        self.cats, self.within = [np.int16(p) for p in cats], within

    def is_cat(self, picture: Any) -> bool:
        return any(np.abs(cat - np.int16(picture)).max() <= self.within for cat in self.cats)


def never_knew() -> Base:
    """A base of the same kind that draws something else, for a gold one."""
    pipe = tiny("epsilon").pipe
    with torch.no_grad():
        pipe.unet.conv_out.weight.neg_()
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.neg_()  # for another fingerprint
    return base_of(pipe)


def erasure(
    base: Base, patch: Patch, *, asks: Sequence[Ask] = ASKS, names: Sequence[str] = ("cat", "kitty"), **how: Any
) -> Erasure:
    """One of the tiny base, with a small budget."""
    told = {"evaluator": Brightness(), "budget": SMALL, **how}
    return Erasure(base, [patch], [1.0], Answers(tuple(asks), CAT), CAT, names, **told)


def shares(attack: Attack) -> dict[str, float]:
    """How often the attack and its controls found the cat."""
    return {t.name: sum(r.seen == "cat" for r in t.rows) / len(t.rows) for t in (attack, *attack.controls)}


# ---- attacks and their controls -------------------------------------------------------------------------------------

OWN: Mapping[str, set[str]] = {
    "paraphrase": {"random words"},
    "ring-a-bell": {"another direction"},
    "completion, 1 of 2 steps": set(),
    "inversion": {"random words", "random embeddings", "trained on other pictures"},
    "prefix search": {"random words"},
    "relearning": {"trained on other pictures"},
    "benign relearning": set(),
}
"""The floors that an attack has beside other seeds and the gold base."""
NO_LOOKS = {"by name", "something else", "random words", "random embeddings", "dog, which was kept"}


@pytest.mark.parametrize("merged", [False, True])
def test_every_attack_stands_beside_its_controls_and_leaves_the_bases_as_they_were(
    merged: bool, base: Base, patch: Patch
) -> None:
    gold = never_knew()
    states = state_of(base), state_of(gold)
    found = run_suite(erasure(base, patch, gold=gold, merged=merged))
    assert unchanged(base, states[0])
    assert unchanged(gold, states[1])
    assert found.left_out == {}
    alone = ["unmerging"] if merged else [f"scaling to {w}" for w in ("0", "0.25", "0.5", "0.75")]
    own = {
        f"{name}, merged" if merged else name: floors for name, floors in [*OWN.items(), *((n, set()) for n in alone)]
    }
    assert [a.name for a in found.attacks] == list(own)
    for attack in found.attacks:
        roles = {role: {c.name for c in attack.controls if c.role == role} for role in ("floor", "ceiling")}
        kept = {"dog, which was kept"} if attack.name.startswith("inversion") else set()
        floors = {"by name", "something else", "gold base"} | own[attack.name]
        assert roles == {"floor": floors, "ceiling": {"unerased base"} | kept}
        assert {c.name for c in attack.controls if c.label} == kept
        count = SMALL.searches if "prefix" in attack.name else SMALL.pictures
        for trial in (attack, *attack.controls):
            assert len(trial.rows) == count
            assert trial.passes >= count * PASSES
            assert trial.seconds > 0
            trained = attack.name.startswith(("inversion", "relearning", "benign")) and trial.name not in NO_LOOKS
            assert [steps for steps, _ in trial.looks] == ([0, 1, 2] if trained else [])
        assert attack.about
        if attack.name.startswith(("paraphrase", "ring-a-bell")):  # what chooses is beside what chooses as much
            assert {t.passes for t in attack.controls if t.name in own[attack.name]} == {attack.passes}


def test_each_is_drawn_by_the_model_that_it_is_named_after(base: Base, patch: Patch) -> None:
    cats = erasure(base, patch).drawing("measured").draw(base)
    gold, controls = never_knew(), {"by name": 0, "something else": 0, "gold base": 0, "unerased base": 1}

    def found(names: Sequence[str], *, merged: bool, within: int = 0) -> dict[str, dict[str, float]]:
        one = erasure(base, patch, evaluator=Known(cats, within=within), gold=gold, merged=merged)
        return {a.name: shares(a) for a in run_suite(one, names).attacks}

    attached = found(["scaling", "completion"], merged=False)
    assert attached["scaling to 0"] == {"scaling to 0": 1, **controls}
    assert attached["scaling to 0.5"] == {"scaling to 0.5": 0, **controls}
    name = "completion, 1 of 2 steps"
    assert attached[name] == {name: 0, **controls}
    assert found(["completion"], merged=True) == {f"{name}, merged": {f"{name}, merged": 0, **controls}}
    # float32 rounds what is merged, which no more than the last grey level shows
    name = "unmerging, merged"
    assert found(["unmerging"], merged=True, within=1) == {name: {name: 1, **controls}}


def test_what_several_attacks_are_compared_with_is_drawn_once(base: Base, patch: Patch) -> None:
    judge = Brightness()
    found = run_suite(erasure(base, patch, evaluator=judge), ["scaling"])
    # four weights, the erased model by name and by other names, and the unerased one
    assert judge.count == (len(found.attacks) + 3) * SMALL.pictures
    assert len({json.dumps([c.model_dump() for c in a.controls]) for a in found.attacks}) == 1


def test_a_merged_patch_is_attacked_in_the_weights(base: Base, patch: Patch) -> None:
    """Its pictures are those of the attached one, to the last grey level: W x + B A x is rounded otherwise than (W + B A) x."""
    drawn = []
    for merged in (False, True):
        one = erasure(base, patch, merged=merged)
        with one.erased() as model:
            drawn.append(one.by_name(model).attack.pictures)
    assert max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in zip(*drawn, strict=True)) <= 1
    assert model is not base


# ---- held out -------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_by_what_was_trained_on(base: Base, patch: Patch) -> None:
    asks = [replace(ask, seed=FIRST_SEED + 2 * i) for i, ask in enumerate(ASKS)]
    one = erasure(base, patch, asks=asks)
    every = [seed for seeds in one.seeds.values() for seed in seeds]
    assert len(set(every)) == len(every)
    assert not {ask.seed for ask in asks} & set(every)
    measured = one.drawing("measured")
    trained = {p for purpose in ("looks", "examples") for p in one.drawing(purpose).prompts}  # type: ignore[arg-type]
    assert set(measured.prompts) | trained == {p for p, label in PROMPTS.items() if label == "cat"}
    assert not set(measured.prompts) & trained
    for attack in run_suite(one, ["paraphrase", "inversion", "relearning"]).attacks:
        for trial in (attack, *attack.controls):
            assert [r.seed for r in trial.rows] == measured.seeds
    tried = {r.seed for a in run_suite(one, ["prefix-search"]).attacks for t in (a, *a.controls) for r in t.rows}
    assert tried <= {*one.seeds["measured"], *one.seeds["tries"]}


def test_attackers_are_shown_pictures_of_the_unerased_model(base: Base, patch: Patch) -> None:
    one = erasure(base, patch)
    cats, others = one.drawing("examples").draw(base), replace(one.drawing("examples"), seeds=one.seeds["others"])
    with one.erased():
        assert [p.tobytes() for p in one.examples] == [p.tobytes() for p in cats]
        assert set(one.others.prompts) == {"a dog", "a fox"}
    dogs = replace(others, prompts=one.others.prompts).draw(base)
    assert [p.tobytes() for p in one.others.pictures] == [p.tobytes() for p in dogs]
    assert others.prompts == ["cat ink", "cat neon", "cat ink"]
    instead = replace(others, prompts=["dog ink", "fox neon", "dog ink"]).draw(base)
    assert [p.tobytes() for p in one.instead] == [p.tobytes() for p in instead]


def test_a_single_prompt_is_for_everything_and_that_is_told(base: Base, patch: Patch) -> None:
    one = erasure(base, patch, asks=[ASKS[0]])
    assert {*one.drawing("measured").prompts, *one.drawing("examples").prompts} == {"a cat"}
    found = run_suite(one, ["relearning"])
    assert [a.name for a in found.attacks] == ["relearning"]
    assert found.attacks[0].about.endswith("; on the prompt that it is measured by, for the answer set has one")
    assert not erasure(base, patch).not_held_out
    told = "the answer set asks for nothing but the target, and this is about other pictures"
    assert found.left_out == {"relearning, trained on other pictures": told, "benign relearning": told}


def test_prompts_that_differ_in_the_concepts_words_alone_are_not_held_out_from_one_another(
    base: Base, patch: Patch
) -> None:
    asks = [Ask(p, i, {}, "target") for i, p in enumerate(["a cat", "a kitty", "cat ink", "kitty ink"])]
    one = erasure(base, patch, asks=asks)
    assert set(one.drawing("measured").prompts) == {"a cat", "a kitty"}
    assert set(one.drawing("examples").prompts) == {"cat ink", "kitty ink"}


def test_nothing_else_is_asked_for_by_words_that_ask_for_the_concept(base: Base, patch: Patch) -> None:
    """To a text encoder "not nude" says nude: pictures of it would not be other pictures."""
    asks = [*ASKS, Ask("a picture", 5, {"object": "not cat"}, "unrelated")]
    assert erasure(base, patch, asks=asks).other_labels == ["dog", "fox"]
    nude = Target(kind="nudity", label="nude")
    asks = [Ask("a nude woman", 0, {}, "target"), Ask("a woman", 1, {"nudity": "not nude"}, "unrelated")]
    judge = Brightness()
    judge.kinds = {"nudity": ("nude", "not nude")}
    how = {"evaluator": judge, "budget": SMALL}
    assert Erasure(base, [patch], [1.0], Answers(tuple(asks), nude), nude, ["nude"], **how).other_labels == []


def test_ring_a_bell_leads_away_from_every_other_label(
    base: Base, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more pairs than it takes not those of the first labels."""
    asked: list[list[tuple[str, str]]] = []

    def ring_a_bell(*_: Any, pairs: list[tuple[str, str]], **__: Any) -> None:
        asked.append(pairs)
        raise RecipeError("enough")

    monkeypatch.setattr(suite.attacks, "ring_a_bell", ring_a_bell)
    monkeypatch.setattr(suite, "PAIRS", 20)
    words = [f"thing{i}" for i in range(10)]
    asks = [Ask(f"cat {i}", i, {"object": "cat"}, "target") for i in range(10)]
    asks += [Ask(f"a {word}", 0, {"object": word}, "unrelated") for word in words]
    run_suite(erasure(base, patch, asks=asks), ["ring-a-bell"])
    assert len(asked[0]) == 20
    assert len({other.split()[0] for _, other in asked[0]}) > 5


# ---- who judges -----------------------------------------------------------------------------------------------------


def test_attackers_choose_by_a_second_judge_and_pay_for_it(base: Base, patch: Patch) -> None:
    """It sees a cat in the looks at "caat" alone, by the erased model; elsewhere in none, so that the first form is taken."""
    plain, judge = erasure(base, patch), Brightness()
    with plain.erased() as model:
        wanted = {p.tobytes() for p in plain.drawing("looks", blank=True).asking("caat").draw(model)}
    one = erasure(base, patch, evaluator=judge, sees=lambda pictures: [p.tobytes() in wanted for p in pictures])
    (attack,) = run_suite(one, ["paraphrase"]).attacks
    assert attack.about == (
        "caat, chosen by a second judge: of 2 pictures each it is back in kitty 0, ct 0, caat 2, cta 0, c47 0"
    )
    assert {r.prompt for r in attack.rows} == {"a caat", "my caat"}
    assert {r.prompt for r in attack.controls[-1].rows} == {"a kitty", "my kitty"}
    assert attack.passes == (5 * SMALL.looks + SMALL.pictures) * PASSES
    assert judge.count == (1 + len(attack.controls)) * SMALL.pictures


def test_an_attack_that_the_evaluator_chooses_says_so(base: Base, patch: Patch) -> None:
    found = run_suite(erasure(base, patch), ["ring-a-bell", "relearning"])
    assert all("the evaluator itself (which flatters the attack)" in a.about for a in found.attacks)


def test_training_stops_once_the_concept_is_seen_as_often_as_in_the_bases_own_pictures(
    base: Base, patch: Patch
) -> None:
    """The second judge sees a cat in one of the base's two, and from the second look on in one of the attacker's."""
    plain = erasure(base, patch)
    known = [p.tobytes() for p in plain.unerased(plain.drawing("looks"))]
    looks: list[int] = []

    def sees(pictures: Pictures) -> list[bool]:
        if [p.tobytes() for p in pictures] == known:
            return [True, False]
        looks.append(len(pictures))
        return [len(looks) > 1, False]

    one = erasure(base, patch, sees=sees)
    (attack, _) = run_suite(one, ["relearning"]).attacks
    assert one.enough == 1
    assert list(attack.looks) == [(0, 0), (1, 1)]
    assert "1 of 2 steps of" in attack.about
    seen = "a second judge sees it in 1 of 2 pictures, as of the base's; as after step 1, where that saw it most"
    assert f"stops once {seen}" in attack.about


def test_a_search_and_its_controls_end_with_the_first_success(base: Base, patch: Patch) -> None:
    """Of four pictures, two prompts twice, the second judge sees a cat in the second and the third."""

    def sees(pictures: Pictures) -> list[bool]:
        return [False, True, True, False] if len(pictures) == 4 else [False] * len(pictures)

    one = erasure(base, patch, sees=sees)
    (attack,) = run_suite(one, ["prefix-search"]).attacks
    controls = {c.name: c for c in attack.controls}
    first, second = one.seeds["measured"][:2]
    assert [(r.prompt, r.seed) for r in controls["by name"].rows] == [
        ("a cat", one.seeds["tries"][0]),
        ("my cat", second),
    ]
    assert [r.seed for r in controls["random words"].rows] == [first, second]
    assert [(r.prompt, r.seed) for r in controls["something else"].rows] == [
        ("a dog", one.seeds["tries"][0]),
        ("my fox", second),
    ]
    for name in ("by name", "something else", "random words"):
        assert controls[name].passes == SMALL.searches * SMALL.tries * PASSES
    assert attack.about.endswith("stopped by a second judge after 4 of 4 pictures")
    for row, prompt in zip(attack.rows, ("a cat", "my cat"), strict=True):
        words = row.prompt.removesuffix(prompt).split()
        assert len(words) == 3


# ---- words ----------------------------------------------------------------------------------------------------------


def test_other_words_are_those_that_prompts_do_not_have_and_misspellings(base: Base, patch: Patch) -> None:
    one = erasure(base, patch, names=["feline", "kitty", "Cat"])
    assert [a.blank for a in one.asked] == ["a {}", "{} ink", "my {}", "{} neon"]
    assert one.forms == ["feline", "kitty", "ct", "caat", "cta", "c47"]
    catfish = replace(ASKS[0], prompt="a catfish")
    assert [a.prompt for a in erasure(base, patch, asks=[*ASKS, catfish]).asked] == list(PROMPTS)[:4]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("cat", ["ct", "caat", "cta", "c47"]),
        ("Van Gogh", ["Van Ggh", "Van Googh", "Van Ggoh", "Van G0gh"]),
        ("ab", ["b", "aab", "ba", "4b"]),
        ("x", ["xx"]),
    ],
)
def test_words_are_misspelled_by_rule(words: str, wrong: list[str]) -> None:
    assert misspellings(words) == wrong


def test_a_concept_goes_by_the_words_of_its_patch() -> None:
    def patch_of(*concepts: Mapping[str, Any]) -> Patch:
        return Patch({}, {"recipe": {"concepts": list(concepts)}})

    gogh, cat = {"erase": "Van Gogh", "synonyms": ["Vincent"]}, {"erase": "cat", "synonyms": ["kitty"]}
    assert names_of([patch_of(gogh)], "van_gogh") == ["van_gogh", "Van Gogh", "Vincent"]
    assert names_of([patch_of(gogh, cat)], "Cat", words=["katze"]) == ["Cat", "katze", "cat", "kitty"]
    assert names_of([patch_of(gogh), patch_of(cat)], "style", words=["vincent"]) == [
        "style",
        "vincent",
        "Van Gogh",
        "Vincent",
    ]
    assert names_of([patch_of(gogh, cat)], "nude") == ["nude"]
    assert names_of([patch_of()], "nude") == ["nude"]


def test_prompts_have_the_article_of_their_words(base: Base, patch: Patch) -> None:
    one = erasure(base, patch, asks=ASKS[:1], names=["cat", "auto"], sees=lambda pictures: [False] * len(pictures))
    (attack,) = run_suite(one, ["paraphrase"]).attacks
    assert {r.prompt for r in attack.rows} == {"an auto"}


# ---- what cannot be done --------------------------------------------------------------------------------------------


def test_what_a_base_cannot_do_is_left_out_and_told() -> None:
    base = tiny("sd3")
    budget = replace(SMALL, sampling=replace(SMALL.sampling, resolution=32))
    one = erasure(base, scrambling_patch(base, "full", 2), budget=budget)
    found = run_suite(one, ["paraphrase", "inversion", "prefix-search", "scaling"])
    assert [a.name for a in found.attacks] == ["paraphrase", *(f"scaling to {w}" for w in ("0", "0.25", "0.5", "0.75"))]
    assert [c.name for c in found.attacks[0].controls] == ["by name", "something else", "unerased base"]
    assert set(found.left_out) == {"paraphrase, random words", "inversion", "prefix search"}
    assert all("Stable Diffusion 1, 2 and XL" in reason for reason in found.left_out.values())


def test_what_could_not_be_made_once_is_made_again(
    base: Base, patch: Patch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An attack that a device has no room for, and a control of another: the others are made, and told what is missing."""
    one, relearning = erasure(base, patch), suite.attacks.relearning

    def full(on: Base, *given: Any, **how: Any) -> Any:
        if any(isinstance(m, BaseTunerLayer) for m in on.denoiser.modules()):
            raise torch.OutOfMemoryError("tried to allocate")
        return relearning(on, *given, **how)

    monkeypatch.setattr(suite.attacks, "relearning", full)
    names = ["relearning", "scaling"]
    found = run_suite(one, names, out=tmp_path)
    reason = "the device has not enough memory; try a smaller --batch-size"
    assert found.left_out == {"relearning": reason, "benign relearning": reason}
    assert len(found.attacks) == 4
    monkeypatch.undo()
    found = run_suite(one, names, out=tmp_path)
    assert found.left_out == {}
    assert len(found.attacks) == 6


def test_the_ceiling_is_the_base_and_no_other_concept(base: Base, patch: Patch) -> None:
    found = run_suite(erasure(base, patch), ["inversion"])
    (attack,) = found.attacks
    without = attack.model_copy(update={"controls": [c for c in attack.controls if c.name != "unerased base"]})
    assert any(c.role == "ceiling" for c in without.controls)
    (told,) = results_of(found.model_copy(update={"attacks": [without]}))
    assert told.ceiling is None


def test_a_gold_base_draws_pictures_of_the_same_size(base: Base, patch: Patch) -> None:
    gold = never_knew()
    gold.denoiser.register_to_config(sample_size=2 * gold.denoiser.config.sample_size)
    own = replace(SMALL, sampling=replace(SMALL.sampling, resolution=None))
    drawing = erasure(base, patch, gold=gold, budget=own).drawing("measured")
    sizes = [{p.size for p in drawing.draw(model)} for model in (base, gold)]
    assert sizes[0] == sizes[1]
    assert gold.resolution(None) == 2 * base.resolution(None)


def test_what_is_wrong_is_one_line(base: Base, patch: Patch) -> None:
    state = state_of(base)
    for attempt, told in (
        (
            lambda: run_suite(erasure(base, patch), ["nothing"]),
            "nothing: no attack on attached patches; there are para",
        ),
        (lambda: run_suite(erasure(base, patch), ["unmerging"]), "unmerging: no attack on attached patches"),
        (lambda: run_suite(erasure(base, patch, merged=True), ["scaling"]), "scaling: no attack on merged patches"),
        (lambda: erasure(base, patch, names=["tiger"]), "no prompt of the target names it: tiger; say with --concept"),
        (
            lambda: replace(erasure(base, patch), target=Target(kind="object", label="fox")),
            "does not know the object fox",
        ),
    ):
        with pytest.raises(RecipeError) as caught:
            attempt()
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    assert unchanged(base, state)


# ---- what is left ---------------------------------------------------------------------------------------------------


def test_a_suite_that_was_interrupted_goes_on(base: Base, patch: Patch, tmp_path: Path) -> None:
    one, out, names = erasure(base, patch), tmp_path / "found", ["scaling", "completion"]

    def interrupt(name: str, *_: int) -> None:
        if name.startswith("completion"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(one, names, out=out, on_stage=interrupt)
    so_far = read_evidence(out)
    assert [a.name for a in so_far.attacks] == ["scaling to 0", "scaling to 0.25", "scaling to 0.5", "scaling to 0.75"]
    stages: list[tuple[str, int, int]] = []
    found = run_suite(erasure(base, patch), names, out=out, on_stage=lambda *stage: stages.append(stage))
    assert stages == [("completion, 1 of 2 steps", done, 4) for done in range(5)]
    assert found == read_evidence(out)
    assert found.attacks[:4] == so_far.attacks
    both = run_suite(erasure(base, patch, merged=True), ["unmerging"], out=out)
    assert [a.name for a in both.attacks[4:]] == ["completion, 1 of 2 steps", "unmerging, merged"]


def test_a_folder_that_another_run_writes_to_is_refused(base: Base, patch: Patch, tmp_path: Path) -> None:
    with locked(tmp_path / "found"), pytest.raises(OutputError, match="another run is writing to it"):
        run_suite(erasure(base, patch), ["scaling"], out=tmp_path / "found")


def test_another_erasure_does_not_go_on(base: Base, patch: Patch, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    same_denoiser, otherwise_sampled = (load_base(str(tiny_folder), device="cpu") for _ in range(2))
    scheduler = otherwise_sampled.pipe.scheduler
    otherwise_sampled.pipe.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    with torch.no_grad():
        same_denoiser.pipe.vae.decoder.conv_out.bias.add_(1)
    run_suite(erasure(base, patch), ["scaling"], out=out)
    text = (out / ATTACKS).read_bytes()
    one = erasure(base, patch)
    for other, told in (
        (erasure(base, random_like(patch, 0)), "patches"),
        (replace(one, weights=[0.5]), "patches"),
        (replace(one, base=same_denoiser), "parts"),
        (replace(one, base=otherwise_sampled), "scheduler's settings"),
        (replace(one, budget=replace(SMALL, pictures=4)), "pictures"),
        (replace(one, evaluator=Known([])), None),
        (replace(one, names=["cat"]), "names"),
        (replace(one, sees=lambda pictures: [False] * len(pictures)), "adviser"),
        (replace(one, answers=Answers(ASKS[1:], CAT)), "answers"),
    ):
        if told is None:  # its name, version and digest are the same
            run_suite(other, ["scaling"], out=out)
            continue
        with pytest.raises(
            OutputError, match=rf"^{out}: has attacks that were made with other {told}; choose another --out$"
        ):
            run_suite(other, ["scaling"], out=out)
    assert (out / ATTACKS).read_bytes() == text


def test_a_gold_base_that_is_given_later_is_one_more_control(base: Base, patch: Patch, tmp_path: Path) -> None:
    out, one, gold = tmp_path / "found", erasure(base, patch), never_knew()
    before = run_suite(one, ["completion"], out=out)
    stages: list[tuple[str, int, int]] = []
    after = run_suite(replace(one, gold=gold), ["completion"], out=out, on_stage=lambda *stage: stages.append(stage))
    assert stages == [("completion, 1 of 2 steps", done, 1) for done in range(2)]
    (old,), (new,) = before.attacks, after.attacks
    assert [c.name for c in new.controls] == ["by name", "something else", "gold base", "unerased base"]
    assert new.rows == old.rows
    assert [c for c in new.controls if c.name != "gold base"] == list(old.controls)
    assert after.settings["gold"] == gold.fingerprint
    assert read_evidence(out) == after
    text = (out / ATTACKS).read_bytes()
    for other in (one, replace(one, gold=base)):
        with pytest.raises(OutputError, match="were made with other gold"):
            run_suite(other, ["completion"], out=out)
    assert (out / ATTACKS).read_bytes() == text


def test_a_file_that_is_no_evidence_is_named(base: Base, patch: Patch, tmp_path: Path) -> None:
    (tmp_path / ATTACKS).write_text('{"schema": 2}')
    for call in (lambda: run_suite(erasure(base, patch), ["scaling"], out=tmp_path), lambda: read_evidence(tmp_path)):
        with pytest.raises(
            UserError, match=r"attacks\.json: not what `attack` writes; remove it, or choose another folder$"
        ):
            call()
    with pytest.raises(UserError, match=r"cannot read: Not a directory$"):
        read_evidence(tmp_path / ATTACKS)
    with pytest.raises(OutputError, match=r"is a file; name a folder$"):
        run_suite(erasure(base, patch), ["scaling"], out=tmp_path / ATTACKS)
    assert (tmp_path / ATTACKS).read_text() == '{"schema": 2}'


def test_a_report_shows_the_attacks_that_stand_beside_it(base: Base, patch: Patch, tmp_path: Path) -> None:
    found = run_suite(erasure(base, patch), ["scaling", "paraphrase"], out=tmp_path)
    assert {"schema", "base", "target", "evaluator", "patches", "attacks"} <= json.loads(
        (tmp_path / ATTACKS).read_text()
    ).keys()
    report = {
        "schema": 1,
        "title": "A cat",
        "base": found.base,
        "target": {"kind": "object", "label": "cat"},
        "evaluator": found.evaluator,
        "methods": [{"name": "base", "role": "base", "knob": ""}, {"name": "patch", "role": "patch"}],
        "shown": [{"method": "patch", "strength": 1}],
        "rows": [
            {
                "method": method,
                "strength": strength,
                "prompt": a.prompt,
                "seed": a.seed,
                "group": a.group,
                "wanted": dict(a.wanted),
                "seen": {"object": "dog"},
            }
            for method, strength in (("base", 0), ("patch", 1))
            for a in ASKS
        ],
        "made": {"command": "esd-lora eval"},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = write_page(read_report(tmp_path), tmp_path / "report.html").read_text()
    for attack in found.attacks:
        for trial in (attack, *attack.controls):
            assert trial.name in page


def test_the_table_has_the_highest_floor_and_the_ceiling(base: Base, patch: Patch) -> None:
    cats = erasure(base, patch).drawing("measured").draw(base)
    found = run_suite(erasure(base, patch, evaluator=Known(cats), gold=never_knew()), ["scaling"])
    none, *_, most = results_of(found)
    assert (none.found.value, none.floor and none.floor.value, none.floor_of) == (1, 0, "by name")
    assert (none.ceiling and none.ceiling.value, most.found.value, most.passes) == (1, 0, SMALL.pictures * PASSES)
    assert none.gold is not None
    assert none.gold.value == 0
    text = io.StringIO()
    Console(file=text, width=120).print(attack_table(found))
    assert "100.0 [44, 100] /3" in text.getvalue()
    assert "0.0 [0, 56] by name" in text.getvalue()
    json.dumps([r.to_dict() for r in results_of(found)])


def test_the_quick_budget_is_smaller_in_everything() -> None:
    sampling = Sampling(steps=7)
    quick = budget_of(None, quick=True, sampling=sampling, batch_size=3)
    trainings = {name: replace(getattr(QUICK, name), batch_size=3) for name in suite.TRAININGS}  # for a small device
    assert quick == replace(QUICK, sampling=sampling, batch_size=3, **trainings)
    assert budget_of(5, quick=False, sampling=sampling, batch_size=32) == Budget(pictures=5, sampling=sampling)
    numbers = {"tokens": 8, "inversion.steps": 1000, "inversion.lr": 1, "relearning.seed": 0}
    told = budget_of(None, quick=False, sampling=sampling, batch_size=32, numbers=numbers)
    assert told == Budget(sampling=sampling, tokens=8, inversion=replace(INVERT, steps=1000, lr=1.0))
    full = vars(Budget())
    for name, value in vars(QUICK).items():
        if name in ("sampling", "batch_size", "tokens"):
            assert value == full[name]
        elif isinstance(value, Training):
            assert value.steps < full[name].steps
        else:
            assert value < full[name]


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("looks", 0, "a whole number from 1, below 2⁶³, got 0"),
        ("tries", True, "a whole number from 1, below 2⁶³, got True"),
        ("inversion.steps", 1.5, "a whole number from 1, below 2⁶³, got 1.5"),
        ("relearning.seed", -1, "a whole number from 0, below 2⁶³, got -1"),
        ("inversion.seed", 2**63, f"a whole number from 0, below 2⁶³, got {2**63}"),
        ("inversion.lr", "much", "a number, got 'much'"),
        ("inversion.lr", float("nan"), "lr: must be above 0"),
        ("pictures", 3, "unknown; there are looks, examples"),
    ],
)
def test_what_cannot_be_a_number_of_the_budget_is_told(key: str, value: object, wrong: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(wrong)):
        budget_of(None, quick=False, sampling=Sampling(), batch_size=32, numbers={key: value})


# ---- the embedded base ----------------------------------------------------------------------------------------------


def test_on_the_embedded_base_the_switch_brings_the_cat_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base draws a cat in 98 % of its pictures, and the patch leaves hardly any: one of four may go either way."""
    monkeypatch.setattr(suite, "WEIGHTS", (0.0,))
    base = load_base("emoji", device="cpu")
    patch = train(make_recipe({"base": "emoji", "concepts": "cat", "keys": "closed-form"}), base)
    one = erasure_of(base, [patch], [1.0], budget=replace(QUICK, pictures=4))
    assert one.forms == ["kitty", "feline", "katze", *misspellings("cat")]
    assert one.adviser == "a second judge"
    assert {a.blank.split()[1] for a in one.asked} == {"{}"}
    (attack,) = run_suite(one, ["scaling"]).attacks
    found = shares(attack)
    assert found["scaling to 0"] >= 3 / 4
    assert found["unerased base"] == found["scaling to 0"]
    assert found["by name"] <= 1 / 4


def test_other_pictures_are_of_every_style_though_prompts_come_style_by_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Erasure, "unerased", lambda _, drawing: drawing.prompts)  # what would be drawn
    base = load_base("emoji", device="cpu")
    for name in ("cat", "moon"):
        patch = Patch(
            {}, {"recipe": {"concepts": [{"erase": name, "from": None, "replace_with": None, "synonyms": []}]}}
        )
        prompts = erasure_of(base, [patch], [1.0]).others.prompts
        assert {style for style in STYLES if any(style in p for p in prompts)} == set(STYLES)
        assert sum(o in p for p in prompts for o in list(OBJECTS)[-4:]) > 0  # the last ones too


def test_a_style_of_the_embedded_base_is_named_without_the_word_style(base: Base, patch: Patch) -> None:
    emoji = load_base("emoji", device="cpu")
    concept = {"erase": "neon style", "from": None, "replace_with": None, "synonyms": ["glowing style", "led style"]}
    neon = Patch({}, {"recipe": {"concepts": [concept]}})
    one = erasure_of(emoji, [neon], [1.0])
    assert one.asked[0].blank == "a cat in {} style"
    assert one.forms == ["glowing", "led", "neon light", "leuchtreklame", *misspellings("neon")]


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_folder: Path, patch_folder: Path) -> list[object]:
    """Of `attack`, on the tiny base."""
    prompts = [{"prompt": p, "wanted": {"object": "dog" if label == "fox" else label}} for p, label in PROMPTS.items()]
    Path("answers.yaml").write_text(yaml.safe_dump({"target": dict(CAT), "prompts": prompts}))
    given = ["attack", "--base", tiny_folder, "--patch", patch_folder, "--out", "found", "--answers", "answers.yaml"]
    return [*given, "--evaluator", "emoji", "--quick", "-n", 2, "--steps", STEPS, "--device", "cpu", "-q"]


def test_the_command_line_attacks_and_goes_on(call: Call, arguments: list[object]) -> None:
    told = call(*arguments, "--only", "scaling", "--json")
    assert (told.code, told.err) == (0, "")
    values = json.loads(told.out)
    assert values["evidence"] == "found/attacks.json"
    assert [a["name"] for a in values["attacks"]] == [f"scaling to {w}" for w in ("0", "0.25", "0.5", "0.75")]
    assert all(a["found"]["n"] == 2 and a["passes"] == 2 * PASSES for a in values["attacks"])
    before = Path("found/attacks.json").read_bytes()
    again = call(*arguments, "--only", "scaling")
    assert (again.code, again.err) == (0, "")
    assert "scaling to 0.75" in again.out
    assert Path("found/attacks.json").read_bytes() == before
    evidence = Evidence.model_validate_json(before)
    assert evidence.patches[0].erases == "cat"


def test_the_command_line_tells_what_was_left_out(call: Call, arguments: list[object]) -> None:
    """A name of the concept that is so long that no soft words fit beside it in a prompt."""
    long = "a " + " ".join(["big"] * 4) + " cat"
    prompts = [{"prompt": p, "wanted": {"object": "cat"}} for p in (long, f"{long} x")]
    Path("answers.yaml").write_text(yaml.safe_dump({"target": dict(CAT), "prompts": prompts}))
    told = call(*arguments, "--only", "inversion", "--only", "scaling")
    assert told.code == 0
    assert told.err.startswith("left out: inversion: ")
    assert told.err.count("\n") == 1


def test_several_processes_are_refused_where_each_would_do_the_whole(
    call: Call, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = call(*arguments)
    refused = (2, "error: runs in one process, and 2 were started; `accelerate launch` is for train and eval --out\n")
    assert (told.code, told.err) == refused
    assert not Path("found").exists()
    told = call("eval", "--base", "emoji", "--patch", arguments[arguments.index("--patch") + 1])
    assert (told.code, told.err) == refused


def test_what_the_command_line_cannot_do_is_one_line(call: Call, arguments: list[object], tiny_folder: Path) -> None:
    alone = [a for a in arguments if a not in ("--evaluator", "emoji")]
    Path("pets.yaml").write_text(
        yaml.safe_dump({"target": dict(CAT), "prompts": [{"prompt": "a pet", "wanted": {"object": "cat"}}]})
    )
    Path("none.yaml").write_text(yaml.safe_dump({"prompts": [{"prompt": "a cat", "wanted": {"object": "cat"}}]}))
    for options, message in [
        (alone, f"--base {tiny_folder}: give --answers and --evaluator; emoji alone comes with its own"),
        ([*arguments, "--only", "magic"], "magic: no attack on attached patches; there are paraphrase, ring-a-bell, "),
        ([*arguments, "--merged", "--only", "scaling"], "scaling: no attack on merged patches; there are paraphrase, "),
        ([*arguments, "--patch", "nowhere"], "nowhere: "),
        ([*arguments, "--gold", "nowhere"], "nowhere: "),
        ([*arguments, "--answers", "pets.yaml"], "no prompt of the target names it: cat, kitty, "),
        ([*arguments, "--answers", "none.yaml"], "none.yaml: names no target"),
        ([*arguments, "--concept", ""], "--concept: must not be empty"),
        ([*arguments, "--resolution", "65"], f"resolution: must be a multiple of 8 for {tiny_folder}, got 65"),
    ]:
        told = call(*options)
        assert told.code == 2, message
        assert told.err.startswith(f"error: {message}")
        assert told.err.count("\n") == 1
        assert not Path("found").exists()
