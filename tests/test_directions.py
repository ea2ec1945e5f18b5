"""Adapters that start from where a concept moves what layers read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RecipeOf, same, weights_of
from tiny import TINY, tiny_xl
from torch import Tensor

from esd_lora.bases import Base, base_of
from esd_lora.directions import EXAMPLES, LENGTH, PROBES, _probes, _strongest, aim, passes
from esd_lora.patch import load_patch
from esd_lora.training import train
from esd_lora.trajectories import Bank, Question, record

RANK = 2


def bank_of(base: Base, seeds: int = 2) -> Bank:
    questions = [Question(s=1, c=1, a=0, eta=1.0)] * seeds
    return record(base, base.encode(["", "a cat"]), questions, range(seeds), steps=3, guidance_scale=3.0)[0]


def aimed(base: Base, *, batch_size: int = 2) -> dict[str, Tensor]:
    bank = bank_of(base)
    base.add_adapter(layers="esd-x", rank=RANK)
    return aim(base, base.encode(["", "a cat"]), bank, wordless=base.encode([base.wordless]), batch_size=batch_size)


def test_text_layers_start_from_what_the_concepts_words_have_and_empty_ones_lack(base: Base) -> None:
    """What keys and values read are the text states themselves, so that float64 says what is right without a hook."""
    found = aimed(base)
    states = base.encode(["", "a cat"]).tensors["encoder_hidden_states"].double()
    _, _, right = torch.linalg.svd(states[1] - states[0], full_matrices=False)
    for layer in base.text_layers:
        rows = found[f"{base.prefix}.{layer}.lora_A.weight"]
        assert rows.shape == (RANK, states.shape[-1])
        unit = rows.double() * RANK / LENGTH
        # float32 moments of a few hundred rows; a direction has no sign
        assert (unit @ right[:RANK].T).abs() == pytest.approx(torch.eye(RANK).double(), abs=1e-3)


def test_rows_are_orthogonal_of_one_length_and_the_same_in_any_batch(base: Base) -> None:
    found = aimed(base)
    for layer, rows in found.items():
        assert rows @ rows.T == pytest.approx(torch.eye(RANK) * 128 / RANK**2, abs=1e-3), layer
    base.remove_adapters()
    again = aimed(base, batch_size=5)
    for layer, rows in found.items():
        # sums in another order differ in the last bits
        cosines = torch.nn.functional.cosine_similarity(rows, again[layer])
        assert cosines == pytest.approx(torch.ones(RANK), abs=1e-2), layer


def test_starting_from_them_changes_no_prediction(base: Base) -> None:
    found = aimed(base)
    x, t = torch.randn(1, base.channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    condition = base.encode(["a cat"])
    before = base.predict(x, t, condition)
    base.load_adapter_state(found)
    assert torch.equal(base.predict(x, t, condition), before)  # lora_B is zero
    assert {k for k, v in base.adapter_state().items() if "lora_A" in k and v.abs().sum()} == {
        k for k in base.adapter_state() if "lora_A" in k
    }


def test_a_sketch_finds_what_the_whole_matrix_has() -> None:
    """Of a matrix too wide to be kept, whose strengths fall by a quarter each: its strongest directions, by float64."""
    d, rank = 300, 4
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    matrix = turn * 0.75 ** torch.arange(d).double() @ turn.T
    probes = _probes(d, rank)
    assert probes.shape == (d, PROBES * rank)
    rows = _strongest((matrix @ probes.double()).float(), rank) * rank / LENGTH
    # of 64 directions those left out weigh 0.75^64 = 1e-8; float32 rounds before that
    assert (rows.double() @ turn[:, :rank]).abs() == pytest.approx(torch.eye(rank).double(), abs=1e-3)


def test_more_rank_than_a_layer_is_wide_has_no_more_directions() -> None:
    rows = _strongest(torch.diag(torch.tensor([1.0, 4.0, 9.0])), 5)
    wanted = torch.nn.functional.pad(torch.eye(3).flip(0), (0, 0, 0, 2)) * LENGTH / 5
    assert rows == pytest.approx(wanted, abs=1e-6)  # of either sign the one whose largest entry is positive


def test_what_every_prompt_of_sdxl_has_is_no_direction_of_a_concept() -> None:
    """Its empty prompt is zeros, from which a prompt differs by all tokens, the first and the padding among them."""
    base = base_of(tiny_xl())
    assert not base.encode([""]).tensors["encoder_hidden_states"].any()
    wordless, asked = (base.encode([p]).tensors["encoder_hidden_states"][0].double() for p in (base.wordless, "a cat"))
    bank = record(
        base, base.encode(["", "a cat"]), [Question(s=1, c=1, a=0, eta=1.0)], [0], steps=3, guidance_scale=3.0
    )[0]
    base.add_adapter(layers="esd-x", rank=RANK)
    found = aim(base, base.encode(["", "a cat"]), bank, wordless=base.encode([base.wordless]), batch_size=2)
    _, _, right = torch.linalg.svd(asked - wordless, full_matrices=False)
    for layer in base.text_layers:
        unit = found[f"{base.prefix}.{layer}.lora_A.weight"].double() * RANK / LENGTH
        assert (unit @ right[:RANK].T).abs() == pytest.approx(torch.eye(RANK).double(), abs=1e-3)


def test_a_layer_that_no_prompt_reaches_keeps_its_random_start(base: Base) -> None:
    """The self-attention before the first cross-attention, and the queries of that, read the same whatever is asked."""
    bank = bank_of(base)
    base.add_adapter(layers="full", rank=RANK)
    found = aim(base, base.encode(["", "a cat"]), bank, wordless=base.encode([""]), batch_size=2)
    kept = {k for k in base.adapter_state() if "lora_A" in k} - set(found)
    assert len({name.split(".attn")[0] for name in kept}) == 1  # one block's
    assert all(".attn1." in name or ".attn2.to_q." in name for name in kept)


def test_where_numbers_overflow_training_tells_and_not_the_search_for_directions(base: Base) -> None:
    bank = bank_of(base)
    bank.x.fill_(torch.nan)
    base.add_adapter(layers="esd-x", rank=RANK)
    found = aim(base, base.encode(["", "a cat"]), bank, wordless=base.encode([""]), batch_size=2)
    # what keys and values read are the text states, which are as they should be
    assert {name.split(".")[-3] for name in found} == {"to_k", "to_v"}


def test_a_bank_that_is_small_is_looked_at_whole() -> None:
    assert (passes(6), passes(1000)) == (12, 2 * EXAMPLES)


@pytest.mark.parametrize("keys", ["learned", "closed-form"])
def test_a_run_that_goes_on_gives_the_same_patch_and_leaves_the_base(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, keys: str
) -> None:
    settings = {"init": "differences", "keys": keys, "objective": "paper", "layers": "esd-x", "checkpoint_every": 2}
    recipe, before = recipe_of(**settings), weights_of(base)
    whole = train(recipe, base, out=tmp_path / "whole")
    assert same(weights_of(base), before)

    def stop(step: int, loss: float | None) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, base, out=tmp_path / "half", on_step=stop)
    train(recipe, base, out=tmp_path / "half", resume=True)
    assert load_patch(tmp_path / "half").digest == whole.digest
    other = train(recipe_of(**{**settings, "init": "random"}), base)
    moved = {k for k in whole.tensors if "lora_A" in k and not torch.equal(whole.tensors[k], other.tensors[k])}
    fixed = {k for k in whole.tensors if "lora_A" in k and k not in moved}
    assert bool(fixed) == (keys == "closed-form")  # those are not random, and stay as they were solved for


@pytest.mark.parametrize("family", [name for name in TINY if name != "sd"])
def test_every_family_has_directions(family: str, recipe_of: RecipeOf) -> None:
    base = base_of(TINY[family]())
    patch = train(recipe_of(base=base.name, init="differences", resolution=32), base)
    assert all(torch.isfinite(v).all() for v in patch.tensors.values())
