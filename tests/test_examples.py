"""The examples run as they stand, and are short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, out: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_are_at_most_forty_lines() -> None:
    scripts = sorted(EXAMPLES.glob("0*.py"))
    assert len(scripts) == 3
    assert all(len(p.read_text().splitlines()) <= 40 for p in scripts)


def test_a_patch_is_trained_and_then_used_by_plain_diffusers(tmp_path: Path) -> None:
    assert "layers" in run("01_erase.py", tmp_path / "cat")
    run("02_plain_diffusers.py", tmp_path / "cat")
    made = {p.name: p.read_bytes() for p in (tmp_path / "cat").glob("*.png")}
    assert made.keys() == {"grid.png", "erased.png", "back.png"}
    assert made["erased.png"] != made["back.png"]


def test_patches_are_scaled_and_combined(tmp_path: Path) -> None:
    run("03_scale_and_combine.py", tmp_path)
    assert (tmp_path / "grid.png").exists()
