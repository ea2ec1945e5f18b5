"""What a training step costs, and what could make it cheaper: every idea against the step as it is, in one run.

    python benchmarks/step.py [--rows 4] [--repeats 20] [--compile]

The step is the student's forward and backward pass on the embedded base with the default layers and rank; below it what cannot
be saved of it, a forward pass without adapters. An idea is timed beside the step as it is, by turns, so that a busy machine
slows both; the ratio is of medians. `--compile` adds torch.compile, whose warm-up is told in steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from esd_lora.bases import Base, load_base
from esd_lora.recipe import Recipe

Step = Callable[[], object]


def adapted(dtype: str = "fp32") -> Base:
    """The embedded base with untrained adapters of a default recipe."""
    base, recipe = load_base("emoji", dtype=dtype), Recipe.model_validate({"base": "emoji", "concepts": "cat"})
    base.add_adapter(layers=recipe.layers, rank=recipe.rank)
    return base


def step_of(base: Base, rows: int, *, autocast: bool = False, channels_last: bool = False) -> Step:
    """A training step's forward and backward pass."""
    conditions, parameters = base.encode(["a cat"] * rows), base.adapter_parameters()
    x = base.noise(range(rows))
    t = torch.arange(rows) * 100
    if channels_last:
        base.denoiser.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = base.predict(x, t, conditions).float().square().mean()
        torch.autograd.backward(loss)
        for parameter in parameters:
            parameter.grad = None
        return loss.detach()

    return step


def forward_of(rows: int) -> Step:
    """A forward pass of the bare base."""
    base = load_base("emoji")
    x, t, conditions = base.noise(range(rows)), torch.arange(rows) * 100, base.encode(["a cat"] * rows)
    return torch.no_grad()(lambda: base.predict(x, t, conditions))


def ideas(rows: int) -> dict[str, Step]:
    """What is compared with the step as it is."""
    plain = adapted()
    plain.denoiser.set_attn_processor(AttnProcessor())
    return {
        "a forward pass alone, no adapters": forward_of(rows),
        "weights in bf16": step_of(adapted("bf16"), rows, autocast=True),
        "weights in fp32, computed in bf16": step_of(adapted(), rows, autocast=True),
        "weights in bf16, channels last": step_of(adapted("bf16"), rows, autocast=True, channels_last=True),
        "channels last": step_of(adapted(), rows, channels_last=True),
        "attention as matrix products": step_of(plain, rows),
        "the same again": step_of(adapted(), rows),
    }


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def compiled(rows: int, usual: float) -> tuple[Step, float]:
    """The compiled step, and how many steps as they are its first two take the time of."""
    base = adapted()
    base.denoiser.compile()
    step = step_of(base, rows)
    return step, (seconds(step) + seconds(step)) / usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="examples in a batch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well, which needs a C++ compiler")
    args = parser.parse_args()
    usual, others = step_of(adapted(), args.rows), ideas(args.rows)
    for step in (usual, *others.values()):
        step(), step()
    if args.compile:
        others["torch.compile"], warm_up = compiled(args.rows, statistics.median(seconds(usual) for _ in range(5)))
    print("| idea | of the step's time | ms |\n|---|---|---|")
    for name, step in others.items():
        pairs = [(seconds(usual), seconds(step)) for _ in range(args.repeats)]
        before, after = map(statistics.median, zip(*pairs, strict=True))
        print(f"| {name} | {after / before:.2f} | {1e3 * after:.0f} of {1e3 * before:.0f} |", flush=True)
    if args.compile:
        print(f"\ntorch.compile: {warm_up:.0f} steps' time of warm-up")


if __name__ == "__main__":
    main()
