"""On a CUDA device, where there is one: half precisions, channels-last and compiled, each as close to float32 as it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeOf, same, weights_of
from tiny import TINY

from esd_lora.bases import Base, load_base
from esd_lora.compose import attach
from esd_lora.merging import merge
from esd_lora.patch import load_patch
from esd_lora.pictures import generate
from esd_lora.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: GPU code paths are not tested"),
]


def changes(base: Base, recipe: Any) -> torch.Tensor:
    """ΔW of every layer, in one row: what training came to."""
    patch = train(recipe, base)
    pairs = [(patch.tensors[f"{n}.lora_B.weight"], patch.tensors[f"{n}.lora_A.weight"]) for n in patch.ranks]
    return torch.cat([(up.double() @ down.double()).flatten() for up, down in pairs])


@pytest.mark.parametrize(("dtype", "alike"), [("bf16", 0.9), ("fp16", 0.99)])
def test_half_precision_trains_to_nearly_the_same(
    dtype: str, alike: float, tiny_folder: Path, recipe_of: RecipeOf
) -> None:
    # bfloat16 has 8 bits of mantissa and float16 has 11: six steps of AdamW go much the same way, not exactly
    full = changes(load_base(str(tiny_folder), device="cuda"), recipe_of())
    base = load_base(str(tiny_folder), device="cuda", dtype=dtype)  # type: ignore[arg-type]
    before = weights_of(base)
    half = changes(base, recipe_of(dtype=dtype))
    assert torch.cosine_similarity(half, full, 0) > alike
    assert same(weights_of(base), before)


def test_the_cpu_and_the_device_train_the_same(tiny_folder: Path, recipe_of: RecipeOf) -> None:
    there, here = (changes(load_base(str(tiny_folder), device=d), recipe_of()) for d in ("cuda", "cpu"))
    assert torch.cosine_similarity(there, here, 0) > 0.999  # float32, TF32 off: rounding alone


@pytest.mark.parametrize("how", ["channels-last", "compiled"])
def test_channels_last_and_compiled_denoisers_train_the_same(how: str, tiny_folder: Path, recipe_of: RecipeOf) -> None:
    plain, other = (load_base(str(tiny_folder), device="cuda") for _ in range(2))
    if how == "compiled":
        other.denoiser.compile()
    else:
        other.denoiser.to(memory_format=torch.channels_last)
    assert torch.cosine_similarity(changes(other, recipe_of()), changes(plain, recipe_of()), 0) > 0.999


@pytest.mark.parametrize("family", TINY)
def test_every_family_trains_draws_and_merges_on_the_device(family: str, tmp_path: Path, recipe_of: RecipeOf) -> None:
    TINY[family]().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cuda")
    recipe = recipe_of(base=str(tmp_path / "base"), resolution=32, lr=0.05, max_grad_norm=1e3)
    train(recipe, base, out=tmp_path / "run")
    encoders = [p.device.type for k, v in base.pipe.components.items() if "encoder" in k for p in v.parameters()]
    assert set(encoders) == {"cpu"}  # they left the device to training
    bare = generate(base, ["a cat"], [0], steps=2, resolution=32)[0].tobytes()
    attach(base, [load_patch(tmp_path / "run")])
    assert generate(base, ["a cat"], [0], steps=2, resolution=32)[0].tobytes() != bare
    base.remove_adapters()
    assert merge(base, [load_patch(tmp_path / "run")], out=tmp_path / "merged").is_dir()
