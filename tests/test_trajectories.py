"""The bank of trajectories against diffusers' own pipeline, and what is asked in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import RecipeOf, wake
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from tiny import tiny_pipeline
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.esd import esd_target
from esd_lora.pictures import step_noise
from esd_lora.recipe import Concept, make_recipe
from esd_lora.trajectories import EVERYDAY, Bank, Question, default_preserve, questions_of, record

PROMPTS = ["", "cat", "dog", "a cowboy"]
ERASE_CAT = Question(s=1, c=1, a=0, eta=1.5)
STEPS, SCALE = 5, 40.0
"""A random network hardly listens to its prompt: guidance this strong makes its pull plain to see."""

ROUNDING = 2e-4
"""The pipeline asks for ∅ and the prompt in one order, the bank in another and in larger batches: float32 sums differ in
the last bits, some 1e-6, and guidance multiplies that by 40 in each of the steps."""


def tiny_base(prediction_type: str = "epsilon") -> Base:
    return StableDiffusionBase(tiny_pipeline(prediction_type=prediction_type), name="tiny")


def bank_of(base: Base, *questions: Question, seeds: list[int] | None = None, **how: Any) -> tuple[Bank, int]:
    how = {"steps": STEPS, "guidance_scale": SCALE} | how
    return record(base, base.encode(PROMPTS), questions, seeds or list(range(7, 7 + len(questions))), **how)


@contextmanager
def inputs_of(base: Base) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects what the denoiser is fed inside."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: Any, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> None:
        seen.append((args[0].clone(), torch.as_tensor(args[1])))

    handle = base.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def stock_inputs(base: Base, prompt: str, seed: int) -> tuple[Tensor, Tensor]:
    """The scaled latents (S, C, H, W) and timesteps (S,) of the pipeline's own denoising loop."""
    with inputs_of(base) as seen, torch.no_grad():
        base.pipe(
            prompt,
            latents=base.noise([seed]),
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=step_noise([seed]),
            output_type="latent",
        )
    return torch.stack([x[1] for x, _ in seen]), torch.stack([t for _, t in seen])


def predicted(base: Base, bank: Bank, row: int) -> Tensor:
    """The denoiser's predictions at the bank's inputs for one prompt, as it is now."""
    with torch.no_grad():
        return base.predict(bank.x, bank.t, base.encode(PROMPTS)[row : row + 1].expand(len(bank)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
    ],
    ids=["DDIM", "Euler", "Euler ancestral", "PNDM", "DPM++"],
)
def test_inputs_are_those_of_the_pipelines_own_loop(scheduler: Any, prediction_type: str) -> None:
    base = tiny_base(prediction_type)
    if scheduler:
        base.pipe.scheduler = scheduler.from_config(base.pipe.scheduler.config)
    bank, _ = bank_of(base, ERASE_CAT, seeds=[7])
    x, t = stock_inputs(base, "cat", seed=7)
    assert torch.equal(bank.t.to(t.dtype), t)
    assert torch.equal(bank.x[0], x[0])
    torch.testing.assert_close(bank.x, x, rtol=0, atol=ROUNDING)
    # neither another guidance nor another seed would pass for the same
    other, _ = bank_of(base, ERASE_CAT, seeds=[7], guidance_scale=SCALE - 10)
    assert (other.x - x).abs().max() > 5 * ROUNDING
    assert (bank_of(base, ERASE_CAT, seeds=[8])[0].x - x).abs().max() > 1


def test_without_guidance_and_push_the_empty_prompt_is_not_asked_for() -> None:
    base, keep = tiny_base(), Question(s=2, c=2, a=2, eta=0.0)
    bank, passes = bank_of(base, keep, seeds=[7], guidance_scale=1.0)
    assert passes == STEPS
    both, twice = bank_of(base, keep, seeds=[7], guidance_scale=1.0 + 1e-6)  # next to none, with ∅ asked for
    assert twice == 2 * STEPS
    torch.testing.assert_close(bank.x, both.x, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(bank.target, both.target, rtol=0, atol=ROUNDING)
    assert (bank.x - bank_of(base, keep, seeds=[7])[0].x).abs().max() > 5 * ROUNDING


def test_each_trajectory_has_its_own_prompt_and_seed() -> None:
    base = tiny_base()
    dog = Question(s=2, c=2, a=0, eta=1.0)
    bank, _ = bank_of(base, ERASE_CAT, dog, seeds=[3, 11])
    assert bank.s.tolist() == [1, 2] * STEPS
    for k, (prompt, seed) in enumerate([("cat", 3), ("dog", 11)]):
        x, t = stock_inputs(base, prompt, seed)
        assert torch.equal(bank.t[k::2], t)
        torch.testing.assert_close(bank.x[k::2], x, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, LCMScheduler])
def test_noise_on_the_way_is_a_trajectorys_own(scheduler: Any) -> None:
    base = tiny_base()
    base.pipe.scheduler = scheduler.from_config(base.pipe.scheduler.config)
    questions, seeds = [ERASE_CAT, Question(s=2, c=2, a=0, eta=1.0)], [3, 11]
    beside, _ = bank_of(base, *questions, seeds=seeds, guidance_scale=1.0)
    for k, (question, seed) in enumerate(zip(questions, seeds, strict=True)):
        alone, _ = bank_of(base, question, seeds=[seed], guidance_scale=1.0)
        torch.testing.assert_close(beside.x[k::2], alone.x, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, LCMScheduler])
def test_the_first_step_adds_other_noise_than_it_starts_from(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    base.pipe.scheduler = scheduler.from_config(base.pipe.scheduler.config)
    monkeypatch.setattr(base, "predict", lambda x, t, condition: torch.zeros_like(x))
    bank, _ = bank_of(base, ERASE_CAT, seeds=[7])
    start, then = bank.x[:2].flatten(1)
    assert torch.cosine_similarity(start, then, dim=0) < 0.98  # of the same noise again it would be 1


@pytest.mark.parametrize(
    "question",
    [
        ERASE_CAT,
        Question(s=3, c=1, a=3, eta=2.0),  # erase cat from cowboy
        Question(s=3, c=1, a=2, eta=0.5),  # … and draw a dog
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_is_that_of_predictions_asked_for_directly(question: Question, prediction_type: str) -> None:
    base = tiny_base(prediction_type)
    bank, _ = bank_of(base, question)
    anchor, concept, null = (predicted(base, bank, r) for r in (question.a, question.c, 0))
    expected = esd_target(anchor, concept, null, eta=question.eta)
    assert bank.target.dtype == torch.float32
    # float32 sums in batches of another size
    torch.testing.assert_close(bank.target, expected, rtol=0, atol=1e-5)
    assert (concept - null).abs().max() > 1e-3  # so that a wrong row would show
    assert (predicted(base, bank, question.s) - expected).abs().max() > 1e-3


def test_a_prompt_to_preserve_is_the_teachers_own_prediction() -> None:
    base = tiny_base()
    bank, passes = bank_of(base, Question(s=2, c=2, a=2, eta=0.0))
    torch.testing.assert_close(bank.target, predicted(base, bank, 2), rtol=0, atol=1e-5)  # batches of another size
    assert passes == 2 * STEPS


@pytest.mark.parametrize(
    ("questions", "edited", "a_step"),
    [
        ([ERASE_CAT], False, 2),  # c = s, ∅ = a
        ([Question(1, 1, 2, 1.0)], False, 3),
        ([Question(3, 1, 3, 1.0)], False, 3),
        ([Question(3, 1, 2, 1.0)], False, 4),
        ([Question(0, 0, 0, 0.0)], False, 1),
        ([ERASE_CAT, Question(3, 1, 2, 1.0)], False, 6),
        ([ERASE_CAT], True, 4),
    ],
)
def test_passes_are_the_rows_that_the_denoiser_sees(questions: list[Question], edited: bool, a_step: int) -> None:
    base = tiny_base()
    with inputs_of(base) as seen:
        bank, passes = bank_of(base, *questions, edited=edited)
    assert passes == sum(len(x) for x, _ in seen) == a_step * STEPS
    assert len(bank) == len(questions) * STEPS


def test_without_guidance_the_student_is_not_asked_for_the_empty_prompt() -> None:
    base = tiny_base()
    base.add_adapter(layers="esd-x", rank=4)
    wake(base)
    bank, passes = bank_of(base, ERASE_CAT, seeds=[7], guidance_scale=1.0, edited=True)
    assert passes == (2 + 1) * STEPS
    both, twice = bank_of(base, ERASE_CAT, seeds=[7], guidance_scale=1.0 + 1e-6, edited=True)  # next to none, with ∅
    assert twice == (2 + 2) * STEPS
    # the student's predictions are large here
    torch.testing.assert_close(bank.x, both.x, rtol=1e-3, atol=ROUNDING)
    torch.testing.assert_close(bank.target, both.target, rtol=1e-3, atol=ROUNDING)


def test_edited_trajectories_follow_the_student_and_ask_the_teacher() -> None:
    base = tiny_base()
    untouched, _ = bank_of(base, ERASE_CAT, seeds=[7])
    base.add_adapter(layers="esd-x", rank=4)
    wake(base)
    bank, _ = bank_of(base, ERASE_CAT, seeds=[7], edited=True)
    x, _ = stock_inputs(base, "cat", seed=7)  # the pipeline with the adapters on
    # guidance multiplies larger differences here, so errors of rounding grow with the latents
    torch.testing.assert_close(bank.x, x, rtol=1e-3, atol=ROUNDING)
    assert (bank.x[-1] - untouched.x[-1]).abs().max() > 0.1
    assert (predicted(base, bank, 1) - bank.target).abs().max() > 0.1  # the student answers differently
    base.remove_adapters()
    expected = esd_target(*(predicted(base, bank, r) for r in (0, 1, 0)), eta=1.5)
    torch.testing.assert_close(bank.target, expected, rtol=1e-5, atol=1e-5)  # batches of another size


def test_base_trajectories_ask_no_adapters() -> None:
    base = tiny_base()
    before, _ = bank_of(base, ERASE_CAT)
    base.add_adapter(layers="esd-x", rank=4)
    wake(base)
    after, _ = bank_of(base, ERASE_CAT)
    # the first prediction is the teacher's; the first move already is the teacher's too
    for name, tensor in before.tensors().items():
        assert torch.equal(after.tensors()[name], tensor), name


def test_the_pipelines_scheduler_is_left_alone() -> None:
    base = tiny_base()
    before = dict(vars(base.pipe.scheduler))
    bank_of(base, ERASE_CAT)
    assert vars(base.pipe.scheduler).keys() == before.keys()
    assert all(vars(base.pipe.scheduler)[k] is v for k, v in before.items())


def test_a_bank_records_no_gradients() -> None:
    base = tiny_base()
    base.add_adapter(layers="esd-x", rank=2)
    bank, _ = bank_of(base, ERASE_CAT, edited=True)
    assert not any(t.requires_grad for t in bank.tensors().values())


@pytest.mark.parametrize(
    ("concept", "settings", "prompts", "question"),
    [
        ("cat", {"eta": 1}, ["", "cat"], (1, 1, 0, 1.0)),
        ({"erase": "hat", "from": "cowboy"}, {"eta": 2}, ["", "cowboy", "hat"], (1, 2, 1, 2.0)),
        ({"erase": "cat", "replace_with": "dog"}, {"eta": 1}, ["", "cat", "dog"], (1, 1, 2, 1.0)),
        (
            {"erase": "hat", "from": "cowboy", "replace_with": "man"},
            {"eta": 1},
            ["", "cowboy", "hat", "man"],
            (1, 2, 3, 1.0),
        ),
        ("cat", {"objective": "authors", "eta": 2.5}, ["", "cat"], (1, 1, 0, 1.5)),
        (
            {"erase": "hat", "from": "cowboy"},
            {"objective": "authors", "eta": 2.5},
            ["", "cowboy", "hat"],
            (1, 2, 1, 2.5),
        ),
    ],
)
def test_what_is_asked_to_erase(
    concept: Any, settings: dict[str, Any], prompts: list[str], question: tuple[int, int, int, float]
) -> None:
    recipe = make_recipe({"base": "emoji", "concepts": concept, "preserve": [], **settings})
    assert questions_of(recipe) == (prompts, [Question(*question)], [])


def test_what_is_asked_to_preserve(recipe_of: RecipeOf) -> None:
    recipe = recipe_of(concepts=["cat", {"erase": "hat", "from": "dog"}], preserve=["", "dog", "a fish"])
    prompts, _, preserve = questions_of(recipe)
    assert prompts == ["", "cat", "dog", "hat", "a fish"]  # each is encoded once
    assert preserve == [Question(0, 0, 0, 0.0), Question(2, 2, 2, 0.0), Question(4, 4, 4, 0.0)]
    assert questions_of(recipe_of(preserve=["dog"], preserve_weight=0))[2] == []


@pytest.mark.parametrize(
    ("concepts", "beside"),
    [
        (["cat", "ink style"], [None, "dog, ink style", "a fish, cat", "the moon, ink style"]),
        (["cat", {"erase": "hat", "from": "dog"}], [None, "dog, cat", "a fish, cat", "the moon, cat"]),
        (["cat", {"erase": "tiger", "replace_with": "dog"}], [None, "dog, cat", "a fish, cat", "the moon, cat"]),
    ],
    ids=["in turn", "the hat goes from dogs alone", "what is replaced stays replaced"],
)
def test_what_is_asked_for_beside_a_concept(recipe_of: RecipeOf, concepts: list[Any], beside: list[str | None]) -> None:
    recipe = recipe_of(concepts=concepts, preserve=["", "dog", "a fish", "the moon"], preserve_beside=True)
    prompts, _, preserve = questions_of(recipe)
    assert [None if q.beside is None else prompts[q.beside] for q in preserve] == beside


def test_everyday_prompts_are_preserved_but_for_the_words_of_the_concepts() -> None:
    concepts = [Concept(erase="Kitty", synonyms=("Cat",)), Concept(erase="ink style", from_="a tiger in ink")]
    kept = default_preserve(concepts)
    assert kept[0] == ""
    assert set(EVERYDAY) - set(kept) == {"a cat", "an ink drawing"}  # the tiger stays, without ink
    assert default_preserve([Concept(erase="the painting of a nobody")]) == (
        "",
        *(p for p in EVERYDAY if p != "an oil painting"),
    )
