"""What people look at: the loss curve, the before/after grid of a run, and the table of scores."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from esd_lora.bases.base import Base
from esd_lora.compose import attached, check_fits
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.emoji.vocabulary import ACCESSORY, ACCESSORY_FORMS, NEIGHBOURS, OBJECTS, STYLES, WEARERS
from esd_lora.errors import OutputError, RecipeError
from esd_lora.evaluate.scores import (
    AttributeScores,
    Cell,
    Scores,
    accessory_set,
    answer_set,
    draw,
    score,
    score_attribute,
    whole_grid,
)
from esd_lora.patch import FILE_NAME, Patch, load_patch, write_file
from esd_lora.pictures import Pictures, drawn_by, generate, grid, save_picture
from esd_lora.recipe import Recipe
from esd_lora.training import resolve

COLUMNS = 8
"""Pictures in a row of a run's grid."""


def draw_loss(folder: Path) -> None:
    """Draw `loss.png` from the `loss.csv` that training left in a folder."""
    from matplotlib.figure import Figure

    with (folder / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps, losses = [int(r["step"]) for r in rows], [float(r["loss"]) for r in rows]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#c7d3e3", linewidth=1, label="each step")
    width = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(losses))]
    axes.plot(steps, means, color="#1f4e8c", linewidth=2, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(folder / "loss.png", buffer.getvalue())


def draw_run(base: Base, recipe: Recipe, path: Path, *, patch: Patch | None = None) -> None:
    """Draw the erased prompts and some preserved ones, with the same noise with and without the patch.

    Args:
        base: Bare if `patch` is given, else with the adapters that are being trained.
        recipe: Names the prompts.
        path: Of the PNG.
        patch: The finished patch; without it there is one row, of the adapters as they are.
    """
    recipe = resolve(recipe)
    erased = [c.prompt for c in recipe.concepts for _ in range(2)][: COLUMNS // 2]
    kept = [p for p in recipe.preserve or () if p][: COLUMNS - len(erased)]
    prompts = erased + kept
    seeds = list(range(len(prompts)))

    def pictures() -> Pictures:
        return generate(base, prompts, seeds, batch_size=4, **drawn_by(recipe.to_dict()))

    if patch is None:
        rows = [("now", pictures())]
    else:
        base.remove_adapters()
        rows = [("before", pictures())]
        with attached(base, [patch]):
            rows.append(("after", pictures()))
    footer = f"Seeds 0 to {len(seeds) - 1}, not selected; the first {len(erased)} are what was erased."
    save_picture(grid(rows, prompts, footer=footer, side=128), path)


def measure_patches(
    base: Base,
    patches: Mapping[str, Patch],
    *,
    target_seeds: int | None = None,
    kept_seeds: int = 2,
    on_picture: Callable[[int, int], None] | None = None,
) -> dict[str, list[Scores | AttributeScores]]:
    """The scores of each patch's concepts; in a patch's folder also in its file, as `scores.json`, and as `grid.png`.

    Args:
        base: The embedded base, bare.
        patches: By where they are; what is no folder here is measured, and nothing is written.
        target_seeds: Pictures of each cell of an erased concept; by default 200 in all.
        kept_seeds: Pictures of every other cell.
        on_picture: Called with the number of pictures drawn and their total.

    Raises:
        PatchError: A patch does not fit the base.
        RecipeError: A patch erases something that the evaluators do not know, or everything that they do.
        OutputError: A folder has another patch by now.
    """
    jobs: dict[str, list[Job]] = {}
    for folder, patch in patches.items():
        check_fits(patch, base)
        jobs[folder] = jobs_of(patch, target_seeds=target_seeds, kept_seeds=kept_seeds)
    needed = list(dict.fromkeys(c for some in jobs.values() for job in some for c in job.cells))
    total, done = len(needed) + sum(len(job.cells) for some in jobs.values() for job in some), 0

    def batch(count: int) -> None:
        nonlocal done
        done += count
        if on_picture:
            on_picture(done, total)

    bare = dict(zip(needed, draw(base, needed, on_batch=batch), strict=True))
    evaluator = load_evaluator("measure")
    scores: dict[str, list[Scores | AttributeScores]] = {}
    for folder, patch in patches.items():
        grids, scores[folder] = [], []
        for target, wearer, cells in jobs[folder]:
            before, after = [bare[c] for c in cells], draw(base, cells, [patch], on_batch=batch)
            seen = evaluator.judge(after), evaluator.judge(before)
            how = partial(score_attribute, wearer) if wearer else partial(score, target)
            scores[folder].append(how(cells, *seen, evaluator))
            grids.append(score_grid(target, cells, before, after))
        if Path(folder).is_dir():
            _write_scores(Path(folder), patch, [s.to_dict() for s in scores[folder]], grids)
    return scores


def _write_scores(folder: Path, patch: Patch, found: list[dict[str, Any]], grids: Pictures) -> None:
    """Leave the scores of a patch in its file and beside it, with a grid for each concept."""
    if load_patch(folder).digest != patch.digest:
        raise OutputError(f"{folder}: has another patch than the one that was measured; its scores are not kept")
    replace(patch, info={**patch.info, "scores": found}).save(folder / FILE_NAME)
    write_file(folder / "scores.json", json.dumps(found, indent=2).encode())
    for i, picture in enumerate(grids, 1):
        save_picture(picture, folder / ("grid.png" if i == 1 else f"grid-{i}.png"))


class Job(NamedTuple):
    """One concept to measure: its canonical name, the wearer where it is the accessory of one, and the answer set."""

    target: str
    wearer: str | None
    cells: list[Cell]


def jobs_of(patch: Patch, *, target_seeds: int | None, kept_seeds: int) -> list[Job]:
    """What to measure of a patch: for each of its concepts the answer set, without what else the patch erases.

    Raises:
        RecipeError: The evaluators do not know a concept, or nothing is left to measure it by.
    """
    erased = targets_of(patch)
    hatless = {wearer for _, wearer in erased}
    jobs = []
    for target, wearer in erased:
        others = {name for name, _ in erased if name != target}
        if wearer:
            worn = [c for w in WEARERS if w not in hatless for c in accessory_set(w, seeds=kept_seeds)]
            cells = [*accessory_set(wearer, seeds=target_seeds), *worn, *whole_grid(seeds=kept_seeds)]
            cells = [c for c in cells if not others & {c.obj, c.style}]
        else:
            cells = answer_set(target, without=others, target_seeds=target_seeds, kept_seeds=kept_seeds)
        asked = [c.hat and c.obj == wearer if wearer else target in (c.obj, c.style) for c in cells]
        if not any(asked) or all(asked):
            raise RecipeError(f"{target}: the patch erases all that it would be measured by")
        jobs.append(Job(target, wearer, cells))
    return jobs


def targets_of(patch: Patch) -> list[tuple[str, str | None]]:
    """The canonical names of what a patch erases, and of the wearer where it is the accessory of one.

    Raises:
        RecipeError: The evaluators do not know a concept, or it is an object or a style erased from some prompts alone.
    """
    canonical = {form: name for forms in (OBJECTS, STYLES) for name in forms for form in (name, *forms[name])}
    names = [canonical.get(concept["erase"].lower().removesuffix(" style")) for concept in patch.concepts]
    everywhere = {name for name, concept in zip(names, patch.concepts, strict=True) if not concept["from"]}
    found: list[tuple[str, str | None]] = []
    for name, concept in zip(names, patch.concepts, strict=True):
        wearer = next((w for w in WEARERS if w in (concept["from"] or "").lower().split()), None)
        if name:
            if name not in everywhere:
                told = f"erased from {concept['from']!r} alone, and the answers of emoji ask for it everywhere"
                raise RecipeError(f"{concept['erase']}: {told}")
            found.append((name, None))
        elif concept["erase"].lower() in ACCESSORY_FORMS and wearer:
            found.append((ACCESSORY, wearer))
        else:
            raise RecipeError(f"the evaluators of emoji do not know {concept['erase']!r}")
    if not found:
        raise RecipeError("the patch does not say what it erases")
    return list(dict.fromkeys(found))


def score_grid(target: str, cells: Sequence[Cell], before: Pictures, after: Pictures) -> Any:
    """Before and after for the target's cells, its neighbours' and others', the first seed of each: nothing is selected."""
    first: dict[tuple[str, str, bool], int] = {}
    for i, c in enumerate(cells):
        first.setdefault((c.obj, c.style, c.hat), i)
    wearer = cells[0].obj if target == ACCESSORY else None
    hit = [
        i
        for i in first.values()
        if target in (cells[i].obj, cells[i].style) or (cells[i].hat and cells[i].obj == wearer)
    ]
    near = [i for i in first.values() if {cells[i].obj, cells[i].style} & set(NEIGHBOURS.get(target, ()))]
    rest = [i for i in first.values() if i not in hit and i not in near]
    hit, near = hit[:: max(1, len(hit) // 6)][:6], near[:: max(1, len(near) // 3)][:3]
    order = hit + near + rest[:: max(1, len(rest) // 5)][: 12 - len(hit) - len(near)]
    columns = [f"{cells[i].obj}{' with hat' if cells[i].hat else ''}, {cells[i].style}" for i in order]
    footer = f"The first {len(hit)} pictures show what was erased ({target}); the others must stay. First seeds, not selected."
    rows = [("before", [before[i] for i in order]), ("after", [after[i] for i in order])]
    return grid(rows, columns, footer=footer, side=128)


def score_table(scores: Mapping[str, Sequence[Scores | AttributeScores]]) -> Table:
    """The scores as a table for a terminal: rates with 95 % intervals, and the base's own."""
    table = Table(title="Erased and kept, in % with 95 % Wilson intervals", title_justify="left")
    table.add_column("patch", overflow="fold")
    table.add_column("erased")
    for name in ("UA", "IRA", "CRA", "at target", "worst three", "seen instead"):
        table.add_column(name)
    for folder, found in scores.items():
        for s in found:
            if isinstance(s, AttributeScores):
                rates = [r.short() for r in (s.gone, s.ira, s.cra, s.carrier)]
                table.add_row(folder, ACCESSORY, *rates, "", f"elsewhere {s.elsewhere.short()}" if s.elsewhere else "")
            else:
                worst = ", ".join(f"{n} {100 * r.value:.0f}" for n, r in s.worst.items())
                rates = [r.short() for r in (s.ua, s.ira, s.cra, s.at_target)]
                instead = [f"{n} {100 * k / s.ua.n:.0f}" for n, k in s.replaced_by.items() if n != s.target][:2]
                table.add_row(folder, s.target, *rates, worst, ", ".join(instead))
    return table
