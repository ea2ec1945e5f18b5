"""The closed-form objective: the algebra against dense float64, and the patch that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RecipeOf, weights_of
from tiny import tiny_tokenizer
from torch import Tensor

from esd_lora.bases import Base
from esd_lora.closed_form import _moved, closed_form_patch, edit, edit_moments, places
from esd_lora.keys import LENGTH, in_templates
from esd_lora.training import train

SIZE, OUT = 12, 7


def problem(*, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random layer W, the moments H and J of so many tokens to move, and G of others; float64."""
    generator = torch.Generator().manual_seed(0)
    weight, c, to, rest = (
        torch.randn(n, SIZE, dtype=torch.float64, generator=generator) for n in (OUT, tokens, tokens, 50)
    )
    return weight, c.T @ c / tokens, (to - c).T @ c / tokens, rest.T @ rest / 50


def dense(weight: Tensor, hit: Tensor, move: Tensor, kept: Tensor, *, keep_weight: float, ridge: float) -> Tensor:
    """ΔW from the normal equations, as UCE writes them: (W Σ t cᵀ + W (μ G + ρ)) (Σ c cᵀ + μ G + ρ)⁻¹ − W."""
    rho = ridge * (hit + keep_weight * kept).trace() / SIZE * torch.eye(SIZE).double()
    total = hit + keep_weight * kept + rho
    return weight @ (move + hit + keep_weight * kept + rho) @ torch.linalg.inv(total) - weight


def test_one_word_in_one_dimension_by_hand() -> None:
    # W = 2, c = 1, t = 3: (2 + d − 6)² + d² is least at d = 2
    one = torch.ones(1, 1).double()
    up, down = edit(2 * one, one, 2 * one, one, rank=1, keep_weight=1.0, ridge=0.0)
    assert (up @ down).item() == pytest.approx(2.0, abs=1e-12)


def test_where_no_more_words_move_than_the_rank_it_is_the_dense_formula() -> None:
    weight, hit, move, kept = problem(tokens=3)
    up, down = edit(weight, hit, move, kept, rank=3, keep_weight=0.5, ridge=1e-3)
    expected = dense(weight, hit, move, kept, keep_weight=0.5, ridge=1e-3)
    assert (up.shape, down.shape) == ((OUT, 3), (3, SIZE))
    torch.testing.assert_close(up @ down, expected, rtol=1e-9, atol=1e-11)  # float64, condition number below 1e4


def test_of_lower_rank_it_is_the_best_where_words_are() -> None:
    weight, hit, move, kept = problem(tokens=6)
    metric = hit + kept
    full = dense(weight, hit, move, kept, keep_weight=1.0, ridge=0.0)

    def error(change: Tensor) -> float:
        return torch.einsum("od,de,oe->", change - full, metric, change - full).item()

    best = error(torch.matmul(*edit(weight, hit, move, kept, rank=2, keep_weight=1.0, ridge=0.0)))
    u, s, vt = torch.linalg.svd(full)
    assert best < error(u[:, :2] * s[:2] @ vt[:2])  # the best in the weights is not the best in the words
    generator = torch.Generator().manual_seed(1)
    up, down = edit(weight, hit, move, kept, rank=2, keep_weight=1.0, ridge=0.0)
    for _ in range(20):  # no small step of the factors gets nearer
        moved = [x + 1e-4 * torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in (up, down)]
        assert error(moved[0] @ moved[1]) > best


def test_with_keys_given_the_values_are_their_least_squares() -> None:
    weight, hit, move, kept = problem(tokens=5)
    keys = torch.randn(2, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    up, down = edit(weight, hit, move, kept, rank=2, keep_weight=1.0, ridge=0.0, keys=keys)
    assert torch.equal(down, keys)
    gradient = (up @ down @ (hit + kept) - weight @ move) @ down.T  # of half the squared error by B
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_nothing_to_keep_and_a_rank_to_spare_moves_the_words_all_the_way() -> None:
    weight, hit, move, kept = problem(tokens=2)
    up, down = edit(weight, hit, move, kept, rank=2, keep_weight=0.0, ridge=1e-9)
    # (W + ΔW) c = W t for both tokens, so that ΔW H = W J; the ridge of 1e-9 is the tolerance
    torch.testing.assert_close(up @ down @ hit, weight @ move, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "instead", "expected"),
    [
        ("sCe", "sAe", [0, 1, 2, 3, 4, 5]),  # word for word
        ("sCne", "sAne", [0, 1, 2, 3, 4, 5]),
        ("sCDne", "sAne", [0, 1, 1, 2, 3, 4]),  # two words for one: both become it
        ("sCne", "sABne", [0, 2, 3, 4, 5, 5]),  # one for two: it becomes the last
        ("swCne", "swne", [0, 1, 2, 2, 3, 4]),  # for none: it becomes what follows
        ("sCe", "se", [0, 1, 1, 2, 3, 4]),
        ("sCe", "sCe", [0, 1, 2, 3, 4, 5]),
        ("sCDnwe", "sAnwe", [0, 1, 1, 2, 3, 4]),  # no room for padding
        ("sCnwe", "sABnwe", [0, 2, 3, 4, 5, 5]),
    ],
)
@pytest.mark.parametrize("pad", ["e", "!"])
def test_each_token_finds_its_place(asked: str, instead: str, expected: list[int], pad: str) -> None:
    def ids(text: str) -> Tensor:
        return torch.tensor([ord(c) for c in text.ljust(6, pad)])

    found = places(ids(asked), ids(instead), end=ord("e"))
    same = [ids(instead)[i].item() for i in found.tolist()]
    assert same == [ids(instead)[i].item() for i in expected]  # places within the padding are as good as each other


def test_the_end_of_a_prompt_without_padding_meets_that_of_one_with_padding_other_than_the_end(base: Base) -> None:
    base.pipe.tokenizer = tiny_tokenizer(pad="!")  # as of Stable Diffusion 2; it spells words out
    full, padded = "a great black cat", "a great black ox"
    assert torch.equal(_moved(base, [full], [padded])[0, 15], base.text_states([padded], length=LENGTH)[0, 14])


def test_templates_differ_in_the_words_alone() -> None:
    words = ["ink", "moon"]
    left, right = (in_templates(form, words, like="cat") for form in ("cat", "dog"))
    assert [p.replace("cat", "dog") for p in left] == right


def test_an_anchor_that_is_the_concept_moves_nothing(base: Base, recipe_of: RecipeOf) -> None:
    other = recipe_of(concepts={"erase": "cat", "replace_with": "a cat"}, eta=0.0)
    same = other.model_copy(update={"concepts": (other.concepts[0].model_copy(update={"replace_with": "cat"}),)})
    _, move = edit_moments(base, same)
    assert move.abs().max() < 1e-6
    assert edit_moments(base, other)[1].abs().max() > 1e-3


def test_a_patch_without_a_forward_pass(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    before = weights_of(base)
    recipe = recipe_of(objective="closed-form")
    patch = train(recipe, base, out=tmp_path / "run")
    assert recipe.layers == "esd-x-strict"
    assert (patch.info["cost"]["forward_passes"], patch.info["loss"]) == (0, None)
    assert set(patch.ranks.values()) == {recipe.rank}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "pytorch_lora_weights.safetensors",
        "recipe.yaml",
        "run.yaml",
    ]
    after = weights_of(base)
    assert all(torch.equal(before[k], after[k]) for k in before)
    again = train(recipe, base)
    assert again.digest == patch.digest


def test_keys_and_values_both_closed(base: Base, recipe_of: RecipeOf) -> None:
    recipe = recipe_of(objective="closed-form", keys="closed-form")
    tensors = closed_form_patch(base, recipe)
    downs = [v for k, v in tensors.items() if ".lora_A." in k]
    assert all(torch.equal(d, downs[0]) for d in downs)  # the keys are those of the words, in every layer


@pytest.mark.parametrize(("objective", "eta"), [("paper", 2.0), ("authors", 3.0)])
def test_training_with_closed_keys_starts_from_the_closed_values(
    base: Base, recipe_of: RecipeOf, objective: str, eta: float
) -> None:
    solved = closed_form_patch(base, recipe_of(keys="closed-form", eta=2.0))
    patch = train(recipe_of(keys="closed-form", objective=objective, eta=eta, lr=1e-30, steps=1), base)
    assert set(patch.tensors) == set(solved)
    for name, tensor in patch.tensors.items():  # a step of 1e-30 is none in float32
        torch.testing.assert_close(tensor, solved[name], rtol=1e-6, atol=1e-20)
