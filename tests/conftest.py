"""What the tests share: no network, one thread, a tiny random pipeline on the disk and a patch trained on it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: threads of several workers wait for each other
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = os.environ["HF_HUB_VERBOSITY"] = "error"

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_checked, save_clip, save_tiny
from torch import Tensor

from esd_lora import cli
from esd_lora.bases import Base, load_base
from esd_lora.patch import Patch
from esd_lora.recipe import Recipe, make_recipe
from esd_lora.training import train


def pytest_configure(config: pytest.Config) -> None:
    # diffusers hands tensors to numpy in a way that numpy 2 will refuse one day
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")


RecipeOf = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test runs in a folder of its own, so that a relative path or a cache leaves nothing elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def checked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checked(tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def recipe_of(tiny_folder: Path) -> RecipeOf:
    """A recipe that trains in a tenth of a second; the arguments win."""

    def recipe(**values: Any) -> Recipe:
        short = {
            "base": str(tiny_folder),
            "concepts": "cat",
            "preserve": ["", "dog"],
            "rank": 2,
            "steps": 6,
            "batch_size": 2,
            "trajectories": 1,
            "trajectory_steps": 3,
        }
        return make_recipe({**short, **values})

    return recipe


@pytest.fixture(scope="session")
def patch_folder(tiny_folder: Path, recipe_of: RecipeOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of a patch that changes pictures visibly: its learning rate is high."""
    out = tmp_path_factory.mktemp("run") / "cat"
    train(recipe_of(lr=0.05, max_grad_norm=1e3), load_base(str(tiny_folder), device="cpu"), out=out)
    return out


@pytest.fixture(scope="session")
def patch(patch_folder: Path) -> Patch:
    from esd_lora.patch import load_patch

    return load_patch(patch_folder)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, types and bits."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def weights_of(base: Base) -> dict[str, Tensor]:
    """Copies of the denoiser's weights."""
    return {k: v.clone() for k, v in base.denoiser.state_dict().items()}


def wake(base: Base, seed: int = 1) -> None:
    """Give the adapters random values that change the predictions a lot."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in base.adapter_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Runs `esd-lora` with these arguments, in this process, which handles SIGTERM afterwards as it did before."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["esd-lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        code = caught.value.code
        return Result(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)
