"""`plan`: exact sizes of the true architectures, passes as the trainer counts them, memory as a CPU allocates it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tiny import save_tiny, tiny_pipeline
from torch.profiler import ProfilerActivity, profile

from esd_lora.bases import Base, load_base
from esd_lora.bases.facts import facts_of
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.errors import BaseModelError, RecipeError
from esd_lora.plan import count_passes, make_plan, step_bytes
from esd_lora.recipe import Recipe, make_recipe
from esd_lora.training import train

SD14 = "CompVis/stable-diffusion-v1-4"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "stabilityai/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35 = "stabilityai/stable-diffusion-3.5"
FLUX = "black-forest-labs/FLUX.1"


def recipe_of(base: object, **values: Any) -> Recipe:
    return make_recipe({"base": str(base), "concepts": "Van Gogh", "preserve": ["a dog"], **values})


@pytest.mark.parametrize(
    ("base", "layers", "modules", "per_rank"),
    [
        (SD14, "esd-x", 64, 99_456),
        (SD15, "esd-x-strict", 32, 49_536),
        (SD15, "esd-u", 64, 199_296 - 99_456),
        (SD15, "full", 128, 199_296),
        (SD21, "esd-x", 64, 107_648),
        (SDXL, "esd-x", 280, 785_920),
        (SDXL, "esd-x-strict", 140, 453_120),
        (SDXL, "full", 560, 1_451_520),
        # 24 blocks of q, k, v of the words, 1536 wide, and 23 of their out: the last block drops the words
        (SD3, "esd-x", 95, (3 * 24 + 23) * 2 * 1536),
        (SD3, "full", 191, (7 * 24 + 23) * 2 * 1536),
        (f"{SD35}-medium", "esd-u", 148, 4 * (24 + 13) * 2 * 1536),  # 13 blocks have a second self-attention
        (f"{SD35}-large", "esd-x-strict", 76, 2 * 38 * 2 * 2432),
        (f"{FLUX}-dev", "esd-x", 76, 4 * 19 * 2 * 3072),
        (f"{FLUX}-dev", "full", 266, (8 * 19 + 3 * 38) * 2 * 3072),
    ],
)
def test_layers_and_parameters_of_the_true_architectures(base: str, layers: str, modules: int, per_rank: int) -> None:
    plan = make_plan(recipe_of(base, layers=layers, rank=4, resolution=64))
    assert (plan.modules, plan.adapter_parameters, plan.patch_bytes) == (modules, 4 * per_rank, 16 * per_rank)


@pytest.mark.parametrize(
    ("base", "family", "parameters", "prediction_type", "resolution"),
    [
        (SD15, "stable-diffusion", 859_520_964, "epsilon", 512),
        (SD21, "stable-diffusion", 865_910_724, "v_prediction", 768),
        (f"{SD21}-base", "stable-diffusion", 865_910_724, "epsilon", 512),
        (SDXL, "stable-diffusion-xl", 2_567_463_684, "epsilon", 1024),
        (SD3, "stable-diffusion-3", 2_028_328_000, "flow", 1024),
        (f"{SD35}-large", "stable-diffusion-3", 8_056_627_520, "flow", 1024),
        (f"{FLUX}-dev", "flux", 11_901_408_320, "flow", 1024),
        (f"{FLUX}-schnell", "flux", 11_891_178_560, "flow", 1024),
    ],
)
def test_known_bases(base: str, family: str, parameters: int, prediction_type: str, resolution: int) -> None:
    plan = make_plan(recipe_of(base, layers="esd-x-strict", dtype="fp16", batch_size=1))
    assert (plan.family, plan.denoiser_parameters) == (family, parameters)
    assert (plan.prediction_type, plan.resolution) == (prediction_type, resolution)
    assert plan.memory.weights == 2 * parameters
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()


def test_passes_worked_by_hand() -> None:
    settings = {"trajectories": 3, "trajectory_steps": 10, "steps": 50, "batch_size": 4}
    # 3 × 10 × {c, ∅}; 10 × {p}, without guidance; 24 examples of the 30, twice; 50 × (4 + 4) × 3
    passes = count_passes(recipe_of(SD15, **settings))
    assert (passes.concepts, passes.preservation, passes.aiming, passes.training) == (60, 10, 48, 1200)
    assert passes.total == 1318
    assert passes.per_example == 1318 / 200
    assert passes.authors_ratio == 56 * 200 / 1318
    passes = count_passes(recipe_of(SD15, **settings, preserve=[str(i) for i in range(40)]))
    assert passes.preservation == 5 * 40  # 50 × 4 examples are used: 5 of each prompt, not 10
    passes = count_passes(recipe_of(SD15, **settings, preserve_weight=0))
    assert (passes.concepts, passes.preservation, passes.training) == (60, 0, 600)


@pytest.mark.parametrize(
    ("concept", "how", "concepts"),
    [
        ({"erase": "cat", "replace_with": "dog"}, {}, 3),  # c, ∅, a
        ({"erase": "hat", "from": "cowboy"}, {}, 3),  # s = a, ∅, c
        ({"erase": "hat", "from": "cowboy", "replace_with": "man"}, {}, 4),  # s, ∅, c, a
        ({"erase": "cat"}, {}, 2),  # and two of each of the bank's six examples
        ({"erase": "cat"}, {"init": "random"}, 2),
        ({"erase": "cat"}, {"x_t": "edited"}, 3 * (2 + 2)),  # teacher and student, at steps 0, 2 and 4
        ({"erase": "hat", "from": "cowboy"}, {"x_t": "edited"}, 3 * (3 + 2)),
        ({"erase": "cat", "replace_with": "dog"}, {"guidance_scale": 1}, 3),  # η asks for ∅
        ({"erase": "cat", "replace_with": "dog"}, {"guidance_scale": 1, "x_t": "edited"}, 3 * (3 + 1)),
        ({"erase": "cat", "replace_with": "dog"}, {"guidance_scale": 1, "eta": 0}, 2),  # c, a
        ({"erase": "cat", "replace_with": "dog"}, {"guidance_scale": 1, "eta": 0, "x_t": "edited"}, 3 * (2 + 1)),
    ],
)
def test_passes_are_those_that_the_trainer_counts(
    concept: dict[str, str], how: dict[str, Any], concepts: int, tmp_path: Path
) -> None:
    recipe = recipe_of(
        save_tiny(tmp_path),
        concepts=concept,
        preserve=["", "a dog"],
        **how,
        refresh_every=2,
        steps=5,
        trajectories=2,
        trajectory_steps=3,
        batch_size=2,
    )
    passes = count_passes(recipe)
    assert passes.concepts == 2 * 3 * concepts
    patch = train(recipe, load_base(recipe.base, device="cpu"))
    assert passes.total == patch.info["cost"]["forward_passes"]


def test_a_scheduler_that_takes_a_step_more_is_counted(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.save_pretrained(tmp_path)
    recipe = recipe_of(str(tmp_path), preserve=["a dog"], steps=5, trajectories=2, trajectory_steps=6, batch_size=2)
    passes = make_plan(recipe).passes
    assert passes.concepts == 2 * (6 + 1) * 2
    assert passes.total == train(recipe, load_base(recipe.base, device="cpu")).info["cost"]["forward_passes"]
    assert make_plan(recipe_of(SD15, trajectories=1, trajectory_steps=20)).passes.concepts == 21 * 2


def test_a_closed_form_costs_no_passes_and_trains_nothing() -> None:
    plan = make_plan(recipe_of(SD15, objective="closed-form"))
    assert (plan.passes.total, plan.passes.authors_ratio) == (0, None)
    assert (plan.memory.activations, plan.memory.optimizer, plan.memory.adapters) == (0, 0, plan.patch_bytes)


def test_frozen_keys_have_no_moments() -> None:
    how = {"layers": "esd-x-strict", "objective": "paper", "rank": 4}
    learned, keyed = (make_plan(recipe_of(SD15, keys=k, **how)) for k in ("learned", "closed-form"))
    assert keyed.patch_bytes == learned.patch_bytes
    # SD 1.5: 16 cross-attention layers, k and v of 768 inputs each; Adam's two moments of the keys are gone
    frozen = 2 * 16 * 768 * 4
    assert learned.memory.optimizer - keyed.memory.optimizer == 2 * 4 * frozen


def test_where_all_keys_are_frozen_no_pass_looks_for_directions(tmp_path: Path) -> None:
    how: dict[str, Any] = {"keys": "closed-form", "objective": "paper", "concepts": "cat", "steps": 2, "batch_size": 2}
    how |= {"trajectories": 1, "trajectory_steps": 3, "rank": 2}
    folder = save_tiny(tmp_path)
    strict, more = (recipe_of(folder, layers=layers, **how) for layers in ("esd-x-strict", "esd-x"))
    assert [count_passes(recipe).aiming for recipe in (strict, more)] == [0, 2 * 3]
    for recipe in (strict, more):
        patch = train(recipe, load_base(recipe.base, device="cpu"))
        assert patch.info["cost"]["forward_passes"] == count_passes(recipe).total


def test_default_preserve_list_is_counted() -> None:
    assert count_passes(recipe_of(SD15, preserve=None)).preservation > 20 * 4


def adapted(device: str) -> Base:
    pipe = tiny_pipeline()
    pipe.unet.to(device)
    base = StableDiffusionBase(pipe, name="tiny", fingerprint="none")
    base.add_adapter(layers="esd-x", rank=2)
    return base


def allocated(unet: Any, *, rows: int, side: int) -> int:
    """The most bytes that the CPU's allocator held at once in a forward and a backward pass, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        x, words = torch.zeros(rows, 4, side, side), torch.zeros(rows, 77, 32)
        unet(x, torch.zeros(rows, dtype=torch.long), words, return_dict=False)[0].square().mean().backward()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("checkpointing", "tolerance"), [(False, 0.001), (True, 0.1)])
def test_memory_on_meta_is_what_the_cpu_allocates(checkpointing: bool, tolerance: float) -> None:
    counted = step_bytes(adapted("meta"), rows=4, resolution=64, checkpointing=checkpointing)
    base = adapted("cpu")
    assert counted == step_bytes(base, rows=4, resolution=64, checkpointing=checkpointing)
    base.denoiser.zero_grad()
    assert counted == pytest.approx(allocated(base.denoiser, rows=4, side=32), rel=tolerance)


def test_memory_follows_batch_and_checkpointing() -> None:
    settings = {"preserve_weight": 0, "resolution": 128}
    one, four = (make_plan(recipe_of(SD15, batch_size=b, **settings)).memory for b in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations, rel=0.05)
    kept = make_plan(recipe_of(SD15, batch_size=4, gradient_checkpointing=True, **settings)).memory
    assert kept.activations < four.activations / 2
    assert four.weights == 4 * 859_520_964
    assert four.adapters == 4 * 4 * 99_456
    assert four.optimizer == 2 * four.adapters
    assert four.peak == max(four.encoders, four.weights + 3 * four.adapters + four.activations)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_with_checkpointing(dtype: str) -> None:
    settings = {"dtype": dtype, "resolution": 64, "batch_size": 1}
    plain, kept = (make_plan(recipe_of(SD15, gradient_checkpointing=c, **settings)).memory for c in (False, True))
    assert kept.activations < plain.activations


def test_folder(tmp_path: Path) -> None:
    pipe = tiny_pipeline(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    facts = facts_of(str(tmp_path))
    assert (facts.pipeline, facts.prediction_type) == ("StableDiffusionPipeline", "v_prediction")
    assert facts.vae_scale_factor == 2
    assert facts.text_encoder_parameters == sum(p.numel() for p in pipe.text_encoder.parameters())
    plan = make_plan(recipe_of(tmp_path))
    assert plan.resolution == 16
    base = load_base(str(tmp_path), device="cpu")
    assert plan.modules == len(base.matched("esd-x"))


def test_errors_of_folders(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="nowhere"):
        make_plan(recipe_of("./nowhere"))
    folder = save_tiny(tmp_path / "base")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"cannot read unet/config\.json: No such file") as caught:
        make_plan(recipe_of(folder))
    assert "\n" not in str(caught.value)
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="does not say what its unet is"):
        make_plan(recipe_of(folder))


def test_errors_of_configs(tmp_path: Path) -> None:
    config = save_tiny(tmp_path) / "unet" / "config.json"
    sound = json.loads(config.read_text())
    for wrong in ({"down_block_types": ["NoSuchBlock"]}, {"norm_num_groups": 0}):
        config.write_text(json.dumps(sound | wrong))
        with pytest.raises(BaseModelError, match="cannot be built from its config"):
            make_plan(recipe_of(tmp_path))
    config.write_text("{")
    with pytest.raises(BaseModelError, match=r"cannot read unet/config\.json"):
        make_plan(recipe_of(tmp_path))


def test_errors_of_layers_and_rank(tmp_path: Path) -> None:
    tiny_pipeline(cross_attention=False).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"match nothing.*no attention"):
        make_plan(recipe_of(tmp_path))
    with pytest.raises(RecipeError, match="rank"):
        recipe_of(SD15, rank=0)
    with pytest.raises(RecipeError, match="at most 320"):
        make_plan(recipe_of(SD15, rank=321))


@pytest.mark.parametrize(
    "error",
    [EntryNotFoundError("404: no such entry\nUrl: …"), LocalEntryNotFoundError("offline"), ConnectionError("no route")],
)
def test_hub_id(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path)
    asked: list[str] = []

    def download(name: str, file: str, *, revision: str | None) -> str:
        asked.append(file)
        if revision == "gone":
            raise error
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert make_plan(recipe_of("someone/tiny")).modules == 16
    assert all(file.endswith(".json") for file in asked)  # configs, never weights
    with pytest.raises(BaseModelError, match=r"^someone/tiny: ") as caught:
        make_plan(recipe_of("someone/tiny", revision="gone"))
    assert "\n" not in str(caught.value)
