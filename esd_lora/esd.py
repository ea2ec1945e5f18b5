"""The ESD objective: what the edited model must predict so that a concept goes away. No I/O, no state.

    target(x_t, t) = ε*(x_t, a) − η · [ε*(x_t, c) − ε*(x_t, ∅)]
    loss           = ‖ε_θ(x_t, s) − target‖² + λ · ‖ε_θ(x_p, p) − ε*(x_p, p)‖²

ε* is the frozen model, ε_θ the same network with adapters, c the concept, ∅ the empty prompt, a the anchor, s the prompt
that the student is asked with, p a prompt to preserve. Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV
2023, arXiv:2303.07345, has a = ∅ and s = c. The coefficients of the target sum to one, so the same line holds for
ε-, v- and flow-prediction: those are affine in ε at a fixed (x_t, t), with coefficients that sum to one likewise.
"""

from __future__ import annotations

from torch import Tensor


def esd_target(eps_anchor: Tensor, eps_concept: Tensor, eps_null: Tensor, *, eta: Tensor | float) -> Tensor:
    """The prediction that pushes away from the concept.

        target = eps_anchor − η · (eps_concept − eps_null)

    The authors' later code anchors on the concept itself, eps_concept − n · (eps_concept − eps_null): its
    `negative_guidance` n is η = n − 1 here, so that its default for SDXL, n = 1, is η = 0.

    Args:
        eps_anchor, eps_concept, eps_null: The frozen model's predictions at one (x_t, t), each (B, C, H, W).
        eta: η ≥ 0, one number or (B, 1, 1, 1). 0 returns the anchor, bit for bit.

    Returns:
        (B, C, H, W), float32.
    """
    return eps_anchor.float() - eta * (eps_concept.float() - eps_null.float())


def guided(eps_prompt: Tensor, eps_null: Tensor, *, guidance_scale: float) -> Tensor:
    """The classifier-free-guided prediction that moves a trajectory on.

        eps_null + g · (eps_prompt − eps_null)                                   (Ho and Salimans 2022, diffusers' g)

    Args:
        eps_prompt, eps_null: Predictions with and without the prompt, (B, C, H, W).
        guidance_scale: g ≥ 1; 1 is no guidance.

    Returns:
        (B, C, H, W), in the dtype of the inputs.
    """
    return eps_null + guidance_scale * (eps_prompt - eps_null)


def esd_loss(student: Tensor, target: Tensor, *, weight: Tensor) -> Tensor:
    """The weighted squared error of a batch of erasing and preserving examples, a scalar.

        Σ_i weight_i · mean((student_i − target_i)²) / number of erasing examples

    With weight 1 for erasing and λ for preserving examples, in equal numbers, this is the loss above with both norms
    as means.

    Args:
        student: ε_θ(x_t, s), (B, C, H, W), any float dtype.
        target: (B, C, H, W), float32.
        weight: (B,), float32, already divided by the number of examples of its kind.

    Returns:
        (), float32.
    """
    return ((student.float() - target) ** 2).mean((1, 2, 3)).mul(weight).sum()
