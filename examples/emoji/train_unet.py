"""Train the denoiser and the text encoder of the embedded base on the latents of the pictures.

    python examples/emoji/train_unet.py --work build/emoji [--compile] [--resume] [--without cat neon]

The v-prediction loss of Stable Diffusion 2.1 (Salimans and Ho 2022), bf16 autocast where the CPU computes in it, an
exponential moving average of the weights, learning rate annealed to zero. With ε-prediction a small constant error of the
output, divided by √ᾱ_T, floods the picture with colour until late in training; v-prediction has no such division. A
checkpoint every 250 steps; `--resume` goes on from it as if never stopped.
`--init PIPELINE` starts from the weights of an earlier base instead of random ones.
`--without NAMES` leaves out every picture of these objects and styles: the gold model, which never knew them.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import captions
import checkpoint
import numpy as np
import render
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor, nn
from train_vae import autocast, to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from esd_lora.bases import load_base, quick_dtype
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.emoji.vocabulary import OBJECTS, STYLES, prompt
from esd_lora.evaluate.scores import gate

READ = 0.1  # weight of the reader's loss


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: CLIP's, three layers, 128 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """The untrained denoiser: the architecture of Stable Diffusion 1 in small, cross-attention at every level."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 2.1's schedule, sampled from its very last timestep on."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


@functools.cache
def made_of(work: Path) -> str:
    """A digest of all that the network is trained on."""
    return checkpoint.digest(work / "typical.npz", work / "vae" / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def latents_of(pictures: np.ndarray, work: Path) -> Tensor:
    """The latents (N, 4, 16, 16) float16 of all pictures, computed once."""
    path = work / f"latents-{made_of(work)}.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        parts = []
        for some in track(np.array_split(pictures, len(pictures) // 100), description="encode"):
            with autocast():
                parts.append(vae.encode(to_tensor(some)).latent_dist.mode().float())
        part = path.with_suffix(".part.npy")
        np.save(part, torch.cat(parts).half().numpy())
        part.replace(path)
    return torch.from_numpy(np.load(path))


def loss_of(unet: nn.Module, scheduler: DDIMScheduler, z: Tensor, hidden: Tensor) -> Tensor:
    """The v loss of a batch of latents (B, 4, 16, 16) with encoded captions (B, L, 128): v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0."""
    noise = torch.randn_like(z)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(z),))
    x_t = scheduler.add_noise(z, noise, t)
    with autocast():
        v = unet(x_t, t, hidden).sample
    return F.mse_loss(v.float(), scheduler.get_velocity(z, noise, t))


class Reader(nn.Module):
    """Reads object and style off the text encoder's output, so that synonyms come to mean the same early.

    It stands in for what CLIP's text encoder has learned from pictures before a diffusion model uses it, and is thrown
    away after training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.object, self.style = nn.Linear(128, len(OBJECTS)), nn.Linear(128, len(STYLES))

    def loss(self, hidden: Tensor, obj: Tensor, style: Tensor) -> Tensor:
        """Cross-entropy of a batch (B, L, 128) of outputs; labels (B,) of what a caption does not tell are -100."""
        last = hidden[:, -1].float()  # the padding sees the whole caption
        return F.cross_entropy(self.object(last), obj) + F.cross_entropy(self.style(last), style)


def pipeline_of(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as a stock pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def draw_grid(pipe: StableDiffusionPipeline, path: Path, *, guidance_scale: float = 3.0) -> None:
    """Save one picture of every object (columns) in every style (rows), seed 0 for all."""
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for style in STYLES:
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(20, 1, 1, 1)
        with autocast():
            pictures = pipe(
                [prompt(o, style) for o in OBJECTS],
                latents=noise,
                num_inference_steps=20,
                guidance_scale=guidance_scale,
                output_type="np",
            ).images
        rows.append(np.concatenate(list(pictures), 1))
    Image.fromarray(np.uint8(255 * np.concatenate(rows))).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, help="default: base, or without-NAMES, in --work")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--init", type=Path, help="a pipeline to start from")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=(*OBJECTS, *STYLES), metavar="NAME", help="to leave out"
    )
    parser.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler and two minutes")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    pictures, labels = render.load(args.work / "typical.npz")
    z = latents_of(pictures, args.work)
    names, looks = tuple(OBJECTS), tuple(STYLES)
    out = args.out or args.work / ("-".join(["without", *args.without]) if args.without else "base")
    unknown = set(args.without)
    rows = [i for i in range(len(z)) if not unknown & {names[labels.obj[i]], looks[labels.style[i]]}]

    tokenizer, scheduler = captions.build_tokenizer(), build_scheduler()
    unet, text_encoder = build_unet().train(), build_text_encoder(tokenizer).train()
    if args.init:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.init / "unet").state_dict())
        text_encoder.load_state_dict(CLIPTextModel.from_pretrained(args.init / "text_encoder").state_dict())
    reader = Reader()
    unet.set_attn_processor(AttnProcessor())  # the fused attention's backward is slow on CPUs
    denoise = torch.compile(unet) if args.compile else unet
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    weights = [*unet.parameters(), *text_encoder.parameters()]
    print(f"{sum(w.numel() for w in weights) / 1e6:.1f} M parameters, {len(rows)} pictures", flush=True)
    groups = [{"params": weights}, {"params": [*reader.parameters()]}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, args.steps)
    ema = EMAModel(weights, decay=args.ema, foreach=True)
    parts = {
        "unet": unet,
        "text": text_encoder,
        "reader": reader,
        "optimizer": optimizer,
        "schedule": schedule,
        "ema": ema,
    }
    out.mkdir(parents=True, exist_ok=True)
    path, first = out / "unet.ckpt", 0
    told = {k: getattr(args, k) for k in ("steps", "batch", "lr", "ema", "without")} | {"init": str(args.init or "")}
    told |= {"latents": made_of(args.work)}
    if state := checkpoint.load(path, told=told, resume=args.resume):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("unet", total=args.steps, completed=first)
        for step in range(first, args.steps):
            batch = [rows[i] for i in torch.randint(len(rows), (args.batch,)).tolist()]
            texts = [
                captions.caption(names[labels.obj[i]], looks[labels.style[i]], hat=bool(labels.hat[i])) for i in batch
            ]
            ids = captions.encode(tokenizer, [c.text for c in texts])
            obj = torch.tensor(
                [int(labels.obj[i]) if c.tells_object else -100 for i, c in zip(batch, texts, strict=True)]
            )
            style = torch.tensor(
                [int(labels.style[i]) if c.tells_style else -100 for i, c in zip(batch, texts, strict=True)]
            )
            with autocast():
                hidden = text_encoder(ids).last_hidden_state
            loss = loss_of(denoise, scheduler, z[batch].float(), hidden)
            read = reader.loss(hidden, obj, style)
            optimizer.zero_grad()
            (loss + READ * read).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            ema.step(weights)
            bar.update(task, advance=1, description=f"unet loss {loss.item():.4f}")
            if (step + 1) % 250 == 0:
                row = {"step": step + 1, "loss": round(loss.item(), 4), "read": round(read.item(), 4)}
                print(json.dumps(row), flush=True)
                states = {k: p.state_dict() for k, p in parts.items()}
                checkpoint.save(path, {**states, "step": step + 1}, told=told)
            if (step + 1) % 1000 == 0 and step + 1 < args.steps:
                ema.store(weights)
                ema.copy_to(weights)
                pipe = pipeline_of(unet.eval(), text_encoder.eval(), vae, tokenizer)
                draw_grid(pipe, out / f"grid-{step + 1:05d}.png")
                ema.restore(weights)
                unet.train(), text_encoder.train()
    # not in the loop, for a run that was killed after its last checkpoint does not enter it again
    ema.copy_to(weights)
    pipe = pipeline_of(unet.eval(), text_encoder.eval(), vae, tokenizer)
    draw_grid(pipe, out / f"grid-{args.steps:05d}.png")
    pipe.to(dtype=torch.float16)
    pipe.text_encoder.float()  # transformers keeps the dtype of the file, diffusers does not
    pipe.save_pretrained(out / "pipeline")
    (out / "training.json").write_text(json.dumps(told) + "\n")
    for name, found in gate(
        load_base(str(out / "pipeline"), dtype=quick_dtype()), load_evaluator("measure"), seeds=1
    ).items():
        print(f"{name}: {found.short()}")


if __name__ == "__main__":
    main()
