"""How long closed-form keys take with text encoders of true size: the vocabulary's statistics, then the patch itself.

    python benchmarks/vocabulary.py [--prompts 256] [--dtype bf16]

CLIP's tokenizer has 32,849 words of letters (counted in its published list of merges), so as many prompts, 16 tokens of each.
Some are timed with random weights, and the time of all of them follows; a text encoder's statistics are kept on disk, so that
this is paid once. The patch is then solved for in every k and v of cross-attention, on the CPU in float64.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from esd_lora.bases import DTYPES, quick_dtype
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.bases.stable_diffusion_xl import StableDiffusionXLBase
from esd_lora.closed_form import edit
from esd_lora.keys import LENGTH, generalised_keys, prompts_moment

WORDS = 32_849
L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
"""CLIP-L, OpenCLIP-H without its last layer, and OpenCLIP-bigG, as Stable Diffusion 1, 2 and XL have them."""

KV = {
    768: [320] * 10 + [640] * 10 + [1280] * 12,
    1024: [320] * 10 + [640] * 10 + [1280] * 12,
    2048: [640] * 20 + [1280] * 120,
}
"""Widths of all k and v of cross-attention, by the width of the words: 32 layers, and 140 of SDXL."""


def tokenizer() -> CLIPTokenizer:
    """CLIP's alphabet without merges: every word is spelled out, which costs as many tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(names)}, merges=[], model_max_length=77)


def bases(dtype: torch.dtype) -> dict[str, Any]:
    """Bases of a text encoder and next to nothing else."""
    words, tiny = tokenizer(), torch.nn.Linear(1, 1)

    def encoder(kind: Any, config: dict[str, Any]) -> Any:
        torch.set_default_dtype(dtype)
        made = kind(CLIPTextConfig(vocab_size=49_408, **config)).eval()
        torch.set_default_dtype(torch.float32)
        return made

    def base(family: Any, **parts: Any) -> Any:
        pipe: Any = SimpleNamespace(unet=tiny, components=parts, **parts)
        return family(pipe, name="random", fingerprint="random")

    alone = {"tokenizer": words}
    both = {"tokenizer": words, "tokenizer_2": words}
    return {
        "CLIP-L": lambda: base(StableDiffusionBase, text_encoder=encoder(CLIPTextModel, L), **alone),
        "OpenCLIP-H": lambda: base(StableDiffusionBase, text_encoder=encoder(CLIPTextModel, H), **alone),
        "SDXL's two": lambda: base(
            StableDiffusionXLBase,
            text_encoder=encoder(CLIPTextModel, L),
            text_encoder_2=encoder(CLIPTextModelWithProjection, G),
            **both,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=256, help="to time")
    parser.add_argument("--dtype", choices=DTYPES, default=quick_dtype())
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.dtype}, {LENGTH} tokens a prompt\n")
    print(
        "| text encoders | width | seconds for 1,000 prompts | minutes for the vocabulary | seconds for a patch of rank 2 |"
    )
    print("|---|---|---|---|---|")
    for name, build in bases(DTYPES[args.dtype]).items():
        base = build()
        prompts = [f"a picture of number {i}" for i in range(args.prompts)]
        prompts_moment(base, prompts[:64])  # warm
        started = time.monotonic()
        total, count = prompts_moment(base, prompts)
        each = (time.monotonic() - started) / len(prompts)
        kept = total / count
        started = time.monotonic()
        keys = generalised_keys(kept, kept + torch.eye(len(kept)).double(), rank=2)
        for out in KV[len(kept)]:
            edit(torch.randn(out, len(kept)).double(), kept, kept, kept, rank=2, keep_weight=2.0, keys=keys)
        solved = time.monotonic() - started
        print(f"| {name} | {len(kept)} | {1000 * each:.1f} | {WORDS * each / 60:.1f} | {solved:.1f} |", flush=True)


if __name__ == "__main__":
    main()
