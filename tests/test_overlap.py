"""What patches share: actions worked by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RecipeOf, same, weights_of
from PIL import Image
from torch import Tensor

from esd_lora.bases import Base
from esd_lora.errors import PatchError
from esd_lora.keys import LENGTH, words_of
from esd_lora.overlap import draw_overlap, overlap
from esd_lora.patch import Patch
from esd_lora.training import train
from esd_lora.trajectories import stems


@pytest.fixture
def other(base: Base, recipe_of: RecipeOf) -> Patch:
    """A patch of another concept."""
    return train(recipe_of(concepts="dog", preserve=["", "cat"], rank=3, lr=0.05, max_grad_norm=1e3), base)


def test_an_action_is_the_relative_change_of_keys_and_values(base: Base, patch: Patch, other: Patch) -> None:
    before, done = weights_of(base), []
    found = overlap(base, [patch, other], on_words=lambda n, of: done.append((n, of)))
    assert same(weights_of(base), before)
    assert found.names == ("cat", "dog")
    changed = size = 0.0
    states = base.text_states(["dog"], length=LENGTH)[0].double()
    for name in base.matched("esd-x-strict"):
        up, down = (patch.tensors[f"unet.{name}.{factor}.weight"].double() for factor in ("lora_B", "lora_A"))
        changed += (states @ (up @ down).T).square().sum().item()
        size += (states @ base.denoiser.get_submodule(name).weight.double().T).square().sum().item()
    assert found.actions[0][1] == pytest.approx((changed / size) ** 0.5, rel=1e-9)
    assert done[-1] == (len(words_of(base)),) * 2


def test_a_patch_shares_all_of_itself_and_nothing_with_what_is_orthogonal(base: Base, patch: Patch) -> None:
    eye = torch.eye(32)
    first = replace(patch, tensors={k: eye[:2].clone() if ".lora_A." in k else v for k, v in patch.tensors.items()})
    second = replace(patch, tensors={k: eye[2:4].clone() if ".lora_A." in k else v for k, v in patch.tensors.items()})
    found = overlap(base, [first, second])
    # attn2's q and out have inputs of the same 32 features here
    assert found.subspaces[0] == pytest.approx((1, 0), abs=1e-12)
    assert found.subspaces[1] == pytest.approx((0, 1), abs=1e-12)


def test_rounding_is_no_direction_that_patches_share(base: Base, patch: Patch) -> None:
    """Of a lora_A with equal rows only one direction counts, and of none but zeros none."""
    eye = torch.eye(32)
    noise = 1e-9 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def with_keys(first: Tensor, second: Tensor) -> Patch:
        keys = torch.stack([first, second]) + noise
        return replace(patch, tensors={k: keys.clone() if ".lora_A." in k else v for k, v in patch.tensors.items()})

    twins, apart = with_keys(eye[0], eye[0]), with_keys(eye[1], eye[2])
    both = with_keys(eye[0], eye[1])
    found = overlap(base, [twins, apart, both]).subspaces
    # float64, and the noise of 1e-9 itself
    assert found[0] == pytest.approx((1, 0, 1), abs=1e-6)
    assert found[2] == pytest.approx((1, 0.5, 1), abs=1e-6)
    zero = replace(patch, tensors={k: 0 * v if ".lora_A." in k else v for k, v in patch.tensors.items()})
    assert overlap(base, [zero, both]).subspaces[0] == (0, 0)


def test_leaks_are_the_words_acted_on_most_without_its_own(base: Base, patch: Patch) -> None:
    (leak,) = overlap(base, [patch]).leaks
    assert len(leak) == 10
    assert [a for _, a in leak] == sorted((a for _, a in leak), reverse=True)
    top = next(word for word, _ in leak if stems(word))  # the tiny tokenizer has letters for words, "a" among them
    own = replace(patch, info={"recipe": {"concepts": [{"erase": top}]}})
    (rest,) = overlap(base, [own]).leaks
    assert top.lower() not in [word.lower() for word, _ in rest]
    others = [row for row in leak if row[0].lower() != top.lower()]
    assert list(rest[: len(others)]) == others


def test_the_picture_is_drawn(base: Base, patch: Patch, other: Patch, tmp_path: Path) -> None:
    draw_overlap(overlap(base, [patch, other]), tmp_path / "overlap.png")
    with Image.open(tmp_path / "overlap.png") as picture:
        assert min(picture.size) > 200


def test_what_has_no_overlap_is_refused(base: Base, patch: Patch, recipe_of: RecipeOf) -> None:
    with pytest.raises(PatchError, match="name at least one patch"):
        overlap(base, [])
    with pytest.raises(PatchError, match="does not say what it erases"):
        overlap(base, [replace(patch, info={})])
    with pytest.raises(PatchError, match="the patch that erases cat leaves k and v of cross-attention alone"):
        overlap(base, [train(recipe_of(layers="esd-u"), base)])
