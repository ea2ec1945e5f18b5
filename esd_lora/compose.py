"""What one does with patches: check that they fit a base, make them active on it, and put several into one.

    attach     W + Σ_i w_i · B_i A_i      on a base in memory, to be taken off again
    stack      the same sum as one patch: factors are concatenated, never added, so that nothing mixes
    compress   the nearest patch of a lower rank, with its error

(B₁ + B₂)(A₁ + A₂) is what adding factors gives, and its cross terms B₁A₂ + B₂A₁ belong to neither patch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esd_lora.bases.base import Base
from esd_lora.errors import PatchError
from esd_lora.patch import Patch


def check_fits(patch: Patch, base: Base) -> None:
    """Nothing, if every factor has a layer of its shape in the base; a warning where the base's weights differ.

    Raises:
        PatchError: The base is of another architecture: the first layer that is missing or has another shape.
    """
    layers = {n.replace(".base_layer", ""): m for n, m in base.denoiser.named_modules() if isinstance(m, nn.Linear)}
    for name in patch.ranks:
        layer = layers.get(name.removeprefix(f"{base.prefix}."))
        made_for = patch.info.get("base", {}).get("name", "another base")
        if layer is None:
            raise PatchError(f"the patch (made for {made_for}) adapts {name}, which {base.name} does not have")
        shape = (len(patch.tensors[f"{name}.lora_B.weight"]), patch.tensors[f"{name}.lora_A.weight"].shape[1])
        if shape != tuple(layer.weight.shape):
            have = tuple(layer.weight.shape)
            raise PatchError(f"the patch (made for {made_for}) has {name} of {shape}; in {base.name} it is {have}")
    origin = patch.info.get("base", {})
    if origin.get("fingerprint") not in (None, base.fingerprint):
        warnings.warn(
            f"the patch was made for {origin.get('name')}, and the weights of {base.name} differ; "
            "patches often carry over to relatives of a base, but look at the pictures",
            stacklevel=2,
        )


def attach(base: Base, patches: Sequence[Patch], weights: Sequence[float] | None = None) -> list[str]:
    """The adapter names under which the patches are now active on the base, instead of any before.

    The active patches sum exactly: W + Σ_i weight_i · B_i A_i. `base.remove_adapters()` takes them off again.

    Args:
        base: Its denoiser is changed in place.
        patches: Any number; none leaves the bare base.
        weights: One for each patch, any sign; 1 by default.

    Raises:
        PatchError: A patch does not fit, or a weight is not a number; the base is left bare.
    """
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
    weights = _weights_of(patches, weights)
    _check_stackable(patches, weights)
    used = [(p, w) for p, w in zip(patches, weights, strict=True) if w]
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for p, _ in used for n in p.ranks):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        parts = [(p.tensors[down].float(), w * p.tensors[up].float()) for p, w in used if down in p.tensors]
        tensors[down] = torch.cat([a for a, _ in parts])
        tensors[up] = torch.cat([b for _, b in parts], 1)
        if not torch.isfinite(tensors[up]).all():
            raise PatchError(f"{name}: a weight is so large that the sum is not finite")
    told = [{**part, "weight": w * part["weight"]} for p, w in used for part in _parts(p)]
    return Patch(tensors, {"base": used[0][0].info.get("base", {}), "stack": told})


def _parts(patch: Patch) -> list[dict[str, Any]]:
    """What a stack tells of a patch: weight, digest, recipe and base, or its parts where it is a stack itself."""
    told = {k: patch.info[k] for k in ("recipe", "base") if k in patch.info}
    parts: list[dict[str, Any]] = patch.info.get("stack", [{"weight": 1.0, "digest": patch.digest, **told}])
    return parts


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


def _check_stackable(patches: Sequence[Patch], weights: Sequence[float]) -> None:
    """Nothing, if the patches can be summed; a warning where that is hardly meant.

    Raises:
        PatchError: See `stack`.
    """
    if not any(weights):
        raise PatchError("nothing to stack: name at least one patch with a weight other than 0")
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    concepts: set[str] = set()
    origins: dict[str, str] = {}
    for patch in patches:
        made_for = patch.info.get("base", {}).get("name", "an unknown base")
        for name in patch.ranks:
            shape = (len(patch.tensors[f"{name}.lora_B.weight"]), patch.tensors[f"{name}.lora_A.weight"].shape[1])
            first, other = shapes.setdefault(name, (shape, made_for))
            if shape != first:
                raise PatchError(
                    f"{name} is {shape} in a patch made for {made_for}, and {first} in one made for {other}"
                )
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
    how far the pictures did: measure the compressed patch as any other.

    Args:
        patch: Its layers of that rank or less are kept as they are.
        rank: At least 1.

    Raises:
        PatchError: The rank is below 1.
    """
    if rank < 1:
        raise PatchError(f"rank: a patch can be compressed to a rank of 1 or more, got {rank}")
    tensors, errors = dict(patch.tensors), dict.fromkeys(patch.ranks, 0.0)
    for name, have in patch.ranks.items():
        if have <= rank:
            continue
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        q_up, r_up = torch.linalg.qr(patch.tensors[up].double())
        q_down, r_down = torch.linalg.qr(patch.tensors[down].double().T)
        u, s, vt = torch.linalg.svd(r_up @ r_down.T)
        root = s[:rank].sqrt()
        tensors[up] = (q_up @ u[:, :rank] * root).float()
        tensors[down] = (root[:, None] * (vt[:rank] @ q_down.T)).float()
        errors[name] = (s[rank:].norm() / s.norm()).item() if s.any() else 0.0
    info: Mapping[str, Any] = {**patch.info, "compressed": {"rank": rank, "worst_error": max(errors.values())}}
    return Patch(tensors, info), errors
