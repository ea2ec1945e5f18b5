"""`Base`: a diffusers text-to-image pipeline behind one small contract, so that nothing else asks which family it is.

    encode(prompts) → Condition          what the denoiser is conditioned on
    predict(x, t, condition) → Tensor    its output (ε, v or flow: the objective is affine, so it serves all three)
    noise(seeds) → Tensor                unit noise of a picture's size
    sampler(steps) → Sampler             a run of the base's own scheduler
    teacher()                            the same network with the adapters off, bit for bit the frozen model

A family is one file: a subclass that says how prompts are encoded, how the denoiser is called, and which layers a
preset names.
"""

from __future__ import annotations

import copy
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from esd_lora.bases.sampler import Sampler
from esd_lora.errors import BaseModelError, PatchError, RecipeError
from esd_lora.esd import guided
from esd_lora.recipe import Layers, Recipe


@dataclass(frozen=True)
class Condition:
    """What the denoiser is conditioned on: tensors by name, each with the prompts along the first dimension."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        """The condition of some of the prompts, by index or slice."""
        return Condition({k: v[rows] for k, v in self.tensors.items()})

    def __len__(self) -> int:
        """Number of prompts."""
        return len(next(iter(self.tensors.values())))

    def expand(self, n: int) -> Condition:
        """One prompt's condition for a batch of n."""
        return Condition({k: v.expand(n, *v.shape[1:]) for k, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Several conditions in one batch."""
        return Condition({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})


class Base(ABC):
    """A pipeline with everything frozen, and the adapters that are put on its denoiser.

    Args:
        pipe: The pipeline, on its device and in its dtype.
        name: What the user called it: `emoji`, a folder or a Hub id.
        revision: Commit on the Hub, where it comes from there.
        fingerprint: See `fingerprint_of`.
        device: Where the denoiser works; by default where it is.
    """

    family: ClassVar[str]
    """What people call it."""
    layers: ClassVar[Mapping[Layers, str]]
    """Preset → regular expression over module names of the denoiser (full match)."""
    prefix: ClassVar[str]
    """The denoiser's name in the pipeline, which LoRA files put before the names of its modules."""
    wordless: ClassVar[str] = ""
    """A prompt without words that the encoders read as they read any other, whatever the empty one stands for."""
    pixels: ClassVar[int] = 8
    """A picture's sides are multiples of this."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        name: str,
        revision: str | None = None,
        fingerprint: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.pipe: Any = pipe
        self.device: torch.device = device or next(self.denoiser.parameters()).device
        self.name = name
        self.revision = revision
        self.fingerprint = fingerprint or fingerprint_of(self.denoiser)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
                part.eval()

    def around(self, denoiser: nn.Module, *, fingerprint: str | None = None) -> Self:
        """A second base around another denoiser; the other parts of the pipeline are shared.

        Args:
            denoiser: Of the same architecture.
            fingerprint: Of its weights; None to reckon it.
        """
        pipe = copy.copy(self.pipe)  # `from_pipe` would cast what is shared
        pipe.register_modules(**{self.prefix: denoiser})
        pipe.set_progress_bar_config(disable=True)
        return type(self)(pipe, name=self.name, fingerprint=fingerprint, device=self.device)

    # ---- what a family says -------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], *, resolution: int | None = None, guidance_scale: float = 1.0
    ) -> Condition:
        """The condition of each prompt, on the base's device.

        Args:
            prompts: The empty one stands for no prompt, as the pipeline samples without one.
            resolution: Of the pictures, in pixels, for bases that are told; None for the base's own.
            guidance_scale: For bases that are told; see `told_guidance`.
        """

    @abstractmethod
    def blank_condition(self, n: int) -> Condition:
        """A condition of n prompts with the shapes of `encode`, without meaning; no text encoder is asked."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output at scaled inputs x (B, C, H, W) and timesteps t (B,), same shape as x."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the latents."""

    @property
    def sample_size(self) -> int:
        """Latents along a side of a picture of the base's own size."""
        size: int = self.denoiser.config.sample_size
        return size

    @property
    def text_layers(self) -> list[str]:
        """Names of the layers that are given words as the text encoders leave them: k and v of cross-attention."""
        return []

    def text_states(self, prompts: Sequence[str], *, length: int) -> Tensor:
        """What the text layers are given, (len(prompts), L, D) float32 on the CPU; for families that have such layers.

        L is the number of the prompts' tokens that are looked at, `length` or all that there are. Text encoders that are
        causal give the same states to the first tokens of a prompt, however many follow.
        """
        raise NotImplementedError(f"{self.family} has no text layers")

    def token_ids(self, prompts: Sequence[str], *, length: int) -> Tensor:
        """The tokens whose states `text_states` gives, padded, (len(prompts), L) on the CPU."""
        tokenizer = self.pipe.tokenizer
        how = {"padding": "max_length", "max_length": min(length, tokenizer.model_max_length), "truncation": True}
        ids: Tensor = tokenizer(list(prompts), return_tensors="pt", **how).input_ids
        return ids

    def set_timesteps(self, scheduler: Any, steps: int, *, resolution: int | None, device: torch.device) -> None:  # noqa: ARG002 (families do)
        """Set a scheduler's timesteps as the pipeline does."""
        scheduler.set_timesteps(steps, device=device)

    @property
    def told_guidance(self) -> bool:
        """Whether the denoiser is told the guidance scale, so that what it predicts is guided already."""
        return False

    def packed(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the pipeline takes them."""
        return x

    # ---- what all families share --------------------------------------------------------------------------------

    def check(self, recipe: Recipe) -> None:
        """Nothing, if the base can do what a recipe asks for.

        Raises:
            RecipeError: It has no layers for closed-form keys, no words that can be soft, or cannot draw pictures of this
                size, or in so many steps.
        """
        if "closed-form" in (recipe.keys, recipe.objective) and not self.text_layers:
            raise RecipeError(
                f"keys: closed-form needs cross-attention, and {self.name} ({self.family}) has none: words and picture pass "
                "through all its layers together; use keys: learned with objective: paper"
            )
        if recipe.robust and not self.text_layers:
            raise RecipeError(
                f"robust: soft words are for Stable Diffusion 1, 2 and XL, whose words are read by CLIP alone, and {self.name} "
                f"is {self.family}; use robust: 0"
            )
        self.latent_shape(recipe.resolution)
        self.check_steps(recipe.trajectory_steps, name="trajectory_steps", resolution=recipe.resolution)

    def check_steps(self, steps: int, *, name: str, resolution: int | None = None) -> None:
        """Nothing, if the scheduler can take so many.

        Raises:
            RecipeError: It cannot, as those of latent consistency models above what these were distilled with; `name` is whose
                number it is.
        """
        try:
            self.set_timesteps(self.scheduler, steps, resolution=resolution, device=torch.device("cpu"))
        except ValueError as error:
            raise RecipeError(f"{name}: {' '.join(str(error).split())}") from error

    @property
    def denoiser(self) -> Any:
        """The network that the adapters go on."""
        return getattr(self.pipe, self.prefix)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen weights."""
        dtypes = (p.dtype for n, p in self.denoiser.named_parameters() if "lora_" not in n)
        dtype: torch.dtype = next(dtypes)
        return dtype

    @property
    def text_fingerprint(self) -> str:
        """SHA-256 over the weights of the text encoders, rounded to float16, in hexadecimal."""
        return self._fingerprint_of_parts("text_encoder")

    @cached_property
    def parts_fingerprint(self) -> str:
        """The same of text encoders and autoencoder: what draws beside the denoiser."""
        return self._fingerprint_of_parts("text_encoder", "vae")

    def _fingerprint_of_parts(self, *names: str) -> str:
        digest = hashlib.sha256()
        for name, part in sorted(self.pipe.components.items()):
            if name.startswith(names) and isinstance(part, nn.Module):
                for weight in part.parameters():
                    digest.update(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def scheduler(self) -> Any:
        """A fresh copy of the pipeline's scheduler: using it changes nothing in the pipeline."""
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)

    def matched(self, layers: Layers) -> list[str]:
        """Names of the denoiser's modules that a preset adapts.

        Raises:
            BaseModelError: The base has no such layers; the message lists the attention layers that it has.
        """
        pattern = re.compile(self.layers[layers])
        names = [n.replace(".base_layer", "") for n, m in self.denoiser.named_modules() if isinstance(m, nn.Linear)]
        found = [n for n in dict.fromkeys(names) if pattern.fullmatch(n)]
        if not found:
            near = [n for n in names if "attn" in n][:6]
            have = f"it has {', '.join(near)} …" if near else "it has no attention layers at all"
            raise BaseModelError(f"{self.name}: layers {layers} match nothing in the denoiser; {have}")
        return found

    def check_unfused(self) -> None:
        """Nothing, if the attention layers read the projections that adapters sit on.

        Raises:
            BaseModelError: `fuse_qkv_projections` has put copies in their place, on which no adapter acts.
        """
        if any(map(_is_fused, self.denoiser.modules())):
            raise BaseModelError(
                f"{self.name}: its projections are fused, so that no adapter would act; call unfuse_qkv_projections() first"
            )

    def add_adapter(self, *, layers: Layers, rank: int, name: str = "patch") -> None:
        """Put untrained adapters on a preset's layers, in float32; lora_B is zero, so nothing changes yet.

        Raises:
            BaseModelError: The preset matches nothing, or the projections are fused.
            RecipeError: The rank is above what a layer can use.
        """
        self.check_unfused()
        modules = dict(self.denoiser.named_modules())
        limit, where = min((min(modules[n].weight.shape), n) for n in self.matched(layers))
        if rank > limit:
            raise RecipeError(f"rank: must be at most {limit}, the size of {where}, got {rank}")
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.layers[layers], init_lora_weights="gaussian")
        self.denoiser.add_adapter(config, adapter_name=name)
        cast_training_params(self.denoiser, torch.float32)

    def freeze_keys(self, name: str = "patch") -> None:
        """Train no more than lora_B of the text layers."""
        for module in self.text_layers:
            self.denoiser.get_submodule(module).lora_A[name].weight.requires_grad_(False)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, in the order of the modules."""
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def adapter_state(self, name: str = "patch") -> dict[str, Tensor]:
        """The adapter's tensors by diffusers' file names, detached copies on the CPU."""
        state = get_peft_model_state_dict(self.denoiser, adapter_name=name)
        return {f"{self.prefix}.{k}": v.detach().to("cpu", copy=True) for k, v in sorted(state.items())}

    def load_adapter_state(self, state: Mapping[str, Tensor], name: str = "patch") -> None:
        """Give the adapter these tensors, named as `adapter_state` names them.

        Raises:
            PatchError: A name is unknown.
        """
        plain = {k.removeprefix(f"{self.prefix}."): v for k, v in state.items()}
        result = set_peft_model_state_dict(self.denoiser, plain, adapter_name=name)
        if result.unexpected_keys:
            raise PatchError(f"{self.name} has no layer for {result.unexpected_keys[0]}")

    def remove_adapters(self) -> None:
        """Take all adapters off; the denoiser is as it was loaded."""
        self.denoiser.unload_lora()

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the denoiser is the frozen model, bit for bit, without gradients; afterwards as before."""
        layers = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        before = [m.disable_adapters for m in layers]
        trainable = [(p, p.requires_grad) for m in layers for p in m.parameters()]
        try:
            for m in layers:
                m.enable_adapters(False)
            with torch.no_grad():
                yield
        finally:
            for m, off in zip(layers, before, strict=True):
                m.enable_adapters(not off)
            for p, requires in trainable:
                p.requires_grad_(requires)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of a picture's latents; resolution in pixels, None for the base's own.

        Raises:
            RecipeError: The resolution is not a multiple of `pixels`.
        """
        if resolution is None:
            return self.channels, self.sample_size, self.sample_size
        if resolution % self.pixels:
            raise RecipeError(f"resolution: must be a multiple of {self.pixels} for {self.name}, got {resolution}")
        side = resolution // self.pipe.vae_scale_factor
        return self.channels, side, side

    def resolution(self, given: int | None = None) -> int:
        """The side of a picture in pixels: the one given, or the base's own."""
        own: int = self.sample_size * self.pipe.vae_scale_factor
        return own if given is None else given

    def guide(self, eps_prompt: Tensor, eps_null: Tensor, *, guidance_scale: float) -> Tensor:
        """The prediction that moves a trajectory on: guided, here or by the denoiser itself."""
        return eps_prompt if self.told_guidance else guided(eps_prompt, eps_null, guidance_scale=guidance_scale)

    def sampler(
        self, steps: int, *, resolution: int | None = None, generators: list[torch.Generator] | None = None
    ) -> Sampler:
        """A denoising run of so many steps by the base's own scheduler; for the generators see `Sampler`."""
        scheduler = self.scheduler
        self.set_timesteps(scheduler, steps, resolution=resolution, device=self.device)
        return Sampler(scheduler, generators=generators)

    def free_encoders(self) -> None:
        """Move all but the denoiser to the CPU, to make room for training; `encode` and `generate` bring them back."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name != self.prefix:
                part.to("cpu")

    @contextmanager
    def encoders_alone(self) -> Iterator[None]:
        """Inside, the denoiser leaves the device to the text encoders, which may be larger; afterwards these leave."""
        self.denoiser.to("cpu")
        try:
            yield
        finally:
            self.free_encoders()
            self.denoiser.to(self.device)

    def call_encoders(self) -> None:
        """Move the text encoders to the device."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name.startswith("text_encoder"):
                part.to(self.device)

    def noise(self, seeds: Sequence[int], *, resolution: int | None = None) -> Tensor:
        """Unit noise (len(seeds), C, H, W), from one CPU generator per seed, whatever the device.

        The pipeline and the trajectories multiply it by the scheduler's `init_noise_sigma`.
        """
        shape = self.latent_shape(resolution)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self.device, self.dtype)


FUSED = re.compile(r"\.to_(qkv|kv|added_qkv)\.")
"""Fused copies of projections, by their names."""


def _is_fused(module: nn.Module) -> bool:
    """Whether an attention layer reads fused copies of its projections."""
    if isinstance(module, Attention):  # which keeps the copies, and the flag, when it goes back to its own
        return "Fused" in type(module.processor).__name__
    return bool(getattr(module, "fused_projections", False))


def fingerprint_of(denoiser: nn.Module) -> str:
    """SHA-256 over the attention weights of a denoiser, rounded to float16: equal for float32 and float16 copies.

    Copies that `fuse_qkv_projections` made of some, and leaves there, do not count.
    """
    digest = hashlib.sha256()
    for name, weight in denoiser.named_parameters():
        if "attn" in name and "lora_" not in name and not FUSED.search(name):
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
