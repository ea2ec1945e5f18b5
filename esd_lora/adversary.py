"""The adversary of robust training: soft words with which the edited model still draws what is being erased.

    v* = argmin_v  E ‖ε_θ(x_t, t, τ("v_1 … v_K")) − ε*(x_t, t, s)‖²        over the embeddings v alone, on the bank's (x_t, t)

What it finds joins the prompts that the student is asked with, and so do the synonyms of the concept; the target stays:

    L = ‖ε_θ(x_t, t, s') − target‖²        s' ∈ {s, its synonyms, v*_1 … v*_R}

After AdvUnlearn (Zhang et al. 2024, arXiv:2405.15234), R.A.C.E. (Kim et al. 2024, arXiv:2405.16341) and STEREO (Srivatsan et
al. 2024, arXiv:2408.16807). The first two look for an adversarial prompt again at every step, 30 steps of gradient beside or
within the embeddings of the concept's prompt, or within a small distance of it at one timestep, and train against that alone.
STEREO collects what inversion finds, and erases all of it from the unedited model at the end. Here a few searches, each from
a random start, share out the steps of one training, and what was found stays; what the adversary imitates is the frozen model
on trajectories that are recorded already, not noise on pictures, so that ε* tells it at every x_t what is wanted, and few
steps do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from esd_lora import processes
from esd_lora.bases.base import Base, Condition
from esd_lora.softwords import at_random, encode_with_gradients, vocabulary_of
from esd_lora.trajectories import Bank

WORDS = 4
"""K."""
STEPS, LR = 30, 5e-2
"""Of AdamW."""
BATCH = 2
"""Examples of a step of the adversary, over those of a step of training."""


def rounds_due(rounds: int, *, step: int, steps: int) -> int:
    """How many rounds are over before a step of training, from 0: round k of R comes before step ⌊k · steps / (R + 1)⌋."""
    return -(-(step + 1) * (rounds + 1) // steps) - 1


def passes(batch_size: int) -> int:
    """Of a search: for each example the teacher's, and the student's with the way back, which counts as two."""
    return STEPS * BATCH * batch_size * (1 + 3)


def find(
    base: Base,
    bank: Bank,
    conditions: Condition,
    s: int,
    *,
    batch_size: int,
    seed: int,
    mine: slice = slice(None),
    on_step: Callable[[int, int], None] | None = None,
) -> Condition:
    """The condition of v*, the soft words alone as a prompt, one row.

    Neither the weights of the base nor the adapters or their gradients are changed.

    Args:
        base: With the adapters on.
        bank: The erase bank; the examples that are asked for with s are looked at.
        conditions: The encoded prompts.
        s: Row of the prompt to erase.
        batch_size: Of training; in all processes together.
        seed: Of the start and of the choice of examples.
        mine: Which of the examples of a step this process takes; the gradients of all are added up.
        on_step: Called with the number of steps done and their total.

    Raises:
        BaseModelError: The base is no Stable Diffusion 1, 2 or XL, or its tokenizer marks no whole words.
        RecipeError: The vocabulary has fewer than `WORDS` words.
    """
    soft = at_random(vocabulary_of(base), WORDS, beside=(), seed=seed)
    trained = [nn.Parameter(e) for e in soft.embeddings]
    soft = replace(soft, embeddings=tuple(trained))
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    own = (bank.s == s).nonzero()[:, 0].cpu()
    asked, like = conditions[s : s + 1], conditions[:1]
    size = BATCH * batch_size

    def condition() -> Condition:
        return encode_with_gradients(base, [soft.words], like)

    try:
        with soft.active(base):
            for step in range(STEPS):
                chosen = own[torch.randint(len(own), (size,), generator=generator)]
                rows = chosen[mine].to(bank.x.device)
                loss = imitation_loss(base, bank, rows, wanted=asked, given=condition()) / size
                for embedding, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    embedding.grad = gradient
                processes.sum_gradients(loss.detach(), trained)
                optimizer.step()
                if on_step:
                    on_step(step + 1, STEPS)
            with torch.no_grad():
                return condition()
    finally:
        base.free_encoders()


def imitation_loss(base: Base, bank: Bank, rows: Tensor, *, wanted: Condition, given: Condition) -> Tensor:
    """Σ ‖ε_θ(x_t, t, given) − ε*(x_t, t, wanted)‖² over rows of a bank, (); each condition is one prompt's."""
    x, t = bank.x[rows].to(base.dtype), bank.t[rows]
    with base.teacher():
        target = base.predict(x, t, wanted.expand(len(x)))
    student = base.predict(x, t, given.expand(len(x)))
    return (student.float() - target.float()).square().sum()
