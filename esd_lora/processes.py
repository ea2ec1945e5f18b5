"""The processes that make one patch or report together, as `accelerate launch` starts them; one alone is the usual case.

All take the same steps, each on its share of every batch, and stay equal because what they add up is the same for all. What
only one may do, the main process does, and tells the others how it went.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from esd_lora.errors import EsdLoraError

T = TypeVar("T")


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any; on a CPU too, where the launcher may not have asked for it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else another precision or device than before is refused
    PartialState(cpu=device.type == "cpu")


def own_device() -> str | None:
    """The device that the launcher means for this process; None where it is alone."""
    return str(PartialState().device) if "LOCAL_RANK" in os.environ else None


def leave() -> None:
    """Take leave of the other processes, if there are any."""
    PartialState().destroy_process_group()


def count() -> int:
    """How many there are."""
    return int(PartialState().num_processes)


def is_main() -> bool:
    """Whether this is the one that writes and speaks."""
    return bool(PartialState().is_main_process)


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, the only one that does it.

    Raises:
        EsdLoraError: What it raises there, in all processes.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except EsdLoraError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    result: T = outcome[0]
    return result


def each(work: Callable[[], T]) -> T:
    """What `work` returns in this process, once all have done their own.

    Raises:
        EsdLoraError: What it raises in the first process where it does, in all.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = work()
    except EsdLoraError as error:
        outcome[1] = error
    for raised in gather_object(outcome[1:]):
        if raised:
            raise raised
    result: T = outcome[0]
    return result


def mine() -> slice:
    """This process's share of a batch, or of batches: every n-th, so that none comes twice."""
    return slice(PartialState().process_index, None, count())


def share(items: Sequence[T]) -> list[T]:
    """This process's items: every n-th, equally many in each process, so that the first come twice where some lack."""
    n, mine = count(), PartialState().process_index
    return [items[i % len(items)] for i in range(mine, -(-len(items) // n) * n, n)]


def gathered(part: Tensor, *, shared: int, of: int) -> Tensor:
    """What one process would have, where each has rows about its share of items, from rows (S · shared, …).

    Args:
        part: S rounds of one row for each item of this process's share.
        shared: How many items a share has.
        of: How many there are.

    Returns:
        S rounds of one row for each item, (S · of, …).
    """
    if count() == 1:
        return part
    rounds = gather(part.contiguous()).unflatten(0, (count(), -1, shared))  # (n, S, shared, …)
    whole: Tensor = rounds.movedim(0, 2).flatten(1, 2)[:, :of].flatten(0, 1)
    return whole


def summed(value: int, device: torch.device) -> int:
    """The sum over all processes."""
    return value if count() == 1 else int(reduce(torch.tensor(value, device=device), "sum"))


def sum_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The loss of all processes' shares of a batch; the gradients are added up likewise, to the same bits in each.

    Args:
        loss: That of this process's share, a part of a sum.
        parameters: Their gradients are replaced.
    """
    if count() == 1:
        return loss
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = reduce(parameters_to_vector([loss, *gradients]), "sum")
    vector_to_parameters(total[1:], gradients)
    whole: Tensor = total[0]
    return whole


def largest(value: int, device: torch.device) -> int:
    """The largest that a process has."""
    return value if count() == 1 else int(gather(torch.tensor([value], device=device)).max())
