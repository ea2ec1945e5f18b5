"""The embedded base is good enough to erase from, and erasing from it works: all on the shipped weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from esd_lora.bases import EMOJI, Base, load_base, quick_dtype
from esd_lora.cli import RECIPES
from esd_lora.compose import attach
from esd_lora.emoji.evaluators import Evaluator, load_evaluator
from esd_lora.emoji.vocabulary import NEIGHBOURS, OBJECTS, STYLES, WEARERS, prompt
from esd_lora.evaluate.rates import rate
from esd_lora.evaluate.scores import GATE, Cell, answer_set, draw, gate, score, whole_grid
from esd_lora.patch import Patch
from esd_lora.pictures import generate
from esd_lora.recipe import load_recipe
from esd_lora.training import train


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    """The other tests run on one thread; these draw hundreds of pictures, by this worker's share of the cores."""
    before, workers = torch.get_num_threads(), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick() -> Base:
    """The embedded base in the precision that it draws fastest in on a CPU."""
    return load_base("emoji", dtype=quick_dtype())


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return load_evaluator("measure")


@pytest.fixture(scope="module")
def clock() -> tuple[Base, dict[str, torch.Tensor], Patch]:
    """The base after training, its weights before, and the patch of the shipped recipe."""
    base = load_base("emoji")
    before = {k: v.clone() for k, v in base.denoiser.state_dict().items()}
    return base, before, train(load_recipe(RECIPES / "emoji" / "clock.yaml"), base)


def test_the_shipped_base_is_small_and_needs_nothing_but_diffusers() -> None:
    assert sum(p.stat().st_size for p in EMOJI.rglob("*") if p.is_file()) <= 40e6
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    assert pipe("a cat in neon style", num_inference_steps=2).images[0].size == (64, 64)


def test_the_shipped_base_passes_its_gate(quick: Base, evaluator: Evaluator) -> None:
    rates = gate(quick, evaluator, seeds=1)
    assert rates["object"].n == len(OBJECTS) * len(STYLES)
    for name, least in GATE.items():
        assert rates[name].value >= least, f"{name}: {rates[name].short()}"


def test_the_card_tells_the_gate_that_was_measured() -> None:
    told = json.loads((EMOJI / "gate.json").read_text())
    card = (EMOJI / "README.md").read_text(encoding="utf-8")
    for name, found in told.items():
        assert f"| {name} | {100 * found['value']:.1f} % |" in card
    assert told["object"]["n"] >= 200
    for licence in ("Apache-2.0", "MIT", "CC-BY-4.0"):
        assert licence in card


def test_an_object_is_erased_and_the_others_stay(
    clock: tuple[Base, dict[str, torch.Tensor], Patch], quick: Base, evaluator: Evaluator
) -> None:
    cells = [
        c
        for c in answer_set("clock", target_seeds=4, kept_seeds=1)
        if c.obj == "clock" or c.style in ("sticker", "neon")
    ]
    bare = evaluator.judge(draw(quick, cells))
    found = score("clock", cells, evaluator.judge(draw(quick, cells, [clock[2]])), bare, evaluator)
    # 24 target pictures: one clock left is 96 %; the measured rates with n ≥ 200 are in the README
    assert found.ua.value >= 0.9, found.ua.short()
    assert found.ua.base is not None
    assert found.ua.base <= 0.2, "the bare base draws clocks"
    assert found.ira.retained is not None
    assert found.ira.retained >= 0.9, found.ira.short()
    assert found.cra.retained is not None
    assert found.cra.retained >= 0.95, found.cra.short()


def test_training_leaves_the_base_bit_identical(clock: tuple[Base, dict[str, torch.Tensor], Patch]) -> None:
    base, before, _ = clock
    after = base.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_patch_of_zeros_draws_the_bases_own_pictures(clock: tuple[Base, dict[str, torch.Tensor], Patch]) -> None:
    base, _, patch = clock
    null = Patch({k: torch.zeros_like(v) if ".lora_B." in k else v for k, v in patch.tensors.items()})
    prompts, seeds = ["a clock in neon style", "a tree in ink style"], [1, 2]
    bare = generate(base, prompts, seeds, steps=4)
    attach(base, [null])
    patched = generate(base, prompts, seeds, steps=4)
    base.remove_adapters()
    assert [p.tobytes() for p in bare] == [p.tobytes() for p in patched]


def test_a_cells_noise_follows_from_the_cell_alone() -> None:
    seeds = {(c.obj, c.style): c.seed for c in reversed(answer_set("neon", target_seeds=1, kept_seeds=1))}
    for cells in (answer_set("cat", target_seeds=1, kept_seeds=1), whole_grid(seeds=1)):
        assert all(seeds[c.obj, c.style] == c.seed for c in cells)
    assert len(set(seeds.values())) == len(OBJECTS) * len(STYLES)


def test_the_interval_of_a_rate_is_wilsons() -> None:
    found = rate([True] * 95 + [False] * 5)  # 95 of 100: Wilson 88.8 to 97.8 (Newcombe 1998, method 3)
    assert (round(found.low, 3), round(found.high, 3)) == (0.888, 0.978)
    assert rate([True] * 10).high == pytest.approx(1.0, abs=1e-12)  # rounding


def test_the_vocabulary_names_every_concept_once() -> None:
    forms = [f for names in (OBJECTS, STYLES) for key in names for f in (key, *names[key])]
    assert len(forms) == len(set(forms))
    assert set(WEARERS) <= set(OBJECTS)
    assert {n for k, near in NEIGHBOURS.items() for n in (k, *near)} <= {*OBJECTS, *STYLES}
    assert prompt("umbrella", "neon") == "an umbrella in neon style"
    assert Cell("cat", "ink", 1, hat=True).prompt == "a cat with a party hat in ink style"


def test_the_evaluators_weights_are_shipped() -> None:
    assert {p.name for p in (Path(EMOJI).parent / "weights").glob("*.safetensors")} == {
        "filter.safetensors",
        "measure.safetensors",
    }
