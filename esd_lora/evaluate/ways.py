"""The ways that an evaluation compares: patches, what the field has instead of them, and controls, each over its strength.

    Subject ─► Way ─ at(strength) ─► Setting: base, patches, weights ─► pictures ─ passes ─► those that a filter lets through

What a way trains is kept in a folder under its name, the base's fingerprint and the concept, and is not trained again.
Several processes train it alike, so that none waits, and what the main one has written counts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from esd_lora import processes
from esd_lora.bases.base import Base
from esd_lora.compose import attached
from esd_lora.errors import BaseModelError, RecipeError
from esd_lora.evaluate.baselines import (
    PRESETS,
    PostFilter,
    emoji_filter,
    full_esd,
    leco,
    negative_prompt,
    safe_latent,
    safety_checker_filter,
    separate_negative,
    uce,
    uce_recipe,
)
from esd_lora.evaluate.controls import null_patch, random_like, scrambling_patch
from esd_lora.evaluate.evaluators import sha256_of
from esd_lora.evaluate.page import NULL, Cost, Method, Target
from esd_lora.patch import Patch, load_patch, write_file
from esd_lora.pictures import Pictures
from esd_lora.recipe import Concept, Layers
from esd_lora.training import COST, read_cost


class Setting(NamedTuple):
    """What draws the pictures of a way at one strength."""

    base: Base
    patches: Sequence[Patch] = ()
    weights: Sequence[float] = ()


@dataclass(frozen=True)
class Way:
    """A way to keep a concept out of pictures, or a control.

    method: As a report lists it.
    strengths: At which its pictures are drawn.
    at: Strength → a context inside which the setting draws by it.
    default: The strength that it is meant to be used at.
    beside: What acts on its pictures beside base and patches; pictures are kept apart by it.
    passes: Strength and pictures → which of them are shown; the others are black. None shows all.
    unasked: Labels whose pictures it does not draw, such as what a gold model lacks beside the target.
    """

    method: Method
    strengths: tuple[float, ...]
    at: Callable[[float], AbstractContextManager[Setting]]
    default: float = 1.0
    beside: str = ""
    passes: Callable[[float, Pictures], Sequence[bool]] | None = None
    unasked: Collection[str] = ()


@dataclass(frozen=True)
class Subject:
    """What the ways are to erase.

    base: Draws the pictures.
    concept: With its words, as prompts have them.
    target: What the evaluator calls it.
    folder: Where what is trained is kept.
    load: Gives the same base in float32, for ways that train.
    on_step: Called while one trains, with its name, the steps done and their total.
    """

    base: Base
    concept: Concept
    target: Target
    folder: Path
    load: Callable[[], Base]
    on_step: Callable[[str, int, int], None] | None = None

    @cached_property
    def trainer(self) -> Base:
        """The base in float32."""
        return self.load()

    def place(self, name: str) -> Path:
        """The folder of what a way trains: it follows from the base, the concept and the way."""
        asked = f"{self.base.fingerprint}\n{self.base.parts_fingerprint}\n{self.concept.model_dump_json(by_alias=True)}\n{name}"
        return self.folder / f"{name.split()[0]}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"


# ---- patches -----------------------------------------------------------------------------------------------------


def patch_way(
    base: Base, name: str, patch: Patch, *, strengths: Sequence[float] = (1.0,), seconds: float | None = None
) -> Way:
    """The pictures of a patch at these weights; its cost is told where the seconds of its training are known.

    Raises:
        PatchError: It does not fit the base, or a weight is not a number.
    """
    strengths = tuple(dict.fromkeys(strengths))
    for weight in strengths:
        with attached(base, [patch], [weight]):
            pass  # what cannot be drawn is told before anything is drawn or trained
    passes = patch.info.get("cost", {}).get("forward_passes")
    cost = None
    if seconds is not None and passes is not None:
        cost = Cost(seconds=seconds, passes=passes, bytes=patch.nbytes, passes_per_step=_per_step(base))
    told = f"{len(patch.ranks)} layers of rank {max(patch.ranks.values())}; merged into the weights it is no switch"
    method = Method(name=name, role="patch", about=told, cost=cost, digest=patch.digest)
    default = min(strengths, key=lambda weight: abs(weight - 1))
    return Way(method, strengths, partial(_with_patch, base, patch), default)


def _with_patch(base: Base, patch: Patch, weight: float) -> AbstractContextManager[Setting]:
    return nullcontext(Setting(base, [patch], [weight]))


def control_ways(base: Base, patch: Patch, *, layers: Layers, seed: int = 0) -> list[Way]:
    """What a measurement is checked by: a patch that changes nothing, one of random numbers as large, one that ruins all.

    Args:
        base: The model, bare.
        patch: Whose size the random one has.
        layers, seed: Of the others.

    Raises:
        BaseModelError: The preset matches nothing.
    """
    weights = (base.denoiser.get_submodule(name).weight for name in base.matched(layers))
    rank = min(max(patch.ranks.values()), *(min(weight.shape) for weight in weights))  # a stack's may be larger
    made = {
        NULL: (null_patch(base, layers, rank), "control: a patch of zeros, which must change nothing"),
        "random": (random_like(patch, seed), "control: random numbers in the patch's layers, as large as its own"),
        "scrambling": (scrambling_patch(base, layers, rank, seed=seed), "control: a patch that ruins every picture"),
    }
    return [
        Way(Method(name=name, role="control", about=about), (1.0,), partial(_with_patch, base, control))
        for name, (control, about) in made.items()
    ]


# ---- what the field has ------------------------------------------------------------------------------------------


def baseline_way(name: str, subject: Subject) -> Way:
    """A baseline over its strength; what it trains is trained now, if it is not in the subject's folder yet.

    Args:
        name: One of `BASELINES`, or `filter:PIPELINE`, by the safety checker of a folder's or a Hub id's pipeline.
        subject: What it is to erase.

    Raises:
        BaseModelError: The base is of a family that it is not made for.
        RecipeError: There is none of this name, there is no filter for this base, or it does not know the target.
    """
    kind, _, pipeline = name.partition(":")
    if kind == "filter" and pipeline:
        return _filter(subject, pipeline)
    if name not in BASELINES:
        raise RecipeError(f"--against {name}: unknown; there are {', '.join(BASELINES)}, and filter:PIPELINE")
    return BASELINES[name](subject)


def _guidance(
    subject: Subject,
    *,
    name: str,
    about: str,
    knob: str,
    more_passes: int = 0,
    inside: Callable[[Base, str, float], AbstractContextManager[None]],
    strengths: tuple[float, ...],
    default: float,
    labels: Mapping[float, str] = MappingProxyType({}),
    numbers: object = "",
) -> Way:
    """A way that acts on the sampler alone: base, concept and strength → a context inside which it does.

    `numbers` are whatever else its pictures depend on, and `more_passes` what it takes at every step.
    """
    base, words = subject.base, subject.concept.erase
    about = f"{about}: a setting of the pipeline"
    method = Method(
        name=name, role="baseline", about=about, knob=knob, labels=labels, cost=_for_nothing(base, more_passes)
    )

    @contextmanager
    def at(strength: float) -> Iterator[Setting]:
        with inside(base, words, strength):
            yield Setting(base)

    with at(default):
        pass  # what the base does not allow is told before anything is drawn or trained
    return Way(method, strengths, at, default, beside=f"{name} {words} {numbers}".rstrip())


SWEPT: Mapping[float, float] = {3.25: 0.1, 3.5: 0.2, 3.75: 0.4}
"""Strengths between SLD's presets strong and max, and the λ of max there."""


def _sld(subject: Subject) -> Way:
    """The presets; on the embedded base, for whose predictions these were not made, others between the last two as well."""
    guidances = {float(k): (str(name), numbers) for k, (name, numbers) in enumerate(PRESETS.items(), 1)}
    if subject.base.name == "emoji":
        between = {k: (f"max, λ {x:g}", replace(PRESETS["max"], threshold=x)) for k, x in SWEPT.items()}
        guidances = dict(sorted({**guidances, **between}.items()))
    return _guidance(
        subject,
        name="SLD",
        about="Safe Latent Diffusion, guidance away from the concept",
        knob="preset",
        more_passes=1,
        numbers=guidances,
        inside=lambda base, words, k: safe_latent(base, words, guidances[k][1]),
        strengths=tuple(guidances),
        default=2.0,
        labels={k: name for k, (name, _) in guidances.items()},
    )


_negative_prompt = partial(
    _guidance,
    name="negative prompt",
    about="the concept as the pipeline's negative prompt",
    knob="strength",
    inside=lambda base, words, w: negative_prompt(base, words, strength=w),
    strengths=(0.5, 1.0, 2.0, 4.0),
    default=1.0,
)
_separate_negative = partial(
    _guidance,
    name="separate negative",
    about="a third prediction, for the concept, is guided away from",
    knob="scale",
    more_passes=1,
    inside=lambda base, words, scale: separate_negative(base, words, scale=scale),
    strengths=(2.5, 5.0, 7.5, 10.0),
    default=5.0,
)


def _filter(subject: Subject, pipeline: str = "") -> Way:
    """The pictures that a classifier lets through: emoji's second evaluator, or a pipeline's safety checker."""
    base, where = subject.base, pipeline or subject.base.name
    if graded := where == "emoji":
        judge, about = emoji_filter(subject.target.label), "a second classifier blacks pictures out"
    else:
        judge = _safety_checker(where, base, revision=None if pipeline else base.revision)
        about = "a safety checker blacks out what is on its own list, whatever was to be erased"
    method = Method(
        name=f"post-filter {pipeline}".rstrip(),
        role="baseline",
        about=f"{about}: a step of the pipeline",
        knob="threshold" if graded else "",
        cost=_for_nothing(base),
    )

    def passes(threshold: float, pictures: Pictures) -> list[bool]:
        return replace(judge, threshold=threshold).passes(pictures)

    thresholds = (0.1, 0.5, 0.9) if graded else (0.5,)
    return Way(method, thresholds, lambda _: nullcontext(Setting(base)), default=0.5, passes=passes)


def _safety_checker(pipeline: str, base: Base, *, revision: str | None) -> PostFilter:
    """The filter of a pipeline, where the base is.

    Raises:
        RecipeError: It is not to be had; what to name instead.
    """
    try:
        return safety_checker_filter(pipeline, revision=revision, device=base.device)
    except BaseModelError as error:
        remedy = "name a pipeline that has one, as in filter:stable-diffusion-v1-5/stable-diffusion-v1-5"
        raise RecipeError(f"--against filter: {error}; {remedy}") from error


def _full_esd(subject: Subject, *, layers: Literal["esd-x", "esd-u"]) -> Way:
    tuned = _numbers(layers, subject.base)
    place = subject.place(f"{layers} {sorted(tuned.items())}")
    path = place / "change.safetensors"

    def make(frozen: Base) -> Made:
        step = _told(subject, layers, tuned["steps"])
        found = full_esd(frozen, subject.concept.erase, layers=layers, on_step=step, **tuned)
        before = dict(frozen.denoiser.named_parameters())
        after = dict(found.base.denoiser.named_parameters())
        change = {n: w.detach() - before[n] for n, w in after.items() if not torch.equal(w, before[n])}
        return found.passes, lambda: write_file(path, save({n: w.contiguous().cpu() for n, w in change.items()}))

    _make_once(subject, place, make)
    change = load_file(path)
    name, what = {"esd-x": ("ESD-x", "cross-attention"), "esd-u": ("ESD-u", "all but cross-attention")}[layers]
    method = Method(
        name=f"{name}, fine-tuned",
        role="baseline",
        about=f"the authors' way: whole weights, {what}, a fresh trajectory for every step",
        cost=_cost(subject.base, place, size=path.stat().st_size),
    )
    return Way(method, TRAINED, partial(_changed, subject.base, change), beside=sha256_of(path))


def _leco(subject: Subject) -> Way:
    tuned = _numbers("leco", subject.base)
    method = Method(name="LECO", role="baseline", about="an adapter of all attention, by LECO's loss and schedule")
    make = partial(leco, concept=subject.concept.erase, on_step=_told(subject, "leco", tuned["iterations"]), **tuned)
    return _trained(subject, method, f"leco {sorted(tuned.items())}", make)


def _uce(subject: Subject) -> Way:
    recipe = uce_recipe(subject.base, [subject.concept])
    about = "Unified Concept Editing: cross-attention k and v, solved for, nothing cut off"
    method = Method(name="UCE", role="baseline", about=about)
    make = partial(uce, concepts=[subject.concept])
    return _trained(subject, method, f"uce {recipe.model_dump_json(by_alias=True)}", make)


BASELINES: Mapping[str, Callable[[Subject], Way]] = {
    "sld": _sld,
    "negative-prompt": _negative_prompt,
    "separate-negative": _separate_negative,
    "filter": _filter,
    "esd-x": partial(_full_esd, layers="esd-x"),
    "esd-u": partial(_full_esd, layers="esd-u"),
    "leco": _leco,
    "uce": _uce,
}
"""What the field has instead of a patch, by the names of `eval --against`."""

OWN: Mapping[str, Mapping[str, Any]] = {
    "esd-x": {"steps": 200, "lr": 5e-5},
    "esd-u": {"steps": 1000, "lr": 1e-5},
    "leco": {"iterations": 500, "lr": 1e-4},
}
"""What the authors train Stable Diffusion with: ESD-x by their released code, ESD-u by their paper (arXiv:2303.07345), LECO
by its defaults."""

ON_EMOJI: Mapping[str, Mapping[str, Any]] = {
    "esd-x": {"steps": 200, "lr": 2e-4},
    "esd-u": {"steps": 200, "lr": 2e-4},
    "leco": {"iterations": 200, "lr": 1e-3},
}
"""What erases as much of the embedded base, where ESD-x and LECO erase too little by their own rates (benchmarks/speed.py)."""

TRAINED = (0.5, 1.0, 1.5)
"""Weights of what is trained."""


def gold_way(gold: Base, *, lacks: Collection[str] = ()) -> Way:
    """The pictures of a base that was trained from nothing without the concept, but for what it lacks besides."""
    about = "trained from nothing without the concept: what perfect erasure looks like"
    method = Method(name="data filtering", role="baseline", about=about, knob="")
    return Way(method, (1.0,), lambda _: nullcontext(Setting(gold)), unasked=lacks)


# ---- what they are made of ---------------------------------------------------------------------------------------


def _per_step(base: Base) -> int:
    """Latents through the denoiser at each step of a picture: guidance asks twice, unless the base is told it."""
    return 1 if base.told_guidance else 2


def _for_nothing(base: Base, more_passes: int = 0) -> Cost:
    """The cost of what is not trained."""
    return Cost(seconds=0, passes=0, bytes=0, passes_per_step=_per_step(base) + more_passes)


def _trained(subject: Subject, method: Method, name: str, make: Callable[[Base], Patch]) -> Way:
    """The way of a patch that is trained now, or was."""
    place = subject.place(name)

    def trained(base: Base) -> Made:
        made = make(base)
        return made.info["cost"]["forward_passes"], lambda: made.save(place)

    _make_once(subject, place, trained)
    patch = load_patch(place)
    told = method.model_copy(update={"cost": _cost(subject.base, place, size=patch.nbytes)})
    return Way(told, TRAINED, partial(_with_patch, subject.base, patch))


def _numbers(name: str, base: Base) -> Mapping[str, Any]:
    return (ON_EMOJI if base.name == "emoji" else OWN)[name]


def _told(subject: Subject, name: str, total: int) -> Callable[[int, int, Base], None]:
    """What a training calls after each step."""

    def step(done: int, _passes: int, _trained: Base) -> None:
        if subject.on_step:
            subject.on_step(name, done, total)

    return step


Made = tuple[int, Callable[[], object]]
"""The passes that something took, and what writes it."""


def _make_once(subject: Subject, place: Path, make: Callable[[Base], Made]) -> None:
    """What is made is in the place afterwards, beside its cost, which is written last and tells that nothing is missing."""
    if processes.agreed(lambda: (place / COST).is_file()):
        return
    base, started = subject.trainer, time.perf_counter()
    passes, write = make(base)
    seconds = round(time.perf_counter() - started, 3)

    def keep() -> None:
        write()
        write_file(place / COST, yaml.safe_dump({"seconds": {"total": seconds}, "passes": passes}).encode())

    processes.agreed(keep)


def _cost(base: Base, place: Path, *, size: int) -> Cost:
    told = read_cost(place)
    return Cost(seconds=told["seconds"]["total"], passes=told["passes"], bytes=size, passes_per_step=_per_step(base))


@contextmanager
def _changed(base: Base, change: Mapping[str, Tensor], weight: float) -> Iterator[Setting]:
    """Inside, the base's own weights are W + w ΔW."""
    weights = dict(base.denoiser.named_parameters())
    before = {name: weights[name].detach().clone() for name in change}
    try:
        with torch.no_grad():
            for name, delta in change.items():
                weights[name].copy_(before[name].float() + weight * delta.to(base.device))
        yield Setting(base)
    finally:
        with torch.no_grad():
            for name, value in before.items():
                weights[name].copy_(value)
