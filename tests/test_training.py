"""Training: the base stays, the loss falls, a run is repeatable and can be interrupted, and failures leave no mess."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RecipeOf, same, wake, weights_of
from tiny import tiny_pipeline
from torch import Tensor

from esd_lora import training
from esd_lora.bases import Base, load_base
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.checkpoint import Checkpoints
from esd_lora.compose import attach
from esd_lora.errors import BaseModelError, OutputError, RecipeError, TrainingError
from esd_lora.patch import FILE_NAME, Patch, load_patch
from esd_lora.recipe import Recipe, load_recipe
from esd_lora.training import read_cost, train
from esd_lora.trajectories import Question, questions_of, record

FINISHED = ["loss.csv", FILE_NAME, "recipe.yaml", "run.yaml"]


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def checkpoint(step: int) -> str:
    return f"checkpoint-{step:05d}.safetensors"


def stop_at(step: int, by: int = signal.SIGINT) -> Callable[[int, float | None], None]:
    """Ctrl-C, or another signal, at this step."""

    def on_step(done: int, loss: float | None) -> None:
        if done == step:
            signal.raise_signal(by)

    return on_step


def break_at(step: int) -> Callable[[int, float | None], None]:
    """An error of the caller's own at this step."""

    def on_step(done: int, loss: float | None) -> None:
        if done == step:
            raise ZeroDivisionError

    return on_step


def losses_in(folder: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]


def held_out_error(base: Base, patch: Patch | None, recipe: Recipe, questions: list[Question]) -> float:
    """Mean squared distance of the student from its targets, on trajectories that were never trained on."""
    attach(base, [])
    conditions = base.encode(questions_of(recipe)[0])
    bank, _ = record(base, conditions, questions, range(900, 900 + len(questions)), steps=3, guidance_scale=3.0)
    attach(base, [patch] if patch else [])
    with torch.no_grad():
        error = (base.predict(bank.x, bank.t, conditions[bank.s]) - bank.target).square().mean().item()
    attach(base, [])
    return error


# ---- what a run does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"x_t": "edited", "refresh_every": 2, "layers": "full"}], ids=str)
def test_training_leaves_the_base_as_it_was(base: Base, recipe_of: RecipeOf, settings: dict[str, Any]) -> None:
    before = weights_of(base)
    train(recipe_of(lr=0.05, **settings), base)
    assert same(weights_of(base), before)
    assert not any(p.requires_grad for p in base.denoiser.parameters())


LESS = 0.92
"""How far the error on trajectories never trained on has to fall: a random network can be taught little (0.78 to 0.87 were
measured); without training, or trained towards anything else, the error stays or grows."""


def test_the_loss_falls_and_the_patch_generalises_to_other_seeds(
    base: Base, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = recipe_of(steps=30, lr=0.02, eta=20, preserve_weight=0, batch_size=3)  # each step sees the whole bank
    patch = train(recipe, base, out=tmp_path / "run")
    losses = losses_in(tmp_path / "run")
    assert len(losses) == 30
    assert losses[-1] < 0.75 * losses[0]
    erase = questions_of(recipe)[1]
    assert held_out_error(base, patch, recipe, erase) < LESS * held_out_error(base, None, recipe, erase)


def test_the_first_loss_is_the_distance_of_the_bare_base_from_its_target(
    base: Base, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = recipe_of(steps=1, eta=20, preserve_weight=3, preserve=["dog"], batch_size=3)
    train(recipe, base, out=tmp_path / "run")
    prompts, erase, _ = questions_of(recipe)
    conditions = base.encode(prompts)
    seed = training._seed(0, 1)
    bank, _ = record(base, conditions, erase, [seed], steps=3, guidance_scale=3.0)
    with torch.no_grad():
        expected = (base.predict(bank.x, bank.t, conditions[bank.s]) - bank.target).square().mean().item()
    # lora_B is zero, so the preserving half adds nothing; six digits in the file, and batches of another size
    assert losses_in(tmp_path / "run") == [pytest.approx(expected, rel=1e-4)]


def test_every_example_is_used_once_before_any_is_used_again(recipe_of: RecipeOf) -> None:
    recipe = recipe_of(batch_size=4)
    order = torch.cat([training._rows(6, step, recipe, 0) for step in range(6)]).reshape(4, 6).tolist()
    assert [sorted(epoch) for epoch in order] == [[0, 1, 2, 3, 4, 5]] * 4
    assert len({tuple(epoch) for epoch in order}) > 1
    assert training._rows(6, 1, recipe, 0).tolist() == (order[0] + order[1])[4:8]  # from the step alone
    assert training._rows(6, 0, recipe, 1).tolist() != order[0][:4]


def test_a_run_leaves_patch_recipe_and_records(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(preserve=None, steps=2)
    patch = train(recipe, base, out=tmp_path / "new" / "run")
    folder = tmp_path / "new" / "run"
    assert names_in(folder) == FINISHED
    written = load_recipe(folder / "recipe.yaml")
    assert written == training.resolve(recipe)
    assert "a dog" in (written.preserve or ())  # the default list is written out
    assert same(load_patch(folder).tensors, patch.tensors)
    cost = yaml.safe_load((folder / "run.yaml").read_text())
    *stages, total = cost["seconds"].values()
    assert list(cost["seconds"]) == ["prompts", "trajectories", "student", "other", "total"]
    assert sum(stages) == pytest.approx(total, abs=0.01)  # rounded to milliseconds
    assert min(stages) >= 0
    assert cost["over_floor"] == pytest.approx(total / cost["seconds"]["student"], rel=0.1)
    assert cost["peak_memory_mb"] > 50


def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    base: Base, tiny_folder: Path, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    torch.manual_seed(5)  # whatever happened before
    train(recipe_of(), base, out=tmp_path / "a")
    train(recipe_of(), base, out=tmp_path / "b")  # the same base again
    train(recipe_of(), load_base(str(tiny_folder), device="cpu"), out=tmp_path / "c")
    other = train(recipe_of(seed=2**62), base)
    first = (tmp_path / "a" / FILE_NAME).read_bytes()
    assert (tmp_path / "b" / FILE_NAME).read_bytes() == first
    assert (tmp_path / "c" / FILE_NAME).read_bytes() == first
    patch = load_patch(tmp_path / "a")
    assert all(not torch.equal(other.tensors[k], v) for k, v in patch.tensors.items())


def test_preservation_keeps_what_is_preserved(base: Base, recipe_of: RecipeOf) -> None:
    drift = {}
    for weight in (0.0, 10.0):
        recipe = recipe_of(steps=15, lr=0.02, eta=20, preserve=["dog"], preserve_weight=weight)
        patch = train(recipe, base)
        kept = recipe_of(preserve=["dog"])
        drift[weight] = held_out_error(base, patch, kept, questions_of(kept)[2])
    assert drift[10.0] < drift[0.0] / 2
    assert drift[0.0] > 1e-6


def test_what_is_preserved_stays_beside_the_concept(base: Base, recipe_of: RecipeOf) -> None:
    error = {}
    for beside in (False, True):
        recipe = recipe_of(steps=30, lr=0.02, eta=20, preserve=["dog"], preserve_weight=10.0, preserve_beside=beside)
        patch = train(recipe, base)
        asked = recipe_of(preserve=["dog"], preserve_beside=True)
        (dog,) = questions_of(asked)[2]
        assert dog.beside
        error[beside] = held_out_error(base, patch, asked, [Question(s=dog.beside, c=dog.s, a=dog.s, eta=0.0)])
    assert error[True] < error[False] / 2


def test_several_concepts_are_erased_by_one_patch(base: Base, recipe_of: RecipeOf) -> None:
    concepts = ["cat", {"erase": "hat", "from": "a long-winded cowboy"}]
    recipe = recipe_of(concepts=concepts, steps=20, lr=0.02, eta=20, preserve_weight=0, batch_size=6)
    patch = train(recipe, base)
    for question in questions_of(recipe)[1]:
        error, bare = (held_out_error(base, p, recipe, [question]) for p in (patch, None))
        assert error < LESS * bare


def test_gradients_are_clipped(base: Base, recipe_of: RecipeOf) -> None:
    # AdamW divides a gradient by its size, unless that is far below its epsilon of 1e-8: then a step is lr · 1e-4 at most
    clipped = train(recipe_of(lr=1.0, max_grad_norm=1e-12), base)
    free = train(recipe_of(lr=1.0), base)

    def largest(patch: Patch) -> float:
        return max(v.abs().max().item() for k, v in patch.tensors.items() if ".lora_B." in k)

    assert 0 < largest(clipped) <= 6e-4
    assert largest(free) > 0.1


def test_the_learning_rate_follows_its_schedule(base: Base, recipe_of: RecipeOf) -> None:
    def moved(**settings: Any) -> Tensor:
        patch = train(recipe_of(preserve_weight=0, steps=1, **settings), base)
        return torch.cat([v.flatten() for k, v in patch.tensors.items() if ".lora_B." in k])

    # AdamW's first step is lr · sign(gradient), but for gradients near its epsilon
    assert moved(lr=0.01, lr_schedule="constant").abs().max().item() == pytest.approx(0.01, rel=1e-2)
    # the first of two warm-up steps has a rate of zero
    assert moved(lr=0.01, lr_schedule="constant_with_warmup", warmup_steps=2).abs().max() == 0


def test_gradient_checkpointing_gives_the_same_patch(base: Base, recipe_of: RecipeOf) -> None:
    used = []
    plain = train(recipe_of(), base, on_step=lambda *_: used.append(base.denoiser.is_gradient_checkpointing))
    saved = train(
        recipe_of(gradient_checkpointing=True),
        base,
        on_step=lambda *_: used.append(base.denoiser.is_gradient_checkpointing),
    )
    assert used == [False] * 6 + [True] * 6
    assert same(saved.tensors, plain.tensors)  # the same operations run again give the same bits
    train(recipe_of(steps=1), base)
    assert not base.denoiser.is_gradient_checkpointing


def test_a_bf16_base_is_trained_with_float32_adapters(tiny_folder: Path, recipe_of: RecipeOf, base: Base) -> None:
    half = load_base(str(tiny_folder), device="cpu", dtype="bf16")
    patch = train(recipe_of(dtype="bf16", eta=20), half)
    assert {t.dtype for t in patch.tensors.values()} == {torch.float32}
    assert half.dtype == torch.bfloat16
    # eight bits of mantissa in the network: the loss of 6 steps agrees within some percent
    assert patch.info["loss"] == pytest.approx(train(recipe_of(eta=20), base).info["loss"], rel=0.1)
    assert any(v.any() for k, v in patch.tensors.items() if ".lora_B." in k)


def test_losses_are_told_now_and_then_and_samples_are_asked_for(base: Base, recipe_of: RecipeOf) -> None:
    told: list[tuple[int, bool]] = []
    samples: list[tuple[int, int]] = []
    train(
        recipe_of(steps=12, sample_every=5),
        base,
        on_step=lambda step, loss: told.append((step, loss is not None)),
        on_sample=lambda step: samples.append((step, len(base.adapter_parameters()))),
    )
    assert told == [(s, s in (10, 12)) for s in range(1, 13)]
    assert samples == [(5, 32), (10, 32)]  # with the adapters on


def test_a_v_prediction_base_is_trained_too(recipe_of: RecipeOf) -> None:
    base = StableDiffusionBase(tiny_pipeline(prediction_type="v_prediction"), name="v")
    recipe = recipe_of(steps=30, lr=0.02, eta=20, preserve_weight=0, batch_size=3)
    patch = train(recipe, base)
    erase = questions_of(recipe)[1]
    assert held_out_error(base, patch, recipe, erase) < LESS * held_out_error(base, None, recipe, erase)


def test_losses_are_logged_for_tensorboard(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    if not importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe_of(steps=12, log_with="tensorboard"), base, out=tmp_path / "run")
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    found = EventAccumulator(str(events)).Reload()
    assert [e.step for e in found.Scalars("loss")] == [10, 12]
    assert found.Scalars("loss")[1].value == pytest.approx(losses_in(tmp_path / "run")[11], rel=1e-4)  # six digits


# ---- interrupted runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 6, 7])  # between two refreshes, at one, and one before the end
@pytest.mark.parametrize(
    "settings",
    [
        {"x_t": "base", "lr_schedule": "cosine", "warmup_steps": 2},
        {"x_t": "edited", "refresh_every": 3, "lr_schedule": "linear"},
    ],
    ids=["base", "edited"],
)
def test_a_resumed_run_gives_the_patch_of_an_uninterrupted_one_bit_for_bit(
    base: Base, tiny_folder: Path, recipe_of: RecipeOf, tmp_path: Path, settings: dict[str, Any], step: int
) -> None:
    recipe = recipe_of(steps=8, lr=0.02, **settings)
    whole = train(recipe, base, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, base, out=tmp_path / "parts", on_step=stop_at(step))
    assert names_in(tmp_path / "parts") == [checkpoint(step), "recipe.yaml"]
    assert not base.adapter_parameters()  # taken off
    steps: list[int] = []
    torch.manual_seed(99)
    resumed = train(
        recipe,
        load_base(str(tiny_folder), device="cpu"),  # as in a new process
        out=tmp_path / "parts",
        resume=True,
        on_step=lambda done, _: steps.append(done),
    )
    assert steps == list(range(step + 1, 9))
    assert same(resumed.tensors, whole.tensors)
    assert names_in(tmp_path / "parts") == FINISHED
    for name in (FILE_NAME, "loss.csv", "recipe.yaml"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_told_to_stop_amid_recording_stops_there_and_goes_on_bit_for_bit(
    base: Base, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = recipe_of(x_t="edited", refresh_every=3, preserve_weight=0, lr=0.02)
    told: list[int] = []

    def on_stage(name: str, done: int, of: int) -> None:
        told.append(done)
        if len(told) == 4:  # the first denoising step of the second recording
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        train(recipe, base, out=tmp_path / "run", on_stage=on_stage)
    assert (caught.value.code, told) == (143, [1, 2, 3, 1])
    assert names_in(tmp_path / "run") == [checkpoint(3), "recipe.yaml"]
    resumed = train(recipe, base, out=tmp_path / "run", resume=True)
    whole = train(recipe, base)
    assert same(resumed.tensors, whole.tensors)
    assert resumed.info == whole.info  # nothing is counted twice


def test_a_second_signal_is_not_waited_with(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    def on_step(step: int, _: float | None) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(recipe_of(), base, out=tmp_path / "run", on_step=on_step)
    assert names_in(tmp_path / "run") == ["recipe.yaml"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_told_to_stop_in_another_thread_is_left_to_its_caller(base: Base, recipe_of: RecipeOf) -> None:
    with ThreadPoolExecutor(1) as pool:  # where Python lets nobody handle signals
        assert pool.submit(train, recipe_of(), base).result().tensors


def test_a_run_that_broke_goes_on_from_its_last_checkpoint(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint_every=1)
    with pytest.raises(ZeroDivisionError):
        train(recipe, base, out=tmp_path / "run", on_step=break_at(5))
    assert names_in(tmp_path / "run") == [checkpoint(4), checkpoint(5), "recipe.yaml"]  # the last two are kept
    assert same(train(recipe, base, out=tmp_path / "run", resume=True).tensors, train(recipe, base).tensors)


def test_a_resumed_run_tells_the_seconds_of_all_its_parts(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe, out = recipe_of(checkpoint_every=1), tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(recipe, base, out=out, on_step=break_at(5))
    first = Checkpoints(out).load().state["seconds"]
    started = time.perf_counter()
    train(recipe, base, out=out, resume=True)
    rest, told = time.perf_counter() - started, read_cost(out)["seconds"]
    assert first["total"] < told["total"] <= first["total"] + rest + 1e-3  # which are told to the millisecond
    assert told["trajectories"] >= first["trajectories"] - 1e-3  # recorded in the first part alone
    assert sum(v for k, v in told.items() if k != "total") == pytest.approx(told["total"], abs=0.01)


def test_a_run_that_broke_off_before_its_first_checkpoint_starts_again(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = training.record
    monkeypatch.setattr(training, "record", lambda *_, **__: break_at(0)(0, None))
    with pytest.raises(ZeroDivisionError):
        train(recipe_of(), base, out=tmp_path / "run")
    monkeypatch.setattr(training, "record", honest)
    assert names_in(tmp_path / "run") == ["recipe.yaml"]
    with pytest.raises(OutputError, match="holds a run that broke off; go on with it by --resume"):
        train(recipe_of(), base, out=tmp_path / "run")
    with pytest.raises(OutputError, match="another recipe"):
        train(recipe_of(rank=3), base, out=tmp_path / "run", resume=True)
    assert same(train(recipe_of(), base, out=tmp_path / "run", resume=True).tensors, train(recipe_of(), base).tensors)


def test_a_run_of_a_version_that_knew_fewer_keys_is_gone_on_with(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, honest = recipe_of(steps=4, checkpoint_every=2), tmp_path / "run", Recipe.to_dict
    with monkeypatch.context() as earlier:
        earlier.setattr(Recipe, "to_dict", lambda self: {k: v for k, v in honest(self).items() if k != "robust"})
        with pytest.raises(KeyboardInterrupt):
            train(recipe, base, out=out, on_step=stop_at(3))
    assert "robust" not in (out / "recipe.yaml").read_text()
    finished = train(recipe, base, out=out, resume=True)
    assert same(finished.tensors, train(recipe, base).tensors)
    (out / "recipe.yaml").write_text("base: [")
    with pytest.raises(OutputError, match="another recipe"):
        train(recipe, base, out=out, resume=True)


def test_a_finished_run_is_not_taken_for_that_of_another_base(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    train(recipe_of(), base, out=tmp_path / "run")
    base.fingerprint = "0" * 64  # as after an update of the base's weights
    with pytest.raises(OutputError, match=r"holds a patch of another recipe or base; choose another --out$"):
        train(recipe_of(), base, out=tmp_path / "run", resume=True)


def test_a_patch_put_into_a_broken_run_is_not_taken_for_its_own(
    base: Base, recipe_of: RecipeOf, patch: Patch, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe_of(checkpoint_every=2), base, out=tmp_path / "run", on_step=stop_at(3))
    patch.save(tmp_path / "run")
    with pytest.raises(OutputError, match=r"holds a patch of another recipe or base"):
        train(recipe_of(checkpoint_every=2), base, out=tmp_path / "run", resume=True)


def test_a_run_killed_after_its_patch_leaves_no_checkpoint_for_ever(
    base: Base, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    train(recipe_of(), base, out=tmp_path / "run")
    (tmp_path / "run" / checkpoint(6)).write_bytes(b"left by a kill")
    train(recipe_of(), base, out=tmp_path / "run", resume=True)
    assert names_in(tmp_path / "run") == FINISHED


def test_a_base_in_another_precision_than_the_recipes_is_refused(base: Base, recipe_of: RecipeOf) -> None:
    with pytest.raises(RecipeError, match=r"^dtype: the recipe says bf16, and the base is loaded in torch.float32$"):
        train(recipe_of(dtype="bf16"), base)


def test_resuming_a_finished_run_returns_its_patch_without_training(
    base: Base, patch: Patch, patch_folder: Path, recipe_of: RecipeOf
) -> None:
    before = {p.name: p.read_bytes() for p in patch_folder.iterdir()}
    steps: list[int] = []
    again = train(
        recipe_of(lr=0.05, max_grad_norm=1e3),
        base,
        out=patch_folder,
        resume=True,
        on_step=lambda done, _: steps.append(done),
    )
    assert same(again.tensors, patch.tensors)
    assert steps == []
    assert {p.name: p.read_bytes() for p in patch_folder.iterdir()} == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    base: Base, patch_folder: Path, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in patch_folder.iterdir()}
    with pytest.raises(OutputError) as caught:
        train(recipe_of(lr=0.05, max_grad_norm=1e3), base, out=patch_folder)
    assert str(caught.value) == (
        f"{patch_folder}: holds another run; choose another --out, or go on with it by --resume"
    )
    with pytest.raises(OutputError) as caught:
        train(recipe_of(seed=1), base, out=patch_folder, resume=True)
    assert str(caught.value) == (
        f"{patch_folder}: holds a run of another recipe, which this one cannot resume; choose another --out"
    )
    assert {p.name: p.read_bytes() for p in patch_folder.iterdir()} == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"mine")
    for resume in (False, True):
        with pytest.raises(OutputError) as caught:
            train(recipe_of(), base, out=tmp_path / "photos", resume=resume)
        assert str(caught.value) == f"{tmp_path}/photos: not empty, and holds no run; choose another --out"
    assert names_in(tmp_path / "photos") == ["cat.png"]


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(1, 100))
    honest = training.esd_loss

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        return honest(*args, **kwargs) * (torch.nan if next(steps) == 5 else 1.0)

    monkeypatch.setattr(training, "esd_loss", loss)
    with pytest.raises(TrainingError) as caught:
        train(recipe_of(steps=20, checkpoint_every=2, lr=0.001), base, out=tmp_path / "run")
    assert str(caught.value) == (
        "the loss was nan at step 5: in another --out try a lower lr (now 0.001), warmup_steps, or dtype fp32 or bf16"
        "; the checkpoint of step 4 is kept"
    )
    assert names_in(tmp_path / "run") == [checkpoint(2), checkpoint(4), "recipe.yaml"]
    tensors, _, state = Checkpoints(tmp_path / "run").load()
    assert state["step"] == 4
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert not base.adapter_parameters()


def test_a_learning_rate_that_is_far_too_high_ends_the_run_at_its_step(base: Base, recipe_of: RecipeOf) -> None:
    with pytest.raises(
        TrainingError, match=r"^the loss was (nan|inf) at step 2: in another --out try a lower lr \(now 1e\+30\)"
    ) as caught:
        train(recipe_of(lr=1e30, lr_schedule="constant"), base)
    assert "kept" not in str(caught.value)


def test_running_out_of_memory_is_one_line_and_keeps_the_last_checkpoint(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = training._step

    def step(run: training.Run) -> None:
        if run.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …\nmany lines")
        honest(run)

    monkeypatch.setattr(training, "_step", step)
    with pytest.raises(TrainingError, match=r"^out of memory: try gradient_checkpointing, a smaller batch_size, or"):
        train(recipe_of(checkpoint_every=2), base, out=tmp_path / "run")
    assert names_in(tmp_path / "run") == [checkpoint(2), "recipe.yaml"]
    assert not base.adapter_parameters()


def test_an_interrupt_does_not_save_what_is_no_number(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(lr=1e30, lr_schedule="constant")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, base, out=tmp_path / "run", on_step=stop_at(4))  # nobody has looked yet
    assert names_in(tmp_path / "run") == ["recipe.yaml"]


def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 2  # the recipe and the first checkpoint

    def fsync(_: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recipe = recipe_of(checkpoint_every=2)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError) as caught:
        train(recipe, base, out=tmp_path / "run")
    assert str(caught.value) == f"{tmp_path}/run/{checkpoint(4)}: cannot write: No space left on device"
    monkeypatch.undo()  # room again
    assert names_in(tmp_path / "run") == [checkpoint(2), "recipe.yaml"]
    assert same(train(recipe, base, out=tmp_path / "run", resume=True).tensors, train(recipe, base).tensors)


def test_a_disk_that_is_full_from_the_start_is_named_before_training(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="No space left on device"):
        train(recipe_of(), base, out=tmp_path / "new" / "run", on_step=lambda *_: pytest.fail("it trained"))
    assert names_in(tmp_path) == []
    assert not base.adapter_parameters()


def test_a_folder_that_cannot_be_made_is_named_before_training(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out, wrong in (
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "file" / "below", "cannot write: Not a directory"),
    ):
        with pytest.raises(OutputError, match=f"^{re.escape(f'{out}: {wrong}')}$"):
            train(recipe_of(), base, out=out, on_step=lambda *_: pytest.fail("it trained"))
    assert (tmp_path / "file").read_bytes() == b""


def test_what_the_base_cannot_do_is_refused_and_leaves_no_folder(
    base: Base, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="rank: must be at most 32"):
        train(recipe_of(rank=33), base, out=tmp_path / "run")
    plain = StableDiffusionBase(tiny_pipeline(cross_attention=False), name="plain")
    with pytest.raises(BaseModelError, match="match nothing"):
        train(recipe_of(), plain, out=tmp_path / "run")
    assert names_in(tmp_path) == []


def test_what_this_machine_cannot_do_is_refused_and_leaves_no_folder(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"^dtype: fp16 cannot be trained on a CPU; try bf16$"):
        train(recipe_of(dtype="fp16"), base, out=tmp_path / "run")
    with pytest.raises(RecipeError, match=r"^log_with: tensorboard needs an output folder$"):
        train(recipe_of(log_with="tensorboard"), base)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"needs its package: pip install esd_lora\[wandb\]$"):
        train(recipe_of(log_with="wandb"), base, out=tmp_path / "run")
    assert names_in(tmp_path) == []


def test_a_run_that_breaks_off_while_its_last_files_are_written_can_go_on(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, honest = recipe_of(checkpoint_every=2), training.write_file

    def full(path: Path, data: bytes) -> None:
        if path.name == "run.yaml":
            raise OutputError(f"{path}: cannot write: No space left on device")
        honest(path, data)

    monkeypatch.setattr(training, "write_file", full)
    with pytest.raises(OutputError):
        train(recipe, base, out=tmp_path / "run")
    monkeypatch.undo()
    assert same(train(recipe, base, out=tmp_path / "run", resume=True).tensors, train(recipe, base).tensors)
    assert names_in(tmp_path / "run") == ["loss.csv", FILE_NAME, "recipe.yaml", "run.yaml"]


def test_adapters_that_were_on_do_not_train_along(base: Base, recipe_of: RecipeOf) -> None:
    expected = train(recipe_of(), base)
    base.add_adapter(layers="full", rank=3, name="old")
    wake(base)
    assert same(train(recipe_of(), base).tensors, expected.tensors)


def test_own_trajectories_are_recorded_anew_from_other_noise_and_preserved_ones_once(
    base: Base, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, tuple[int, ...]]] = []
    honest = training.record

    def spy(base: Base, conditions: Any, questions: Any, seeds: Any, **how: Any) -> Any:
        calls.append((how["edited"], tuple(seeds)))
        return honest(base, conditions, questions, seeds, **how)

    monkeypatch.setattr(training, "record", spy)
    train(recipe_of(x_t="edited", refresh_every=3, steps=7, trajectories=2), base)
    assert [(edited, len(seeds)) for edited, seeds in calls] == [(True, 2), (False, 2), (True, 2), (True, 2)]
    assert len({s for _, seeds in calls for s in seeds}) == 8
    calls.clear()
    train(recipe_of(refresh_every=3, steps=7, trajectories=2), base)
    assert [(edited, len(seeds)) for edited, seeds in calls] == [(False, 2), (False, 2)]


def test_a_heavier_preservation_keeps_more(base: Base, recipe_of: RecipeOf) -> None:
    kept = recipe_of(preserve=["dog"])
    drift = []
    for weight in (0.01, 100.0):
        patch = train(recipe_of(steps=15, lr=0.02, eta=20, preserve=["dog"], preserve_weight=weight), base)
        drift.append(held_out_error(base, patch, kept, questions_of(kept)[2]))
    assert drift[1] < drift[0] / 2
