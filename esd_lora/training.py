"""`train`: (Recipe, Base) → Patch.

    questions ─► bank of trajectories ─► batches ─► adapters ─► Patch

The loop does nothing but gradient steps: prompts are encoded and targets recorded before it, losses stay on the device
and are read every few steps. A run writes a checkpoint now and then, and when it is told to stop; continued from it, the
patch is the same, bit for bit, as that of a run that was never interrupted, because batches follow from the seed and the
step alone. Several processes share the trajectories and every batch, and add up their gradients, so that a recipe means the
same however many there are. Where a recipe is robust, an adversary looks for soft words between steps (`esd_lora.adversary`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from diffusers.optimization import get_scheduler
from torch import Tensor

from esd_lora import adversary, directions, processes
from esd_lora.bases import DTYPES
from esd_lora.bases.base import Base, Condition
from esd_lora.checkpoint import Checkpoints
from esd_lora.closed_form import closed_form_patch
from esd_lora.errors import OutputError, RecipeError, TrainingError
from esd_lora.esd import esd_loss
from esd_lora.folder import RECIPE, finished_run, locked
from esd_lora.patch import FILE_NAME, Patch, write_file
from esd_lora.recipe import Recipe
from esd_lora.signals import Signals, stop
from esd_lora.softwords import unused_words, vocabulary_of
from esd_lora.stopwatch import Stopwatch
from esd_lora.trajectories import Bank, Question, default_preserve, preserve_steps, questions_of, record

CHECK_EVERY = 10
"""Steps between looks at the losses: each look waits for the device."""

COST = "run.yaml"
"""What a run took, in its folder."""

PACKAGES = ("esd_lora", "torch", "diffusers", "peft", "transformers", "accelerate")


@dataclass
class Run:
    """What a training run has at hand, and what changes as it goes."""

    recipe: Recipe
    base: Base
    accelerator: Accelerator
    conditions: Condition  # of the prompts, and then of what the adversary has found
    wordless: Condition  # a prompt without words, as the encoders read it
    prompts: int
    erase: list[Question]
    preserve: list[Question]
    optimizer: Any
    schedule: Any
    losses: Tensor  # (steps,) on the device
    watch: Stopwatch
    banks: dict[str, Bank] = field(default_factory=dict)  # "erase" and, where asked for, "preserve"
    step: int = 0
    passes: int = 0
    signals: Signals = field(default_factory=Signals)
    checkpoints: Checkpoints | None = None
    on_stage: Callable[[str, int, int], None] | None = None

    @property
    def found(self) -> Condition:
        """The conditions of the adversary's soft words: in each round some for each prompt to erase, in turn."""
        return self.conditions[slice(self.prompts, None)]

    @property
    def asked(self) -> list[int]:
        """Rows of the prompts to erase."""
        return list(dict.fromkeys(q.s for q in self.erase))


def train(
    recipe: Recipe,
    base: Base,
    *,
    out: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, float | None], None] | None = None,
    on_sample: Callable[[int], None] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> Patch:
    """The patch that a recipe asks for.

    Under `accelerate launch` each process calls this, gets the patch, and has done its share; the main process alone
    writes to `out` and calls back.

    Args:
        recipe: What to erase, and how.
        base: The model; its weights are not changed, and the adapters are off it again afterwards.
        out: Folder for the patch, the resolved recipe and the checkpoints; None keeps everything in memory.
        resume: Go on from the last checkpoint in `out`, if there is one.
        on_step: Called after every step with the number of steps done and, now and then, the loss.
        on_stage: Called while something else than steps is under way, with its name, what is done of it, and the whole.
        on_sample: Called every `sample_every` steps with the number of steps done, adapters on.

    Raises:
        OutputError: `out` holds another run or is in use by one, or cannot be written to.
        TrainingError: The loss is no longer a number, or memory runs out; the last good checkpoint is kept.
        BaseModelError, RecipeError: The layers match nothing, or the rank is too high.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the step was finished, and a checkpoint written.
    """
    recipe = resolve(recipe)
    processes.join(base.device)
    if not processes.is_main():
        on_step = on_sample = on_stage = None
    with ExitStack() as held:

        def enter(folder: Path) -> Patch | None:
            held.enter_context(locked(folder))
            return finished_run(folder, recipe, base, resume=resume)

        finished = processes.agreed(partial(enter, out)) if out else None
        return finished or _train(recipe, base, out, on_step, on_sample, on_stage)


def _train(
    recipe: Recipe,
    base: Base,
    out: Path | None,
    on_step: Callable[[int, float | None], None] | None,
    on_sample: Callable[[int], None] | None,
    on_stage: Callable[[str, int, int], None] | None,
) -> Patch:
    """The patch, in a folder that is this run's or in memory; see `train`."""
    watch = Stopwatch(base.device)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    _check_environment(recipe, base, out)
    base.remove_adapters()
    torch.manual_seed(recipe.seed)
    base.add_adapter(layers=recipe.layers, rank=recipe.rank)

    def solved() -> dict[str, Tensor]:
        with base.encoders_alone():  # it reads a few weights, and no picture
            return closed_form_patch(base, recipe, on_prompts=on_stage and partial(on_stage, "vocabulary"))

    losses = torch.zeros(0)
    try:
        if recipe.keys == "closed-form" and recipe.objective != "closed-form":
            base.load_adapter_state(processes.agreed(solved))
            base.freeze_keys()
        if out:  # not before the base has said that it can be adapted so: a refused run leaves nothing behind
            processes.agreed(partial(write_file, out / RECIPE, recipe.to_yaml().encode()))
        if recipe.objective == "closed-form":
            patch = Patch(processes.agreed(solved), _provenance(recipe, base))
        else:
            run = _begin(recipe, base, out, watch)
            run.on_stage = on_stage
            if run.checkpoints:
                _restore(run, run.checkpoints)
            with run.signals:
                _loop(run, on_step, on_sample)
            losses = run.losses
            patch = Patch(base.adapter_state(), _provenance(recipe, base, passes=run.passes, losses=losses))
    except torch.OutOfMemoryError as error:
        raise TrainingError("out of memory: try gradient_checkpointing, a smaller batch_size, or dtype bf16") from error
    finally:
        base.remove_adapters()
    if out:
        processes.agreed(partial(_write, out, patch, losses, _cost(watch)))
    return patch


def _write(out: Path, patch: Patch, losses: Tensor, cost: bytes) -> None:
    """Leave what a run has made."""
    if len(losses):
        write_file(out / "loss.csv", _csv(losses))
    write_file(out / COST, cost)
    patch.save(out / FILE_NAME)  # the last, for it says that the run is done
    Checkpoints(out).remove()


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with its defaults that depend on other fields filled in."""
    if recipe.preserve is not None:
        return recipe
    return recipe.model_copy(update={"preserve": default_preserve(recipe.concepts)})


def _check_environment(recipe: Recipe, base: Base, out: Path | None) -> None:
    """Nothing, if this machine and this base can do what the recipe asks for.

    Raises:
        RecipeError: A package is missing, the precision is not for this device or not the base's, a batch is too small for
            so many processes, or the base has too few words for an adversary.
        BaseModelError: It has none.
    """
    base.check(recipe)
    if recipe.robust:
        unused_words(vocabulary_of(base), adversary.WORDS, beside=())
    if recipe.batch_size < processes.count():
        many = processes.count()
        raise RecipeError(
            f"batch_size: {recipe.batch_size} cannot be shared by {many} processes; it must be {many} or more"
        )
    if recipe.log_with and (out is None or importlib.util.find_spec(recipe.log_with) is None):
        need = "an output folder" if out is None else f"its package: pip install esd_lora[{recipe.log_with}]"
        raise RecipeError(f"log_with: {recipe.log_with} needs {need}")
    if recipe.dtype == "fp16" and base.device.type == "cpu":
        raise RecipeError("dtype: fp16 cannot be trained on a CPU; try bf16")
    if DTYPES[recipe.dtype] != base.dtype:
        raise RecipeError(f"dtype: the recipe says {recipe.dtype}, and the base is loaded in {base.dtype}")


def _begin(recipe: Recipe, base: Base, out: Path | None, watch: Stopwatch) -> Run:
    """A run at step 0: prompts encoded, optimizer ready, nothing recorded yet."""
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.dtype, recipe.dtype),
        cpu=base.device.type == "cpu",
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # one step of the schedule for all processes
        log_with=recipe.log_with,
        project_dir=out,
    )
    if recipe.log_with:
        accelerator.init_trackers("esd_lora", {k: str(v) for k, v in recipe.to_dict().items()})
    if recipe.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    else:
        base.denoiser.disable_gradient_checkpointing()
    prompts, erase, preserve = questions_of(recipe)
    with watch.stage("prompts"), base.encoders_alone():
        encode = partial(base.encode, resolution=recipe.resolution, guidance_scale=recipe.guidance_scale)
        conditions = encode(prompts)
        wordless = conditions[slice(1)] if base.wordless == prompts[0] else encode([base.wordless])
    optimizer = torch.optim.AdamW(base.adapter_parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = get_scheduler(
        recipe.lr_schedule, optimizer, num_warmup_steps=recipe.warmup_steps, num_training_steps=recipe.steps
    )
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    losses = torch.zeros(recipe.steps, device=base.device)
    checkpoints = Checkpoints(out) if out else None
    made = (accelerator, conditions, wordless, len(prompts), erase, preserve, optimizer, schedule, losses)
    return Run(recipe, base, *made, watch, checkpoints=checkpoints)


def _loop(
    run: Run,
    on_step: Callable[[int, float | None], None] | None,
    on_sample: Callable[[int], None] | None,
) -> None:
    """All steps that are left, with looks at the losses, samples and checkpoints between them."""
    recipe = run.recipe
    while run.step < recipe.steps:
        _search(run)
        with run.watch.stage("trajectories"):
            _fill_banks(run)
            if run.step == 0 and aims(recipe):
                _aim(run)
        _step(run)
        run.step += 1
        save = run.step % recipe.checkpoint_every == 0
        look = save or run.step % CHECK_EVERY == 0 or run.step == recipe.steps
        loss = _look(run) if look else None
        if save:
            _save(run)
        if on_step:
            on_step(run.step, loss)
        if on_sample and recipe.sample_every and run.step % recipe.sample_every == 0:
            on_sample(run.step)
            run.base.free_encoders()
        _stop_if_told(run)
    for tracker in run.accelerator.trackers:
        tracker.finish()


def _stop_if_told(run: Run) -> None:
    """Nothing, if no signal came; otherwise the run's end, with a checkpoint of the last step. Not amid a step.

    Raises:
        KeyboardInterrupt, SystemExit: A signal came, to this process or to another.
    """
    came = processes.largest(run.signals.came, run.base.device)
    if came:
        if run.step and torch.isfinite(run.losses).all() and _adapters_finite(run):
            _save(run)
        raise stop(came)


def _search(run: Run) -> None:
    """Have the adversary find soft words, in the rounds that are due; they are looked for on the bank of the step before."""
    recipe = run.recipe
    due = len(run.asked) * adversary.rounds_due(recipe.robust, step=run.step, steps=recipe.steps)
    if len(run.found) == due:
        return

    def on_step(done: int, of: int) -> None:
        _stop_if_told(run)  # what is half found is looked for again
        if run.on_stage:
            run.on_stage("adversary", done, of)

    with run.watch.stage("adversary"):
        for number in range(len(run.found), due):
            found = adversary.find(
                run.base,
                run.banks["erase"],
                run.conditions,
                run.asked[number % len(run.asked)],
                batch_size=recipe.batch_size,
                seed=_seed(recipe.seed, "adversary", number),
                mine=processes.mine(),
                on_step=on_step,
            )
            run.conditions = Condition.cat([run.conditions, found])
            run.passes += adversary.passes(recipe.batch_size)


def _fill_banks(run: Run) -> None:
    """Record trajectories where there are none yet, or the student's own have grown old."""
    recipe = run.recipe
    edited = recipe.x_t == "edited"

    def on_step(done: int, of: int) -> None:
        _stop_if_told(run)  # what is recorded so far is recorded again
        if run.on_stage:
            run.on_stage("record", done, of)

    def recorded(
        questions: list[Question], first_seed: int, *, steps: int, guidance_scale: float, edited: bool
    ) -> Bank:
        mine = processes.share(range(len(questions)))
        part, passes = record(
            run.base,
            run.conditions,
            [questions[i] for i in mine],
            [first_seed + i for i in mine],
            steps=steps,
            guidance_scale=guidance_scale,
            resolution=recipe.resolution,
            edited=edited,
            on_step=on_step,
        )
        run.passes += processes.summed(passes, run.base.device)
        together = partial(processes.gathered, shared=len(mine), of=len(questions))
        return Bank(**{name: together(rows) for name, rows in part.tensors().items()})

    if "erase" not in run.banks or (edited and run.step % recipe.refresh_every == 0):
        age = run.step // recipe.refresh_every if edited else 0
        questions, first = run.erase * recipe.trajectories, _seed(recipe.seed, 1 + age)
        steps, guidance_scale = recipe.trajectory_steps, recipe.guidance_scale
        run.banks["erase"] = recorded(questions, first, steps=steps, guidance_scale=guidance_scale, edited=edited)
    if "preserve" not in run.banks and run.preserve:
        steps = preserve_steps(recipe, run.preserve)
        # without guidance, for half the passes; on the embedded base no less is kept for it
        run.banks["preserve"] = recorded(
            run.preserve, _seed(recipe.seed, 0), steps=steps, guidance_scale=1.0, edited=False
        )


def aims(recipe: Recipe) -> bool:
    """Whether adapters start from a concept's directions; where all lora_A are closed-form keys there is none to aim."""
    return recipe.init == "differences" and (recipe.keys, recipe.layers) != ("closed-form", "esd-x-strict")


def _aim(run: Run) -> None:
    """Have the adapters start from where the concept moves what they read; all processes from the same."""
    bank, batch_size = run.banks["erase"], run.recipe.batch_size
    how: dict[str, Any] = {"wordless": run.wordless, "batch_size": batch_size}
    found = processes.agreed(lambda: directions.aim(run.base, run.conditions, bank, **how))
    run.base.load_adapter_state(found)
    run.passes += directions.passes(len(bank))


def _step(run: Run) -> None:
    """One gradient step on a batch of erasing and, where asked for, as many preserving examples."""
    recipe, accelerator = run.recipe, run.accelerator
    x, t, target, s, weight = [], [], [], [], []
    mine = processes.mine()
    for kind, (name, bank) in enumerate(run.banks.items()):
        order = _rows(len(bank), run.step, recipe, kind)
        rows = _sent(order[mine], bank.x.device)
        x.append(bank.x[rows])
        t.append(bank.t[rows])
        target.append(bank.target[rows])
        asked = bank.s[rows]
        if name == "erase" and recipe.robust:
            asked = _sent(_forms(run, order)[mine], bank.x.device)
        if name == "preserve" and recipe.preserve_beside:
            asked = _sent(_beside(run, order)[mine], bank.x.device)
        s.append(asked)
        factor = recipe.preserve_weight if name == "preserve" else 1.0
        weight.append(torch.full((len(rows),), factor / recipe.batch_size, device=bank.x.device))
    with run.watch.stage("student"):
        with accelerator.autocast():
            student = run.base.predict(torch.cat(x).to(run.base.dtype), torch.cat(t), run.conditions[torch.cat(s)])
        loss = esd_loss(student, torch.cat(target), weight=torch.cat(weight))
        accelerator.backward(loss)
    loss = processes.sum_gradients(loss.detach(), run.base.adapter_parameters())
    accelerator.clip_grad_norm_(run.base.adapter_parameters(), recipe.max_grad_norm)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    run.losses[run.step] = loss
    run.passes += 3 * recipe.batch_size * len(run.banks)  # a backward pass costs about two forward passes


def _rows(size: int, step: int, recipe: Recipe, kind: int) -> Tensor:
    """Which examples step number `step` trains on: the bank in shuffled order, shuffled anew each time around."""
    first = step * recipe.batch_size
    wanted = torch.arange(first, first + recipe.batch_size)
    orders = {
        epoch: torch.randperm(size, generator=torch.Generator().manual_seed(_seed(recipe.seed, epoch, kind)))
        for epoch in set((wanted // size).tolist())
    }
    return torch.stack([orders[int(w) // size][int(w) % size] for w in wanted])


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """The same on a device, which is not waited for."""
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def _forms(run: Run, order: Tensor) -> Tensor:
    """What these examples to erase are asked for with: s, one of its synonyms, or soft words found for it, as often each.

    Which one follows from the step alone, and from what the adversary has found by then.
    """
    chosen = []
    for q, u in _drawn(run, "forms", run.erase, order):
        found = range(run.prompts + run.asked.index(q.s), len(run.conditions), len(run.asked))
        forms = [q.s, *q.forms, *found]
        chosen.append(forms[int(u * len(forms))])
    return torch.tensor(chosen)


def _beside(run: Run, order: Tensor) -> Tensor:
    """What these examples to preserve are asked for with: p, or p beside a concept, as often; which follows from the step."""
    drawn = _drawn(run, "beside", run.preserve, order)
    return torch.tensor([q.s if q.beside is None or u < 0.5 else q.beside for q, u in drawn])


def _drawn(run: Run, what: str, questions: Sequence[Question], order: Tensor) -> Iterator[tuple[Question, float]]:
    """The question of each of these examples, and a number from 0 to 1 that follows from the step alone."""
    generator = torch.Generator().manual_seed(_seed(run.recipe.seed, what, run.step))
    for i, u in zip(order.tolist(), torch.rand(len(order), generator=generator).tolist(), strict=True):
        yield questions[i % len(questions)], u  # trajectories are recorded question by question


def _seed(*parts: object) -> int:
    """A 62-bit seed that follows from the parts and from nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 2


def _look(run: Run) -> float:
    """The newest loss, after checking that all of them are numbers."""
    losses = run.losses[: run.step].cpu()
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad) or not _adapters_finite(run):
        last = next(iter(run.checkpoints.paths), None) if run.checkpoints else None
        kept = f"; the checkpoint of step {last} is kept" if last else ""
        raise TrainingError(
            (
                f"the loss was {losses[bad[0, 0]].item()} at step {bad[0, 0].item() + 1}: "
                if len(bad)
                else f"the adapters are no longer finite at step {run.step}: "
            )
            + f"in another --out try a lower lr (now {run.recipe.lr:g}), warmup_steps, or dtype fp32 or bf16{kept}"
        )
    loss = losses[-1].item()
    if run.recipe.log_with:
        run.accelerator.log({"loss": loss, "lr": run.schedule.get_last_lr()[0]}, step=run.step)
    return loss


def _adapters_finite(run: Run) -> bool:
    """Whether every number of the adapters is one."""
    return all(bool(torch.isfinite(p).all()) for p in run.base.adapter_parameters())


def _save(run: Run) -> None:
    """Write everything that the rest of the run depends on, where the run has a folder."""
    if not run.checkpoints:
        return
    parts = {name: bank.tensors() for name, bank in run.banks.items()}
    if run.recipe.robust:
        parts["found"] = dict(run.found.tensors)
    recorded = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.items()}
    scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler else {}
    save = partial(
        run.checkpoints.save,
        run.step,
        {**run.base.adapter_state(), **recorded, "losses": run.losses},
        optimizer=run.optimizer.state_dict(),
        state={
            "step": run.step,
            "passes": run.passes,
            "schedule": run.schedule.state_dict(),
            "scaler": scaler,
            "recipe": run.recipe.to_dict(),
            "fingerprint": run.base.fingerprint,
            "seconds": run.watch.seconds(),
        },
    )
    with run.watch.stage("checkpoints"):
        processes.agreed(save)


def _restore(run: Run, checkpoints: Checkpoints) -> None:
    """Bring a run at step 0 to where its last whole checkpoint left it, if there is any.

    Raises:
        OutputError: The checkpoints are broken, or of another recipe or base.
    """
    saved = processes.agreed(lambda: checkpoints.load() if checkpoints.paths else None)
    if not saved:
        return
    tensors, optimizer, state = saved
    if not run.recipe.equals(state["recipe"]):
        raise OutputError(f"{checkpoints.folder}: its checkpoint is of another recipe; choose another --out")
    if state["fingerprint"] != run.base.fingerprint:
        raise OutputError(f"{checkpoints.folder}: its checkpoint is of a base with other weights; choose another --out")
    prefix = f"{run.base.prefix}."
    run.base.load_adapter_state({k: v for k, v in tensors.items() if k.startswith(prefix)})
    run.optimizer.load_state_dict(optimizer)
    run.schedule.load_state_dict(state["schedule"])
    if run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(state["scaler"])

    def part(name: str) -> dict[str, Tensor]:
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        return {k: v.to(run.base.device) for k, v in own.items()}

    run.banks = {name: Bank(**fields) for name in ("erase", "preserve") if (fields := part(name))}
    if run.recipe.robust:
        run.conditions = Condition.cat([run.conditions, Condition(part("found"))])
    run.losses.copy_(tensors["losses"])
    run.step, run.passes = state["step"], state["passes"]
    run.watch.go_on(state.get("seconds", {}))  # earlier versions did not tell


def _provenance(recipe: Recipe, base: Base, *, passes: int = 0, losses: Tensor | None = None) -> dict[str, Any]:
    """What the patch tells about itself; nothing that differs between two runs of one recipe."""
    last = math.nan if losses is None else losses[-CHECK_EVERY:].mean().item()
    return {
        "recipe": recipe.to_dict(),
        "base": {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
        "versions": versions(),
        "cost": {"forward_passes": passes},
        "loss": None if math.isnan(last) else last,
    }


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on."""
    return {p: importlib.metadata.version(p) for p in PACKAGES}


def _csv(losses: Tensor) -> bytes:
    """The loss of every step as a table."""
    return "\n".join(["step,loss", *(f"{i},{v:.6g}" for i, v in enumerate(losses.tolist(), 1)), ""]).encode()


def _cost(watch: Stopwatch) -> bytes:
    """What the run cost on this machine, as YAML: seconds by stage, and memory.

    Of a run that was resumed, the seconds are those of all its parts, each up to the checkpoint that the next went on from.
    `over_floor` is the whole over the student's forward and backward passes, which nothing can do without.
    """
    seconds = watch.seconds()
    told: dict[str, Any] = {"seconds": {name: round(value, 3) for name, value in seconds.items()}}
    if seconds.get("student"):
        told["over_floor"] = round(seconds["total"] / seconds["student"], 3)
    if watch.device.type == "cuda":
        told["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(watch.device) / 1e6)
    elif sys.platform != "win32":  # which has no such counter
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        told["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)
    return yaml.safe_dump(told, sort_keys=False).encode()


def read_cost(folder: Path) -> dict[str, Any]:
    """What the run in this folder took: seconds by stage, `over_floor`, peak memory."""
    told: dict[str, Any] = yaml.safe_load((folder / COST).read_text(encoding="utf-8"))
    return told
