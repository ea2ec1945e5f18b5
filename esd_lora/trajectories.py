"""The trajectory bank: training examples (x_t, t, target) recorded while the model denoises.

Sampling with classifier-free guidance evaluates ε*(x_t, s) and ε*(x_t, ∅) at every step, which is what the target needs:
a trajectory of S steps gives S examples at no cost beyond its own. x_t and t are recorded together, as the network saw
them (after the scheduler's `scale_model_input`), and never recomputed.

Erasing and preserving are one thing here: to preserve a prompt p is to ask with s = p for the anchor a = p with η = 0. Where a
recipe says so, half of the time s is "p, c": asked for beside the concept p must stay as well.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from esd_lora.bases.base import Base, Condition
from esd_lora.esd import esd_target
from esd_lora.pictures import step_noise
from esd_lora.recipe import Concept, Recipe

EVERYDAY = (
    "a person",
    "a face",
    "a child",
    "a cat",
    "a dog",
    "a bird",
    "a fish",
    "a tiger",
    "a car",
    "a bus",
    "a train",
    "a boat",
    "a house",
    "a tree",
    "a flower",
    "an apple",
    "a clock",
    "a heart",
    "a star",
    "the moon",
    "a book",
    "a camera",
    "a city street",
    "a landscape",
    "a photo",
    "an oil painting",
    "a watercolor",
    "an ink drawing",
    "a blueprint",
    "a neon sign",
    "pixel art",
    "a sticker",
)
"""Subjects and looks that most owners of a model want to keep."""


PLAIN = frozenset(["a", "an", "the", "of", "in", "on", "with", "and", "or", "style", "from", "by", "to", "for"])
"""Words that a concept may have without being about them."""


@dataclass(frozen=True)
class Question:
    """What the student is asked, in rows of the encoded prompts; row 0 is the empty prompt.

    s: the student's prompt; c: the concept; a: the anchor; eta: η, 0 for a prompt to preserve; forms: prompts that robust
    training asks with as well as with s; beside: s beside a concept, which half of the examples are asked with.
    """

    s: int
    c: int
    a: int
    eta: float
    forms: tuple[int, ...] = ()
    beside: int | None = None

    def roles(self, *, guided: bool) -> tuple[int, int, int, int]:
        """The rows of s, ∅, c and a; where neither guidance nor η asks for ∅, s stands in, which is predicted once."""
        return self.s, 0 if guided or self.eta else self.s, self.c, self.a

    def moves(self, *, guided: bool) -> tuple[int, int]:
        """The rows of s and ∅ that the student's own trajectory is moved by; where no guidance asks for ∅, s stands in."""
        return self.s, 0 if guided else self.s


@dataclass(frozen=True)
class Bank:
    """N training examples, on the device of the base.

    x: scaled inputs (N, C, H, W) in float32; t: (N,); target: (N, C, H, W) float32; s: (N,) row of the student's prompt.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    s: Tensor

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.t)

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def default_preserve(concepts: Sequence[Concept]) -> tuple[str, ...]:
    """The prompts kept where a recipe names none: the empty one, and everyday ones without the words of the concepts.

    What a concept is erased *from* is kept: it shall stay.
    """
    named = {w for c in concepts for form in (c.erase, *c.synonyms) for w in stems(form)}
    return ("", *(p for p in EVERYDAY if not named & stems(p)))


def stems(text: str) -> set[str]:
    """The words of a text in lower case, without a final s, but for those that it is not about."""
    return {w.rstrip("s") for w in re.findall(r"\w+", text.lower()) if w not in PLAIN}


def questions_of(recipe: Recipe) -> tuple[list[str], list[Question], list[Question]]:
    """The prompts to encode (the empty one first), what to ask to erase, and what to ask to preserve."""
    prompts = [""]

    def row(prompt: str) -> int:
        if prompt not in prompts:
            prompts.append(prompt)
        return prompts.index(prompt)

    erase = []
    for concept in recipe.concepts:
        s, c, a = row(concept.prompt), row(concept.erase), row(concept.anchor)
        # the prompt to erase from has none
        forms = map(row, concept.synonyms) if recipe.robust and not concept.from_ else ()
        erase.append(Question(s, c, a, recipe.eta_of(concept), tuple(forms)))
    wanted = recipe.preserve if recipe.preserve_weight else ()
    preserve = [Question(r, r, r, 0.0) for r in map(row, wanted or ())]
    if recipe.preserve_beside:
        # what is replaced stays replaced in company, and an attribute of one thing stays with all others
        company = itertools.cycle(concept.erase for concept in recipe.concepts if not concept.anchor)
        preserve = [
            replace(q, beside=row(f"{prompts[q.s]}, {c}")) if prompts[q.s].strip() else q
            for q, c in zip(preserve, company, strict=False)
        ]
    return prompts, erase, preserve


def preserve_steps(recipe: Recipe, preserve: Sequence[Question]) -> int:
    """Denoising steps of a trajectory to preserve: as many as training can use once, S at most and two at least."""
    enough = math.ceil(recipe.steps * recipe.batch_size / max(1, len(preserve)))
    return max(2, min(recipe.trajectory_steps, enough))


@torch.no_grad()
def record(
    base: Base,
    conditions: Condition,
    questions: Sequence[Question],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    resolution: int | None = None,
    edited: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Bank, int]:
    """The bank of one trajectory per question, and the number of forward passes that it cost.

    Args:
        base: With adapters that are on if `edited`, off or none otherwise.
        conditions: The encoded prompts; row 0 is the empty one.
        questions: One for each trajectory; all trajectories move on together.
        seeds: Of the noise, at the start and on the way, one for each trajectory.
        steps: Denoising steps S, from pure noise to the picture.
        guidance_scale: Of the trajectories.
        resolution: In pixels; None for the base's own.
        edited: Move along the student's predictions instead of the teacher's.
        on_step: Called with the number of denoising steps done and their total.
    """
    sampler = base.sampler(steps, resolution=resolution, generators=step_noise(seeds))
    x_t = sampler.start(base.noise(seeds, resolution=resolution).float())
    guided_here = guidance_scale > 1 and not base.told_guidance
    rows = torch.tensor([q.roles(guided=guided_here) for q in questions])  # (B, roles)
    moves = torch.tensor([q.moves(guided=guided_here) for q in questions])
    eta = torch.tensor([q.eta for q in questions], device=base.device)[:, None, None, None]
    examples: list[tuple[Tensor, Tensor, Tensor]] = []
    passes = 0
    for t in sampler.timesteps:
        x = sampler.network_input(x_t, t)
        with base.teacher():
            eps, cost = _predict_roles(base, x, t, conditions, rows)
        passes += cost
        examples.append((x, t.expand(len(x)), esd_target(eps[3], eps[2], eps[1], eta=eta)))
        if edited:
            eps, cost = _predict_roles(base, x, t, conditions, moves)
            passes += cost
        move = base.guide(eps[0], eps[1], guidance_scale=guidance_scale)
        x_t = sampler.step(move, t, x_t)
        if on_step:
            on_step(len(examples), len(sampler.timesteps))
    x, ts, target = (torch.cat(part) for part in zip(*examples, strict=True))
    return Bank(x, ts, target, rows[:, 0].repeat(len(examples)).to(x.device)), passes


def _predict_roles(base: Base, x: Tensor, t: Tensor, conditions: Condition, rows: Tensor) -> tuple[list[Tensor], int]:
    """The predictions of every trajectory (B) for each of its roles, as float32 (B, C, H, W) by role, and their number.

    A prompt that a trajectory uses in several roles is predicted once. Batches are as large as latents of this size
    allow on a small device.
    """
    places: dict[tuple[int, int], int] = {}
    for b, roles in enumerate(rows.tolist()):
        for row in roles:
            places.setdefault((b, row), len(places))
    who, row = (torch.tensor(part, device=x.device) for part in zip(*places, strict=True))
    size = min(64, max(2, 65_536 // x[0].numel()))
    parts = [
        base.predict(x[b].to(base.dtype), t.expand(len(b)), conditions[r])
        for b, r in zip(torch.split(who, size), torch.split(row, size), strict=True)
    ]
    eps = torch.cat(parts).float()
    index = torch.tensor([[places[b, r] for r in roles] for b, roles in enumerate(rows.tolist())], device=x.device)
    return [eps[index[:, k]] for k in range(rows.shape[1])], len(places)
