"""Drift, kernel distance, denoising gap and their controls, against algebra spelled out and diffusers' own schedulers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same, weights_of
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import NOISE, TINY, tiny_pipeline
from torch import Tensor

from esd_lora.bases import Base, base_of
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.compose import attach, stack
from esd_lora.emoji.evaluators import EvaluatorName, load_evaluator
from esd_lora.errors import BaseModelError, PatchError, RecipeError
from esd_lora.evaluate import drift as module
from esd_lora.evaluate.controls import SCRAMBLING, null_patch, random_like, scrambling_patch
from esd_lora.evaluate.drift import (
    DENOISED,
    FIRST_NOISE,
    denoise_gap,
    drift,
    feature_maps,
    kid,
    latents_of,
    noised,
    pixel_drift,
    pooled,
)
from esd_lora.merging import merged_denoiser
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate

BLACK, WHITE, RED = (Image.new("RGB", (4, 4), c) for c in ("black", "white", "red"))
PROMPTS = ["a cat", "a dog", "a cat", ""]
SIDE = 32
"""Pixels along a side: a multiple of what every family needs."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_pictures(n: int, side: int, *, seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(n)]


def drawn(base: Base, patch: Patch | None = None) -> Pictures:
    """Pictures of the tiny base, which is bare afterwards."""
    attach(base, [patch] if patch else [])
    pictures = generate(base, ["cat", "dog", ""], [0, 1, 2], steps=4)
    base.remove_adapters()
    return pictures


def change(patch: Patch, name: str) -> Tensor:
    return patch.tensors[f"{name}.lora_B.weight"].double() @ patch.tensors[f"{name}.lora_A.weight"].double()


# ---- pictures, two by two ---------------------------------------------------------------------------------------


def fake_maps(pictures: Pictures) -> list[Tensor]:
    """Two maps of different sizes that a picture's own pixels decide."""
    seeds = [int(np.asarray(p, np.int64).sum()) for p in pictures]
    return [torch.stack([normal(*shape, seed=s) for s in seeds]) for shape in ((3, 2, 4), (5, 1, 1))]


def test_drift_is_the_distance_of_directions_at_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = noise_pictures(5, 8), noise_pictures(5, 8, seed=1)
    monkeypatch.setattr(module, "BATCH", 2)
    found = drift(before, after, fake_maps)
    for k in range(5):
        means = []
        for f, g in zip(fake_maps(before[k : k + 1]), fake_maps(after[k : k + 1]), strict=True):
            squares = []
            for y, x in itertools.product(range(f.shape[2]), range(f.shape[3])):
                a, b = f[0, :, y, x].double(), g[0, :, y, x].double()
                squares.append(2 - 2 * (a @ b / (a.norm() * b.norm())).item())
            means.append(sum(squares) / len(squares))
        assert found[k].item() == pytest.approx(sum(means) / 2, rel=1e-5)  # float32
    assert torch.equal(drift(before, before, fake_maps), torch.zeros(5))


def test_drift_does_not_see_how_strong_a_feature_is() -> None:
    before, after = noise_pictures(2, 8), noise_pictures(2, 8, seed=1)
    louder = drift(before, after, lambda pictures: [7 * m for m in fake_maps(pictures)])
    assert torch.allclose(louder, drift(before, after, fake_maps), rtol=1e-5)  # float32
    turned = iter([1, -1])
    opposite = drift(before, before, lambda pictures: [m * s for s in [next(turned)] for m in fake_maps(pictures)])
    assert opposite.tolist() == pytest.approx([4, 4])


@pytest.mark.parametrize("name", ["measure", "filter"])
def test_the_features_are_what_an_evaluator_answers_from(name: EvaluatorName) -> None:
    evaluator = load_evaluator(name)
    pictures = noise_pictures(3, 64)
    maps = feature_maps(evaluator)(pictures)
    assert [m.shape[2] for m in maps] == [32, 16, 8]
    *_, heads = evaluator.network.children()
    answers = heads(maps[-1]).objects.softmax(1)
    assert torch.allclose(answers, evaluator.judge(pictures).object_probabilities, atol=1e-6)  # float32
    moved = drift(pictures, noise_pictures(3, 64, seed=1), feature_maps(evaluator))
    assert (moved > 0.01).all()
    assert torch.equal(drift(pictures, pictures, feature_maps(evaluator)), torch.zeros(3))


def test_pixel_drift_worked_by_hand() -> None:
    dot = BLACK.copy()
    dot.putpixel((1, 2), (0, 51, 0))  # a fifth of one of 48 values
    found = pixel_drift([BLACK, BLACK, BLACK, RED], [WHITE, RED, dot, RED])
    assert found.tolist() == pytest.approx([1, 1 / 3, 0.04 / 48, 0])


def test_pictures_that_are_no_pairs_are_refused() -> None:
    for before, after in (([BLACK], [BLACK, RED]), ([], []), ([BLACK], noise_pictures(1, 8))):
        for measure in (pixel_drift, lambda *pair: drift(*pair, fake_maps)):
            with pytest.raises(
                ValueError, match=r"^drift is between pairs of pictures of one size; got \d and \d pict"
            ):
                measure(before, after)


# ---- sets of pictures -------------------------------------------------------------------------------------------


def kid_by_loops(a: Tensor, b: Tensor, *, pairs: bool = False) -> float:
    def k(x: Tensor, y: Tensor) -> float:
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / len(x) + 1) ** 3

    m, n = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_b = sum(k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    between = [k(a[i], b[j]) for i in range(m) for j in range(n) if not (pairs and i == j)]
    return within_a + within_b - 2 * sum(between) / len(between)


def test_kid_is_the_double_loop_and_its_error_the_jackknife() -> None:
    a, b = normal(6, 4), normal(9, 4, seed=1) + 0.3
    value, error = kid(a, b)
    assert value == pytest.approx(kid_by_loops(a, b), rel=1e-9)  # float64
    variance = 0.0
    for m, without in (
        (6, [kid_by_loops(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(6)]),
        (9, [kid_by_loops(a, torch.cat([b[:i], b[i + 1 :]])) for i in range(9)]),
    ):
        variance += (m - 1) / m * sum((w - sum(without) / m) ** 2 for w in without)
    assert error == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert kid(b, a) == pytest.approx((value, error), rel=1e-9)


def test_kid_tells_sets_apart_and_like_sets_not() -> None:
    """Independent sets; one against itself is far below 0, for its own pictures meet in the cross term alone."""
    value, error = kid(normal(300, 8), normal(200, 8, seed=1))
    assert abs(value) < 3 * error
    value, error = kid(normal(300, 8), normal(200, 8, seed=1) + 0.5)
    assert value > 5 * error
    value, error = kid(normal(300, 8), normal(300, 8))
    assert value < -5 * error


def test_kid_of_pairs_leaves_out_what_is_of_one_pair() -> None:
    a, b = normal(6, 4), normal(6, 4, seed=1) + 0.3
    value, error = kid(a, b, pairs=True)
    assert value == pytest.approx(kid_by_loops(a, b, pairs=True), rel=1e-9)  # float64
    rest = [torch.arange(6) != i for i in range(6)]
    without = [kid_by_loops(a[some], b[some], pairs=True) for some in rest]
    assert error == pytest.approx(math.sqrt(5 / 6 * sum((w - sum(without) / 6) ** 2 for w in without)), rel=1e-9)
    assert kid(a, a, pairs=True) == pytest.approx((0, 0), abs=1e-12)  # float64


def test_kid_of_pairs_is_unbiased_where_prompts_are_shared() -> None:
    """A few values of pictures that have nothing but the prompt in common: as often below 0 as above, unlike those of sets."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(0, 120, 3):
        prompts = 2 * normal(20, 8, seed=seed)
        a, b = (prompts + 0.5 * normal(20, 8, seed=seed + k) for k in (1, 2))
        for pairs, values in found.items():
            values.append(kid(a, b, pairs=pairs)[0])
    assert 10 <= sum(v > 0 for v in found[True]) <= 30  # of 40; chance alone is outside once in 1,000 times
    assert sum(v > 0 for v in found[False]) == 0
    mean, spread = np.mean(found[True]), np.std(found[True]) / math.sqrt(40)
    assert abs(mean) < 3 * spread
    value, error = kid(prompts, prompts + 1, pairs=True)
    assert value > 3 * error


def test_what_kid_is_given_is_the_last_map_without_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = noise_pictures(5, 8)
    monkeypatch.setattr(module, "BATCH", 2)
    found = pooled(pictures, lambda some: fake_maps(some)[::-1])
    assert torch.allclose(found, fake_maps(pictures)[0].mean((2, 3)))
    assert found.shape == (5, 3)


def test_kid_of_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of 3 pictures or more, of the same features; got \(2, 4\) and \(9, 4\)$"):
        kid(normal(2, 4), normal(9, 4))
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(5, 3\)$"):
        kid(normal(5, 4), normal(5, 3))
    with pytest.raises(ValueError, match=r"^pairs of 5 and 6 pictures$"):
        kid(normal(5, 4), normal(6, 4), pairs=True)


# ---- the denoiser -----------------------------------------------------------------------------------------------


def test_noise_of_another_kind_is_refused() -> None:
    with pytest.raises(BaseModelError, match=r"^EDMEulerScheduler: has other noise"):
        noised(EDMEulerScheduler(), normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1), level=torch.tensor(0.5))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
def test_noise_and_truth_of_a_diffusion_are_the_schedulers(prediction_type: str, level: float) -> None:
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, prediction_type=prediction_type)
    x_0, noise = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    x_t, t, truth = noised(scheduler, x_0, noise, level=torch.tensor(level))
    assert t.item() == 1000 * level
    close = {"atol": 1e-5, "rtol": 1e-5}  # float32, in which they take their roots
    assert torch.allclose(x_t, scheduler.add_noise(x_0, noise, t.expand(2)), **close)
    if prediction_type == "v_prediction":
        assert torch.allclose(truth, scheduler.get_velocity(x_0, noise, t.expand(2)), **close)
    scheduler.set_timesteps(20)
    there = scheduler.step(truth, t.item(), x_t).pred_original_sample
    # from ε near pure noise, x_0 is a difference of like numbers over α = 0.1
    assert torch.allclose(there, x_0, atol=1e-4)


def test_the_input_is_eulers_once_scaled() -> None:
    scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing")
    scheduler.set_timesteps(4)  # 1000, 750, 500 and 250 steps of noise, counted from 0
    x_0, noise = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    own = scheduler.scale_model_input(scheduler.add_noise(x_0, noise, scheduler.timesteps[2:3]), scheduler.timesteps[2])
    x_t, t, truth = noised(scheduler, x_0, noise, level=torch.tensor(0.499))
    assert t == scheduler.timesteps[2]
    assert torch.allclose(x_t, own, atol=1e-5)  # float32
    assert torch.equal(truth, noise)


def test_noise_and_truth_of_a_flow_are_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    x_0, noise = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    x_t, t, truth = noised(scheduler, x_0, noise, level=torch.tensor(0.25))
    assert t == 250
    assert torch.allclose(x_t, scheduler.scale_noise(x_0, t.expand(2), noise), atol=1e-6)  # float32
    assert torch.allclose(x_t - 0.25 * truth, x_0, atol=1e-6)  # one step along the flow, to its end


def test_a_flow_may_be_sampled_by_a_solver_of_diffusions() -> None:
    scheduler = UniPCMultistepScheduler(
        **NOISE, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(20)
    x_0, noise = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    for k, own in enumerate(scheduler.timesteps):
        x_t, t, truth = noised(scheduler, x_0, noise, level=scheduler.sigmas[k])
        assert own <= t < own + 1  # which it cuts off
        scheduler._step_index = k
        assert torch.allclose(scheduler.convert_model_output(truth, sample=x_t), x_0, atol=1e-6)  # float32


KINDS = {
    **{kind: DDIMScheduler(**NOISE, prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, UniPC": UniPCMultistepScheduler(**NOISE, prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_latent_may_have_a_level_of_its_own(kind: str) -> None:
    x_0, noise, levels = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0.0, 0.5, 0.9995])
    together = noised(KINDS[kind], x_0, noise, level=levels)
    assert together[1].tolist() == pytest.approx([0, 500, 999.5 if "flow" in kind else 999])
    for i, level in enumerate(levels):
        for whole, own in zip(
            together, noised(KINDS[kind], x_0[i : i + 1], noise[i : i + 1], level=level), strict=True
        ):
            assert torch.equal(whole[i], own.reshape(whole[i].shape))


@pytest.mark.parametrize("count", [50, 1000, 4000])
def test_the_middle_of_a_timestep_is_that_timestep(count: int) -> None:
    scheduler, i = DDIMScheduler(num_train_timesteps=count), torch.arange(count)
    x = torch.zeros(count, 1, 1, 1)
    assert torch.equal(noised(scheduler, x, x, level=(i + 0.5) / count)[1], i)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_last_timestep_of_zero_terminal_snr_is_noise(scheduler: Any) -> None:
    """Schedulers that need a finite σ leave α = 2⁻¹² of the picture there; at all others they have DDPM's α."""
    own = scheduler(**NOISE, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ddpm = DDPMScheduler.from_config(own.config)
    x_0, noise, i = normal(1000, 1, 2, 2), normal(1000, 1, 2, 2, seed=1), torch.arange(1000)
    x_t, _, truth = noised(own, x_0, noise, level=(i + 0.5) / 1000)
    for found, wanted in ((x_t, ddpm.add_noise(x_0, noise, i)), (truth, ddpm.get_velocity(x_0, noise, i))):
        assert torch.allclose(found[:-1], wanted[:-1], atol=1e-6)  # float32
        assert torch.allclose(found[-1], wanted[-1], atol=2**-12 * 5)  # of numbers below 5
    assert torch.allclose(x_t[-1], noise[-1], atol=2**-12 * 5)


@pytest.mark.parametrize("family", TINY)
def test_latents_are_those_that_the_pipeline_decodes(family: str) -> None:
    base = base_of(TINY[family]())
    before = weights_of(base)
    vae = base.pipe.vae.to(torch.bfloat16)
    found = latents_of(base, noise_pictures(DENOISED + 1, SIDE))
    assert vae.dtype == torch.bfloat16  # it encodes in float32 and is left as it was
    assert found.dtype == torch.float32
    assert found.shape == (DENOISED + 1, *base.latent_shape(SIDE))
    x = torch.from_numpy(np.asarray(noise_pictures(DENOISED + 1, SIDE)[-1]).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    mean = vae.float().encode(x).latent_dist.mean
    z = found[-1:] / vae.config.scaling_factor + (vae.config.shift_factor or 0)  # the line before the pipeline's decode
    assert torch.allclose(z, mean, atol=1e-5)  # float32
    assert same(weights_of(base), before)


def bases() -> dict[str, Any]:
    return {**TINY, "v": lambda: tiny_pipeline(prediction_type="v_prediction")}


@pytest.mark.parametrize("kind", [*TINY, "v"])
def test_the_gap_is_that_of_merged_weights(kind: str) -> None:
    """The patch in a second network instead of on the first, and every term of the mean asked for by itself."""
    base = base_of(bases()[kind]())
    patch = stack(
        [scrambling_patch(base, "full", 2)], [0.5 / SCRAMBLING]
    )  # at full size attention saturates on rounding
    x_0 = normal(len(PROMPTS), *base.latent_shape(SIDE))
    before = weights_of(base)
    found = denoise_gap(base, [patch], PROMPTS, x_0, levels=2)
    assert same(weights_of(base), before)  # bare again
    merged = base_of(type(base.pipe).from_pipe(base.pipe, **{base.prefix: merged_denoiser(base, patch)}))
    for i, prompt in enumerate(PROMPTS):
        for words, gap in ((prompt, found.asked[i]), ("", found.empty[i])):
            total = 0.0
            for k, level in enumerate((0.25, 0.75)):
                noise = base.noise([FIRST_NOISE + 2 * i + k], resolution=SIDE)
                x_t, t, truth = noised(base.scheduler, x_0[i : i + 1], noise, level=torch.tensor(level))
                for sign, network in ((1, merged), (-1, base)):
                    with torch.no_grad():
                        out = network.predict(x_t, t[None], base.encode([words], resolution=SIDE))
                    total += sign * (out.double() - truth).square().mean().item() / 2
            # float32 in batches of other sizes, of errors of about one: they differ by some 5e-8
            assert gap.item() == pytest.approx(total, abs=1e-6)
    assert found.asked.abs().min() > 1e-4
    assert (found.asked - found.empty)[:3].abs().min() > 1e-4  # prompts are listened to


def test_the_gap_of_a_picture_is_its_own(base: Base, patch: Patch) -> None:
    """More pictures than go through at once; of equal ones with other noise and of one prompt with another the gap differs."""
    n = DENOISED + 2
    x_0 = normal(1, *base.latent_shape()).expand(n, -1, -1, -1)
    prompts = ["a cat"] * (n - 1) + ["something else entirely"]
    found = denoise_gap(base, [patch], prompts, x_0, levels=3)
    assert (found.asked.shape, found.asked.dtype) == ((n,), torch.float32)
    assert len(set(found.asked.tolist())) == n
    first = denoise_gap(base, [patch], prompts[:2], x_0[:2], levels=3)
    assert torch.allclose(first.asked, found.asked[:2], atol=1e-6)  # float32 in batches of other sizes
    assert torch.equal(denoise_gap(base, [patch], prompts, x_0, levels=3).asked, found.asked)


def test_a_patch_that_does_nothing_has_no_gap(base: Base) -> None:
    found = denoise_gap(base, [null_patch(base, "full", 2)], PROMPTS, normal(4, *base.latent_shape()))
    assert torch.equal(found.asked, torch.zeros(4))
    assert torch.equal(found.empty, torch.zeros(4))


def test_what_has_no_gap_is_refused_and_leaves_the_base_bare(base: Base, patch: Patch) -> None:
    before = weights_of(base)
    with pytest.raises(RecipeError, match=r"^2 prompts need as many pictures, got 1$"):
        denoise_gap(base, [patch], ["a cat", "a dog"], normal(1, *base.latent_shape()))
    odd = Patch({k.replace("attn2", "attn9"): v for k, v in patch.tensors.items()})
    with pytest.raises(PatchError, match="does not have"):
        denoise_gap(base, [odd], ["a cat"], normal(1, *base.latent_shape()))
    with pytest.raises(RecipeError, match=r"has latents \(4, 8, 8\), got \(3, 8, 8\)$"):
        denoise_gap(base, [patch], ["a cat"], normal(1, 3, 8, 8))
    assert same(weights_of(base), before)

    def fail(*_: object) -> None:
        raise RuntimeError("broke off")

    handle = base.denoiser.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broke off"):
        denoise_gap(base, [patch], ["a cat"], normal(1, *base.latent_shape()))
    handle.remove()
    assert same(weights_of(base), before)


# ---- controls ---------------------------------------------------------------------------------------------------


def test_a_null_patch_changes_no_bit(base: Base) -> None:
    weights, state = weights_of(base), torch.get_rng_state()
    null = null_patch(base, "full", 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights_of(base), weights)
    assert {n.split(".", 1)[1]: r for n, r in null.ranks.items()} == dict.fromkeys(base.matched("full"), 3)
    assert [p.tobytes() for p in drawn(base, null)] == [p.tobytes() for p in drawn(base)]
    assert null.digest == null_patch(base, "full", 3).digest
    assert null.info["base"]["fingerprint"] == base.fingerprint


def test_a_random_patch_is_as_large_in_every_layer(patch: Patch) -> None:
    first = next(iter(patch.ranks))
    tensors = {k: 0 * v if k == f"{first}.lora_B.weight" else v.half() for k, v in patch.tensors.items()}
    mixed = Patch(tensors, patch.info)
    control, other = random_like(mixed, 0), random_like(mixed, 1)
    assert control.ranks == mixed.ranks
    assert control.shapes == mixed.shapes
    for name in mixed.ranks:
        assert change(control, name).norm().item() == pytest.approx(change(mixed, name).norm().item(), rel=1e-5)
        if name != first:
            left, right = change(control, name).flatten(), change(mixed, name).flatten()
            # 1,024 numbers or more: directions drawn at random are nearly at right angles
            assert abs(left @ right / (left.norm() * right.norm())) < 0.3
            assert not torch.allclose(change(control, name), change(other, name))
    assert same(random_like(mixed, 0).tensors, control.tensors)
    assert control.info == {"base": patch.info["base"]}
    assert random_like(Patch(tensors), 0).info == {}


def test_a_scrambling_patch_ruins_more_than_one_of_a_patchs_size(base: Base, patch: Patch) -> None:
    weights, layers, rank = weights_of(base), "esd-x", max(patch.ranks.values())
    scrambling, control = scrambling_patch(base, layers, rank), random_like(patch, 0)
    assert same(weights_of(base), weights)
    assert scrambling.ranks == control.ranks
    for name in scrambling.ranks:
        size = base.denoiser.get_submodule(name.removeprefix("unet.")).weight.double().norm().item()
        assert change(scrambling, name).norm().item() == pytest.approx(SCRAMBLING * size, rel=1e-5)
    before = drawn(base)
    ruined, moved = (pixel_drift(before, drawn(base, p)) for p in (scrambling, control))
    assert (ruined > moved).all()
    assert (moved > 0).all()
    assert scrambling.digest != scrambling_patch(base, layers, rank, seed=1).digest


def test_controls_of_layers_that_are_not_there_are_refused(base: Base) -> None:
    blind = StableDiffusionBase(tiny_pipeline(cross_attention=False), name="blind")
    for control in (null_patch, scrambling_patch):
        with pytest.raises(BaseModelError, match=r"^blind: layers esd-x match nothing"):
            control(blind, "esd-x", 2)
        with pytest.raises(RecipeError, match=r"^rank: must be at most 32"):
            control(base, "esd-x", 64)
