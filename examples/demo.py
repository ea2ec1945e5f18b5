"""The main job: erase an object and a style from the embedded base with `esd-lora train`, and measure both.

    python examples/demo.py --out runs/demo

Leaves a folder for each with the patch, the resolved recipe, the loss curve, a before/after grid and the scores.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path


def esd_lora(*arguments: str) -> None:
    """Run the command line, showing the command first; stop where it fails."""
    print("$ esd-lora", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-c", "from esd_lora.cli import main; main()", *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = parser.parse_args().out
    started = time.monotonic()
    names = ("clock", "neon")
    for name in names:
        if (out / name / "recipe.yaml").exists():  # the demo's own folder, from an earlier time
            shutil.rmtree(out / name)
        esd_lora("train", f"emoji/{name}", "--out", str(out / name))
    patches = [part for name in names for part in ("--patch", str(out / name))]
    esd_lora("eval", "--base", "emoji", "--target-seeds", "5", "--kept-seeds", "1", *patches)
    print(f"\n{time.monotonic() - started:.0f} seconds. In each folder of {out}:")
    for path in sorted((out / names[0]).iterdir()):
        print(f"  {path.name}")


if __name__ == "__main__":
    main()
