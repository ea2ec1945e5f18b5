"""How many patches can be put together? Kept and erased for 1 to 16 patches, by kind of patch and way of putting them together.

    python examples/stacking.py --out runs/stacking [--only keyed] [--k 1 2 4 8 16] [--orders 3] [--seeds 3]

For each order of the concepts and each training seed the first k patches are put together and the grid is drawn: pictures
of an erased concept with nothing else erased in them, and pictures with nothing erased. Patches and hits are kept on disk, so
that the script goes on where it stopped; at the end it prints a table and draws `stacking.png`. Hits are named by the pictures
asked for and the trained patches; after a change of how patches are put together, remove the folder `hits`.
"""

from __future__ import annotations

import argparse
import hashlib
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
from esd_lora.compose import stack
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.evaluate import FIRST_SEED, Cell, draw, rate
from esd_lora.fusing import fuse
from esd_lora.merging import merged_denoiser
from esd_lora.patch import Patch, write_file
from esd_lora.recipe import Recipe
from esd_lora.training import train

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


def words_of(concept: str) -> dict[str, Any]:
    """The concept as a recipe names it, with the words that mean the same."""
    forms = {**OBJECTS, **STYLES}[concept]
    end = " style" if concept in STYLES else ""
    return {"erase": concept + end, "synonyms": [f + end for f in forms]}


def patch_of(base: Base, concepts: Sequence[str], kind: str, seed: int, folder: Path) -> Patch:
    """The trained patch of a kind, from disk where it is there."""
    fields = {"base": "emoji", "concepts": [words_of(c) for c in concepts], "seed": seed, **KINDS[kind]}
    return train(Recipe.model_validate(fields), base, out=folder, resume=True)


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
        "keyed": (single("keyed"), stack),
        "keyed, rank 4": (single("keyed, rank 4"), stack),
        "keyed, trained": (single("keyed, trained"), stack),
        "uce": (single("uce"), stack),
        "learned": (single("learned"), stack),
        "preserved": (single("preserved"), stack),
        "fused": (single("learned"), partial(fuse, base)),
        "fused preserved": (single("preserved"), partial(fuse, base)),
        "ties": (single("learned"), tied),
        "one patch": (lambda: [patch_of(base, order, "preserved", seed, one)], stack),
        "sequential": (lambda: sequential(base, order, seed, folder / f"sequential-{seed}"), stack),
    }


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


def judge(
    quick: Base, evaluator: Evaluator, erased: Sequence[str], rows: Sequence[tuple[str, Cell]], patches: Sequence[Patch]
) -> dict[str, list[bool]]:
    """Hits: erased concepts still there, kept objects and kept styles still there."""
    seen = evaluator.judge(draw(quick, [c for _, c in rows], patches))
    hits: dict[str, list[bool]] = {"erased": [], "objects": [], "styles": []}
    for (group, c), obj, style in zip(rows, seen.objects, seen.styles, strict=True):
        if group == "erased":
            hits["erased"].append(obj == c.obj if c.obj in erased else style == c.style)
        else:
            hits["objects"].append(obj == c.obj)
            hits["styles"].append(style == c.style)
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stacking"))
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=400, help="of each figure, over all orders and seeds")
    args = parser.parse_args()
    base, quick, evaluator = load_base("emoji"), load_base("emoji", dtype="bf16"), load_evaluator("measure")
    jobs = [(k, o, s) for k in args.k for o in range(args.orders) for s in range(args.seeds)]
    count = -(-args.pictures // (args.orders * args.seeds))
    found: dict[str, dict[int, dict[str, list[bool]]]] = {}
    for k, o, s in track(jobs, description="stacking"):
        order = random.Random(o).sample(POOL, k=len(POOL))[:k]
        rows = list(cells_of(order, count=count, salt=1000 * o + s))
        ways = {n: w for n, w in ways_of(base, order, s, args.out / "patches").items() if args.only in n}
        for way, (trained, together) in {"base": (list, stack), **ways}.items():
            patches = trained()
            made_of = repr((quick.fingerprint, evaluator.digest, [p.digest for p in patches], order, rows))
            digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
            path = args.out / "hits" / f"{way} {k} {o} {s} {digest}.json".replace(" ", "-")
            if not path.exists():
                hits = judge(quick, evaluator, order, rows, [together(patches)] if patches else [])
                write_file(path, json.dumps(hits).encode())
            for group, values in json.loads(path.read_text()).items():
                found.setdefault(way, {}).setdefault(k, {}).setdefault(group, []).extend(values)
    table(found)
    plot(found, args.out / "stacking.png")


def table(found: Mapping[str, Mapping[int, Mapping[str, list[bool]]]]) -> None:
    """Print the rates with 95 % intervals."""
    print("| way | k | erased concepts left | kept objects | kept styles |\n|---|---|---|---|---|")
    for way, by_k in found.items():
        for k, groups in by_k.items():
            shown = [rate(groups[g]).interval() for g in ("erased", "objects", "styles")]
            print(f"| {way} | {k} | {' | '.join(shown)} |")


def plot(found: Mapping[str, Mapping[int, Mapping[str, list[bool]]]], path: Path) -> None:
    """Draw erased and kept over the number of patches."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {"erased": "erased concepts still drawn", "objects": "kept objects", "styles": "kept styles"}
    for axes, (group, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for way, by_k in found.items():
            rates = [rate(by_k[k][group]) for k in by_k]
            errors = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
            style = {"color": "black", "linestyle": ":"} if way == "base" else {}
            axes.errorbar(list(by_k), [r.value for r in rates], errors, label=way, capsize=2, **style)
        axes.set(title=title, xscale="log", xlabel="patches", ylim=(-0.02, 1.02))
        axes.set_xticks(list(next(iter(found.values()))), [str(k) for k in next(iter(found.values()))])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
