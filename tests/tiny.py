"""A random Stable Diffusion pipeline of 0.3 M parameters, for tests of everything but erasure itself."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level alphabet without merges: every word is spelled out."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    begin, end = "<|startoftext|>", "<|endoftext|>"
    names = [*alphabet, *(c + "</w>" for c in alphabet), begin, end]
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(names)}, merges=[], model_max_length=16, **special)


def tiny_pipeline(*, prediction_type: str = "epsilon", cross_attention: bool = True) -> StableDiffusionPipeline:
    """The pipeline, its weights drawn from seed 0."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = "CrossAttn" if cross_attention else ""
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", f"{kind}DownBlock2D"),
        up_block_types=(f"{kind}UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if cross_attention else None,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny(folder: Path, **kind: object) -> Path:
    """The folder with a tiny pipeline in it."""
    tiny_pipeline(**kind).save_pretrained(folder)  # type: ignore[arg-type]
    return folder
