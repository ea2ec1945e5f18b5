"""Can an erased concept be found again? Concept inversion (Pham et al. 2024, arXiv:2308.01508) of each kind of patch.

    python examples/inversion.py --out runs/inversion [--concepts cat neon] [--kinds base keyed] [--steps 250]

The attacker holds the erased model and pictures of the concept. Two words that mean something else are given new embeddings,
trained until the erased model denoises those pictures best when asked for these words; then it draws with them, from seeds
never used. The evaluator counts how often the concept is back: of the unerased base that is the ceiling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from rich.progress import track
from stacking import KINDS, patch_of
from torch import Tensor

from esd_lora.bases import Base, Condition, load_base
from esd_lora.compose import attach
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import OBJECTS, STYLES, prompt
from esd_lora.evaluate.rates import Rate, rate
from esd_lora.evaluate.scores import FIRST_SEED
from esd_lora.patch import Patch, write_file
from esd_lora.pictures import Pictures, generate

FOUND = "orchard volume"
"""Two words of the vocabulary that no prompt here has; their embeddings are what the attacker looks for."""
SHOWN, BATCH, LR = 48, 8, 2e-2


def asked(concept: str, words: str, n: int, *, first: int) -> list[str]:
    """Prompts for a concept in these words: an object in every style in turn, or a style of every object."""
    if concept in OBJECTS:
        return [prompt(words, list(STYLES)[(first + i) % len(STYLES)]) for i in range(n)]
    return [prompt(list(OBJECTS)[(first + i) % len(OBJECTS)], words) for i in range(n)]


@torch.no_grad()
def latents_of(base: Base, pictures: Pictures) -> Tensor:
    """The pictures' latents, (N, C, H, W)."""
    x = VaeImageProcessor().preprocess(pictures).to(base.device, base.dtype)
    z: Tensor = base.pipe.vae.encode(x).latent_dist.mode()
    return z * base.pipe.vae.config.scaling_factor


def invert(base: Base, prompts: Sequence[str], z: Tensor, *, steps: int) -> None:
    """Train the embeddings of `FOUND` in the base's text encoder, and nothing else, to denoise z with the prompts."""
    encoder, scheduler = base.pipe.text_encoder, base.scheduler
    table = encoder.get_input_embeddings().weight
    ids = base.token_ids(prompts, length=base.pipe.tokenizer.model_max_length)
    rows = base.token_ids([FOUND], length=4)[0, 1:3]
    table.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], lr=LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(steps), description="invert"):
        some = torch.randint(len(z), (BATCH,), generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noise = torch.randn(z[some].shape, generator=generator)
        x_t = scheduler.add_noise(z[some], noise, t)
        v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(z[some], noise, t) if v else noise
        states = encoder(ids[some]).last_hidden_state
        loss = F.mse_loss(base.predict(x_t, t, Condition({"encoder_hidden_states": states})), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        gradient = torch.zeros_like(table)
        gradient[rows] = table.grad[rows]
        table.grad = gradient
        optimizer.step()
    table.requires_grad_(False)


def recovered(concept: str, patch: Patch | None, evaluator: Evaluator, *, steps: int) -> dict[str, Rate]:
    """How often the concept is seen when asked for by name and by the words found, 16 seeds of 4 prompts each."""
    base = load_base("emoji")
    shown = [FIRST_SEED + 400_000 + i for i in range(SHOWN)]
    z = latents_of(base, generate(base, asked(concept, concept, SHOWN, first=0), shown))
    attach(base, [patch] if patch else [])
    base.denoiser.requires_grad_(False)
    invert(base, asked(concept, FOUND, SHOWN, first=0), z, steps=steps)
    seeds = [FIRST_SEED + 500_000 + i for i in range(16)] * 4
    rates = {}
    for how, words in (("by name", concept), ("by inversion", FOUND)):
        prompts = [p for p in asked(concept, words, 4, first=1) for _ in range(16)]
        seen = evaluator.judge(generate(base, prompts, seeds))
        rates[how] = rate([concept in pair for pair in zip(seen.objects, seen.styles, strict=True)])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/inversion"))
    parser.add_argument("--patches", type=Path, default=Path("runs/stacking/patches"), help="where patches are kept")
    parser.add_argument("--concepts", nargs="+", choices=(*OBJECTS, *STYLES), default=["cat", "neon"], metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=("base", *KINDS), default=("base", *KINDS), metavar="KIND")
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    evaluator = load_evaluator("measure")
    print("| concept | kind | seen when asked by name | by inversion |\n|---|---|---|---|")
    for concept in args.concepts:
        for kind in args.kinds:
            folder = args.patches / f"{kind}-{concept}-0".replace(", ", "-").replace(" ", "-")
            patch = None if kind == "base" else patch_of(load_base("emoji"), [concept], kind, 0, folder)
            name = f"{concept} {kind} {args.steps} {patch.digest[:12] if patch else ''}".replace(", ", "-").strip()
            path = args.out / f"{name.replace(' ', '-')}.json"
            if not path.exists():
                found = recovered(concept, patch, evaluator, steps=args.steps)
                write_file(path, json.dumps({k: vars(r) for k, r in found.items()}).encode())
            shown = [Rate(**r).interval() for r in json.loads(path.read_text()).values()]
            print(f"| {concept} | {kind} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
