"""Patches merged into weights: equal to base and patches, a plain pipeline on the disk, and never twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import same, weights_of
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open

from esd_lora.bases import Base, load_base
from esd_lora.compose import attach
from esd_lora.errors import BaseModelError, OutputError, PatchError
from esd_lora.merging import merge
from esd_lora.patch import Patch
from esd_lora.pictures import generate


def predictions(base: Base) -> torch.Tensor:
    """The denoiser's output for fixed inputs."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = base.encode(["a cat", "a dog", ""])
    with torch.no_grad():
        return base.predict(x, torch.tensor([10, 500, 900]), condition)


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_a_merged_pipeline_predicts_what_base_and_patch_do(
    base: Base, patch: Patch, tmp_path: Path, weight: float
) -> None:
    before = weights_of(base)
    bare = predictions(base)
    merged = load_base(str(merge(base, [patch], [weight], out=tmp_path / "merged")))
    assert same(weights_of(base), before)
    attach(base, [patch], [weight])
    together = predictions(base)
    # W x + B (A x) against (W + B A) x: a few roundings of float32 in each of a dozen layers
    torch.testing.assert_close(predictions(merged), together, rtol=1e-4, atol=1e-5)
    assert (together - bare).abs().max() > 1e-2


def test_it_is_a_plain_pipeline_without_a_trace_of_peft(base: Base, patch: Patch, tmp_path: Path) -> None:
    out = merge(base, [patch], out=tmp_path / "merged")
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert not hasattr(pipe.unet, "peft_config") or not pipe.unet.peft_config
    with safe_open(out / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(weights_of(base))
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| cat | 1.0 | `{patch.digest[:16]}` |" in card


def test_where_the_base_lies_on_this_machine_is_not_told(
    base: Base, patch: Patch, tiny_folder: Path, tmp_path: Path
) -> None:
    out = merge(base, [patch], out=tmp_path / "merged")
    texts = {p.name: p.read_text(encoding="utf-8") for p in out.rglob("*") if p.suffix in (".json", ".md")}
    assert {"model_index.json", "config.json", "esd_lora.json", "README.md"} <= texts.keys()
    assert not [name for name, text in texts.items() if str(tiny_folder.parent) in text]


def test_the_merged_denoiser_is_cast_once_and_the_other_parts_stay(base: Base, patch: Patch, tmp_path: Path) -> None:
    whole = load_base(str(merge(base, [patch], out=tmp_path / "whole")))
    half = load_base(str(merge(base, [patch], out=tmp_path / "half", dtype="fp16")))
    with safe_open(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        for name, weight in weights_of(whole).items():
            assert torch.equal(file.get_tensor(name), weight.half()), name
    assert same(half.pipe.text_encoder.state_dict(), base.pipe.text_encoder.state_dict())
    assert generate(half, ["cat"], [0], steps=2)[0].size == (16, 16)


def test_merging_leaves_the_other_parts_as_they_are(base: Base, patch: Patch, tmp_path: Path) -> None:
    """A pipeline may have its encoder in another type than its denoiser, which is the one that is merged."""
    base.pipe.text_encoder.half()
    merge(base, [patch], out=tmp_path / "merged")
    assert base.pipe.text_encoder.dtype == torch.float16
    with safe_open(tmp_path / "merged" / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_a_patch_is_merged_once(base: Base, patch: Patch, tmp_path: Path) -> None:
    once = load_base(str(merge(base, [patch], out=tmp_path / "once")))
    with pytest.warns(UserWarning, match="weights of .* differ"), pytest.raises(PatchError) as caught:
        merge(once, [patch], out=tmp_path / "twice")
    assert str(caught.value) == f"the patch that erases cat is in the weights of {once.name} already"
    assert not (tmp_path / "twice").exists()


def test_a_folder_that_is_taken_is_refused_and_left_alone(base: Base, patch: Patch, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        merge(base, [], out=taken)  # before anything else is looked at
    assert str(caught.value) == f"{taken}: not empty; choose another folder"
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]


def test_a_base_that_is_not_in_float32_is_refused(tiny_folder: Path, patch: Patch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the base is in torch\.bfloat16"):
        merge(load_base(str(tiny_folder), dtype="bf16"), [patch], out=tmp_path / "merged")


@pytest.mark.parametrize(
    "record", ["{", "[]", "{}", '{"merged": null}', '{"merged": [{}]}', '{"merged": [7]}', "[" * 10**5]
)
def test_a_record_that_is_none_is_named(base: Base, patch: Patch, tmp_path: Path, record: str) -> None:
    once = merge(base, [patch], out=tmp_path / "once")
    (once / "esd_lora.json").write_text(record)
    with pytest.warns(UserWarning, match="differ"), pytest.raises(BaseModelError, match=r"its esd_lora\.json is not"):
        merge(load_base(str(once)), [patch], out=tmp_path / "twice")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("No space left on device")],
    ids=["os", "safetensors"],
)
def test_a_disk_that_fills_up_leaves_nothing(
    base: Base, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(_: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        raise error

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    for out in (tmp_path / "merged", tmp_path / "a" / "b" / "c"):
        with pytest.raises(OutputError, match="cannot write: No space left on device"):
            merge(base, [patch], out=out)
        assert not list(tmp_path.iterdir())


def test_a_merged_pipeline_can_be_read_by_others(base: Base, patch: Patch, tmp_path: Path) -> None:
    out = merge(base, [patch], out=tmp_path / "a" / "merged")
    for path in (out, *out.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(
    base: Base, patch: Patch, tmp_path: Path
) -> None:
    with pytest.raises(
        PatchError, match=r"^unet\..*: not finite in fp16 with the patches in it; give them less weight$"
    ):
        merge(base, [patch], [1e8], out=tmp_path / "merged", dtype="fp16")
    assert not list(tmp_path.iterdir())
    assert merge(base, [patch], [1e8], out=tmp_path / "merged", dtype="bf16").is_dir()  # float32's range


def test_a_patch_of_weight_0_is_not_merged(base: Base, patch: Patch, tmp_path: Path) -> None:
    alien = replace(patch, tensors={k.replace("unet.", "dit."): v for k, v in patch.tensors.items()})
    out = merge(base, [alien, patch], [0.0, 1.0], out=tmp_path / "merged")
    (part,) = json.loads((out / "esd_lora.json").read_text())["merged"]
    assert (part["weight"], part["digest"]) == (1.0, patch.digest)
