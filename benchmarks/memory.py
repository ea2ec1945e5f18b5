"""What training takes in memory at true size, measured beside what `esd-lora plan` predicts and the authors' way takes.

    python benchmarks/memory.py [--cases authors fp32 checkpointing authors-bf16 bf16 sdxl]

Every case is a process of its own: a denoiser of the true architecture with random weights, a few steps of batch 1 without
preservation, on the CPU. Measured is the process's peak resident memory above what it had after its imports and a plan, with an
allocator that gives freed memory back at once; text encoders and autoencoder, which leave the device before training, are not
made. `authors` and `authors-bf16` hold a frozen and a trained network and fine-tune the cross-attention layers with Adam
(Gandikota et al. 2023; their present code does in bf16). Ours is divided by theirs of the same precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import psutil
import torch

from esd_lora.bases import DTYPES, FAMILIES, Base, Condition
from esd_lora.bases.facts import facts_of
from esd_lora.plan import make_plan
from esd_lora.recipe import Recipe, make_recipe
from esd_lora.training import train

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
GIB = 2**30
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""glibc's: large blocks are mapped one by one, so that resident memory is what is in use."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    base: str
    dtype: str = "fp32"
    gradient_checkpointing: bool = False
    authors: bool = False

    @property
    def recipe(self) -> Recipe:
        """Two steps of batch 1, on one trajectory of two steps."""
        short = {"steps": 2, "batch_size": 1, "trajectories": 1, "trajectory_steps": 2, "preserve_weight": 0.0}
        how = {"dtype": self.dtype, "gradient_checkpointing": self.gradient_checkpointing}
        return make_recipe({"base": self.base, "concepts": "Van Gogh", **short, **how})


CASES = {
    "authors": Case(SD15, authors=True),
    "fp32": Case(SD15),
    "checkpointing": Case(SD15, gradient_checkpointing=True),
    "authors-bf16": Case(SD15, "bf16", authors=True),
    "bf16": Case(SD15, "bf16"),
    "sdxl": Case(SDXL, "bf16", gradient_checkpointing=True),
}


def random_base(name: str, dtype: torch.dtype) -> Base:
    """A base of a known architecture with random weights, made in this precision, whose prompts are random too."""
    facts = facts_of(name)
    family = FAMILIES[facts.pipeline]
    torch.set_default_dtype(dtype)
    denoiser = getattr(diffusers, facts.denoiser["_class_name"]).from_config(facts.denoiser)
    torch.set_default_dtype(torch.float32)
    scheduler = getattr(diffusers, facts.scheduler["_class_name"]).from_config(facts.scheduler)
    parts = {family.prefix: denoiser, "scheduler": scheduler}
    pipe: Any = SimpleNamespace(**parts, components=parts, vae_scale_factor=facts.vae_scale_factor)
    base = family(pipe, name=name, fingerprint="random")

    def encode(prompts: list[str], **_: object) -> Condition:
        blank = base.blank_condition(len(prompts)).tensors
        return Condition({k: torch.randn(v.shape).to(v.dtype) for k, v in blank.items()})

    base.encode = encode  # type: ignore[method-assign, assignment]
    return base


def authors_way(base: Base) -> None:
    """Two steps of their training: sample with guidance, ask the frozen network three times, train the other's attn2."""
    trained = copy.deepcopy(base.denoiser)
    parameters = [p.requires_grad_(True) for n, p in trained.named_parameters() if "attn2" in n]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)
    conditions = base.encode(["", "Van Gogh"])
    for step in range(2):
        sampler, x_t = base.sampler(2), base.noise([step])
        with torch.no_grad():
            for t in sampler.timesteps[:1]:
                eps = base.predict(torch.cat([x_t] * 2), t.expand(2), conditions)
                x_t = sampler.step(eps[1:], t, x_t)
            null, concept, anchor = (base.predict(x_t, t[None], conditions[i : i + 1]) for i in (0, 1, 0))
        student = trained(x_t, t[None], **conditions[1:].tensors, return_dict=False)[0]
        loss = ((student - (anchor - (concept - null))) ** 2).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def measure(case: Case) -> float:
    """The bytes that a case takes at its peak."""
    make_plan(case.recipe)  # imports what the case will
    before = psutil.Process().memory_info().rss
    base = random_base(case.base, DTYPES[case.recipe.dtype])
    if case.authors:
        authors_way(base)
    else:
        train(case.recipe, base)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(CASES[args.measure])))
        return
    print(
        "| case | measured, GiB | planned, GiB | measured over planned | of the authors' |\n|---|---|---|---|---|",
        flush=True,
    )
    authors: dict[tuple[str, str], float] = {}  # by base and precision
    for name in args.cases:
        case = CASES[name]
        run = [sys.executable, __file__, "--measure", name]
        took = json.loads(
            subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR).stdout
        )
        like, planned = None, None
        if case.authors:
            authors[case.base, case.dtype] = took
        else:
            like, planned = authors.get((case.base, case.dtype)), make_plan(case.recipe).memory
        cells = [name, f"{took / GIB:.2f}", *(["", ""] if planned is None else [])]
        if planned is not None:
            cells += [f"{planned.peak / GIB:.2f}", f"{took / planned.peak:.2f}"]
        cells.append(f"{took / like:.2f}" if like else "")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
