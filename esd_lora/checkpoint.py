"""Checkpoints of a training run: tensors, optimizer and counters, each in one safetensors file. No pickle.

A file is written whole or not at all, and has a SHA-256 of what it holds. The last two are kept: should a disk break the
newest one, the one before it gives the same patch, some steps later.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esd_lora.errors import OutputError
from esd_lora.patch import encode, write_file

KEPT = 2


class Saved(NamedTuple):
    """What a checkpoint holds: tensors, the state of a torch optimizer, and JSON values."""

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in a run's folder, `checkpoint-<step>.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def paths(self) -> dict[int, Path]:
        """The files by their steps, the newest first."""
        found = ((re.fullmatch(r"checkpoint-(\d+)\.safetensors", p.name), p) for p in self.folder.glob("checkpoint-*"))
        return dict(sorted(((int(m[1]), p) for m, p in found if m), reverse=True))

    def save(
        self, step: int, tensors: Mapping[str, Tensor], *, optimizer: Mapping[str, Any], state: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, and remove those that are no longer among the last two.

        Raises:
            OutputError: The file cannot be written; those before it are as they were.
        """
        moments = {
            f"optimizer.{i}.{k}": torch.as_tensor(v) for i, part in optimizer["state"].items() for k, v in part.items()
        }
        everything = {k: v.detach().cpu() for k, v in {**tensors, **moments}.items()}
        told = {"state": json.dumps(state), "groups": json.dumps(optimizer["param_groups"])}
        content = encode(everything, {**told, "sha256": _digest(everything, told)})
        write_file(self.folder / f"checkpoint-{step:05d}.safetensors", content)
        for path in list(self.paths.values())[KEPT:]:
            path.unlink()

    def load(self) -> Saved:
        """What the newest whole checkpoint holds; a warning where a newer one is broken.

        Raises:
            OutputError: None is whole.
        """
        broken = []
        for step, path in self.paths.items():
            try:
                saved = _read(path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                broken.append(f"{path}: a broken checkpoint ({error})")
                continue
            if broken:
                warnings.warn(f"{broken[0]}; going on from that of step {step}", stacklevel=2)
            return saved
        what = "it" if len(broken) == 1 else f"all {len(broken)}"
        raise OutputError(f"{broken[0]}; remove {what} to start again")

    def remove(self) -> None:
        """Remove all of them: the run is done."""
        for path in self.paths.values():
            path.unlink()


def _read(path: Path) -> Saved:
    """What one file holds; one of several errors where it is not what `save` wrote."""
    with safe_open(path, framework="pt") as store:
        told = store.metadata() or {}
        tensors = {k: store.get_tensor(k) for k in store.keys()}  # noqa: SIM118 (not a mapping)
    if told.pop("sha256", None) != _digest(tensors, told):
        raise ValueError("its SHA-256 is another")
    moments: dict[int, dict[str, Tensor]] = {}
    for name in [k for k in tensors if k.startswith("optimizer.")]:
        _, index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensors.pop(name)
    optimizer = {"state": moments, "param_groups": json.loads(told["groups"])}
    return Saved(tensors, optimizer, json.loads(told["state"]))


def _digest(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    """SHA-256 of tensors and metadata, in hexadecimal."""
    return hashlib.sha256(encode(tensors, told)).hexdigest()
