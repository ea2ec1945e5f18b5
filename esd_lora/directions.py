"""The directions that adapters start from: those in which a concept moves what the adapted layers read.

    bank ─► h(x_t, s) − h(x_t, ∅) of every layer ─► its strongest directions ─► lora_A

Of a random lora_A of rank r a concept's direction in d dimensions meets about √(r / d), by luck more or less of it, so that how
soon a run erases depends on its seed. Of these it meets all, and what the concept does not move is left alone longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from esd_lora.bases.base import Base, Condition
from esd_lora.trajectories import Bank

EXAMPLES = 24
"""Examples of the bank that are looked at, evenly spread; each costs two passes."""


@torch.no_grad()
def aim(base: Base, conditions: Condition, bank: Bank, *, batch_size: int, name: str = "patch") -> dict[str, Tensor]:
    """The lora_A of every adapted layer that trains one, as `Base.load_adapter_state` takes them: (r, d) float32 on the CPU.

        lora_A = √d / r · V_r,    V_r the r strongest right singular vectors of the rows h(x_t, s) − h(x_t, ∅)

    h is what a layer reads, in all places of some examples (x_t, t, s) of the bank, by the frozen model. The rows of lora_A
    are as long as those of peft's Gaussian start, N(0, 1 / r²).

    Args:
        base: With untrained adapters.
        conditions: The encoded prompts; row 0 is the empty one.
        bank: Of what is to be erased.
        batch_size: Examples at a time.
        name: Of the adapters.
    """
    rows = torch.linspace(0, len(bank) - 1, min(EXAMPLES, len(bank)), device=bank.x.device).round().long()
    with _moments(base, name) as moments, base.teacher():
        for some in torch.split(rows, batch_size):
            s = bank.s[some]
            asked = conditions[torch.cat([s, torch.zeros_like(s)])]
            base.predict(bank.x[some].repeat(2, 1, 1, 1).to(base.dtype), bank.t[some].repeat(2), asked)
    modules = dict(base.denoiser.named_modules())
    return {
        f"{base.prefix}.{layer}.lora_A.weight": _strongest(moment, modules[layer].r[name])
        for layer, moment in moments.items()
    }


def passes(examples: int) -> int:
    """How many passes it takes for a bank of so many examples."""
    return 2 * min(EXAMPLES, examples)


@contextmanager
def _moments(base: Base, name: str) -> Iterator[Mapping[str, Tensor]]:
    """Inside, Σ δ δᵀ (d, d) of each layer that trains its lora_A, δ what the halves of a batch differ by in what it reads."""
    moments: dict[str, Tensor] = {}

    def add(layer: str, read: Tensor) -> None:
        one, other = read.float().chunk(2)
        difference = (one - other).flatten(0, -2)
        moments[layer] = moments.get(layer, torch.zeros((), device=read.device)) + difference.T @ difference

    layers = {
        layer: module
        for layer, module in base.denoiser.named_modules()
        if name in getattr(module, "lora_A", {}) and module.lora_A[name].weight.requires_grad
    }
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: add(n, args[0])) for n, m in layers.items()]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def _strongest(moment: Tensor, rank: int) -> Tensor:
    """The r eigenvectors of the largest eigenvalues as rows (r, d), strongest first, of length √d / r."""
    moment = moment if moment.device.type == "cuda" else moment.cpu()  # elsewhere there is no eigh
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors[:, -rank:].flip(1).T.cpu()
    return vectors * (math.sqrt(len(moment)) / rank)
