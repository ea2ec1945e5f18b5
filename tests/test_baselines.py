"""Baselines: against diffusers' own pipelines and against loops written out, and that nothing of them is left."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import RecipeOf, same, weights_of
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipelineSafe,
)
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import NOISE, TINY, checked_by, tiny_flux, tiny_pipeline, tiny_sd3, tiny_xl
from torch import Tensor

from esd_lora.bases import Base, base_of
from esd_lora.closed_form import edit_moments
from esd_lora.compose import attach, check_fits
from esd_lora.emoji.evaluators import OBJECT_CLASSES, STYLE_CLASSES, load_evaluator
from esd_lora.errors import BaseModelError, RecipeError, TrainingError
from esd_lora.evaluate.baselines import (
    PRESETS,
    PostFilter,
    Preset,
    SafeGuidance,
    _partial_trajectory,
    emoji_filter,
    full_esd,
    leco,
    negative_prompt,
    safe_latent,
    safety_checker_filter,
    safety_guidance,
    separate_negative,
    uce,
)
from esd_lora.keys import RIDGE, kept_moment, ridged
from esd_lora.patch import Patch, load_patch
from esd_lora.pictures import Pictures, generate
from esd_lora.recipe import Concept, Layers, Recipe
from esd_lora.trajectories import default_preserve

STEPS, SCALE = 5, 7.5


def base_from(pipe: Any, dtype: torch.dtype = torch.float64) -> Base:
    """A base in float64, where another order of the same sums differs by 1e-16 and not by 1e-7."""
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype)
    return base_of(pipe)


@pytest.fixture
def exact() -> Base:
    return base_from(tiny_pipeline())


@pytest.fixture
def exact_xl() -> Base:
    return base_from(tiny_xl())


def latents(base: Base, prompts: list[str], **more: Any) -> Tensor:
    """What the base's own pipeline draws, before it is decoded."""
    given = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent", **more}
    x: Tensor = base.pipe(prompts, latents=base.noise(range(len(prompts))), **given).images
    return x


Guide = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@torch.no_grad()
def by_hand(base: Base, prompts: list[str], concept: str, guide: Guide) -> Tensor:
    """A loop with three predictions at every step, and `guide(ε_p, ε_c, ε_∅, i)` for their guided sum."""
    told = [base.encode(some) for some in (prompts, [concept] * len(prompts), [""] * len(prompts))]
    sampler = base.sampler(STEPS)
    x = sampler.start(base.noise(range(len(prompts))))
    for i, t in enumerate(sampler.timesteps):
        given = sampler.network_input(x, t)
        eps = [base.predict(given, t.expand(len(given)), c) for c in told]
        x = sampler.step(guide(*eps, i), t, x)
    return x


def safely(guidance: SafeGuidance) -> Guide:
    """Safe Latent Diffusion as the paper writes it: with signs and cases."""
    nu: list[Tensor | float] = [0.0]

    def guide(p: Tensor, c: Tensor, null: Tensor, i: int) -> Tensor:
        phi = torch.minimum(guidance.scale * (p - c).abs(), torch.ones(()))
        mu = torch.where(p - c < guidance.threshold, phi, torch.zeros(()))
        gamma = mu * (c - null) + guidance.momentum_scale * nu[0]
        nu[0] = guidance.momentum_beta * nu[0] + (1 - guidance.momentum_beta) * gamma
        return null + SCALE * (p - null - (gamma if i >= guidance.warmup * STEPS / 50 else 0))

    return guide


def apart(left: Tensor, right: Tensor) -> float:
    """The largest difference."""
    return (left - right).abs().max().item()


# ---- guidance ---------------------------------------------------------------------------------------------------


def theirs(base: Base, guidance: SafeGuidance, prompts: list[str]) -> Tensor:
    """The latents of diffusers' pipeline, whose warm-up counts steps of the run."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor")
    pipe = StableDiffusionPipelineSafe(
        **{name: getattr(base.pipe, name) for name in names}, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_concept = "a cat"
    seen: list[Tensor] = []
    pipe(
        prompts,
        latents=base.noise(range(len(prompts))),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        sld_guidance_scale=guidance.scale,
        sld_warmup_steps=math.ceil(guidance.warmup * STEPS / 50),
        sld_threshold=guidance.threshold,
        sld_momentum_scale=guidance.momentum_scale,
        sld_mom_beta=guidance.momentum_beta,
        callback=lambda i, t, x: seen.append(x),
    )
    return seen[-1]


@pytest.mark.parametrize(
    ("kind", "preset"),
    [*(("epsilon", p) for p in get_args(Preset)), *((k, "strong") for k in ("v_prediction", "pndm", "patched"))],
)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_safe_latent_draws_what_diffusers_own_pipeline_draws(kind: str, preset: Preset, patch: Patch) -> None:
    base = base_from(tiny_pipeline(prediction_type="v_prediction" if kind == "v_prediction" else "epsilon"))
    if kind == "pndm":  # Stable Diffusion 1's own, which has one timestep twice
        base.pipe.scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1)
    if kind == "patched":
        attach(base, [patch])
    guidance = PRESETS[preset]
    if preset == "weak":  # theirs is a tenth of the authors'
        guidance = replace(guidance, scale=SafetyConfig.WEAK["sld_guidance_scale"])
        assert guidance.scale == 20
    prompts = ["a dog", "a cat on a mat"]
    with safe_latent(base, "a cat", guidance):
        ours = latents(base, prompts)
    expected = theirs(base, guidance, prompts)
    effect = apart(latents(base, prompts), expected)
    # the same sums in batches of another size: float64's rounding, times s and s_S, over all steps
    assert apart(ours, expected) < 1e-8 * effect
    assert effect > 1e-4


@pytest.mark.parametrize("preset", get_args(Preset))
def test_the_presets_are_the_published_ones(preset: Preset) -> None:
    ours, given = PRESETS[preset], dict(getattr(SafetyConfig, preset.upper()))
    given["sld_guidance_scale"] = 200 if preset == "weak" else given["sld_guidance_scale"]
    assert [ours.warmup, ours.scale, ours.threshold, ours.momentum_scale, ours.momentum_beta] == [
        given[f"sld_{name}"] for name in ("warmup_steps", "guidance_scale", "threshold", "momentum_scale", "mom_beta")
    ]


def test_safety_guidance_by_hand() -> None:
    guidance = SafeGuidance(warmup=0, scale=2, threshold=0.1, momentum_scale=0.5, momentum_beta=0)
    # near the concept: little, in full, and on its far side: -0.25, -3, and 0.05 below λ, 0.2 above it
    p, c, null = (torch.tensor(v, dtype=torch.float64) for v in ([0.75, 0, 1.05, 1.2], [1.0, 3, 1, 1], [0, 1, 0, 0]))
    gamma = safety_guidance(p, c, null, torch.tensor([1.0, 0, 0, 2]), guidance=guidance)
    assert gamma.tolist() == pytest.approx([0.5 * 1 + 0.5, 1 * 2, 0.1 * 1, 0 + 1.0])


@pytest.mark.parametrize("preset", ["medium", "max"])
def test_safe_latent_in_sdxl_is_a_loop_with_three_predictions(exact_xl: Base, preset: Preset) -> None:
    prompts = ["a dog", "a cat on a mat"]
    with safe_latent(exact_xl, "a cat", preset):
        ours = latents(exact_xl, prompts)
    expected = by_hand(exact_xl, prompts, "a cat", safely(PRESETS[preset]))
    # the same sums in batches of another size, in float64 but for Euler's sigmas, which both have in float32
    assert apart(ours, expected) < 1e-8 * apart(latents(exact_xl, prompts), expected)


def test_every_run_starts_without_momentum_and_in_warm_up(exact: Base) -> None:
    alone = []
    for prompt in ("a dog", "a fish"):
        with safe_latent(exact, "a cat", "strong"):
            alone.append(latents(exact, [prompt]))
    with safe_latent(exact, "a cat", "strong"):
        again = [latents(exact, [prompt]) for prompt in ("a dog", "a fish")]
        once = [latents(exact, ["a dog"], num_inference_steps=1) for _ in range(2)]  # both at the same timestep
    assert all(torch.equal(x, y) for x, y in zip(alone, again, strict=True))
    assert torch.equal(*once)


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_warm_up_is_a_share_of_the_steps(exact: Base, scheduler: str) -> None:
    if scheduler == "heun":  # which asks twice at every step but the last
        exact.pipe.scheduler = HeunDiscreteScheduler(**NOISE)

    def steps(guidance: SafeGuidance | None) -> list[Tensor]:
        seen: list[Tensor] = []

        def note(pipe: Any, i: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(given["latents"])
            return given

        if guidance:
            with safe_latent(exact, "a cat", guidance):
                latents(exact, ["a dog"], callback_on_step_end=note)
        else:
            latents(exact, ["a dog"], callback_on_step_end=note)
        return seen

    plain, safe = steps(None), steps(replace(PRESETS["max"], warmup=20))
    calls = 2 if scheduler == "heun" else 1
    differ = [not torch.equal(x, y) for x, y in zip(plain, safe, strict=True)]
    assert differ == [i >= 2 * calls for i in range(len(plain))]  # 20 of 50 steps are 2 of 5


def test_a_negative_prompt_is_the_pipelines_own(base: Base) -> None:
    # one picture: the text encoder's sums depend on how many prompts it gets at once, which the pipeline's do
    given = {"num_inference_steps": 3, "latents": base.noise([0]), "output_type": "latent"}
    with negative_prompt(base, "a cat"):
        ours = base.pipe(["a dog"], **given).images
    assert torch.equal(ours, base.pipe(["a dog"], negative_prompt=["a cat"], **given).images)
    assert not torch.equal(ours, base.pipe(["a dog"], **given).images)


def test_a_negative_prompt_in_sdxl_is_the_pipelines_own() -> None:
    base = base_from(tiny_xl(), torch.float32)
    given = {"num_inference_steps": 3, "latents": base.noise([0]), "output_type": "latent"}
    with negative_prompt(base, "a cat"):
        ours = base.pipe(["a dog"], **given).images
    assert torch.equal(ours, base.pipe(["a dog"], negative_prompt=["a cat"], **given).images)
    assert not torch.equal(ours, base.pipe(["a dog"], **given).images)


def test_the_strength_of_a_negative_prompt_is_between_the_words_and_none(exact: Base) -> None:
    words, none = (exact.encode([p]).tensors["encoder_hidden_states"] for p in ("a cat", ""))
    for strength in (0, 0.3, 2):
        with negative_prompt(exact, "a cat", strength=strength):
            ours = latents(exact, ["a dog"])
        mixed = none + strength * (words - none)
        expected = latents(exact, ["a dog"], negative_prompt_embeds=mixed)
        assert apart(ours, expected) < 1e-10  # float64
    with negative_prompt(exact, "a cat", strength=0):
        assert torch.equal(latents(exact, ["a dog"]), latents(exact, ["a dog"]))


@pytest.mark.parametrize("pipe", [tiny_pipeline, tiny_xl])
def test_a_separate_negative_is_a_third_term(pipe: Callable[[], Any]) -> None:
    base, prompts = base_from(pipe()), ["a dog", "a fish"]
    with separate_negative(base, "a cat", scale=2.5):
        ours = latents(base, prompts)

    def guide(p: Tensor, c: Tensor, null: Tensor, i: int) -> Tensor:
        return null + SCALE * (p - null) - 2.5 * (c - null)

    expected = by_hand(base, prompts, "a cat", guide)
    assert apart(ours, expected) < 1e-10 * expected.abs().max()  # float64
    assert apart(ours, latents(base, prompts)) > 1e-3


def test_a_separate_negative_of_one_less_than_the_guidance_is_a_negative_prompt(exact: Base) -> None:
    with separate_negative(exact, "a cat", scale=SCALE - 1):
        third = latents(exact, ["a dog"])
    with negative_prompt(exact, "a cat"):
        replaced = latents(exact, ["a dog"])
    assert apart(third, replaced) < 1e-10  # the same sum in another order, in float64
    with separate_negative(exact, "a cat", scale=0):
        assert torch.equal(latents(exact, ["a dog"]), latents(exact, ["a dog"]))


Context = Callable[[Base], AbstractContextManager[None]]

CONTEXTS: Mapping[str, Context] = {
    "safe latent": lambda base: safe_latent(base, "a cat", "max"),
    "negative prompt": lambda base: negative_prompt(base, "a cat"),
    "separate negative": lambda base: separate_negative(base, "a cat", scale=5),
}


def draw(base: Base, **more: Any) -> Pictures:
    return generate(base, ["a dog", "a fish"], [1, 2], steps=3, batch_size=1, **more)


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_acts_on_pictures_with_patches_and_leaves_nothing(base: Base, patch: Patch, name: str) -> None:
    attach(base, [patch])
    weights, before = weights_of(base), draw(base)
    with CONTEXTS[name](base):
        inside = draw(base)
    assert inside != before
    assert draw(base) == before
    assert same(weights_of(base), weights)
    with CONTEXTS[name](base):
        base.remove_adapters()
        attach(base, [patch])  # inside as well as before
        assert draw(base) == inside


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_leaves_nothing_when_it_breaks(base: Base, name: str) -> None:
    before = draw(base)

    def broken(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CONTEXTS[name](base):
        draw(base, on_batch=broken)
    assert draw(base) == before


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_leaves_predictions_alone(base: Base, name: str) -> None:
    draw(base)  # so that the pipeline has a guidance scale
    x, t, told = base.noise([1, 2]), torch.tensor([500, 20]), base.encode(["a dog", "a fish"])
    with torch.no_grad():
        before = base.predict(x, t, told)
        with CONTEXTS[name](base):
            assert torch.equal(base.predict(x, t, told), before)


@pytest.mark.parametrize("name", CONTEXTS)
def test_without_guidance_a_context_warns_and_does_nothing(base: Base, name: str) -> None:
    plain = draw(base, guidance_scale=1)
    with CONTEXTS[name](base), pytest.warns(UserWarning, match="guidance_scale: 1 is no guidance.* above 1"):
        assert draw(base, guidance_scale=1) == plain


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_needs_a_unet_that_is_guided(name: str) -> None:
    for pipe in (tiny_sd3(), tiny_flux()):
        with (
            pytest.raises(BaseModelError, match=r"has no UNet, which this baseline acts on$"),
            CONTEXTS[name](base_of(pipe)),
        ):
            pass
    told = base_of(tiny_pipeline(guidance_size=8))
    with pytest.raises(BaseModelError, match="is told its guidance scale"), CONTEXTS[name](told):
        pass


def test_what_contexts_refuse(base: Base) -> None:
    no = "must be a finite number of 0 or more, got"
    for context, message in {
        safe_latent(base, "cat", "mild"): "guidance: no preset mild; there are weak, medium, strong, max",  # type: ignore[arg-type]
        safe_latent(base, " "): "concept: must not be empty",
        negative_prompt(base, ""): "concept: must not be empty",
        negative_prompt(base, "cat", strength=-1): f"strength: {no} -1",
        separate_negative(base, "cat", scale=math.nan): f"scale: {no} nan",
    }.items():
        with pytest.raises(RecipeError, match=f"^{message}$"), context:
            pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -1}, "scale: must be a finite number of 0 or more, got -1"),
        ({"threshold": math.inf}, "threshold: must be a finite number, got inf"),
        ({"momentum_beta": 1.5}, "momentum_beta: must be between 0 and 1, got 1.5"),
    ],
)
def test_what_safe_guidance_refuses(change: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}$"):
        replace(PRESETS["weak"], **change)


# ---- filters ----------------------------------------------------------------------------------------------------


def colours(*names: str) -> Pictures:
    return [Image.new("RGB", (8, 6), name) for name in names]


def test_what_is_above_its_threshold_does_not_pass_a_filter() -> None:
    pictures = colours("red", "green", "blue")
    keep = PostFilter(lambda _: torch.tensor([0.2, 0.5, 0.6]), threshold=0.5)
    assert keep.passes(pictures) == [True, True, False]
    assert replace(keep, threshold=1).passes(pictures) == [True] * 3
    assert replace(keep, threshold=0.1).passes(pictures) == [False] * 3
    with pytest.raises(RecipeError, match=r"^threshold: must be between 0 and 1, got 1.5$"):
        replace(keep, threshold=1.5)


def test_the_emoji_filter_asks_the_second_evaluator() -> None:
    noise = torch.randint(256, (6, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [Image.fromarray(p.numpy()) for p in noise] + colours("white")
    seen = load_evaluator("filter").judge(pictures)
    for concept, expected in {
        "dog": seen.object_probabilities[:, OBJECT_CLASSES.index("dog")],
        "neon": seen.style_probabilities[:, STYLE_CLASSES.index("neon")],
        "party hat": seen.hat_probabilities,
    }.items():
        assert torch.equal(emoji_filter(concept).classifier(pictures), expected)
    assert emoji_filter("cat").passes([]) == []
    with pytest.raises(
        RecipeError, match=r"^unicorn: not a concept that the filter knows: cat, .*, neon, .*party hat$"
    ):
        emoji_filter("unicorn")


def test_the_safety_checker_of_a_pipeline_is_a_filter(checked_folder: Path) -> None:
    noise = torch.randint(256, (7, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [Image.fromarray(p.numpy()) for p in noise] + colours("red", "black", "white", "blue", "yellow")
    one_by_one = checked_by(checked_folder, pictures)
    assert len(set(one_by_one)) == 2
    assert safety_checker_filter(str(checked_folder), batch_size=5).passes(pictures) == one_by_one


def test_a_safety_checker_that_is_not_whole_is_refused(checked_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Weights that are missing would be drawn at random, and the filter would black out anything."""
    (tmp_path / "model.safetensors").touch()
    for where in (tiny_folder, tmp_path / "model.safetensors"):
        with pytest.raises(BaseModelError, match=f"^{where}: has no safety checker$"):
            safety_checker_filter(str(where))
    broken = shutil.copytree(checked_folder, tmp_path / "broken")
    weights = broken / "safety_checker" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["concept_embeds"]
    save_file(tensors, weights, metadata={"format": "pt"})
    lacks = "its weights lack concept_embeds, which StableDiffusionSafetyChecker needs"
    with pytest.raises(BaseModelError, match=f"^{broken}: safety checker: {lacks}$"):
        safety_checker_filter(str(broken))
    weights.unlink()
    with pytest.raises(BaseModelError, match=f"^{broken}: safety checker: cannot be loaded: "):
        safety_checker_filter(str(broken))


# ---- other ways to train ----------------------------------------------------------------------------------------


class Calls(list[tuple[Tensor, Tensor, Tensor]]):
    """x, t and output of every call of a denoiser and of its copies; `student` tells those with a gradient."""

    @property
    def rows(self) -> int:
        return sum(len(x) for x, _, _ in self)

    @property
    def student(self) -> list[int]:
        return [i for i, (_, _, out) in enumerate(self) if out.requires_grad]


@contextmanager
def watched(base: Base) -> Iterator[Calls]:
    calls = Calls()

    def note(_: Any, args: Any, out: Any) -> None:
        calls.append((args[0].detach(), args[1], out[0]))

    handle = base.denoiser.register_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def iterations(calls: Calls) -> Iterator[Calls]:
    """The calls of each step: trajectory, teacher, student."""
    first = 0
    for last in calls.student:
        yield Calls(calls[first : last + 1])
        first = last + 1


SHORT: Mapping[str, Any] = {"lr": 1e-3, "trajectory_steps": 5}


@pytest.mark.parametrize(
    ("layers", "trained"),
    [
        ("esd-x", lambda n: ".attn2." in n),
        ("esd-x-strict", lambda n: ".attn2.to_k." in n or ".attn2.to_v." in n),
        ("esd-u", lambda n: ".attn2." not in n),
        ("full", lambda n: True),
    ],
)
def test_full_esd_trains_whole_layers_of_a_copy(base: Base, layers: Layers, trained: Callable[[str], bool]) -> None:
    before, picture = weights_of(base), draw(base)
    told: list[tuple[int, int, Base]] = []
    found = full_esd(base, "cat", layers=layers, steps=3, **SHORT, on_step=lambda *now: told.append(now))
    edited = found.base
    assert [done for done, *_ in told] == [1, 2, 3]
    assert told[-1][1:] == (found.passes, edited)
    assert same(weights_of(base), before)
    assert draw(base) == picture != draw(edited)
    changed = {n for n, w in edited.denoiser.named_parameters() if not torch.equal(w, before[n])}
    # a bias before a norm or a softmax may have no gradient
    expected = {n for n in before if trained(n)}
    assert changed <= expected
    assert {n for n in expected if n.endswith("weight")} <= changed
    assert edited.fingerprint != base.fingerprint
    assert edited.pipe.vae is base.pipe.vae
    assert not any(p.requires_grad for b in (base, edited) for p in b.denoiser.parameters())


def test_full_esd_asks_at_the_latents_own_timestep_on_the_frozen_models_trajectory(base: Base) -> None:
    with watched(base) as calls:
        tuned = full_esd(base, "cat", steps=8, **SHORT)
    lengths = []
    for step in iterations(calls):
        *trajectory, teacher, student = step
        assert len(student[0]) == 1
        seen: list[Tensor] = []

        def note(
            pipe: Any, i: int, t: Tensor, given: dict[str, Tensor], into: list[Tensor] = seen
        ) -> dict[str, Tensor]:
            into.append(given["latents"])
            return given

        start = step[0][0][:1]
        base.pipe(
            ["cat"],
            latents=start,
            num_inference_steps=5,
            guidance_scale=3,
            output_type="latent",
            callback_on_step_end=note,
        )
        k = len(trajectory)
        x_t, t = [start, *seen][k], base.pipe.scheduler.timesteps[k]
        # the pipeline has ∅ and the prompt in the other order in a batch, in float32
        assert apart(student[0], x_t) < 1e-5
        assert torch.equal(student[0], teacher[0][:1])
        assert student[1].tolist() == [t]
        assert teacher[1].tolist() == [t, t]
        lengths.append(k)
    assert len(set(lengths)) > 2
    assert max(lengths) <= 4
    assert tuned.passes == sum(2 * k + 2 + 3 for k in lengths)
    assert tuned.passes == calls.rows + 2 * len(lengths)  # a backward pass is two forward passes


def test_a_step_of_full_esd_is_one_of_adam_on_the_loss_of_the_paper(base: Base) -> None:
    with watched(base) as calls:
        edited = full_esd(base, "cat", steps=1, lr=1e-3, eta=2, trajectory_steps=5).base
    x, t, _ = calls[calls.student[0]]
    concept, null = base.encode(["cat"]), base.encode([""])
    with torch.no_grad():
        eps_c, eps_null = base.predict(x, t, concept), base.predict(x, t, null)
    student = copy.deepcopy(base.denoiser)
    key = student.get_parameter(base.matched("esd-x")[0] + ".weight").requires_grad_(True)
    out = student(x, t, concept.tensors["encoder_hidden_states"], return_dict=False)[0]
    torch.nn.functional.mse_loss(out, eps_null - 2 * (eps_c - eps_null)).backward()
    moved = edited.denoiser.get_parameter(base.matched("esd-x")[0] + ".weight") - key
    grad = key.grad
    assert grad is not None
    # Adam's first step is the gradient's sign, but where that is near its ε of 1e-8; float32's rounding on weights of 0.1
    assert torch.allclose(moved, -1e-3 * grad / (grad.abs() + 1e-8), atol=2e-5)


def test_full_esd_comes_nearer_to_its_target_and_follows_from_its_seed(base: Base) -> None:
    first, again, other = (
        full_esd(base, "cat", steps=10, trajectory_steps=2, lr=1e-3, seed=seed).base for seed in (0, 0, 1)
    )
    assert same(weights_of(first), weights_of(again))
    assert not same(weights_of(first), weights_of(other))
    x, t = base.noise(range(4)), torch.full((4,), 501)
    with torch.no_grad():
        null, cat = (base.predict(x, t, base.encode([p]).expand(4)) for p in ("", "cat"))
        now = first.predict(x, t, base.encode(["cat"]).expand(4))
    target = null - (cat - null)
    assert (now - target).norm() < 0.7 * (cat - target).norm()


@pytest.mark.parametrize("family", ["xl", "sd3"])
def test_other_families_are_trained_too(family: str) -> None:
    base = base_from(TINY[family](), torch.float32)
    tuned = full_esd(base, "cat", layers="esd-u", steps=1, trajectory_steps=2, lr=1e-3)
    assert tuned.base.fingerprint != base.fingerprint
    patch = leco(base, "cat", iterations=1, trajectory_steps=2)
    check_fits(patch, base)


def test_noise_on_the_way_of_a_training_latent_is_its_own(base: Base) -> None:
    base.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(base.pipe.scheduler.config)
    told = base.encode(["cat", "cat", "", ""])
    two, one = (
        _partial_trajectory(base, pair, random.Random(0), first=3, steps=4, guidance_scale=1.0)[0]
        for pair in (told, told[slice(None, None, 2)])
    )
    # float32 sums in batches of another size
    torch.testing.assert_close(two[:1], one, rtol=0, atol=1e-4)


def test_leco_makes_a_patch_and_leaves_the_base(base: Base, tmp_path: Any) -> None:
    before, picture, told = weights_of(base), draw(base), []
    made = leco(base, "cat", iterations=4, lr=0.05, trajectory_steps=4, on_step=lambda *now: told.append(now))
    assert [done for done, *_ in told] == [1, 2, 3, 4]
    assert told[-1][1:] == (made.info["cost"]["forward_passes"], base)
    assert same(weights_of(base), before)
    assert draw(base) == picture
    read = load_patch(made.save(tmp_path))
    assert same(read.tensors, made.tensors)
    assert (read.erases, read.info["base"]["fingerprint"], set(read.ranks.values())) == ("cat", base.fingerprint, {4})
    assert {f"unet.{n}" for n in base.matched("full")} == set(read.ranks)
    attach(base, [read])
    assert draw(base) != picture


def test_leco_samples_with_the_adapted_model_and_asks_the_frozen_one(base: Base) -> None:
    with watched(base) as calls:
        made = leco(base, "cat", iterations=5, lr=0.05, trajectory_steps=4)
    told = base.encode(["cat", "cat", "", ""])
    lengths, moved = [], []
    for step in iterations(calls):
        *trajectory, teacher, student = step
        x, t, _ = student
        sampler = base.sampler(4)
        x_t = sampler.start(trajectory[0][0][:2])
        for i, (seen_x, seen_t, out) in enumerate(trajectory):
            assert torch.equal(seen_x, torch.cat([x_t, x_t]))
            assert set(seen_t.tolist()) == {sampler.timesteps[i].item()}
            with torch.no_grad():
                moved.append(apart(base.predict(seen_x, seen_t, told), out))
            cat, null = out.chunk(2)
            x_t = sampler.step(null + 3 * (cat - null), sampler.timesteps[i], x_t)
        assert torch.equal(x, x_t)
        assert set(t.tolist()) == set(teacher[1].tolist()) == {sampler.timesteps[len(trajectory)].item()}
        assert torch.equal(teacher[0], x_t.repeat(6, 1, 1, 1))
        with torch.no_grad():
            frozen = base.predict(torch.cat([x_t, x_t]), t.repeat(2), told)
        assert apart(teacher[2][:4], frozen) < 1e-5  # in a batch of another size, in float32
        lengths.append(len(trajectory))
    assert moved[0] == 0  # the adapters begin with nothing
    assert min(moved[lengths[0] :]) > 1e-3
    assert set(lengths) <= {1, 2, 3}
    assert len(set(lengths)) > 1
    assert made.info["cost"]["forward_passes"] == sum(2 * (2 * k + 6 + 3) for k in lengths)
    assert made.info["cost"]["forward_passes"] == calls.rows + 2 * 2 * len(lengths)


def test_leco_scales_its_adapters_by_one_over_the_rank(base: Base) -> None:
    made = leco(base, "cat", iterations=1, lr=1e-3, trajectory_steps=4)
    ups = [v.abs().max().item() for k, v in made.tensors.items() if ".lora_B." in k]
    # from zero by Adam's first step, which is lr times the gradient's sign, or less where that is near Adam's ε
    assert max(ups) == pytest.approx(1e-3 / 4, rel=1e-3)
    assert min(ups) > 0
    for name, tensor in made.tensors.items():
        if ".lora_A." in name:  # nn.Linear's own bound, and the same step
            assert tensor.abs().max() <= 1 / math.sqrt(tensor.shape[1]) + 1.1e-3
    assert same(made.tensors, leco(base, "cat", iterations=1, lr=1e-3, trajectory_steps=4).tensors)
    other = leco(base, "cat", iterations=1, lr=1e-3, trajectory_steps=4, seed=1)
    assert not same(made.tensors, other.tensors)


def test_leco_comes_nearer_to_its_target(base: Base) -> None:
    x, t = base.noise(range(4)), torch.full((4,), 501)
    with torch.no_grad():
        null, cat = (base.predict(x, t, base.encode([p]).expand(4)) for p in ("", "cat"))
    target = null - (cat - null)
    attach(base, [leco(base, "cat", iterations=10, lr=0.02, trajectory_steps=2)])
    with torch.no_grad():
        now = base.predict(x, t, base.encode(["cat"]).expand(4))
    assert (now - target).norm() < 0.7 * (cat - target).norm()


def test_both_take_adapters_off_and_leave_none(base: Base, patch: Patch) -> None:
    before = weights_of(base)
    attach(base, [patch])
    full_esd(base, "cat", steps=1, trajectory_steps=2)
    assert same(weights_of(base), before)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    attach(base, [patch])
    with pytest.raises(KeyboardInterrupt):
        leco(base, "cat", iterations=2, trajectory_steps=2, on_step=stop)
    assert same(weights_of(base), before)


def test_uce_is_the_least_squares_edit_of_whole_weights(base: Base, recipe_of: RecipeOf) -> None:
    told = recipe_of(objective="closed-form", eta=0.0, concepts=["cat", "dog"], preserve=[])
    before = weights_of(base)
    made = uce(base, [Concept.model_validate({"erase": "cat", "from": "a cat in neon style"}), Concept(erase="dog")])
    assert same(weights_of(base), before)
    hit, move = edit_moments(base, told)
    kept = told.preserve_weight * kept_moment(base, told.concepts, default_preserve(told.concepts))
    total = ridged(hit + kept, RIDGE)
    for name in base.text_layers:
        weight = base.denoiser.get_submodule(name).weight.double()
        change = weight @ move @ torch.linalg.inv(total)
        up, down = (made.tensors[f"unet.{name}.lora_{x}.weight"].double() for x in "BA")
        assert torch.linalg.matrix_rank(change) > Recipe.model_fields["rank"].default  # so that a cut would show
        near = 1e-6 * change.abs().max().item()  # of float32, in which it is stored
        torch.testing.assert_close(up @ down, change, rtol=0, atol=near)


@pytest.mark.parametrize("train", [full_esd, leco])
def test_what_training_refuses(base: Base, train: Any) -> None:
    for values, message in [
        ({"concept": " "}, "concept: must not be empty"),
        ({"layers": "attn"}, "layers: no attn; there are esd-x, esd-x-strict, esd-u, full"),
        ({"lr": 0.0}, "lr: must be above 0 and below 1e38, got 0.0"),
        ({"eta": -1}, "eta: must be a finite number of 0 or more, got -1"),
        ({"guidance_scale": 0.5}, "guidance_scale: must be a finite number of 1 or more, got 0.5"),
        ({"trajectory_steps": 0}, "trajectory_steps: must be [12] or more.* got 0"),
    ]:
        with pytest.raises(RecipeError, match=f"^{message}$"):
            train(base, **{"concept": "cat", **values})


def test_what_else_training_refuses(base: Base) -> None:
    with pytest.raises(RecipeError, match=r"^steps: must be 1 or more, got 0$"):
        full_esd(base, "cat", steps=0)
    with pytest.raises(RecipeError, match=r"^batch: must be 1 or more, got 0$"):
        leco(base, "cat", batch=0)
    with pytest.raises(RecipeError, match=r"^rank: must be at most"):
        leco(base, "cat", rank=99)
    with pytest.raises(TrainingError, match=r"^the loss was nan at the end: try a lower lr \(now 1e\+30\)$"):
        full_esd(base, "cat", steps=3, lr=1e30, trajectory_steps=2)
    base.denoiser.to(torch.float16)
    with pytest.raises(RecipeError, match=r"^dtype: fp16 cannot be trained"):
        full_esd(base, "cat")
