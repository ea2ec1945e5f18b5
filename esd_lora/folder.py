"""The folder of a run: one process at a time writes to it, and only the run that began it goes on in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from esd_lora import processes
from esd_lora.bases.base import Base
from esd_lora.checkpoint import Checkpoints
from esd_lora.errors import OutputError, RecipeError
from esd_lora.patch import FILE_NAME, Patch, load_patch, unfinished
from esd_lora.recipe import Recipe, read_recipe

RECIPE = "recipe.yaml"
LOCK = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Inside, no other process has the folder; one that is made for this and stays empty is gone afterwards.

    The lock is the system's, on a file in the folder, and goes with the process that holds it, however it ends.

    Raises:
        OutputError: Another process has it, or the folder cannot be made or written to.
    """
    made = [p for p in (out, *out.parents) if not p.exists()]
    lock = FileLock(out / LOCK, timeout=0)
    if out.is_file():
        raise OutputError(f"{out}: is a file; name a folder")
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"{out}: another run is writing to it; wait for its end, or choose another --out"
            ) from None
        except OSError as error:
            raise OutputError(f"{out}: cannot write: {error.strerror or error}") from error
        try:
            yield
        finally:
            with suppress(OSError):  # on Windows a file in use stays
                (out / LOCK).unlink()
            lock.release()
    finally:
        for p in made:  # deepest first
            with suppress(OSError):
                p.rmdir()


@contextmanager
def shared(out: Path) -> Iterator[None]:
    """Inside, the processes of this run have the folder, and no other; see `locked`.

    Raises:
        OutputError: Another run has it, it cannot be made or written to, or not all of the processes see it.
    """

    def look() -> None:
        if not (out / LOCK).is_file():
            raise OutputError(f"{out}: not the same folder for all processes; choose one that all machines share")

    with ExitStack() as held:
        processes.agreed(lambda: held.enter_context(locked(out)))
        processes.each(look)
        yield


def finished_run(out: Path, recipe: Recipe, base: Base, *, resume: bool) -> Patch | None:
    """The patch of the same recipe and base, if `resume` finds it finished; otherwise the folder is free for this run.

    Args:
        out: A folder that this process has locked.
        recipe: The resolved recipe.
        base: The model.
        resume: Whether a run of this recipe may be in the folder.

    Raises:
        OutputError: It holds something else.
    """
    checkpoints, written, left = Checkpoints(out), out / RECIPE, unfinished(out)
    holds = (out / FILE_NAME).exists() or bool(checkpoints.paths)
    if not holds and not (resume and written.exists()):  # a run may have broken off before its first checkpoint
        if any(p for p in out.iterdir() if p.name != LOCK and p not in left):
            begun = written.exists() and "it holds a run that broke off; go on with it by --resume, or "
            raise OutputError(f"{out}: {begun or 'not empty, and holds no run; '}choose another --out")
    elif not resume:
        raise OutputError(f"{out}: holds another run; choose another --out, or go on with it by --resume")
    elif not _is_of(written, recipe):
        raise OutputError(f"{out}: holds a run of another recipe, which this one cannot resume; choose another --out")
    for part in left:
        shutil.rmtree(part)
    if not (out / FILE_NAME).exists():
        return None
    patch = load_patch(out)
    fingerprint = patch.info.get("base", {}).get("fingerprint")
    if not recipe.equals(patch.info.get("recipe")) or fingerprint != base.fingerprint:
        raise OutputError(f"{out}: holds a patch of another recipe or base; choose another --out")
    checkpoints.remove()  # the run was killed between the patch and this
    return patch


def _is_of(written: Path, recipe: Recipe) -> bool:
    """Whether this file is there and has the recipe."""
    try:
        return recipe.equals(read_recipe(written))
    except RecipeError:
        return False
