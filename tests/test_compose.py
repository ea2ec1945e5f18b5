"""Patches on a base: W + Σ w · B A, and nothing left where one does not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same, weights_of
from diffusers import DiffusionPipeline
from tiny import tiny_flux, tiny_pipeline, tiny_sd3, tiny_xl
from torch import Tensor

from esd_lora.bases import Base, base_of
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.compose import attach, check_fits, compress, concepts_of, stack
from esd_lora.errors import BaseModelError, PatchError
from esd_lora.evaluate.controls import scrambling_patch
from esd_lora.patch import Patch, load_patch
from esd_lora.pictures import generate

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def other(patch: Patch) -> Patch:
    """A second patch for the same layers, of another rank and with random values."""
    generator = torch.Generator().manual_seed(3)

    def like(name: str, tensor: Tensor) -> Tensor:
        shape = (5, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], 5)
        return torch.randn(shape, generator=generator)

    dog = {"recipe": {"concepts": [{"erase": "dog", "from": None, "replace_with": None, "synonyms": []}]}}
    return Patch({k: like(k, v) for k, v in patch.tensors.items()}, {**patch.info, **dog})


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


def test_a_plain_pipeline_takes_patches_and_set_adapters_goes_on_working(patch: Patch, other: Patch) -> None:
    pipe = tiny_pipeline()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    w = pipe.unet.get_submodule(LAYER).weight.double().clone()
    names = attach(pipe, [patch, other])
    pipe.set_adapters(names, [0.5, -2.0])
    exact = x.double() @ (w + 0.5 * delta(patch) - 2 * delta(other)).T
    torch.testing.assert_close(pipe.unet.get_submodule(LAYER)(x).double(), exact, rtol=1e-5, atol=1e-4)  # as above
    pipe.unet.unload_lora()
    assert torch.equal(pipe.unet.get_submodule(LAYER).weight.double(), w)


def test_a_pipeline_of_another_family_is_refused(patch: Patch) -> None:
    class StrangePipeline(DiffusionPipeline):
        """Of no family that is known here."""

    with pytest.raises(
        BaseModelError, match=r"^StrangePipeline is not supported; supported: StableDiffusionPipeline, "
    ):
        attach(StrangePipeline(), [patch])


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
    assert (
        str(caught.value) == f"the patch that erases cat (made for {made_for}) adapts {name}, which plain does not have"
    )
    assert same(weights_of(base), before)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl, tiny_sd3, tiny_flux])
def test_projections_that_are_fused_are_refused_for_no_adapter_would_act(pipeline: Callable[[], Any]) -> None:
    """The layers that a patch names are there still, but the pipeline reads copies of them."""
    base = base_of(pipeline())
    patch = scrambling_patch(base, "esd-x", 2)
    base.denoiser.fuse_qkv_projections()
    told = "its projections are fused, so that no adapter would act; call unfuse_qkv_projections() first"
    for attempt in (lambda: attach(base.pipe, [patch]), lambda: base.add_adapter(layers="esd-x", rank=2)):
        with pytest.raises(BaseModelError, match=re.escape(told)):
            attempt()
    base.denoiser.unfuse_qkv_projections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of other weights
        assert attach(base.pipe, [patch])


def test_a_patch_whose_layers_lack_the_denoisers_name_is_refused(base: Base, patch: Patch) -> None:
    bare = replace(patch, tensors={k.removeprefix("unet."): v for k, v in patch.tensors.items()})
    with pytest.raises(PatchError, match=rf"adapts {next(iter(bare.ranks))}, which .* does not have$"):
        check_fits(bare, base)


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


def change(patch: Patch, name: str) -> Tensor:
    """B A of any layer, in float64."""
    up, down = (patch.tensors[f"{name}.{factor}.weight"].double() for factor in ("lora_B", "lora_A"))
    return up @ down


@pytest.mark.parametrize("weights", [None, [0.7, -1.3]], ids=str)
def test_a_stack_is_the_sum_of_its_patches_whatever_their_ranks(
    patch: Patch, other: Patch, weights: list[float] | None
) -> None:
    both = stack([patch, other], weights)
    first, second = weights or [1.0, 1.0]
    assert both.ranks == {n: r + 5 for n, r in patch.ranks.items()}
    for name in patch.ranks:
        exact = first * change(patch, name) + second * change(other, name)
        # the only rounding is that of w · B to float32
        torch.testing.assert_close(change(both, name), exact, rtol=0, atol=1e-6 * exact.abs().max().item())


def test_patches_of_different_layers_stack(patch: Patch, other: Patch) -> None:
    names = list(patch.ranks)
    left, right = only(patch, names[:3]), only(other, names[2:])
    both = stack([left, right])
    assert set(both.ranks) == set(names)
    assert torch.equal(change(both, names[0]), change(patch, names[0]))
    assert torch.equal(change(both, names[-1]), change(other, names[-1]))
    assert both.ranks[names[2]] == patch.ranks[names[2]] + 5


def only(patch: Patch, names: list[str]) -> Patch:
    """The patch on some of its layers."""
    return replace(patch, tensors={k: v for k, v in patch.tensors.items() if k.rsplit(".", 2)[0] in names})


def test_a_stack_draws_what_the_patches_draw_together_and_reloads(
    base: Base, patch: Patch, other: Patch, tmp_path: Path
) -> None:
    weak = replace(other, tensors={k: v * 0.1 for k, v in other.tensors.items()})
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    attach(base, [patch, weak], [0.5, 2.0])
    together = base.denoiser.get_submodule(LAYER)(x)
    stack([patch, weak], [0.5, 2.0]).save(tmp_path)
    attach(base, [load_patch(tmp_path)])
    # the same sums in another order: a few units in the last place of float32
    torch.testing.assert_close(base.denoiser.get_submodule(LAYER)(x), together, rtol=1e-5, atol=1e-5)


def test_a_stack_tells_its_parts_and_a_stack_of_stacks_theirs(patch: Patch, other: Patch) -> None:
    inner = stack([patch, other], [1.0, 0.5])
    assert [(p["weight"], p["digest"]) for p in inner.info["stack"]] == [(1.0, patch.digest), (0.5, other.digest)]
    assert [c["erase"] for c in inner.concepts] == ["cat", "dog"]
    with pytest.warns(UserWarning, match="cat is erased by more than one of the patches") as caught:
        outer = stack([inner, patch], [-2.0, 1.0])
    assert len(caught) == 1
    assert [p["weight"] for p in outer.info["stack"]] == [-2.0, -1.0, 1.0]
    assert [c["erase"] for c in outer.concepts] == ["cat", "dog", "cat"]


def test_a_patch_of_weight_0_is_as_if_it_had_not_been_named(patch: Patch, other: Patch) -> None:
    name = next(iter(patch.ranks))
    wide = {**other.tensors, f"{name}.lora_A.weight": torch.ones(5, 64)}
    alien = replace(patch, tensors=wide, info={**patch.info, "base": {"name": "sd15", "fingerprint": "0"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = stack([alien, patch], [0.0, 2.0])
    expected = stack([patch], [2.0])
    assert same(dict(alone.tensors), dict(expected.tensors))
    assert alone.info == expected.info


def test_a_stack_keeps_what_is_known_of_its_parts(patch: Patch, other: Patch) -> None:
    unknown = replace(other, info={})
    fused = replace(stack([patch, other]), info={**stack([patch, other]).info, "fused": True})
    small, _ = compress(fused, 3)
    alone, _ = compress(patch, 1)
    marks = {"rank": 3, "worst_error": small.info["compressed"]["worst_error"]}
    with pytest.warns(UserWarning, match="cat is erased by more than one"):
        told = stack([unknown, small, alone], [1.0, 0.5, 1.0]).info
    assert told["base"] == patch.info["base"]
    assert [(p["weight"], p["digest"]) for p in told["stack"]] == [
        (1.0, unknown.digest),
        (0.5, patch.digest),
        (0.5, other.digest),
        (1.0, alone.digest),
    ]
    assert [p.get("fused") for p in told["stack"]] == [None, True, True, None]
    assert [p.get("compressed") for p in told["stack"]] == [None, marks, marks, alone.info["compressed"]]
    assert stack([unknown]).info["base"] == {}


def test_a_patch_without_concepts_does_not_say_what_it_erases(patch: Patch) -> None:
    assert [c.erase for c in concepts_of(patch)] == ["cat"]
    with pytest.raises(PatchError) as caught:
        concepts_of(replace(patch, info={}))
    assert str(caught.value) == f"the patch {patch.digest[:12]} does not say what it erases"


def test_weights_are_checked_before_anything_is_attached(base: Base, patch: Patch) -> None:
    before = weights_of(base)
    for weights, message in (([1.0, 2.0], "1 patches and 2 weights"), ([float("inf")], "a finite number, got inf")):
        with pytest.raises(PatchError, match=message):
            attach(base, [patch], weights)
    with pytest.raises(PatchError, match="a weight is so large that the sum is not finite"):
        stack([patch], [1e39])
    assert same(weights_of(base), before)


def test_a_stack_of_unequal_ranks_and_layers_loads_into_plain_diffusers(
    base: Base, patch: Patch, other: Patch, tmp_path: Path
) -> None:
    names = list(patch.ranks)
    both = stack([only(patch, names[:5]), only(other, names[3:])], [0.3, 0.02])
    assert len(set(both.ranks.values())) == 3
    both.save(tmp_path)
    attach(base, [both])
    ours = generate(base, ["a cat"], [0], steps=2)[0]
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path)
    state = {k: v for k, v in pipe.unet.state_dict().items() if "lora_" in k}
    assert len(state) == len(both.tensors)
    found = pipe.unet.get_submodule(names[3].removeprefix("unet.")).get_delta_weight("default_0")
    exact = 0.3 * change(patch, names[3]) + 0.02 * change(other, names[3])
    # a product of float32 factors, one of them rounded once before
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())
    latents = base.noise([0])
    theirs = pipe("a cat", latents=latents, num_inference_steps=2, guidance_scale=7.5).images[0]
    assert theirs.tobytes() == ours.tobytes()


def test_patches_of_bases_with_other_weights_are_warned_of(patch: Patch, other: Patch) -> None:
    stranger = replace(other, info={**other.info, "base": {"name": "sd15", "fingerprint": "0"}})
    with pytest.warns(UserWarning, match="bases of different weights") as caught:
        stack([patch, stranger])
    assert len(caught) == 1


def test_what_cannot_be_stacked_is_refused(patch: Patch, other: Patch) -> None:
    name = next(iter(patch.ranks))
    wide = replace(patch, tensors={**patch.tensors, f"{name}.lora_A.weight": torch.ones(2, 64)})
    cases: list[tuple[list[Patch], list[float] | None, str]] = [
        ([], None, "no patch is left: name at least one with a weight other than 0"),
        ([patch], [0.0], "no patch is left: name at least one with a weight other than 0"),
        ([patch], [float("nan")], "a weight must be a finite number, got nan"),
        ([patch, other], [1.0], "2 patches and 1 weights; give one weight for each patch"),
    ]
    for patches, weights, message in cases:
        with pytest.raises(PatchError) as caught:
            stack(patches, weights)
        assert str(caught.value) == message
    with pytest.raises(
        PatchError, match=rf"{name} is \(32, 64\) in the patch that erases cat \(made for .*, and \(32, 32\)"
    ):
        stack([patch, wide])
    flow = replace(patch, tensors={k.replace("unet.", "transformer."): v for k, v in patch.tensors.items()})
    with pytest.raises(PatchError, match=r"^some patches adapt a transformer and some a unet; no base has both$"):
        stack([patch, flow])


def test_compressing_is_the_best_of_its_rank_and_tells_its_error(patch: Patch, other: Patch) -> None:
    both = stack([patch, other])
    small, errors = compress(both, 3)
    assert set(small.ranks.values()) == {3}
    for name, error in errors.items():
        exact = change(both, name)
        u, s, vt = torch.linalg.svd(exact)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        # the factors are stored in float32
        torch.testing.assert_close(change(small, name), best, rtol=0, atol=1e-5 * s[0].item())
        assert error == pytest.approx(((exact - best).norm() / exact.norm()).item(), rel=1e-9)
    assert small.info["compressed"] == {"rank": 3, "worst_error": max(errors.values())}


def test_a_compressed_patch_does_not_claim_the_scores_of_the_whole_one(patch: Patch) -> None:
    measured = replace(patch, info={**patch.info, "scores": [{"ua": 1.0}]})
    assert not {"scores", "loss"} & set(compress(measured, 1)[0].info)
    assert compress(measured, 2)[0].info == measured.info  # nothing was left out


def test_compressing_leaves_what_is_small_enough(patch: Patch) -> None:
    same_patch, errors = compress(patch, 2)
    assert same(dict(same_patch.tensors), dict(patch.tensors))
    assert set(errors.values()) == {0.0}
    with pytest.raises(PatchError, match="rank of 1 or more, got 0"):
        compress(patch, 0)
