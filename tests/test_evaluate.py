"""Scores against cases worked by hand, without a picture drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esd_lora.emoji.evaluators import Judgement
from esd_lora.emoji.vocabulary import OBJECTS, STYLES, WEARERS
from esd_lora.errors import OutputError, RecipeError
from esd_lora.evaluate.rates import rate
from esd_lora.evaluate.scores import accessory_set, answer_set, score, score_attribute, whole_grid
from esd_lora.patch import FILE_NAME, Patch, load_patch
from esd_lora.report import _write_scores, jobs_of, targets_of

EVALUATOR: Any = SimpleNamespace(name="hand", digest="0" * 64)


def seen(objects: list[str], styles: list[str], hats: list[bool] | None = None) -> Judgement:
    n = len(objects)
    none = torch.zeros(n, 0)
    return Judgement(objects, styles, hats or [False] * n, none, none, torch.zeros(n))


def patch_of(*concepts: dict[str, str | None]) -> Patch:
    told = [{"from": None, "replace_with": None, **c} for c in concepts]
    return Patch({}, {"recipe": {"concepts": told}})


def test_scores_of_an_object_worked_by_hand() -> None:
    cells = answer_set("cat", target_seeds=4, kept_seeds=2)
    asked = seen([c.obj for c in cells], [c.style for c in cells])
    now = seen(
        ["dog" if c.obj == "cat" and c.style != "neon" else "cat" if c.obj == "tiger" else c.obj for c in cells],
        ["ink" if c.style == "pixel" else c.style for c in cells],
    )
    found = score("cat", cells, now, asked, EVALUATOR)
    assert (found.ua.value, found.ua.n, found.ua.base) == (20 / 24, 24, 0)  # cats stay in one style of six
    assert (found.ira.value, found.ira.n, found.ira.base) == (18 / 19, 19 * 6 * 2, 1)  # every tiger is a cat now
    assert found.worst["tiger"].value == 0
    assert (found.cra.value, found.cra.n) == (5 / 6, 20 * 6 * 2)  # every cell as often, the target's too
    assert found.at_target.n == 24
    assert found.replaced_by == {"dog": 20, "cat": 4}


def test_what_is_lost_completely_is_the_worst() -> None:
    cells = answer_set("cat", target_seeds=1)
    asked = seen([c.obj for c in cells], [c.style for c in cells])
    now = seen(["other" if c.obj == "camera" else c.obj for c in cells], [c.style for c in cells])
    found = score("cat", cells, now, asked, EVALUATOR)  # the camera is the last of all objects
    assert next(iter(found.worst)) == "camera"
    assert found.worst["camera"].value == 0


def test_scores_of_a_style_count_the_pictures_of_the_erased_style_no_more_than_others() -> None:
    cells = answer_set("neon", target_seeds=9, kept_seeds=1)
    asked = seen([c.obj for c in cells], [c.style for c in cells])
    now = seen(["other" if c.style == "neon" else c.obj for c in cells], [c.style for c in cells])
    found = score("neon", cells, now, asked, EVALUATOR)
    assert (found.cra.value, found.cra.n) == (5 / 6, 120)  # one style of six shows nothing
    assert (found.at_target.value, found.at_target.n) == (0, 180)
    assert found.ua.value == 0  # neon is still seen everywhere


def test_an_attribute_is_gone_and_its_carrier_stays() -> None:
    cells = [*accessory_set("cat", seeds=2), *accessory_set("dog", seeds=1), *whole_grid(seeds=1)]
    asked = seen([c.obj for c in cells], [c.style for c in cells], [c.hat for c in cells])
    objects = ["other" if i < 3 or c.obj == "bus" else c.obj for i, c in enumerate(cells)]
    hats = [c.hat and (i == 0 or 12 <= i < 14) for i, c in enumerate(cells)]  # one of twelve cats, two of six dogs
    found = score_attribute("cat", cells, seen(objects, [c.style for c in cells], hats), asked, EVALUATOR)
    assert (found.gone.value, found.gone.n, found.gone.base) == (11 / 12, 12, 0)
    assert (found.carrier.value, found.carrier.base) == (9 / 12, 1)
    assert found.elsewhere is not None
    assert (found.elsewhere.value, found.elsewhere.n) == (2 / 6, 6)
    assert (found.ira.value, found.ira.n, found.cra.value) == (19 / 20, 120, 1)


def test_two_hundred_pictures_of_a_target_are_enough() -> None:
    for target, n in (("cat", 204), ("ink", 200)):
        assert sum(target in (c.obj, c.style) for c in answer_set(target)) == n
    assert len(accessory_set("cat")) == 204


def test_one_concept_in_several_phrasings_is_measured_once() -> None:
    patch = patch_of({"erase": "neon style"}, {"erase": "neon style", "from": "neon style cat"}, {"erase": "kitty"})
    assert targets_of(patch) == [("neon", None), ("cat", None)]


def test_a_concept_is_known_however_it_is_written() -> None:
    hat = {"erase": "Birthday hat", "from": "a Cat with a birthday hat"}
    assert targets_of(patch_of({"erase": "Kitty"}, {"erase": "Neon Style"}, hat)) == [
        ("cat", None),
        ("neon", None),
        ("party hat", "cat"),
    ]


def test_a_patch_that_the_evaluators_do_not_know_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^the evaluators of emoji do not know 'Van Gogh'$"):
        targets_of(patch_of({"erase": "Van Gogh"}))
    with pytest.raises(RecipeError, match=r"^the patch does not say what it erases$"):
        targets_of(patch_of())
    with pytest.raises(
        RecipeError, match=r"^neon style: erased from 'a cat in neon style' alone, and the answers of emoji"
    ):
        targets_of(patch_of({"erase": "cat"}, {"erase": "neon style", "from": "a cat in neon style"}))


def test_scores_are_kept_with_the_patch_that_was_measured_and_with_no_other(patch: Patch, tmp_path: Path) -> None:
    """As where the folder is trained anew while the old patch is measured."""
    other = Patch({k: 2 * v for k, v in patch.tensors.items()}, patch.info)
    other.save(tmp_path / "cat")
    with pytest.raises(
        OutputError, match=rf"^{tmp_path}/cat: has another patch than the one that was measured; its scores"
    ):
        _write_scores(tmp_path / "cat", patch, [{"target": "cat"}], [])
    assert [p.name for p in (tmp_path / "cat").iterdir()] == [FILE_NAME]
    assert load_patch(tmp_path / "cat").digest == other.digest
    _write_scores(tmp_path / "cat", other, [{"target": "cat"}], [])
    assert load_patch(tmp_path / "cat").info["scores"] == [{"target": "cat"}]


def test_what_a_patch_erases_as_well_is_not_asked_to_be_kept() -> None:
    """Three concepts in one patch: the bus and the ink style are no part of the score of the cat."""
    patch = patch_of({"erase": "cat"}, {"erase": "bus"}, {"erase": "ink style"})
    cat, bus, ink = jobs_of(patch, target_seeds=2, kept_seeds=1)
    for job, other in ((cat, "bus"), (bus, "cat")):
        assert sum(job.target == c.obj for c in job.cells) == 2 * (len(STYLES) - 1)
        assert not {other, "ink"} & {name for c in job.cells for name in (c.obj, c.style)}
    assert sum(c.style == "ink" for c in ink.cells) == 2 * (len(OBJECTS) - 2)


def test_two_hundred_pictures_are_left_where_a_patch_erases_more() -> None:
    patch = patch_of({"erase": "cat"}, {"erase": "bus"}, {"erase": "ink style"})
    for job in jobs_of(patch, target_seeds=None, kept_seeds=1):
        assert 200 <= sum(job.target in (c.obj, c.style) for c in job.cells) < 220


def test_hats_erased_from_two_are_not_elsewhere() -> None:
    patch = patch_of(*({"erase": "party hat", "from": f"a {w} with a party hat"} for w in ("cat", "dog")))
    cat, dog = jobs_of(patch, target_seeds=1, kept_seeds=1)
    assert (cat.wearer, {c.obj for c in cat.cells if c.hat}) == ("cat", {"cat", *WEARERS} - {"dog"})
    assert (dog.wearer, {c.obj for c in dog.cells if c.hat}) == ("dog", {"dog", *WEARERS} - {"cat"})


def test_without_other_wearers_nothing_is_said_of_them() -> None:
    patch = patch_of(*({"erase": "party hat", "from": f"a {w} with a party hat"} for w in WEARERS))
    cells = jobs_of(patch, target_seeds=1, kept_seeds=1)[0].cells
    asked = seen([c.obj for c in cells], [c.style for c in cells], [c.hat for c in cells])
    assert score_attribute("cat", cells, asked, asked, EVALUATOR).elsewhere is None


def test_a_patch_that_erases_everything_of_a_kind_is_refused_before_a_picture_is_drawn() -> None:
    with pytest.raises(RecipeError, match=r"^cat: the patch erases all that it would be measured by$"):
        jobs_of(patch_of({"erase": "cat"}, *({"erase": s} for s in STYLES)), target_seeds=1, kept_seeds=1)


@pytest.mark.parametrize("n", [1, 45, 90, 405])  # where rounding once put the end of the interval below the rate
def test_an_interval_holds_its_rate(n: int) -> None:
    for hits in ([True] * n, [False] * n):
        found = rate(hits)
        assert found.low <= found.value <= found.high
