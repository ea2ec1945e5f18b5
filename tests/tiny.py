"""Random pipelines of every family, with well under a million parameters each, for tests of everything but erasure itself."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

NOISE: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's schedule."""


def tiny_tokenizer(*, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level alphabet without merges: every word is spelled out."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    begin, end = "<|startoftext|>", "<|endoftext|>"
    names = [*alphabet, *(c + "</w>" for c in alphabet), begin, end]
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad}
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(names)}, merges=[], model_max_length=16, **special)


def tiny_clip(tokenizer: CLIPTokenizer, *, hidden: int = 32, projection: int = 32) -> CLIPTextConfig:
    """The config of a text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """T5's encoder, 32 wide, and a tokenizer of letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + [(c, -3.0) for c in string.ascii_lowercase], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5EncoderModel(config), tokenizer


def tiny_vae(*, channels: int = 4, **config: Any) -> AutoencoderKL:
    """An autoencoder that halves the sides."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )


def tiny_pipeline(
    *, prediction_type: str = "epsilon", cross_attention: bool = True, guidance_size: int | None = None
) -> StableDiffusionPipeline:
    """Stable Diffusion, its weights drawn from seed 0; `guidance_size` makes a latent consistency model of it."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
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
        time_cond_proj_dim=guidance_size,
    )
    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_clip(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl() -> StableDiffusionXLPipeline:
    """SDXL: text encoders of 16 and 32, pooled words of 24."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad="!")
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_clip(tokenizer, hidden=16)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip(tokenizer_2, projection=24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium's kind: two CLIPs and T5, a block with a second self-attention."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    text_encoder_3, tokenizer_3 = tiny_t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 12,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(tiny_clip(tokenizer, hidden=16, projection=16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip(tokenizer_2, hidden=12, projection=12)),
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def tiny_flux(*, guidance_embeds: bool = True) -> FluxPipeline:
    """FLUX.1-dev, or schnell where it is told no guidance scale."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_encoder_2, tokenizer_2 = tiny_t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15),
        vae=tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(tiny_clip(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


TINY: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_pipeline,
    "xl": tiny_xl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
"""A pipeline of every family."""


def save_tiny(folder: Path, **kind: object) -> Path:
    """The folder with a tiny Stable Diffusion pipeline in it."""
    tiny_pipeline(**kind).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def save_checked(folder: Path) -> Path:
    """The folder with the same in it, and a random safety checker that holds back some pictures."""
    pipe = tiny_pipeline()
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=tiny, projection_dim=8))
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(0.465)  # among the cosines of pictures that the tiny base draws
        checker.special_care_embeds_weights.fill_(2)  # above any cosine
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    pipe.register_modules(safety_checker=checker, feature_extractor=processor)
    pipe.save_pretrained(folder)
    return folder


def checked_by(folder: Path, pictures: Sequence[Image.Image]) -> list[bool]:
    """Which of the pictures a folder's safety checker lets pass, each looked at by itself."""
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    given = (processor([picture], return_tensors="pt").pixel_values for picture in pictures)
    return [not checker(clip_input=pixels, images=torch.zeros(1, 1))[1][0] for pixels in given]


def save_clip(folder: Path) -> Path:
    """The folder, with a small random CLIP in it."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=tiny_clip(tokenizer).to_dict(),
        vision_config={**vision, "image_size": 32, "patch_size": 8, "projection_dim": 24},
        projection_dim=24,
        initializer_factor=20.0,  # so that random features are far apart
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
