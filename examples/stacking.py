"""How many patches can be put together? Kept and erased for 1 to 16 patches, by kind of patch and way of putting them together.

    python examples/stacking.py --out runs/stacking [--ways keyed uce] [--k 1 2 4 8 16] [--orders 3] [--seeds 3] [--weights 1]

For each order of the concepts and each training seed the first k patches are put together and the grid is drawn: pictures
of an erased concept with nothing else erased in them, and pictures with nothing erased. Patches and answers are kept on disk,
so that the script goes on where it stopped. At the end it prints a table and draws `stacking.png` of all answers in the
folder; after a change of how patches are put together, choose another.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft.utils.merge_utils import ties
from rich.progress import track

from esd_lora.bases import Base, load_base
from esd_lora.closed_form import edit_moments, patch_tensors
from esd_lora.compose import stack
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import NEIGHBOURS, OBJECTS, STYLES
from esd_lora.evaluate import FIRST_SEED, Cell, draw, rate
from esd_lora.fusing import fuse
from esd_lora.keys import mean_moment, named_words, prompts_of, words_of
from esd_lora.merging import merged_denoiser
from esd_lora.patch import Patch, write_file
from esd_lora.recipe import Concept, Recipe
from esd_lora.training import train
from esd_lora.trajectories import stems

POOL = (
    *(o for o in OBJECTS if o not in ("tiger", "car", "tree", "fish", "train", "heart", "bird")),
    "neon",
    "ink",
    "pixel",
)
"""Sixteen concepts to erase; seven objects and three styles are never erased."""

KINDS: Mapping[str, dict[str, Any]] = {
    "keyed": {"keys": "closed-form"},
    "keyed, rank 4": {"keys": "closed-form", "rank": 4},
    "keyed, trained": {"keys": "closed-form", "objective": "paper", "lr": 2e-2, "preserve_weight": 0.0, "steps": 60},
    "uce": {"objective": "closed-form", "eta": 0.0},
    "learned": {"preserve_weight": 0.0},
    "preserved": {},
}
"""What a recipe has besides its concept."""

LEFT_OUT = tuple(OBJECTS)[::2]
"""Objects that the kind "words left out" does not know of."""


def named_as(concept: str) -> dict[str, Any]:
    """The concept as a recipe names it, with the words that mean the same."""
    forms = {**OBJECTS, **STYLES}[concept]
    end = " style" if concept in STYLES else ""
    return {"erase": concept + end, "synonyms": [f + end for f in forms]}


def patch_of(base: Base, concepts: Sequence[str], kind: str, seed: int, folder: Path) -> Patch:
    """The trained patch of a kind, from disk where it is there."""
    fields = {"base": "emoji", "concepts": [named_as(c) for c in concepts], "seed": seed, **KINDS[kind]}
    return train(Recipe.model_validate(fields), base, out=folder, resume=True)


def without_words(base: Base, concepts: Sequence[str]) -> list[Patch]:
    """Keyed patches whose vocabulary lacks half of the objects: what they do to words that they do not know of."""
    missing = set().union(*(stems(form) for name in LEFT_OUT for form in (name, *OBJECTS[name])))
    words = [w for w in words_of(base) if not stems(w) & missing]
    made = []
    for concept in concepts:
        named = Concept.model_validate(named_as(concept))
        recipe = Recipe(base="emoji", concepts=(named,), keys="closed-form")
        own = named_words([named])
        kept = mean_moment(base, [p for p in prompts_of(words) if not stems(p) & own])
        hit, move = edit_moments(base, [named], eta=recipe.eta)
        made.append(Patch(patch_tensors(base, recipe, hit, move, kept)))
    return made


def tied(patches: Sequence[Patch]) -> Patch:
    """TIES (Yadav et al. 2023, arXiv:2306.01708) of the changes ΔW, peft's, at a density of one half, exactly factored."""
    tensors = {}
    for name in dict.fromkeys(n for p in patches for n in p.ranks):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        changes = [p.tensors[up] @ p.tensors[down] for p in patches]
        change = ties(changes, torch.ones(len(changes)), 0.5)
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        tensors[up], tensors[down] = u * s, vt
    return Patch(tensors)


def sequential(base: Base, concepts: Sequence[str], seed: int, folder: Path) -> list[Patch]:
    """A patch of each concept, trained on the base with all earlier ones merged."""
    patches: list[Patch] = []
    for i, concept in enumerate(concepts):
        so_far = with_merged(base, patches) if patches else base
        trained = patch_of(so_far, [concept], "preserved", seed, folder / "-".join(concepts[: i + 1]))
        patches.append(Patch(trained.tensors))  # it tells of `so_far`, and together they are for `base`
    return patches


def with_merged(base: Base, patches: Sequence[Patch]) -> Base:
    """A second base, which has the patches in its weights, and a fingerprint of its own."""
    unet = merged_denoiser(base, stack(patches))
    return type(base)(type(base.pipe).from_pipe(base.pipe, unet=unet, dtype=base.dtype), name=base.name)


Way = tuple[Callable[[], list[Patch]], Callable[[Sequence[Patch]], Patch]]
"""How to get the trained patches, and how to put them together."""


def ways_of(base: Base, order: Sequence[str], seed: int, folder: Path) -> Mapping[str, Way]:
    """The ways to erase these concepts together; the trained patches are kept in the folder."""

    def single(kind: str) -> Callable[[], list[Patch]]:
        return lambda: [
            patch_of(base, [c], kind, seed, folder / f"{kind}-{c}-{seed}".replace(", ", "-").replace(" ", "-"))
            for c in order
        ]

    one = folder / f"one-{len(order)}-{'-'.join(order)}-{seed}"
    return {
        "base": (list, stack),
        **{kind: (single(kind), stack) for kind in KINDS},
        "words left out": (lambda: without_words(base, order), stack),
        "fused": (single("learned"), partial(fuse, base)),
        "fused preserved": (single("preserved"), partial(fuse, base)),
        "ties": (single("learned"), tied),
        "one patch": (lambda: [patch_of(base, order, "preserved", seed, one)], stack),
        "sequential": (lambda: sequential(base, order, seed, folder / f"sequential-{seed}"), stack),
    }


WAYS = (*KINDS, "words left out", "fused", "fused preserved", "ties", "one patch", "sequential")


def cells_of(erased: Sequence[str], *, count: int, salt: int) -> Iterator[tuple[str, Cell]]:
    """About `count` pictures each of erased concepts and of kept ones, cells and seeds drawn by the salt."""
    rng = random.Random(salt)
    objects, styles = [o for o in OBJECTS if o not in erased], [s for s in STYLES if s not in erased]
    pairs = [(o, s) for o in objects for s in styles]
    rng.shuffle(pairs)

    def cell(obj: str, style: str) -> Cell:
        return Cell(obj, style, FIRST_SEED + 200_000 + rng.randrange(10**6))

    for i in range(count):
        concept = erased[i % len(erased)]
        if concept in OBJECTS:
            yield "erased", cell(concept, rng.choice(styles))
        else:
            yield "erased", cell(rng.choice(objects), concept)
        yield "kept", cell(*pairs[i % len(pairs)])


Answers = dict[str, list[tuple[str, bool]]]
"""Names of what was asked for, and whether it was seen: erased concepts, kept objects, kept styles."""


def judge(
    quick: Base, evaluator: Evaluator, erased: Sequence[str], rows: Sequence[tuple[str, Cell]], patches: Sequence[Patch]
) -> Answers:
    """What is seen of erased concepts, kept objects and kept styles with the patches active."""
    seen = evaluator.judge(draw(quick, [c for _, c in rows], patches))
    answers: Answers = {"erased": [], "objects": [], "styles": []}
    for (group, c), obj, style in zip(rows, seen.objects, seen.styles, strict=True):
        asked = [(c.obj, obj == c.obj), (c.style, style == c.style)]
        if group == "erased":
            answers["erased"].append(asked[0] if c.obj in erased else asked[1])
        else:
            answers["objects"].append(asked[0])
            answers["styles"].append(asked[1])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stacking"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--pictures", type=int, default=400, help="of each figure, over all orders and seeds")
    args = parser.parse_args()
    base, quick, evaluator = load_base("emoji"), load_base("emoji", dtype="bf16"), load_evaluator("measure")
    jobs = list(itertools.product(args.k, range(args.orders), range(args.seeds), ("base", *args.ways), args.weights))
    count = -(-args.pictures // (args.orders * args.seeds))
    for k, o, s, way, weight in track(jobs, description="stacking"):
        order = random.Random(o).sample(POOL, k=len(POOL))[:k]
        rows = list(cells_of(order, count=count, salt=1000 * o + s))
        trained, together = ways_of(base, order, s, args.out / "patches")[way]
        patches = trained()
        made_of = repr((quick.fingerprint, evaluator.digest, [p.digest for p in patches], order, rows))
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        name = f"{way} {k} {o} {s} {weight:g} {digest}.json".replace(", ", "-").replace(" ", "-")
        path = args.out / "answers" / name
        if not path.exists() and not (way == "base" and weight != 1):
            answers = judge(quick, evaluator, order, rows, [stack([together(patches)], [weight])] if patches else [])
            told = {"way": way if weight == 1 else f"{way} × {weight:g}", "k": k, "erased": order, "answers": answers}
            write_file(path, json.dumps(told).encode())
    found = [json.loads(path.read_text()) for path in sorted((args.out / "answers").glob("*.json"))]
    table(found)
    plot([row for row in found if "×" not in row["way"]], args.out / "stacking.png")


def hits_of(found: Sequence[Mapping[str, Any]], group: str, *, near: bool = False) -> list[bool]:
    """Whether what was asked for was seen, over several rows; of neighbours of erased concepts alone if `near`."""
    return [
        hit
        for row in found
        for close in [{n for e in row["erased"] for n in NEIGHBOURS.get(e, ())}]
        for name, hit in row["answers"][group]
        if not near or name in close
    ]


def by_way(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[Mapping[str, Any]]]]:
    """The rows by way and number of patches, in the order of `WAYS`."""
    order = {way: i for i, way in enumerate(("base", *WAYS))}
    ways = sorted({row["way"] for row in found}, key=lambda w: (order.get(w.split(" ×")[0], 99), w))
    return {w: {k: [r for r in found if (r["way"], r["k"]) == (w, k)] for k in ks_of(found, w)} for w in ways}


def ks_of(found: Sequence[Mapping[str, Any]], way: str) -> list[int]:
    """The numbers of patches that there are answers for."""
    return sorted({row["k"] for row in found if row["way"] == way})


def table(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the rates with 95 % intervals, those of neighbours of erased concepts apart."""
    print(
        "| way | k | n | erased concepts left | kept objects | kept styles | neighbours kept |\n|---|---|---|---|---|---|---|"
    )
    for way, by_k in by_way(found).items():
        for k, rows in by_k.items():
            groups = [hits_of(rows, g) for g in ("erased", "objects", "styles")]
            near = hits_of(rows, "objects", near=True) + hits_of(rows, "styles", near=True)
            shown = [rate(hits).interval() if hits else "" for hits in (*groups, near)]
            print(f"| {way} | {k} | {len(groups[0])} | {' | '.join(shown)} |")
    for k, rows in by_way(found).get("words left out", {}).items():
        answers = [answer for row in rows for answer in row["answers"]["objects"]]
        parts = [[hit for name, hit in answers if (name in LEFT_OUT) == out] for out in (True, False)]
        print(
            f"words left out, k = {k}: {rate(parts[0]).interval()} of those, {rate(parts[1]).interval()} of the others"
        )


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw erased and kept over the number of patches."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {"erased": "erased concepts still drawn", "objects": "kept objects", "styles": "kept styles"}
    for axes, (group, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for way, by_k in by_way(found).items():
            rates = [rate(hits_of(rows, group)) for rows in by_k.values()]
            errors = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
            style = {"color": "black", "linestyle": ":"} if way == "base" else {}
            style |= {"linewidth": 3} if way == "keyed" else {}
            axes.errorbar(list(by_k), [r.value for r in rates], errors, label=way, capsize=2, **style)
        ks = sorted({row["k"] for row in found})
        axes.set(title=title, xscale="log", xlabel="patches put together", ylim=(-0.03, 1.03))
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
