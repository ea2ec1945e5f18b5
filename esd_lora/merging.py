"""`merge`: patches into a base's weights for good, written as a full pipeline that stock diffusers opens.

    W' = cast( W + Σ_i w_i · B_i A_i )        in float32 on a copy, cast once

There is no way back: W' is rounded, so that subtracting the patches again leaves the rounding in the weights. Keep the base
and the patches; merging again from them costs seconds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from esd_lora.bases import DTYPES, Base, local_file
from esd_lora.card import for_others
from esd_lora.compose import check_fits, in_use, stack
from esd_lora.errors import BaseModelError, PatchError
from esd_lora.patch import PARTS, Patch, check_empty, whole
from esd_lora.recipe import DType

RECORD = "esd_lora.json"
"""What a merged pipeline's folder has beside `model_index.json`: the patches that are in its weights."""

CARD = Path(__file__).parent / "templates" / "merged.md"


def merge(
    base: Base, patches: Sequence[Patch], weights: Sequence[float] | None = None, *, out: Path, dtype: DType = "fp32"
) -> Path:
    """The folder of a pipeline with the patches in its weights.

    Args:
        base: In float32; active adapters are taken off. It comes without safety checker and feature extractor, and so does
            what is written.
        patches: At least one.
        weights: One for each patch, any sign; 1 by default. A patch of weight 0 is left out.
        out: Folder to write; must not exist yet, or be empty.
        dtype: Of the merged denoiser; the other parts are written as the base has them.

    Raises:
        PatchError: A patch does not fit, is in the base's weights already, or takes them beyond what `dtype` can hold.
        OutputError: `out` holds something, or cannot be written to.
        ValueError: The base is not in float32.
    """
    check_empty(out)
    if base.dtype != torch.float32:
        raise ValueError(f"merging adds in float32, and the base is in {base.dtype}")
    patches, weights = in_use(patches, weights)
    for patch in patches:
        check_fits(patch, base)
    together = stack(patches, weights)
    before = merged_into(base)
    for part in together.info["stack"]:
        if part["digest"] in {p["digest"] for p in before}:
            names = Patch({}, part).erases or part["digest"][:12]
            raise PatchError(f"the patch that erases {names} is in the weights of {base.name} already")
    denoiser = merged_denoiser(base, together).to(DTYPES[dtype])
    pipe = copy.copy(base.pipe)  # `from_pipe` would cast what is shared
    pipe.register_modules(**{base.prefix: denoiser})
    for name in together.ranks:
        if not torch.isfinite(denoiser.get_submodule(name.removeprefix(f"{base.prefix}.")).weight).all():
            raise PatchError(f"{name}: not finite in {dtype} with the patches in it; give them less weight")
    parts = [*before, *for_others(together.info)["stack"]]
    with whole(out) as folder:
        pipe.save_pretrained(folder)
        _forget_places(folder)
        (folder / RECORD).write_text(json.dumps({"merged": parts}, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(base, parts), encoding="utf-8")
    return out


def _forget_places(folder: Path) -> None:
    """Leave out of a pipeline's configs where its parts were loaded from, which may be a place on this machine."""
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def merged_denoiser(base: Base, patch: Patch) -> Any:
    """A copy of the base's denoiser with the patch in its weights, without a trace of peft."""
    base.remove_adapters()
    denoiser = copy.deepcopy(base.denoiser)
    for name in patch.ranks:
        up, down = (patch.tensors[f"{name}.{factor}.weight"].float() for factor in ("lora_B", "lora_A"))
        weight = denoiser.get_submodule(name.removeprefix(f"{base.prefix}.")).weight
        weight += (up @ down).to(weight.device)
    return denoiser


def merged_into(base: Base) -> list[dict[str, Any]]:
    """What an earlier `merge` put into the weights of a base: a list of parts as in a stack; empty for other bases.

    Raises:
        BaseModelError: There is a record of it that cannot be read.
    """
    path = local_file(base, RECORD)
    if path is None:
        return []
    try:
        parts: list[dict[str, Any]] = PARTS.validate_python(json.loads(path.read_text(encoding="utf-8"))["merged"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BaseModelError(f"{base.name}: its {RECORD} is not what `merge` writes") from error
    return parts


def _card(base: Base, parts: Sequence[dict[str, Any]]) -> str:
    """The model card of a merged pipeline."""
    rows = [{"erases": Patch({}, part).erases, **part} for part in parts]
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", tags=["text-to-image", "diffusers", "concept-erasure"]
    )
    place = for_others({"base": {"name": base.name, "revision": base.revision}})["base"]["name"]
    return str(ModelCard.from_template(data, template_path=str(CARD), base=place, parts=rows))
