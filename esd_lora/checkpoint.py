"""Checkpoints of a training run: tensors, optimizer and counters in one safetensors file. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esd_lora.errors import OutputError
from esd_lora.patch import encode, write_file


class Checkpoint:
    """A file that a run is saved to and restored from, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def step(self) -> int:
        """The step that the file holds."""
        return int(self.load()[2]["step"])

    def save(self, tensors: Mapping[str, Tensor], *, optimizer: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Write tensors, the state of a torch optimizer, and JSON values, in place of what was there.

        Raises:
            OutputError: The file cannot be written.
        """
        moments = {
            f"optimizer.{i}.{k}": torch.as_tensor(v) for i, part in optimizer["state"].items() for k, v in part.items()
        }
        groups = json.dumps(optimizer["param_groups"])
        everything = {k: v.detach().cpu() for k, v in {**tensors, **moments}.items()}
        write_file(self.path, encode(everything, {"state": json.dumps(state), "groups": groups}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """The tensors, the optimizer's state and the JSON values that `save` was given.

        Raises:
            OutputError: The file is broken.
        """
        try:
            with safe_open(self.path, framework="pt") as store:
                metadata = store.metadata()
                tensors = {k: store.get_tensor(k) for k in store.keys()}  # noqa: SIM118 (not a mapping)
            state, groups = json.loads(metadata["state"]), json.loads(metadata["groups"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{self.path}: a broken checkpoint ({error}); remove it to start again") from error
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [k for k in tensors if k.startswith("optimizer.")]:
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensors.pop(name)
        return tensors, {"state": moments, "param_groups": groups}, state
