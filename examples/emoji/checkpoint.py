"""Checkpoints of the training scripts: everything that a loop needs to go on as if it had not stopped."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any], *, told: dict[str, Any]) -> None:
    """Write the state, what the run was told, and torch's random state to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({**state, "told": told, "rng": torch.get_rng_state()}, part)
    os.replace(part, path)


def load(path: Path, *, told: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The state in `path` with torch's random state restored, or None for a fresh start.

    Exits where there is a state and nobody asked for it, for a fresh start would overwrite hours of work, and where it is that
    of a run which was told something else: options, or the digest of what it is trained on.
    """
    if not path.exists():
        return None
    if not resume:
        sys.exit(f"{path}: an earlier run; go on with it by --resume, or remove it")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["told"] != told:
        sys.exit(f"{path}: of a run with {state['told']}, and this one has {told}; remove it to begin anew")
    torch.set_rng_state(state["rng"])
    return state


def digest(*paths: Path) -> str:
    """Twelve hexadecimal digits that follow from the contents of files: what is computed from them is named so."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]
