"""Keys in closed form: the words that wake a patch, so that patches trained apart can be stacked.

In cross-attention k and v, ΔW c = B (A c): the rows of A are keys that a token's embedding c is compared with, and B is
what is added where one fits. With

    H = mean of c cᵀ over the tokens of prompts with the concept, G = the same over the text encoder's whole vocabulary,

the keys are the directions that the concept has most of for what the rest of the language has of them:

    a_i = argmax  aᵀ H a / aᵀ (G + λ I) a        the top generalised eigenvectors, scaled so that a_iᵀ H a_i = 1

A is frozen and shared by all layers; B is solved for (`esd_lora.closed_form`), or trained from there by the ESD loss. UCE
(Gandikota et al. 2024, arXiv:2308.14761) weighs the same two moments, and closes B too.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.errors import BaseModelError, OutputError
from esd_lora.patch import encode, write_file
from esd_lora.recipe import Concept
from esd_lora.trajectories import stems

RIDGE = 1e-3
"""λ over the mean eigenvalue of a moment. Directions that the vocabulary hardly uses would get any gain; below a thousandth of
the mean they count as used."""

ONE = ("{}", "a {}", "a photo of a {}", "a picture of {}", "{} style")
TWO = ("a {} and a {}", "a {} with a {}", "{} in {} style", "a {} in {} style")
"""Templates of one and of two words; in the latter each word stands beside others."""

PROMPTS = 8_000
"""Prompts that stand for a vocabulary, about; never fewer than one a word."""
LENGTH = 16
"""Tokens of a prompt that are looked at: the templates' own, and some of the padding that follows."""
BATCH = 64


Moment = tuple[Tensor, int]
"""A sum of c cᵀ, (D, D) in float64, and how many c it has."""


def second_moment(states: Iterable[Tensor]) -> Moment:
    """Σ c cᵀ over all tokens, (D, D) in float64, and their number; from batches (N, L, D)."""
    total, count = torch.zeros(()), 0
    for batch in states:
        tokens = batch.flatten(0, 1).double()
        total = total + tokens.T @ tokens
        count += len(tokens)
    return total, count


def generalised_keys(hit: Tensor, keep: Tensor, *, rank: int, ridge: float = RIDGE) -> Tensor:
    """A: the top generalised eigenvectors of (H, G + λI) as rows, (min(rank, D), D), with A H Aᵀ = I.

    Through the Cholesky factor G + λI = L Lᵀ: the eigenvectors u of L⁻¹ H L⁻ᵀ give a = L⁻ᵀ u, and aᵀ H a is their
    eigenvalue.

    Args:
        hit: H, (D, D), float64.
        keep: G, (D, D), float64.
        rank: How many keys; where the concept has fewer directions, the last ones are zero.
        ridge: λ over the mean eigenvalue of G.
    """
    lower = torch.linalg.cholesky(ridged(keep, ridge))
    white = torch.linalg.solve_triangular(lower, hit, upper=False)
    white = torch.linalg.solve_triangular(lower, white.T, upper=False)
    gain, u = torch.linalg.eigh((white + white.T) / 2)
    gain, u = gain[-rank:].flip(0), u[:, -rank:].flip(1)
    gain[gain < 1e-9 * gain[0]] = torch.inf  # rounding, not a direction
    keys: Tensor = torch.linalg.solve_triangular(lower.T, u, upper=True).T / gain.sqrt()[:, None]
    return keys


def ridged(moment: Tensor, ridge: float = RIDGE) -> Tensor:
    """M + λI for a moment M, (D, D); λ is `ridge` of its mean eigenvalue."""
    return moment + ridge * moment.trace() / len(moment) * torch.eye(len(moment), dtype=moment.dtype)


def words_of(base: Base) -> list[str]:
    """Every whole word of letters in the text encoder's vocabulary, in a fixed order.

    Raises:
        BaseModelError: The tokenizer has none that it marks as such.
    """
    tokens = base.pipe.tokenizer.get_vocab()
    words = {t.removesuffix("</w>") for t in tokens if t.endswith("</w>")}
    found = sorted(w for w in words if w.isalpha() and w.isascii())
    if not found:
        raise BaseModelError(f"{base.name}: its tokenizer marks no whole words, so keys cannot be closed-form")
    return found


def other_words(base: Base, concepts: Sequence[Concept]) -> list[str]:
    """The words of the vocabulary that have no stem in common with those that the concepts are about."""
    named = named_words(concepts)
    return [w for w in words_of(base) if not named & stems(w)]


def prompts_of(words: Sequence[str]) -> Iterator[str]:
    """The prompts that stand for a vocabulary: every word first in as many templates as `PROMPTS` has room for."""
    templates = ONE + TWO
    for i, word in enumerate(words):
        for k in range(max(1, PROMPTS // len(words))):
            beside = words[_draw(f"{word} {k}", len(words))]
            yield templates[(i + k) % len(templates)].format(word, beside)


def _draw(text: str, n: int) -> int:
    """A number below n that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % n


def prompts_moment(base: Base, prompts: Sequence[str], *, on_prompts: Callable[[int], None] | None = None) -> Moment:
    """Σ c cᵀ over the tokens of prompts, and their number.

    Args:
        base: Its text encoder is asked.
        prompts: Any number.
        on_prompts: Called with the number of prompts encoded.
    """

    def states() -> Iterator[Tensor]:
        for first in range(0, len(prompts), BATCH):
            yield base.text_states(prompts[first : first + BATCH], length=LENGTH)
            if on_prompts:
                on_prompts(min(first + BATCH, len(prompts)))

    return second_moment(states())


def mean_moment(base: Base, prompts: Sequence[str]) -> Tensor:
    """The mean of c cᵀ over the tokens of prompts, (D, D) in float64."""
    total, count = prompts_moment(base, prompts)
    return total / count


def vocabulary_moment(
    base: Base, prompts: Sequence[str], *, on_prompts: Callable[[int, int], None] | None = None
) -> Moment:
    """Σ c cᵀ over the prompts of the whole vocabulary, and the number of tokens; kept on disk by the text encoder.

    Args:
        base: Its text encoder is asked.
        prompts: See `prompts_of`.
        on_prompts: Called with the number of prompts encoded and their total.
    """
    path = _cache(base, prompts)
    with suppress(OSError, SafetensorError, KeyError):  # none there, or one that cannot be read
        stored = safetensors.torch.load_file(path)
        return stored["moment"], int(stored["count"])
    total, count = prompts_moment(base, prompts, on_prompts=on_prompts and (lambda n: on_prompts(n, len(prompts))))
    try:
        write_file(path, encode({"moment": total, "count": torch.tensor(count)}, {}))
    except OutputError as error:
        warnings.warn(f"the vocabulary's statistics are not kept for the next time: {error}", stacklevel=2)
    return total, count


def _cache(base: Base, prompts: Sequence[str]) -> Path:
    """Where the moment of a text encoder is kept: by its weights, where it runs, and what it is asked."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esd_lora" / "vocabulary"
    asked = "\n".join((base.text_fingerprint, base.device.type, str(base.dtype), str(LENGTH), *prompts))
    return home / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.safetensors"


def concept_prompts(concepts: Sequence[Concept], words: Sequence[str]) -> list[str]:
    """Prompts with the concepts, their synonyms and what they are erased from: alone, and beside words of the vocabulary."""
    forms = dict.fromkeys(f for c in concepts for f in (c.erase, *c.synonyms, c.prompt))
    return list(dict.fromkeys(p for f in forms for p in in_templates(f, words, like=f)))


def in_templates(form: str, words: Sequence[str], *, like: str) -> list[str]:
    """Prompts with a form of words, alone and beside words of the vocabulary: the same ones for whatever is `like` it."""
    prompts = [t.format(form) for t in ONE]
    for k in range(16):
        beside = words[_draw(f"{like} {k}", len(words))]
        prompts += [t.format(*pair) for t in TWO for pair in ((form, beside), (beside, form))]
    return prompts


def named_words(concepts: Sequence[Concept]) -> set[str]:
    """The stems of the words that shall wake a patch: those of the concepts, and of what they are erased from.

    A prompt to erase from that names the concept itself, "a cat with a party hat", keeps its other words.
    """
    forms = [form for c in concepts for form in (c.erase, *c.synonyms)]
    forms += [c.prompt for c in concepts if not stems(c.erase) <= stems(c.prompt)]
    return set().union(*map(stems, forms))


def kept_moment(
    base: Base,
    concepts: Sequence[Concept],
    keep: Sequence[str] = (),
    *,
    on_prompts: Callable[[int, int], None] | None = None,
) -> Tensor:
    """G: the second moment of the vocabulary without the concepts' words, (D, D) in float64.

    Args:
        base: Its text encoder is asked.
        concepts: With their synonyms.
        keep: More prompts to keep; together they weigh as much as the vocabulary.
        on_prompts: Called with the number of vocabulary prompts encoded and their total.
    """
    prompts = list(prompts_of(words_of(base)))
    total, count = vocabulary_moment(base, prompts, on_prompts=on_prompts)
    named = named_words(concepts)
    about = [p for p in prompts if named & stems(p)]
    if about:
        own, own_count = prompts_moment(base, about)
        total, count = total - own, count - own_count
    moment = total / count
    return (moment + mean_moment(base, keep)) / 2 if keep else moment
