"""Patches on a base: W + Σ w · B A, and nothing left where one does not fit."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import same, weights_of
from tiny import tiny_pipeline
from torch import Tensor

from esd_lora.bases import Base
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.compose import attach, check_fits
from esd_lora.errors import PatchError
from esd_lora.patch import Patch
from esd_lora.pictures import generate

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def other(patch: Patch) -> Patch:
    """A second patch for the same layers, of another rank and with random values."""
    generator = torch.Generator().manual_seed(3)

    def like(name: str, tensor: Tensor) -> Tensor:
        shape = (5, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], 5)
        return torch.randn(shape, generator=generator)

    return Patch({k: like(k, v) for k, v in patch.tensors.items()}, patch.info)


def delta(patch: Patch) -> Tensor:
    """B A of the layer, in float64."""
    return patch.tensors[f"unet.{LAYER}.lora_B.weight"].double() @ patch.tensors[f"unet.{LAYER}.lora_A.weight"].double()


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [0.7, -1.3], [-1.0, 0.25], [0.0, 1.0]], ids=str)
def test_patches_sum_with_their_weights(base: Base, patch: Patch, other: Patch, weights: list[float] | None) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    w = base.denoiser.get_submodule(LAYER).weight.double().clone()
    first, second = weights or [1.0, 1.0]
    exact = x.double() @ (w + first * delta(patch) + second * delta(other)).T
    names = attach(base, [patch, other], weights)
    assert names == ["patch_0", "patch_1"]
    output = base.denoiser.get_submodule(LAYER)(x)
    # float32 sums of 32 products of size ~10: 32 · 2⁻²⁴ · 10 ≈ 2e-5
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-4)
    assert (exact - x.double() @ w.T).abs().max() > 1


def test_a_weight_of_0_is_the_base(base: Base, patch: Patch) -> None:
    bare = generate(base, ["cat"], [0], steps=3)[0].tobytes()
    attach(base, [patch], [0.0])
    assert generate(base, ["cat"], [0], steps=3)[0].tobytes() == bare
    attach(base, [patch])
    assert generate(base, ["cat"], [0], steps=3)[0].tobytes() != bare


def test_attaching_replaces_what_was_there_and_none_leaves_the_base(base: Base, patch: Patch, other: Patch) -> None:
    before = weights_of(base)
    attach(base, [patch])
    alone = weights_of(base)
    attach(base, [patch, other])
    attach(base, [patch])
    assert same(weights_of(base), alone)
    assert not any(p.requires_grad for p in base.denoiser.parameters())
    assert attach(base, []) == []
    assert same(weights_of(base), before)


def test_a_patch_for_layers_that_are_not_there_is_refused(patch: Patch) -> None:
    base = StableDiffusionBase(tiny_pipeline(cross_attention=False), name="plain")
    before = weights_of(base)
    with pytest.raises(PatchError) as caught:
        attach(base, [patch])
    name, made_for = next(iter(patch.ranks)), patch.info["base"]["name"]
    assert str(caught.value) == f"the patch (made for {made_for}) adapts {name}, which plain does not have"
    assert same(weights_of(base), before)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_patch_of_other_shapes_is_refused_and_the_base_left_bare(base: Base, patch: Patch, factor: str) -> None:
    before = weights_of(base)
    name = f"unet.{LAYER}.{factor}.weight"
    wide = torch.ones(2, 64) if factor == "lora_A" else torch.ones(64, 2)
    attach(base, [patch])  # an earlier patch must not stay on
    with pytest.raises(PatchError) as caught:
        attach(base, [patch, Patch({**patch.tensors, name: wide}, {})])
    shape = (32, 64) if factor == "lora_A" else (64, 32)
    assert str(caught.value) == (
        f"the patch (made for another base) has unet.{LAYER} of {shape}; in {base.name} it is (32, 32)"
    )
    assert same(weights_of(base), before)


def test_a_patch_of_other_weights_is_warned_of_and_attached(base: Base, patch: Patch) -> None:
    stranger = replace(patch, info={**patch.info, "base": {"name": "sd15", "fingerprint": "0"}})
    with pytest.warns(UserWarning, match=f"was made for sd15, and the weights of {base.name} differ") as caught:
        assert attach(base, [stranger]) == ["patch_0"]
    assert len(caught) == 1


def test_a_patch_of_the_same_base_or_of_unknown_origin_is_not_warned_of(base: Base, patch: Patch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(base, [patch, replace(patch, info={})])
        check_fits(patch, base)  # it sees through the adapters that are on
