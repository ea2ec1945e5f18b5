"""Fused patches: the least-squares algebra, and that each acts on its own inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RecipeOf, same, weights_of
from torch import Tensor

from esd_lora.bases import Base
from esd_lora.errors import PatchError
from esd_lora.fusing import _features, aim, answer_of, fuse
from esd_lora.keys import RIDGE
from esd_lora.patch import Patch
from esd_lora.training import train

LAYER = "mid.to_k"


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_patch(seed: int) -> Patch:
    """A patch of rank 2 on one layer of 6 → 5 features."""
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    return Patch({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up})


def delta(patch: Patch, name: str = f"unet.{LAYER}") -> Tensor:
    """B A in float64."""
    up, down = (patch.tensors[f"{name}.{factor}.weight"].double() for factor in ("lora_B", "lora_A"))
    return up @ down


def inputs(seed: int) -> Tensor:
    """Twenty inputs of a layer, float64."""
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)).double()


def test_aimed_patches_solve_the_least_squares_problem() -> None:
    patches, xs, rest = [random_patch(1), random_patch(2)], [inputs(3), inputs(4)], inputs(5)
    own = [{LAYER: x.T @ x / 20} for x in xs]
    weight = 0.7
    moment = own[0][LAYER] + own[1][LAYER] + weight * rest.T @ rest / 20
    aimed = [aim(p, "unet", answer_of(p, "unet", h), {LAYER: moment}) for p, h in zip(patches, own, strict=True)]
    found = sum(delta(p) for p in aimed)
    ridge = RIDGE * moment.trace() / 6
    # the same problem for a general solver: one row for each input, its weight under the root
    left = [*xs, weight**0.5 * rest, (20 * ridge) ** 0.5 * torch.eye(6).double()]
    right = [*(x @ delta(p).T for x, p in zip(xs, patches, strict=True)), torch.zeros(26, 5).double()]
    best = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    # factors are stored in float32
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_where_inputs_are_apart_every_patch_acts_on_its_own_and_not_elsewhere() -> None:
    first, second, third = torch.eye(6).double().split(2)
    own = [{LAYER: first.T @ first}, {LAYER: second.T @ second}]
    patches = [random_patch(1), random_patch(2)]
    total = {LAYER: torch.eye(6).double()}
    aimed = [aim(p, "unet", answer_of(p, "unet", h), total) for p, h in zip(patches, own, strict=True)]
    fused = delta(aimed[0]) + delta(aimed[1])
    # the ridge, a thousandth, is what is lost
    torch.testing.assert_close(fused @ first.T, delta(patches[0]) @ first.T, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(fused @ second.T, delta(patches[1]) @ second.T, rtol=2e-3, atol=1e-6)
    assert (fused @ third.T).abs().max() < 1e-6


@pytest.fixture
def pair(base: Base, recipe_of: RecipeOf) -> list[Patch]:
    """Two patches of different concepts and layers."""
    return [
        train(recipe_of(concepts="cat", lr=0.05, max_grad_norm=1e3), base),
        train(recipe_of(concepts="dog", layers="full", rank=1, lr=0.05, max_grad_norm=1e3), base),
    ]


def test_fused_patches_lose_no_rank_and_say_what_they_are(base: Base, pair: list[Patch]) -> None:
    before, done = weights_of(base), []
    fused = fuse(base, pair, [1.0, 0.5], steps=2, on_trajectories=lambda n, of: done.append((n, of)))
    assert same(weights_of(base), before)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [c["erase"] for c in fused.concepts] == ["cat", "dog"]
    assert [p["digest"] for p in fused.info["stack"]] == [p.digest for p in pair]
    for name, rank in fused.ranks.items():
        assert rank == sum(p.ranks.get(name, 0) for p in pair)
    values = f"{next(iter(pair[0].ranks))}.lora_B.weight"
    assert torch.equal(fused.tensors[values][:, :2], pair[0].tensors[values])


def test_a_fused_patch_acts_less_where_nothing_is_erased(base: Base, pair: list[Patch]) -> None:
    fused = fuse(base, pair[:1], steps=2)
    name = next(n for n in fused.ranks if n.endswith("attn2.to_v"))

    def action(patch: Patch, prompt: str) -> float:
        return (base.text_states([prompt], length=16)[0].double() @ delta(patch, name).T).norm().item()

    kept = action(fused, "cat") / action(pair[0], "cat")
    leaked = action(fused, "tree") / action(pair[0], "tree")
    assert leaked < kept / 2  # a factor of two is the least that is worth the name


def test_features_are_the_inputs_of_the_layers(base: Base) -> None:
    layer = base.matched("esd-u")[0]
    (moment,) = _features(base, ["a cat", "a dog"], [layer], steps=2, guidance_scale=3.0).values()
    width = base.denoiser.get_submodule(layer).weight.shape[1]
    assert moment.shape == (width, width)
    assert moment.dtype == torch.float64
    assert torch.linalg.eigvalsh(moment).min() > -1e-9
    assert not base.denoiser.get_submodule(layer)._forward_pre_hooks


def test_what_cannot_be_fused_is_refused(base: Base, pair: list[Patch]) -> None:
    with pytest.raises(PatchError, match="does not say what it erases, so it cannot be fused"):
        fuse(base, [replace(pair[0], info={})])
    with pytest.raises(PatchError, match="nothing to stack"):
        fuse(base, [])
    with pytest.raises(PatchError, match="does not have"):
        fuse(base, [random_patch(1)])
