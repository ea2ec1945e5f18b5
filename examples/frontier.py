"""What stacks, and what resists? Kept under eight patches together against how often concept inversion finds an erased concept.

    python examples/frontier.py --out runs/stacking [--ways keyed fused] [--k 1 8] [--concepts cat neon]

Concept inversion (Pham et al. 2024, arXiv:2308.01508), by `esd_lora.evaluate.attacks`: the attacker holds the erased model
and 48 pictures of the concept, trains four soft words for 250 steps until that model denoises the pictures with them, and
then draws four of the prompts that these had, from 16 seeds never used; those of `guards.py` are others. The unerased base is
the ceiling. What is attacked is one patch of the concept, or the first eight of `examples/stacking.py`, whose folder, patches
and answers this script shares; its own are in `frontier.json`. It goes on where it stopped, prints a table and draws
`frontier.png`. Intervals are of the 64 pictures: how far another attack would come, from another start, is not in them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import stacking
from matplotlib.figure import Figure
from rich.progress import track

from esd_lora.bases import load_base
from esd_lora.compose import attach
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import OBJECTS, STYLES, prompt
from esd_lora.evaluate.attacks import BLANK, Drawing, Examples, inversion
from esd_lora.evaluate.rates import Rate, rate
from esd_lora.evaluate.scores import FIRST_SEED
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate

SHOWN, PROMPTS, SEEDS = 48, 4, 16
"""Pictures that the attacker trains on; prompts that it draws, and seeds of each."""

HOW = ("by name", "by inversion")


def asking(concept: str, words: str, n: int, *, first: int = 0) -> list[str]:
    """Prompts for a concept in these words: an object in every style in turn, or a style of every object."""
    if concept in OBJECTS:
        return [prompt(words, list(STYLES)[(first + i) % len(STYLES)]) for i in range(n)]
    return [prompt(list(OBJECTS)[(first + i) % len(OBJECTS)], words) for i in range(n)]


@cache
def shown(concept: str) -> Pictures:
    """The attacker's pictures of a concept, by the unerased base."""
    return generate(
        load_base("emoji"), asking(concept, concept, SHOWN), range(FIRST_SEED + 400_000, FIRST_SEED + 400_000 + SHOWN)
    )


def found(concept: str, patches: Sequence[Patch], evaluator: Evaluator) -> dict[str, Rate]:
    """How often the concept is seen in pictures of the erased model, by name and by inversion."""
    base = load_base("emoji")
    attach(base, patches)
    prompts = [p for p in asking(concept, BLANK, PROMPTS, first=1) for _ in range(SEEDS)]
    drawing = Drawing(prompts, [FIRST_SEED + 500_000 + i for i in range(SEEDS)] * PROMPTS)
    attack = inversion(base, Examples(asking(concept, BLANK, SHOWN), shown(concept)), drawing)
    rates = {}
    for how, pictures in zip(HOW, (drawing.asking(concept).draw(base), attack.pictures), strict=True):
        seen = evaluator.judge(pictures)
        rates[how] = rate([concept in pair for pair in zip(seen.objects, seen.styles, strict=True)])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stacking"))
    parser.add_argument(
        "--ways", nargs="+", choices=stacking.WAYS, default=stacking.WAYS, metavar="WAY", help=", ".join(stacking.WAYS)
    )
    parser.add_argument("--k", type=int, nargs="+", choices=(1, 8), default=[1, 8])
    parser.add_argument("--concepts", nargs="+", choices=stacking.POOL, default=["cat", "neon"], metavar="NAME")
    args = parser.parse_args()
    evaluator, path = load_evaluator("measure"), args.out / "frontier.json"
    eight = stacking.first_of(0, 8)
    if missing := [c for c in args.concepts if c not in eight]:
        parser.error(f"--concepts: {missing[0]} is not among the eight patches, {', '.join(eight)}")
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    with_what = load_base("emoji").fingerprint, evaluator.digest, SHOWN, PROMPTS, SEEDS, eight
    for k, way, concept in track(list(itertools.product(args.k, args.ways, args.concepts))):
        digest = stacking.digest_of(*with_what, k, way, stacking.FIELDS.get(way), concept)
        if digest in {row["digest"] for row in rows}:
            continue
        erased = [concept] if k == 1 else eight
        get, together = stacking.ways_of(load_base("emoji"), erased, 0, args.out / "patches")[way]
        patches = [together(made)] if (made := get()) else []
        rates = found(concept, patches, evaluator)
        place = {"k": k, "way": way, "concept": concept}
        rows = [row for row in rows if not place.items() <= row.items()]  # one of what has changed since
        rows.append({**place, "digest": digest, **{how: vars(r) for how, r in rates.items()}})
        stacking.write_rows(path, rows)
    answers = args.out / "stacking.json"
    kept = kept_of(json.loads(answers.read_text())) if answers.exists() else {}
    table(rows, kept)
    plot([row for row in rows if row["k"] == 8 and row["way"] in kept], kept, args.out / "frontier.png")


def kept_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Rate]:
    """How many objects are kept under eight patches, by the way."""
    eight = [row for row in answers if row["k"] == 8 and row["weight"] == 1]
    ways = dict.fromkeys(row["way"] for row in eight)
    rates = {way: stacking.rate_of([row for row in eight if row["way"] == way], "objects") for way in ways}
    return {way: kept for way, kept in rates.items() if kept}


def table(rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Rate]) -> None:
    """Print what is kept under eight patches, and how often each concept is found, by name and by inversion."""
    ks, concepts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("k", "concept"))
    heads = [f"{c}, k = {k}, {how}" for c in concepts for k in ks for how in HOW]
    print(f"| put together | kept at k = 8 | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    known = {(row["way"], row["k"], row["concept"]): row for row in rows}
    for way in sorted({row["way"] for row in rows}, key=stacking.WAYS.index):
        cells = [kept[way].interval() if way in kept else ""]
        for concept, k in itertools.product(concepts, ks):
            row = known.get((way, k, concept))
            cells += [Rate(**row[how]).interval() if row else "" for how in HOW]
        print(f"| {way} | {' | '.join(cells)} |")


def plot(rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Rate], path: Path) -> None:
    """Draw how often each concept is found by inversion over what is kept, under eight patches."""
    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    if not concepts:
        return
    ways = sorted({row["way"] for row in rows}, key=stacking.WAYS.index)
    figure = Figure(figsize=(4.5 * len(concepts) + 1.5, 4), layout="constrained")
    for axes, concept in zip(figure.subplots(1, len(concepts), squeeze=False)[0], concepts, strict=True):
        for row in sorted((r for r in rows if r["concept"] == concept), key=lambda r: stacking.WAYS.index(r["way"])):
            x, y = kept[row["way"]], Rate(**row["by inversion"])
            errors = [[[r.value - r.low], [r.high - r.value]] for r in (x, y)]
            color = "black" if row["way"] == "base" else f"C{ways.index(row['way'])}"
            marked = {"fmt": "o", "capsize": 2, "color": color, "label": row["way"]}
            axes.errorbar(x.value, y.value, xerr=errors[0], yerr=errors[1], **marked)
        labels = {"xlabel": "kept objects, eight patches together", "ylabel": f"{concept} found by inversion"}
        axes.set(xlim=(-0.03, 1.04), ylim=(-0.03, 1.04), **labels)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
