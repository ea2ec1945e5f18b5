"""Checkpoints of the training scripts: everything that a loop needs to go on as if it had not stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state and torch's random state to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({**state, "rng": torch.get_rng_state()}, part)
    os.replace(part, path)


def load(path: Path, *, resume: bool) -> dict[str, Any] | None:
    """The state in `path` with torch's random state restored, or None for a fresh start."""
    if not resume or not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    torch.set_rng_state(state["rng"])
    return state
