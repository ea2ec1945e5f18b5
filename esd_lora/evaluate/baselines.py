"""Baselines: what an erasure patch is compared with, on the same base, prompts and noise.

    safe_latent         Safe Latent Diffusion: guidance away from the concept, where the prompt comes near it
    negative_prompt     the concept in the place of the empty prompt
    separate_negative   the concept as a third term of the guidance
    PostFilter          a classifier that blacks pictures out
    full_esd            ESD's fine-tuning of whole layers, by its authors' schedule: a second base
    leco                LECO's schedule for a LoRA: a patch
    uce                 Unified Concept Editing, solved for: a patch of whole rank

The first three are contexts in which the base's own pipeline draws otherwise; attached patches stay active in them, and
afterwards everything is as before. They act in the pipeline alone: `Base.predict` is untouched. Without guidance they have
nothing to act on, and draw what the base draws.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from esd_lora.bases import index_path, read_json
from esd_lora.bases.base import Base, Condition, fingerprint_of
from esd_lora.bases.stable_diffusion import UNetBase
from esd_lora.closed_form import closed_form_patch
from esd_lora.emoji.evaluators import OBJECT_CLASSES, STYLE_CLASSES, Judgement, load_evaluator
from esd_lora.emoji.vocabulary import ACCESSORY, OBJECTS, STYLES
from esd_lora.errors import BaseModelError, RecipeError, TrainingError
from esd_lora.esd import esd_loss, esd_target
from esd_lora.evaluate.evaluators import load_network, load_part
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, step_noise
from esd_lora.recipe import Concept, Layers, Recipe
from esd_lora.training import resolve

# ---- what is refused --------------------------------------------------------------------------------------------


def _check_concept(concept: str) -> None:
    """Nothing, if there are words."""
    if not concept.strip():
        raise RecipeError("concept: must not be empty")


def _check_at_least_zero(name: str, value: float) -> None:
    """Nothing, if a strength is one."""
    if not 0 <= value < math.inf:
        raise RecipeError(f"{name}: must be a finite number of 0 or more, got {value}")


def _check_training(base: Base, concept: str, layers: str, *, lr: float, eta: float, guidance_scale: float) -> None:
    """Nothing, if a base can be trained so.

    Raises:
        RecipeError: The concept is empty, the layers are unknown, a number is out of its range, or the base is in float16.
    """
    _check_concept(concept)
    if layers not in base.layers:
        raise RecipeError(f"layers: no {layers}; there are {', '.join(base.layers)}")
    if not 0 < lr < 1e38:
        raise RecipeError(f"lr: must be above 0 and below 1e38, got {lr}")
    _check_at_least_zero("eta", eta)
    if not 1 <= guidance_scale < math.inf:
        raise RecipeError(f"guidance_scale: must be a finite number of 1 or more, got {guidance_scale}")
    if base.dtype == torch.float16:
        raise RecipeError("dtype: fp16 cannot be trained without scaled losses; load the base in fp32 or bf16")


def _check_counts(**counts: int) -> None:
    """Nothing, if there is at least one of each."""
    for name, count in counts.items():
        if count < 1:
            raise RecipeError(f"{name}: must be 1 or more, got {count}")


def _check_finite(loss: Tensor, lr: float) -> None:
    """Nothing, if the last loss is a number, which it is not once a weight is none.

    Raises:
        TrainingError: It is not.
    """
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss was {loss.item()} at the end: try a lower lr (now {lr:g})")


# ---- guidance ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SafeGuidance:
    """The strength of Safe Latent Diffusion.

    warmup: δ, the first steps without it, of 50; a run of N steps goes without for δ · N / 50.
    scale: s_S, how soon a difference counts in full; the authors' code does nothing below 1, and here any acts by itself.
    threshold: λ, below which ε_p − ε_c must be for it to act; a larger one lets it act in more places.
    momentum_scale, momentum_beta: s_m and β_m, how much of the last steps' guidance is added, and how long it lasts.

    Raises:
        RecipeError: A number is out of its range.
    """

    warmup: float
    scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float

    def __post_init__(self) -> None:
        for name in ("warmup", "scale", "momentum_scale"):
            _check_at_least_zero(name, getattr(self, name))
        if not math.isfinite(self.threshold):
            raise RecipeError(f"threshold: must be a finite number, got {self.threshold}")
        if not 0 <= self.momentum_beta <= 1:
            raise RecipeError(f"momentum_beta: must be between 0 and 1, got {self.momentum_beta}")


Preset = Literal["weak", "medium", "strong", "max"]

PRESETS: Mapping[Preset, SafeGuidance] = MappingProxyType(
    {
        "weak": SafeGuidance(15, 200, 0.0, 0.0, 0.0),
        "medium": SafeGuidance(10, 1000, 0.01, 0.3, 0.4),
        "strong": SafeGuidance(7, 2000, 0.025, 0.5, 0.7),
        "max": SafeGuidance(0, 5000, 1.0, 0.5, 0.7),
    }
)
"""The authors' four (model card of AIML-TUDA/stable-diffusion-safe); diffusers' own WEAK has a scale of 20."""


def safety_guidance(
    eps_prompt: Tensor, eps_concept: Tensor, eps_null: Tensor, momentum: Tensor, *, guidance: SafeGuidance
) -> Tensor:
    """γ, which is taken from the guidance so that it leads away from a concept.

        γ = μ · (ε_c − ε_∅) + s_m ν                                                               (equations 4 and 7)
        μ = min(1, s_S |ε_p − ε_c|) where ε_p − ε_c < λ, and 0 elsewhere                          (equations 5 and 6)

    element by element; Schramowski et al., "Safe Latent Diffusion", CVPR 2023, arXiv:2211.05105, as its released code has
    it. There p is the prompt, and c their S.

    Args:
        eps_prompt, eps_concept, eps_null: Predictions at one (x_t, t), each (B, C, H, W).
        momentum: ν, the same shape.
        guidance: s_S, λ and s_m.

    Returns:
        (B, C, H, W), in the dtype of the predictions.
    """
    near = eps_prompt - eps_concept
    mu = (guidance.scale * near.abs()).clamp(max=1).masked_fill(near >= guidance.threshold, 0)
    return mu * (eps_concept - eps_null) + guidance.momentum_scale * momentum


@contextmanager
def safe_latent(base: Base, concept: str, guidance: SafeGuidance | Preset = "medium") -> Iterator[None]:
    """Inside, the base's pipeline draws by Safe Latent Diffusion.

        ε = ε_∅ + s (ε_p − ε_∅ − γ)   from step δ on                                                     (equation 3)
        ν ← β_m ν + (1 − β_m) γ       from the first step on, from ν = 0                                 (equation 8)

    with γ of `safety_guidance`; the hook gives the pipeline ε_p − γ for ε_p. A run of the sampler is told from the last one
    by its timesteps, a new tensor each time the pipeline sets them: timesteps themselves repeat within a run of PNDM and
    Heun. δ counts steps, of which a second-order sampler makes two calls each. A step costs a third prediction.

    s_S and λ are in units of the network's output, as in diffusers. The presets are for ε in Stable Diffusion 1. For
    v-prediction a difference of outputs is 1/√ᾱ_t times that of ε, so that s_S and the differences that λ is held against
    are so much larger: there, as on any other base, sweep both, and compare at equal retention.

    Args:
        base: Of a family with a UNet.
        concept: c; the authors' list of what is unsafe, an artist, or whatever a patch erases.
        guidance: A preset, or numbers of one's own.

    Raises:
        BaseModelError: The base has no UNet, or one that is told its guidance scale.
        RecipeError: The preset is unknown, or the concept is empty.
    """
    if not isinstance(guidance, SafeGuidance):
        if guidance not in PRESETS:
            raise RecipeError(f"guidance: no preset {guidance}; there are {', '.join(get_args(Preset))}")
        guidance = PRESETS[guidance]
    timesteps: Tensor | None = None
    calls, momentum = 0, torch.zeros(())

    def steer(eps_prompt: Tensor, eps_concept: Tensor, eps_null: Tensor) -> Tensor:
        nonlocal timesteps, calls, momentum
        scheduler = base.pipe.scheduler
        if timesteps is not scheduler.timesteps:
            timesteps, calls, momentum = scheduler.timesteps, 0, torch.zeros_like(eps_null)
        gamma = safety_guidance(eps_prompt, eps_concept, eps_null, momentum, guidance=guidance)
        momentum = guidance.momentum_beta * momentum + (1 - guidance.momentum_beta) * gamma
        warm = calls // scheduler.order >= guidance.warmup * scheduler.num_inference_steps / 50
        calls += 1
        return eps_prompt - gamma if warm else eps_prompt

    with _steered(base, concept, steer):
        yield


@contextmanager
def separate_negative(base: Base, concept: str, *, scale: float) -> Iterator[None]:
    """Inside, the base's pipeline is guided away from the concept as well as towards the prompt.

        ε = ε_∅ + s (ε_p − ε_∅) − s_n (ε_c − ε_∅)

    (Liu et al. 2022, arXiv:2206.01714, "not"); the hook gives the pipeline ε_p − (s_n / s) (ε_c − ε_∅) for ε_p, with the s
    that it is called with. s_n = s − 1 is what `negative_prompt` does. A step costs a third prediction.

    Args:
        base: Of a family with a UNet.
        concept: c.
        scale: s_n ≥ 0, the strength; 0 changes nothing.

    Raises:
        BaseModelError: The base has no UNet, or one that is told its guidance scale.
        RecipeError: The concept is empty, or the scale below 0.
    """
    _check_at_least_zero("scale", scale)

    def steer(eps_prompt: Tensor, eps_concept: Tensor, eps_null: Tensor) -> Tensor:
        guidance_scale: float = base.pipe.guidance_scale
        return eps_prompt - scale / guidance_scale * (eps_concept - eps_null)

    with _steered(base, concept, steer):
        yield


@contextmanager
def negative_prompt(base: Base, concept: str, *, strength: float = 1.0) -> Iterator[None]:
    """Inside, the base's pipeline has the concept where it has the empty prompt otherwise.

        ε = ε(n) + s (ε_p − ε(n))        n = e_∅ + w (e_c − e_∅)

    with e the text encoder's states; w = 1 is the pipeline's own `negative_prompt=`. A step costs no more than without.

    Args:
        base: Of a family with a UNet.
        concept: c.
        strength: w ≥ 0; 0 changes nothing.

    Raises:
        BaseModelError: The base has no UNet, or one that is told its guidance scale.
        RecipeError: The concept is empty, or the strength below 0.
    """
    _check_at_least_zero("strength", strength)
    words = _words(base, concept)

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not _is_guided(base, args[1]):
            return None

        def negated(name: str, rows: Tensor) -> Tensor:
            null, prompt = rows.chunk(2)
            return torch.cat([null.lerp(words[name].expand_as(null), strength), prompt]) if name in words else rows

        return args, with_condition(kwargs, negated)

    handle = base.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _steered(base: Base, concept: str, steer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the pipeline gets `steer(ε_p, ε_c, ε_∅)` for ε_p."""
    words = _words(base, concept)

    def hook(unet: nn.Module, args: Any, kwargs: dict[str, Any], out: tuple[Tensor]) -> tuple[Tensor] | None:
        if not _is_guided(base, args[1]):
            return None
        eps_null, eps_prompt = out[0].chunk(2)

        def asked(name: str, rows: Tensor) -> Tensor:
            prompt = rows.chunk(2)[1]
            return words[name].expand_as(prompt) if name in words else prompt

        # `forward` itself, for a call of the network would call the hooks again
        eps_concept = unet.forward(args[0].chunk(2)[1], *args[1:], **with_condition(kwargs, asked))[0]
        return (torch.cat([eps_null, steer(eps_prompt, eps_concept, eps_null)]),)

    handle = base.denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _words(base: Base, concept: str) -> dict[str, Tensor]:
    """What a UNet is told of a concept, by the names of its arguments: its words (1, L, D), in SDXL pooled too (1, P).

    Raises:
        BaseModelError: The base has no UNet, or one that is told its guidance scale.
        RecipeError: The concept is empty.
    """
    if not isinstance(base, UNetBase):
        raise BaseModelError(f"{base.name} ({base.family}) has no UNet, which this baseline acts on")
    if base.told_guidance:
        raise BaseModelError(
            f"{base.name} is told its guidance scale: it makes no guidance that this baseline could act on"
        )
    _check_concept(concept)
    told = base.encode([concept]).tensors
    return {name: told[name] for name in ("encoder_hidden_states", "text_embeds") if name in told}


def with_condition(kwargs: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """A denoiser's keyword arguments with another condition: `change` gets the name and the rows of each of its tensors."""
    words = ("encoder_hidden_states", "pooled_projections")
    changed = {name: change(name, kwargs[name]) for name in words if name in kwargs}
    if kwargs.get("added_cond_kwargs"):
        added = {name: change(name, rows) for name, rows in kwargs["added_cond_kwargs"].items()}
        return {**kwargs, **changed, "added_cond_kwargs": added}
    return {**kwargs, **changed}


def _is_guided(base: Base, t: Tensor) -> bool:
    """Whether a call of the UNet is the pipeline's, with one t for all latents, those without the prompt first."""
    if t.ndim:
        return False
    if not base.pipe.do_classifier_free_guidance:
        warnings.warn(
            f"guidance_scale: {base.pipe.guidance_scale:g} is no guidance, so that there is nothing to act on; "
            "it must be above 1",
            stacklevel=2,
        )
        return False
    return True


# ---- filters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PostFilter:
    """A classifier that pictures must pass.

    classifier: Pictures → the probability that each shows the concept, (N,) in 0..1. Not the one that reports.
    threshold: Pictures above it are blacked out; the strength, from 0 (hardly any passes) to 1 (all pass).

    Raises:
        RecipeError: The threshold is not in 0..1.
    """

    classifier: Callable[[Pictures], Tensor]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"threshold: must be between 0 and 1, got {self.threshold}")

    def passes(self, pictures: Pictures) -> list[bool]:
        """Which of the pictures pass: the concept is not seen in them."""
        passed: list[bool] = (self.classifier(pictures) <= self.threshold).tolist()
        return passed


def emoji_filter(concept: str, *, threshold: float = 0.5) -> PostFilter:
    """A filter of the embedded base's pictures by its second evaluator, which no score is measured with.

    Args:
        concept: Canonical name of an object or a style, or the accessory.
        threshold: See `PostFilter`.

    Raises:
        RecipeError: The evaluator does not know the concept.
    """
    known = (*OBJECTS, *STYLES, ACCESSORY)
    if concept not in known:
        raise RecipeError(f"{concept}: not a concept that the filter knows: {', '.join(known)}")
    evaluator = load_evaluator("filter")

    def probability(seen: Judgement) -> Tensor:
        if concept in OBJECTS:
            return seen.object_probabilities[:, OBJECT_CLASSES.index(concept)]
        if concept in STYLES:
            return seen.style_probabilities[:, STYLE_CLASSES.index(concept)]
        return seen.hat_probabilities

    return PostFilter(lambda pictures: probability(evaluator.judge(pictures)), threshold)


def safety_checker_filter(
    pipeline: str, *, revision: str | None = None, device: torch.device | str = "cpu", batch_size: int = 32
) -> PostFilter:
    """A filter by a pipeline's `StableDiffusionSafetyChecker`, which says 0 or 1 and has its own list of what is unsafe.

    A pipeline that has one applies it by itself; `load_base` leaves it out.

    Args:
        pipeline: A folder with a diffusers pipeline, or a Hub id; of it the checker and its picture processor are loaded.
        revision: Branch, tag or commit on the Hub.
        device: Where it works, in float32.
        batch_size: Pictures that it looks at together.

    Raises:
        BaseModelError: There is no such pipeline, it has no safety checker, or that cannot be loaded.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    parts: Mapping[str, Any] = {}
    if not Path(pipeline).is_file():  # a single file holds none
        parts = read_json(pipeline, "model_index.json", index_path(pipeline, pipeline, revision))
    if not any(parts.get("safety_checker") or ()):  # a pair of nulls where it was taken out
        raise BaseModelError(f"{pipeline}: has no safety checker")
    whose = f"{pipeline}: safety checker"
    checker = load_network(
        whose, StableDiffusionSafetyChecker, pipeline, subfolder="safety_checker", revision=revision
    ).to(device)
    extractor = load_part(whose, CLIPImageProcessorPil, pipeline, subfolder="feature_extractor", revision=revision)

    def classifier(pictures: Pictures) -> Tensor:
        seen: list[bool] = []
        for start in range(0, len(pictures), batch_size):
            some = extractor(pictures[start : start + batch_size], return_tensors="pt").pixel_values
            some = some.to(checker.device, checker.dtype)
            seen += checker(clip_input=some, images=some)[1]
        return torch.tensor(seen, dtype=torch.float32)

    return PostFilter(classifier)


# ---- other ways to train ----------------------------------------------------------------------------------------

OnStep = Callable[[int, int, Base], None]
"""Steps and passes so far, and what is trained."""


@dataclass(frozen=True)
class FineTuned:
    """A second base, around a denoiser of its own, and the passes of one latent that it cost, a backward pass being two."""

    base: Base
    passes: int


def full_esd(
    base: Base,
    concept: str,
    *,
    layers: Layers = "esd-x",
    steps: int = 200,
    lr: float = 5e-5,
    eta: float = 1.0,
    guidance_scale: float = 3.0,
    trajectory_steps: int = 50,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> FineTuned:
    """A second base whose denoiser is fine-tuned by ESD in whole layers.

        ε_θ(x_t, c) → ε*(x_t, ∅) − η (ε*(x_t, c) − ε*(x_t, ∅))        at one x_t a step, by Adam

    Gandikota et al. 2023, arXiv:2303.07345, section 4, by the schedule of their released code: every step samples anew,
    guided, from pure noise to a step drawn at random. The trajectory is the frozen model's, as in that code; the paper's is
    the edited model's. The defaults are the code's for Stable Diffusion, where `negative_guidance` 2 is η = 1 here (see
    `esd_target`); the paper has 1000 steps at 1e-5. What they ask the teacher three times is asked twice, in one batch: a
    step costs 2k + 2 + 3 passes after k steps of the sampler.

    Args:
        base: The frozen model. Adapters are taken off it; its weights are not changed.
        concept: c.
        layers: `esd-x`: cross-attention. `esd-x-strict`: its k and v. `esd-u`: every weight outside cross-attention, as in
            the paper. `full`: every weight.
        steps: Gradient steps, of one example each.
        lr: Learning rate of Adam; the trained weights are in the base's own precision.
        eta: η.
        guidance_scale: Of the trajectories.
        trajectory_steps: Denoising steps from pure noise to a picture.
        seed: Noise and stopping steps follow from it.
        on_step: Called after each step with the number of steps and of passes done, and the second base as it is.

    Raises:
        RecipeError: A number is out of its range, the layers are unknown, or the base is in float16.
        BaseModelError: The base has no such layers.
        TrainingError: The loss is no longer a number.
    """
    _check_training(base, concept, layers, lr=lr, eta=eta, guidance_scale=guidance_scale)
    _check_counts(steps=steps, trajectory_steps=trajectory_steps)
    base.remove_adapters()
    pair = _encoded(base, [concept, ""], guidance_scale=guidance_scale)
    edited = base.around(copy.deepcopy(base.denoiser), fingerprint=base.fingerprint)
    weights = _weights_of(edited, layers)
    optimizer = torch.optim.Adam(weights, lr=lr)
    draw, passes, one = random.Random(seed), 0, torch.ones(1, device=base.device)
    loss = torch.zeros(())
    for done in range(1, steps + 1):
        x, t, cost = _partial_trajectory(
            base, pair, draw, first=0, steps=trajectory_steps, guidance_scale=guidance_scale
        )
        with torch.no_grad():
            eps_concept, eps_null = _predict(base, x, t, pair)
        (student,) = _predict(edited, x, t, pair[:1])
        loss = esd_loss(student, esd_target(eps_null, eps_concept, eps_null, eta=eta), weight=one)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        passes += cost + 2 + 3
        if on_step:
            on_step(done, passes, edited)
    _check_finite(loss, lr)
    edited.denoiser.requires_grad_(False)
    edited.fingerprint = fingerprint_of(edited.denoiser)
    return FineTuned(edited, passes)


LECO_ALPHA = 1
"""LECO scales its adapters by this over the rank."""


def leco(
    base: Base,
    concept: str,
    *,
    iterations: int = 500,
    lr: float = 1e-4,
    batch: int = 2,
    rank: int = 4,
    layers: Layers = "full",
    eta: float = 1.0,
    guidance_scale: float = 3.0,
    trajectory_steps: int = 50,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Patch:
    """The patch of an adapter that is trained by LECO's schedule (p1atdev/LECO, `train_lora.py`), with its defaults.

        ε_θ(x_t, c) → ε*(x_t, neutral) − η (ε*(x_t, positive) − ε*(x_t, unconditional))

    with positive = c, and both others the empty prompt: the loss of ESD. Every iteration samples anew with the adapted model,
    guided, from pure noise to a step drawn at random. The teacher is asked three times, each time in a pair with the empty
    prompt, as LECO does though half of a pair counts for nothing; of the student's pair that half is left out, for it has no
    gradient. So an iteration costs batch · (2k + 6 + 3) passes after k steps of the sampler. LECO then asks at a timestep 19
    from the latent's; here it is the latent's own.

    The adapters start as LECO's (lora_A as `nn.Linear`, lora_B zero) and are scaled by 1/rank, as are its: that factor is in
    the patch's lora_B.

    Args:
        base: The frozen model. Adapters are taken off it; its weights are not changed.
        concept: c.
        iterations: Gradient steps.
        lr: Learning rate of AdamW.
        batch: Latents an iteration, all at the same step.
        rank: Of the adapters.
        layers: By default all attention, as LECO's first version; later ones adapt the feed-forward layers beside it too.
        eta: η, LECO's `guidance_scale` of a prompt.
        guidance_scale: Of the trajectories.
        trajectory_steps: Denoising steps from pure noise to a picture, at least two.
        seed: Adapters, noise and stopping steps follow from it.
        on_step: Called after each with the number of iterations and of passes done, and the base, its adapter on.

    Returns:
        A patch that says what it erases; its `cost` counts the passes, a backward pass being two.

    Raises:
        RecipeError: A number is out of its range, the layers are unknown, or the base is in float16.
        BaseModelError: The base has no such layers.
        TrainingError: The loss is no longer a number.
    """
    _check_training(base, concept, layers, lr=lr, eta=eta, guidance_scale=guidance_scale)
    _check_counts(iterations=iterations, batch=batch, rank=rank)
    if trajectory_steps < 2:
        raise RecipeError(f"trajectory_steps: must be 2 or more, for one is left to stop at, got {trajectory_steps}")
    told = _encoded(base, [concept, "", "", "", "", ""], guidance_scale=guidance_scale, batch=batch)
    base.remove_adapters()
    try:
        torch.manual_seed(seed)
        _add_leco_adapter(base, layers=layers, rank=rank)
        optimizer = torch.optim.AdamW(base.adapter_parameters(), lr=lr)
        draw, passes, weight = random.Random(seed), 0, torch.full((batch,), 1 / batch, device=base.device)
        loss = torch.zeros(())
        for done in range(1, iterations + 1):
            x, t, cost = _partial_trajectory(
                base, told[: 2 * batch], draw, first=1, steps=trajectory_steps, guidance_scale=guidance_scale
            )
            with base.teacher():
                positive, _, neutral, _, unconditional, _ = _predict(base, x, t, told)
            (student,) = _predict(base, x, t, told[:batch])
            loss = esd_loss(student, esd_target(neutral, positive, unconditional, eta=eta), weight=weight)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            passes += cost + (6 + 3) * batch
            if on_step:
                on_step(done, passes, base)
        _check_finite(loss, lr)
        state = base.adapter_state()
    finally:
        base.remove_adapters()
    scaled = {k: v * LECO_ALPHA / rank if ".lora_B." in k else v for k, v in state.items()}
    return Patch(scaled, _info(base, [Concept(erase=concept)], "leco", passes))


def _add_leco_adapter(base: Base, *, layers: Layers, rank: int) -> None:
    """Put adapters as LECO's on a preset's layers."""
    base.add_adapter(layers=layers, rank=rank)
    for module in base.denoiser.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("patch", init_lora_weights=True)
            module.set_scale("patch", LECO_ALPHA / rank)


@torch.no_grad()
def _partial_trajectory(
    base: Base, pair: Condition, draw: random.Random, *, first: int, steps: int, guidance_scale: float
) -> tuple[Tensor, Tensor, int]:
    """The network's input some way along a fresh trajectory (B, C, H, W), its timestep (), and the passes it cost.

    Args:
        base: With whatever adapters are on.
        pair: The prompt for each of B latents, then the empty prompt for each.
        draw: Of the noise and of the step to stop at.
        first: The fewest steps along.
        steps: From pure noise to a picture.
        guidance_scale: Of the trajectory.
    """
    seeds = [draw.getrandbits(62) for _ in range(len(pair) // 2)]
    sampler = base.sampler(steps, generators=step_noise(seeds))
    along = draw.randrange(first, len(sampler.timesteps))
    x_t = sampler.start(base.noise(seeds).float())
    for t in sampler.timesteps[:along]:
        eps_prompt, eps_null = _predict(base, sampler.network_input(x_t, t), t, pair)
        x_t = sampler.step(base.guide(eps_prompt, eps_null, guidance_scale=guidance_scale), t, x_t)
    t = sampler.timesteps[along]
    return sampler.network_input(x_t, t), t, along * len(pair)


def _predict(base: Base, x: Tensor, t: Tensor, told: Condition) -> tuple[Tensor, ...]:
    """The predictions at x (B, C, H, W) for each prompt in float32, in one batch; `told` has each prompt B times over."""
    prompts = len(told) // len(x)
    return base.predict(x.repeat(prompts, 1, 1, 1).to(base.dtype), t.expand(len(told)), told).float().chunk(prompts)


def _encoded(base: Base, prompts: list[str], *, guidance_scale: float, batch: int = 1) -> Condition:
    """The condition of each prompt `batch` times over; the encoders leave the device again."""
    told = base.encode(prompts, guidance_scale=guidance_scale)
    base.free_encoders()
    return told[torch.arange(len(prompts), device=base.device).repeat_interleave(batch)]


def _weights_of(base: Base, layers: Layers) -> list[nn.Parameter]:
    """The weights that ESD fine-tunes, which now require gradients; see `full_esd`."""
    if layers in ("esd-x", "esd-x-strict"):
        weights = [w for n in base.matched(layers) for w in base.denoiser.get_submodule(n).parameters()]
    else:
        crossing = () if layers == "full" else base.matched("esd-x")
        out = {id(w) for n in crossing for w in base.denoiser.get_submodule(n).parameters()}
        weights = [w for w in base.denoiser.parameters() if id(w) not in out]
    for weight in weights:
        weight.requires_grad_(True)
    return weights


# ---- what is solved for ------------------------------------------------------------------------------------------


def uce_recipe(base: Base, concepts: Sequence[Concept]) -> Recipe:
    """The recipe of `uce`: a closed form with the anchor itself as the target, and as many ranks as its layers have.

    Args:
        base: Whose layers are to be edited.
        concepts: Each erased wherever it stands, for a word is moved whatever is beside it.

    Raises:
        RecipeError: The base has no layers that are given words.
    """
    everywhere = tuple(concept.model_copy(update={"from_": None}) for concept in concepts)
    solved = Recipe(base=base.name, concepts=everywhere, objective="closed-form", eta=0.0)
    base.check(solved)
    whole = max(min(base.denoiser.get_submodule(name).weight.shape) for name in base.text_layers)
    return solved.model_copy(update={"rank": whole})


def uce(base: Base, concepts: Sequence[Concept]) -> Patch:
    """The patch of Unified Concept Editing (Gandikota et al. 2024, arXiv:2308.14761, equation 7), of whole rank.

        ΔW = argmin  Σ_i ‖(W + ΔW) c_i − W a_i‖²  +  μ Σ_j ‖ΔW c_j‖²  +  ρ ‖ΔW‖²

    over cross-attention k and v, for tokens c_i of prompts with a concept and a_i at their places in prompts with the
    anchor; see `esd_lora.closed_form`. The authors keep a list of prompts; here it is the recipe's prompts to preserve and
    the vocabulary, with means for sums. They write whole weights, and nothing of ΔW is cut off here either.

    Args:
        base: The frozen model; its weights are not changed.
        concepts: What is erased by one edit, synonyms with it, each with its anchor.

    Returns:
        A patch that says what it erases; it took no pass.

    Raises:
        RecipeError: The base has no layers that are given words.
    """
    recipe = uce_recipe(base, concepts)
    with base.encoders_alone():
        tensors = closed_form_patch(base, resolve(recipe))
    return Patch(tensors, _info(base, recipe.concepts, "uce", 0))


def _info(base: Base, concepts: Sequence[Concept], baseline: str, passes: int) -> dict[str, Any]:
    """What a baseline's patch tells about itself."""
    return {
        "recipe": {"concepts": [c.model_dump(mode="json", by_alias=True) for c in concepts]},
        "base": {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
        "baseline": baseline,
        "cost": {"forward_passes": passes},
    }
