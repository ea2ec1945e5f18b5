"""A run that is killed at any moment goes on to the same patch, and no two runs write into one folder.

Children are forked from this process, which has the libraries and the base loaded, and are killed by SIGKILL.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RecipeOf

from esd_lora.bases import Base
from esd_lora.errors import OutputError
from esd_lora.folder import LOCK, locked
from esd_lora.patch import FILE_NAME
from esd_lora.training import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

KILLS = 50


def child(work: Callable[[], object]) -> int:
    """A process that does this and ends with 0, or shows its error and ends with 1."""
    process = os.fork()
    if not process:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def ended(process: int, *, within: float) -> bool:
    """Whether the process ends by itself before it is killed; it must not end with an error."""
    until, status = time.monotonic() + within, None
    while status is None and time.monotonic() < until:
        found, code = os.waitpid(process, os.WNOHANG)
        status = code if found else None
        time.sleep(0.001)
    if status is None:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), "the run failed; its error is above"
    return status == 0


@pytest.mark.parametrize("x_t", ["base", "edited"])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_patch_bit_for_bit(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, x_t: str
) -> None:
    recipe = recipe_of(x_t=x_t, refresh_every=3, steps=7, lr=0.02, checkpoint_every=1)
    started = time.monotonic()
    train(recipe, base, out=tmp_path / "whole")
    duration = time.monotonic() - started
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.name != "run.yaml"}
    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS // 2:
        out, done = tmp_path / str(runs), False
        while not done:
            done = ended(child(lambda: train(recipe, base, out=out, resume=True)), within=moments.uniform(0, duration))  # noqa: B023
            kills += not done
        runs += 1
        assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "run.yaml"} == whole


@pytest.mark.parametrize("name", ["recipe.yaml", "checkpoint-00002.safetensors", "loss.csv", "run.yaml", FILE_NAME])
def test_a_run_killed_while_it_writes_a_file_leaves_nothing_of_it(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = recipe_of(checkpoint_every=2)

    def struck() -> None:
        honest = os.fsync

        def fsync(descriptor: int) -> None:
            if f"/.{name}." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                os.kill(os.getpid(), signal.SIGKILL)
            honest(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        train(recipe, base, out=tmp_path / "run")

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("files are told by /proc")
    _, status = os.waitpid(child(struck), 0)
    assert status == signal.SIGKILL
    assert [p for p in (tmp_path / "run").iterdir() if p.is_dir()]  # half a file is there
    assert not (tmp_path / "run" / name).exists()
    train(recipe, base, out=tmp_path / "run", resume=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["loss.csv", FILE_NAME, "recipe.yaml", "run.yaml"]


@pytest.mark.parametrize("settings", [{}, {"objective": "closed-form"}], ids=str)
def test_a_folder_in_use_is_refused_and_one_of_a_dead_process_is_not(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, settings: dict[str, str]
) -> None:
    def hold() -> None:
        with locked(tmp_path / "run"):
            ready.touch()
            time.sleep(60)

    ready, recipe = tmp_path / "ready", recipe_of(**settings)
    process = child(hold)
    while not ready.exists():
        time.sleep(0.01)
    try:
        for resume in (False, True):
            with pytest.raises(OutputError) as caught:
                train(recipe, base, out=tmp_path / "run", resume=resume)
            assert str(caught.value) == (
                f"{tmp_path}/run: another run is writing to it; wait for its end, or choose another --out"
            )
        assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    train(recipe, base, out=tmp_path / "run")
    assert LOCK not in {p.name for p in (tmp_path / "run").iterdir()}


def test_a_folder_is_free_again_after_its_run(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "new" / "run"), pytest.raises(OutputError, match="another run"):  # noqa: SIM117
            with locked(tmp_path / "new" / "run"):
                pytest.fail("two at once")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_one_line(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    honest = os.open

    def refused(path: str, flags: int, *rest: int, **how: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(code, os.strerror(code), path)
        return honest(path, flags, *rest, **how)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OutputError) as caught:
        train(recipe_of(), base, out=tmp_path / "new" / "run")
    assert str(caught.value) == f"{tmp_path}/new/run: cannot write: {os.strerror(code)}"
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
