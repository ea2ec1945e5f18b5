"""`fuse`: patches with learned keys, put together so that each acts on its own inputs and none elsewhere.

A layer of patch i adds ΔW_i = B_i A_i. With H_i the second moment of the layer's inputs where concept i is asked for, and G
that where it is not, the sum that is wanted is the ΔW with the least

    Σ_i E_{x ~ i} ‖ΔW x − ΔW_i x‖²  +  E_{x ~ rest} ‖ΔW x‖²  +  λ ‖ΔW‖²

whose normal equation ΔW (Σ_j H_j + G + λ I) = Σ_i ΔW_i H_i gives

    ΔW = Σ_i B_i (A_i H_i M⁻¹),        M = Σ_j H_j + G + λ I.

So every patch keeps its values B_i, and its keys are aimed anew: the fused patch is a stack, exactly, with no rank lost.
For k and v of cross-attention the inputs are text states, and G is half the moment of the text encoder's vocabulary without
the concepts' words, half that of everyday prompts to keep. For q, out and self-attention they are features of short
trajectories, of some of the concepts' prompts and of the prompts to keep, at the resolution that the patch was trained at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.compose import check_fits, concepts_of, in_use, stack
from esd_lora.keys import concept_prompts, kept_moment, mean_moment, other_words, ridged
from esd_lora.patch import Patch
from esd_lora.pictures import step_noise
from esd_lora.trajectories import default_preserve

Moments = dict[str, Tensor]
"""Second moments (D, D) in float64 by layer."""

SAMPLE = 16
"""Prompts of a concept whose trajectories give its features."""
BATCH = 8
GUIDANCE_SCALE = 3.0
"""Of those trajectories."""


def fuse(
    base: Base,
    patches: Sequence[Patch],
    weights: Sequence[float] | None = None,
    *,
    steps: int = 8,
    on_trajectories: Callable[[int, int], None] | None = None,
) -> Patch:
    """One patch in which each of the patches acts on its own inputs only.

    Args:
        base: The model that the patches were made for; active adapters are taken off.
        patches: At least one; each must say in its header what it erases.
        weights: One for each patch, any sign; 1 by default. A patch of weight 0 is left out.
        steps: Denoising steps of the trajectories that the features are gathered from.
        on_trajectories: Called with the number of sets of trajectories done and their total.

    Raises:
        PatchError: No patches, one that does not fit or does not say what it erases.
    """
    patches, weights = in_use(patches, weights)
    for patch in patches:
        check_fits(patch, base)
    concepts = [concepts_of(p) for p in patches]
    every = [c for named in concepts for c in named]
    rest, keep = other_words(base, every), default_preserve(every)
    whole = stack(patches, weights)
    sizes = [p.info.get("recipe", {}).get("resolution") for p in patches]
    moments = partial(_moments, base, list(whole.ranks), steps=steps)
    base.remove_adapters()

    def tell(done: int) -> None:
        if on_trajectories:
            on_trajectories(done, len(patches) + 1)

    total = moments(keep, lambda: kept_moment(base, every, keep), resolution=sizes[0])
    tell(1)
    answers: dict[str, list[Tensor]] = {name: [] for name in whole.ranks}
    for done, (patch, named, size) in enumerate(zip(patches, concepts, sizes, strict=True), 2):
        prompts = concept_prompts(named, rest)
        own = moments(_sample(prompts), partial(mean_moment, base, prompts), resolution=size)
        # of every layer of the whole: where another patch acts, this one's inputs are to be left alone
        total = {name: moment + own[name] for name, moment in total.items()}
        for name in patch.ranks:
            answers[name].append(patch.tensors[f"{name}.lora_A.weight"].double() @ own[name])
        tell(done)
    aimed = {f"{name}.lora_A.weight": aim(torch.cat(parts), total[name]) for name, parts in answers.items()}
    return Patch({**whole.tensors, **aimed}, {**whole.info, "fused": True})


def aim(answer: Tensor, moment: Tensor) -> Tensor:
    """Keys (r, D) that give A H for the inputs of H and little elsewhere, A H (M + λI)⁻¹, float32."""
    keys: Tensor = torch.linalg.solve(ridged(moment), answer, left=False)
    return keys.float()


def _sample(prompts: Sequence[str]) -> list[str]:
    """Some of the prompts, the same ones every time."""
    return sorted(prompts, key=lambda p: hashlib.sha256(p.encode()).digest())[:SAMPLE]


def _moments(
    base: Base,
    layers: Sequence[str],
    prompts: Sequence[str],
    text_moment: Callable[[], Tensor],
    *,
    steps: int,
    resolution: int | None,
) -> Moments:
    """The second moment of the inputs of each layer: the text's for k and v of cross-attention, or else of features."""
    text = {f"{base.prefix}.{name}" for name in base.text_layers}.intersection(layers)
    seen = [name for name in layers if name not in text]
    features = _features(base, prompts, seen, steps=steps, resolution=resolution) if seen else {}
    return features | (dict.fromkeys(text, text_moment()) if text else {})


@torch.no_grad()
def _features(
    base: Base, prompts: Sequence[str], layers: Sequence[str], *, steps: int, resolution: int | None = None
) -> Moments:
    """The mean second moment of the layers' inputs along one trajectory of each prompt."""
    sums: Moments = {}
    counts = dict.fromkeys(layers, 0)
    last, moment = torch.zeros(()), torch.zeros(())

    def add(layer: str, x: Tensor) -> None:
        nonlocal last, moment
        if x is not last:  # q, k and v of self-attention are given one tensor
            tokens = x.flatten(0, -2).cpu().double()
            last, moment = x, tokens.T @ tokens
        sums[layer] = sums.get(layer, 0) + moment
        counts[layer] += x.shape[:-1].numel()

    how: dict[str, Any] = {"guidance_scale": GUIDANCE_SCALE, "resolution": resolution}
    null = base.encode([""], **how)
    for first in range(0, len(prompts), BATCH):
        conditions = base.encode(prompts[first : first + BATCH], **how)
        seeds = range(first, first + len(conditions))
        sampler = base.sampler(steps, resolution=resolution, generators=step_noise(seeds))
        x_t = sampler.start(base.noise(seeds, resolution=resolution).float())
        for t in sampler.timesteps:
            x = sampler.network_input(x_t, t).to(base.dtype)
            ts = t.expand(len(x))
            with _watched(base, layers, add):
                eps = base.predict(x, ts, conditions)
            eps_null = base.predict(x, ts, null.expand(len(x)))
            x_t = sampler.step(base.guide(eps, eps_null, guidance_scale=GUIDANCE_SCALE).float(), t, x_t)
    return {n: sums[n] / counts[n] for n in layers}


@contextmanager
def _watched(base: Base, layers: Sequence[str], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `add` is called with the name and the input of each of the layers whenever it runs."""

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: add(name, args[0])

    modules: Mapping[str, torch.nn.Module] = dict(base.denoiser.named_modules(prefix=base.prefix))
    handles = [modules[n].register_forward_pre_hook(hook(n)) for n in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
