"""What robust training is worth: erased, kept, and found again by concept inversion, beside the defaults.

    python benchmarks/robust.py --out runs/robust [--concept cat] [--patches default "robust: 2"] [--seeds 0 1]

An object or a style of the embedded base is erased with the defaults, with rounds of an adversary, and, for the time that these
take, with more steps. UA, IRA and CRA are those of an answer set. Then the concept is asked for in other words, of which robust
training was told the synonyms and not the misspellings; and an attacker has four soft words and 250 steps on pictures of an
object in three styles, or of a style in ten objects, and what it draws with them in the others, from seeds and noise never
used, is judged. The unerased base is the ceiling. Seconds are those of training, on this machine. What is measured stays in the
folder, so that the script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from esd_lora.bases import Base, load_base
from esd_lora.compose import attach
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import OBJECTS, STYLES, prompt
from esd_lora.evaluate.attacks import BLANK, Drawing, Examples, Training, inversion
from esd_lora.evaluate.rates import Rate, rate
from esd_lora.evaluate.scores import FIRST_SEED, answer_set, draw, score
from esd_lora.evaluate.suite import misspellings
from esd_lora.patch import Patch, write_file
from esd_lora.pictures import Pictures, generate
from esd_lora.recipe import Recipe
from esd_lora.training import train

PATCHES: Mapping[str, dict[str, Any] | None] = {
    "none": None,
    "default": {},
    "robust: 2": {"robust": 2},
    "robust: 4": {"robust": 4},
    "steps: 180": {"steps": 180},
}
"""What a recipe has besides its concept; None for the unerased base."""

RATES = ("UA", "IRA", "CRA", "in other words", "by inversion")
ASKED, KEPT_SEEDS = 60, 1
"""Pictures that ask for the concept, and seeds of all that do not."""
SHOWN, DRAWN = 48, 64
"""Pictures that the attacker trains on, and that it draws."""
WITH = 6
"""How many of what a concept is asked for with it is asked for in other words with: of an object all."""


def beside(concept: str) -> list[str]:
    """What an object or a style is asked for with: in every style, or of every object."""
    return list(STYLES if concept in OBJECTS else OBJECTS)


def shown_and_drawn(concept: str) -> tuple[list[str], list[str]]:
    """What the attacker is shown the concept with, and what it draws it with."""
    every = beside(concept)
    return every[::2], every[1::2]


def asking(concept: str, words: str, n: int, others: Sequence[str]) -> list[str]:
    """So many prompts for the concept in these words, with these others in turn."""
    pairs = ((words, others[i % len(others)]) for i in range(n))
    return [prompt(*pair) if concept in OBJECTS else prompt(*reversed(pair)) for pair in pairs]


def kept_and_erased(concept: str, patch: Patch | None, evaluator: Evaluator) -> dict[str, Rate]:
    """UA, IRA and CRA on an answer set; the base's are a row of their own."""
    cells = answer_set(concept, target_seeds=ASKED // len(beside(concept)), kept_seeds=KEPT_SEEDS)
    judged = evaluator.judge(draw(load_base("emoji"), cells, [patch] if patch else []))
    found = score(concept, cells, judged, judged, evaluator)
    return {name: replace(r, base=None) for name, r in (("UA", found.ua), ("IRA", found.ira), ("CRA", found.cra))}


def in_other_words(concept: str, patch: Patch | None, evaluator: Evaluator) -> Rate:
    """How often the concept is in pictures of its synonyms and misspellings, with all that it is asked for with."""
    base = load_base("emoji")
    attach(base, [patch] if patch else [])
    forms, others = [*{**OBJECTS, **STYLES}[concept], *misspellings(concept)], beside(concept)[:WITH]
    asked = [text for form in forms for text in asking(concept, form, len(others), others)]
    return seen_in(generate(base, asked, [FIRST_SEED + 600_000 + i for i in range(len(asked))]), concept, evaluator)


def seen_in(pictures: Pictures, concept: str, evaluator: Evaluator) -> Rate:
    """How often the concept is in pictures."""
    judged = evaluator.judge(pictures)
    return rate([label == concept for label in (judged.objects if concept in OBJECTS else judged.styles)])


def by_inversion(concept: str, patch: Patch | None, evaluator: Evaluator) -> Rate:
    """How often the concept is in pictures that the attacker draws."""
    base = load_base("emoji")
    shown_with, drawn_with = shown_and_drawn(concept)
    seeds = [FIRST_SEED + 400_000 + i for i in range(SHOWN)]
    shown = generate(base, asking(concept, concept, SHOWN, shown_with), seeds)
    attach(base, [patch] if patch else [])
    drawing = Drawing(asking(concept, BLANK, DRAWN, drawn_with), [FIRST_SEED + 500_000 + i for i in range(DRAWN)])
    examples = Examples(asking(concept, BLANK, SHOWN, shown_with), shown)
    attack = inversion(base, examples, drawing, tokens=4, training=Training(250))
    return seen_in(attack.pictures, concept, evaluator)


def trained(base: Base, concept: str, fields: Mapping[str, Any], seed: int) -> tuple[Patch, float]:
    """The patch, and the seconds that it took."""
    started = time.perf_counter()
    return train(recipe_of(concept, fields, seed), base), time.perf_counter() - started


def recipe_of(concept: str, fields: Mapping[str, Any], seed: int) -> Recipe:
    """The defaults but for these fields."""
    end = " style" if concept in STYLES else ""
    named = {"erase": concept + end, "synonyms": [form + end for form in {**OBJECTS, **STYLES}[concept]]}
    return Recipe.model_validate({"base": "emoji", "concepts": named, "seed": seed, **fields})


def measured(concept: str, name: str, seed: int, evaluator: Evaluator) -> dict[str, Any]:
    """A row of the table."""
    fields, patch, seconds = PATCHES[name], None, 0.0
    if fields is not None:
        patch, seconds = trained(load_base("emoji"), concept, fields, seed)
    rates = kept_and_erased(concept, patch, evaluator)
    rates["in other words"] = in_other_words(concept, patch, evaluator)
    rates["by inversion"] = by_inversion(concept, patch, evaluator)
    passes = patch.info["cost"]["forward_passes"] if patch else 0
    return {"passes": passes, "seconds": seconds, **{k: vars(r) for k, r in rates.items()}}


def digest_of(concept: str, name: str, seed: int, evaluator: Evaluator) -> str:
    """A name of what a row is measured with, the defaults of the time among it."""
    fields = PATCHES[name]
    recipe = None if fields is None else recipe_of(concept, fields, seed).to_dict()
    seeds = (ASKED // len(beside(concept)), KEPT_SEEDS, SHOWN, DRAWN)
    parts = (load_base("emoji").fingerprint, evaluator.digest, recipe, *seeds, shown_and_drawn(concept))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line of the table."""
    rates = [Rate(**row[k]).interval() for k in RATES]
    return f"| {row['patch']} | {row['seed']} | {' | '.join(rates)} | {row['passes']:,} | {row['seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/robust"))
    parser.add_argument("--concept", default="cat", choices=(*OBJECTS, *STYLES), metavar="NAME")
    parser.add_argument("--patches", nargs="+", default=list(PATCHES), choices=PATCHES, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training")
    args = parser.parse_args()
    path, evaluator = args.out / f"robust-{args.concept}.json", load_evaluator("measure")
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    print(f"| patch | seed | {' | '.join(RATES)} | passes | seconds |\n{'|---' * (len(RATES) + 4)}|")
    for name in args.patches:
        for seed in args.seeds:
            asked = {"patch": name, "seed": seed, "with": digest_of(args.concept, name, seed, evaluator)}
            row = next((r for r in rows if asked.items() <= r.items()), None)
            if not row:
                row = asked | measured(args.concept, name, seed, evaluator)
                rows = [r for r in rows if (r["patch"], r["seed"]) != (name, seed)] + [row]
                write_file(path, json.dumps(rows, indent=1).encode())
            print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
