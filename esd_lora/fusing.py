"""`fuse`: patches with learned keys, put together so that each acts on its own inputs and none elsewhere.

A layer of patch i adds ΔW_i = B_i A_i. With H_i the second moment of the layer's inputs where concept i is asked for, and G
that where it is not, the sum that is wanted is the ΔW with the least

    Σ_i E_{x ~ i} ‖ΔW x − ΔW_i x‖²  +  μ E_{x ~ rest} ‖ΔW x‖²

whose normal equation ΔW (Σ_j H_j + μ G + λ I) = Σ_i ΔW_i H_i gives

    ΔW = Σ_i B_i (A_i H_i M⁻¹),        M = Σ_j H_j + μ G + λ I.

So every patch keeps its values B_i, and its keys are aimed anew: the fused patch is a stack, exactly, with no rank lost.
For k and v the inputs are text states, and G is the moment of the text encoder's whole vocabulary; for q, out and
self-attention they are features of short trajectories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.compose import check_fits, stack
from esd_lora.errors import PatchError
from esd_lora.esd import guided
from esd_lora.keys import RIDGE, concept_prompts, hit_moment, kept_moment, named_words, words_of
from esd_lora.patch import Patch
from esd_lora.recipe import Concept
from esd_lora.trajectories import default_preserve

Moments = dict[str, Tensor]
"""Second moments (D, D) in float64 by layer."""

SAMPLE = 16
"""Prompts of a concept whose trajectories give its features."""
BATCH = 8


def fuse(
    base: Base,
    patches: Sequence[Patch],
    weights: Sequence[float] | None = None,
    *,
    keep_weight: float = 1.0,
    steps: int = 8,
    guidance_scale: float = 3.0,
    on_trajectories: Callable[[int, int], None] | None = None,
) -> Patch:
    """One patch in which each of the patches acts on its own inputs only.

    Args:
        base: The model that the patches were made for; it is not changed.
        patches: At least one; each must say in its header what it erases.
        weights: One for each patch, any sign; 1 by default.
        keep_weight: μ: what a change elsewhere weighs against a change of the patches' own action.
        steps: Denoising steps of the trajectories that the features are gathered from.
        guidance_scale: Of those trajectories.
        on_trajectories: Called with the number of sets of trajectories done and their total.

    Raises:
        PatchError: No patches, one that does not fit or does not say what it erases.
    """
    for patch in patches:
        check_fits(patch, base)
        if not patch.concepts:
            raise PatchError(f"the patch {patch.digest[:12]} does not say what it erases, so it cannot be fused")
    whole = stack(patches, weights)
    concepts = [[Concept.model_validate(c) for c in p.concepts] for p in patches]
    every = [c for named in concepts for c in named]
    rest = [w for w in words_of(base) if w not in named_words(every)]
    keep = default_preserve(every)
    text = set(base.matched("esd-x-strict"))

    def moments(prompts: Sequence[str], patch: Patch, text_moment: Tensor, done: int) -> Moments:
        layers = [n.removeprefix(f"{base.prefix}.") for n in patch.ranks]
        seen = [n for n in layers if n not in text]
        found = _features(base, prompts, seen, steps=steps, guidance_scale=guidance_scale) if seen else {}
        if on_trajectories:
            on_trajectories(done, len(patches) + 1)
        return {n: text_moment if n in text else found[n] for n in layers}

    total = {n: keep_weight * m for n, m in moments(keep, whole, kept_moment(base, every, keep), 1).items()}
    answers = []
    for i, (patch, named) in enumerate(zip(patches, concepts, strict=True)):
        some = sorted(concept_prompts(named, rest), key=lambda p: hashlib.sha256(p.encode()).digest())[:SAMPLE]
        # every layer of the whole: where another patch acts, this one's inputs are to be left alone
        own = moments(some, whole, hit_moment(base, named), i + 2)
        total = {n: m + own[n] for n, m in total.items()}
        answers.append(answer_of(patch, base.prefix, own))
    aimed = [aim(p, base.prefix, a, total) for p, a in zip(patches, answers, strict=True)]
    return replace(stack(aimed, weights), info={**whole.info, "fused": True})


def answer_of(patch: Patch, prefix: str, own: Moments) -> Moments:
    """A_i H_i by layer: what a patch's keys answer to its own inputs."""
    names = {n.removeprefix(f"{prefix}."): patch.tensors[f"{n}.lora_A.weight"].double() for n in patch.ranks}
    return {n: keys @ own[n] for n, keys in names.items()}


def aim(patch: Patch, prefix: str, answer: Moments, total: Moments) -> Patch:
    """The patch with its keys aimed anew, A_i H_i (Σ_j H_j + μ G + λ I)⁻¹ in every layer."""
    tensors = dict(patch.tensors)
    for name, keys in answer.items():
        moment = total[name]
        ridge = RIDGE * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)
        tensors[f"{prefix}.{name}.lora_A.weight"] = torch.linalg.solve(moment + ridge, keys, left=False).float()
    return replace(patch, tensors=tensors)


@torch.no_grad()
def _features(
    base: Base, prompts: Sequence[str], layers: Sequence[str], *, steps: int, guidance_scale: float
) -> Moments:
    """The mean second moment of the layers' inputs along one bare trajectory of each prompt."""
    base.remove_adapters()
    sums: Moments = {}
    counts = dict.fromkeys(layers, 0)

    def add(layer: str, x: Tensor) -> None:
        tokens = x.flatten(0, -2).cpu().double()
        sums[layer] = sums.get(layer, 0) + tokens.T @ tokens
        counts[layer] += len(tokens)

    scheduler, null = base.scheduler, base.encode([""])
    for first in range(0, len(prompts), BATCH):
        conditions = base.encode(prompts[first : first + BATCH])
        scheduler.set_timesteps(steps, device=base.device)
        seeds = range(first, first + len(conditions))
        x_t = base.initial_latents(seeds).float() * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(x_t, t).to(base.dtype)
            ts = t.expand(len(x))
            with _watched(base, layers, add):
                eps = base.predict(x, ts, conditions)
            eps_null = base.predict(x, ts, null.expand(len(x)))
            move = guided(eps, eps_null, guidance_scale=guidance_scale).float()
            x_t = scheduler.step(move, t, x_t, return_dict=False)[0]
    return {n: sums[n] / counts[n] for n in layers}


@contextmanager
def _watched(base: Base, layers: Sequence[str], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `add` is called with the name and the input of each of the layers whenever it runs."""

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: add(name, args[0])

    modules: Mapping[str, torch.nn.Module] = dict(base.denoiser.named_modules())
    handles = [modules[n].register_forward_pre_hook(hook(n)) for n in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
