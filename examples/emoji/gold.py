"""Measure a gold model, which never knew some objects or styles, as if it were the base with them erased.

    python examples/emoji/gold.py --run build/emoji/without-cat-neon

What it draws when asked for what it never saw is what perfect erasure looks like. Prints a table and keeps the figures in
`gold.json` beside this script, since the weights themselves are too large to ship twice.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from esd_lora.bases import load_base, quick_dtype
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.evaluate.scores import answer_set, draw, gate, score
from esd_lora.report import score_table

KEPT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="what train_unet.py --without left")
    args = parser.parse_args()
    told = json.loads((args.run / "training.json").read_text())
    base, gold = load_base("emoji", dtype=quick_dtype()), load_base(str(args.run / "pipeline"), dtype=quick_dtype())
    evaluator = load_evaluator("measure")
    scores = []
    for name in told["without"]:
        others = set(told["without"]) - {name}  # what else it never saw says nothing of this one
        cells = [c for c in answer_set(name) if not others & {c.obj, c.style}]
        scores.append(score(name, cells, *(evaluator.judge(draw(m, cells)) for m in (gold, base)), evaluator))
    Console(width=120).print(score_table({"never shown": scores}))
    found = {"training": told, "fingerprint": gold.fingerprint, "scores": [s.to_dict() for s in scores]}
    found["gate"] = {k: asdict(r) for k, r in gate(gold, evaluator, seeds=1).items()}
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
