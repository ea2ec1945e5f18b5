"""`objective: closed-form`: the patch that moves a concept's words to its anchor's, without a pass through the denoiser.

In cross-attention k and v a word acts through W c alone, c its state from the text encoder. For tokens with states c_i in
prompts with the concept and a_i, n_i at the same places of the prompts with the anchor and with nothing, the change wanted is

    ΔW = argmin  mean_i ‖(W + ΔW) c_i − W t_i‖²  +  μ E ‖ΔW c‖²  +  ρ ‖ΔW‖²,        t_i = a_i − η (c_i − n_i)

with E over the vocabulary and the prompts to preserve. With H = mean c_i c_iᵀ, J = mean (t_i − c_i) c_iᵀ and G = E c cᵀ,

    ΔW = W J M⁻¹,        M = H + μ G + ρ I.

This is UCE (Gandikota et al. 2024, arXiv:2308.14761, equation 7) with means for its sums and the target of ESD for its
anchor; η = 0 is theirs. Of rank r the best is, with M = L Lᵀ and W J L⁻ᵀ = U S Vᵀ,

    B = U_r S_r,    A = V_rᵀ L⁻¹        (reduced-rank regression, Izenman 1975: the error counts where words are)

which is ΔW itself where no more than r words are moved. With keys A given, B = W J Aᵀ (A M Aᵀ)⁻¹, which is also what training
starts from where the keys are closed-form and the objective is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.keys import LENGTH, RIDGE, generalised_keys, in_templates, kept_moment, other_words, ridged
from esd_lora.recipe import Recipe


def closed_form_patch(
    base: Base, recipe: Recipe, *, on_prompts: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """The tensors of the patch, by diffusers' names, float32.

    Args:
        base: Its text encoder is asked; nothing is changed.
        recipe: With concepts, η, λ (which is μ here), rank, keys, and the prompts to preserve.
        on_prompts: Called with the number of vocabulary prompts encoded and their total.
    """
    hit, move = edit_moments(base, recipe)
    kept = kept_moment(base, recipe.concepts, recipe.preserve or (), on_prompts=on_prompts)
    return patch_tensors(base, recipe, hit, move, kept)


def patch_tensors(base: Base, recipe: Recipe, hit: Tensor, move: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The tensors of the patch that H, J and G give; see `closed_form_patch`."""
    keys = generalised_keys(hit, kept, rank=recipe.rank) if recipe.keys == "closed-form" else None
    tensors = {}
    for name in base.text_layers:
        weight = base.denoiser.get_submodule(name).weight.detach().cpu().double()
        up, down = edit(weight, hit, move, kept, rank=recipe.rank, keep_weight=recipe.preserve_weight, keys=keys)
        tensors[f"{base.prefix}.{name}.lora_A.weight"] = down.float()
        tensors[f"{base.prefix}.{name}.lora_B.weight"] = up.float()
    return tensors


def edit(
    weight: Tensor,
    hit: Tensor,
    move: Tensor,
    kept: Tensor,
    *,
    rank: int,
    keep_weight: float,
    ridge: float = RIDGE,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, D) of one layer; see the module's equations.

    Args:
        weight: W, (out, D), float64 like all others.
        hit, move, kept: H, J and G, (D, D).
        rank: r.
        keep_weight: μ.
        ridge: ρ over the mean eigenvalue of H + μ G.
        keys: A, where it is given.
    """
    metric = ridged(hit + keep_weight * kept, ridge)
    if keys is not None:
        down = keys.double()
        # zero keys, of concepts with few directions, get zero values
        return weight @ (move @ down.T @ torch.linalg.pinv(down @ metric @ down.T, hermitian=True)), down
    lower = torch.linalg.cholesky(metric)
    white = torch.linalg.solve_triangular(lower, move.T, upper=False).T  # J L⁻ᵀ
    u, s, vt = torch.linalg.svd(weight @ white, full_matrices=False)
    down = torch.linalg.solve_triangular(lower.T, vt[:rank].T, upper=True).T
    return u[:, :rank] * s[:rank], down


def edit_moments(base: Base, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """H and J: mean c cᵀ and mean (t − c) cᵀ over the tokens of prompts with the concepts, (D, D) in float64."""
    words = other_words(base, recipe.concepts)
    hit, move, count = torch.zeros(()), torch.zeros(()), 0
    for concept in recipe.concepts:
        eta = recipe.eta_of(concept)
        for form in dict.fromkeys((concept.erase, *concept.synonyms)):
            asked, instead, bare = (in_templates(f, words, like=form) for f in (form, concept.anchor, ""))
            c = base.text_states(asked, length=LENGTH)
            a, n = (_moved(base, asked, other) for other in (instead, bare))
            c, a, n = (x.flatten(0, 1).double() for x in (c, a, n))
            hit, move = hit + c.T @ c, move + (a - eta * (c - n) - c).T @ c
            count += len(c)
    return hit / count, move / count


def _moved(base: Base, asked: Sequence[str], instead: Sequence[str]) -> Tensor:
    """The states of `instead` at the places of the tokens of `asked`, (N, L, D).

    Places before the first difference are the same; those after it are counted from the end, so that what follows the
    concept meets itself, its last word the anchor's last, and its words that the anchor has no room for what comes next.
    """
    states = base.text_states(instead, length=LENGTH)
    asked_ids, instead_ids = (base.token_ids(p, length=LENGTH) for p in (asked, instead))
    end = base.pipe.tokenizer.eos_token_id
    rows = [places(a, b, end=end) for a, b in zip(asked_ids, instead_ids, strict=True)]
    return torch.stack([s[r] for s, r in zip(states, rows, strict=True)])


def places(asked: Tensor, instead: Tensor, *, end: int) -> Tensor:
    """For every token of a padded prompt (L,), its place in another; see `_moved`. `end` is the token that ends a prompt."""
    before = [int((ids == end).int().argmax()) for ids in (asked, instead)]  # the first end; padding may repeat it
    first = int((asked == instead).int().cumprod(0).sum())  # that differs
    index = torch.arange(len(asked))
    shifted = (index + before[1] - before[0]).clamp(min(first, len(asked) - 1), len(asked) - 1)
    return torch.where(index < first, index, shifted)
