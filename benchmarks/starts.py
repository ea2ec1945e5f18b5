"""What adapters start from, over seeds: how much is erased and kept with each `init`, on the answers of the benchmark.

    python benchmarks/starts.py [--cases apple:2 ink:0 cat:0] [--inits random differences] [--set preserve_beside=true]

A case is a target of the embedded base and a seed of training. UA: the target gone; kept: object and style right where
something else is asked for; at target: the other of the two right where the target is asked for. Per cent, by pictures of half
the usual steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import benchmark

from esd_lora.bases import Base, load_base
from esd_lora.compose import attached
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.errors import RecipeError
from esd_lora.evaluate.answers import Ask
from esd_lora.evaluate.evaluators import EmojiEvaluator
from esd_lora.patch import Patch
from esd_lora.pictures import generate
from esd_lora.recipe import Recipe, make_recipe, parse_overrides
from esd_lora.training import train

CASES = ("apple:2", "ink:0", "pixel:2", "tiger:2", "neon:1", "bus:2", "car:1", "cat:0", "ink:1", "clock:2")
"""Trainings of the published benchmark, many of them its worst."""


def case(text: str) -> tuple[str, int]:
    """A target and a seed."""
    target, _, seed = text.partition(":")
    if target not in (*OBJECTS, *STYLES) or not seed.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: must be TARGET:SEED, such as apple:2")
    return target, int(seed)


def recipe_of(target: str, seed: int, init: str, overrides: Sequence[str]) -> Recipe:
    """The defaults with that start and seed, and with what overrides them."""
    values = {"base": "emoji", "concepts": [benchmark.concept_of(target)], "seed": seed, "init": init}
    return make_recipe(values | parse_overrides(overrides), source="--set")


def rates(base: Base, patch: Patch, target: str, evaluator: EmojiEvaluator) -> list[float]:
    """UA, kept and at target."""
    own, other = ("object", "style") if target in OBJECTS else ("style", "object")
    asks: Sequence[Ask] = benchmark.answers_of(target).asks
    with attached(base, [patch], [1.0]):
        how = {"steps": benchmark.SAMPLING.steps}
        labels = evaluator.see(generate(base, [a.prompt for a in asks], [a.seed for a in asks], **how)).labels
    seen = [{kind: labels[kind][i] for kind in (own, other)} for i in range(len(asks))]
    asked = [(a, s) for a, s in zip(asks, seen, strict=True) if a.group == "target"]
    kept = [all(s[k] == v for k, v in a.wanted.items()) for a, s in zip(asks, seen, strict=True) if a.group != "target"]
    hits = [[s[own] != target for _, s in asked], kept, [s[other] == a.wanted[other] for a, s in asked]]
    return [100 * sum(some) / len(some) for some in hits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", type=case, default=[case(c) for c in CASES], metavar="TARGET:SEED")
    inits = get_args(Recipe.model_fields["init"].annotation)
    parser.add_argument("--inits", nargs="+", choices=inits, default=inits, metavar="INIT")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of all recipes")
    args = parser.parse_args()
    try:
        recipes = {(init, case): recipe_of(*case, init, args.set) for init in args.inits for case in args.cases}
    except RecipeError as error:
        parser.error(str(error))
    base, evaluator = load_base("emoji"), EmojiEvaluator()
    print("| init | target | seed | UA | kept | at target | passes |\n|---|---|---|---|---|---|---|")
    for (init, (target, seed)), recipe in recipes.items():
        patch = train(recipe, base)
        shown = " | ".join(f"{r:.0f}" for r in rates(base, patch, target, evaluator))
        print(f"| {init} | {target} | {seed} | {shown} | {patch.info['cost']['forward_passes']:,} |", flush=True)


if __name__ == "__main__":
    main()
