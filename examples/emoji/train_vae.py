"""Train the autoencoder of the embedded base: 64 × 64 pictures to 4 × 16 × 16 latents of unit variance.

    python examples/emoji/train_vae.py --work build/emoji [--resume]

Loss: L1 + L2 + the L1 of image gradients (crisp edges matter more than texture here) + a small KL term. Afterwards each
latent channel is shifted and scaled to mean 0 and variance 1 by folding the affine map into the 1 × 1 convolutions on both
sides of the latent, so that the stock class with scaling_factor 1 has normalised latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import checkpoint
import numpy as np
import render
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from esd_lora.bases import quick_dtype
from esd_lora.emoji.evaluators import to_tensor


def autocast() -> torch.autocast:
    """A context of bf16, where the CPU computes in it; by number, as others do, it takes many times as long as float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=quick_dtype() == "bf16")


def build() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=render.PX,
        scaling_factor=1.0,
    )


def to_pictures(x: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def loss_of(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss and L1 of a batch (B, 3, 64, 64)."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    l1 = F.l1_loss(y, x)
    gradient = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return l1 + F.mse_loss(y, x) + 0.5 * gradient + 1e-3 * kl, l1.detach()


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Fold an affine map into the 1 × 1 convolutions so that each latent channel has mean 0 and variance 1."""
    z = torch.cat([vae.encode(to_tensor(p)).latent_dist.mode() for p in np.array_split(pictures, len(pictures) // 100)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    assert inner is not None
    assert outer is not None
    outer.bias += (outer.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    outer.weight *= std[None, :, None, None]
    inner.weight[:4] /= std[:, None, None, None]
    inner.bias[:4] = (inner.bias[:4] - mean) / std
    inner.bias[4:] -= 2 * std.log()  # the log-variance of the posterior


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    pictures, _ = render.load(args.work / "pictures.npz")
    vae = build()
    vae.set_attn_processor(AttnProcessor())  # the fused attention's backward is slow on CPUs
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, args.steps)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    path, first = args.work / "vae.ckpt", 0
    told = {"steps": args.steps, "batch": args.batch, "pictures": checkpoint.digest(args.work / "pictures.npz")}
    if state := checkpoint.load(path, told=told, resume=args.resume):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("vae", total=args.steps, completed=first)
        for step in range(first, args.steps):
            rows = torch.randint(len(pictures), (args.batch,)).numpy()
            x = to_tensor(pictures[rows])
            with autocast():
                loss, l1 = loss_of(vae, x)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"vae l1 {l1:.4f}")
            if (step + 1) % 250 == 0:
                print(f"step {step + 1} loss {loss.item():.4f} l1 {l1.item():.4f}", flush=True)
                states = {k: p.state_dict() for k, p in parts.items()}
                checkpoint.save(path, {**states, "step": step + 1}, told=told)
    vae.eval()
    normalise(vae, pictures[:6000])
    vae.save_pretrained(args.work / "vae")
    with torch.no_grad():
        x = to_tensor(pictures[:120])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    print(f"round trip L1 {F.l1_loss(y, x).item():.4f} of 2")
    both = np.concatenate([pictures[:120].reshape(6, 20, 64, 64, 3), to_pictures(y).reshape(6, 20, 64, 64, 3)], 2)
    Image.fromarray(both.transpose(0, 2, 1, 3, 4).reshape(-1, 20 * 64, 3)).save(args.work / "vae.png")


if __name__ == "__main__":
    main()
