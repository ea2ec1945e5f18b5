"""The Stable Diffusion 1 and 2 family: one text encoder, cross-attention in a UNet, ε- or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor
from typing_extensions import override

from esd_lora.bases.base import Base, Condition
from esd_lora.recipe import Layers

_PROJECTIONS = r"(to_q|to_k|to_v|to_out\.0)"


class UNetBase(Base):
    """A pipeline around diffusers' UNet, which reads words by cross-attention.

    A UNet with `time_cond_proj_dim`, of a latent consistency model, is told the guidance scale and needs no second
    prediction to be guided.
    """

    layers: ClassVar[Mapping[Layers, str]] = {
        "esd-x": rf".*\.attn2\.{_PROJECTIONS}",
        "esd-x-strict": r".*\.attn2\.(to_k|to_v)",
        "esd-u": rf".*\.attn1\.{_PROJECTIONS}",
        "full": rf".*\.attn[12]\.{_PROJECTIONS}",
    }
    """The paper's ESD-u trains every weight outside cross-attention; adapters on attention reach only self-attention of
    those."""
    prefix: ClassVar[str] = "unet"

    @property
    @override
    def channels(self) -> int:
        """Channels of the latents."""
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    @override
    def text_layers(self) -> list[str]:
        """Names of the modules that are k and v of cross-attention."""
        return self.matched("esd-x-strict")

    @override
    def blank_condition(self, n: int) -> Condition:
        """Zeros: a prompt of CLIP has 77 tokens."""
        weight = self.denoiser.conv_in.weight
        words = weight.new_zeros(n, 77, self.denoiser.config.cross_attention_dim)
        return Condition({"encoder_hidden_states": words, **self.tell_guidance(n, 1.0)})

    @property
    @override
    def told_guidance(self) -> bool:
        """Whether it is the UNet of a latent consistency model."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def tell_guidance(self, n: int, guidance_scale: float) -> dict[str, Tensor]:
        """What tells the UNet of a latent consistency model the guidance scale, n times; nothing for others."""
        if not self.told_guidance:
            return {}
        size = self.denoiser.config.time_cond_proj_dim
        w = torch.full((n,), guidance_scale - 1)  # their scale counts from no guidance, diffusers' from one
        # a method of all these pipelines, which uses nothing of them
        told = LatentConsistencyModelPipeline.get_guidance_scale_embedding(self.pipe, w, embedding_dim=size)
        return {"timestep_cond": told.to(self.device, self.dtype)}


class StableDiffusionBase(UNetBase):
    """`StableDiffusionPipeline` as a Base."""

    family: ClassVar[str] = "stable-diffusion"

    @torch.no_grad()
    @override
    def encode(
        self, prompts: Sequence[str], *, resolution: int | None = None, guidance_scale: float = 1.0
    ) -> Condition:
        """The text encoder's last hidden states (B, L, D), as the pipeline computes them."""
        self.call_encoders()
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        words = embeds.to(self.device, self.dtype)
        return Condition({"encoder_hidden_states": words, **self.tell_guidance(len(words), guidance_scale)})

    @torch.no_grad()
    @override
    def text_states(self, prompts: Sequence[str], *, length: int) -> Tensor:
        """The text encoder's last hidden states (len(prompts), L, D), float32 on the CPU."""
        self.call_encoders()
        ids = self.token_ids(prompts, length=length).to(self.device)
        states: Tensor = self.pipe.text_encoder(ids).last_hidden_state
        return states.float().cpu()

    @override
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet's output, (B, C, H, W)."""
        out: Tensor = self.denoiser(x, t, **condition.tensors, return_dict=False)[0]
        return out
