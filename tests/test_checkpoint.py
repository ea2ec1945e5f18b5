"""Checkpoints: a broken one is recognised whatever broke it, the one before it is used, and that is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esd_lora.checkpoint import Checkpoints
from esd_lora.errors import OutputError


def saved(folder: Path, *steps: int) -> Checkpoints:
    """Checkpoints of these steps, as of a run with one parameter that has been through a step of AdamW."""
    checkpoints = Checkpoints(folder)
    parameter = torch.nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([parameter])
    for step in steps:
        parameter.grad = torch.full((64,), float(step))
        optimizer.step()
        checkpoints.save(step, {"x": parameter}, optimizer=optimizer.state_dict(), state={"step": step})
    return checkpoints


def flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "something else": lambda _: b"not a checkpoint",
    "cut off": lambda data: data[:-10],
    "longer": lambda data: data + b"\0",
    "a bit of a tensor": flipped,
    "zeros of a lost block": lambda data: data[:-64] + bytes(64),
    "another number told": lambda data: data.replace(rb"{\"step\": 9}", rb"{\"step\": 8}"),
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tensors, optimizer, state = saved(tmp_path, 3).load()
    assert state == {"step": 3}
    assert (tensors["x"] < 1).all()
    assert not tensors["x"].requires_grad
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(64))])
    fresh.load_state_dict(optimizer)
    assert fresh.state_dict()["state"][0]["step"] == 1
    assert not torch.equal(fresh.state_dict()["state"][0]["exp_avg"], torch.zeros(64))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 8, 9, 100_000, 100_001)
    assert list(checkpoints.paths) == [100_001, 100_000]
    (tmp_path / "checkpoint-of-mine.safetensors").write_bytes(b"")
    checkpoints.remove()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-of-mine.safetensors"]


@pytest.mark.parametrize("how", BREAKS)
def test_of_a_broken_one_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    checkpoints = saved(tmp_path, 7, 9)
    path = tmp_path / "checkpoint-00009.safetensors"
    whole = path.read_bytes()
    path.write_bytes(BREAKS[how](whole))
    assert path.read_bytes() != whole
    with pytest.warns(UserWarning, match=rf"^{re.escape(str(path))}: a broken .*; going on from that of step 7$"):
        assert checkpoints.load().state == {"step": 7}


@pytest.mark.parametrize(("steps", "what"), [((9,), "it"), ((7, 9), "all 2")])
def test_where_none_is_whole_the_way_out_is_told(tmp_path: Path, steps: tuple[int, ...], what: str) -> None:
    checkpoints = saved(tmp_path, *steps)
    for path in checkpoints.paths.values():
        path.write_bytes(b"")
    with pytest.raises(OutputError) as caught:
        checkpoints.load()
    assert str(caught.value).startswith(f"{tmp_path}/checkpoint-00009.safetensors: a broken checkpoint (")
    assert str(caught.value).endswith(f"); remove {what} to start again")
