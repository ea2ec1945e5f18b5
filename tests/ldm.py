"""A Stable Diffusion 1 pipeline as one file in the names of the original code, as people share checkpoints.

The names are those of CompVis' latent-diffusion code; an input block is a resnet with its attention, or a downsampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]

RESNET: Rules = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
UNET: Rules = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)
VAE: Rules = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def unet_name(name: str, layers: int) -> str:
    """The original name of a tensor of a UNet with so many layers a block."""
    block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if block:
        side, i, part, j, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        first = i * (layers + 1)
        if side == "down":
            place = f"input_blocks.{1 + first + (layers if part == 'downsamplers' else j)}"
        else:
            place = f"output_blocks.{first + (layers if part == 'upsamplers' else j)}"
        # an upsampler comes after the attention, which only the first of two up blocks of the tiny UNet has
        slot = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "2" if i == 0 else "1"}[part]
        name = f"{place}.{slot}.{rest.replace('conv', 'op', 1) if part == 'downsamplers' else rest}"
        return renamed(name, RESNET) if part == "resnets" else name
    return renamed(renamed(name, UNET), RESNET if ".resnets." in name else ())


def renamed(name: str, rules: Rules) -> str:
    for old, new in rules:
        name = re.sub(rf"(?:^|(?<=\.)){old}(?=\.)", new, name)
    return name


def vae_name(name: str) -> str:
    """The original name of a tensor of the autoencoder, whose up blocks count from the picture."""
    up = re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name)
    if up:
        rest = up[2].replace("resnets", "block").replace("upsamplers.0", "upsample")
        name = f"decoder.up.{1 - int(up[1])}.{rest}"
    return renamed(name, VAE)


def tensors_of(pipe: Any) -> Iterator[tuple[str, Tensor]]:
    for name, weight in pipe.unet.state_dict().items():
        yield f"model.diffusion_model.{unet_name(name, pipe.unet.config.layers_per_block)}", weight
    for name, weight in pipe.vae.state_dict().items():
        conv = ".attn_1." in vae_name(name) and weight.ndim == 2  # the original has 1 × 1 convolutions there
        yield f"first_stage_model.{vae_name(name)}", weight[:, :, None, None] if conv else weight
    for name, weight in pipe.text_encoder.state_dict().items():
        yield f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}", weight


def save_single_file(pipe: Any, path: Path, **extra: Tensor) -> Path:
    """The file with a tiny Stable Diffusion pipeline in it, and extra keys."""
    tensors = {name: weight.contiguous().clone() for name, weight in tensors_of(pipe)}
    safetensors.torch.save_file({**tensors, **extra}, path)
    return path


MARK = torch.zeros(0)
"""What the keys by which fine-tunes tell of v-prediction hold."""
