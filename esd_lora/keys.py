"""Keys in closed form: the words that wake a patch, so that patches trained apart can be stacked.

In cross-attention k and v, ΔW c = B (A c): the rows of A are keys that a token's embedding c is compared with, and B is
what is added where one fits. With

    H = mean of c cᵀ over the tokens of prompts with the concept, G = the same over the text encoder's whole vocabulary,

the keys are the directions that the concept has most of for what the rest of the language has of them:

    a_i = argmax  aᵀ H a / aᵀ (G + λ I) a        the top generalised eigenvectors, scaled so that a_iᵀ H a_i = 1

A is frozen and shared by all layers; B is trained by the ESD loss as ever. UCE (Gandikota et al. 2024, arXiv:2308.14761)
weighs the same two moments, and closes B too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.patch import encode, write_file
from esd_lora.recipe import Concept

RIDGE = 1e-3
"""λ over the mean eigenvalue of G. Directions that the vocabulary hardly uses would get any gain; below a thousandth of
the mean they count as used."""

ONE = ("{}", "a {}", "a photo of a {}", "a picture of {}", "{} style")
TWO = ("a {} and a {}", "a {} with a {}", "{} in {} style", "a {} in {} style")
"""Templates of one and of two words; in the latter each word stands beside others."""

PAIRS = 6_000
BATCH = 64
PLAIN = frozenset(["a", "an", "the", "of", "in", "on", "with", "and", "or", "style", "from", "by", "to", "for"])
"""Words that a concept may have without being about them."""


def second_moment(states: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Σ c cᵀ over all tokens, (D, D) in float64, and their number; from batches (N, L, D)."""
    total, count = torch.zeros(()), 0
    for batch in states:
        tokens = batch.flatten(0, 1).double()
        total = total + tokens.T @ tokens
        count += len(tokens)
    return total, count


def generalised_keys(hit: Tensor, keep: Tensor, *, rank: int, ridge: float = RIDGE) -> Tensor:
    """A: the top generalised eigenvectors of (H, G + λI) as rows, (rank, D), with A H Aᵀ = I.

    Through the Cholesky factor G + λI = L Lᵀ: the eigenvectors u of L⁻¹ H L⁻ᵀ give a = L⁻ᵀ u.

    Args:
        hit: H, (D, D), float64.
        keep: G, (D, D), float64.
        rank: How many keys; where the concept has fewer directions, the last ones are zero.
        ridge: λ over the mean eigenvalue of G.
    """
    eye = torch.eye(len(keep), dtype=torch.float64)
    lower = torch.linalg.cholesky(keep + ridge * keep.trace() / len(keep) * eye)
    white = torch.linalg.solve_triangular(lower, hit, upper=False)
    white = torch.linalg.solve_triangular(lower, white.T, upper=False)
    gain, u = torch.linalg.eigh((white + white.T) / 2)
    rows = torch.linalg.solve_triangular(lower.T, u[:, -rank:].flip(1), upper=True).T
    energy = torch.einsum("rd,de,re->r", rows, hit, rows)
    energy[gain[-rank:].flip(0) < 1e-12 * gain[-1]] = torch.inf
    keys: Tensor = rows / energy.sqrt()[:, None]
    return keys


def words_of(base: Base) -> list[str]:
    """Every whole word of letters in the text encoder's vocabulary, in a fixed order."""
    tokens = base.pipe.tokenizer.get_vocab()
    words = {t.removesuffix("</w>") for t in tokens if t.endswith("</w>")}
    return sorted(w for w in words if w.isalpha() and w.isascii())


def prompts_of(words: Sequence[str]) -> Iterator[str]:
    """The prompts that stand for a vocabulary: every word in a template of `ONE`, and first in templates of `TWO`.

    The fewer words there are, the more others each stands beside, so that there are never fewer than `PAIRS` such prompts.
    """
    for i, word in enumerate(words):
        yield ONE[i % len(ONE)].format(word)
        for k in range(max(1, PAIRS // len(words))):
            yield TWO[(i + k) % len(TWO)].format(word, words[_draw(f"{word} {k}", len(words))])


def _draw(text: str, n: int) -> int:
    """A number below n that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % n


def vocabulary_moment(base: Base, *, on_prompts: Callable[[int, int], None] | None = None) -> tuple[Tensor, int]:
    """Σ c cᵀ over the prompts of the whole vocabulary, and the number of tokens; kept on disk by the text encoder.

    Args:
        base: Its text encoder is asked.
        on_prompts: Called with the number of prompts encoded and their total.
    """
    words = words_of(base)
    path = _cache(base, words)
    if path.exists():
        try:
            stored = safetensors.torch.load_file(path)
            return stored["moment"], int(stored["count"])
        except SafetensorError:
            path.unlink()
    prompts, done = list(prompts_of(words)), 0

    def states() -> Iterator[Tensor]:
        nonlocal done
        for some in _batched(prompts):
            yield base.text_states(some)
            done += len(some)
            if on_prompts:
                on_prompts(done, len(prompts))

    moment, count = second_moment(states())
    write_file(path, encode({"moment": moment, "count": torch.tensor(count)}, {}))
    return moment, count


def _batched(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The prompts, `BATCH` at a time."""
    for first in range(0, len(prompts), BATCH):
        yield prompts[first : first + BATCH]


def _cache(base: Base, words: Sequence[str]) -> Path:
    """Where the moment of a text encoder is kept: by what it answers to some of the prompts, and by all of them."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esd_lora" / "vocabulary"
    prompts = list(prompts_of(words))
    probe = base.text_states(prompts[:: max(1, len(prompts) // 8)][:8]).half().numpy().tobytes()
    digest = hashlib.sha256("\n".join(prompts).encode() + probe).hexdigest()
    return home / f"{digest[:32]}.safetensors"


def concept_prompts(concepts: Sequence[Concept], words: Sequence[str]) -> list[str]:
    """Prompts with the concepts and their synonyms: alone, and beside words of the vocabulary."""
    prompts = []
    for concept in concepts:
        for form in (concept.erase, *concept.synonyms):
            prompts += [t.format(form) for t in ONE]
            for k in range(16):
                beside = words[_draw(f"{form} {k}", len(words))]
                prompts += [t.format(*pair) for t in TWO for pair in ((form, beside), (beside, form))]
    return list(dict.fromkeys(prompts))


def named_words(concepts: Sequence[Concept]) -> set[str]:
    """The words that the concepts are about, in lower case."""
    text = " ".join(" ".join((c.erase, *c.synonyms)) for c in concepts)
    return set(re.findall(r"\w+", text.lower())) - PLAIN


def closed_form_keys(
    base: Base,
    concepts: Sequence[Concept],
    *,
    rank: int,
    keep: Sequence[str] = (),
    ridge: float = RIDGE,
    on_prompts: Callable[[int, int], None] | None = None,
) -> Tensor:
    """A for a patch that erases these concepts, (rank, D), float32.

    Args:
        base: Its text encoder is asked.
        concepts: With their synonyms.
        rank: How many keys.
        keep: Prompts that must not wake the patch, beside the vocabulary; together they weigh as much as it does.
        ridge: See `generalised_keys`.
        on_prompts: Called with the number of vocabulary prompts encoded and their total.
    """
    words, named = words_of(base), named_words(concepts)
    total, count = vocabulary_moment(base, on_prompts=on_prompts)
    about = [p for p in prompts_of(words) if named & set(re.findall(r"\w+", p.lower()))]
    if about:
        own, own_count = second_moment(base.text_states(p) for p in _batched(about))
        total, count = total - own, count - own_count
    moment = total / count
    if keep:
        kept, kept_count = second_moment(base.text_states(p) for p in _batched(keep))
        moment = (moment + kept / kept_count) / 2
    rest = [w for w in words if w not in named]
    hit, hit_count = second_moment(base.text_states(p) for p in _batched(concept_prompts(concepts, rest)))
    return generalised_keys(hit / hit_count, moment, rank=rank, ridge=ridge).float()
