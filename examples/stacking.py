"""How many patches can be put together? Kept and erased for 1 to 16 patches, by kind of patch and way of putting them together.

    python examples/stacking.py --out runs/stacking [--ways keyed uce] [--k 1 2 4 8 16] [--runs 3] [--weights 1]

A run has an order of the concepts and a training seed of its own: its first k patches are put together and the grid is drawn,
pictures of an erased concept with nothing else erased in them, and pictures with nothing erased. Patches are kept in the
folder and answers in `stacking.json`, so that the script goes on where it stopped; after a change of how patches are made or
put together, choose another. At the end it writes the tables, `stacking.md`, and draws `stacking.png` of all answers that there
are. Those that are published are docs/stacking.json: with a copy of it in the folder the script adds to them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
from matplotlib.figure import Figure
from peft.utils.merge_utils import dare_linear, ties
from rich.progress import track
from torch import Tensor

from esd_lora import closed_form, keys
from esd_lora.bases import Base, load_base, quick_dtype
from esd_lora.closed_form import edit, edit_moments, patch_tensors
from esd_lora.compose import stack
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import NEIGHBOURS, OBJECTS, STYLES
from esd_lora.evaluate.baselines import uce
from esd_lora.evaluate.rates import Rate, cluster_bootstrap, rate
from esd_lora.evaluate.scores import FIRST_SEED, Cell, draw
from esd_lora.fusing import fuse
from esd_lora.keys import generalised_keys, mean_moment, named_words, prompts_of, words_of
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

FAR: Mapping[str, Any] = {"keys": "closed-form", "eta": 2.0}
"""Keyed patches that push as far away as the learned ones; at half their weight they are those of the default η of 0.5."""

RANDOM: Mapping[str, Any] = {"init": "random", "lr": 3e-3, "eta": 2.0, "preserve_weight": 2.0}
"""The defaults of the time when these were measured, where today's differ."""

DIRECTIONS: Mapping[str, Any] = {"init": "differences", "lr": 5e-3, "eta": 1.5, "preserve_weight": 4.0}
"""Today's."""

KINDS: Mapping[str, dict[str, Any]] = {
    "keyed": {"keys": "closed-form"},
    "keyed, eta 0": {**FAR, "eta": 0.0},
    "keyed, eta 1": {**FAR, "eta": 1.0},
    "keyed, eta 2": {**FAR},
    "keyed, eta 4": {**FAR, "eta": 4.0},
    "keyed, rank 1": {**FAR, "rank": 1},
    "keyed, rank 4": {**FAR, "rank": 4},
    "keyed, rank 8": {**FAR, "rank": 8},
    "keyed, kept weight 20": {**FAR, "preserve_weight": 20.0},
    "keyed, trained": {**FAR, "objective": "paper", "lr": 2e-2, "preserve_weight": 0.0},
    "keyed, trained and preserved": {**FAR, "objective": "paper", "lr": 2e-2},
    "closed form": {"objective": "closed-form", "eta": 0.0},
    "learned": {**RANDOM, "preserve_weight": 0.0},
    "preserved": {**RANDOM},
    "preserved, from directions": {**DIRECTIONS},
    "preserved more": {**RANDOM, "preserve_weight": 5.0, "steps": 120},
    "robust": {**RANDOM, "robust": 2},
    "full": {**RANDOM, "layers": "full"},
    "keyed, robust": {**FAR, "objective": "paper", "lr": 2e-2, "preserve_weight": 0.0, "robust": 2},
    "keyed, q and out learned": {**RANDOM, "keys": "closed-form", "layers": "esd-x"},
}
"""What a recipe has besides its concept."""

MADE_WITH: Mapping[str, dict[str, Any]] = {
    "keyed, ridge 1e-5": {"ridge": 1e-5},
    "keyed, ridge 0.1": {"ridge": 0.1},
    "keyed, words alone": {"ONE": ("{}",), "TWO": ()},
    "keyed, 6 positions": {"LENGTH": 6},
}
"""Keyed patches that are made with another ridge, or other constants of `esd_lora.keys`."""

FIELDS = {**KINDS, **{way: {**FAR, **changed} for way, changed in MADE_WITH.items()}}

LEFT_OUT = tuple(OBJECTS)[::2]
"""Objects that the kind "words left out" does not know of."""


def named_as(concept: str) -> dict[str, Any]:
    """The concept as a recipe names it, with the words that mean the same."""
    forms = {**OBJECTS, **STYLES}[concept]
    end = " style" if concept in STYLES else ""
    return {"erase": concept + end, "synonyms": [f + end for f in forms]}


def first_of(run: int, k: int) -> list[str]:
    """The first k concepts in the order of a run."""
    return random.Random(run).sample(POOL, k=len(POOL))[:k]


def digest_of(*parts: object) -> str:
    """A name of what something was measured with."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one a line."""
    write_file(path, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())


def patch_of(base: Base, concepts: Sequence[str], kind: str, seed: int, folder: Path) -> Patch:
    """The trained patch of a kind, from disk where it is there; of several concepts it has as many steps as one of each."""
    fields = {"base": "emoji", "concepts": [named_as(c) for c in concepts], "seed": seed, **KINDS[kind]}
    fields["steps"] = fields.get("steps", Recipe.model_fields["steps"].default) * len(concepts)
    return train(Recipe.model_validate(fields), base, out=folder, resume=True)


def without_words(base: Base, concepts: Sequence[str]) -> list[Patch]:
    """Keyed patches, with η = 2, whose vocabulary lacks half of the objects: what they do to words that they do not know of."""
    missing = set().union(*(stems(form) for name in LEFT_OUT for form in (name, *OBJECTS[name])))
    words = [w for w in words_of(base) if not stems(w) & missing]
    made = []
    for named in concepts_of(concepts):
        recipe = Recipe(base="emoji", concepts=(named,), **FAR)
        own = named_words([named])
        kept = mean_moment(base, [p for p in prompts_of(words) if not stems(p) & own])
        hit, move = edit_moments(base, recipe)
        made.append(Patch(patch_tensors(base, recipe, hit, move, kept)))
    return made


def concepts_of(names: Iterable[str]) -> list[Concept]:
    """These as a recipe has them."""
    return [Concept.model_validate(named_as(name)) for name in names]


def made_with(base: Base, concepts: Sequence[str], *, ridge: float = keys.RIDGE, **constants: Any) -> list[Patch]:
    """Keyed patches, with η = 2 and these constants in the place of the package's."""
    recipes = [Recipe(base="emoji", concepts=(concept,), **FAR) for concept in concepts_of(concepts)]
    with ExitStack() as changed:
        for function in (generalised_keys, edit):
            changed.enter_context(mock.patch.dict(function.__kwdefaults__, ridge=ridge))
        for module, name in itertools.product((keys, closed_form), constants):
            if hasattr(module, name):
                changed.enter_context(mock.patch.object(module, name, constants[name]))
        return [train(recipe, base) for recipe in recipes]


def sparse(merge: Callable[..., Tensor], patches: Sequence[Patch]) -> Patch:
    """The changes ΔW merged by one of peft's ways for sparse ones, at a density of one half, exactly factored.

    TIES keeps the largest of each and elects a sign (Yadav et al. 2023, arXiv:2306.01708), DARE keeps some at random and makes
    them larger (Yu et al. 2023, arXiv:2311.03099).
    """
    torch.manual_seed(0)
    tensors = {}
    for name in dict.fromkeys(n for p in patches for n in p.ranks):
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        changes = [p.tensors[up] @ p.tensors[down] for p in patches]
        change = merge(changes, torch.ones(len(changes)), 0.5)
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
    return base.around(merged_denoiser(base, stack(patches)))


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
        **{way: (partial(made_with, base, order, **changed), stack) for way, changed in MADE_WITH.items()},
        "words left out": (lambda: without_words(base, order), stack),
        "uce": (lambda: [uce(base, [concept]) for concept in concepts_of(order)], stack),
        "uce, one edit": (lambda: [uce(base, concepts_of(order))], stack),
        "fused": (single("learned"), partial(fuse, base)),
        **{f"fused {kind}": (single(kind), partial(fuse, base)) for kind in FUSED},
        "ties": (single("learned"), partial(sparse, ties)),
        "dare": (single("learned"), partial(sparse, dare_linear)),
        "one patch": (lambda: [patch_of(base, order, "preserved", seed, one)], stack),
        "sequential": (lambda: sequential(base, order, seed, folder / f"sequential-{seed}"), stack),
        "keyed and fused": (
            lambda: [*single("keyed")(), *single("learned")()],
            lambda p: stack([*p[: len(order)], fuse(base, p[len(order) :])]),
        ),
    }


FUSED = ("preserved", "preserved more", "robust", "full", "keyed, q and out learned")
"""Kinds of patches with learned keys, besides "learned", that are fused."""
CURVES = (
    "base",
    "keyed",
    "keyed, eta 2",
    "uce",
    "uce, one edit",
    "learned",
    "preserved",
    "fused",
    "fused preserved",
    "ties",
    "dare",
    "one patch",
    "sequential",
)
"""The ways that are compared by default."""
OTHERS = (
    "words left out",
    "keyed and fused",
    *(k for k in FIELDS if k not in CURVES),
    *(f"fused {k}" for k in FUSED[1:]),
)
WAYS = (*CURVES, *OTHERS)


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


Answers = dict[str, dict[str, tuple[int, int]]]
"""Of erased concepts, kept objects and kept styles, by name: how often each was seen, and how often it was asked for."""


def judge(
    quick: Base, evaluator: Evaluator, erased: Sequence[str], rows: Sequence[tuple[str, Cell]], patches: Sequence[Patch]
) -> Answers:
    """What is seen of erased concepts, kept objects and kept styles with the patches active."""
    seen = evaluator.judge(draw(quick, [c for _, c in rows], patches))
    answers: Answers = {"erased": {}, "objects": {}, "styles": {}}

    def note(group: str, name: str, hit: bool) -> None:
        hits, n = answers[group].get(name, (0, 0))
        answers[group][name] = (hits + hit, n + 1)

    for (group, c), obj, style in zip(rows, seen.objects, seen.styles, strict=True):
        if group == "kept" or c.obj in erased:
            note("erased" if group == "erased" else "objects", c.obj, obj == c.obj)
        if group == "kept" or c.style in erased:
            note("erased" if group == "erased" else "styles", c.style, style == c.style)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stacking"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=CURVES, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--runs", type=int, default=3, help="orders of the concepts, each with a training seed of its own"
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--pictures", type=int, default=400, help="of erased and as many of kept ones, over all runs")
    args = parser.parse_args()
    base, quick, evaluator = load_base("emoji"), load_base("emoji", dtype=quick_dtype()), load_evaluator("measure")
    path, count = args.out / "stacking.json", -(-args.pictures // args.runs)
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for way, k, run, weight in track(list(itertools.product(args.ways, args.k, range(args.runs), args.weights))):
        order = first_of(run, k)
        rows = list(cells_of(order, count=count, salt=1000 * k + run))
        pictures = digest_of(quick.fingerprint, evaluator.digest, rows)
        digest = digest_of(pictures, way, FIELDS.get(way), order, run, weight)
        if digest in {row["digest"] for row in found}:
            continue
        trained, together = ways_of(base, order, run, args.out / "patches")[way]
        patches = trained()
        active = [stack([together(patches)], [weight])] if patches else []
        drawn = {"pictures": pictures, "patch": active[0].digest if active else ""}
        # of one concept some ways give the same patch, and its pictures are drawn once
        same = next((row for row in found if drawn.items() <= row.items()), None)
        answers = same["answers"] if same else judge(quick, evaluator, order, rows, active)
        place = {"way": way, "k": k, "run": run, "weight": weight}
        found = [row for row in found if not place.items() <= row.items()]  # one of what has changed since
        found.append({**place, **drawn, "digest": digest, "erased": order, "answers": answers})
        write_rows(path, found)
    write_file(args.out / "stacking.md", page(found).encode())
    plot([row for row in found if row["weight"] == 1 and row["way"] in CURVES], args.out / "stacking.png")
    print(args.out / "stacking.md")


def rate_of(found: Sequence[Mapping[str, Any]], group: str, *, only: Collection[str] = ()) -> Rate | None:
    """How often what was asked for was seen, over several rows; of some names only if any are given, None if there are none.

    The interval is Wilson's, or where that is wider that of drawing orders anew, and names within each: orders differ by more
    than pictures do. Of three orders that is too narrow still.
    """
    hits: list[bool] = []
    clusters: list[tuple[int, str]] = []
    for row in found:
        for name, (hit, n) in row["answers"][group].items():
            if not only or name in only:
                hits += [i < hit for i in range(n)]
                clusters += [(row["run"], name)] * n
    if not hits:
        return None
    (low, high), plain = cluster_bootstrap(hits, clusters), rate(hits)
    return Rate(plain.value, plain.n, min(low, plain.low), max(high, plain.high))


def interval_of(found: Sequence[Mapping[str, Any]], group: str, *, only: Collection[str] = ()) -> str:
    """The rate in per cent with its interval; empty where there is none."""
    seen = rate_of(found, group, only=only)
    return seen.interval() if seen else ""


def by_way(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[Mapping[str, Any]]]]:
    """The rows by way and number of patches, in the order of `WAYS` and of the weights."""
    order = sorted({(WAYS.index(row["way"]), row["weight"]) for row in found})
    ks = sorted({row["k"] for row in found})
    rows = {
        (i, weight): {
            k: [r for r in found if (WAYS.index(r["way"]), r["weight"], r["k"]) == (i, weight, k)] for k in ks
        }
        for i, weight in order
    }
    named = {(i, weight): WAYS[i] if weight == 1 else f"{WAYS[i]} × {weight:g}" for i, weight in order}
    return {named[key]: {k: there for k, there in by_k.items() if there} for key, by_k in rows.items()}


def most_left(rows: Sequence[Mapping[str, Any]]) -> str:
    """The erased concept that is left most often, and how often in per cent; nothing where none is left."""
    left: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for row in rows:
        for name, (hits, n) in row["answers"]["erased"].items():
            left[name] += hits
            asked[name] += n
    most = max(asked, key=lambda name: left[name] / asked[name])
    return f"{most} {100 * left[most] / asked[most]:.1f}" if left[most] else ""


def near_ones(rows: Sequence[Mapping[str, Any]]) -> str:
    """How often kept objects and styles were seen that are like an erased one, in each row its own."""
    near = []
    for row in rows:
        names = {near for concept in row["erased"] for near in NEIGHBOURS.get(concept, ())}
        kept = {**row["answers"]["objects"], **row["answers"]["styles"]}
        near.append({**row, "answers": {"near": {name: count for name, count in kept.items() if name in names}}})
    return interval_of(near, "near")


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: the rates with 95 % intervals, those of neighbours of erased concepts apart."""
    lines = [
        "| way | k | n | erased concepts left | most of one | kept objects | kept styles | neighbours kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, by_k in by_way(found).items():
        for k, rows in by_k.items():
            n = sum(n for row in rows for _, n in row["answers"]["erased"].values())
            left, *kept = (interval_of(rows, group) for group in ("erased", "objects", "styles"))
            lines.append(f"| {way} | {k} | {n} | {left} | {most_left(rows)} | {' | '.join(kept)} | {near_ones(rows)} |")
    return lines


HEAD = """# Patches put together

By `python examples/stacking.py`, of [stacking.json](stacking.json). Per cent with 95 % intervals: Wilson's or, where these are
wider, of drawing orders of the concepts anew, and names within each (of three orders too narrow still). k: patches together;
n: pictures that ask for an erased concept, of one order and one training seed where there are 134 or 400, of three where
there are 402; *most of one*: the erased concept that is left most often. As many ask for nothing that is erased; *neighbours
kept* are those of them that ask for what is like an erased concept. *uce* is that of `esd-lora eval`, of whole rank.
"""


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: all that was measured, and what the ways are."""
    by_weight = {(row["way"], row["k"]) for row in found if row["weight"] != 1}
    parts = {
        "The curves": [row for row in found if row["way"] in CURVES and row["weight"] == 1],
        "Scaled": [row for row in found if (row["way"], row["k"]) in by_weight],
        "Other keys, and attempts": [row for row in found if row["way"] in OTHERS],
    }
    lines = [HEAD]
    for title, rows in parts.items():
        lines += [f"## {title}", "", *table(rows), ""]
    for k, rows in by_way(found).get("words left out", {}).items():
        out, known = (interval_of(rows, "objects", only=only) for only in (LEFT_OUT, set(OBJECTS) - set(LEFT_OUT)))
        lines += [f"Words left out, k = {k}: {out} of those kept, {known} of the others.", ""]
    lines += ["What a recipe has besides concept and synonyms, or which constants of `esd_lora.keys` are others:", ""]
    told = {row["way"] for row in found}
    for way in (w for w in FIELDS if w in told):
        lines.append(f"* *{way}*: {', '.join(f'{k} {v}' for k, v in FIELDS[way].items())}")
    return "\n".join([*lines, ""])


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw erased and kept over the number of patches."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {"erased": "erased concepts still drawn", "objects": "kept objects", "styles": "kept styles"}
    for axes, (group, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # there are more ways than ten
        for way, by_k in by_way(found).items():
            rates = [rate_of(rows, group) for rows in by_k.values()]
            errors = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
            style: dict[str, Any] = {"color": "black", "linestyle": ":"} if way == "base" else {}
            style |= {"linewidth": 3} if way == "keyed" else {}
            axes.errorbar(list(by_k), [r.value for r in rates], errors, label=way, marker=".", capsize=2, **style)
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
