"""Every family goes the same way: a recipe, a patch, plain diffusers, a stack, a merged pipeline; and a plan of all of it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call, RecipeOf, same, wake, weights_of
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import TINY, tiny_flux, tiny_pipeline
from torch import Tensor, nn

from esd_lora.bases import Base, base_of, load_base
from esd_lora.compose import attach, stack
from esd_lora.errors import PatchError, RecipeError
from esd_lora.fusing import fuse
from esd_lora.merging import merge
from esd_lora.patch import load_patch
from esd_lora.pictures import generate, step_noise
from esd_lora.plan import make_plan, step_bytes
from esd_lora.recipe import Recipe, make_recipe
from esd_lora.training import train
from esd_lora.trajectories import Question, record

NEW = [name for name in TINY if name != "sd"]
"""The families that the other tests do not use."""
SIDE = 32
"""Pixels along a side: 16 latents, as the tiny autoencoders halve the sides; a multiple of what every family needs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny pipeline of every family."""
    made = {name: tmp_path_factory.mktemp(name) for name in TINY}
    for name, folder in made.items():
        TINY[name]().save_pretrained(folder)
    return made


def recipe_of(folder: Path, **values: Any) -> Recipe:
    """A recipe that trains in a moment, so hard that pictures change."""
    short: dict[str, Any] = {"base": str(folder), "concepts": "cat", "preserve": ["", "dog"], "resolution": SIDE}
    short |= {"rank": 2, "steps": 4, "batch_size": 2, "trajectories": 1, "trajectory_steps": 3}
    return make_recipe({**short, "lr": 0.05, "max_grad_norm": 1e3, **values})


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a finished run on every family."""
    made = {}
    for name, folder in folders.items():
        made[name] = tmp_path_factory.mktemp(f"run-{name}") / "cat"
        train(recipe_of(folder), load_base(str(folder), device="cpu"), out=made[name])
    return made


def drawn(base: Base, prompt: str = "a cat") -> bytes:
    return generate(base, [prompt], [0], steps=3, resolution=SIDE)[0].tobytes()


def stock(folder: Path) -> Any:
    """The pipeline as anybody loads it."""
    return DiffusionPipeline.from_pretrained(folder)


def stock_drawn(pipe: Any) -> bytes:
    """What a pipeline draws from the noise that `drawn` starts from."""
    base = base_of(pipe)
    latents = base.packed(base.noise([0], resolution=SIDE))
    how = {"latents": latents, "height": SIDE, "width": SIDE, "num_inference_steps": 3, "guidance_scale": 7.5}
    picture: Image.Image = pipe(["a cat"], **how).images[0]
    return picture.tobytes()


# ---- patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEW)
def test_training_changes_pictures_and_not_the_base(family: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu")
    before, picture = weights_of(base), drawn(base)
    patch = train(recipe_of(folders[family]), base)
    assert same(weights_of(base), before)
    assert drawn(base) == picture
    attach(base, [patch])
    assert drawn(base) != picture
    base.remove_adapters()
    assert drawn(base) == picture


@pytest.mark.parametrize("family", NEW)
def test_the_teacher_is_the_base_bit_for_bit(family: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu")
    x, t = base.noise([0, 1], resolution=SIDE), torch.tensor([10.0, 900.0])
    condition = base.encode(["a cat", ""], resolution=SIDE, guidance_scale=3.0)
    bare = base.predict(x, t, condition)
    assert bare.shape == x.shape
    base.add_adapter(layers="full", rank=2)
    wake(base)
    assert not torch.allclose(base.predict(x, t, condition), bare)
    with base.teacher():
        assert torch.equal(base.predict(x, t, condition), bare)


@pytest.mark.parametrize("family", list(TINY))
def test_plain_diffusers_loads_the_patch(family: str, folders: dict[str, Path], runs: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu")
    attach(base, [load_patch(runs[family])])
    ours = drawn(base)
    pipe = stock(folders[family])
    pipe.set_progress_bar_config(disable=True)
    bare = stock_drawn(pipe)
    pipe.load_lora_weights(runs[family], weight_name="pytorch_lora_weights.safetensors")
    assert stock_drawn(pipe) == ours != bare


@pytest.mark.parametrize("family", NEW)
def test_patches_stack_fuse_and_merge(
    family: str, folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    base = load_base(str(folders[family]), device="cpu")
    cat = load_patch(runs[family])
    owl = train(recipe_of(folders[family], concepts="owl", layers="full", seed=1), base)
    attach(base, [cat, owl], [1.0, 0.5])
    x, t = base.noise([0], resolution=SIDE), torch.tensor([500.0])
    condition = base.encode(["a cat"], resolution=SIDE, guidance_scale=3.0)
    two = base.predict(x, t, condition)
    together = stack([cat, owl], [1.0, 0.5])
    attach(base, [together])
    torch.testing.assert_close(base.predict(x, t, condition), two, rtol=1e-4, atol=1e-4)  # float32, other sums
    base.remove_adapters()
    assert not torch.allclose(base.predict(x, t, condition), two, rtol=1e-2, atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = stock(merge(base, [cat, owl], [1.0, 0.5], out=tmp_path / "merged"))
    assert not any("lora" in name for name in getattr(merged, base.prefix).state_dict())
    plain = base_of(merged).predict(x, t, condition)
    torch.testing.assert_close(plain, two, rtol=1e-4, atol=1e-4)
    fused = fuse(base, [cat, owl], steps=2)
    assert fused.ranks.keys() == together.ranks.keys()
    assert all(torch.isfinite(v).all() for v in fused.tensors.values())


@pytest.mark.parametrize("family", NEW)
def test_a_patch_of_one_family_is_refused_by_another(
    family: str, folders: dict[str, Path], runs: dict[str, Path]
) -> None:
    base = load_base(str(folders["sd"]), device="cpu")
    with pytest.raises(
        PatchError, match=r"^the patch that erases cat \(made for .*\) (adapts|has) (unet|transformer)\."
    ):
        attach(base, [load_patch(runs[family])])


@pytest.mark.parametrize("family", list(TINY))
def test_the_commands_serve_every_family(family: str, folders: dict[str, Path], tmp_path: Path, call: Call) -> None:
    short = ["steps=2", "trajectories=1", "trajectory_steps=2", "preserve=[dog]", f"resolution={SIDE}"]
    given = ["--base", folders[family], "--erase", "cat", *(part for s in short for part in ("--set", s))]
    planned = call("plan", *given, "--json")
    trained = call("train", *given, "--out", "run", "--quiet", "--json")
    shown = call("show", "run", "--json")
    drawn = call(
        *("generate", "--base", folders[family], "--patch", "run", "--prompt", "a cat", "--out", "pictures"),
        *("--resolution", SIDE, "--steps", 2, "--quiet", "--json"),
    )
    merged = call("merge", "run", "--base", folders[family], "--out", "merged", "--json")
    for result in (planned, trained, shown, drawn, merged):
        assert result.code == 0, result.err
    assert json.loads(planned.out)["passes"]["total"] == json.loads(shown.out)["cost"]["forward_passes"]
    assert list((tmp_path / "pictures").rglob("*.png"))
    assert stock(tmp_path / "merged")


def test_a_patch_of_another_base_of_the_same_architecture_works_with_a_warning_that_names_both(
    folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    pipe = TINY["xl"]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    pipe.save_pretrained(tmp_path)
    tuned = load_base(str(tmp_path), device="cpu")
    bare = drawn(tuned)
    with pytest.warns(UserWarning, match="weights of .* differ") as caught:
        attach(tuned, [load_patch(runs["xl"])])
    assert all(str(folder) in str(caught[0].message) for folder in (folders["xl"], tmp_path))
    assert drawn(tuned) != bare


@pytest.mark.parametrize("family", list(TINY))
def test_a_second_base_shares_all_but_the_denoiser_and_leaves_it_as_it_is(family: str) -> None:
    pipe: Any = TINY[family]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float16)
    kept = next(pipe.text_encoder.parameters())
    kept.data = kept.data.float()  # as some of T5 stays in a pipeline of float16
    base = base_of(pipe)
    own, config = base.denoiser, dict(pipe.config)
    other = base.around(copy.deepcopy(own))
    assert (base.denoiser is own, other.denoiser is own) == (True, False)
    for name, part in pipe.components.items():
        assert (other.pipe.components[name] is part) == (name != base.prefix)
    assert (kept.dtype, base.dtype, other.dtype) == (torch.float32, torch.float16, torch.float16)
    assert dict(other.pipe.config) == config
    other.pipe.register_to_config(told="the second")
    other.pipe.scheduler = other.scheduler
    other.denoiser.register_forward_pre_hook(lambda *_: None)
    assert dict(pipe.config) == config
    assert pipe.scheduler is not other.pipe.scheduler
    assert not own._forward_pre_hooks


# ---- what the network is given ---------------------------------------------------------------------------------------


@contextmanager
def inputs_of(base: Base) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects what the denoiser is given inside: latents and timestep."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, t = (args[0], args[1]) if args else (kwargs["hidden_states"], kwargs["timestep"])
        seen.append((x.clone(), torch.as_tensor(t).float().flatten()[:1]))

    handle = base.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def consistency() -> Any:
    pipe = tiny_pipeline(guidance_size=16)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_more_steps_than_a_scheduler_takes_are_one_line(recipe_of: RecipeOf) -> None:
    base = base_of(consistency())
    with pytest.raises(RecipeError, match=r"^trajectory_steps: The length of the |^trajectory_steps: .*original"):
        train(recipe_of(trajectory_steps=60), base)
    with pytest.raises(RecipeError, match=r"^steps: "):
        generate(base, ["a cat"], [0], steps=60)


def with_scheduler(build: Callable[[], Any], scheduler: Any, **config: Any) -> Callable[[], Any]:
    def built() -> Any:
        pipe = build()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
        return pipe

    return built


def zero_snr() -> Any:
    pipe = tiny_pipeline(prediction_type="v_prediction")
    how = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **how)
    return pipe


LOOPS = {
    **TINY,
    "schnell": lambda: tiny_flux(guidance_embeds=False),
    "latent consistency": consistency,
    "zero terminal SNR": zero_snr,
    "xl, UniPC": with_scheduler(TINY["xl"], UniPCMultistepScheduler),
    "xl, DPM++ with Karras's sigmas": with_scheduler(TINY["xl"], DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "sd3, Heun": with_scheduler(TINY["sd3"], FlowMatchHeunDiscreteScheduler),
    "sd3, shifted by size": with_scheduler(TINY["sd3"], type(TINY["sd3"]().scheduler), use_dynamic_shifting=True),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_trajectories_are_those_of_the_pipelines_own_loop(loop: str) -> None:
    pipe = LOOPS[loop]()
    pipe.set_progress_bar_config(disable=True)
    base, steps, scale = base_of(pipe), 4, 5.0
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": steps, "guidance_scale": scale}
    latents = base.packed(base.noise([7], resolution=SIDE))
    with inputs_of(base) as theirs, torch.no_grad():
        pipe(["cat"], latents=latents, generator=step_noise([7]), output_type="latent", **size)
    conditions = base.encode(["", "cat"], resolution=SIDE, guidance_scale=scale)
    with inputs_of(base) as ours:
        question = Question(s=1, c=1, a=0, eta=1.0)
        bank, _ = record(base, conditions, [question], [7], steps=steps, guidance_scale=scale, resolution=SIDE)
    assert [t.tolist() for _, t in ours] == [t.tolist() for _, t in theirs]
    assert len(bank) == len(theirs)
    for mine, (x, _) in zip(bank.x, theirs, strict=True):
        # the pipeline asks for ∅ and the prompt in one order, the bank in the other: float32 sums differ in the last bits
        torch.testing.assert_close(base.packed(mine[None]), x[-1:], rtol=0, atol=2e-4)
    other, _ = record(base, conditions, [question], [8], steps=steps, guidance_scale=scale, resolution=SIDE)
    assert (other.x - bank.x).abs().max() > 0.1


@pytest.mark.parametrize("family", list(TINY))
def test_conditions_are_what_the_pipeline_gives_its_denoiser(family: str) -> None:
    pipe = TINY[family]()
    pipe.set_progress_bar_config(disable=True)
    base, given = base_of(pipe), []
    base.denoiser.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs), with_kwargs=True)
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "guidance_scale": 5.0}
    with torch.no_grad():
        pipe(["a cat"], latents=base.packed(base.noise([0], resolution=SIDE)), output_type="latent", **size)
    theirs = {**given[0], **(given[0].get("added_cond_kwargs") or {})}
    condition = base.encode(["", "a cat"], resolution=SIDE, guidance_scale=5.0)
    for name, mine in condition.tensors.items():
        rows = mine if len(theirs[name]) == 2 else mine[1:]  # FLUX is asked without ∅
        torch.testing.assert_close(rows, theirs[name].to(rows.dtype), rtol=0, atol=1e-6)
    blank = base.blank_condition(2)
    assert blank.tensors.keys() == condition.tensors.keys()
    for name, mine in condition.tensors.items():
        same_but_length = [a == b for a, b in zip(blank.tensors[name].shape, mine.shape, strict=True)]
        assert same_but_length.count(False) <= (name == "encoder_hidden_states")  # these tokenizers know 16 tokens
        assert blank.tensors[name].dtype == mine.dtype


def test_the_empty_prompt_of_sdxl_is_zeros_where_the_pipeline_says_so() -> None:
    base = base_of(TINY["xl"]())
    zeros = base.encode(["", "cat"]).tensors
    assert not zeros["encoder_hidden_states"][0].any()
    assert not zeros["text_embeds"][0].any()
    assert zeros["encoder_hidden_states"][1].all()
    base.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert base.encode(["", "cat"]).tensors["encoder_hidden_states"][0].any()
    assert base.encode([""], resolution=64).tensors["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert base.encode([""]).tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_a_network_that_is_told_the_guidance_scale_is_told_that_of_the_recipe() -> None:
    for pipe in (tiny_flux(), consistency()):
        base = base_of(pipe)
        low, high = (base.encode(["cat"], guidance_scale=g) for g in (1.5, 4.0))
        differ = [k for k in low.tensors if not torch.equal(low.tensors[k], high.tensors[k])]
        assert differ == [{"flux": "guidance", "stable-diffusion": "timestep_cond"}[base.family]]
        x, t = base.noise([0], resolution=SIDE), torch.tensor([500.0])
        assert not torch.equal(base.predict(x, t, low), base.predict(x, t, high))
    base = base_of(tiny_flux(guidance_embeds=False))
    assert set(base.encode(["cat"], guidance_scale=4.0).tensors) == {"encoder_hidden_states", "pooled_projections"}


def test_denoiser_and_encoders_take_turns_on_the_device(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(folders["sd3"]), device="cpu")
    base.device = torch.device("meta")  # stands for an accelerator: nothing but the moves is looked at
    names = {id(part): name for name, part in base.pipe.components.items()}
    moves: list[tuple[str, str]] = []
    monkeypatch.setattr(nn.Module, "to", lambda part, device: moves.append((names[id(part)], str(device))))
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    with base.encoders_alone():
        base.call_encoders()
        assert moves == [("transformer", "cpu"), *((e, "meta") for e in encoders)]
        moves.clear()
    assert set(moves[:-1]) == {(part, "cpu") for part in (*encoders, "vae")}
    assert moves[-1] == ("transformer", "meta")


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_text_states_of_sdxl_are_what_its_cross_attention_is_given() -> None:
    base = base_of(TINY["xl"]())
    prompts = ["a cat", "two small owls"]
    states = base.text_states(prompts, length=99)
    assert states.shape == (2, 16, 16 + 32)
    torch.testing.assert_close(states, base.encode(prompts).tensors["encoder_hidden_states"], rtol=0, atol=1e-6)
    # causal, but for the end of the text, which takes the place of the last token that is looked at
    torch.testing.assert_close(base.text_states(prompts, length=6)[:, :5], states[:, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["closed-form", "paper"])
def test_sdxl_has_closed_form_keys(objective: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders["xl"]), device="cpu")
    picture = drawn(base)
    patch = train(recipe_of(folders["xl"], keys="closed-form", objective=objective, lr=0.9, resolution=None), base)
    keys = [v for k, v in patch.tensors.items() if ".lora_A." in k]
    assert keys[0].shape == (2, 48)
    assert all(torch.equal(k, keys[0]) for k in keys)
    attach(base, [patch], [30.0])
    assert drawn(base) != picture


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention_has_no_closed_form_keys_and_says_so(family: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu")
    recipe = recipe_of(folders[family], keys="closed-form")
    for refuse in (lambda: train(recipe, base), lambda: make_plan(recipe)):
        with pytest.raises(RecipeError) as caught:
            refuse()
        assert str(caught.value) == (
            f"keys: closed-form needs cross-attention, and {folders[family]} ({base.family}) has none: words and picture "
            "pass through all its layers together; use keys: learned with objective: paper"
        )


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_resolution_that_makes_no_whole_tokens_is_refused(family: str, folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu")
    message = rf"^resolution: must be a multiple of 16 for .*{family}.*, got 40$"
    recipe = recipe_of(folders[family], resolution=40)
    for refuse in (
        lambda: train(recipe, base),
        lambda: make_plan(recipe),
        lambda: generate(base, ["a"], [0], resolution=40),
    ):
        with pytest.raises(RecipeError, match=message):
            refuse()


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "matched"),
    [
        ("xl", {"esd-x": 32, "esd-x-strict": 16, "esd-u": 32, "full": 64}),
        # two blocks: the words' q, k, v, and out of the first alone; the picture's four, and four of the second attention
        ("sd3", {"esd-x": 7, "esd-x-strict": 4, "esd-u": 12, "full": 19}),
        # one double block: four and four; two single blocks: q, k, v
        ("flux", {"esd-x": 4, "esd-x-strict": 2, "esd-u": 10, "full": 14}),
    ],
)
def test_presets_and_plans_of_a_folder(family: str, matched: dict[str, int], folders: dict[str, Path]) -> None:
    base = load_base(str(folders[family]), device="cpu")
    for layers, count in matched.items():
        plan = make_plan(recipe_of(folders[family], layers=layers, rank=1))
        assert plan.modules == len(base.matched(layers)) == count, layers  # type: ignore[arg-type]
        base.add_adapter(layers=layers, rank=1)  # type: ignore[arg-type]
        assert plan.adapter_parameters == sum(p.numel() for p in base.adapter_parameters())
        base.remove_adapters()
    assert (plan.family, plan.denoiser_parameters) == (base.family, sum(p.numel() for p in base.denoiser.parameters()))
    encoders = [v for k, v in base.pipe.components.items() if k.startswith("text_encoder")]
    assert plan.memory.encoders == 4 * sum(p.numel() for part in encoders for p in part.parameters())


@pytest.mark.parametrize("family", list(TINY))
def test_passes_are_those_that_the_trainer_counts(family: str, folders: dict[str, Path], runs: dict[str, Path]) -> None:
    planned = make_plan(recipe_of(folders[family]))
    told = json.loads(json.dumps(dict(load_patch(runs[family]).info)))
    assert told["cost"]["forward_passes"] == planned.passes.total


@pytest.mark.parametrize(("family", "student"), [("sd3", 2), ("flux", 1)])
def test_a_student_that_is_told_the_guidance_is_not_asked_for_the_empty_prompt(
    family: str, student: int, folders: dict[str, Path]
) -> None:
    recipe = recipe_of(folders[family], x_t="edited")
    planned = make_plan(recipe).passes
    assert planned.concepts == 3 * (2 + student)
    patch = train(recipe, load_base(str(folders[family]), device="cpu"))
    assert patch.info["cost"]["forward_passes"] == planned.total


@pytest.mark.parametrize("family", NEW)
def test_memory_on_meta_is_that_of_a_step_on_the_cpu(family: str) -> None:
    bases = []
    for device in ("meta", "cpu"):
        pipe: Any = TINY[family]()
        kind = type(base_of(pipe))
        getattr(pipe, kind.prefix).to(device)
        bases.append(kind(pipe, name=family, fingerprint="none"))
        bases[-1].add_adapter(layers="esd-x", rank=2)
    counted, stepped = (step_bytes(base, rows=2, resolution=SIDE) for base in bases)
    # tables of positions and sizes are made on the CPU and sent to the device, which `meta` counts once and the CPU not
    assert counted == pytest.approx(stepped, rel=0.01)
