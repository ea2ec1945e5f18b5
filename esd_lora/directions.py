"""The directions that adapters start from: those in which a concept moves what the adapted layers read.

    bank ─► h(x_t, s) − h(x_t, ∅) of every layer ─► its strongest directions ─► lora_A

Of a random lora_A of rank r a concept's direction in d dimensions meets about √(r / d), by luck more or less of it, so that how
soon a run erases depends on its seed. Of these it meets all, and what the concept does not move is left alone longer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from esd_lora.bases.base import Base, Condition
from esd_lora.trajectories import Bank

EXAMPLES = 24
"""Examples of the bank that are looked at, evenly spread; each costs two passes."""
LENGTH = math.sqrt(128)
"""Of the rows of lora_A, times the rank: that of peft's random rows in 128 dimensions, as the embedded base has; elsewhere the
same, for what a row meets of a concept grows with the width already."""
PROBES = 16
"""Directions that a layer's differences are sketched in, for each of the rank."""


@torch.no_grad()
def aim(
    base: Base, conditions: Condition, bank: Bank, *, wordless: Condition, batch_size: int, name: str = "patch"
) -> dict[str, Tensor]:
    """The lora_A of every layer that trains one, as `Base.load_adapter_state` takes them: (r, d) float32 on the CPU.

        lora_A = √128 / r · V_r,    V_r the r strongest right singular vectors of the rows h(x_t, s) − h(x_t, ∅)

    h is what a layer reads, in all places of some examples (x_t, t, s) of the bank, by the frozen model. A layer that no
    concept moves, before all words, is not there, and none that overflows, which training will tell of.

    Args:
        base: With untrained adapters.
        conditions: The encoded prompts.
        bank: Of what is to be erased.
        wordless: ∅, as the encoders read it: one prompt. From zeros, which SDXL has for it, a prompt differs by what all have.
        batch_size: Examples at a time.
        name: Of the adapters.
    """
    rows = torch.linspace(0, len(bank) - 1, min(EXAMPLES, len(bank)), device=bank.x.device).round().long()
    with _sketches(base, name) as sketches, base.teacher():
        for some in torch.split(rows, batch_size):
            s = bank.s[some]
            asked = Condition.cat([conditions[s], wordless.expand(len(s))])
            base.predict(bank.x[some].repeat(2, 1, 1, 1).to(base.dtype), bank.t[some].repeat(2), asked)
    modules = dict(base.denoiser.named_modules())
    return {
        f"{base.prefix}.{layer}.lora_A.weight": _strongest(sketch, modules[layer].r[name])
        for layer, sketch in sketches.items()
        if 0 < sketch.abs().sum() < math.inf
    }


def passes(examples: int) -> int:
    """How many passes it takes for a bank of so many examples."""
    return 2 * min(EXAMPLES, examples)


@contextmanager
def _sketches(base: Base, name: str) -> Iterator[Mapping[str, Tensor]]:
    """Inside, Σ δ δᵀ Ω (d, k) of each layer that trains its lora_A, δ what the halves of a batch differ by in what it reads."""
    sketches: dict[str, Tensor] = {}
    layers = {
        layer: module
        for layer, module in base.denoiser.named_modules()
        if name in getattr(module, "lora_A", {}) and module.lora_A[name].weight.requires_grad
    }

    def add(layer: str, read: Tensor) -> None:
        one, other = read.float().chunk(2)
        difference = (one - other).flatten(0, -2)
        probes = _probes(difference.shape[-1], layers[layer].r[name]).to(difference)
        sketches[layer] = sketches.get(layer, torch.zeros_like(probes)) + difference.T @ (difference @ probes)

    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: add(n, args[0])) for n, m in layers.items()]
    try:
        yield sketches
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def _probes(d: int, rank: int) -> Tensor:
    """Ω: k orthonormal columns (d, k), random but always the same; all of d where d is no more than `PROBES` r."""
    if d <= PROBES * rank:
        return torch.eye(d)
    probes: Tensor = torch.linalg.qr(torch.randn(d, PROBES * rank, generator=torch.Generator().manual_seed(0))).Q
    return probes


def _strongest(sketch: Tensor, rank: int) -> Tensor:
    """The r strongest eigenvectors of M as rows (r, d), strongest first, of length √128 / r, from Y = M Ω (d, k).

    By Nyström's approximation M ≈ Y (Ωᵀ Y)⁻¹ Yᵀ (Tropp et al. 2017, arXiv:1706.05736), which is M where Ω is square: no layer
    needs a matrix as wide as itself. Of a rank beyond d the last rows are zero.
    """
    found = sketch.cpu().double()
    core = _probes(len(found), rank).double().T @ found
    strengths, turn = torch.linalg.eigh((core + core.T) / 2)
    # what is weaker than that are the roundings of float32 sums
    root = found @ turn / strengths.clamp(min=1e-6 * float(strengths[-1])).sqrt()
    vectors = torch.linalg.svd(root, full_matrices=False).U[:, :rank].T
    # either sign is right; that with a positive largest entry is the same on every machine
    vectors = vectors * vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    rows = torch.nn.functional.pad(vectors, (0, 0, 0, rank - len(vectors)))
    return rows.float() * (LENGTH / rank)
