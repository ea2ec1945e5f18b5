"""`Sampler`: one denoising run by a diffusers scheduler, with what schedulers differ in absorbed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """A scheduler whose timesteps are set, used as its pipeline uses it.

    Schedulers of a diffusion know the scale of their noise and of the network's input (Euler's is 1/√(σ² + 1)); those of a
    flow, whose x_t is (1 − σ) x_0 + σ noise, have neither.

    Args:
        scheduler: A diffusers scheduler of its own, timesteps set.
        generators: What schedulers that add noise draw it from, one for each latent on the CPU; None for torch's own.
    """

    def __init__(self, scheduler: Any, *, generators: list[torch.Generator] | None = None) -> None:
        self.scheduler = scheduler
        takes = inspect.signature(scheduler.step).parameters
        self._extra = {k: v for k, v in {"generator": generators, "eta": 0.0}.items() if k in takes}

    @property
    def timesteps(self) -> Tensor:
        """The timesteps, from noise to picture, one for each call of the network."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def start(self, noise: Tensor) -> Tensor:
        """x_T, from unit noise (B, C, H, W)."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network is given for x_t (B, C, H, W)."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x_t
        x: Tensor = self.scheduler.scale_model_input(x_t, t)
        return x

    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """x_t one step nearer to the picture, (B, C, H, W)."""
        x: Tensor = self.scheduler.step(prediction, t, x_t, **self._extra, return_dict=False)[0]
        return x
