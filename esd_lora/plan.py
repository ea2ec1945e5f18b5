"""What a recipe would do, before anything heavy is loaded: layers, size of the patch, passes, memory.

The denoiser is built from its config alone on torch's `meta` device, which has shapes and no numbers, and gets its
adapters from the same code as in training. A training step then runs on it: memory is counted, not guessed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from esd_lora import adversary, directions
from esd_lora.bases import DTYPES, FAMILIES, Base
from esd_lora.bases.facts import Facts, facts_of, on_meta, size_of
from esd_lora.recipe import DType, Recipe
from esd_lora.training import aims, resolve
from esd_lora.trajectories import preserve_steps, questions_of

AUTHORS_PER_EXAMPLE = 25 * 2 + 3 + 3
"""The authors' trainer: guided sampling for 25 of 50 steps on average, three of the teacher, three of the student."""


@dataclass(frozen=True)
class Passes:
    """Passes of one latent through the denoiser; a backward pass counts as two forward passes."""

    concepts: int
    """Trajectories of the concepts, with the teacher's predictions."""
    preservation: int
    """Trajectories of the prompts to preserve."""
    adversary: int
    """Searches for soft words, with the teacher's predictions; only with `robust`."""
    aiming: int
    """Looks at where a concept moves what layers read; only with `init: differences`."""
    training: int
    total: int
    per_example: float
    """The total over the training examples of concepts: preservation is a cost, not an example."""
    authors_ratio: float | None
    """How many times as many the authors' schedule needs for as many examples; None where nothing is trained."""


@dataclass(frozen=True)
class Memory:
    """Bytes on an accelerator, without its context, its libraries' workspaces and the allocator's losses."""

    weights: int
    adapters: int
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """The most that is alive at once in forward and backward, gradients included."""
    encoders: int
    """Text encoders, which have the device to themselves before training."""
    peak: int


@dataclass(frozen=True)
class Plan:
    """What training a recipe would do and cost."""

    base: str
    family: str
    prediction_type: str
    resolution: int
    """Side of the pictures in pixels."""
    denoiser_parameters: int
    layers: str
    rank: int
    modules: int
    """How many layers of the denoiser get an adapter."""
    first_modules: tuple[str, ...]
    adapter_parameters: int
    patch_bytes: int
    """The patch's tensors, in float32; the file's header comes on top."""
    passes: Passes
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {**asdict(self), "first_modules": list(self.first_modules)}


def make_plan(recipe: Recipe) -> Plan:
    """What training this recipe would do and cost.

    Raises:
        BaseModelError: The base is not found, or has no layers of the preset.
        RecipeError: The rank is above what a layer can use.
    """
    facts = facts_of(recipe.base, recipe.revision)
    base = base_on_meta(facts, name=recipe.base, dtype=recipe.dtype)
    base.check(recipe)

    def denoising_steps(steps: int) -> int:
        scheduler = base.scheduler
        base.set_timesteps(scheduler, steps, resolution=recipe.resolution, device=torch.device("cpu"))
        return len(scheduler.timesteps)

    parameters = size_of(base.denoiser.parameters())
    base.add_adapter(layers=recipe.layers, rank=recipe.rank)
    modules = base.matched(recipe.layers)
    adapters = size_of(base.adapter_parameters())
    if recipe.keys == "closed-form":
        base.freeze_keys()
    return Plan(
        base=recipe.base,
        family=base.family,
        prediction_type=facts.prediction_type,
        resolution=base.resolution(recipe.resolution),
        denoiser_parameters=parameters,
        layers=recipe.layers,
        rank=recipe.rank,
        modules=len(modules),
        first_modules=tuple(modules[:3]),
        adapter_parameters=adapters,
        patch_bytes=4 * adapters,
        passes=count_passes(recipe, denoising_steps=denoising_steps, told_guidance=base.told_guidance),
        memory=_memory(recipe, base, facts, adapters=adapters),
    )


def base_on_meta(facts: Facts, *, name: str, dtype: DType) -> Base:
    """The base of these facts on the `meta` device: a denoiser and a scheduler, and nothing else.

    Args:
        facts: What it is.
        name: What the user calls it.
        dtype: Of the denoiser.
    """
    family = FAMILIES[facts.pipeline]
    build = getattr(diffusers, facts.denoiser["_class_name"])
    denoiser = on_meta(build.from_config, facts.denoiser, name)
    nn.Module.to(denoiser, DTYPES[dtype])  # diffusers' own `to` warns even where nothing has to stay float32
    scheduler = getattr(diffusers, facts.scheduler["_class_name"]).from_config(facts.scheduler)
    parts = {family.prefix: denoiser, "scheduler": scheduler}
    pipe: Any = SimpleNamespace(**parts, components=parts, vae_scale_factor=facts.vae_scale_factor)
    return family(pipe, name=name, fingerprint="none, for there are no weights")


def count_passes(recipe: Recipe, *, denoising_steps: Callable[[int], int] = int, told_guidance: bool = False) -> Passes:
    """How often the denoiser is asked: the number that `train` writes into the patch.

    A step of a trajectory asks the teacher once for each different prompt among the student's s, the empty one, the
    concept c and the anchor a. With `x_t: edited` the student is asked for s and, for guidance, the empty prompt on top,
    and all of it is done again at each refresh.

    Args:
        recipe: What to train.
        denoising_steps: Of a trajectory of S steps, how many the base's scheduler takes.
        told_guidance: Whether the base's denoiser is told the guidance scale, so that nothing is predicted twice for it.
    """
    if recipe.objective == "closed-form":
        return Passes(0, 0, 0, 0, 0, 0, 0.0, None)
    _, erase, preserve = questions_of(resolve(recipe))
    edited = recipe.x_t == "edited"
    banks = math.ceil(recipe.steps / recipe.refresh_every) if edited else 1
    guided = recipe.guidance_scale > 1 and not told_guidance
    asked = sum(len(set(q.roles(guided=guided))) + (len(set(q.moves(guided=guided))) if edited else 0) for q in erase)
    concepts = banks * recipe.trajectories * denoising_steps(recipe.trajectory_steps) * asked
    preservation = denoising_steps(preserve_steps(recipe, preserve)) * sum(
        len(set(q.roles(guided=False))) for q in preserve
    )
    searching = recipe.robust * len({q.s for q in erase}) * adversary.passes(recipe.batch_size)
    training = 3 * recipe.steps * _rows(recipe)
    bank = len(erase) * recipe.trajectories * denoising_steps(recipe.trajectory_steps)
    aiming = directions.passes(bank) if aims(recipe) else 0
    total = concepts + preservation + searching + aiming + training
    each = total / (recipe.steps * recipe.batch_size)
    return Passes(concepts, preservation, searching, aiming, training, total, each, AUTHORS_PER_EXAMPLE / each)


def _rows(recipe: Recipe) -> int:
    """Rows of a training batch: the examples of concepts, and as many to preserve."""
    _, _, preserve = questions_of(resolve(recipe))
    return recipe.batch_size * (2 if preserve else 1)


# ---- memory -------------------------------------------------------------------------------------------------


def _memory(recipe: Recipe, base: Base, facts: Facts, *, adapters: int) -> Memory:
    """Bytes by what they are for; adapters counts their numbers, trained or not."""
    each = DTYPES[recipe.dtype].itemsize
    trained, activations, searching = 0, 0, 0
    weights = each * (size_of(base.denoiser.parameters()) - adapters)
    encoders = each * facts.text_encoder_parameters
    if recipe.objective != "closed-form":
        trained, how = size_of(base.adapter_parameters()), recipe.gradient_checkpointing
        activations = step_bytes(base, rows=_rows(recipe), resolution=recipe.resolution, checkpointing=how)
        if recipe.robust:  # the encoders' own activations, of one prompt, are left out
            rows = adversary.BATCH * recipe.batch_size
            searching = encoders + step_bytes(base, rows=rows, resolution=recipe.resolution, checkpointing=how)
    peak = max(encoders, weights + 4 * adapters + 2 * 4 * trained + max(activations, searching))
    return Memory(weights, 4 * adapters, 2 * 4 * trained, activations, encoders, peak)


def step_bytes(base: Base, *, rows: int, resolution: int | None = None, checkpointing: bool = False) -> int:
    """The most bytes alive at once, weights aside, in a forward and a backward pass; on any device.

    Args:
        base: With adapters that require gradients.
        rows: Latents in the batch.
        resolution: Of the pictures, in pixels; None for the base's own.
        checkpointing: Keep the inputs of blocks only, and run these again for the backward pass.
    """
    training = _LikeTraining(base.dtype)
    if checkpointing:
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), training))
        base.denoiser.enable_gradient_checkpointing(again)
    with _LiveBytes() as memory, training:
        x = torch.zeros(rows, *base.latent_shape(resolution), dtype=base.dtype, device=base.device)
        t = torch.zeros(rows, dtype=torch.long, device=base.device)
        out = base.predict(x, t, base.blank_condition(rows))
        torch.autograd.backward(out.float().square().mean())
    peak: int = memory.peak
    return peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Adds up the storages that are made inside and still in use; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = {id(s): s for s in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor))}
        for storage in (s for key, s in results.items() if key not in given):
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


class _LikeTraining(TorchFunctionMode):
    """What `meta` does not do by itself: fused attention, which keeps no matrix of weights, and autocast.

    Args:
        dtype: Of the base. Below float32 the trainer uses autocast, which on CUDA has norms in float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        casts = {F.linear: dtype, F.conv2d: dtype, F.group_norm: torch.float32, F.layer_norm: torch.float32}
        self.casts: Mapping[Any, torch.dtype] = {} if dtype == torch.float32 else casts

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        to = self.casts.get(func)
        if to:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(to), (args, kwargs))
        return func(*args, **kwargs)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Unmasked attention, (B, heads, L, D); for its backward this kernel keeps what those of GPUs keep."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return out
