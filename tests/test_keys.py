"""Closed-form keys: the algebra, what they are made from, and that training leaves them alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import RecipeOf, same
from safetensors.torch import save_file
from torch import Tensor

from esd_lora import keys
from esd_lora.bases import Base
from esd_lora.closed_form import closed_form_patch
from esd_lora.errors import RecipeError
from esd_lora.keys import (
    concept_prompts,
    generalised_keys,
    kept_moment,
    named_words,
    other_words,
    prompts_of,
    second_moment,
    vocabulary_moment,
    words_of,
)
from esd_lora.recipe import Concept, make_recipe
from esd_lora.training import train

PROMPTS = [f"a {letter}" for letter in "bcdefgh"]
"""A short vocabulary's."""


def moments(size: int = 12) -> tuple[Tensor, Tensor]:
    """Two random second moments, float64, of full rank."""
    generator = torch.Generator().manual_seed(0)
    hit, keep = torch.randn(2, 4 * size, size, dtype=torch.float64, generator=generator)
    return hit.T @ hit / len(hit), keep.T @ keep / len(keep)


def test_two_by_two_by_hand() -> None:
    # H = diag(4, 1), G = diag(1, 0.1), no ridge: gains 4 and 10, so the second axis comes first; aᵀHa = 1
    hit, keep = torch.diag(torch.tensor([4.0, 1.0]).double()), torch.diag(torch.tensor([1.0, 0.1]).double())
    rows = generalised_keys(hit, keep, rank=2, ridge=0.0).abs()
    torch.testing.assert_close(rows, torch.tensor([[0.0, 1.0], [0.5, 0.0]]).double(), rtol=0, atol=1e-12)


def test_keys_are_generalised_eigenvectors_largest_first() -> None:
    hit, keep = moments()
    rows = generalised_keys(hit, keep, rank=5, ridge=0.01)
    ridged = keep + 0.01 * keep.trace() / 12 * torch.eye(12).double()
    gains = 1 / torch.einsum("rd,de,re->r", rows, ridged, rows)  # aᵀHa = 1
    # float64 through a Cholesky factor of condition number below 100
    torch.testing.assert_close(rows @ hit, gains[:, None] * (rows @ ridged), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(rows @ hit @ rows.T, torch.eye(5).double(), rtol=0, atol=1e-9)
    assert (gains.diff() < 0).all()
    best = torch.linalg.eigvals(torch.linalg.solve(ridged, hit)).real.max()
    torch.testing.assert_close(gains[0], best, rtol=1e-9, atol=0)


def test_where_the_concept_has_nothing_a_key_is_zero() -> None:
    _, keep = moments()
    c = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = generalised_keys(torch.outer(c, c), keep, rank=3)
    assert rows[0] @ c == pytest.approx(1, abs=1e-9) or rows[0] @ c == pytest.approx(-1, abs=1e-9)
    assert not rows[1:].any()


def test_there_are_no_more_keys_than_dimensions() -> None:
    hit, keep = moments()
    rows = generalised_keys(hit, keep, rank=20)
    assert rows.shape == (12, 12)
    torch.testing.assert_close(rows[:5], generalised_keys(hit, keep, rank=5), rtol=0, atol=0)


def test_a_second_moment_is_summed_over_tokens_in_float64() -> None:
    states = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(2))
    moment, count = second_moment([states[:5], states[5:]])
    tokens = states.reshape(24, 8).double()
    torch.testing.assert_close(moment, tokens.T @ tokens, rtol=1e-12, atol=1e-12)
    assert (moment.dtype, count) == (torch.float64, 24)


def test_the_vocabulary_is_every_word_alone_and_beside_others(base: Base) -> None:
    words = words_of(base)
    assert words == sorted(set(words))
    assert all(w.isalpha() for w in words)
    prompts = list(prompts_of(words))
    assert len(prompts) > 0.9 * keys.PROMPTS
    assert all(f"a photo of a {w}" in prompts for w in words)
    assert prompts == list(prompts_of(words))
    assert len(list(prompts_of([f"word{i}" for i in range(30_000)]))) == 30_000


def test_the_vocabulary_is_encoded_once_for_each_text_encoder(base: Base) -> None:
    seen: list[tuple[int, int]] = []

    def look() -> tuple[Tensor, int]:
        return vocabulary_moment(base, PROMPTS, on_prompts=lambda done, of: seen.append((done, of)))

    moment, count = look()
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))
    seen.clear()
    again, count_again = look()
    assert torch.equal(moment, again)
    assert (count, seen) == (count_again, [])
    base.pipe.text_encoder.get_input_embeddings().weight.data *= 1.5  # another text encoder
    look()
    assert seen


def test_the_vocabulary_is_encoded_anew_on_another_kind_of_device(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    here = keys._cache(base, PROMPTS)
    monkeypatch.setattr(base, "device", torch.device("meta"))
    assert keys._cache(base, PROMPTS) != here


@pytest.mark.parametrize("broken", ["cut", "empty", "other"])
def test_a_broken_cache_is_computed_anew(base: Base, tmp_path: Path, broken: str) -> None:
    moment, _ = vocabulary_moment(base, PROMPTS)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = file.read_bytes()
    if broken == "other":
        save_file({"moment": torch.ones(1)}, file)
    else:
        file.write_bytes(whole[: 100 if broken == "cut" else 0])
    again, _ = vocabulary_moment(base, PROMPTS)
    assert torch.equal(moment, again)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_used_is_warned_of(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    moment, _ = vocabulary_moment(base, PROMPTS)

    def denied(*_: object) -> None:  # as in a folder without permission, which root would not notice
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(keys.safetensors.torch, "load_file", denied)
    with pytest.warns(UserWarning, match="not kept for the next time: .*: cannot write: Permission denied"):
        again, _ = vocabulary_moment(base, PROMPTS)
    assert torch.equal(moment, again)


def test_a_concept_is_hit_alone_and_beside_others_with_its_synonyms() -> None:
    concept = Concept.model_validate({"erase": "van gogh style", "synonyms": ["vincent"]})
    prompts = concept_prompts([concept], ["a", "dog", "tree"])
    assert "a photo of a van gogh style" in prompts
    assert "vincent" in prompts
    assert any("dog" in p and "vincent" in p for p in prompts)
    assert named_words([concept]) == {"van", "gogh", "vincent"}


def test_what_a_concept_is_erased_from_wakes_the_patch_where_it_does_not_name_it() -> None:
    hat = Concept.model_validate({"erase": "cowboy hat", "from": "cowboys"})
    assert named_words([hat]) == {"cowboy", "hat"}
    assert "a photo of a cowboys" in concept_prompts([hat], ["tree"])
    worn = Concept.model_validate({"erase": "party hat", "from": "a cat with a party hat"})
    assert named_words([worn]) == {"party", "hat"}  # the cat itself is to be kept


def test_other_words_have_no_stem_in_common_with_the_concepts(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "words_of", lambda _: ["apple", "apples", "Apples", "pear", "style", "van", "tree"])
    concepts = [Concept(erase="apples"), Concept.model_validate({"erase": "van gogh style"})]
    assert other_words(base, concepts) == ["pear", "style", "tree"]


def test_the_concept_is_no_part_of_what_is_kept(base: Base) -> None:
    concept = Concept(erase="q")  # the tiny tokenizer has letters for words
    words = words_of(base)
    others = [p for p in prompts_of(words) if "q" not in p.lower().split()]
    assert len(others) < len(list(prompts_of(words)))
    states = torch.cat([base.text_states(others[i : i + 64], length=16) for i in range(0, len(others), 64)])
    direct = states.flatten(0, 1).double()
    # the difference of two sums of 130,000 products in float64
    torch.testing.assert_close(kept_moment(base, [concept]), direct.T @ direct / len(direct), rtol=1e-9, atol=1e-12)
    mixed = kept_moment(base, [concept], ["dog"])
    dog = base.text_states(["dog"], length=16)[0].double()
    torch.testing.assert_close(mixed, (direct.T @ direct / len(direct) + dog.T @ dog / 16) / 2, rtol=1e-9, atol=1e-12)


def test_fewer_tokens_have_the_states_that_they_have_among_all(base: Base) -> None:
    whole = base.encode(["a cat", "dog"]).tensors["encoder_hidden_states"]
    torch.testing.assert_close(base.text_states(["a cat", "dog"], length=7), whole[:, :7], rtol=1e-5, atol=1e-6)


def test_keys_answer_the_concept_and_not_what_is_to_be_kept(base: Base, recipe_of: RecipeOf) -> None:
    tensors = closed_form_patch(base, recipe_of(concepts="cat", keys="closed-form", preserve=["dog"]))
    rows = next(v for k, v in tensors.items() if ".lora_A." in k)

    def answer(prompt: str) -> float:
        return (base.text_states([prompt], length=16) @ rows.T).square().sum(-1).mean().item()

    # measured 1.12 and 0.02 on this random text encoder, which spells words out; 5 leaves room
    assert answer("cat") > 5 * answer("dog")


def test_training_leaves_the_keys_alone_and_all_layers_share_them(base: Base, recipe_of: RecipeOf) -> None:
    recipe = recipe_of(keys="closed-form", objective="paper", lr=0.05)
    patch = train(recipe, base)
    expected = next(v for k, v in closed_form_patch(base, recipe).items() if ".lora_A." in k)
    downs = {k: v for k, v in patch.tensors.items() if ".lora_A." in k}
    assert all(k.removesuffix(".lora_A.weight").endswith(("attn2.to_k", "attn2.to_v")) for k in downs)
    assert all(torch.equal(v, expected) for v in downs.values())
    assert all(v.abs().max() > 1e-4 for k, v in patch.tensors.items() if ".lora_B." in k)


def test_with_query_and_output_only_k_and_v_have_closed_keys(base: Base, recipe_of: RecipeOf) -> None:
    patch = train(recipe_of(keys="closed-form", layers="esd-x", lr=0.05), base)
    kept = [v for k, v in patch.tensors.items() if "attn2.to_k.lora_A" in k]
    learned = [v for k, v in patch.tensors.items() if "attn2.to_q.lora_A" in k]
    assert all(torch.equal(v, kept[0]) for v in kept)
    assert not any(torch.equal(v, learned[0]) for v in learned[1:])


def test_a_run_with_closed_keys_goes_on_where_it_stopped(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(keys="closed-form", objective="paper", checkpoint_every=2, lr=0.05)
    whole = train(recipe, base)

    def stop(step: int, _: float | None) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, base, out=tmp_path / "run", on_step=stop)
    assert same(dict(train(recipe, base, out=tmp_path / "run", resume=True).tensors), dict(whole.tensors))


def test_closed_keys_need_cross_attention(recipe_of: RecipeOf) -> None:
    keyed, full = recipe_of(keys="closed-form"), recipe_of(keys="closed-form", layers="full")
    assert (keyed.layers, keyed.objective, keyed.eta) == ("esd-x-strict", "closed-form", 0.5)
    assert (full.layers, full.objective, full.eta) == ("full", "paper", 1.5)  # other layers have no words to solve for
    assert recipe_of(keys="closed-form", eta=2.0).eta == 2.0
    assert make_recipe({"base": "emoji", "concepts": "cat", "keys": "closed-form"}).rank == 2
    with pytest.raises(
        RecipeError, match="keys: closed-form is for cross-attention, which layers esd-u does not adapt"
    ):
        recipe_of(keys="closed-form", layers="esd-u")
