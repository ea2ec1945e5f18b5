"""The objective against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from esd_lora.esd import esd_loss, esd_target, guided


def three(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions for the anchor, the concept and the empty prompt, in float64."""
    return tuple(torch.randn(3, 2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))  # type: ignore[return-value]


def test_target_equals_numbers_worked_by_hand() -> None:
    # 0.5 − 1.5 · (2 − 1) = −1;  −0.25 − 1.5 · (0.5 − 1) = 0.5: powers of two, so float32 is exact
    anchor, concept, null = (torch.tensor(v).reshape(1, 1, 1, 2) for v in ([0.5, -0.25], [2.0, 0.5], [1.0, 1.0]))
    assert esd_target(anchor, concept, null, eta=1.5).flatten().tolist() == [-1.0, 0.5]


def test_target_agrees_with_float64() -> None:
    a, c, n = three()
    exact = a - 2.5 * (c - n)
    # three roundings to float32 of numbers below 16: each at most 2⁻²⁴ · 16 ≈ 1e-6
    torch.testing.assert_close(esd_target(a, c, n, eta=2.5).double(), exact, rtol=0, atol=5e-6)


def test_each_row_has_its_own_eta() -> None:
    a, c, n = (x.float() for x in three())
    eta = torch.tensor([0.0, 2.0])[:, None, None, None]
    target = esd_target(a, c, n, eta=eta)
    assert torch.equal(target[0], a[0])
    assert torch.equal(target[1], esd_target(a[1], c[1], n[1], eta=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eta_0_returns_the_anchor_bit_for_bit_in_float32(dtype: torch.dtype) -> None:
    a, c, n = (x.to(dtype) for x in three())
    target = esd_target(a, c, n, eta=0.0)
    assert target.dtype == torch.float32
    assert torch.equal(target, a.float())


def test_half_precision_is_widened_before_subtracting() -> None:
    c, n = (
        torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16),
        torch.full((1, 1, 1, 1), 0.99609375, dtype=torch.bfloat16),
    )
    a = torch.full((1, 1, 1, 1), 100.0, dtype=torch.bfloat16)
    # 2⁻⁸ away from 100 is lost in bfloat16 and kept in float32
    assert esd_target(a, c, n, eta=1.0).item() == 100 - 2**-8


@pytest.mark.parametrize("n", [1.0, 2.0, 3.5])
def test_the_authors_formula_is_the_papers_with_one_eta_less(n: float) -> None:
    _, c, null = three()
    authors = c - n * (c - null)
    torch.testing.assert_close(esd_target(null, c, null, eta=n - 1).double(), authors, rtol=0, atol=5e-6)  # as above


def test_the_target_in_v_is_the_converted_target_in_eps() -> None:
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = 0.8, 0.6

    def v_of(eps: torch.Tensor) -> torch.Tensor:
        x0 = (x - sigma * eps) / alpha
        return alpha * eps - sigma * x0

    a, c, n = three()
    in_v = esd_target(v_of(a), v_of(c), v_of(n), eta=1.5)
    converted = v_of(esd_target(a, c, n, eta=1.5).double())
    torch.testing.assert_close(in_v.double(), converted, rtol=0, atol=1e-5)  # roundings of float32 over α
    assert not torch.allclose(in_v.double(), esd_target(a, c, n, eta=1.5).double(), atol=0.1)


def test_guidance_equals_numbers_worked_by_hand() -> None:
    prompt, null = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guided(prompt, null, guidance_scale=3.0).tolist() == [4.0, -5.0]
    assert guided(prompt, null, guidance_scale=1.0).tolist() == [2.0, -1.0]
    assert guided(prompt.bfloat16(), null.bfloat16(), guidance_scale=3.0).dtype == torch.bfloat16


def test_loss_weighs_each_example() -> None:
    errors = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(3, 2, 2, 2)
    target = torch.full((3, 2, 2, 2), 5.0)
    # two erasing examples at 1/2 each, one preserving at λ = 2: (1 + 4) / 2 + 2 · 9 = 20.5
    loss = esd_loss(target + errors, target, weight=torch.tensor([0.5, 0.5, 2.0]))
    assert loss.shape == ()
    assert loss.item() == 20.5


def test_loss_of_a_half_precision_student_is_float32_and_has_its_gradient() -> None:
    student = torch.full((1, 1, 1, 2), 3.0, dtype=torch.bfloat16, requires_grad=True)
    loss = esd_loss(student, torch.tensor([1.0, 2.0]).reshape(1, 1, 1, 2), weight=torch.ones(1))
    loss.backward()
    assert (loss.dtype, loss.item()) == (torch.float32, 2.5)  # (2² + 1²) / 2
    assert student.grad is not None
    assert student.grad.flatten().tolist() == [2.0, 1.0]  # 2 · error / 2
