"""Soft words: embeddings that no word has, read by the text encoders as if they stood in their tables.

    τ("a photo of v_1 … v_K")        with v_1 … v_K ∈ ℝ^D in place of rows of the table, and gradients that reach them

Textual inversion (Gal et al. 2022, arXiv:2208.01618) adds rows to the table; here some words of the vocabulary stand for them,
in a hook on the embedding layer, so that no weight, tokenizer or table is changed. Attacks train soft words to bring an erased
concept back, and robust training does so before they can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esd_lora.bases.base import Base, Condition
from esd_lora.bases.stable_diffusion import UNetBase
from esd_lora.errors import BaseModelError, RecipeError
from esd_lora.keys import words_of


@dataclass(frozen=True)
class Vocabulary:
    """V words that are one token each, with the token of each word and its embedding for every text encoder.

    words: V; ids: (V,) each; embeddings: (V, D) each, float32, on the base's device.
    """

    words: list[str]
    ids: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...]


def vocabulary_of(base: Base) -> Vocabulary:
    """The whole words of letters that every tokenizer of the base takes as one token, and gives back.

    Raises:
        BaseModelError: The base is no Stable Diffusion 1, 2 or XL, or its tokenizer marks no whole words.
    """
    encoders = _encoders(base)
    words = words_of(base)
    kept = []
    for tokenizer, _ in encoders:
        known, ids = tokenizer.get_vocab(), tokenizer(words, add_special_tokens=False).input_ids
        kept.append([i[0] if i == [known.get(f"{w}</w>")] else None for w, i in zip(words, ids, strict=True)])
    rows = [r for r in range(len(words)) if all(ids[r] is not None for ids in kept)]
    tokens = tuple(torch.tensor([ids[r] for r in rows], device=base.device) for ids in kept)
    tables = [encoder.get_input_embeddings().weight.detach() for _, encoder in encoders]
    return Vocabulary(
        [words[r] for r in rows], tokens, tuple(t[i].float() for t, i in zip(tables, tokens, strict=True))
    )


def _encoders(base: Base) -> list[tuple[Any, Any]]:
    """Tokenizers and text encoders, on the base's device."""
    if not isinstance(base, UNetBase):
        raise BaseModelError(
            f"{base.name}: {base.family} does not read words by CLIP alone; soft words are for Stable Diffusion 1, 2 and XL"
        )
    base.call_encoders()
    parts = base.pipe.components
    return [(parts[f"tokenizer{n}"], parts[f"text_encoder{n}"]) for n in ("", "_2") if parts.get(f"text_encoder{n}")]


@dataclass(frozen=True)
class SoftWords:
    """Some words of the vocabulary that stand for other embeddings wherever they follow one another.

    words: K of them; ids: their tokens, (K,) for every text encoder; embeddings: what they stand for, (K, D) each.
    """

    words: str
    ids: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...]

    @contextmanager
    def active(self, base: Base) -> Iterator[None]:
        """Inside, the base's text encoders read the words so; gradients reach the embeddings, weights are never changed."""
        handles = [
            encoder.get_input_embeddings().register_forward_hook(partial(_overwrite, ids, embeddings))
            for (_, encoder), ids, embeddings in zip(_encoders(base), self.ids, self.embeddings, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _overwrite(run: Tensor, embeddings: Tensor, _module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    """A hook on an encoder's input embeddings (B, L, D), which puts others where a run of tokens is."""
    rows, first = _runs(args[0], run).nonzero(as_tuple=True)
    places = first[:, None] + torch.arange(len(run), device=first.device)
    out = out.clone()
    out[rows[:, None], places] = embeddings.to(out.dtype)
    return out


def _runs(ids: Tensor, run: Tensor) -> Tensor:
    """Where in ids (B, L) a run of K tokens starts, (B, L − K + 1)."""
    return (ids.unfold(1, len(run), 1) == run.to(ids.device)).all(-1)


def unused_words(vocabulary: Vocabulary, tokens: int, *, beside: Sequence[str]) -> SoftWords:
    """Words that none of some prompts has, with their own embeddings still.

    Raises:
        RecipeError: The vocabulary has not so many.
    """
    used = set(" ".join(beside).lower().split())
    free = [i for i, word in enumerate(vocabulary.words) if word not in used]
    check_tokens(tokens, free)
    some = free[-tokens:]
    words = " ".join(vocabulary.words[i] for i in some)
    return SoftWords(words, tuple(x[some] for x in vocabulary.ids), tuple(x[some] for x in vocabulary.embeddings))


def at_random(vocabulary: Vocabulary, tokens: int, *, beside: Sequence[str], seed: int) -> SoftWords:
    """Words with embeddings drawn with the mean and the spread of the vocabulary's.

    Raises:
        RecipeError: The vocabulary has not so many words that none of the prompts has.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for table in vocabulary.embeddings:
        unit = torch.randn(tokens, table.shape[1], generator=generator).to(table.device)
        drawn.append(table.mean(0) + table.std(0) * unit)
    return replace(unused_words(vocabulary, tokens, beside=beside), embeddings=tuple(drawn))


def check_tokens(tokens: int, words: Sequence[Any]) -> None:
    """Nothing, if there are so many words.

    Raises:
        RecipeError: There are not.
    """
    if not 1 <= tokens <= len(words):
        raise RecipeError(f"tokens: must be from 1 to {len(words)}, the words of the vocabulary, got {tokens}")


def check_room(base: Base, soft: SoftWords, prompts: Sequence[str]) -> None:
    """Nothing, if the text encoder reads all soft words in every prompt.

    Raises:
        RecipeError: A prompt is too long.
    """
    limit: int = base.pipe.tokenizer.model_max_length
    run = soft.ids[0].cpu()
    for prompt, ids in zip(prompts, base.token_ids(prompts, length=limit), strict=True):
        if len(run) > limit or not _runs(ids[None], run).any():
            raise RecipeError(f"{prompt!r}: too long, only {limit} tokens are read; use fewer words, or fewer `tokens`")


def encode_with_gradients(base: Base, prompts: Sequence[str], like: Condition) -> Condition:
    """The condition of prompts with gradients, which `Base.encode` stops; all but the words is as in the condition of one."""
    found = base.pipe.encode_prompt(
        list(prompts), device=base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    tensors = {"encoder_hidden_states": found[0]}
    if "text_embeds" in like.tensors:
        tensors["text_embeds"] = found[2]
    tensors = {k: v.to(base.device, base.dtype) for k, v in tensors.items()}
    return Condition({**like.expand(len(prompts)).tensors, **tensors})
