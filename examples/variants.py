"""Train and measure every variant of the method on the embedded base: a table of docs/findings.md.

    python examples/variants.py --out runs/variants [--concept cat] [--only rank]

Each row is one field of the recipe changed from the defaults. Finished rows are kept, so that the script can go on; they are
named by what they were made of, so that none is taken for another's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from rich.progress import Progress

from esd_lora.bases import load_base, quick_dtype
from esd_lora.emoji.evaluators import Judgement, load_evaluator
from esd_lora.evaluate.rates import Rate
from esd_lora.evaluate.scores import Cell, answer_set, draw, score
from esd_lora.patch import Patch, write_file
from esd_lora.recipe import Recipe
from esd_lora.training import train

VARIANTS: dict[str, dict[str, object]] = {
    "defaults": {},
    "layers: esd-x-strict": {"layers": "esd-x-strict"},
    "layers: esd-u": {"layers": "esd-u"},
    "layers: full": {"layers": "full"},
    "x_t: edited": {"x_t": "edited"},
    "rank: 1": {"rank": 1},
    "rank: 2": {"rank": 2},
    "rank: 8": {"rank": 8},
    "rank: 16": {"rank": 16},
    "eta: 0": {"eta": 0.0},
    "eta: 1": {"eta": 1.0},
    "preserve_weight: 0": {"preserve_weight": 0.0},
    "keys: closed-form": {"keys": "closed-form"},
    "keys: closed-form, eta: 2": {"keys": "closed-form", "eta": 2.0},
    "keys: closed-form, eta: 2, rank: 4": {"keys": "closed-form", "eta": 2.0, "rank": 4},
    "objective: closed-form, eta: 2": {"objective": "closed-form", "eta": 2.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    base, evaluator = load_base("emoji"), load_evaluator("measure")
    quick = load_base("emoji", dtype=quick_dtype())  # the pictures; training is in the recipe's own precision
    cells = answer_set(args.concept)
    bare = None

    def judge(cells: list[Cell], label: str, *patches: Patch) -> Judgement:
        with Progress(transient=True) as bar:
            task = bar.add_task(label, total=len(cells))
            return evaluator.judge(draw(quick, cells, patches, on_batch=lambda n: bar.advance(task, n)))

    print("| variant | UA | IRA | CRA | worst three | forward passes |\n|---|---|---|---|---|---|")
    for name, fields in VARIANTS.items():
        if args.only not in name:
            continue
        recipe = Recipe.model_validate({"base": "emoji", "concepts": args.concept, **fields})
        made_of = recipe.to_yaml() + base.fingerprint + evaluator.digest
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        path = args.out / f"{args.concept} {name} {digest}.json".replace(" ", "-").replace(":", "")
        if not path.exists():
            patch = train(recipe, base)
            bare = bare or judge(cells, "base")
            found = score(args.concept, cells, judge(cells, name, patch), bare, evaluator)
            passes = patch.info["cost"]["forward_passes"]
            row = {"scores": found.to_dict(), "forward_passes": passes}
            write_file(path, json.dumps(row, indent=2).encode())
        print(table_row(name, json.loads(path.read_text())), flush=True)


def table_row(name: str, row: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    scores = row["scores"]
    shown = [Rate(**scores[k]).interval() for k in ("ua", "ira", "cra")]
    worst = ", ".join(f"{n} {100 * r['value']:.0f}" for n, r in scores["worst"].items())
    return f"| {name} | {' | '.join(shown)} | {worst} | {row['forward_passes']:,} |"


if __name__ == "__main__":
    main()
