"""Robust training: the adversary finds what it looks for and touches nothing else; exact resume and the plan know of it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RecipeOf, same, wake
from test_attacks import state_of, unchanged
from test_processes import ROUNDING, distance, launch
from test_training import FINISHED, checkpoint, names_in, stop_at
from tiny import TINY
from torch import Tensor

from esd_lora import adversary, training
from esd_lora.adversary import find, imitation_loss, rounds_due
from esd_lora.bases import Base, base_of, load_base
from esd_lora.bases.base import Condition
from esd_lora.checkpoint import Checkpoints
from esd_lora.errors import BaseModelError, RecipeError
from esd_lora.patch import FILE_NAME, load_patch
from esd_lora.plan import count_passes, make_plan
from esd_lora.recipe import Recipe
from esd_lora.softwords import at_random, encode_with_gradients, vocabulary_of
from esd_lora.training import train
from esd_lora.trajectories import Bank, questions_of, record

KITTY = {"erase": "cat", "synonyms": ["kitty", "feline"]}


STEPS = adversary.STEPS


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of three steps."""
    monkeypatch.setattr(adversary, "STEPS", 3)


def recorded(base: Base, recipe: Recipe) -> tuple[Bank, Condition]:
    """The bank of a recipe's concepts, and the conditions of its prompts."""
    prompts, erase, _ = questions_of(recipe)
    conditions = base.encode(prompts)
    seeds = range(len(erase))
    return record(base, conditions, erase, seeds, steps=4, guidance_scale=3.0)[0], conditions


# ---- the adversary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "steps", "before"),
    [
        (0, 9, []),
        (1, 60, [30]),
        (2, 60, [20, 40]),
        (4, 60, [12, 24, 36, 48]),
        (3, 6, [1, 3, 4]),
        (5, 6, [1, 2, 3, 4, 5]),
    ],
)
def test_rounds_are_evenly_spaced_over_the_steps(rounds: int, steps: int, before: list[int]) -> None:
    due = [rounds_due(rounds, step=step, steps=steps) for step in range(steps)]
    assert [due.index(k + 1) for k in range(rounds)] == before
    assert (due[0], due[-1]) == (0, rounds)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_the_adversary_brings_the_edited_model_nearer_to_the_frozen_one(
    recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On the whole bank, beside the words that it starts from; and it is the prompt's own words that it comes nearer to.

    In all its steps, by 12 % or more from each of four seeds; in 20 of the 30, rounding can decide.
    """
    monkeypatch.setattr(adversary, "STEPS", STEPS)
    base = base_of(TINY[kind]())
    bank, conditions = recorded(base, recipe_of(concepts=["cat", "zebra"], preserve=[]))
    base.add_adapter(layers="esd-x", rank=2)
    wake(base)
    start = at_random(vocabulary_of(base), adversary.WORDS, beside=(), seed=7)
    with start.active(base):
        begun = encode_with_gradients(base, [start.words], conditions[:1])
    for s in (1, 2):
        found = find(base, bank, conditions, s, batch_size=2, seed=7)
        assert {k: v.shape for k, v in found.tensors.items()} == {k: v.shape for k, v in begun.tensors.items()}
        assert not any(v.requires_grad for v in found.tensors.values())
        rows, wanted = (bank.s == s).nonzero()[:, 0], conditions[s : s + 1]
        with torch.no_grad():
            far, near = (imitation_loss(base, bank, rows, wanted=wanted, given=g) for g in (begun, found))
        assert near < far


def test_a_search_follows_from_its_seed(base: Base, recipe_of: RecipeOf) -> None:
    bank, conditions = recorded(base, recipe_of(preserve=[]))
    first, again, other = (find(base, bank, conditions, 1, batch_size=2, seed=seed) for seed in (1, 1, 2))
    assert same(dict(first.tensors), dict(again.tensors))
    assert not same(dict(first.tensors), dict(other.tensors))


def test_a_search_changes_neither_base_nor_adapters(
    base: Base, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it takes the text encoders to the device and away again."""
    bank, conditions = recorded(base, recipe_of(preserve=[]))
    base.add_adapter(layers="esd-x", rank=2)
    wake(base)
    before, moves = base.adapter_state(), []
    for name in ("call_encoders", "free_encoders"):
        monkeypatch.setattr(base, name, lambda name=name: moves.append(name))
    find(base, bank, conditions, 1, batch_size=2, seed=0)
    assert same(base.adapter_state(), before)
    assert all(p.grad is None and p.requires_grad for p in base.adapter_parameters())
    assert moves == ["call_encoders", "call_encoders", "free_encoders"]


# ---- what the student is asked with -----------------------------------------------------------------------------------


def test_examples_are_asked_for_in_every_form_of_their_concept_equally_often(recipe_of: RecipeOf) -> None:
    concepts = [KITTY, "zebra", {"erase": "hat", "from": "a cowboy", "synonyms": ["cap"]}]
    recipe = recipe_of(concepts=concepts, robust=2, batch_size=300)
    prompts, erase, _ = questions_of(recipe)
    assert prompts == ["", "cat", "kitty", "feline", "zebra", "a cowboy", "hat", "dog"]  # `from` has no synonyms
    found = 2 * 3  # of two rounds for three prompts
    conditions = Condition({"words": torch.zeros(len(prompts) + found, 1)})
    run: Any = SimpleNamespace(recipe=recipe, erase=erase, prompts=len(prompts), conditions=conditions, step=5)
    run.asked = training.Run.asked.fget(run)  # type: ignore[attr-defined]
    asked = training._forms(run, torch.arange(300)).tolist()
    cats, zebras, cowboys = (Counter(asked[i::3]) for i in range(3))
    assert set(cats) == {1, 2, 3, 8, 11}
    assert set(zebras) == {4, 9, 12}
    assert set(cowboys) == {5, 10, 13}
    assert min(cats.values()) > 10  # of 100, 20 each
    assert training._forms(run, torch.arange(300)).tolist() == asked
    run.step = 6
    assert training._forms(run, torch.arange(300)).tolist() != asked
    plain = questions_of(recipe_of(concepts=concepts))
    assert plain[0] == ["", "cat", "zebra", "a cowboy", "hat", "dog"]
    assert not any(q.forms for q in plain[1])


def test_synonyms_and_found_words_are_trained_on(
    base: Base, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student gets their conditions, with the targets of the concept."""
    recipe = recipe_of(concepts=KITTY, robust=2, steps=30, batch_size=3, preserve_weight=0)
    found: list[Condition] = []
    trained: list[tuple[int, Condition]] = []
    honest = find

    def keep(*args: Any, **how: Any) -> Condition:
        found.append(honest(*args, **how))
        return found[-1]

    predict = base.predict

    def spy(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if torch.is_grad_enabled() and len(x) == 3:  # a search has batches of 6
            trained.append((len(found), condition))
        return predict(x, t, condition)

    monkeypatch.setattr(training.adversary, "find", keep)
    monkeypatch.setattr(base, "predict", spy)
    train(recipe, base)
    words = base.encode(questions_of(recipe)[0]).tensors["encoder_hidden_states"]
    known = [*words[1:4], *(f.tensors["encoder_hidden_states"][0] for f in found)]

    def seen(rounds: int) -> set[int]:
        rows = [row for k, c in trained if k == rounds for row in c.tensors["encoder_hidden_states"]]
        return {next(i for i, w in enumerate(known) if torch.equal(w, row)) for row in rows}

    assert [seen(k) for k in (0, 1, 2)] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]


# ---- whole runs -------------------------------------------------------------------------------------------------------


def test_without_rounds_nothing_is_done_otherwise(
    base: Base, recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No search, no other forms, and the patch is that of a loop that knows of neither."""
    recipe = recipe_of(concepts=KITTY, lr=0.02)
    monkeypatch.setattr(training.adversary, "find", lambda *_, **__: pytest.fail("a search"))
    monkeypatch.setattr(training, "_forms", lambda *_: pytest.fail("another form"))
    plain = train(recipe, base)
    monkeypatch.setattr(training, "_search", lambda _: None)
    assert train(recipe, base).digest == plain.digest
    assert train(recipe_of(lr=0.02), base).tensors.keys() == plain.tensors.keys()
    assert same(train(recipe_of(lr=0.02), base).tensors, plain.tensors)  # synonyms alone change nothing


@pytest.mark.parametrize("settings", [{}, {"x_t": "edited", "refresh_every": 2}, {"layers": "full"}], ids=str)
def test_a_robust_run_leaves_the_base_as_it_was_and_makes_another_patch(
    base: Base, recipe_of: RecipeOf, settings: dict[str, Any]
) -> None:
    before = state_of(base)
    told: list[tuple[str, int, int]] = []
    how: dict[str, Any] = {"lr": 0.02, "concepts": KITTY, **settings}
    robust = train(recipe_of(robust=2, **how), base, on_stage=lambda *at: told.append(at))
    assert unchanged(base, before)
    assert [at for at in told if at[0] == "adversary"] == [("adversary", k, 3) for k in (1, 2, 3)] * 2
    plain = train(recipe_of(**how), base)
    assert all(not torch.equal(plain.tensors[k], v) for k, v in robust.tensors.items())
    assert same(train(recipe_of(robust=2, **how), base).tensors, robust.tensors)


def test_a_robust_run_tells_what_the_adversary_took(base: Base, recipe_of: RecipeOf, tmp_path: Path) -> None:
    train(recipe_of(robust=1), base, out=tmp_path / "run")
    assert names_in(tmp_path / "run") == FINISHED
    stages = ["prompts", "trajectories", "student", "adversary", "other", "total"]
    assert list(training.read_cost(tmp_path / "run")["seconds"]) == stages


@pytest.mark.parametrize(
    "settings",
    [
        {"robust": 2},
        {"robust": 5, "concepts": ["zebra", KITTY], "batch_size": 3},
        {"robust": 2, "concepts": [{"erase": "hat", "from": "a cowboy"}, {"erase": "boots", "from": "a cowboy"}]},
        {"robust": 1, "x_t": "edited", "refresh_every": 2, "preserve_weight": 0},
        {"robust": 1, "keys": "closed-form", "objective": "paper"},
    ],
    ids=str,
)
def test_the_passes_of_the_adversary_are_planned(base: Base, recipe_of: RecipeOf, settings: dict[str, Any]) -> None:
    recipe = recipe_of(**settings)
    passes = count_passes(recipe)
    prompts = 2 if len(recipe.concepts) == 2 and not recipe.concepts[0].from_ else 1
    assert passes.adversary == recipe.robust * prompts * 3 * 2 * recipe.batch_size * 4
    assert passes.total == train(recipe, base).info["cost"]["forward_passes"]
    assert count_passes(recipe_of()).adversary == 0


def test_the_encoders_are_planned_beside_the_search() -> None:
    sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    how = {"base": sd15, "concepts": ("Van Gogh",), "preserve_weight": 0, "resolution": 64}
    plain, robust = (make_plan(Recipe.model_validate({**how, "robust": r})).memory for r in (0, 2))
    assert robust.peak > plain.peak + robust.encoders
    assert robust.activations == plain.activations


# ---- interrupted runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_t", ["base", "edited"])
@pytest.mark.parametrize("step", [1, 2, 4, 5, 6])  # searches come before steps 2 and 5, counted from 0
def test_a_resumed_robust_run_gives_the_patch_of_an_uninterrupted_one_bit_for_bit(
    base: Base, tiny_folder: Path, recipe_of: RecipeOf, tmp_path: Path, step: int, x_t: str
) -> None:
    recipe = recipe_of(concepts=["zebra", KITTY], robust=2, steps=8, lr=0.02, x_t=x_t, refresh_every=5)
    train(recipe, base, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, base, out=tmp_path / "parts", on_step=stop_at(step))
    assert names_in(tmp_path / "parts") == [checkpoint(step), "recipe.yaml"]
    kept = Checkpoints(tmp_path / "parts").load().tensors["found.encoder_hidden_states"]
    assert len(kept) == 2 * rounds_due(2, step=step - 1, steps=8)
    train(recipe, load_base(str(tiny_folder), device="cpu"), out=tmp_path / "parts", resume=True)
    for name in (FILE_NAME, "loss.csv", "recipe.yaml"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("at", [2, 5, 7])  # in the first search, in that for the second prompt, and in the second round
def test_a_run_told_to_stop_amid_a_search_goes_on_bit_for_bit(
    base: Base, recipe_of: RecipeOf, tmp_path: Path, at: int
) -> None:
    recipe = recipe_of(concepts=["zebra", "cat"], robust=2, lr=0.02, x_t="edited", refresh_every=2)
    told: list[int] = []

    def on_stage(name: str, done: int, of: int) -> None:
        if name == "adversary":
            told.append(done)
            if len(told) == at:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(recipe, base, out=tmp_path / "run", on_stage=on_stage)
    assert len(told) == at
    assert names_in(tmp_path / "run") == [checkpoint(4 if at == 7 else 2), "recipe.yaml"]
    embedding = base.pipe.text_encoder.get_input_embeddings()
    assert not embedding._forward_hooks
    whole = train(recipe, base)
    resumed = train(recipe, base, out=tmp_path / "run", resume=True)
    assert same(resumed.tensors, whole.tensors)
    assert resumed.info == whole.info  # nothing is counted twice


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_several_processes_find_the_same_words_and_make_the_patch_of_one(
    base: Base, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = recipe_of(concepts=KITTY, robust=2, lr=0.02, eta=20, batch_size=3, trajectories=2)

    def work(rank: int) -> None:
        found: list[Condition] = []
        honest = find

        def keep(*args: Any, **how: Any) -> Condition:
            found.append(honest(*args, **how))
            return found[-1]

        training.adversary.find = keep
        train(recipe, base, out=tmp_path / "run").save(tmp_path / f"patch-{rank}")
        torch.save([dict(f.tensors) for f in found], tmp_path / f"{rank}.pt")

    assert launch(work) == [0, 0]
    one = train(recipe, base)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == 2
    assert all(same(x, y) for x, y in zip(first, second, strict=True))
    patches = [load_patch(tmp_path / f"patch-{rank}") for rank in (0, 1)]
    assert patches[0].digest == patches[1].digest
    assert distance(patches[0], one) < ROUNDING
    assert patches[0].info["cost"] == one.info["cost"]


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_families_without_soft_words_are_refused_before_anything_is_written(
    kind: str, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    base = base_of(TINY[kind]())
    with pytest.raises(
        RecipeError, match=r"^robust: soft words are for Stable Diffusion 1, 2 and XL, .* use robust: 0$"
    ):
        train(recipe_of(robust=1), base, out=tmp_path / "run")
    assert names_in(tmp_path) == []


def few_words(base: Base, names: str) -> Callable[[], dict[str, int]]:
    """A vocabulary with no other whole words."""
    tokens = base.pipe.tokenizer.get_vocab()
    known = {t: i for t, i in tokens.items() if not t.endswith("</w>") or t[0] in names}
    return lambda: known


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [("xyz", RecipeError, "tokens: must be from 1 to 3"), ("", BaseModelError, "marks no whole words")],
)
def test_a_vocabulary_without_enough_words_is_refused_before_anything_is_written(
    base: Base,
    recipe_of: RecipeOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(base.pipe.tokenizer, "get_vocab", few_words(base, names))
    with pytest.raises(error, match=message) as caught:
        train(recipe_of(robust=1), base, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []
