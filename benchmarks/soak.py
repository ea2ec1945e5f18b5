"""Use one process for a long time: trainings, then pictures with patches put on and taken off, and see whether it stays small.

    python benchmarks/soak.py --out runs/soak

On a random pipeline of 0.3 M parameters, which `tests/tiny.py` makes: 200 trainings, four kinds of recipe by turns, then 2,000
times a patch or a stack of two on, a picture, and off. Printed as JSON, and written to `soak.json`: the slope of the resident
memory over the second half of each part, live tensors and modules at its middle and end, and whether the base is bit-equal to
what it was.

Bound: 20 kB for each round. What memory allocators lose is below that; a forgotten adapter of the tiny pipeline has 16 kB of
numbers alone (16 layers, rank 4), and the moments of its optimizer have twice that.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import save_tiny

from esd_lora import attach, generate, load_base, stack, train
from esd_lora.bases import Base
from esd_lora.patch import write_file
from esd_lora.recipe import Recipe, make_recipe

BOUND = 20_000
SETTINGS = (
    {},
    {"concepts": "dog", "x_t": "edited", "refresh_every": 3, "layers": "full"},
    {"keys": "closed-form", "objective": "paper"},
    {"objective": "closed-form"},
)


def recipe_of(base: str, **settings: object) -> Recipe:
    short = {"steps": 6, "batch_size": 2, "trajectories": 1, "trajectory_steps": 3, "preserve": ["", "dog"]}
    return make_recipe({"base": base, "concepts": "cat", **short, **settings})


def resident() -> int:
    """Bytes of memory that the process has, by Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live() -> dict[str, int]:
    """How many tensors and modules there are."""
    gc.collect()
    objects = gc.get_objects()
    return {kind.__name__: sum(issubclass(type(o), kind) for o in objects) for kind in (torch.Tensor, nn.Module)}


def soak(rounds: int, work: Callable[[int], object]) -> dict[str, object]:
    """What many rounds of work do to the process: least-squares slope of the memory over the second half, and counts."""
    started, points, middle = time.monotonic(), [], {}
    for i in range(rounds):
        work(i)
        if i == rounds // 2:
            middle = live()
        if i >= rounds // 2:
            points.append((float(i), float(resident())))
    counts = {"middle": middle, "end": live()}
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    return {
        "rounds": rounds,
        "seconds": round(time.monotonic() - started, 1),
        "megabytes": round(resident() / 1e6, 1),
        "bytes_per_round": round(slope),
        "bound": BOUND,
        "live": counts,
        "flat": slope < BOUND and counts["middle"] == counts["end"],
    }


def weights_of(base: Base) -> dict[str, torch.Tensor]:
    parts = {k: v for k, v in base.pipe.components.items() if isinstance(v, nn.Module)}
    return {f"{k}.{n}": w.clone() for k, part in parts.items() for n, w in part.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = save_tiny(arguments.out / "tiny")
    base = load_base(str(folder), device="cpu")
    before = weights_of(base)
    recipes = [recipe_of(str(folder), **settings) for settings in SETTINGS]
    patches = [train(r, base) for r in recipes]
    sets = [[patches[0]], [patches[1]], patches[2:4], [stack(patches[:2])]]

    def picture(i: int) -> None:
        attach(base, sets[i % len(sets)])
        generate(base, ["cat"], [i], steps=2)
        base.remove_adapters()

    found = {
        "trainings": soak(arguments.trainings, lambda i: train(recipes[i % len(recipes)], base)),
        "pictures": soak(arguments.pictures, picture),
    }
    after = weights_of(base)
    equal = list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    text = json.dumps({**found, "base_bit_equal": equal}, indent=2)
    write_file(arguments.out / "soak.json", text.encode())
    print(text)
    sys.exit(not (equal and all(part["flat"] for part in found.values())))


if __name__ == "__main__":
    main()
