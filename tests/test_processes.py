"""Several processes make the patch of one: they share trajectories and batches, and the main one alone writes.

Each is forked from this process, which has the libraries loaded, and meets the others through gloo on the CPU.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeOf
from test_training import FINISHED, checkpoint, losses_in, names_in

from esd_lora import processes, training
from esd_lora.bases import Base
from esd_lora.errors import OutputError, RecipeError
from esd_lora.folder import shared
from esd_lora.patch import Patch, load_patch, write_file
from esd_lora.training import train
from esd_lora.trajectories import Bank

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def launch(work: Callable[[int], object], *, n: int = 2, seconds: int = 60) -> list[int]:
    """The exit codes of n processes that do this, launched as by torchrun; an error is shown and gives code 1.

    After so many seconds they are killed, for they may wait for each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    forked = []
    for rank in range(n):
        process = os.fork()
        if not process:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
                work(rank)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        forked.append(process)
    alarm = threading.Timer(seconds, lambda: [os.kill(process, signal.SIGKILL) for process in forked])
    alarm.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in forked]
    alarm.cancel()
    return codes


def distance(left: Patch, right: Patch) -> float:
    """‖left − right‖ / ‖right‖ over all of lora_B."""
    names = [k for k in right.tensors if ".lora_B." in k]
    x, y = (torch.cat([p.tensors[k].flatten() for k in names]) for p in (left, right))
    return ((x - y).norm() / y.norm()).item()


ROUNDING = 1e-3
"""How far the patch of several processes may be from that of one. Sums of float32 in another order differ by 1e-7; AdamW
divides a gradient by its size and so enlarges that where gradients are small: 1e-6 and, with self-attention, 3e-4 were seen."""


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (2, {"batch_size": 3, "trajectories": 3, "init": "differences"}),  # shares of different sizes
        (2, {"x_t": "edited", "refresh_every": 3, "layers": "full", "preserve_weight": 0}),  # one trajectory for two
        (3, {"keys": "closed-form", "objective": "paper", "batch_size": 4}),
        (2, {"objective": "closed-form"}),
    ],
    ids=str,
)
def test_several_processes_make_the_patch_of_one(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, n: int, settings: dict[str, Any]
) -> None:
    recipe = recipe_of(lr=0.02, eta=20, **settings)

    def work(rank: int) -> None:
        patch = train(recipe, base, out=tmp_path / "run")
        assert not base.adapter_parameters()
        patch.save(tmp_path / str(rank))

    assert launch(work, n=n) == [0] * n
    one = train(recipe, base, out=tmp_path / "one")
    assert names_in(tmp_path / "run") == names_in(tmp_path / "one")
    several = load_patch(tmp_path / "run")
    assert several.digest == load_patch(tmp_path / str(n - 1)).digest  # the same in all processes
    assert distance(several, one) < ROUNDING
    if recipe.objective != "closed-form":
        assert losses_in(tmp_path / "run") == pytest.approx(losses_in(tmp_path / "one"), rel=1e-4)


def test_the_bank_of_several_processes_is_that_of_one(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(trajectories=5, steps=1)
    honest, recorded = training._fill_banks, training.record
    asked: list[int] = []

    def spy(base: Base, conditions: Any, questions: Any, *rest: Any, **how: Any) -> Any:
        asked.append(len(questions))
        return recorded(base, conditions, questions, *rest, **how)

    def keep(run: training.Run) -> None:
        honest(run)
        torch.save([b.tensors() for b in run.banks.values()], tmp_path / f"{processes.count()}.pt")

    monkeypatch.setattr(training, "_fill_banks", keep)
    monkeypatch.setattr(training, "record", spy)

    def work(rank: int) -> None:
        train(recipe, base)
        assert asked == [3, 1]  # of five trajectories and of two to preserve

    assert launch(work) == [0, 0]
    train(recipe, base)
    for several, one in zip(*(torch.load(tmp_path / f"{n}.pt") for n in (2, 1)), strict=True):
        assert len(Bank(**several)) == len(Bank(**one))
        for name, rows in one.items():
            # batches of another size round otherwise, and a trajectory of three steps carries that on
            torch.testing.assert_close(several[name], rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank_told", [0, 1])
def test_a_run_of_several_processes_stops_in_all_and_goes_on_bit_for_bit(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, rank_told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(lr=0.02, lr_schedule="linear")
    honest = training._step

    def interrupted(rank: int) -> None:
        def step(run: training.Run) -> None:
            if run.step == 3 and rank == rank_told:  # a scheduler may tell one alone
                signal.raise_signal(signal.SIGTERM)
            honest(run)

        monkeypatch.setattr(training, "_step", step)
        train(recipe, base, out=tmp_path / "run")

    assert launch(interrupted) == [143, 143]
    assert names_in(tmp_path / "run") == [checkpoint(4), "recipe.yaml"]
    assert launch(lambda _: train(recipe, base, out=tmp_path / "run", resume=True)) == [0, 0]
    assert launch(lambda _: train(recipe, base, out=tmp_path / "whole")) == [0, 0]
    assert load_patch(tmp_path / "run").digest == load_patch(tmp_path / "whole").digest
    assert names_in(tmp_path / "run") == FINISHED
    assert launch(lambda _: train(recipe, base, out=tmp_path / "run", resume=True)) == [0, 0]  # finished


def test_the_main_process_alone_calls_back(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        told: list[str] = []
        train(
            recipe_of(sample_every=3),
            base,
            on_step=lambda *_: told.append("step"),
            on_sample=lambda *_: told.append("sample"),
            on_stage=lambda *_: told.append("stage"),
        )
        assert set(told) == ({"step", "sample", "stage"} if rank == 0 else set())

    assert launch(work) == [0, 0]


def test_what_goes_wrong_in_the_main_process_ends_all_with_its_error(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.name == "loss.csv":
            raise OutputError(f"{path}: cannot write: No space left on device")
        write_file(path, data)

    def work(rank: int) -> None:
        with pytest.raises(RecipeError, match=r"^batch_size: 1 cannot be shared by 2 processes; it must be 2 or more$"):
            train(recipe_of(batch_size=1), base)
        with pytest.raises(OutputError, match=r"photos: not empty, and holds no run; choose another --out$"):
            train(recipe_of(), base, out=tmp_path / "photos")
        if rank == 0:  # another process may have another disk
            monkeypatch.setattr(training, "write_file", full)
        with pytest.raises(OutputError, match="No space left on device"):
            train(recipe_of(), base, out=tmp_path / "run")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"mine")
    assert launch(work) == [0, 0]


def test_what_goes_wrong_in_one_process_ends_all() -> None:
    def work(rank: int) -> None:
        processes.join(torch.device("cpu"))
        assert processes.each(lambda: rank) == rank

        def full() -> None:
            if rank == 1:
                raise OutputError("no space left")

        with pytest.raises(OutputError, match="no space left"):
            processes.each(full)
        processes.each(lambda: 1 // (1 - rank))  # an error that is not ours: the other one hears of it from gloo

    assert launch(work) == [1, 1]


def test_processes_that_see_other_folders_have_none(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        processes.join(torch.device("cpu"))
        with shared(tmp_path / "one"):
            pass
        with (
            pytest.raises(
                OutputError, match=r"not the same folder for all processes; choose one that all machines share"
            ),
            shared(tmp_path / str(rank)),
        ):
            raise AssertionError("each has one of its own")

    assert launch(work) == [0, 0]
    assert not list(tmp_path.iterdir())
