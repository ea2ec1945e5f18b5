"""The command line: each command parses, calls one library function, and prints.

Data goes to stdout, progress and hints to stderr. Heavy imports happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import esd_lora
from esd_lora.errors import EsdLoraError, OutputError, PatchError, RecipeError

if TYPE_CHECKING:
    from esd_lora.bases import Base
    from esd_lora.evaluate.page import Target
    from esd_lora.patch import Outline, Patch
    from esd_lora.recipe import Recipe

app = typer.Typer(
    name="esd-lora",
    help="Erase concepts from text-to-image diffusion models with small, stackable LoRA patches.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stderr = Console(stderr=True, highlight=False, emoji=False)
MAKE, LOOK, MEASURE, COMBINE, SHARE = "Make patches", "Look", "Measure", "Put together", "Share"
"""What commands are for, as the help lists them."""

BASE = "emoji, a folder with a diffusers pipeline, a .safetensors checkpoint, or a Hub id."
BaseName = Annotated[str | None, typer.Option("--base", help=BASE)]
OnBase = Annotated[str, typer.Option("--base", help=BASE)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")]
DeviceName = Annotated[str | None, typer.Option(help="Default: the first of cuda, mps, cpu that is there.")]
Precision = Literal["fp32", "bf16", "fp16"]
TargetOf = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="KIND:LABEL", help="What was erased, where --answers, such as a CSV, does not tell."
    ),
]
DTypeName = Annotated[Precision, typer.Option(help="Precision of the base.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no hints.")]
Patches = Annotated[
    list[str] | None,
    typer.Option("--patch", help="A patch's folder, file or Hub id, with an optional weight, as in P:0.5."),
]
Reference = Annotated[
    str, typer.Argument(help="A patch's folder or file, or its Hub id: user/name, user/name@revision.")
]
Weighted = Annotated[
    list[str], typer.Argument(help="Patches or their Hub ids, each with an optional weight, as in P:0.5.")
]
RecipeFiles = Annotated[
    list[str] | None, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one; or several.")
]
RecipeFile = Annotated[str | None, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one.")]
Erase = Annotated[list[str] | None, typer.Option(help="A concept to erase, in words; repeat for several.")]
From = Annotated[str | None, typer.Option("--from", help="Erase the concept from this prompt only.")]
ReplaceWith = Annotated[str | None, typer.Option(help="Draw this instead of the concept.")]
MOST = 1e6  # what is not a number of a guidance scale, infinity, is above it
AGAINST = "sld, negative-prompt, separate-negative, filter, esd-x, esd-u, leco, uce."
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any field of a recipe; docs/recipe.md lists them."),
]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"esd_lora {esd_lora.__version__}")  # noqa: T201
        raise typer.Exit


@app.command(rich_help_panel=MAKE)
def train(
    recipe: RecipeFiles = None,
    base: BaseName = None,
    erase: Erase = None,
    from_: From = None,
    replace_with: ReplaceWith = None,
    overrides: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the patch, or for those of several recipes. Default: runs/ and the concept."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an erasure patch: from a recipe, or with --base and --erase.

    Leaves the patch, the resolved recipe, the loss (CSV and PNG) and a before/after grid in the output folder. Several
    recipes share what is loaded, and each gets a folder of its name in --out.
    """
    chosen = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    how = {"base": base, "erase": erase, "from_": from_, "replace_with": replace_with, "overrides": chosen}
    jobs = _jobs(recipe or [], out, **how)
    from esd_lora import processes

    device = device or processes.own_device()
    loaded: dict[tuple[str | None, ...], Base] = {}
    facts: dict[str, dict[str, Any]] = {}
    failed: dict[str, type[EsdLoraError]] = {}
    for folder, wanted in jobs.items():
        try:
            name, revision, dtype = key = wanted.base, wanted.revision, wanted.dtype
            if key not in loaded:
                loaded.clear()  # makes room
                loaded[key] = _base(name, revision=revision, device=device, dtype=dtype)
            told = _train(wanted, loaded[key], folder, resume=resume, quiet=quiet)
            facts[str(folder)] = {"patch": str(folder), **told}
        except EsdLoraError as error:
            if len(jobs) == 1:
                raise
            failed[str(folder)] = type(error)  # the error itself would hold on to what the run had in memory
            stderr.print(f"error: {folder}: {error}", markup=False, soft_wrap=True)
    processes.leave()
    _print(facts if len(jobs) > 1 else facts.popitem()[1], as_json=as_json)
    if failed:
        worst = min(failed.values(), key=lambda kind: kind.exit_code)
        raise worst(f"{len(failed)} of {len(jobs)} recipes failed: {', '.join(failed)}")


def _jobs(recipes: list[str], out: Path | None, **options: Any) -> dict[Path, Recipe]:
    """What to train, by the folders of the patches; all of it is read before anything is trained.

    Raises:
        RecipeError: A recipe is wrong, or two would have one folder; all problems at once.
    """
    if len(recipes) < 2:
        wanted = _recipe(next(iter(recipes), None), **options)
        words = re.findall(r"\w+", " ".join(dict.fromkeys(c.erase for c in wanted.concepts)))
        return {out or Path("runs") / ("-".join(words) or "patch"): wanted}
    if options["erase"]:
        raise RecipeError("--erase would be the concept of all these recipes; name one recipe, or none")
    jobs: dict[Path, Recipe] = {}
    problems = []
    for name in recipes:
        folder = (out or Path("runs")) / Path(name).name.removesuffix(".yaml").removesuffix(".yml")
        try:
            if folder in jobs:
                raise RecipeError(f"{name}: another recipe has {folder} already; train it by itself, with --out")
            jobs[folder] = _recipe(name, **options)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return jobs


def _train(recipe: Recipe, base: Base, folder: Path, *, resume: bool, quiet: bool) -> dict[str, Any]:
    """The facts of a patch, trained into a folder with a curve and a grid; what is there already is not drawn again."""
    from esd_lora import processes
    from esd_lora.report import draw_loss, draw_run
    from esd_lora.training import COST, read_cost, train

    with _progress(f"train {folder.name}", recipe.steps, quiet=quiet) as step:

        def sample(n: int) -> None:
            with _where_there_is_room():
                draw_run(base, recipe, folder / f"sample-{n:05d}.png")

        how: dict[str, Any] = {"on_step": step, "on_sample": sample, "on_stage": _by_stage(step)}
        patch = train(recipe, base, out=folder, resume=resume, **how)
    if processes.is_main() and not (folder / "grid.png").exists():
        if recipe.objective != "closed-form":
            draw_loss(folder)
        with _where_there_is_room():
            draw_run(base, recipe, folder / "grid.png", patch=patch)
    if not quiet and stderr.is_terminal:
        stderr.print(f"next: {next_command(recipe, folder)}", style="dim", markup=False, soft_wrap=True)
    told = processes.is_main() and (folder / COST).is_file()  # elsewhere there may be no such folder
    return {**_facts(patch), **(read_cost(folder) if told else {})}


@contextmanager
def _where_there_is_room() -> Iterator[None]:
    """Pictures that are left out, with a warning, where the device has no memory for all parts of the pipeline at once."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        told = "left out a picture, for which the device has too little memory; the training is none the worse"
        warnings.warn(told, stacklevel=1)


def next_command(recipe: Recipe, folder: Path) -> str:
    """What to do with a trained patch: the command that draws what it erased, as its recipe does."""
    from esd_lora.pictures import drawn_by

    prompt, pictures = recipe.concepts[0].prompt, str(folder / "pictures")
    words = ["--base", recipe.base, "--patch", str(folder), "--prompt", prompt, "--out", pictures]
    told = {"revision": recipe.revision, **drawn_by(recipe.to_dict())}
    words += [word for k, v in told.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]
    return shlex.join(["esd-lora", "generate", *words])


@app.command(rich_help_panel=LOOK)
def generate(
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for several.")],
    base: OnBase,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    patch: Patches = None,
    revision: Revision = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(min=1, max=MOST, help="Classifier-free guidance.")] = 7.5,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels. Default: the base's own.")] = None,
    batch_size: BatchSize = 8,
    device: DeviceName = None,
    dtype: DTypeName = "fp32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make pictures with a base and any patches: the same seeds give the same noise with and without."""
    _check_alone()
    _check_words(prompt, "--prompt")
    for name in (*(f"{k:04d}.png" for k in range(n * len(prompt))), "grid.png"):
        _check_new(out / name)
    _warn_of_repeats(patch or [])
    loaded = _patches(patch or [])
    from esd_lora import pictures
    from esd_lora.compose import attach

    model = _base(base, revision=revision, device=device, dtype=dtype)
    attach(model, *loaded)
    prompts = [p for p in prompt for _ in range(n)]
    seeds = [seed + k for _ in prompt for k in range(n)]
    with _progress("generate", len(prompts), quiet=quiet) as step:
        made = pictures.generate(
            model,
            prompts,
            seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            resolution=resolution,
            batch_size=batch_size,
            on_batch=_by_batch(step),
        )
    rows = []
    for k, (picture, text, number) in enumerate(zip(made, prompts, seeds, strict=True)):
        path = out / f"{k:04d}.png"
        pictures.save_picture(picture, path)
        rows.append({"file": str(path), "prompt": text, "seed": number})
    side = [(text, made[i * n : (i + 1) * n]) for i, text in enumerate(prompt)]
    pictures.save_picture(pictures.grid(side), out / "grid.png")
    _print({"pictures": rows, "grid": str(out / "grid.png")}, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def show(patch: Reference, as_json: Json = False) -> None:
    """Print what a patch is: concepts, base, layers, rank, cost and scores."""
    from esd_lora.patch import read_outline

    outline = read_outline(_place(patch))
    facts = _facts(outline)
    told = {k: v for k, v in outline.info.items() if k == "base" or k not in facts} if as_json else {}
    _print({"patch": patch, **facts, **told}, as_json=as_json)  # what is counted wins over what a header claims


@app.command(rich_help_panel=MAKE)
def plan(
    recipe: RecipeFile = None,
    base: BaseName = None,
    erase: Erase = None,
    from_: From = None,
    replace_with: ReplaceWith = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Tell what a recipe would do, before anything heavy is loaded: layers, size, forward passes, memory."""
    concepts = erase or ([] if recipe else ["the concept"])
    wanted = _recipe(recipe, base=base, erase=concepts, from_=from_, replace_with=replace_with, overrides=overrides)
    _quiet_libraries()
    from esd_lora.plan import make_plan

    _print(make_plan(wanted).to_dict(), as_json=as_json)


@app.command(rich_help_panel=MAKE)
def recipes(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None, as_json: Json = False) -> None:
    """List the shipped recipes, or print one."""
    from esd_lora.recipe import make_recipe, read_recipe

    if name is not None:
        path = _shipped(name)
        values = read_recipe(path)
        make_recipe(values, source=str(path))
        if as_json:
            _print(values, as_json=True)
        else:
            print(path.read_text(encoding="utf-8"), end="")  # noqa: T201
        return
    found = {p.relative_to(RECIPES).with_suffix("").as_posix(): p for p in RECIPES.rglob("*.yaml")}
    heads = {k: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for k, p in sorted(found.items())}
    _print(heads, as_json=as_json)


@app.command("eval", rich_help_panel=MEASURE)
def evaluate(
    ctx: typer.Context,
    base: OnBase,
    patch: Annotated[list[str], typer.Option("--patch", help="A patch's folder, file or Hub id; repeat for several.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a report: all pictures, report.json, report.html.")
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="Answer set, YAML or CSV. Default: the grid of emoji.")] = None,
    target: TargetOf = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="emoji, clip:MODEL, imagenet:MODEL, nudenet[:PROFILE] or open-nsfw. Default: emoji, of the base emoji."
        ),
    ] = None,
    clip_score: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A CLIP, folder or Hub id, that scores how well kept pictures fit their prompts."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A baseline; repeat for several: {AGAINST} filter is the base's own safety checker (emoji: a second "
            "classifier), filter:PIPELINE that of another pipeline, a folder or a Hub id."
        ),
    ] = None,
    gold: Annotated[Path | None, typer.Option(help="A base trained without the concept, to compare with.")] = None,
    gold_lacks: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="What --gold lacks besides, and is not asked for; repeat for several."),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of all patches; repeat for a curve. Default: 1.")
    ] = None,
    target_seeds: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each cell of the erased concept. Default: 200 in all.")
    ] = None,
    kept_seeds: Annotated[int, typer.Option(min=1, help="Pictures of every other cell.")] = 2,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of a report's pictures.")] = 20,
    guidance_scale: Annotated[float, typer.Option(min=0, max=MOST, help="Guidance of a report's pictures.")] = 7.5,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="Side of a report's pictures in pixels. Default: the base's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures of a report at a time.")] = 32,
    revision: Revision = None,
    device: DeviceName = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of the base. Default: bf16, or fp32 where the device does not compute in bf16."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure patches: erased, kept, worst neighbours; with --out also compare them with what the field has, in a report.

    On the embedded base nothing more is needed; other bases want --answers, --evaluator and --out. Without --out scores and
    a grid are written into the folder of a patch that is one.
    """
    _warn_of_repeats(patch)
    loaded = {p: _find(p) for p in patch}
    how: dict[str, Any] = {"target_seeds": target_seeds, "kept_seeds": kept_seeds}
    _quiet_libraries()
    from esd_lora.bases import quick_dtype

    dtype = dtype or quick_dtype(device)
    _check_measurable(ctx, base, revision, told=bool(answers and evaluator and out))
    if out:
        how |= {"revision": revision, "device": device, "dtype": dtype, "weights": weight or [1.0], "clip": clip_score}
        how |= {
            "answers": answers,
            "evaluator": evaluator or "emoji",
            "against": against or [],
            "gold": gold,
            "gold_lacks": gold_lacks or [],
        }
        from esd_lora import processes
        from esd_lora.evaluate.comparing import Sampling, evaluate_patches
        from esd_lora.evaluate.page import make_report, points_of, rate_table

        how["target"] = _target(target)
        sampling = Sampling(steps=steps, guidance_scale=guidance_scale, resolution=resolution)
        command = shlex.join(["esd-lora", *sys.argv[1:]])
        with _progress("evaluate", None, quiet=quiet) as step:
            how |= {"sampling": sampling, "batch_size": batch_size, "command": command, "on_step": _by_stage(step)}
            found = evaluate_patches(base, loaded, out, **how)
        processes.leave()
        if as_json:
            _print(found, as_json=True)
        else:
            _show(rate_table(points_of(make_report(found))))
            _print({"page": str(out / "report.html")}, as_json=False)
        return
    _check_alone()
    from esd_lora.report import measure_patches, score_table

    model = _base(base, device=device, dtype=dtype)
    with _progress("evaluate", None, quiet=quiet) as step:
        scores = measure_patches(model, loaded, on_picture=lambda n, of: step(n, None, of), **how)
    if as_json:
        _print({p: [s.to_dict() for s in found] for p, found in scores.items()}, as_json=True)
    else:
        _show(score_table(scores))


@app.command(rich_help_panel=MEASURE)
def report(folder: Annotated[Path, typer.Argument(help="Has a report.json and the pictures that it names.")]) -> None:
    """Write the page of an evaluation again, with the attacks in its folder if there are any; it opens without a network."""
    from esd_lora.evaluate.page import read_report, write_page

    page = write_page(read_report(folder), folder / "report.html")
    _print({"page": str(page)}, as_json=False)


@app.command(rich_help_panel=MEASURE)
def study(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Of the study: index.html for readers, key.json for you alone.")],
    base: BaseName = None,
    patch: Patches = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeat for several.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt by each method.")] = 4,
    reference: Annotated[Path | None, typer.Option(help="A picture to compare with.")] = None,
    ask: Annotated[
        str | None, typer.Option(help="The question. Default: how similar it is to the style of the reference.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Which pictures are alike?",
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the pictures and of their order.")] = 0,
    batch_size: BatchSize = 8,
    score: Annotated[list[Path] | None, typer.Option(help="A reader's answers, CSV: score the study instead.")] = None,
    revision: Revision = None,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page on which people rate pictures with and without patches, blinded; or score their answers."""
    if score:
        if others := _given(ctx, but=("score", "as_json", "quiet")):
            raise RecipeError(f"--score: scores a study that has been drawn; leave {', '.join(others)} out")
        from esd_lora.study import score_study

        _print({k: vars(v) for k, v in score_study(folder / "key.json", score).items()}, as_json=as_json)
        return
    _check_alone()
    if not (base and prompt and patch):
        raise RecipeError("name --base, --patch and --prompt to write a study, or --score to score one")
    if not (ask or reference):
        raise RecipeError("name --reference, a picture to compare with, or --ask another question")
    _check_words(prompt, "--prompt")
    _warn_of_repeats(patch)
    patches = {text: _patch(text) for text in patch}
    from esd_lora import study as studies
    from esd_lora.patch import check_empty
    from esd_lora.pictures import read_picture

    check_empty(folder)
    shown = read_picture(reference) if reference else None
    model = _base(base, revision=revision, device=device)
    with _progress("study", (1 + len(patches)) * n * len(prompt), quiet=quiet) as step:
        how: dict[str, Any] = {"n": n, "seed": seed, "reference": shown, "batch_size": batch_size}
        how["on_batch"] = _by_batch(step)
        questions = studies.draw_questions(model, patches, prompt, **how)
    page = studies.write_study(folder, questions=questions, seed=seed, title=title, ask=ask or studies.ASK)
    _print({"page": str(page), "key": str(folder / "key.json"), "pictures": len(questions)}, as_json=as_json)


@app.command(rich_help_panel=MEASURE)
def attack(
    base: OnBase,
    patch: Annotated[
        list[str],
        typer.Option("--patch", help="As P, or P:0.5 with a weight; what the first one erases is looked for."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for attacks.json; what is in there is not done again.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="An attack; repeat for several: paraphrase, ring-a-bell, completion, inversion, prefix-search, relearning; "
            "scaling of attached patches, unmerging of merged ones."
        ),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Attack the base with the patches in its weights.")] = False,
    gold: Annotated[Path | None, typer.Option(help="A base trained without the concept: the zero line.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Answer set, YAML or CSV. Default: the grid of emoji.")] = None,
    target: TargetOf = None,
    evaluator: Annotated[
        str | None, typer.Option(help="emoji, clip:MODEL, imagenet:MODEL, nudenet[:PROFILE] or open-nsfw.")
    ] = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="A name of the concept, beside those that the patch tells; or several.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Pictures of each attack and control. Default: 48.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few pictures and short training, for a first look.")] = False,
    numbers: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="What attackers may do: looks, examples, searches, tries, tokens, inversion.steps (of large models 1000 "
            "and more), .batch_size, .lr, .seed, relearning.steps and so on.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(min=0, max=MOST, help="Classifier-free guidance.")] = 7.5,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels. Default: the base's own.")] = None,
    batch_size: BatchSize = 32,
    revision: Revision = None,
    device: DeviceName = None,
    dtype: DTypeName = "fp32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try to bring an erased concept back: every attack beside its controls, for `report` to show."""
    _check_alone()
    if base != "emoji" and not (answers and evaluator):
        raise RecipeError(f"--base {base}: give --answers and --evaluator; emoji alone comes with its own")
    _check_words(concept or [], "--concept")
    from esd_lora.evaluate import comparing, suite
    from esd_lora.recipe import parse_overrides

    sampling = comparing.Sampling(steps=steps, guidance_scale=guidance_scale, resolution=resolution)
    budget = suite.budget_of(
        n, quick=quick, sampling=sampling, batch_size=batch_size, numbers=parse_overrides(numbers or [])
    )
    _warn_of_repeats(patch)
    loaded = _patches(patch)
    how: dict[str, Any] = {"answers": answers, "evaluator": evaluator or "emoji", "words": concept or ()}
    how["target"] = _target(target)
    model = _base(base, revision=revision, device=device, dtype=dtype)
    how["gold"] = _base(str(gold), device=device, dtype=dtype) if gold else None
    erasure = suite.erasure_of(model, *loaded, merged=merged, budget=budget, **how)
    with _progress("attack", None, quiet=quiet) as step:
        found = suite.run_suite(erasure, only, out=out, on_stage=_by_stage(step))
    for name, reason in found.left_out.items():
        stderr.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    if as_json:
        told = {"attacks": [r.to_dict() for r in suite.results_of(found)], "left_out": dict(found.left_out)}
        _print({"evidence": str(out / "attacks.json"), **told}, as_json=True)
    else:
        _show(suite.attack_table(found))


@app.command(rich_help_panel=COMBINE)
def stack(
    patch: Weighted,
    out: Annotated[Path, typer.Option(help="Folder for the stack.")],
    rank: Annotated[int | None, typer.Option(help="Compress to this rank; the error is printed.")] = None,
    as_json: Json = False,
) -> None:
    """Put several patches into one that does what they do together, exactly, or compressed to a rank."""
    loaded = _patches(patch, out=out)
    from esd_lora import compose

    made, lost = compose.stack(*loaded), {}
    if rank is not None:
        made, errors = compose.compress(made, rank)
        lost = {"relative_error": {"worst": max(errors.values()), "mean": sum(errors.values()) / len(errors)}}
    made.save(out)
    _print({"patch": str(out), **_facts(made), **lost}, as_json=as_json)


@app.command(rich_help_panel=COMBINE)
def fuse(
    patch: Weighted,
    base: OnBase,
    out: Annotated[Path, typer.Option(help="Folder for the fused patch.")],
    revision: Revision = None,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put patches with learned keys into one, so that each acts on its own inputs and none elsewhere."""
    loaded = _patches(patch, out=out)
    from esd_lora import fusing

    model = _base(base, revision=revision, device=device)
    with _progress("fuse", None, quiet=quiet) as step:
        made = fusing.fuse(model, *loaded, on_trajectories=lambda n, of: step(n, None, of))
    made.save(out)
    _print({"patch": str(out), **_facts(made)}, as_json=as_json)


@app.command(rich_help_panel=COMBINE)
def overlap(
    patch: Annotated[list[str], typer.Argument(help="Patches' folders or files, or their Hub ids.")],
    base: OnBase,
    out: Annotated[Path | None, typer.Option(help="A picture of it, PNG.")] = None,
    revision: Revision = None,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell what patches share before they are stacked: action on each other's concepts, and on other words."""
    if out:
        _check_new(out)
    loaded = [_find(p) for p in patch]
    from esd_lora import overlap as overlaps

    model = _base(base, revision=revision, device=device)
    with _progress("words", None, quiet=quiet) as step:
        found = overlaps.overlap(model, loaded, on_words=lambda n, of: step(n, None, of))
    if out:
        overlaps.draw_overlap(found, out)
    if as_json:
        _print(found.to_dict(), as_json=True)
        return
    table = Table(title="Action of a patch (row) on a concept (column), and on the words that it leaks to")
    for name in ("patch", *found.names, "leaks to"):
        table.add_column(name)
    for name, row, leak in zip(found.names, found.actions, found.leaks, strict=True):
        table.add_row(name, *(f"{a:.3f}" for a in row), ", ".join(f"{w} {a:.3f}" for w, a in leak[:5]))
    _show(table)


@app.command(rich_help_panel=COMBINE)
def merge(
    patch: Weighted,
    base: OnBase,
    out: Annotated[Path, typer.Option(help="Folder for the merged pipeline.")],
    revision: Revision = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of the denoiser that is written.")] = "fp32",
    as_json: Json = False,
) -> None:
    """Write the base with patches in its weights for good, as a pipeline that needs neither esd_lora nor peft."""
    loaded = _patches(patch, out=out)
    from esd_lora import merging

    folder = merging.merge(_base(base, revision=revision, device="cpu"), *loaded, out=out, dtype=dtype)
    erased = [c["erase"] for p, w in zip(*loaded, strict=True) if w for c in p.concepts]
    _print({"pipeline": str(folder), "base": base, "erased": erased}, as_json=as_json)


@app.command(rich_help_panel=SHARE)
def export(
    patch: Annotated[str, typer.Argument(help="A patch or its Hub id, with an optional weight, as in P:0.5.")],
    to: Annotated[
        Literal["kohya", "comfyui", "a1111"], typer.Option(help="The program; all three read the same names.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a patch as one file for kohya's scripts, ComfyUI or A1111, under the names that these read."""
    if out.suffix != ".safetensors":
        raise OutputError(f"--out {out}: name a file that ends in .safetensors")
    _check_new(out)
    loaded, weight = _patch(patch)
    _quiet_libraries()
    from esd_lora import compose, exporting

    if weight != 1:
        loaded = compose.stack([loaded], [weight])
    file = exporting.export(loaded, out)
    _print({"file": str(file), "for": to, "layers": len(loaded.ranks), "erases": loaded.erases}, as_json=as_json)
    if not quiet:
        stderr.print(f"next: {exporting.NEXT[to].format(name=file.stem)}", style="dim", markup=False, soft_wrap=True)


@app.command("import", rich_help_panel=SHARE)
def import_(
    file: Annotated[
        Path, typer.Argument(help="A .safetensors file of kohya's scripts, LECO, sliders, peft or diffusers.")
    ],
    base: OnBase,
    out: Annotated[Path, typer.Option(help="Folder for the patch.")],
    revision: Revision = None,
    erase: Annotated[list[str] | None, typer.Option(help="What it erases, in words; such files do not tell.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out text encoders and convolutions, which a patch does not hold.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a patch of another program's LoRA file, with its alpha."""
    from esd_lora.patch import check_empty

    check_empty(out)
    _quiet_libraries()
    from esd_lora import exporting

    made, left_out = exporting.import_lora(file, base, revision=revision, erase=erase or (), partial=partial)
    made.save(out)
    _print({"patch": str(out), **_facts(made), **({"left_out": len(left_out)} if left_out else {})}, as_json=as_json)


@app.command(rich_help_panel=SHARE)
def card(
    patch: Annotated[str, typer.Argument(help="A patch's folder.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Draw pictures before and after with this base, for the card's gallery."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the pictures, for every prompt.")] = 0,
    revision: Revision = None,
    device: DeviceName = None,
    as_json: Json = False,
) -> None:
    """Write a patch's card, README.md, into its folder: use, scores, recipe, limits and licence."""
    from esd_lora.patch import load_patch, write_file

    if not Path(patch).is_dir():
        raise PatchError(f"{patch}: no folder; the card is written into a patch's folder (`pull` makes one)")
    loaded, folder = load_patch(patch), Path(patch)
    _quiet_libraries()
    from esd_lora import card as cards

    if base:
        cards.draw_pairs(_base(base, revision=revision, device=device), loaded, folder, seed=seed)
    write_file(folder / "README.md", cards.make_card(loaded, folder).encode())
    told = {"card": str(folder / "README.md"), "pictures": 2 * len(cards.pairs_of(folder))}
    _print(told, as_json=as_json)


@app.command(rich_help_panel=SHARE)
def push(
    patch: Annotated[str, typer.Argument(help="A patch's folder or file.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where to; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; made if it is not there.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Default: what the patch erases.")] = None,
    collection: Annotated[str | None, typer.Option(help="Add it to this collection, by slug or title.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, sizes and card; ask the Hub nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a patch on the Hub in one commit: patch, recipe, card, scores and pictures. Log in with `hf auth login`."""
    _quiet_libraries()
    _quiet_hub(quiet=quiet)
    from esd_lora import hub

    files = hub.files_of(patch, repo=repo)
    sizes = {name: len(data) for name, data in sorted(files.items())}
    if dry_run:
        card = files["README.md"].decode()
        _print({"repository": repo, "bytes": sizes, **({"card": card} if as_json else {})}, as_json=as_json)
        if not as_json:
            print(f"\n{card}", end="")  # noqa: T201
        return
    how: dict[str, Any] = {"private": private, "create_pr": create_pr, "revision": revision, "collection": collection}
    done = hub.push(files, repo, message=commit_message or _message(patch), **how)
    _print({**vars(done), "bytes": sizes}, as_json=as_json)


@app.command(rich_help_panel=SHARE)
def pull(
    repo: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="A patch's Hub id, as user/name or user/name@revision.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the patch.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a patch from the Hub, with its card, recipe, scores and pictures."""
    _quiet_hub(quiet=quiet)
    from esd_lora import hub

    name, revision = hub.named(repo)
    made = hub.pull(name, out, revision=revision)
    _print({"patch": str(out), **_facts(made)}, as_json=as_json)


@app.command(rich_help_panel=SHARE)
def verify(
    patch: Reference,
    target_seeds: Annotated[int, typer.Option(min=1, help="Pictures of each cell of an erased concept.")] = 2,
    kept_seeds: Annotated[int, typer.Option(min=1, help="Pictures of every other cell.")] = 1,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a patch before it is used: file, hash, card, base, and its scores measured again; exit code 1 if not all holds."""
    _quiet_libraries()
    _quiet_hub(quiet=quiet)
    from esd_lora import verifying

    with _progress("verify", None, quiet=quiet) as step:
        grid = {"target_seeds": target_seeds, "kept_seeds": kept_seeds}
        found = verifying.verify(patch, device=device, on_picture=lambda n, of: step(n, None, of), **grid)
    if as_json:
        _print(found.to_dict(), as_json=True)
    else:
        words = {True: "right", False: "WRONG", None: "-"}
        _print({c.what: f"{words[c.ok]:6} {c.found}" for c in found.checks}, as_json=False)
        if found.claims:
            table = Table(title="Claimed and measured, in % with 95 % Wilson intervals", title_justify="left")
            for name in ("erased", "rate", "claimed", "measured now", "holds"):
                table.add_column(name, overflow="fold")
            for c in found.claims:
                sides = [f"{r.interval()} /{r.n}" for r in (c.claimed, c.measured)]
                table.add_row(c.target, c.what, *sides, "yes" if c.holds else "NO")
            _show(table)
    if not found.ok:
        raise typer.Exit(1)


def _message(patch: str) -> str:
    """The message of a commit: what the patch erases."""
    from esd_lora.patch import load_patch

    return f"Upload the patch that erases {load_patch(patch).erases}".removesuffix(" that erases ")


def _quiet_hub(*, quiet: bool) -> None:
    """Keep the hub's progress bars off the screen, where it is no terminal or nobody looks."""
    from huggingface_hub.utils import disable_progress_bars

    if quiet or not stderr.is_terminal:
        disable_progress_bars()


def _check_new(path: Path) -> None:
    """Nothing, if a file can be written there without another's loss.

    Raises:
        OutputError: There is one already.
    """
    if path.exists():
        raise OutputError(f"{path}: exists; choose another --out")


PACKAGE = Path(esd_lora.__file__).parent
RECIPES = next(p for p in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if p.is_dir())
"""The shipped recipes: inside the installed package, or beside it in a checkout."""


def _shipped(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        RecipeError: There is neither.
    """
    path, shipped = Path(name), RECIPES / f"{name}.yaml"
    if (name and path.exists()) or path.suffix in (".yaml", ".yml"):
        return path
    if shipped.is_file():
        return shipped
    raise RecipeError(f"{name}: no such file and no shipped recipe; `esd-lora recipes` lists them")


def _recipe(
    recipe: str | None,
    *,
    base: str | None,
    erase: list[str] | None,
    from_: str | None,
    replace_with: str | None,
    overrides: list[str] | None,
) -> Recipe:
    """The recipe of a file and options; options win.

    Raises:
        RecipeError: Something is missing or wrong; all problems at once.
    """
    from esd_lora.recipe import make_recipe, parse_overrides, read_recipe

    if (from_ is not None or replace_with is not None) and not erase:
        raise RecipeError("--from and --replace-with belong to an --erase")
    values: dict[str, Any] = read_recipe(_shipped(recipe)) if recipe else {}
    if base is not None:
        values["base"] = base
    if erase:
        values["concepts"] = [{"erase": e, "from": from_, "replace_with": replace_with} for e in erase]
    values |= parse_overrides(overrides or [])
    if recipe is None and not {"base", "concepts"} <= values.keys():
        raise RecipeError("name a recipe, or --base and --erase; `esd-lora recipes` lists the shipped recipes")
    return make_recipe(values, source=recipe or "options")


def _check_alone() -> None:
    """Nothing, if this process is the only one.

    Raises:
        RecipeError: A launcher has started several, each of which would do the whole.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise RecipeError(
            f"runs in one process, and {processes} were started; `accelerate launch` is for train and eval --out"
        )


def _check_words(words: list[str], option: str) -> None:
    """Nothing, if all that an option was given says something.

    Raises:
        RecipeError: Some does not.
    """
    if not all(w.strip() for w in words):
        raise RecipeError(f"{option}: must not be empty")


def _warn_of_repeats(patches: list[str]) -> None:
    """Nothing; a warning for each patch that is named more than once."""
    for text in dict.fromkeys(p for p in patches if patches.count(p) > 1):
        warnings.warn(f"--patch {text}: is given more than once", stacklevel=2)


def _check_measurable(ctx: typer.Context, base: str, revision: str | None, *, told: bool) -> None:
    """Nothing, if the options of `eval` go together, and `told` what a base other than emoji is measured by.

    Raises:
        RecipeError: They do not, or the base cannot be measured by what was told.
        BaseModelError: It is none.
    """
    given = {*_given(ctx, but=("base", "patch", "device", "dtype", "as_json", "quiet"))}
    seeds = {"--target-seeds", "--kept-seeds"}
    if "--out" not in given and (others := sorted(given - seeds)):
        raise RecipeError(f"{', '.join(others)}: only with --out, for a report")
    if base != "emoji" and not told:
        from esd_lora.bases.facts import facts_of

        facts_of(base, revision)  # whether it is one
        raise RecipeError(f"--base {base}: give --answers, --evaluator and --out; emoji alone is measured without")
    if "--answers" in given and (counts := sorted(given & seeds)):
        raise RecipeError(f"{', '.join(counts)}: not with --answers, whose file says how many pictures there are")


def _given(ctx: typer.Context, *, but: Sequence[str]) -> list[str]:
    """The options that were given on the command line, as they are written there, without those of the parameters in `but`."""
    options = [p for p in ctx.command.params if p.param_type_name == "option" and p.name and p.name not in but]
    sources = {p.opts[0]: ctx.get_parameter_source(str(p.name)) for p in options}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _patches(texts: list[str], *, out: Path | None = None) -> tuple[list[Patch], list[float]]:
    """Patches and their weights, from `path` or `path:weight` each; before anything heavy is loaded to make `out` of them.

    Raises:
        PatchError: See `_patch`.
        OutputError: `out` holds something.
    """
    found = [_patch(t) for t in texts]
    if out:
        from esd_lora.patch import check_empty

        check_empty(out)
    return [p for p, _ in found], [w for _, w in found]


def _patch(text: str) -> tuple[Patch, float]:
    """A patch and its weight, from `path` or `path:weight`; `user/name` or `user/name@revision` serves as a path.

    Raises:
        PatchError: There is no patch, or the weight is not a number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return _find(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise PatchError(f"{text}: the weight after the colon must be a number, got {weight!r}")
    if (first := Path(path.rpartition(":")[0])).name and first.exists():
        raise PatchError(f"{text}: has two weights; write one, as in {first}:0.5")
    return _find(path), value


def _target(text: str | None) -> Target | None:
    """The target of `KIND:LABEL`, where it is told.

    Raises:
        RecipeError: It is not of this form.
    """
    from esd_lora.evaluate.answers import target_named

    return target_named(text) if text else None


def _find(reference: str) -> Patch:
    """The patch in a folder, a file, or on the Hub."""
    from esd_lora.patch import load_patch

    return load_patch(_place(reference))


def _place(reference: str) -> Path:
    """Where the patch of a reference is: a folder, a file, or what the Hub has under that name.

    Raises:
        PatchError: It is empty.
    """
    if not reference.strip():
        raise PatchError("the name of a patch must not be empty")
    if Path(reference).exists():
        return Path(reference)
    _quiet_hub(quiet=False)
    from esd_lora.hub import place_of

    return place_of(reference)


def _base(name: str, **how: Any) -> Base:
    """The base model, with the libraries silent from now on; see `load_base`."""
    _quiet_libraries()
    from esd_lora.bases import load_base

    return load_base(name, **how)


def _facts(patch: Patch | Outline) -> dict[str, Any]:
    """What a person wants to know of a patch."""
    recipe, ranks = patch.info.get("recipe", {}), patch.ranks
    concepts = [
        c["erase"]
        + (f" from {c['from']}" if c.get("from") else "")
        + (f", replaced with {c['replace_with']}" if c.get("replace_with") else "")
        for c in patch.concepts
    ]
    return {
        "erases": concepts,
        "base": patch.info.get("base", {}).get("name"),
        "layers": recipe.get("layers"),
        "modules": len(ranks),
        "rank": sorted(set(ranks.values())),
        "parameters": patch.parameters,
        "megabytes": round(patch.nbytes / 1e6, 3),
        "forward_passes": patch.info.get("cost", {}).get("forward_passes"),
        "loss": patch.info.get("loss"),
        "scores": patch.info.get("scores"),
    }


def _print(data: Mapping[str, Any], *, as_json: bool) -> None:
    """Data on stdout: JSON, or a table of names and values."""
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))  # noqa: T201
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _flat(data):
        table.add_row(name, value)
    _show(table)


def _show(table: Table) -> None:
    """A table on stdout, as wide as the terminal."""
    Console(highlight=False, emoji=False, markup=False, width=None if sys.stdout.isatty() else 120).print(table)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text, nested mappings with dotted names, without what is absent."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            plain = [str(v.get("file", v) if isinstance(v, Mapping) else v) for v in value]
            if plain:
                yield prefix + name, ", ".join(plain)
        elif value is not None:
            yield prefix + name, f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def _progress(label: str, total: int | None, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; gives a function (done, loss, total, stage) that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=quiet or not stderr.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        shown = label

        def move(done: int, loss: float | None = None, of: int | None = None, stage: str = label) -> None:
            nonlocal shown
            if stage != shown:  # another kind of step: the time left is reckoned anew
                bar.reset(task, description=stage)
                shown = stage
            bar.update(task, completed=done, total=of if of is not None else total)
            if loss is not None:
                bar.update(task, description=f"{label} loss {loss:.4g}")

        yield move


def _by_stage(step: Callable[..., None]) -> Callable[[str, int, int], None]:
    """Moves a progress bar by the name of a stage, what is done of it, and the whole."""
    return lambda stage, done, of: step(done, None, of, stage)


def _by_batch(step: Callable[..., None]) -> Callable[[int], None]:
    """Moves a progress bar by how many more are done."""
    done = 0

    def batch(count: int) -> None:
        nonlocal done
        step(done := done + count)

    return batch


def _quiet_libraries() -> None:
    """Keep the libraries' own progress bars off the screen."""
    import transformers

    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.disable_progress_bar()


def main() -> None:
    """Run the command line; our own errors become one line and an exit code."""

    def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            stderr.print(f"warning: {message}", markup=False)

    warnings.showwarning = show_warning
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # read as they are imported
    if os.environ.get("RANK", "0") != "0":  # one of several processes, of which the first alone speaks
        stderr.quiet, sys.stdout = True, Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except EsdLoraError as error:
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes an exit with 130 of Ctrl-C
        code = end.code if isinstance(end, SystemExit) else 130
        if code not in (130, 143):
            raise
        again = [a for a in sys.argv[1:] if a != "--resume"]
        on = f"; go on with: {shlex.join(['esd-lora', *again, '--resume'])}" if again[:1] == ["train"] else ""
        stderr.print(f"interrupted{on}", markup=False, soft_wrap=True)
        sys.exit(code)
    except RuntimeError as error:
        # torch's, which is not loaded for a line of help; on a CPU it has no class of its own
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        hint = "try a smaller --batch-size or --resolution, or --dtype bf16"
        stderr.print(f"error: the device is out of memory: {hint}", markup=False, soft_wrap=True)
        sys.exit(EsdLoraError.exit_code)
    except OSError as error:
        stderr.print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), markup=False)
        sys.exit(OutputError.exit_code)
