"""The transformers that words and picture pass through together: Stable Diffusion 3 and 3.5, FLUX.1. All predict a flow.

Their attention is joint: tokens of the prompt and patches of the picture attend to each other, each through projections
of its own, and there is no cross-attention to give keys to. The presets keep their meaning:

    esd-x           the projections of the words: add_q_proj, add_k_proj, add_v_proj, to_add_out
    esd-x-strict    their keys and values: add_k_proj, add_v_proj
    esd-u           the projections of the picture: to_q, to_k, to_v, to_out.0, and all of FLUX's single blocks, which have
                    one set of projections for both
    full            all of these
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from typing_extensions import override

from esd_lora.bases.base import Base, Condition
from esd_lora.recipe import Layers

_WORDS = r"(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_PICTURE = r"(to_q|to_k|to_v|to_out\.0)"


class JointTransformerBase(Base):
    """A pipeline around a transformer with joint attention, whose scheduler may shift its timesteps by the picture's size."""

    layers: ClassVar[Mapping[Layers, str]] = {
        "esd-x": rf"transformer_blocks\.\d+\.attn\.{_WORDS}",
        "esd-x-strict": r"transformer_blocks\.\d+\.attn\.(add_k_proj|add_v_proj)",
        "esd-u": rf"(single_)?transformer_blocks\.\d+\.attn2?\.{_PICTURE}",
        "full": rf"(single_)?transformer_blocks\.\d+\.attn2?\.({_PICTURE}|{_WORDS})",
    }
    prefix: ClassVar[str] = "transformer"
    pixels: ClassVar[int] = 16
    patch_size: ClassVar[int] = 2
    """Latents along a side of what is one token of the picture."""
    max_shift: ClassVar[float]
    """What the pipeline takes where the scheduler's config does not say."""

    def shift(self, scheduler: Any, resolution: int | None) -> dict[str, float]:
        """How far a scheduler with dynamic shifting moves its timesteps for so many tokens of a picture."""
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, h, w = self.latent_shape(resolution)
        config = scheduler.config
        mu = calculate_shift(
            (h // self.patch_size) * (w // self.patch_size),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", self.max_shift),
        )
        return {"mu": mu}


class StableDiffusion3Base(JointTransformerBase):
    """`StableDiffusion3Pipeline` as a Base."""

    family: ClassVar[str] = "stable-diffusion-3"
    max_shift: ClassVar[float] = 1.16

    @property
    @override
    def channels(self) -> int:
        """Channels of the latents."""
        channels: int = self.denoiser.config.in_channels
        return channels

    @torch.no_grad()
    @override
    def encode(
        self, prompts: Sequence[str], *, resolution: int | None = None, guidance_scale: float = 1.0
    ) -> Condition:
        """The states of all text encoders (B, L, D) and the pooled words of both CLIPs, as the pipeline computes them."""
        self.call_encoders()
        some = list(prompts)
        words, _, pooled, _ = self.pipe.encode_prompt(
            some, some, some, device=self.device, do_classifier_free_guidance=False
        )
        return self._condition(words, pooled)

    @override
    def blank_condition(self, n: int) -> Condition:
        """Zeros: 77 tokens of CLIP and 256 of T5."""
        config, weight = self.denoiser.config, self.denoiser.context_embedder.weight
        words = weight.new_zeros(n, 77 + 256, config.joint_attention_dim)
        return self._condition(words, weight.new_zeros(n, config.pooled_projection_dim))

    def _condition(self, words: Tensor, pooled: Tensor) -> Condition:
        words, pooled = words.to(self.device, self.dtype), pooled.to(self.device, self.dtype)
        return Condition({"encoder_hidden_states": words, "pooled_projections": pooled})

    @override
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output, (B, C, H, W)."""
        out: Tensor = self.denoiser(hidden_states=x, timestep=t, **condition.tensors, return_dict=False)[0]
        return out

    @override
    def set_timesteps(self, scheduler: Any, steps: int, *, resolution: int | None, device: torch.device) -> None:
        """Set a scheduler's timesteps as the pipeline does, shifted by the picture's size where it does."""
        scheduler.set_timesteps(steps, device=device, **self.shift(scheduler, resolution))


class FluxBase(JointTransformerBase):
    """`FluxPipeline` as a Base. Latents are packed, four to a token, on their way into the transformer alone.

    FLUX.1-dev is told the guidance scale and predicts what is guided already: its trajectories move by that prediction
    alone, ε*(x_t, c) of the objective is guided too, and so η counts from there. FLUX.1-schnell has no guidance.
    """

    family: ClassVar[str] = "flux"
    max_shift: ClassVar[float] = 1.15

    @property
    @override
    def channels(self) -> int:
        """Channels of the latents, of which four make one token."""
        channels: int = self.denoiser.config.in_channels // 4
        return channels

    @property
    @override
    def sample_size(self) -> int:
        """Latents along a side of a picture of 1024 pixels, the pipeline's default."""
        return 128

    @torch.no_grad()
    @override
    def encode(
        self, prompts: Sequence[str], *, resolution: int | None = None, guidance_scale: float = 1.0
    ) -> Condition:
        """T5's states (B, L, D), CLIP's pooled words and, for a transformer that is told, the guidance scale."""
        self.call_encoders()
        words, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=self.device)
        return self._condition(words, pooled, guidance_scale)

    @override
    def blank_condition(self, n: int) -> Condition:
        """Zeros: 512 tokens of T5."""
        config, weight = self.denoiser.config, self.denoiser.context_embedder.weight
        words = weight.new_zeros(n, 512, config.joint_attention_dim)
        return self._condition(words, weight.new_zeros(n, config.pooled_projection_dim), 1.0)

    def _condition(self, words: Tensor, pooled: Tensor, guidance_scale: float) -> Condition:
        tensors = {
            "encoder_hidden_states": words.to(self.device, self.dtype),
            "pooled_projections": pooled.to(self.device, self.dtype),
        }
        if self.denoiser.config.guidance_embeds:
            tensors["guidance"] = torch.full((len(words),), guidance_scale, device=self.device)
        return Condition(tensors)

    @override
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output, (B, C, H, W); t is between 0 and 1000, as the scheduler gives it."""
        _, _, h, w = x.shape
        words = condition.tensors["encoder_hidden_states"]
        out: Tensor = self.denoiser(
            hidden_states=self.packed(x),
            timestep=t.to(x.dtype) / 1000,
            txt_ids=torch.zeros(words.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x), h // 2, w // 2, x.device, x.dtype),
            **condition.tensors,
            return_dict=False,
        )[0]
        unpacked: Tensor = FluxPipeline._unpack_latents(out, h, w, vae_scale_factor=1)
        return unpacked

    @override
    def packed(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) as tokens, (B, H/2 · W/2, 4 C)."""
        tokens: Tensor = FluxPipeline._pack_latents(x, *x.shape)
        return tokens

    @property
    @override
    def told_guidance(self) -> bool:
        """True: FLUX.1-dev is told, and FLUX.1-schnell has learned to do without."""
        return True

    @override
    def set_timesteps(self, scheduler: Any, steps: int, *, resolution: int | None, device: torch.device) -> None:
        """Set a scheduler's timesteps as the pipeline does: evenly spaced, then shifted by the picture's size."""
        how: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if scheduler.config.get("use_flow_sigmas"):
            how = {"num_inference_steps": steps}
        scheduler.set_timesteps(device=device, **how, **self.shift(scheduler, resolution))
        scheduler.set_begin_index(0)
