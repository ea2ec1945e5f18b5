"""Fused patches: the least-squares algebra, and that each acts on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import RecipeOf, same, weights_of
from diffusers import DDPMScheduler
from torch import Tensor

from esd_lora import fusing
from esd_lora.bases import Base
from esd_lora.errors import PatchError
from esd_lora.fusing import Moments, _features, aim, fuse
from esd_lora.keys import RIDGE, concept_prompts, other_words, ridged
from esd_lora.patch import Patch
from esd_lora.recipe import Concept
from esd_lora.training import train
from esd_lora.trajectories import stems

LAYER = "mid.to_k"


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


def aimed(patches: Sequence[Patch], own: Sequence[Tensor], moment: Tensor) -> Tensor:
    """ΔW of patches of one layer with their keys aimed anew, float64."""
    downs, ups = (
        [p.tensors[f"unet.{LAYER}.{factor}.weight"].double() for p in patches] for factor in ("lora_A", "lora_B")
    )
    keys = aim(torch.cat([a @ h for a, h in zip(downs, own, strict=True)]), moment)
    return torch.cat(ups, 1) @ keys.double()


def test_aimed_patches_solve_the_least_squares_problem() -> None:
    patches, xs, rest = [random_patch(1), random_patch(2)], [inputs(3), inputs(4)], inputs(5)
    own = [x.T @ x / 20 for x in xs]
    moment = own[0] + own[1] + rest.T @ rest / 20
    found = aimed(patches, own, moment)
    ridge = RIDGE * moment.trace() / 6
    # the same problem for a general solver: one row for each input, its weight under the root
    left = [*xs, rest, (20 * ridge) ** 0.5 * torch.eye(6).double()]
    right = [*(x @ delta(p).T for x, p in zip(xs, patches, strict=True)), torch.zeros(26, 5).double()]
    best = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    # factors are stored in float32
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_where_inputs_are_apart_every_patch_acts_on_its_own_and_not_elsewhere() -> None:
    first, second, third = torch.eye(6).double().split(2)
    patches = [random_patch(1), random_patch(2)]
    fused = aimed(patches, [first.T @ first, second.T @ second], torch.eye(6).double())
    # the ridge, a thousandth, is what is lost
    torch.testing.assert_close(fused @ first.T, delta(patches[0]) @ first.T, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(fused @ second.T, delta(patches[1]) @ second.T, rtol=2e-3, atol=1e-6)
    assert (fused @ third.T).abs().max() < 1e-6


@pytest.fixture
def pair(base: Base, recipe_of: RecipeOf) -> list[Patch]:
    """Two patches of different concepts and layers."""
    return [
        train(recipe_of(concepts="cat", lr=0.05, max_grad_norm=1e3), base),
        train(recipe_of(concepts="dog", preserve=["", "cat"], layers="full", rank=1, lr=0.05, max_grad_norm=1e3), base),
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


def test_a_fused_patch_is_the_weighted_sum_that_the_moments_ask_for(
    base: Base, pair: list[Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[Moments] = []
    honest = fusing._moments
    monkeypatch.setattr(fusing, "_moments", lambda *a, **k: moments.append(honest(*a, **k)) or moments[-1])
    weights = [1.0, -0.5]
    fused = fuse(base, pair, weights, steps=2)
    kept, *own = moments
    assert len(own) == 2
    for name in fused.ranks:
        parts = [w * delta(p, name) @ h[name] for p, w, h in zip(pair, weights, own, strict=True) if name in p.ranks]
        exact = torch.linalg.solve(ridged(kept[name] + own[0][name] + own[1][name]), sum(parts), left=False)
        # keys and values are stored in float32
        torch.testing.assert_close(delta(fused, name), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_a_patch_of_weight_0_is_not_fused(base: Base, pair: list[Patch]) -> None:
    both, alone = fuse(base, pair, [1.0, 0.0], steps=2), fuse(base, pair[:1], steps=2)
    assert same(dict(both.tensors), dict(alone.tensors))
    assert both.info == alone.info


def test_a_patch_is_never_asked_for_beside_the_words_of_another(
    base: Base, pair: list[Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[Sequence[str]] = []
    seen: list[Sequence[str]] = []
    moment, features = fusing.mean_moment, fusing._features
    monkeypatch.setattr(fusing, "mean_moment", lambda b, prompts: texts.append(prompts) or moment(b, prompts))
    monkeypatch.setattr(
        fusing, "_features", lambda b, prompts, *a, **k: seen.append(prompts) or features(b, prompts, *a, **k)
    )
    q = [Concept(erase="q")]  # the tiny tokenizer has letters for words
    alone = set().union(*map(stems, concept_prompts(q, other_words(base, q))))
    other = min(w for w in alone if len(w) == 1 and w != "q")  # what q would be asked for beside
    named = [replace(p, info={"recipe": {"concepts": [{"erase": e}]}}) for p, e in zip(pair, ("q", other), strict=True)]
    fuse(base, named, steps=2)
    (kept, *some), (first, second) = seen, texts
    assert not any({"q", other} & stems(p) for p in kept)
    assert all("q" in stems(p) and other not in stems(p) for p in first)
    assert all(other in stems(p) and "q" not in stems(p) for p in second)
    assert any(len(stems(p)) > 1 for p in first)
    assert [len(p) for p in some] == [fusing.SAMPLE] * 2
    assert set(some[0]) < set(first)
    assert set(some[1]) < set(second)


def test_features_are_gathered_at_the_size_that_a_patch_was_trained_at(
    base: Base, pair: list[Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int | None] = []
    honest = base.noise
    monkeypatch.setattr(base, "noise", lambda *a, **k: sizes.append(k["resolution"]) or honest(*a, **k))
    recipes = [{**p.info["recipe"], "resolution": size} for p, size in zip(pair, (16, 32), strict=True)]
    fuse(base, [replace(p, info={**p.info, "recipe": r}) for p, r in zip(pair, recipes, strict=True)], steps=1)
    assert list(dict.fromkeys(sizes)) == [16, 32]  # what is to be kept at the first patch's
    sizes.clear()
    fuse(base, pair, steps=1)
    assert set(sizes) == {None}  # the base's own


def test_where_no_patch_looks_at_the_text_it_is_not_looked_at(
    base: Base, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = train(recipe_of(layers="esd-u"), base)

    def text_states(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(type(base), "text_states", text_states)
    assert fuse(base, [patch], steps=2).ranks == patch.ranks


def test_a_fused_patch_acts_less_where_nothing_is_erased(base: Base, pair: list[Patch]) -> None:
    fused = fuse(base, pair[:1], steps=2)
    name = next(n for n in fused.ranks if n.endswith("attn2.to_v"))

    def action(patch: Patch, prompt: str) -> float:
        return (base.text_states([prompt], length=16)[0].double() @ delta(patch, name).T).norm().item()

    kept = action(fused, "cat") / action(pair[0], "cat")
    leaked = action(fused, "tree") / action(pair[0], "tree")
    assert leaked < kept / 2  # a factor of two is the least that is worth the name


def test_features_are_the_inputs_of_the_layers(base: Base) -> None:
    """Of cross-attention k they are known: the text's states, at every step."""
    prompts = ["a cat", "a dog", "tree"]
    layer, query = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", base.matched("esd-u")[0]
    found = _features(base, prompts, [f"unet.{layer}", f"unet.{query}"], steps=2)
    states = base.encode(prompts).tensors["encoder_hidden_states"].flatten(0, 1).double()
    # sums of 96 products in float64, in another order
    torch.testing.assert_close(found[f"unet.{layer}"], states.T @ states / len(states), rtol=1e-9, atol=1e-12)
    assert not base.denoiser.get_submodule(layer)._forward_pre_hooks
    assert not base.denoiser.get_submodule(query)._forward_pre_hooks


def test_q_k_and_v_of_self_attention_have_the_same_inputs_and_its_output_others(base: Base) -> None:
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    names = [f"{block}.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    found = _features(base, ["a cat"], names, steps=2)
    assert torch.equal(found[names[0]], found[names[1]])
    assert torch.equal(found[names[0]], found[names[2]])
    assert not torch.allclose(found[names[0]], found[names[3]])


def test_features_are_the_same_every_time_whatever_the_scheduler_draws(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.pipe.scheduler = DDPMScheduler.from_config(base.pipe.scheduler.config)
    layer = f"unet.{base.matched('esd-u')[0]}"
    first, again = (_features(base, ["a cat", "a dog"], [layer], steps=3)[layer] for _ in range(2))
    assert torch.equal(first, again)
    monkeypatch.setattr(fusing, "BATCH", 1)
    apart = _features(base, ["a cat", "a dog"], [layer], steps=3)[layer]
    torch.testing.assert_close(apart, first, rtol=1e-4, atol=1e-5)  # float32 sums in batches of another size


def test_what_cannot_be_fused_is_refused(base: Base, pair: list[Patch]) -> None:
    with pytest.raises(PatchError, match="does not say what it erases"):
        fuse(base, [replace(pair[0], info={})])
    with pytest.raises(PatchError, match="no patch is left"):
        fuse(base, [])
    with pytest.raises(PatchError, match="does not have"):
        fuse(base, [random_patch(1)])
