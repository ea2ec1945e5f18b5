"""The SDXL family: two text encoders side by side, pooled words and the picture's size beside the timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from esd_lora.bases.base import Condition
from esd_lora.bases.stable_diffusion import UNetBase

ADDED = ("text_embeds", "time_ids")
"""What the UNet adds to the embedding of the timestep: the pooled words, and original size, crop and target size."""


class StableDiffusionXLBase(UNetBase):
    """`StableDiffusionXLPipeline` as a Base: the UNet of the base model, without the refiner."""

    family: ClassVar[str] = "stable-diffusion-xl"
    wordless: ClassVar[str] = " "  # CLIP's tokenizer strips it; the empty prompt may be zeros

    @torch.no_grad()
    @override
    def encode(
        self, prompts: Sequence[str], *, resolution: int | None = None, guidance_scale: float = 1.0
    ) -> Condition:
        """The penultimate states of both text encoders (B, L, D₁ + D₂), the second's pooled words and the time ids.

        The empty prompt is zeros where the pipeline samples without a prompt so (`force_zeros_for_empty_prompt`).
        """
        self.call_encoders()
        words, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not p for p in prompts], device=words.device)
            words, pooled = words.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return self._condition(words, pooled, self.resolution(resolution), guidance_scale)

    @override
    def blank_condition(self, n: int) -> Condition:
        """Zeros: a prompt of CLIP has 77 tokens."""
        weight, config = self.denoiser.conv_in.weight, self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        words = weight.new_zeros(n, 77, config.cross_attention_dim)
        return self._condition(words, weight.new_zeros(n, pooled), self.resolution(), 1.0)

    def _condition(self, words: Tensor, pooled: Tensor, side: int, guidance_scale: float) -> Condition:
        """The condition of n prompts: words (n, L, D), pooled words (n, P), the side of the pictures in pixels."""
        sizes = [side, side, 0, 0, side, side]  # as drawn: nothing was scaled or cropped
        tensors: Mapping[str, Tensor] = {
            "encoder_hidden_states": words.to(self.device, self.dtype),
            "text_embeds": pooled.to(self.device, self.dtype),
            "time_ids": torch.tensor([sizes] * len(words)).to(self.device, self.dtype),
            **self.tell_guidance(len(words), guidance_scale),
        }
        return Condition(tensors)

    @torch.no_grad()
    @override
    def text_states(self, prompts: Sequence[str], *, length: int) -> Tensor:
        """The penultimate states of both text encoders side by side, (len(prompts), L, D₁ + D₂), float32 on the CPU."""
        self.call_encoders()
        states = []
        for tokenizer, encoder in (
            (self.pipe.tokenizer, self.pipe.text_encoder),
            (self.pipe.tokenizer_2, self.pipe.text_encoder_2),
        ):
            size = min(length, tokenizer.model_max_length)
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=size, truncation=True, return_tensors="pt"
            ).input_ids
            states.append(encoder(ids.to(self.device), output_hidden_states=True).hidden_states[-2].float().cpu())
        return torch.cat(states, -1)

    @override
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet's output, (B, C, H, W)."""
        own = {k: v for k, v in condition.tensors.items() if k not in ADDED}
        added = {k: condition.tensors[k] for k in ADDED}
        out: Tensor = self.denoiser(x, t, **own, added_cond_kwargs=added, return_dict=False)[0]
        return out
