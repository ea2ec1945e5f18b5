"""What one does with patches: check that they fit a base, make them active on it, and put several into one.

    attach     W + Σ_i w_i · B_i A_i      on a base in memory, to be taken off again
    attached   the same for as long as a block lasts
    stack      the same sum as one patch: factors are concatenated, never added, so that nothing mixes
    compress   the nearest patch of a lower rank, with its error

(B₁ + B₂)(A₁ + A₂) is what adding factors gives, and its cross terms B₁A₂ + B₂A₁ belong to neither patch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from esd_lora.bases import base_of
from esd_lora.bases.base import Base
from esd_lora.errors import PatchError
from esd_lora.patch import Patch
from esd_lora.recipe import Concept


def check_fits(patch: Patch, base: Base) -> None:
    """Nothing, if every factor has a layer of its shape in the base; a warning where the base's weights differ.

    Raises:
        PatchError: The base is of another architecture: the first layer that is missing or has another shape.
        BaseModelError: Its projections are fused.
    """
    base.check_unfused()
    modules = base.denoiser.named_modules(prefix=base.prefix)
    layers = {n.replace(".base_layer", ""): tuple(m.weight.shape) for n, m in modules if isinstance(m, nn.Linear)}
    origin = patch.info.get("base", {})
    for name, shape in patch.shapes.items():
        have = layers.get(name)
        if have is None:
            raise PatchError(f"{_title(patch)} adapts {name}, which {base.name} does not have")
        if shape != have:
            raise PatchError(f"{_title(patch)} has {name} of {shape}; in {base.name} it is {have}")
    if origin.get("fingerprint") not in (None, base.fingerprint):
        others = f"{origin.get('name')}, and the weights of {base.name} differ"
        if origin.get("name") == base.name:
            others = f"other weights than those of {base.name} here"
        warnings.warn(
            f"the patch was made for {others}; "
            "patches often carry over to relatives of a base, but look at the pictures",
            stacklevel=2,
        )


def _title(patch: Patch) -> str:
    """What messages call a patch."""
    erases = f" that erases {patch.erases}" if patch.erases else ""
    return f"the patch{erases} (made for {patch.info.get('base', {}).get('name', 'another base')})"


def concepts_of(patch: Patch) -> list[Concept]:
    """The concepts that a patch says it erases, one at least.

    Raises:
        PatchError: It says none.
    """
    if not patch.concepts:
        raise PatchError(f"the patch {patch.digest[:12]} does not say what it erases")
    return [Concept.model_validate(c) for c in patch.concepts]


def attach(
    base: Base | DiffusionPipeline, patches: Sequence[Patch], weights: Sequence[float] | None = None
) -> list[str]:
    """The adapter names under which the patches are now active on the base, instead of any before.

    The active patches sum exactly: W + Σ_i weight_i · B_i A_i. `base.remove_adapters()` takes them off again, or
    `unload_lora()` of the pipeline's denoiser, and diffusers' `set_adapters` gives the names other weights.

    Args:
        base: A base, or a pipeline as diffusers loads it; its denoiser is changed in place.
        patches: Any number; none leaves the bare base.
        weights: One for each patch, any sign; 1 by default.

    Raises:
        PatchError: A patch does not fit, or a weight is not a number; the base is left bare.
        BaseModelError: A pipeline of no known family, or one whose projections are fused.
    """
    if isinstance(base, DiffusionPipeline):
        base = base_of(base)
    base.remove_adapters()
    weights = _weights_of(patches, weights)
    for patch in patches:
        check_fits(patch, base)
    names = [f"patch_{i}" for i in range(len(patches))]
    for name, patch in zip(names, patches, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
            base.denoiser.load_lora_adapter(dict(patch.tensors), prefix=base.prefix, adapter_name=name)
    if names:
        base.denoiser.set_adapters(names, weights)
        base.denoiser.requires_grad_(False)
    return names


@contextmanager
def attached(base: Base, patches: Sequence[Patch], weights: Sequence[float] | None = None) -> Iterator[None]:
    """Inside, the patches are active on the base; before and afterwards it is bare.

    Args:
        base, patches, weights: As `attach` takes them.

    Raises:
        PatchError: A patch does not fit, or a weight is not a number; the base is left bare.
    """
    attach(base, patches, weights)
    try:
        yield
    finally:
        base.remove_adapters()


def stack(patches: Sequence[Patch], weights: Sequence[float] | None = None) -> Patch:
    """One patch that does what the patches do together, Σ_i w_i · B_i A_i, exactly.

        A = [A_1; A_2; …]        B = [w_1 B_1, w_2 B_2, …]        so that  B A = Σ_i w_i B_i A_i

    The rank of a layer is the sum of the ranks that the patches have there. The only rounding is that of w_i · B_i.

    Args:
        patches: At least one; ranks and layers may differ.
        weights: One for each patch, any sign; 1 by default. A patch of weight 0 is left out.

    Raises:
        PatchError: No patches, a weight that is not a number, or patches of different architectures.
    """
    patches, weights = in_use(patches, weights)
    _check_stackable(patches)
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for p in patches for n in p.ranks):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        used = [(p, w) for p, w in zip(patches, weights, strict=True) if down in p.tensors]
        tensors[down] = torch.cat([p.tensors[down].float() for p, _ in used])
        tensors[up] = torch.cat([w * p.tensors[up].float() for p, w in used], 1)
        if not torch.isfinite(tensors[up]).all():
            raise PatchError(f"{name}: a weight is so large that the sum is not finite")
    told = [{**part, "weight": w * part["weight"]} for p, w in zip(patches, weights, strict=True) for part in _parts(p)]
    origin: dict[str, Any] = next((p.info["base"] for p in patches if p.info.get("base")), {})
    return Patch(tensors, {"base": origin, "stack": told})


def in_use(patches: Sequence[Patch], weights: Sequence[float] | None = None) -> tuple[list[Patch], list[float]]:
    """The patches whose weight is not 0, and these weights; the others are as if they had not been named.

    Raises:
        PatchError: None is left, or a weight is not a number.
    """
    used = [(p, w) for p, w in zip(patches, _weights_of(patches, weights), strict=True) if w]
    if not used:
        raise PatchError("no patch is left: name at least one with a weight other than 0")
    return [p for p, _ in used], [w for _, w in used]


def _parts(patch: Patch) -> list[dict[str, Any]]:
    """What a stack tells of a patch: weight, digest, recipe and base, or its parts where it is a stack itself."""
    marks = {k: patch.info[k] for k in ("fused", "compressed") if k in patch.info}
    if "stack" in patch.info:
        return [{**part, **marks} for part in patch.info["stack"]]
    told = {k: patch.info[k] for k in ("recipe", "base") if k in patch.info}
    return [{"weight": 1.0, "digest": patch.digest, **told, **marks}]


def _weights_of(patches: Sequence[Patch], weights: Sequence[float] | None) -> list[float]:
    """One finite weight for each patch; 1 by default.

    Raises:
        PatchError: Another number of weights, or one that is not finite.
    """
    weights = [1.0] * len(patches) if weights is None else list(weights)
    if len(weights) != len(patches):
        raise PatchError(f"{len(patches)} patches and {len(weights)} weights; give one weight for each patch")
    bad = [w for w in weights if not math.isfinite(w)]
    if bad:
        raise PatchError(f"a weight must be a finite number, got {bad[0]}")
    return weights


def _check_stackable(patches: Sequence[Patch]) -> None:
    """Nothing, if the patches can be summed; a warning where that is hardly meant.

    Raises:
        PatchError: See `stack`.
    """
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    concepts: set[str] = set()
    origins: dict[str, str] = {}
    if len(adapted := sorted({patch.prefix for patch in patches})) > 1:
        raise PatchError(f"some patches adapt a {adapted[0]} and some a {adapted[1]}; no base has both")
    for patch in patches:
        made_for = patch.info.get("base", {}).get("name", "an unknown base")
        for name, shape in patch.shapes.items():
            first, other = shapes.setdefault(name, (shape, _title(patch)))
            if shape != first:
                raise PatchError(f"{name} is {shape} in {_title(patch)}, and {first} in {other}")
        for concept in dict.fromkeys(c["erase"] for c in patch.concepts):
            if concept in concepts:
                warnings.warn(f"{concept} is erased by more than one of the patches", stacklevel=3)
            concepts.add(concept)
        if fingerprint := patch.info.get("base", {}).get("fingerprint"):
            origins.setdefault(fingerprint, made_for)
    if len(origins) > 1:
        names = ", ".join(origins.values())
        warnings.warn(
            f"the patches were made for bases of different weights ({names}); look at the pictures", stacklevel=3
        )


def compress(patch: Patch, rank: int) -> tuple[Patch, dict[str, float]]:
    """The nearest patch of at most this rank in every layer, and its relative error by layer.

        B A = U S Vᵀ   →   B' = U_r √S_r,  A' = √S_r V_rᵀ        error = ‖B A − B' A'‖ / ‖B A‖   (Frobenius)

    by Eckart and Young (1936), through QR of the thin factors, in float64. The error says how far the weights moved, not
    how far the pictures did: measure the compressed patch as any other, for it has neither scores nor loss.

    Args:
        patch: Its layers of that rank or less are kept as they are; if all are, so is the patch.
        rank: At least 1.

    Raises:
        PatchError: The rank is below 1.
    """
    if rank < 1:
        raise PatchError(f"rank: a patch can be compressed to a rank of 1 or more, got {rank}")
    tensors, errors = dict(patch.tensors), dict.fromkeys(patch.ranks, 0.0)
    large = [name for name, have in patch.ranks.items() if have > rank]
    if not large:
        return patch, errors
    for name in large:
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        q_up, r_up = torch.linalg.qr(patch.tensors[up].double())
        q_down, r_down = torch.linalg.qr(patch.tensors[down].double().T)
        u, s, vt = torch.linalg.svd(r_up @ r_down.T)
        root = s[:rank].sqrt()
        tensors[up] = (q_up @ u[:, :rank] * root).float()
        tensors[down] = (root[:, None] * (vt[:rank] @ q_down.T)).float()
        errors[name] = (s[rank:].norm() / s.norm()).item() if s.any() else 0.0
    told = {k: v for k, v in patch.info.items() if k not in ("scores", "loss")}
    return Patch(tensors, {**told, "compressed": {"rank": rank, "worst_error": max(errors.values())}}), errors
