"""Controls: patches of which the result is known, so that a measurement can be seen to fail where it must.

null_patch          changes nothing: every drift is exactly 0, every rate the base's own
random_like         as large as a patch in every layer, and about nothing: what size alone does
scrambling_patch    ruins every picture: it "erases" all that one asks for, and must lose in whatever counts as good
"""

from __future__ import annotations

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.patch import Patch
from esd_lora.recipe import Layers

SCRAMBLING = 16.0
"""‖ΔW‖ over ‖W‖ (Frobenius) of a scrambling patch, in every layer. At 4 the embedded base still drew some objects."""


def null_patch(base: Base, layers: Layers, rank: int) -> Patch:
    """A patch with lora_B of zeros, as training starts from: ΔW = 0, and pictures are the base's own, bit for bit.

    Args:
        base: The model; active adapters are taken off.
        layers: Preset of layers to adapt.
        rank: Of every layer.

    Raises:
        BaseModelError: The preset matches nothing.
        RecipeError: The rank is above what a layer can use.
    """
    base.remove_adapters()
    with torch.random.fork_rng(devices=[]):  # nobody else's random numbers change by it
        torch.default_generator.manual_seed(0)
        base.add_adapter(layers=layers, rank=rank)
    try:
        return Patch(base.adapter_state(), {"base": {"name": base.name, "fingerprint": base.fingerprint}})
    finally:
        base.remove_adapters()


def scrambling_patch(base: Base, layers: Layers, rank: int, *, seed: int = 0) -> Patch:
    """A patch of random factors, in every layer `SCRAMBLING` times as large as the weight: it ruins every picture.

    Args:
        base: The model; active adapters are taken off.
        layers: Preset of layers to adapt.
        rank: Of every layer.
        seed: Of the factors.

    Raises:
        BaseModelError: The preset matches nothing.
        RecipeError: The rank is above what a layer can use.
    """
    null = null_patch(base, layers, rank)
    weights = {n: base.denoiser.get_submodule(n.removeprefix(f"{base.prefix}.")).weight for n in null.ranks}
    return _random(null, {n: SCRAMBLING * w.detach().cpu().double().norm().item() for n, w in weights.items()}, seed)


def random_like(patch: Patch, seed: int) -> Patch:
    """A patch of random factors with the ranks of another one, and in every layer with its Frobenius norm ‖B A‖.

    A random ΔW of rank r looks at r directions of the input that mean nothing; where the patch does more than this control
    does, it is by what it has learned. Says of itself no more than the base.

    Args:
        patch: Of any base.
        seed: Of the factors.
    """
    return _random(patch, {n: _change(patch, n).norm().item() for n in patch.ranks}, seed)


def _random(like: Patch, norms: dict[str, float], seed: int) -> Patch:
    """Normal factors of a patch's shapes, float32, lora_B scaled so that each ‖B A‖ is the norm given."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted(like.tensors)
    drawn = Patch({n: torch.randn(like.tensors[n].shape, generator=generator) for n in names})
    tensors = dict(drawn.tensors)
    for name, norm in norms.items():
        up = f"{name}.lora_B.weight"
        tensors[up] = tensors[up] * (norm / _change(drawn, name).norm().item())
    return Patch(tensors, {k: like.info[k] for k in ("base",) if k in like.info})


def _change(patch: Patch, name: str) -> Tensor:
    """ΔW of a layer, (out, in) float64."""
    up, down = (patch.tensors[f"{name}.{factor}.weight"].double() for factor in ("lora_B", "lora_A"))
    return up @ down
