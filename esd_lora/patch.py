"""`Patch`: the low-rank tensors that erase a concept, and where they come from, in one safetensors file.

The file is `pytorch_lora_weights.safetensors` in diffusers' own naming, so `pipe.load_lora_weights(folder)` needs
nothing of us. Its header has `lora_adapter_metadata`, with only the keys that every diffusers version accepts, and
`esd_lora`: recipe, base, fingerprint, seed, versions, cost and, once measured, scores. Equal patches are equal files, byte
for byte. Alpha equals the rank, so that programs which ignore metadata scale the patch right.

    ΔW = lora_B · lora_A          (out, in) = (out, r) · (r, in)
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esd_lora.errors import OutputError, PatchError

FILE_NAME = "pytorch_lora_weights.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class Patch:
    """An erasure patch: tensors by diffusers' names and a JSON document about them.

    tensors: `unet.<module>.lora_A.weight` (r, in) and `….lora_B.weight` (out, r), on the CPU.
    info: `schema`, `recipe`, `base`, `versions`, `cost`, `loss`, and `scores` once measured; of a stack `base` and
        `stack`, with weight, digest, recipe and base of each part.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module, by its name with the denoiser's prefix."""
        return {k.removesuffix(".lora_A.weight"): len(v) for k, v in self.tensors.items() if ".lora_A." in k}

    @property
    def concepts(self) -> list[dict[str, Any]]:
        """The concepts that it erases, as its recipe names them, or the recipes of all parts of a stack."""
        parts = self.info.get("stack", [self.info])
        return [concept for part in parts for concept in part.get("recipe", {}).get("concepts", [])]

    @property
    def digest(self) -> str:
        """SHA-256 of its tensors, in hexadecimal: the same for patches that do the same, whatever is told about them."""
        return hashlib.sha256(encode(self.tensors, {})).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the patch to a folder or a `.safetensors` file; returns the file.

        Raises:
            OutputError: The place cannot be written to; nothing is left behind.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / FILE_NAME
        ranks = self.ranks
        adapter: dict[str, Any] = {
            "unet.r": max(ranks.values()),
            "unet.lora_alpha": max(ranks.values()),
            "unet.target_modules": sorted(k.split(".", 1)[1] for k in ranks),
        }
        if len(set(ranks.values())) > 1:
            pattern = {k.split(".", 1)[1]: r for k, r in sorted(ranks.items())}
            adapter |= {"unet.rank_pattern": pattern, "unet.alpha_pattern": pattern}
        header = {
            "format": "pt",
            "esd_lora": json.dumps({"schema": SCHEMA, **self.info}, sort_keys=True),
            "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        }
        write_file(file, encode(self.tensors, header))
        return file


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of these tensors, the same bytes every time (the library orders metadata at random)."""
    raw: bytes = safetensors.torch.save({k: tensors[k].contiguous() for k in sorted(tensors)})
    (length,) = struct.unpack("<Q", raw[:8])
    body = json.loads(raw[8 : 8 + length])
    head = json.dumps({"__metadata__": dict(sorted(metadata.items())), **body}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + raw[8 + length :]


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to the disk, then renamed.

    Raises:
        OutputError: The folder cannot be made or written to, or the disk is full.
    """
    part = None
    made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            part = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
        part, made = None, []
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        if part:
            Path(part).unlink(missing_ok=True)
        for folder in made:  # deepest first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def load_patch(path: str | Path) -> Patch:
    """The patch in a folder or file.

    Raises:
        PatchError: Nothing there, not a safetensors file, not a patch, or a tensor that is not finite.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise PatchError(f"{path}: no patch here; a patch is a folder with {FILE_NAME}, or such a file")
    try:
        with safe_open(file, framework="pt") as store:
            metadata = store.metadata() or {}
            tensors = {k: store.get_tensor(k) for k in store.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise PatchError(f"{file}: not a safetensors file: {error}") from error
    try:
        info = json.loads(metadata.get("esd_lora", "{}"))
    except ValueError as error:
        raise PatchError(f"{file}: its esd_lora header is not JSON") from error
    if not isinstance(info, dict) or info.get("schema", SCHEMA) != SCHEMA:
        raise PatchError(f"{file}: written in a form that this version cannot read; update esd_lora")
    _check_tensors(file, tensors)
    return Patch(tensors, info)


def _check_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is a finite low-rank factor with its partner.

    Raises:
        PatchError: The first one that is not.
    """
    if not tensors:
        raise PatchError(f"{file}: holds no tensors")
    for name, tensor in tensors.items():
        kind = ".lora_A." if ".lora_A." in name else ".lora_B."
        other = tensors.get(name.replace(kind, ".lora_B." if kind == ".lora_A." else ".lora_A."))
        if kind not in name or not name.endswith(".weight") or tensor.ndim != 2 or not tensor.is_floating_point():
            raise PatchError(f"{file}: {name} is not a low-rank factor in diffusers' naming")
        if other is None:
            raise PatchError(f"{file}: {name} lacks its other factor")
        if kind == ".lora_A." and (other.ndim != 2 or len(tensor) != other.shape[1]):
            raise PatchError(f"{file}: {name} is {tuple(tensor.shape)}, which does not fit {tuple(other.shape)}")
        if not torch.isfinite(tensor).all():
            raise PatchError(f"{file}: {name} has values that are not finite")
