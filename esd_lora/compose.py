"""What one does with patches: check that they fit a base, and make them active on it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

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
        PatchError: A patch does not fit; the base is left bare.
    """
    base.remove_adapters()
    for patch in patches:
        check_fits(patch, base)
    names = [f"patch_{i}" for i in range(len(patches))]
    for name, patch in zip(names, patches, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
            base.denoiser.load_lora_adapter(dict(patch.tensors), prefix=base.prefix, adapter_name=name)
    if names:
        base.denoiser.set_adapters(names, list(weights or [1.0] * len(names)))
        base.denoiser.requires_grad_(False)
    return names
