"""Scores against cases worked by hand, without a picture drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esd_lora.emoji.evaluators import Judgement
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.errors import RecipeError
from esd_lora.evaluate import Cell, accessory_set, answer_set, score, score_attribute, whole_grid
from esd_lora.patch import Patch
from esd_lora.report import measure_patches, targets_of

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
    assert (found.elsewhere.value, found.elsewhere.n) == (2 / 6, 6)
    assert (found.ira.value, found.ira.n, found.cra.value) == (19 / 20, 120, 1)


def test_two_hundred_pictures_of_a_target_are_enough() -> None:
    for target, n in (("cat", 204), ("ink", 200)):
        assert sum(target in (c.obj, c.style) for c in answer_set(target)) == n
    assert len(accessory_set("cat")) == 204


def test_one_concept_in_several_phrasings_is_measured_once() -> None:
    patch = patch_of({"erase": "neon style"}, {"erase": "neon style", "from": "neon style cat"}, {"erase": "kitty"})
    assert targets_of(patch) == [("neon", None), ("cat", None)]


def test_a_patch_that_the_evaluators_do_not_know_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^the evaluators of emoji do not know 'Van Gogh'$"):
        targets_of(patch_of({"erase": "Van Gogh"}))
    with pytest.raises(RecipeError, match=r"^the patch does not say what it erases$"):
        targets_of(patch_of())


def test_what_a_patch_erases_as_well_is_not_asked_to_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Three concepts in one patch: the bus and the ink style are no part of the score of the cat."""
    from esd_lora import report

    drawn: list[Cell] = []
    monkeypatch.setattr(
        report, "draw", lambda base, cells, patches=(), on_batch=None: drawn.extend(cells) or list(cells)
    )
    judge = lambda cells: seen([c.obj for c in cells], [c.style for c in cells])  # noqa: E731
    monkeypatch.setattr(report, "load_evaluator", lambda _: SimpleNamespace(judge=judge, name="hand", digest="0" * 64))
    monkeypatch.setattr(report, "score_grid", lambda *_: None)
    monkeypatch.setattr(report, "save_picture", lambda *_: None)
    monkeypatch.setattr(Patch, "save", lambda *_: None)
    patch = patch_of({"erase": "cat"}, {"erase": "bus"}, {"erase": "ink style"})
    cat, bus, ink = measure_patches(None, {str(tmp_path): patch}, target_seeds=2, kept_seeds=1)[str(tmp_path)]
    assert cat.ua.n == bus.ua.n == 2 * (len(STYLES) - 1)
    assert cat.ira.n == (len(OBJECTS) - 2) * (len(STYLES) - 1)
    assert ink.ua.n == 2 * (len(OBJECTS) - 2)
    assert drawn
