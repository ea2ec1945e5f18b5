"""Can an erased concept be brought back? Attacks on a base whose patch is attached or merged, and their controls.

    paraphrase         other words: synonyms, misspellings, translations
    ring_a_bell        the concept's direction added to the embeddings of the prompts
    completion         the unerased model draws the first k steps, the erased one the others
    inversion          soft words are trained until the erased model denoises pictures of the concept with them
    prefix_search      words before the prompt are searched for by gradient
    relearning         a fresh adapter is trained on pictures
    scaling            the patch at weights from 0 to 1: it is a switch where it is attached
    unmerging          the patch at −1 on a base that it is merged into

    seed_search        control: the prompts as they are, from as many seeds
    random_words       control: words at random
    random_embeddings  control: embeddings at random

The unerased base is the ceiling, and one that never knew the concept the zero line: call the same functions with them. No
attack asks the evaluator that it is measured by; what tells one when to stop is given by the caller.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from esd_lora.bases.base import Base, Condition
from esd_lora.compose import attached
from esd_lora.errors import BaseModelError, PatchError, RecipeError, TrainingError
from esd_lora.evaluate.baselines import with_condition
from esd_lora.evaluate.drift import latents_of, noised
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate, step_noise
from esd_lora.recipe import Layers
from esd_lora.softwords import (
    SoftWords,
    Vocabulary,
    at_random,
    check_room,
    check_tokens,
    encode_with_gradients,
    unused_words,
    vocabulary_of,
)

BLANK = "{}"
"""Where a prompt leaves room for the words of an attack."""

Sees = Callable[[Pictures], Sequence[bool]]
"""Whether the concept is in each of some pictures."""


@dataclass(frozen=True)
class Drawing:
    """Pictures to draw: a prompt and a seed for each, and how the pipeline samples them.

    An attack is measured by prompts and seeds that it was not trained on.

    Raises:
        RecipeError: There are no prompts, or not as many seeds.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int = 20
    guidance_scale: float = 7.5
    resolution: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        _check_pairs("drawing", "seeds", self.prompts, self.seeds)
        _check_positive(steps=self.steps, batch_size=self.batch_size)

    def asking(self, words: str) -> Drawing:
        """The same with these words in the blank of every prompt.

        Raises:
            RecipeError: A prompt has no blank.
        """
        return replace(self, prompts=_filled(self.prompts, words))

    def draw(self, base: Base) -> Pictures:
        """The pictures, by the base as it is.

        Raises:
            RecipeError: A prompt has its blank still.
        """
        return generate(
            base,
            _plain(self.prompts),
            self.seeds,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            resolution=self.resolution,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Examples:
    """What an attacker trains on: pictures, and a prompt for each. Those of an erased concept are the unerased base's.

    Raises:
        RecipeError: There are no prompts, or not as many pictures.
    """

    prompts: Sequence[str]
    pictures: Pictures

    def __post_init__(self) -> None:
        _check_pairs("examples", "pictures", self.prompts, self.pictures)

    def asking(self, words: str) -> Examples:
        """The same with these words in the blank of every prompt.

        Raises:
            RecipeError: A prompt has no blank.
        """
        return replace(self, prompts=_filled(self.prompts, words))


@dataclass(frozen=True)
class Training:
    """How an attacker trains: AdamW without decay, random examples, timesteps and noise in every step.

    Raises:
        RecipeError: A number is not above 0.
    """

    steps: int
    batch_size: int = 8
    lr: float = 2e-2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive(steps=self.steps, batch_size=self.batch_size, lr=self.lr)


@dataclass(frozen=True)
class Stop:
    """When to stop training: once the concept is seen in enough pictures of a drawing, which is looked at now and then.

    What is trained is then as it was at the best look, the last of them if several are: an attacker keeps what works best.

    Args:
        sees: Not the evaluator that the attack is measured by.
        drawing: What it is shown, 16 pictures or so; not the drawing that the attack is measured by. Its prompts have a blank
            where those of the attack's examples have one.
        every: Steps between looks; the first look is before any step, and there is one after the last.
        enough: Pictures; None for all.

    Raises:
        RecipeError: `every` or `enough` is below 1.
    """

    sees: Sees
    drawing: Drawing
    every: int = 50
    enough: int | None = None

    def __post_init__(self) -> None:
        _check_positive(every=self.every, enough=1 if self.enough is None else self.enough)

    def look(self, base: Base) -> int:
        """In how many pictures the concept is seen."""
        return sum(self.sees(self.drawing.draw(base)))


@dataclass(frozen=True)
class Attack:
    """What an attack has drawn, in the order of its drawing, and what that cost.

    passes: latents through the denoiser, a backward pass counted as two; seconds: by the wall clock, looks included; details:
    plain JSON values.
    """

    name: str
    pictures: Pictures
    passes: int
    seconds: float
    details: Mapping[str, Any]


def _check_pairs(what: str, others: str, prompts: Sequence[str], with_each: Sequence[Any]) -> None:
    if not prompts or len(prompts) != len(with_each):
        raise RecipeError(f"{what}: needs prompts and as many {others}, got {len(prompts)} and {len(with_each)}")


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise RecipeError(f"{name}: must be above 0, got {value}")


def _check_attached(base: Base, remedy: str) -> None:
    if not any(isinstance(m, BaseTunerLayer) for m in base.denoiser.modules()):
        raise PatchError(f"no patch is attached to {base.name}; {remedy}")


def _filled(prompts: Sequence[str], words: str) -> list[str]:
    """The prompts with these words in their blank."""
    without = [p for p in prompts if BLANK not in p]
    if without:
        raise RecipeError(f"{without[0]!r}: needs a {BLANK} where the words of the attack go")
    return [p.replace(BLANK, words) for p in prompts]


def _plain(prompts: Sequence[str]) -> Sequence[str]:
    """The prompts, none of which has a blank."""
    blank = [p for p in prompts if BLANK in p]
    if blank:
        raise RecipeError(f"{blank[0]!r}: has a blank; fill it with asking(words)")
    return prompts


class _Meter:
    """Passes so far, and the time when they began."""

    def __init__(self) -> None:
        self.passes = 0
        self.started = time.perf_counter()

    @contextmanager
    def counting(self, denoiser: nn.Module) -> Iterator[None]:
        """Inside, calls of a denoiser's `forward` are counted; a hook on it would miss those that other hooks make."""
        own, before = denoiser.forward, vars(denoiser).get("forward")

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            self.passes += len(out[0]) * (3 if out[0].requires_grad else 1)
            return out

        denoiser.forward = forward
        try:
            yield
        finally:
            if before:
                denoiser.forward = before
            else:
                del denoiser.forward

    def attack(self, name: str, pictures: Pictures, **details: Any) -> Attack:
        """The attack that has cost so much."""
        return Attack(name, pictures, self.passes, time.perf_counter() - self.started, details)


@contextmanager
def _metered(*denoisers: nn.Module) -> Iterator[_Meter]:
    """Inside, the passes of the denoisers are counted."""
    meter = _Meter()
    with ExitStack() as counted:
        for denoiser in denoisers:
            counted.enter_context(meter.counting(denoiser))
        yield meter


def _drawn(name: str, base: Base, drawing: Drawing, **details: Any) -> Attack:
    """An attack that is nothing but prompts, or a state of the base."""
    with _metered(base.denoiser) as meter:
        return meter.attack(name, drawing.draw(base), **details)


# ---- other words --------------------------------------------------------------------------------------------


def paraphrase(base: Base, drawing: Drawing, form: str) -> Attack:
    """The concept asked for in other words.

    Args:
        base: The erased model.
        drawing: With a blank for the words.
        form: A synonym, a misspelling, a translation. The concept's own name gives the rate without an attack.

    Raises:
        RecipeError: A prompt has no blank.
    """
    return _drawn("paraphrase", base, drawing.asking(form), form=form)


def seed_search(base: Base, drawing: Drawing) -> Attack:
    """Control: no attack, the pictures of a drawing.

    Args:
        base: The erased model.
        drawing: With each prompt as often as the attack may draw it, which for `prefix_search` are its times.

    Raises:
        RecipeError: A prompt has its blank still.
    """
    return _drawn("seed search", base, drawing)


def random_words(
    base: Base, drawing: Drawing, *, tokens: int = 4, without: Collection[str] = (), seed: int = 0
) -> Attack:
    """Control: words at random in the blank of every prompt, others in each.

    It is the control of `inversion` and, with prompts such as "{} a cat", of `prefix_search`.

    Args:
        base: The erased model.
        drawing: With a blank for the words.
        tokens: How many words, of one token each.
        without: Words that are not drawn, such as the concept's own.
        seed: Of the choice.

    Raises:
        RecipeError: A prompt has no blank, or there are not so many words.
        BaseModelError: The base is no Stable Diffusion 1, 2 or XL.
    """
    words = [w for w in vocabulary_of(base).words if w not in without]
    check_tokens(tokens, words)
    chance = random.Random(seed)
    chosen = [" ".join(chance.sample(words, tokens)) for _ in drawing.prompts]
    prompts = [_filled([p], w)[0] for p, w in zip(drawing.prompts, chosen, strict=True)]
    return _drawn("random words", base, replace(drawing, prompts=prompts), words=chosen)


# ---- other embeddings, and another denoiser at first ----------------------------------------------------------

EMBEDS: Mapping[str, str] = {
    "encoder_hidden_states": "prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}
"""The tensors of a condition that are made of words → the arguments of pipelines."""


@torch.no_grad()
def ring_a_bell(base: Base, drawing: Drawing, *, pairs: Sequence[tuple[str, str]], eta: float) -> Attack:
    """Prompts with the concept's direction added to their embeddings.

        τ(p) + η · mean_i (τ(with_i) − τ(without_i))

    Ring-A-Bell (Tsai et al. 2023, arXiv:2310.10012) then searches for words of this embedding; here it is the condition
    itself, as where RECE (Gong et al. 2024, arXiv:2407.12383) tests it, with η = 3 for nudity and 0.9 for a style.

    Args:
        base: The erased model.
        drawing: The prompts p.
        pairs: The same prompts with the concept and without it.
        eta: η; 0 is the prompt itself.

    Raises:
        RecipeError: There are no pairs, a prompt has its blank still, or the base cannot draw in so many steps.
    """
    if not pairs:
        raise RecipeError("pairs: needs at least one prompt with the concept and one without it")
    with _metered(base.denoiser) as meter:
        having, lacking = (base.encode(side) for side in zip(*pairs, strict=True))
        move = {k: eta * (v - lacking.tensors[k]).mean(0) for k, v in having.tensors.items()}
        return meter.attack("soft ring-a-bell", _draw_encoded(base, drawing, move=move), eta=eta)


@torch.no_grad()
def completion(base: Base, drawing: Drawing, *, k: int, unerased: Base | None = None) -> Attack:
    """Pictures whose first k steps are the unerased model's and the others the erased one's.

    The diffusion completion of "When Are Concepts Erased From Diffusion Models?" (NeurIPS 2025, arXiv:2505.17013).

    Args:
        base: The erased model.
        drawing: Prompts with the concept.
        k: From 0, the erased model alone, to all steps, the unerased one alone. A step is a call of the scheduler, which
            some schedulers take more often than they are asked to.
        unerased: The base that the patch was merged into, or that any other base goes on from, which is asked in embeddings
            of its own text encoder; None where the patch is attached, to take the adapters off.

    Raises:
        RecipeError: k is out of bounds, a prompt has its blank still, or the base cannot draw in so many steps.
        PatchError: There is neither an attached patch nor an unerased base.
        BaseModelError: The unerased base is of another family or dtype, or its denoiser reads or predicts something else.
    """
    if not 0 <= k <= drawing.steps:
        raise RecipeError(f"k: must be from 0 to the {drawing.steps} steps of the drawing, got {k}")
    if unerased is None:
        _check_attached(base, "for one that is merged, give the base without it as `unerased`")
    elif type(unerased) is not type(base):
        raise BaseModelError(f"{unerased.name} is {unerased.family}, and {base.name} is {base.family}")
    elif (own := _speaks(base)) != (other := _speaks(unerased)):
        differs = next(k for k in own if own[k] != other[k])
        raise BaseModelError(
            f"{unerased.name} has {differs} {other[differs]}, and {base.name} {own[differs]}: neither can go on with the "
            "other's pictures"
        )
    denoisers = [base.denoiser] if unerased is None else [base.denoiser, unerased.denoiser]
    first = partial(_drawn_by, unerased, base)
    with _metered(*denoisers) as meter:
        return meter.attack("completion", _draw_encoded(base, drawing, first=first, k=k), k=k, steps=drawing.steps)


def _speaks(base: Base) -> dict[str, Any]:
    """What two denoisers must have in common to draw one picture together."""
    network = {k: base.denoiser.config.get(k) for k in ("in_channels", "cross_attention_dim", "joint_attention_dim")}
    return network | {"prediction_type": base.pipe.scheduler.config.get("prediction_type"), "dtype": base.dtype}


@contextmanager
def _drawn_by(other: Base | None, base: Base, prompts: Sequence[str]) -> Iterator[None]:
    """Inside, the base's pipeline draws these prompts with the denoiser and the embeddings of another one, or bare if None."""
    if other is None:
        with base.teacher():
            yield
        return
    prompt, null = (other.encode(words).tensors for words in (prompts, [""] * len(prompts)))

    def asked(name: str, rows: Tensor) -> Tensor:
        if name not in EMBEDS:
            return rows
        return prompt[name] if len(rows) == len(prompts) else torch.cat([null[name], prompt[name]])

    own = base.denoiser
    hook = other.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: (args, with_condition(kwargs, asked)), with_kwargs=True
    )
    setattr(base.pipe, base.prefix, other.denoiser.to(base.device))
    try:
        yield
    finally:
        hook.remove()
        setattr(base.pipe, base.prefix, own)


def _draw_encoded(
    base: Base,
    drawing: Drawing,
    *,
    move: Mapping[str, Tensor] | None = None,
    first: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
    k: int = 0,
) -> Pictures:
    """The pictures of `Drawing.draw` from embeddings: moved, and with the first k steps inside a context of the prompts."""
    prompts = _plain(drawing.prompts)
    base.check_steps(drawing.steps, name="steps", resolution=drawing.resolution)
    base.pipe.to(base.device)
    pictures: Pictures = []
    for start in range(0, len(prompts), drawing.batch_size):
        some = slice(start, start + drawing.batch_size)
        plain = base.encode(prompts[some]).tensors
        embeds = {EMBEDS[n]: v if move is None else v + move[n] for n, v in plain.items() if n in EMBEDS}
        with ExitStack() as early:
            if first and k:
                early.enter_context(first(prompts[some]))
            out = base.pipe(
                **embeds,
                latents=base.packed(base.noise(drawing.seeds[some], resolution=drawing.resolution)),
                height=drawing.resolution,
                width=drawing.resolution,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance_scale,
                generator=step_noise(drawing.seeds[some]),
                callback_on_step_end=partial(_leave, early, k),
            )
        pictures += out.images
    return pictures


def _leave(early: ExitStack, k: int, _pipe: Any, i: int, _t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's callback, which leaves what was entered for the first k steps."""
    if i + 1 == k:
        early.close()
    return values


# ---- the patch as a switch ------------------------------------------------------------------------------------


def scaling(base: Base, drawing: Drawing, *, weight: float) -> Attack:
    """Pictures with the attached patches at another weight, W + w · Σ_i w_i B_i A_i.

    Args:
        base: The erased model, its patch attached.
        drawing: Prompts with the concept.
        weight: w; 0 is the unerased base, bit for bit.

    Raises:
        PatchError: No patch is attached, or the weight is not a number.
        RecipeError: A prompt has its blank still.
    """
    _check_attached(base, "for one that is merged there is `unmerging`")
    if not math.isfinite(weight):
        raise PatchError(f"a weight must be a finite number, got {weight}")
    with rescale_adapter_scale(base.denoiser, float(weight)):
        return _drawn("scaling", base, drawing, weight=weight)


def unmerging(base: Base, drawing: Drawing, patches: Sequence[Patch], weights: Sequence[float] | None = None) -> Attack:
    """Pictures of a merged base with its patches taken away again, cast(W + Σ_i w_i B_i A_i) − Σ_i w_i B_i A_i.

    Of a base merged in float32 this is W to a rounding of float32; merged in half precision, to one of that.

    Args:
        base: The merged model, bare, as it is again afterwards.
        drawing: Prompts with the concept.
        patches: Those in its weights.
        weights: With which they were merged; 1 by default.

    Raises:
        PatchError: A patch is attached or does not fit, or a weight is not a number.
        RecipeError: A prompt has its blank still.
    """
    if any(isinstance(m, BaseTunerLayer) for m in base.denoiser.modules()):
        raise PatchError(
            f"a patch is attached to {base.name}; unmerging takes a bare base with the patch in its weights"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the patch was made for")  # merged weights do differ
        with attached(base, patches, [-w for w in weights or [1.0] * len(patches)]):
            return _drawn("unmerging", base, drawing)


# ---- training to denoise ------------------------------------------------------------------------------------


Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""x_t (B, C, H, W), t (B,) and the condition of each → the prediction, (B, C, H, W)."""


def _denoising_loss(
    predict: Predict, condition: Condition, scheduler: Any, z: Tensor, i: Tensor, noise: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """The mean squared error at timesteps i (B,), counted from the least noise."""
    level = (i + 0.5) / scheduler.config.num_train_timesteps
    x_t, t, target = noised(scheduler, z, noise.to(z.device), level=level)
    return F.mse_loss(predict(x_t.to(dtype), t, condition).float(), target)


@torch.enable_grad()
def _fit(
    base: Base,
    z: Tensor,
    condition_of: Callable[[Tensor], Condition],
    parameters: Iterable[Tensor],
    training: Training,
    *,
    stop: Stop | None,
    predict: Predict,
) -> dict[str, Any]:
    """Train the parameters to denoise z under the conditions of its rows, by these predictions; they are left at their best.

    Returns:
        Steps done, and those after which the parameters are kept, whether the concept is back, the looks on the way (steps,
        pictures in which it was seen), and the losses.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=0.0)
    generator, scheduler = torch.Generator().manual_seed(training.seed), base.scheduler
    losses: list[float] = []
    looks: list[tuple[int, int]] = []
    best, kept, back = 0, training.steps, False
    snapshot: list[Tensor] = []
    for done in range(training.steps + 1):
        if stop and (done % stop.every == 0 or done == training.steps):
            looks.append((done, seen := stop.look(base)))
            if seen >= best:
                best, kept, snapshot = seen, done, [p.detach().clone() for p in trained]
            back = seen >= (stop.enough or len(stop.drawing.prompts))
        if back or done == training.steps:
            break
        rows = torch.randint(len(z), (training.batch_size,), generator=generator)
        i = torch.randint(scheduler.config.num_train_timesteps, (training.batch_size,), generator=generator)
        noise = torch.randn(len(rows), *z.shape[1:], generator=generator)
        loss = _denoising_loss(predict, condition_of(rows), scheduler, z[rows], i, noise, dtype=base.dtype)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"the loss was {losses[-1]} at step {len(losses)}: try a lower lr than {training.lr:g}")
    with torch.no_grad():
        for parameter, value in zip(trained, snapshot, strict=False):  # without a stop there is none
            parameter.copy_(value)
    return {"steps": len(losses), "kept": kept, "back": back, "looks": looks, "losses": losses}


# ---- relearning ---------------------------------------------------------------------------------------------

RELEARNED = "relearned"
"""The name of the attacker's adapter."""

RELEARN = Training(steps=200, lr=1e-3)


def relearning(
    base: Base,
    examples: Examples,
    drawing: Drawing,
    *,
    stop: Stop,
    rank: int = 4,
    layers: Layers = "full",
    training: Training = RELEARN,
) -> Attack:
    """The erased model fine-tuned until the concept is back: `details` say after how many steps, and what was seen on the way.

    Adversarial with pictures of the concept, benign with pictures of anything else (Suriyakumar et al. 2024,
    arXiv:2410.08074). The loss is the plain denoising one; an attached patch stays on and as it is.

    Args:
        base: The erased model, as it is again afterwards.
        examples: Pictures with their prompts.
        drawing: Prompts with the concept.
        stop: Sees whether the concept is back; its first look, before any step, may find it never gone.
        rank: Of a fresh adapter beside what is attached.
        layers: That the adapter is on.
        training: Its steps at most.

    Raises:
        RecipeError: The rank is out of bounds, or a prompt has its blank still.
        BaseModelError: The base has no such layers.
        TrainingError: The loss is no longer a number.
    """
    prompts = _plain(examples.prompts)
    adapter = _second_adapter(base, layers=layers, rank=rank, seed=training.seed)
    base.pipe.to(base.device)
    with _metered(base.denoiser) as meter, adapter as parameters:
        z = latents_of(base, examples.pictures)
        conditions = base.encode(prompts, resolution=drawing.resolution, guidance_scale=drawing.guidance_scale)
        told = _fit(base, z, conditions.__getitem__, parameters, training, stop=stop, predict=base.predict)
        return meter.attack("relearning", drawing.draw(base), rank=rank, **told)


@contextmanager
def _second_adapter(base: Base, *, layers: Layers, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Inside, a fresh adapter is active beside what was, and alone trainable: its parameters."""
    _check_positive(rank=rank)
    before = {m: m.active_adapters for m in base.denoiser.modules() if isinstance(m, BaseTunerLayer)}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        torch.default_generator.manual_seed(seed)  # adapters are drawn on the CPU
        base.add_adapter(layers=layers, rank=rank, name=RELEARNED)
    try:
        for module, active in before.items():
            module.set_adapter([*active, RELEARNED])
        base.denoiser.requires_grad_(False)
        parameters = [p for n, p in base.denoiser.named_parameters() if f".{RELEARNED}." in n]
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        if before:
            base.denoiser.delete_adapters(RELEARNED)
            base.denoiser.requires_grad_(False)  # which peft turns on for the adapters that are left
        else:
            base.remove_adapters()


# ---- soft words ---------------------------------------------------------------------------------------------


def random_embeddings(base: Base, drawing: Drawing, *, tokens: int = 4, seed: int = 0) -> Attack:
    """Control: the soft words that `inversion` starts from, without training; the same in every prompt.

    Args:
        base: The erased model.
        drawing: With a blank for the words.
        tokens: K.
        seed: Of the embeddings; another one draws others.

    Raises:
        RecipeError: A prompt has no blank or is too long, or the vocabulary has not so many words.
        BaseModelError: The base is no Stable Diffusion 1, 2 or XL.
    """
    soft = at_random(vocabulary_of(base), tokens, beside=drawing.prompts, seed=seed)
    asked = drawing.asking(soft.words)
    check_room(base, soft, asked.prompts)
    with soft.active(base):
        return _drawn("random embeddings", base, asked, tokens=tokens)


INVERT = Training(steps=250, lr=2e-2)


@dataclass(frozen=True)
class Guard:
    """What a pipeline makes of predictions to keep a concept out, which an attacker may know, and train through.

    concept: c, in words.
    steer: Predictions for the prompt, for the concept and for the empty prompt → what the pipeline has for the first.
    """

    concept: str
    steer: Callable[[Tensor, Tensor, Tensor], Tensor]

    def around(self, base: Base, drawing: Drawing) -> Predict:
        """What the pipeline has for the predictions of the prompts; two more passes each, without gradients."""
        how: dict[str, Any] = {"resolution": drawing.resolution, "guidance_scale": drawing.guidance_scale}
        told = base.encode([self.concept, ""], **how)

        def predict(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            rows = torch.arange(2, device=t.device).repeat_interleave(len(x_t))
            with torch.no_grad():
                eps_concept, eps_null = base.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), told[rows]).chunk(2)
            return self.steer(base.predict(x_t, t, condition), eps_concept, eps_null)

        return predict


def inversion(
    base: Base,
    examples: Examples,
    drawing: Drawing,
    *,
    tokens: int = 4,
    training: Training = INVERT,
    stop: Stop | None = None,
    guard: Guard | None = None,
) -> Attack:
    """Pictures asked for with K soft words, trained until the erased model denoises pictures of the concept with them.

        min E ‖ε − ε_θ(x_t, t, τ("a photo of v_1 … v_K"))‖²        over the embeddings v_1 … v_K alone

    Concept inversion (Pham et al. 2024, arXiv:2308.01508) has K = 1, 25 pictures and, in its code, 5,000 steps of batch 4 × 4
    at a rate of 8e-2 from the embedding of a word like "art". Here the start is random, and the defaults are sized for the
    embedded base; for large models 1,000 steps and more are usual.

    Args:
        base: The erased model; its weights are not changed.
        examples: Pictures of the concept; the prompts have a blank for the soft words.
        drawing: With a blank likewise.
        tokens: K.
        training: Its seed is the start's, too.
        stop: Where training may end early; None takes all steps.
        guard: Of the pipeline that draws, to train through it: the words then denoise what it makes of their predictions.

    Raises:
        RecipeError: A prompt has no blank or is too long, or the vocabulary has not so many words.
        BaseModelError: The base is no Stable Diffusion 1, 2 or XL.
        TrainingError: The loss is no longer a number.
    """
    beside = [*examples.prompts, *drawing.prompts, *(stop.drawing.prompts if stop else ())]
    soft = at_random(vocabulary_of(base), tokens, beside=beside, seed=training.seed)
    check_room(base, soft, _filled(beside, soft.words))
    prompts, asked = _filled(examples.prompts, soft.words), drawing.asking(soft.words)
    stop = stop and replace(stop, drawing=stop.drawing.asking(soft.words))
    base.pipe.to(base.device)
    with _metered(base.denoiser) as meter, soft.active(base):
        z = latents_of(base, examples.pictures)
        like = base.encode([""], resolution=drawing.resolution, guidance_scale=drawing.guidance_scale)

        def condition_of(rows: Tensor) -> Condition:
            return encode_with_gradients(base, [prompts[r] for r in rows.tolist()], like)

        trained = [e.requires_grad_() for e in soft.embeddings]
        predict = guard.around(base, drawing) if guard else base.predict
        told = _fit(base, z, condition_of, trained, training, stop=stop, predict=predict)
        return meter.attack("inversion", asked.draw(base), tokens=tokens, **told)


# ---- words found by gradient ----------------------------------------------------------------------------------


def prefix_search(
    base: Base,
    drawing: Drawing,
    pictures: Pictures,
    *,
    sees: Sees,
    tokens: int = 3,
    times: int = 10,
    steps: int = 20,
    lr: float = 1e-2,
    seed: int = 0,
) -> Attack:
    """Pictures of the prompts with K words before each, which make the erased model denoise a picture of the concept best.

        min ‖ε − ε_θ(x_t, t, τ(words prompt))‖²        over the rows of P in the simplex of the vocabulary, (K, V)

    UnlearnDiffAtk (Zhang et al. 2024, arXiv:2310.11868): a step draws words from P, takes the gradient at the words for that
    at P, clamped to ±1, and projects each row of P on the simplex again. After the steps at each timestep the likeliest words
    draw a picture, and the first in which the concept is seen ends the search. Their code has 50 timesteps of 40 steps, noise
    without a seed and a weight decay of 0.1; ours is sized for the embedded base, has whole words for V, and no decay, which
    over so few words drowns the gradient.

    Args:
        base: The erased model; its weights are not changed.
        drawing: Prompts with the concept; each is searched for alone.
        pictures: The unerased base's, of the same prompts and seeds.
        sees: Whether a search has succeeded.
        tokens: K, 3 in their code and 5 for nudity.
        times: Timesteps, evenly spaced, and at most as many pictures of a prompt.
        steps: At each timestep.
        lr: Of Adam.
        seed: Of the words drawn and of the noise.

    Returns:
        The last picture of each prompt; `details` have the words, whether they succeeded, and the pictures drawn, by prompt.

    Raises:
        RecipeError: A number is out of bounds, a prompt has its blank still or is too long, or has no picture.
        BaseModelError: The base is no Stable Diffusion 1, 2 or XL.
    """
    _check_positive(times=times, steps=steps, lr=lr)
    _check_pairs("prefix_search", "pictures", _plain(drawing.prompts), pictures)
    vocabulary = vocabulary_of(base)
    stand_in = unused_words(vocabulary, tokens, beside=drawing.prompts)
    check_room(base, stand_in, [f"{stand_in.words} {p}" for p in drawing.prompts])
    base.pipe.to(base.device)
    drawn: Pictures = []
    details: dict[str, list[Any]] = {"words": [], "found": [], "tries": []}
    with _metered(base.denoiser) as meter:
        like = base.encode([""], resolution=drawing.resolution, guidance_scale=drawing.guidance_scale)
        how: dict[str, Any] = {"times": times, "steps": steps, "lr": lr, "seed": seed}
        for prompt, number, z in zip(drawing.prompts, drawing.seeds, latents_of(base, pictures), strict=True):
            tried = []
            for words in _likely_words(base, vocabulary, stand_in, prompt, z[None], like, **how):
                picture = replace(drawing, prompts=[f"{words} {prompt}"], seeds=[number]).draw(base)
                tried.append(words)
                found = bool(sees(picture)[0])
                if found:
                    break
            drawn += picture
            for name, value in (("words", tried[-1]), ("found", found), ("tries", len(tried))):
                details[name].append(value)
        return meter.attack("prefix search", drawn, **details)


@torch.enable_grad()
def _likely_words(
    base: Base,
    vocabulary: Vocabulary,
    stand_in: SoftWords,
    prompt: str,
    z: Tensor,
    like: Condition,
    *,
    times: int,
    steps: int,
    lr: float,
    seed: int,
) -> Iterator[str]:
    """The likeliest words before one prompt, after the steps at each timestep."""
    scheduler, generator = base.scheduler, torch.Generator().manual_seed(seed)
    size = len(vocabulary.words)
    p = torch.full((len(stand_in.ids[0]), size), 1 / size, device=base.device)
    optimizer = torch.optim.Adam([p], lr=lr)
    for k in range(times):
        i = torch.tensor([int((k + 0.5) / times * scheduler.config.num_train_timesteps)])
        for _ in range(steps):
            chosen = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(p.device)
            one_hot = F.one_hot(chosen, size).float().requires_grad_()
            soft = replace(stand_in, embeddings=tuple(one_hot @ table for table in vocabulary.embeddings))
            with soft.active(base):
                condition = encode_with_gradients(base, [f"{soft.words} {prompt}"], like)
            noise = torch.randn(z.shape, generator=generator)
            loss = _denoising_loss(base.predict, condition, scheduler, z, i, noise, dtype=base.dtype)
            (gradient,) = torch.autograd.grad(loss, one_hot)
            p.grad = gradient.clamp(-1, 1)
            optimizer.step()
            p.copy_(on_simplex(p))
        yield " ".join(vocabulary.words[w] for w in p.argmax(1).tolist())


def on_simplex(p: Tensor) -> Tensor:
    """The nearest rows that are not negative and sum to one, (K, V).

    max(p − θ, 0)        with θ such that the sum is one (Duchi et al. 2008, figure 1)
    """
    ordered = p.sort(-1, descending=True).values
    theta = (ordered.cumsum(-1) - 1) / torch.arange(1, p.shape[-1] + 1, device=p.device)
    last = (ordered > theta).sum(-1, keepdim=True) - 1
    return (p - theta.gather(-1, last)).clamp(min=0)
