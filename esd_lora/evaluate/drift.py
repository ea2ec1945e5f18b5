"""What a patch changes, measured without asking an evaluator what is in the pictures.

    drift, pixel_drift    how far each picture moved, from the base's of the same prompt and noise to the patched one
    kid                   how far a set of pictures moved, as a distribution
    denoise_gap           how much worse pictures are denoised: no sampling and no guidance, only the denoiser's own error

Of a patch that does nothing every drift and gap is exactly 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esd_lora.bases.base import Base, Condition
from esd_lora.compose import attached
from esd_lora.emoji.evaluators import Evaluator, to_array, to_tensor
from esd_lora.errors import BaseModelError, RecipeError
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures

Features = Callable[[Pictures], list[Tensor]]
"""N pictures → feature maps of a network, each (N, channels, h, w)."""

BATCH = 32
"""Pictures that go through a network of features together: maps of ResNet-50 are 6 MB a picture."""
DENOISED = 8
"""Latents that go through an autoencoder or a denoiser together."""
FIRST_NOISE = 1_000_000_000
"""Seeds of the noise of `denoise_gap` start here, away from those that pictures are drawn from."""


# ---- pictures, two by two ---------------------------------------------------------------------------------------


@torch.no_grad()
def drift(before: Pictures, after: Pictures, features: Features) -> Tensor:
    """How far the features of each picture moved, (N,) float32 on the CPU, from 0 for equal pictures up to 4.

        mean over maps l and positions p of  ‖ f_l,p / ‖f_l,p‖ − g_l,p / ‖g_l,p‖ ‖²

    LPIPS (Zhang et al. 2018, arXiv:1801.03924) without its learned weights of channels, and averaged over the maps where
    LPIPS sums: comparable between patches, not with published LPIPS.

    Args:
        before, after: N pictures of the base and of the patched base, of the same prompts and noise, in the same order.
        features: For the embedded base `feature_maps(load_evaluator("filter"))`, for another the `maps` of an evaluator.

    Raises:
        ValueError: The pictures are not pairs of one size, or there are none.
    """
    _check_pairs(before, after)
    parts = []
    for start in range(0, len(before), BATCH):
        some = slice(start, start + BATCH)
        maps = zip(features(before[some]), features(after[some]), strict=True)
        moved = [(F.normalize(f.float()) - F.normalize(g.float())).square().sum(1).mean((1, 2)) for f, g in maps]
        parts.append(torch.stack(moved).mean(0).cpu())
    return torch.cat(parts)


def pixel_drift(before: Pictures, after: Pictures) -> Tensor:
    """The mean squared difference of each picture's pixels, (N,) float32: 0 for equal pictures, 1 from black to white.

    It needs no network and so does for any base; a picture that is the same but shifted counts as another one.

    Args:
        before, after: As for `drift`.

    Raises:
        ValueError: The pictures are not pairs of one size, or there are none.
    """
    _check_pairs(before, after)
    pairs = ([np.asarray(p.convert("RGB"), np.float64) / 255 for p in pair] for pair in zip(before, after, strict=True))
    return torch.tensor([np.square(a - b).mean() for a, b in pairs], dtype=torch.float32)


def _check_pairs(before: Pictures, after: Pictures) -> None:
    """Nothing, if there are pictures, and each has another of its size.

    Raises:
        ValueError: They are not.
    """
    if not before or [p.size for p in before] != [p.size for p in after]:
        raise ValueError(f"drift is between pairs of pictures of one size; got {len(before)} and {len(after)} pictures")


def feature_maps(evaluator: Evaluator) -> Features:
    """The features of an evaluator of the embedded base: of each size of its maps, from 32 down to 8, the last one.

    The last one is what its answers are read from, once positions are averaged; see `pooled`.
    """
    *stages, _ = evaluator.network.children()

    def maps(pictures: Pictures) -> list[Tensor]:
        x = to_tensor(to_array(pictures))
        last: dict[int, Tensor] = {}
        for stage in stages:
            x = stage(x)
            last[x.shape[-1]] = x
        return list(last.values())

    return maps


# ---- sets of pictures -------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled(pictures: Pictures, features: Features) -> Tensor:
    """The last map of features averaged over its positions, (N, D) float32 on the CPU: what to give to `kid`.

    Args:
        pictures: N pictures, at least one.
        features: As for `drift`.
    """
    parts = (features(pictures[start : start + BATCH])[-1] for start in range(0, len(pictures), BATCH))
    return torch.cat([part.float().mean((2, 3)).cpu() for part in parts])


def kid(features_a: Tensor, features_b: Tensor, *, pairs: bool = False) -> tuple[float, float]:
    """The kernel distance of two sets of pictures, and its standard error.

        MMD² = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) − 2 mean_{i,j} k(a_i, b_j),        k(x, y) = (xᵀy / D + 1)³

    Bińkowski et al. 2018, arXiv:1801.01401: unbiased at any number of pictures, unlike FID, so that of two sets from one
    distribution it is 0 in the mean, and as often below as above. The sets must be independent: draw them from different
    seeds, for a set against itself comes out far below 0. Values of different features are not comparable.

    Of pairs, pictures of the same prompts and noise, the last mean is over i ≠ j, too (the statistic of pairs of Gretton et
    al. 2012, JMLR 13, 723). As the two of a pair never meet, they need not be independent of each other: it is unbiased
    again, 0 of a set against itself, and the less noisy the more alike the two are.

    They average over random subsets of 1,000 and give the spread of these; here all pictures are used at once, in float64,
    and the error is the jackknife's, which in the mean is never too small (Efron and Stein 1981), and about half too large
    where the sets are alike.

    Args:
        features_a, features_b: (m, D) and (n, D), one row a picture, m and n at least 3.
        pairs: Whether row i of both is of one prompt and noise.

    Raises:
        ValueError: Too few rows, features of different sizes, or a row without its pair.
    """
    if features_a.shape[1:] != features_b.shape[1:] or min(len(features_a), len(features_b)) < 3:
        shapes = f"{tuple(features_a.shape)} and {tuple(features_b.shape)}"
        raise ValueError(f"kid is of two sets of 3 pictures or more, of the same features; got {shapes}")
    if pairs and len(features_a) != len(features_b):
        raise ValueError(f"pairs of {len(features_a)} and {len(features_b)} pictures")
    a, b = features_a.cpu().double(), features_b.cpu().double()  # not every device has float64
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    if pairs:
        h = aa + bb - ab - ab.T
        value, variance = _mean_apart(h), _jackknife(h, torch.zeros_like(h))
    else:
        value = _mean_apart(aa) + _mean_apart(bb) - 2 * ab.mean()
        variance = _jackknife(aa, ab) + _jackknife(bb, ab.T)
    return value.item(), variance.sqrt().item()


def _mean_apart(kernel: Tensor) -> Tensor:
    """The mean over i ≠ j of (m, m)."""
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


def _jackknife(own: Tensor, cross: Tensor) -> Tensor:
    """The variance that a set's m pictures give to MMD², by leaving out each in turn; (m, m) and (m, n) kernels.

    Without picture i it is, up to a constant, less by 2 / (m − 1) · [Σ_{j≠i} k(a_i, a_j) / (m − 2) − mean_j k(a_i, b_j)], and
    the jackknife's variance is m − 1 times the variance of that over i. Of pairs `own` is the sum of all kernels, `cross` 0.
    """
    m = len(own)
    pulls = (own.sum(1) - own.diagonal()) / (m - 2) - cross.mean(1)
    return 4 / (m - 1) * pulls.var(correction=0)


# ---- the denoiser -----------------------------------------------------------------------------------------------


@torch.no_grad()
def latents_of(base: Base, pictures: Pictures) -> Tensor:
    """The pictures' latents x_0 as the denoiser knows them, (N, C, H, W) float32 on the base's device: no noise in them."""
    # a copy in float32, for SDXL's autoencoder overflows in float16
    vae = copy.deepcopy(base.pipe.vae).to(base.device, torch.float32)
    x = base.pipe.image_processor.preprocess(pictures).to(base.device)
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(x, DENOISED)])
    latents: Tensor = (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return latents


def noised(scheduler: Any, x_0: Tensor, noise: Tensor, *, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t as the network is given it, t as the level has it, () or (B,), and what the network should predict there.

        diffusion    x_t = α x_0 + σ ε,  α² = ᾱ_t,  σ² = 1 − ᾱ_t        ε, or v = α ε − σ x_0, or x_0
        flow         x_t = (1 − t) x_0 + t ε                            ε − x_0

    As models are trained, whatever steps the scheduler would sample by: Euler's x_t is this one once it is scaled.

    Args:
        scheduler: Of a base; its config tells which prediction it is.
        x_0, noise: Latents and unit noise, each (B, C, H, W).
        level: t in parts of the training timesteps, () or (B,), from 0 for the picture to below 1 for noise. A diffusion's t
            are whole and rounded down, so that (i + 0.5) / count is the timestep i in float32 as well.

    Raises:
        BaseModelError: The scheduler is of another kind, such as EDM's.
    """
    count, kind = scheduler.config.num_train_timesteps, scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        sigma = level.to(x_0).view(-1, 1, 1, 1)
        return (1 - sigma) * x_0 + sigma * noise, (level * count).to(x_0), noise - x_0
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BaseModelError(f"{type(scheduler).__name__}: has other noise than models of ε, v or flows are trained on")
    t = (level * count).long().to(x_0.device)
    alpha_bar = scheduler.alphas_cumprod.to(x_0)[t].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    truth = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "sample": x_0}[kind]
    return alpha * x_0 + sigma * noise, t, truth


@dataclass(frozen=True)
class DenoiseGap:
    """How much worse than the base a patched base denoises N pictures, each (N,) float32 on the CPU; see `denoise_gap`."""

    asked: Tensor
    """With the pictures' own prompts."""
    empty: Tensor
    """With the empty prompt."""


@torch.no_grad()
def denoise_gap(
    base: Base,
    patches: Sequence[Patch],
    prompts: Sequence[str],
    x_0: Tensor,
    *,
    weights: Sequence[float] | None = None,
    levels: int = 10,
) -> DenoiseGap:
    """How much worse the patched base denoises these pictures than the base does: 0 is as well as it.

        E ‖ε_θ(x_t, t, c) − ε‖² − E ‖ε*(x_t, t, c) − ε‖²                               for the prompts c, and for c = ∅

    over `levels` equally spaced t and noise that is the same every time; v and flow in the place of ε where the base predicts
    these, and a base that is told a guidance scale is told 1.

    Ask for pictures of the concept and for kept ones in turn. Where the concept's gap is large with its prompts and near 0
    with the empty one, the denoiser still knows what the concept looks like, and only no longer goes there when asked:
    avoidance, not destruction (Lu et al. 2025, arXiv:2505.17013).

    Args:
        base: The model; the patches are active on it meanwhile, and it is bare afterwards.
        patches: Any number.
        prompts: N prompts.
        x_0: Latents of N pictures of these prompts, (N, C, H, W), from `latents_of`.
        weights: Of the patches; 1 by default.
        levels: How many t; 10 of 1000 are 50, 150, …, 950.

    Raises:
        RecipeError: There are more or fewer prompts than pictures, or the latents are those of another base.
        PatchError: A patch does not fit.
    """
    if len(prompts) != len(x_0):
        raise RecipeError(f"{len(prompts)} prompts need as many pictures, got {len(x_0)}")
    resolution = x_0.shape[-1] * base.pipe.vae_scale_factor
    if x_0.shape[1:] != base.latent_shape(resolution):
        raise RecipeError(f"{base.name} has latents {base.latent_shape(resolution)}, got {tuple(x_0.shape[1:])}")
    x_0 = x_0.to(base.device, torch.float32)
    words = list(dict.fromkeys(["", *prompts]))
    conditions = base.encode(words, resolution=resolution)
    rows = torch.tensor([words.index(p) for p in prompts], device=base.device)
    with attached(base, patches, weights):
        asked, empty = (_excess(base, conditions, r, x_0, levels) for r in (rows, torch.zeros_like(rows)))
    return DenoiseGap(asked, empty)


def _excess(base: Base, conditions: Condition, rows: Tensor, x_0: Tensor, levels: int) -> Tensor:
    """The squared error with the adapters less that without, mean over levels and elements, (N,) float32 on the CPU."""
    scheduler, resolution = base.scheduler, x_0.shape[-1] * base.pipe.vae_scale_factor
    parts = []
    for some in torch.split(torch.arange(len(x_0)), DENOISED):
        gaps = []
        for k in range(levels):
            noise = base.noise([FIRST_NOISE + levels * i + k for i in some.tolist()], resolution=resolution).float()
            level = torch.tensor((k + 0.5) / levels, dtype=torch.float64)  # 0.502 · 1000 is below 502 in float32
            x_t, t, truth = noised(scheduler, x_0[some], noise, level=level)
            given = x_t.to(base.dtype), t.expand(len(x_t)), conditions[rows[some]]
            student = base.predict(*given)
            with base.teacher():
                teacher = base.predict(*given)
            gaps.append((student.float() - truth).square() - (teacher.float() - truth).square())
        parts.append(torch.stack(gaps).mean((0, 2, 3, 4)).cpu())
    return torch.cat(parts)
