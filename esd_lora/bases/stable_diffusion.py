"""The Stable Diffusion 1 and 2 family: one text encoder, cross-attention in a UNet, ε- or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from esd_lora.bases.base import Base, Condition
from esd_lora.recipe import Layers

_PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0)"

UNET_LAYERS: Mapping[Layers, str] = {
    "esd-x": rf".*\.attn2\.{_PROJECTIONS}",
    "esd-x-strict": r".*\.attn2\.(to_k|to_v)",
    "esd-u": rf".*\.attn1\.{_PROJECTIONS}",
    "full": rf".*\.attn[12]\.{_PROJECTIONS}",
}
"""Presets over a diffusers UNet's attention. The paper's ESD-u trains every weight outside cross-attention; adapters on
attention layers reach only self-attention of those."""


class StableDiffusionBase(Base):
    """`StableDiffusionPipeline` as a Base."""

    family: ClassVar[str] = "stable-diffusion"
    layers: ClassVar[Mapping[Layers, str]] = UNET_LAYERS
    prefix: ClassVar[str] = "unet"

    @property
    def denoiser(self) -> Any:
        """The UNet."""
        return self.pipe.unet

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The text encoder's last hidden states (B, L, D), as the pipeline computes them."""
        self.pipe.text_encoder.to(self.device)
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition({"encoder_hidden_states": embeds.to(self.device, self.dtype)})

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str], *, length: int) -> Tensor:
        """The text encoder's last hidden states (len(prompts), L, D), float32 on the CPU."""
        ids = self.token_ids(prompts, length=length).to(self.device)
        states: Tensor = self.pipe.text_encoder.to(self.device)(ids).last_hidden_state
        return states.float().cpu()

    def token_ids(self, prompts: Sequence[str], *, length: int) -> Tensor:
        """The tokens, (len(prompts), L) on the CPU."""
        tokenizer = self.pipe.tokenizer
        how = {"padding": "max_length", "max_length": min(length, tokenizer.model_max_length), "truncation": True}
        ids: Tensor = tokenizer(list(prompts), return_tensors="pt", **how).input_ids
        return ids

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet's output, (B, C, H, W)."""
        out: Tensor = self.denoiser(x, t, **condition.tensors, return_dict=False)[0]
        return out

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W): the UNet's own size, or the resolution over the autoencoder's factor."""
        config = self.denoiser.config
        size = config.sample_size if resolution is None else resolution // self.pipe.vae_scale_factor
        return config.in_channels, size, size

    def free_encoders(self) -> None:
        """Move the text encoder and the autoencoder to the CPU; `generate` brings them back."""
        for part in (self.pipe.text_encoder, self.pipe.vae):
            part.to("cpu")
