"""A process that trains and generates for long keeps nothing of it, and its base stays what it was, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import RecipeOf, same
from torch import nn

from esd_lora.bases import Base
from esd_lora.compose import attach
from esd_lora.patch import Patch
from esd_lora.pictures import generate
from esd_lora.training import train

ROUNDS = 5


def live() -> tuple[int, int]:
    """How many tensors and modules there are."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    return sum(issubclass(k, torch.Tensor) for k in kinds), sum(issubclass(k, nn.Module) for k in kinds)


def all_weights(base: Base) -> dict[str, torch.Tensor]:
    parts = {k: v for k, v in base.pipe.components.items() if isinstance(v, nn.Module)}
    return {f"{k}.{n}": w.clone() for k, part in parts.items() for n, w in part.state_dict().items()}


def assert_nothing_stays(base: Base, work: Callable[[int], object]) -> None:
    before = all_weights(base)
    work(0)  # what the first time leaves, such as a library's cache, is no growth
    once = live()
    for i in range(1, ROUNDS):
        work(i)
    assert live() == once
    assert same(all_weights(base), before)
    base.remove_adapters()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"x_t": "edited", "refresh_every": 3, "layers": "full", "gradient_checkpointing": True},
        {"keys": "closed-form", "objective": "paper"},
        {"objective": "closed-form"},
    ],
    ids=str,
)
def test_trainings_leave_no_tensor_and_no_module(base: Base, recipe_of: RecipeOf, settings: dict[str, Any]) -> None:
    assert_nothing_stays(base, lambda i: train(recipe_of(seed=i, **settings), base))


def test_trainings_that_break_leave_no_tensor_and_no_module(base: Base, recipe_of: RecipeOf) -> None:
    def broken(step: int, _: float | None) -> None:
        if step == 2:
            raise ZeroDivisionError

    def work(i: int) -> None:
        with pytest.raises(ZeroDivisionError):
            train(recipe_of(seed=i), base, on_step=broken)

    assert_nothing_stays(base, work)


def test_patches_put_on_and_taken_off_leave_no_tensor_and_no_module(base: Base, patch: Patch) -> None:
    sets = [[patch], [patch, patch], []]

    def work(i: int) -> None:
        for patches in sets:
            attach(base, patches)
            generate(base, ["cat"], [i], steps=2)
        base.remove_adapters()

    assert_nothing_stays(base, work)
