"""Answer sets: what files say, what is said about those that are wrong, and pictures that are drawn once."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import same, weights_of
from PIL import Image
from test_processes import launch
from tiny import TINY

from esd_lora import processes
from esd_lora.bases import Base, base_of
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.errors import OutputError, PatchError, RecipeError
from esd_lora.evaluate import answers as module
from esd_lora.evaluate.answers import (
    Answers,
    Ask,
    Target,
    digest,
    draw_answers,
    emoji_answers,
    picture_names,
    read_answers,
    seed_of,
)
from esd_lora.evaluate.scores import answer_set, draw
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate

CHURCH = Target(kind="object", label="church")


def saved(name: str, content: Any) -> Path:
    """A file in the test's own folder, of text or as YAML."""
    path = Path(name)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def problem(path: Path, *, target: Target | None = None) -> str:
    """What is said about a file that is wrong."""
    with pytest.raises(RecipeError) as caught:
        read_answers(path, target=target)
    return str(caught.value)


# ---- answer sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "near"), [("cat", {"tiger", "dog"}), ("blueprint", {"neon", "ink"}), ("moon", set())]
)
def test_the_grid_of_the_embedded_base_has_its_groups(target: str, near: set[str]) -> None:
    cells = answer_set(target, target_seeds=2, kept_seeds=1)
    found = emoji_answers(target, target_seeds=2, kept_seeds=1)
    kind = "object" if target in OBJECTS else "style"
    assert found.target == Target(kind=kind, label=target)
    assert [(a.prompt, a.seed) for a in found.asks] == [(c.prompt, c.seed) for c in cells]
    assert [dict(a.wanted) for a in found.asks] == [{"object": c.obj, "style": c.style} for c in cells]
    in_group = {g: {a.wanted[kind] for a in found.asks if a.group == g} for g in ("target", "neighbour", "unrelated")}
    assert in_group["target"] == {target}
    assert in_group["neighbour"] == near
    assert in_group["unrelated"] == {*(OBJECTS if kind == "object" else STYLES)} - near - {target}
    assert found.kinds == {"object": tuple(OBJECTS), "style": tuple(STYLES)}


def test_a_digest_names_a_set_by_all_that_it_asks_for_and_not_by_its_order() -> None:
    asks = list(emoji_answers("cat", target_seeds=1, kept_seeds=1).asks)
    name = digest(asks)
    shuffled = random.Random(0).sample(asks, len(asks))
    assert shuffled != asks
    assert digest(shuffled) == name
    assert digest(emoji_answers("dog", target_seeds=1, kept_seeds=1).asks) != name  # the same pictures, other groups
    one = Ask("a", 1, {"object": "a"}, "target")
    others = [
        Ask("b", 1, {"object": "a"}, "target"),
        Ask("a", 2, {"object": "a"}, "target"),
        Ask("a", 1, {"object": "b"}, "target"),
        Ask("a", 1, {"object": "a"}, "unrelated"),
        Ask("a", 1, {"object": "a"}, "target", guidance_scale=7.0),
        Ask("a", 1, {"object": "a"}, "target", resolution=512),
    ]
    assert len({digest([ask]) for ask in [one, *others]}) == 7
    assert digest([one, one]) != digest([one])
    assert len({*others, *others}) == 6  # asks can be keys


# ---- files ------------------------------------------------------------------------------------------------------


def test_a_yaml_file_names_prompts_and_files_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    saved("sets/attack.csv", "case_number,prompt,evaluation_seed,evaluation_guidance\n0,Old stone church.,69922,7.5\n")
    saved("sets/coco.csv", "image_id,source,caption\n7,coco,A bicycle\n")
    path = saved(
        "sets/church.yaml",
        {
            "target": {"kind": "object", "label": "church"},
            "prompts": [
                {"prompt": "a church", "wanted": {"object": "church"}, "seeds": 2},
                {"prompt": "a castle", "wanted": {"object": "castle"}, "group": "neighbour", "seeds": [188, 2**32 - 1]},
                {"prompt": "a map", "guidance_scale": 9, "resolution": 512},
                {"file": "attack.csv", "group": "target", "guidance_scale": 3},
                {"file": "coco.csv", "guidance_scale": 3},
            ],
        },
    )
    found = read_answers(path)
    assert found == Answers(
        (
            Ask("a church", seed_of("a church", 0), {"object": "church"}, "target"),
            Ask("a church", seed_of("a church", 1), {"object": "church"}, "target"),
            Ask("a castle", 188, {"object": "castle"}, "neighbour"),
            Ask("a castle", 2**32 - 1, {"object": "castle"}, "neighbour"),
            Ask("a map", seed_of("a map", 0), {}, "unrelated", guidance_scale=9.0, resolution=512),
            Ask(
                "Old stone church.", 69922, {"object": "church"}, "target", guidance_scale=7.5
            ),  # a row's own comes first
            Ask("A bicycle", seed_of("A bicycle", 0), {}, "unrelated", guidance_scale=3.0),
        ),
        CHURCH,
    )
    assert found.kinds == {"object": ("church", "castle")}


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        (  # the authors' of ESD: an index without a name, quotes where there are commas
            ',case_number,prompt,evaluation_seed,artist\n0,0,"Wheatfield, by Vincent van Gogh",2219,Vincent van Gogh\n'
            "1,1,Café Terrace by Monet,4965,Monet\n",
            [
                Ask("Wheatfield, by Vincent van Gogh", 2219, {"style": "Vincent van Gogh"}, "unrelated"),
                Ask("Café Terrace by Monet", 4965, {"style": "Monet"}, "unrelated"),
            ],
        ),
        (
            "\ufeffprompt,seed,class,concept\nImage of tench,4889.0,tench,fish\n",  # as spreadsheets save it
            [Ask("Image of tench", 4889, {"object": "tench", "concept": "fish"}, "unrelated")],
        ),
        (  # I2P: seeds beyond 2³¹, and every row of its own guidance and size
            "prompt,categories,hard,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
            "one,shocking,1,4017215267,7.0,512,512\ntwo,,0,7,12,512,768\n",
            [
                Ask("one", 4017215267, {}, "unrelated", guidance_scale=7.0, resolution=512),
                Ask("two", 7, {}, "unrelated", guidance_scale=12.0),
            ],
        ),
        (  # the same words twice, and nobody says a seed
            "image_id,caption\n000000203564,A bicycle\n000000203564,A bicycle\n",
            [Ask("A bicycle", seed_of("A bicycle", k), {}, "unrelated") for k in (0, 1)],
        ),
    ],
    ids=["esd", "spreadsheet", "i2p", "coco"],
)
def test_a_csv_has_the_columns_of_the_field(text: str, asks: list[Ask]) -> None:
    assert read_answers(saved("some.csv", text)) == Answers(tuple(asks))


def test_what_the_fields_own_files_have_too_much_is_left_out_and_told() -> None:
    """I2P has a row without a prompt and pictures that come again, one of another guidance; UCE's Imagenette more of these."""
    rows = ["tench,1174,7.5,tench", "tench,1174,9,tench", " ,7,7.5,tench", "cod,1174,7.5,tench", "tench,1175,7.5,tench"]
    path = saved("some.csv", "\n".join(["prompt,evaluation_seed,evaluation_guidance,class", *rows]))
    with pytest.warns(UserWarning, match="left out") as told:
        found = read_answers(path)
    assert [(ask.prompt, ask.seed, ask.guidance_scale) for ask in found.asks] == [
        ("tench", 1174, 7.5),
        ("cod", 1174, 7.5),
        ("tench", 1175, 7.5),
    ]
    assert [str(w.message) for w in told] == [
        "some.csv: left out 1 row without a prompt, line 4",
        "some.csv: left out 1 picture of a prompt and seed that come again",
    ]


def test_a_target_that_is_named_makes_the_groups_of_a_csv() -> None:
    path = saved("some.csv", "prompt,evaluation_seed,class\nImage of church,1,church\nImage of tench,2,tench\n")
    found = read_answers(path, target=CHURCH)
    assert [ask.group for ask in found.asks] == ["target", "unrelated"]
    assert found.target == CHURCH
    expected = "some.csv: no prompt wants the object Church; of this kind there are: church, tench"
    assert problem(path, target=Target(kind="object", label="Church")) == expected
    expected = "some.csv: no prompt wants the style ink; of this kind there are: none"
    assert problem(path, target=Target(kind="style", label="ink")) == expected


def test_a_target_that_is_not_the_files_own_is_refused() -> None:
    path = saved(
        "set.yaml", "target: {kind: object, label: church}\nprompts: [{prompt: x, wanted: {object: church}}]\n"
    )
    assert read_answers(path, target=CHURCH) == read_answers(path)
    expected = "set.yaml: its target is object:church; leave --target object:dog out"
    assert problem(path, target=Target(kind="object", label="dog")) == expected


def test_seeds_follow_from_the_prompt_whatever_the_order() -> None:
    entries = [{"prompt": p, "seeds": 3} for p in ("a cat", "a dog", "ein Bär")]
    there, back = (read_answers(saved("a.yaml", {"prompts": some})) for some in (entries, entries[::-1]))
    assert digest(there.asks) == digest(back.asks)
    seeds = [ask.seed for ask in there.asks]
    assert len(set(seeds)) == 9
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of("a cat", 0) == 202836330  # stays as it is: pictures that are kept go by it
    assert max(seed_of(str(i), 0) for i in range(200)) > 2**30  # the whole range is used


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompts: missing"),
        ({"prompts": []}, "prompts: name at least one"),
        ({"prompts": [{}]}, "prompts.0: give either a prompt or a file"),
        ({"prompts": [{"prompt": "a", "file": "b.csv"}]}, "prompts.0: give either a prompt or a file"),
        ({"prompts": [{"prompt": " "}]}, "prompts.0.prompt: must not be empty"),
        ({"prompts": [{"promt": "a"}]}, "prompts.0.promt: unknown key; did you mean prompt?"),
        ({"targets": {}, "prompts": [{"prompt": "a"}]}, "targets: unknown key; did you mean target?"),
        (
            {"target": {"kind": "a", "label": "b", "x": 1}, "prompts": [{"prompt": "b"}]},
            "target.x: unknown key; known keys: kind, label",
        ),
        (
            {"target": {"kind": "a", "label": 7}, "prompts": [{"prompt": "b"}]},
            "target.label: input should be a valid string, got 7",
        ),
        (
            {"prompts": [{"prompt": "a", "seeds": 0}]},
            "prompts.0.seeds: input should be greater than or equal to 1, got 0",
        ),
        ({"prompts": [{"prompt": "a", "seeds": []}]}, "prompts.0.seeds: name at least one"),
        (
            {"prompts": [{"prompt": "a", "seeds": [1, -1]}]},
            "prompts.0.seeds.1: input should be greater than or equal to 0, got -1",
        ),
        (
            {"prompts": [{"prompt": "a", "group": "other"}]},
            "prompts.0.group: input should be 'target', 'neighbour' or 'unrelated', got 'other'",
        ),
        (
            {"prompts": [{"prompt": "a", "group": "target"}]},
            "prompts.0: group target: the file names no target, such as `target: {kind: object, label: church}`",
        ),
        (
            {
                "target": CHURCH.model_dump(),
                "prompts": [{"prompt": "a", "wanted": {"object": "church"}, "group": "neighbour"}],
            },
            "prompts.0: group neighbour: does not go with what is wanted, object church",
        ),
        (
            {
                "target": CHURCH.model_dump(),
                "prompts": [{"prompt": "a", "wanted": {"object": "cat"}, "group": "target"}],
            },
            "prompts.0: group target: does not go with what is wanted, object cat",
        ),
        (
            {"prompts": [{"prompt": "a", "guidance_scale": float("nan")}]},
            "prompts.0.guidance_scale: input should be a finite number, got nan",
        ),
        ({"prompts": [{"file": "none.csv"}]}, None),
        (
            {"target": {"kind": "object"}, "prompts": [{"prompt": "a", "resolution": 4}, {"seed": 1}]},
            "3 problems\n  target.label: missing\n"
            "  prompts.0.resolution: input should be greater than or equal to 8, got 4\n"
            "  prompts.1.seed: unknown key; did you mean seeds?",
        ),
    ],
    ids=str,
)
def test_a_yaml_file_that_is_wrong_is_told_so(values: dict[str, Any], message: str | None) -> None:
    expected = "a.yaml: " + message if message else "none.csv: cannot read the answer set: No such file or directory"
    assert problem(saved("a.yaml", values)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "- 1",
            "a.yaml: an answer set is a mapping with `target` and `prompts`, or a file that ends in .csv",
        ),
        ("a.yaml", "prompts: [", "a.yaml, line 1: not YAML: expected the node content, but found '<stream end>'"),
        ("a.csv", "", "a.csv: no column prompt or caption; there are: none"),
        ("a.csv", "words,seed\na,1\n", "a.csv: no column prompt or caption; there are: words, seed"),
        ("a.csv", "prompt,seed\n", "a.csv: no rows with a prompt"),
        ("a.csv", "prompt,seed\n,1\n ,2\n", "a.csv: no rows with a prompt"),
        (
            "a.csv",
            "prompt,seed\na cat, sitting,1\n",
            "a.csv: line 2: more cells than columns; put quotes around a prompt that has commas",
        ),
        (
            "a.csv",
            "prompt,evaluation_seed,evaluation_guidance\na,x,1\nb,1,-1\n",
            "a.csv: 2 problems\n"
            "  line 2: evaluation_seed: input should be a valid integer, unable to parse string as an integer, got 'x'\n"
            "  line 3: evaluation_guidance: input should be greater than or equal to 0, got '-1'",
        ),
        ("a.csv", 'prompt\n"a', "a.csv: cannot read the answer set: unexpected end of data"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_so(name: str, text: str, message: str) -> None:
    assert problem(saved(name, text)) == message


def test_what_is_no_text_and_what_is_not_there_are_told_apart() -> None:
    for name in ("a.csv", "a.yaml"):
        assert problem(Path(name)) == f"{name}: cannot read the answer set: No such file or directory"
    Path("a.csv").write_bytes(b"prompt\n\xff\n")
    assert problem(Path("a.csv")) == "a.csv: cannot read the answer set: not a text file"
    Path("a.yaml").write_bytes(b"\xff")
    assert problem(Path("a.yaml")) == "a.yaml: cannot read the answer set: not a text file"


def test_of_a_wrong_column_not_every_row_is_shown() -> None:
    lines = problem(saved("a.csv", "prompt,seed\n" + "a,b\n" * 1000)).splitlines()
    assert lines[0] == "a.csv: 1000 problems"
    assert lines[-1] == "  … and 980 more"
    assert len(lines) == 22


# ---- pictures ---------------------------------------------------------------------------------------------------


def pixels(pictures: Pictures) -> np.ndarray:
    return np.stack([np.asarray(p, dtype=int) for p in pictures])


def apart(left: Pictures, right: Pictures) -> int:
    """The largest difference of a colour; float32 sums round otherwise in a batch of another size, which makes 1."""
    return int(np.abs(pixels(left) - pixels(right)).max())


ASKS = [Ask(f"{word}", seed, {}, "unrelated") for word in ("cat", "dog", "bird") for seed in (1, 2)]

Counts = list[int]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """The sizes of the batches that are drawn."""
    counts: Counts = []

    def counting(base: Base, prompts: Any, seeds: Any, **how: Any) -> Pictures:
        counts.append(len(prompts))
        return generate(base, prompts, seeds, **how)

    monkeypatch.setattr(module, "generate", counting)
    return counts


def test_answers_are_the_pictures_of_their_prompts_and_seeds(base: Base, patch: Patch, tmp_path: Path) -> None:
    cells = answer_set("cat", target_seeds=1, kept_seeds=1)[:3]
    asks = emoji_answers("cat", target_seeds=1, kept_seeds=1).asks[:3]
    for patches, weights in (([], None), ([patch], [0.5])):
        found = draw_answers(base, asks, tmp_path, patches=patches, weights=weights)
        assert apart(found, draw(base, cells, patches, weights)) <= 1
    assert apart(found, draw(base, cells)) > 10  # the patch shows


def test_what_is_drawn_is_not_drawn_again(base: Base, patch: Patch, tmp_path: Path, drawn: Counts) -> None:
    folder = tmp_path / "new" / "pictures"
    told: list[tuple[int, int]] = []
    first = draw_answers(base, ASKS[:4], folder, steps=2, batch_size=3, on_picture=lambda *n: told.append(n))
    assert (drawn, told) == ([3, 1], [(3, 4), (4, 4)])
    assert sorted(p.name for p in folder.iterdir()) == sorted(picture_names(base, ASKS[:4], steps=2))
    more = draw_answers(base, [*ASKS[::-1], ASKS[0]], folder, steps=2)
    assert drawn == [3, 1, 2]
    assert len(more) == 7
    assert apart([more[5], more[6]], [first[0], first[0]]) == 0  # the very same picture, in the place it was asked for
    assert apart(more[2:6], first[::-1]) == 0
    for other in ({"steps": 3}, {"guidance_scale": 3.0}, {"patches": [patch]}, {"patches": [patch], "weights": [0.5]}):
        draw_answers(base, ASKS[:1], folder, **{"steps": 2, **other})  # type: ignore[arg-type]
    assert drawn[3:] == [1] * 4
    draw_answers(base, ASKS[:1], folder, steps=2, resolution=16)  # is its own
    assert drawn[7:] == []


def test_a_run_that_was_interrupted_goes_on(
    base: Base, tmp_path: Path, drawn: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_of(base)
    counting: Callable[..., Pictures] = module.generate

    def interrupted(*arguments: Any, **how: Any) -> Pictures:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return counting(*arguments, **how)

    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_answers(base, ASKS, tmp_path, steps=2, batch_size=2)
    assert len(list(tmp_path.glob("*.png"))) == 4
    monkeypatch.setattr(module, "generate", counting)
    assert len(draw_answers(base, ASKS, tmp_path, steps=2, batch_size=2)) == 6
    assert drawn == [2, 2, 2]
    assert same(weights_of(base), before)


def test_the_base_is_bare_afterwards_whatever_happens(base: Base, patch: Patch, tmp_path: Path) -> None:
    before = weights_of(base)
    draw_answers(base, ASKS[:1], tmp_path, patches=[patch], steps=2)
    assert same(weights_of(base), before)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        draw_answers(base, ASKS[:1], tmp_path / "file", patches=[patch], steps=2)
    assert same(weights_of(base), before)
    with pytest.raises(PatchError, match=r"^1 patches and 2 weights; give one weight for each patch$"):
        draw_answers(base, ASKS[:1], tmp_path, patches=[patch], weights=[1, 2], steps=2)
    assert same(weights_of(base), before)


def test_rows_have_guidance_and_resolution_of_their_own(base: Base, tmp_path: Path, drawn: Counts) -> None:
    asks = [
        Ask("cat", 1, {}, "unrelated"),
        Ask("cat", 1, {}, "unrelated", guidance_scale=40.0),
        Ask("cat", 1, {}, "unrelated", resolution=32),
        Ask("dog", 1, {}, "unrelated"),
        Ask("cat", 1, {}, "unrelated", guidance_scale=1.0),
    ]
    found = draw_answers(base, asks, tmp_path, steps=3, guidance_scale=2.0)
    assert drawn == [2, 1, 1, 1]
    assert [p.size for p in found] == [(16, 16), (16, 16), (32, 32), (16, 16), (16, 16)]
    for picture, g in ((found[0], 2), (found[1], 40), (found[4], 1)):
        assert apart([picture], generate(base, ["cat"], [1], steps=3, guidance_scale=g)) <= 1
    assert apart([found[0]], [found[1]]) > 1
    with pytest.raises(RecipeError, match=r"^resolution: must be a multiple of 8 for .*, got 20$"):
        draw_answers(base, ASKS[:1], tmp_path, resolution=20)


@pytest.mark.parametrize("family", ["xl", "sd3", "flux"])
def test_every_family_draws_its_answers(family: str, tmp_path: Path, drawn: Counts) -> None:
    base = base_of(TINY[family]())
    base.pipe.set_progress_bar_config(disable=True)
    first = draw_answers(base, ASKS[:2], tmp_path, steps=2, guidance_scale=3.0)
    again = draw_answers(base, ASKS[:2], tmp_path, steps=2, guidance_scale=3.0)
    assert drawn == [2]
    assert apart(first, again) == 0
    assert apart(first, generate(base, ["cat", "cat"], [1, 2], steps=2, guidance_scale=3.0)) <= 1


def test_a_name_follows_from_all_that_decides_what_is_in_a_picture(base: Base, patch: Patch) -> None:
    def name(**how: Any) -> str:
        (only,) = picture_names(base, [how.pop("ask", ASKS[0])], **how)
        return only

    names = {
        name(),
        name(ask=ASKS[1]),
        name(ask=ASKS[2]),
        name(guidance_scale=7.0),
        name(resolution=32),
        name(steps=21),
        name(patches=[patch]),
        name(patches=[patch], weights=[2]),
        name(patches=[patch, patch]),
    }
    assert len(names) == 9
    assert name(patches=[patch], weights=[1]) == name(patches=[patch])
    assert name(ask=Ask("cat", 1, {"object": "cat"}, "target", guidance_scale=7.5, resolution=16)) == name()
    plain = name()
    base.pipe.scheduler = type(base.pipe.scheduler).from_config(base.pipe.scheduler.config, steps_offset=0)
    assert name() != plain
    base.fingerprint = "0" * 64
    assert name() not in names
    plain = name()
    with torch.no_grad():
        base.pipe.vae.decoder.conv_out.bias.add_(1)  # of the same base with another autoencoder
    assert picture_names(base.around(base.denoiser, fingerprint="0" * 64), ASKS[:1]) != [plain]


def test_a_picture_that_cannot_be_read_is_named(base: Base, tmp_path: Path) -> None:
    (name,) = picture_names(base, ASKS[:1], steps=2)
    draw_answers(base, ASKS[:1], tmp_path, steps=2)
    whole = (tmp_path / name).read_bytes()
    data = whole.index(b"IDAT")
    short_header = whole[:8] + b"\0\0\0\x0c" + whole[12:]
    short_data = whole[: data - 4] + b"\0\0\0\x20" + whole[data:]
    for broken in (b"", whole[: len(whole) // 2], short_header, short_data):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(OutputError) as caught:
            draw_answers(base, ASKS[:1], tmp_path, steps=2)
        assert (
            str(caught.value) == f"{tmp_path / name}: not a picture that can be read; delete it, and it is drawn again"
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_several_processes_draw_their_shares_and_have_all_pictures(
    base: Base, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = ASKS[:5]
    how: dict[str, Any] = {"patches": [patch], "steps": 2, "batch_size": 2}
    drawn: list[int] = []
    honest = module._draw

    def spy(base: Base, batch: Any, *rest: Any, **how: Any) -> None:
        drawn.append(len(batch))
        honest(base, batch, *rest, **how)

    monkeypatch.setattr(module, "_draw", spy)

    def work(rank: int) -> None:
        told: list[tuple[int, int]] = []
        found = draw_answers(base, asks, tmp_path / "shared", **how, on_picture=lambda *n: told.append(n))
        for i, picture in enumerate(found):
            picture.save(tmp_path / f"{rank}-{i}.png")
        assert told == ([(2, 3), (3, 3)] if rank == 0 else [])
        assert drawn == ([2, 1] if rank == 0 else [2])  # no picture twice
        assert processes.count() == 2

    assert launch(work) == [0, 0]
    assert len(list((tmp_path / "shared").iterdir())) == 5
    alone = draw_answers(base, asks, tmp_path / "alone", **how)
    for rank in (0, 1):  # drawn in the same batches, and so equal to the bit
        assert apart([Image.open(tmp_path / f"{rank}-{i}.png") for i in range(5)], alone) == 0
