"""What erasing a concept costs: our defaults beside the schedules of ESD's authors and of LECO, side by side in one run.

    python benchmarks/speed.py --out runs/speed [--concept cat] [--ways ours leco] [--no-true-size]

On the embedded base each schedule goes on until it has reached UA >= 95 % with IRA and CRA >= 97 %, or its last mark. The time
is that of training alone, from a loaded base to a patch; at the marks what is trained is measured on the answer set, which does
not count. Theirs start at their own learning rate and are given higher ones, for this base is small; the best one counts.
Measured marks are kept in the folder, so that the script can go on, but times are to be compared within one run alone.

At the true size of Stable Diffusion 1.5, with random weights, there is nothing to be judged: the passes of each schedule are
counted, and a pass of each kind is timed. `benchmarks/memory.py` measures the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import SD15, random_base
from safetensors.torch import save

from esd_lora.bases import Base, load_base, quick_dtype
from esd_lora.emoji.evaluators import Evaluator, Judgement, load_evaluator
from esd_lora.emoji.vocabulary import OBJECTS
from esd_lora.evaluate.baselines import LECO_ALPHA, full_esd, leco
from esd_lora.evaluate.rates import Rate
from esd_lora.evaluate.scores import Cell, answer_set, draw, score
from esd_lora.patch import Patch, write_file
from esd_lora.plan import AUTHORS_PER_EXAMPLE, count_passes
from esd_lora.recipe import Recipe
from esd_lora.training import resolve, train

UA, KEPT = 0.95, 0.97
"""What is to be reached: of the erased concept, and of the others of its kind and of the other kind."""
TARGET_SEEDS, KEPT_SEEDS = 17, 2
LECO_PER_ITERATION = 2 * (25 * 2 + 6 + 3)
"""LECO's iteration: two latents, guided sampling for 25 of 50 steps on average, three pairs of the teacher, the student."""


@dataclass(frozen=True)
class Mark:
    """What a schedule has come to after so many steps: the adapter, or the base with trained weights."""

    steps: int
    seconds: float
    passes: int
    bytes: int
    erased: Patch | Base


OnMark = Callable[[Mark], None]
Schedule = Callable[[Base, str, OnMark], None]


class Reached(Exception):
    """The marks come to an end, for what was to be reached is."""


def ours(base: Base, concept: str, on_mark: OnMark, **fields: object) -> None:
    """A recipe with the defaults, but for these fields."""
    started = time.perf_counter()
    recipe = Recipe.model_validate({"base": "emoji", "concepts": concept, **fields})
    patch = train(recipe, base)
    steps = 0 if recipe.objective == "closed-form" else recipe.steps
    passes = patch.info["cost"]["forward_passes"]
    on_mark(Mark(steps, time.perf_counter() - started, passes, len(save(patch.tensors)), patch))


def theirs(
    run: Callable[..., object], marks: Sequence[int], keep: Callable[[Base], tuple[Patch | Base, int]], **how: Any
) -> Schedule:
    """A schedule that calls back after each step, with what is kept of it at the marks and how many bytes that is."""

    def schedule(base: Base, concept: str, on_mark: OnMark) -> None:
        aside, started = 0.0, time.perf_counter()

        def on_step(done: int, passes: int, trained: Base) -> None:
            nonlocal aside
            if done in marks:
                now = time.perf_counter()
                erased, size = keep(trained)
                on_mark(Mark(done, now - started - aside, passes, size, erased))
                aside += time.perf_counter() - now

        run(base, concept, **how, on_step=on_step)

    return schedule


def adapter_of(trained: Base) -> tuple[Patch, int]:
    """LECO's adapter as a patch, and the bytes of its file in half precision, as LECO saves it."""
    state = trained.adapter_state()
    rank = next(iter(Patch(state).ranks.values()))
    scaled = {k: v * LECO_ALPHA / rank if ".lora_B." in k else v for k, v in state.items()}
    return Patch(scaled), len(save({k: v.half() for k, v in state.items()}))


def weights_of(trained: Base) -> tuple[Base, int]:
    """A copy of the fine-tuned base to draw with, and the bytes of the trained weights in half precision, as they are saved."""
    size = 2 * sum(p.numel() for p in trained.denoiser.parameters() if p.requires_grad)
    unet = deepcopy(trained.denoiser).requires_grad_(False).to(torch.bfloat16)
    pipe = type(trained.pipe).from_pipe(trained.pipe, unet=unet, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return type(trained)(pipe, name=trained.name), size


AUTHORS_MARKS, LECO_MARKS = (100, 200, 400), (50, 100, 200)
WAYS: dict[str, Schedule] = {
    "ours": ours,
    "ours, keys: closed-form": partial(ours, keys="closed-form"),
    **{
        f"authors, lr {lr:g}": theirs(full_esd, AUTHORS_MARKS, weights_of, steps=AUTHORS_MARKS[-1], lr=lr)
        for lr in (5e-5, 2e-4, 1e-3)
    },
    **{
        f"leco, lr {lr:g}": theirs(leco, LECO_MARKS, adapter_of, iterations=LECO_MARKS[-1], lr=lr)
        for lr in (1e-4, 1e-3)
    },
}


class Judge:
    """Measures marks on the answer set of a concept; all numbers are kept in a file."""

    def __init__(self, concept: str, path: Path) -> None:
        self.concept, self.path = concept, path
        self.quick = load_base("emoji", dtype=quick_dtype())
        self.evaluator: Evaluator = load_evaluator("measure")
        self.cells: list[Cell] = answer_set(concept, target_seeds=TARGET_SEEDS, kept_seeds=KEPT_SEEDS)
        kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        done = {row["way"] for row in kept if row.get("last")}
        self.rows = [row for row in kept if row["way"] in done]  # a way that was interrupted is begun anew
        self.bare: Judgement | None = None

    def __call__(self, way: str, mark: Mark) -> None:
        """Measure one mark.

        Raises:
            Reached: It is what was to be reached.
        """
        self.bare = self.bare or self.evaluator.judge(draw(self.quick, self.cells))
        base, patches = (self.quick, [mark.erased]) if isinstance(mark.erased, Patch) else (mark.erased, [])
        seen = self.evaluator.judge(draw(base, self.cells, patches))
        found = score(self.concept, self.cells, seen, self.bare, self.evaluator)
        rates = {"UA": found.ua, "IRA": found.ira, "CRA": found.cra}
        reached = found.ua.value >= UA and min(found.ira.value, found.cra.value) >= KEPT
        told = {k: getattr(mark, k) for k in ("steps", "seconds", "passes", "bytes")}
        row = {"way": way, **told, **{k: vars(r) for k, r in rates.items()}, "reached": reached}
        self.rows.append(row)
        print(row_of(row), flush=True)
        if reached:
            raise Reached

    def done(self) -> None:
        """The last mark was that of a way at its end: keep all rows."""
        self.rows[-1]["last"] = True
        write_file(self.path, json.dumps(self.rows, indent=1).encode())


def row_of(row: dict[str, Any]) -> str:
    """A line of the table."""
    rates = [Rate(**row[k]).interval() for k in ("UA", "IRA", "CRA")]
    cells = [
        row["way"],
        row["steps"],
        f"{row['seconds']:.1f}",
        f"{row['passes']:,}",
        f"{row['bytes'] / 1e3:,.0f}",
        *rates,
    ]
    return f"| {' | '.join(map(str, cells))} | {'yes' if row['reached'] else 'no'} |"


def on_emoji(concept: str, names: Sequence[str], path: Path) -> None:
    """Run the schedules that are not in the file yet, and print how they compare."""
    judge, base = Judge(concept, path), load_base("emoji")
    known = {row["way"] for row in judge.rows}
    print(f"## Erasing the {concept} from the embedded base\n")
    print(
        "| schedule | steps | seconds | passes | kB | UA | IRA | CRA | reached |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in judge.rows:
        print(row_of(row))
    for name in names:
        if name not in known:
            try:
                WAYS[name](base, concept, partial(judge, name))
            except Reached:
                base.remove_adapters()
            judge.done()
    print("\n| schedule | its best | time, ours = 1 | passes, ours = 1 | bytes, ours = 1 |\n|---|---|---|---|---|")
    best = {who: best_of([r for r in judge.rows if r["way"].startswith(who)]) for who in ("ours", "authors", "leco")}
    for who, row in best.items():
        if row and best["ours"]:
            ratios = [row[k] / best["ours"][k] for k in ("seconds", "passes", "bytes")]
            at_least = "" if row["reached"] else "more than "
            shown = [f"{at_least}{ratios[0]:.1f}", f"{at_least}{ratios[1]:.1f}", f"{ratios[2]:.1f}"]
            print(f"| {who} | {row['way']}, {row['steps']} steps | {' | '.join(shown)} |")


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The quickest mark that reached; where none did, the last mark of the way that came nearest. Defaults alone for ours."""
    rows = [r for r in rows if r["way"] != "ours, keys: closed-form"]
    there = [r for r in rows if r["reached"]]
    if there:
        return min(there, key=lambda r: r["seconds"])
    ends = {r["way"]: r for r in rows}.values()  # the last one of each
    return max(
        ends, key=lambda r: min(r["UA"]["value"] - UA, r["IRA"]["value"] - KEPT, r["CRA"]["value"] - KEPT), default=None
    )


def at_true_size() -> None:
    """Count the passes of each schedule's defaults for Stable Diffusion 1.5, and time a pass and a step of each kind."""
    base = random_base(SD15, torch.bfloat16)
    told, noise = base.encode(["", "a", "b", "c"]), base.noise(range(4))

    def seconds(rows: int, *, backward: bool) -> float:
        def once() -> float:
            started = time.perf_counter()
            with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16):
                out = base.predict(noise[:rows], torch.full((rows,), 500), told[:rows])
            if backward:
                torch.autograd.backward(out.float().square().mean())
            return time.perf_counter() - started

        once()
        return statistics.median(once() for _ in range(3))

    one, pair = seconds(1, backward=False), seconds(2, backward=False)
    base.denoiser.requires_grad_(False)
    for name, weight in base.denoiser.named_parameters():
        weight.requires_grad_("attn2" in name)
    dense = seconds(1, backward=True)
    base.denoiser.requires_grad_(False)
    recipe = resolve(Recipe(base=SD15, concepts=("Van Gogh",)))  # type: ignore[arg-type]  # words become a concept
    base.add_adapter(layers=recipe.layers, rank=recipe.rank)
    adapters = seconds(recipe.batch_size * 2, backward=True)
    passes = count_passes(recipe)
    ours_s = (passes.concepts + passes.preservation) / 2 * pair + recipe.steps * adapters
    authors_s = 200 * (25 * pair + pair + one + dense)
    leco_s = 500 * (25 * 2 * pair + 6 / 2 * pair + seconds(2, backward=True))
    print(
        "\n## Stable Diffusion 1.5 at its true size, random weights, 512 px, bf16: counted passes, timed one by one\n"
    )
    print("| schedule, its defaults | passes | ours = 1 | hours of this machine | ours = 1 |\n|---|---|---|---|---|")
    rows = {
        f"ours, {recipe.steps} steps": (passes.total, ours_s),
        "authors, 200 steps": (200 * AUTHORS_PER_EXAMPLE, authors_s),
        "leco, 500 steps": (500 * LECO_PER_ITERATION, leco_s),
    }
    for name, (count, took) in rows.items():
        print(f"| {name} | {count:,} | {count / passes.total:.1f} | {took / 3600:.2f} | {took / ours_s:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.add_argument("--concept", default="cat", choices=OBJECTS, metavar="OBJECT")
    parser.add_argument("--ways", nargs="+", default=[""], help="schedules whose name begins with one of these")
    parser.add_argument("--no-true-size", action="store_true", help="the embedded base alone")
    args = parser.parse_args()
    names = [name for name in WAYS if name.startswith(tuple(args.ways))]
    on_emoji(args.concept, names, args.out / f"speed-{args.concept}.json")
    if not args.no_true_size:
        at_true_size()


if __name__ == "__main__":
    main()
