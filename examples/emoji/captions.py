"""Captions of the training pictures, and the tokenizer that reads them.

Every picture gets a new caption each time it is seen: a template, a surface form of the object and of the style (synonyms
and German included), the accessory where it is worn, sometimes only half of it, and 10 % of the time nothing at all.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from esd_lora.emoji.vocabulary import ACCESSORY_FORMS, OBJECTS, STYLES, article

ENGLISH = (
    "{a} in {s} style",
    "{a} in {s} style",
    "{s} style {o}",
    "a {s} picture of {a}",
    "an image of {a} in {s} style",
    "{o}, {s}",
    "{s} drawing of {a}",
    "a photo of {a}, {s} style",
)
GERMAN = ("{o} im {s} stil", "ein bild: {o}, {s}", "{s} bild von {o}")
OBJECT_ONLY = ("{o}", "{a}", "a picture of {a}", "an image of {a}", "a photo of {a}")
STYLE_ONLY = ("{s}", "{s} style", "a picture in {s} style", "an image in {s} style")
OTHER_WORDS = "with and without no not two the red blue big small ein eine mit ohne und on of drawing painting art"


def pick(options: tuple[str, ...]) -> str:
    """One of the options, by torch's random state (which checkpoints restore)."""
    return options[int(torch.randint(len(options), ()))]


class Caption(NamedTuple):
    """A caption, and what it tells."""

    text: str
    tells_object: bool
    tells_style: bool


def caption(obj: str, style: str, *, hat: bool) -> Caption:
    """A random caption of a picture."""
    chance = torch.rand(4).tolist()
    if chance[0] < 0.1:
        return Caption("", False, False)
    german = chance[1] < 0.2
    names, looks = OBJECTS[obj], STYLES[style]
    if german:
        o, s = names[-1], looks[-1] if chance[3] < 0.6 else style
    else:
        o = obj if chance[2] < 0.6 else pick(names[:-1])
        s = style if chance[3] < 0.7 else pick(looks[:-1])
    worn = ""
    if hat:
        worn = f" mit {ACCESSORY_FORMS[-1]}" if german else f" with {article(pick(ACCESSORY_FORMS[:-1]))}"
    if chance[0] < 0.14:
        return Caption(pick(STYLE_ONLY).format(s=s), False, True)
    tells_style = chance[0] >= 0.22
    templates = GERMAN if german else ENGLISH
    if not tells_style:
        templates = OBJECT_ONLY[:1] if german else OBJECT_ONLY
    return Caption(pick(templates).format(a=article(o) + worn, o=o + worn, s=s), True, tells_style)


def words() -> list[str]:
    """Every word of the captions, in a fixed order."""
    forms = [*ACCESSORY_FORMS, *OBJECTS, *STYLES]
    forms += [f for fs in (*OBJECTS.values(), *STYLES.values()) for f in fs]
    text = " ".join([*forms, *ENGLISH, *GERMAN, *OBJECT_ONLY, *STYLE_ONLY, OTHER_WORDS])
    for mark in ("{a}", "{o}", "{s}", ",", ":"):
        text = text.replace(mark, " ")
    return sorted({w for w in text.lower().replace("8bit", "bit").split() if w.isalpha()})


def merge(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """The parts of a word after byte-pair merging, lowest rank first."""
    while ranked := [(merges[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in merges]:
        _, i = min(ranked)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def build_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """CLIP's byte-level BPE with one token for each word of the captions; other words are spelled out."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet]
    merges: dict[tuple[str, str], int] = {}
    for word in words():
        parts = merge([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # later merges never apply before earlier ones, so earlier words stay whole
            merges.setdefault((parts[0], parts[1]), len(merges))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    begin, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*tokens, begin, end]))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=list(merges),
        model_max_length=max_length,
        bos_token=begin,
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (B, max_length), padded and truncated as the pipeline does."""
    ids: Tensor = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids
