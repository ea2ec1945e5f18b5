"""Other programs' names: right for the true Stable Diffusion 1.5, 2.1 and SDXL, and back again bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call, same
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from esd_lora.bases.facts import facts_of
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.compose import stack
from esd_lora.errors import BaseModelError, PatchError
from esd_lora.exporting import architecture_of, export, import_lora, layers_of
from esd_lora.patch import FILE_NAME, Patch, load_patch

SD15, SD21, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
BASES = pytest.mark.parametrize("base", [SD15, SD21, SDXL])


def plain_layers(base: str) -> dict[str, tuple[int, int]]:
    """The layers of a base without the denoiser's prefix."""
    return {n.split(".", 1)[1]: shape for n, shape in layers_of(base).items()}


def patch_for(base: str, layers: str = "full", **info: Any) -> Patch:
    """A random patch for all of a preset's layers of a base at its true size, of ranks 1 and 2 by turns."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    chosen = [(n, s) for n, s in plain_layers(base).items() if re.fullmatch(StableDiffusionBase.layers[layers], n)]  # type: ignore[index]
    for k, (name, (out, into)) in enumerate(chosen):
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(1 + k % 2, into, generator=generator)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(out, 1 + k % 2, generator=generator)
    return Patch(dict(sorted(tensors.items())), {"base": {"name": base}, "schema": 1, **info})


# ---- what the programs read: tables made by their own rules --------------------------------------------------------


def sgm_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' names of the attention blocks → their names in Stability's UNet, counted as it builds itself.

    UNetModel of sgm/modules/diffusionmodules/openaimodel.py (Stability-AI/generative-models, MIT): input_blocks[0] is the
    convolution; each level appends a block for each of its resnets, with the transformer second in it, and then, but for the
    last level, a block with the downsampler. output_blocks has one block more at each level, the upsampler inside the last.
    """
    names, count = {"mid_block.attentions.0": "middle_block.1"}, 1
    for level, kind in enumerate(config["down_block_types"]):
        for i in range(config["layers_per_block"]):
            if kind.startswith("CrossAttn"):
                names[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{count}.1"
            count += 1
        count += level < len(config["down_block_types"]) - 1
    count = 0
    for level, kind in enumerate(config["up_block_types"]):
        for i in range(config["layers_per_block"] + 1):
            if kind.startswith("CrossAttn"):
                names[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{count}.1"
            count += 1
    return names


def sgm_layers(base: str) -> dict[str, str]:
    """The attention blocks' linear layers by Stability's names → diffusers' names."""
    blocks = sgm_modules(facts_of(base).denoiser)
    found = {}
    for name in plain_layers(base):
        block = ".".join(name.split(".")[: 3 if name.startswith("mid") else 4])
        if block in blocks:
            found[name.replace(block, blocks[block])] = name
    return found


def kohya_reads(base: str) -> dict[str, str]:
    """Names in a file of sd-scripts → diffusers' names.

    create_modules in networks/lora.py (kohya-ss/sd-scripts, Apache-2.0): prefix, module and child, joined by underscores. Its
    UNet for SD 1 and 2 (library/original_unet.py) has diffusers' names, that for SDXL (library/sdxl_original_unet.py)
    Stability's.
    """
    modules = sgm_layers(base) if base == SDXL else {n: n for n in plain_layers(base)}
    return {"lora_unet_" + k.replace(".", "_"): v for k, v in modules.items()}


def comfyui_reads(base: str) -> dict[str, str]:
    """As above, of ComfyUI: model_lora_keys_unet in comfy/lora.py (comfyanonymous/ComfyUI) takes the names of its own UNet,
    which are Stability's, and diffusers', both joined by underscores, for every model."""
    own = {"lora_unet_" + k.replace(".", "_"): v for k, v in sgm_layers(base).items()}
    return own | {"lora_unet_" + n.replace(".", "_"): n for n in plain_layers(base)}


def a1111_reads(base: str) -> dict[str, str]:
    """As above, of A1111: convert_diffusers_name_to_compvis in extensions-builtin/Lora/networks.py
    (AUTOMATIC1111/stable-diffusion-webui) does arithmetic on diffusers' names, and what has no module then is taken for
    Stability's own name."""
    modules = {"diffusion_model_" + k.replace(".", "_"): v for k, v in sgm_layers(base).items()}
    table = {k.replace("diffusion_model_", "lora_unet_"): v for k, v in modules.items()}
    for name in (n.replace(".", "_") for n in plain_layers(base)):
        if m := re.match(r"down_blocks_(\d+)_attentions_(\d+)_(.+)", name):
            key = f"diffusion_model_input_blocks_{1 + int(m[1]) * 3 + int(m[2])}_1_{m[3]}"
        elif m := re.match(r"mid_block_attentions_(\d+)_(.+)", name):
            key = f"diffusion_model_middle_block_1_{m[2]}"
        elif m := re.match(r"up_blocks_(\d+)_attentions_(\d+)_(.+)", name):
            key = f"diffusion_model_output_blocks_{int(m[1]) * 3 + int(m[2])}_1_{m[3]}"
        else:
            continue
        table["lora_unet_" + name] = modules[key]
    return table


@pytest.mark.parametrize("reads", [kohya_reads, comfyui_reads, a1111_reads])
@BASES
def test_every_name_is_one_that_the_program_reads_as_the_same_layer(base: str, reads: Any, tmp_path: Path) -> None:
    patch = patch_for(base)
    written = load_file(export(patch, tmp_path / "lora.safetensors"))
    table = reads(base)
    assert len(written) == 3 * len(patch.ranks)
    for module, rank in patch.ranks.items():
        (name,) = [k for k, v in table.items() if f"unet.{v}" == module and f"{k}.alpha" in written]
        assert torch.equal(written[f"{name}.lora_down.weight"], patch.tensors[f"{module}.lora_A.weight"])
        assert torch.equal(written[f"{name}.lora_up.weight"], patch.tensors[f"{module}.lora_B.weight"])
        assert written[f"{name}.alpha"].dtype == torch.float32
        assert written[f"{name}.alpha"].item() == rank  # scale 1, whether alpha is read or not


def test_the_tables_know_names_that_files_in_use_have() -> None:
    assert kohya_reads(SD15)["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"]
    down, up = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", "lora_unet_output_blocks_5_1_proj_in"
    assert kohya_reads(SDXL)[down] == "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    assert kohya_reads(SDXL)[up] == "up_blocks.1.attentions.2.proj_in"


@pytest.mark.parametrize(
    ("base", "version", "v2"),
    [(SD15, "sd_v1", "False"), (SD21, "sd_v2", "True"), (SDXL, "sdxl_base_v1-0", "False")],
)
def test_the_header_tells_a1111_which_models_have_it(base: str, version: str, v2: str, tmp_path: Path) -> None:
    # detect_version in A1111's extensions-builtin/Lora/network.py: SDXL by "sdxl_", SD 2 by ss_v2 "True", else SD 1
    with safe_open(export(patch_for(base, "esd-x-strict"), tmp_path / "x.safetensors"), framework="pt") as file:
        told = file.metadata()
    assert (told["ss_base_model_version"], told["ss_v2"]) == (version, v2)
    assert (told["ss_network_module"], told["ss_network_dim"], told["ss_network_alpha"]) == (
        "networks.lora",
        "2",
        "2.0",
    )


def test_self_attention_that_two_versions_have_is_told_by_its_base() -> None:
    here = "of/no one but a folder here"  # which has no revisions, as what the patch was made for on the Hub has
    Path(here).mkdir(parents=True)
    for base, version in ((SD15, "sd_v1"), (SD21, "sd_v2"), ("of/no one knows", "sd_v1"), (here, "sd_v1")):
        patch = patch_for(SD21, "esd-u") if base == SD21 else patch_for(SD15, "esd-u")
        built = architecture_of(
            replace(patch, info={"base": {"name": base, "revision": "main" if base == here else None}})
        )
        assert built is not None
        assert built.version == version


# ---- and back --------------------------------------------------------------------------------------------------------


@BASES
def test_out_and_back_is_the_same_patch_bit_for_bit(base: str, tmp_path: Path) -> None:
    patch = patch_for(base, recipe={"concepts": [{"erase": "cat", "from": None, "replace_with": None, "synonyms": []}]})
    again, left_out = import_lora(export(patch, tmp_path / "a.safetensors"), base)
    assert same(again.tensors, patch.tensors)
    assert (again.info, left_out) == (patch.info, [])
    assert again.save(tmp_path / "b").read_bytes() == patch.save(tmp_path / "c").read_bytes()
    assert export(again, tmp_path / "d.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@BASES
def test_diffusers_reads_the_same_tensors(base: str, tmp_path: Path) -> None:
    patch = patch_for(base)
    pipeline = StableDiffusionXLPipeline if base == SDXL else StableDiffusionPipeline
    file = export(patch, tmp_path / "lora.safetensors")
    state, alphas = pipeline.lora_state_dict(str(file), unet_config=meta_unet(base).config)
    theirs = {f"unet.{k.removeprefix('unet.')}": v for k, v in convert_unet_state_dict_to_peft(state).items()}
    assert same({k: theirs[k] for k in sorted(theirs)}, patch.tensors)
    assert sorted(alphas.values()) == sorted(map(float, patch.ranks.values()))


def meta_unet(base: str) -> Any:
    """The UNet with shapes and no weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(facts_of(base).denoiser)


# ---- files of other programs -----------------------------------------------------------------------------------------

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
DOWN, UP = torch.randn(4, 32), torch.randn(32, 4)


def delta(patch: Patch, layer: str = LAYER) -> Tensor:
    """ΔW of a layer."""
    return patch.tensors[f"unet.{layer}.lora_B.weight"] @ patch.tensors[f"unet.{layer}.lora_A.weight"]


def kohya(**more: Tensor) -> dict[str, Tensor]:
    """A file of one layer of the tiny base, as kohya's, LECO's and sliders' trainers write it."""
    return {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP, **more}


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (kohya(**{f"{KOHYA}.alpha": torch.tensor(1.0)}), 0.25),  # LECO's and the sliders' default: rank 4, alpha 1
        (kohya(**{f"{KOHYA}.alpha": torch.tensor(2.0, dtype=torch.float16)}), 0.5),
        (kohya(**{f"{KOHYA}.alpha": torch.tensor(8)}), 2.0),  # diffusers' converter writes integers
        (kohya(), 1.0),
        ({f"unet.{LAYER}.lora_A.weight": DOWN, f"unet.{LAYER}.lora_B.weight": UP}, 1.0),
        ({f"unet.{LAYER}.lora.down.weight": DOWN, f"unet.{LAYER}.lora.up.weight": UP}, 1.0),
        ({f"{LAYER}.lora_A.default.weight": DOWN, f"{LAYER}.lora_B.default.weight": UP}, 1.0),
        (
            {
                f"unet.{LAYER.replace('to_k', 'processor.to_k')}_lora.down.weight": DOWN,
                f"unet.{LAYER.replace('to_k', 'processor.to_k')}_lora.up.weight": UP,
            },
            1.0,
        ),
    ],
    ids=["leco", "half", "integer", "no alpha", "diffusers", "lora.down", "peft's state", "processors"],
)
def test_other_programs_files_are_read_with_their_alpha(
    names: dict[str, Tensor], scale: float, tiny_folder: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.safetensors"
    save_file(names, theirs)
    patch, left_out = import_lora(theirs, str(tiny_folder), erase=["cat", "dog"])
    assert left_out == []
    assert torch.equal(delta(patch), (UP * scale) @ DOWN)  # a power of two costs no rounding
    assert torch.equal(patch.tensors[f"unet.{LAYER}.lora_A.weight"], DOWN)
    assert (patch.erases, patch.info["imported"]) == ("cat, dog", "theirs.safetensors")
    assert patch.info["base"] == {"name": str(tiny_folder), "revision": None}  # a folder has none
    assert same(load_patch(patch.save(tmp_path / "ours")).tensors, patch.tensors)


def test_sdxl_files_in_stabilitys_naming_are_read(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, 2048), f"{name}.lora_up.weight": torch.ones(640, 1)},
        "xl.safetensors",
    )
    patch, _ = import_lora(Path("xl.safetensors"), SDXL)
    assert list(patch.ranks) == ["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"]


@pytest.mark.parametrize(
    "config", [{"lora_alpha": 6}, {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"attn2.to_k": 2}}]
)
def test_what_peft_saves_is_read_with_the_alpha_of_its_config(
    config: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    made = get_peft_model(
        unet, LoraConfig(r=4, target_modules=["attn2.to_k", "to_out.0"], init_lora_weights=False, **config)
    )
    made.save_pretrained(tmp_path / "theirs")
    patch, _ = import_lora(tmp_path / "theirs" / "adapter_model.safetensors", str(tiny_folder))
    layers = {n: m for n, m in made.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) == len(patch.ranks) > 2
    for name, module in layers.items():
        # the scale is on B here and on B A there: a rounding of float32
        torch.testing.assert_close(
            delta(patch, name), module.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6
        )


def test_what_diffusers_saves_without_a_prefix_is_read_with_its_metadata(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["attn2.to_k"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    patch, _ = import_lora(tmp_path / "pytorch_lora_weights.safetensors", str(tiny_folder))
    theirs = unet.get_submodule(LAYER).get_delta_weight("default").detach()
    torch.testing.assert_close(delta(patch), theirs, rtol=1e-5, atol=1e-6)  # a rounding, as above


TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
CONV = "lora_unet_mid_block_attentions_0_proj_in"
BEYOND = {
    f"{TEXT}.lora_down.weight": torch.ones(4, 32),
    f"{TEXT}.lora_up.weight": torch.ones(32, 4),
    f"{TEXT}.alpha": torch.tensor(4.0),
    f"{CONV}.lora_down.weight": torch.ones(4, 32, 1, 1),
    f"{CONV}.lora_up.weight": torch.ones(32, 4, 1, 1),
}


def test_layers_that_a_patch_does_not_hold_are_refused_or_left_out_as_asked(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(kohya(**BEYOND), file)
    with pytest.raises(PatchError) as caught:
        import_lora(file, str(tiny_folder))
    assert str(caught.value) == (
        f"{file}: adapts 2 layers that a patch does not hold, first {TEXT} (text encoder); without them it would be another "
        "LoRA; --partial imports the rest"
    )
    patch, left_out = import_lora(file, str(tiny_folder), partial=True)
    assert (list(patch.ranks), left_out) == ([f"unet.{LAYER}"], [TEXT, CONV])
    save_file(BEYOND, file)
    with pytest.raises(PatchError, match=r"first .* \(text encoder\); there are no others$"):
        import_lora(file, str(tiny_folder))
    with pytest.raises(PatchError, match=f": none of its layers is one of {re.escape(str(tiny_folder))}$"):
        import_lora(file, str(tiny_folder), partial=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {f"{KOHYA}.dora_scale": torch.ones(32)},
            f"{KOHYA}.dora_scale is neither a LoRA factor nor an alpha (DoRA, LoHa",
        ),
        ({f"{KOHYA}.hada_w1_a": torch.ones(32, 4)}, f"{KOHYA}.hada_w1_a is neither a LoRA factor nor an alpha"),
        ({"lora_unet_x.lora_up.weight": UP}, "lora_unet_x.lora_up.weight lacks a factor of its layer"),
        ({f"{KOHYA}.alpha": torch.ones(2)}, f"{KOHYA}.alpha is not a number"),
        ({f"{KOHYA}.alpha": torch.tensor(torch.nan)}, f"{KOHYA}.alpha is not a number"),
        (
            {f"unet.{LAYER}.lora_A.weight": DOWN},
            f"unet.{LAYER}.lora_A.weight comes twice, as {KOHYA}.lora_down.weight too",
        ),
        ({f"{KOHYA}.lora_up.weight": UP.int()}, f"{KOHYA}.lora_down.weight has no values that a factor can have"),
        (
            {f"{KOHYA}.lora_up.weight": UP[:, :3]},
            f"{KOHYA}.lora_down.weight and its partner are (4, 32) and (32, 3); in the base",
        ),
        (
            {f"{KOHYA}.lora_up.weight": UP[:16]},
            f"{KOHYA}.lora_down.weight and its partner are (4, 32) and (16, 4); in the base",
        ),
        ({f"{KOHYA}.lora_up.weight": UP / 0}, f"unet.{LAYER}.lora_B.weight has values that are not finite"),
    ],
    ids=lambda v: v.split(" ")[0] if isinstance(v, str) else "",
)
def test_what_cannot_be_imported_is_refused_in_one_line(
    names: dict[str, Tensor], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({k: v.clone() for k, v in kohya(**names).items()}, file)
    with pytest.raises(PatchError) as caught:
        import_lora(file, str(tiny_folder))
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_base_are_named(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"^none\.safetensors: no such file; name the \.safetensors file"):
        import_lora(Path("none.safetensors"), "emoji")
    with pytest.raises(PatchError, match=r": is a folder; name the \.safetensors file in it$"):
        import_lora(tmp_path, "emoji")
    save_file(kohya(), "lora.safetensors")
    with pytest.raises(BaseModelError, match=r"^nowhere: neither"):
        import_lora(Path("lora.safetensors"), "nowhere")
    with pytest.raises(
        BaseModelError, match=r"^emoji: has no revisions, as a base on the Hub has; leave revision v2 out$"
    ):
        import_lora(Path("lora.safetensors"), "emoji", revision="v2")


def test_a_patch_of_a_base_that_they_do_not_load_is_written_with_a_warning(patch: Patch, tiny_folder: Path) -> None:
    assert architecture_of(patch) is None
    with pytest.warns(UserWarning, match="fits neither Stable Diffusion 1, 2 nor SDXL"):
        file = export(patch, Path("tiny.safetensors"))
    again, _ = import_lora(file, str(tiny_folder))
    assert same(again.tensors, patch.tensors)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(str(file), adapter_name="a")
    theirs = {n: m for n, m in pipe.unet.named_modules() if hasattr(m, "get_delta_weight")}
    for name in (n.removeprefix("unet.") for n in patch.ranks):
        assert torch.equal(theirs[name].get_delta_weight("a"), delta(patch, name))


def test_what_has_no_name_there_is_refused(tmp_path: Path) -> None:
    other = Patch({k.replace("unet.", "transformer."): v for k, v in patch_for(SD15, "esd-x-strict").tensors.items()})
    with pytest.raises(PatchError, match="adapts a transformer; kohya's names are known for a UNet alone"):
        export(other, tmp_path / "x.safetensors")
    name = "unet.add_embedding.linear_1"
    embedding = {f"{name}.lora_A.weight": torch.ones(1, 2816), f"{name}.lora_B.weight": torch.ones(1280, 1)}
    with pytest.raises(PatchError, match=f"^{name}: kohya has no name for it in SDXL$"):
        export(Patch(embedding), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_stack_tells_what_it_erases_itself(patch: Patch, tiny_folder: Path) -> None:
    with pytest.warns(UserWarning, match="fits neither"):
        file = export(stack([patch]), Path("both.safetensors"))
    with pytest.raises(PatchError, match=r"a stack, which tells what each of its parts erases; leave --erase out$"):
        import_lora(file, str(tiny_folder), erase=["dog"])
    assert import_lora(file, str(tiny_folder))[0].info["stack"]


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_a_patch_goes_out_and_comes_back_on_the_command_line(
    call: Call,
    tmp_path: Path,
) -> None:
    patch_for(SD15, "esd-x-strict").save(tmp_path / "cat")
    out = call("export", "cat", "--to", "comfyui", "--out", "cat.safetensors", "--json")
    assert (out.code, json.loads(out.out)["layers"]) == (0, 32)
    assert out.err == "next: put it into ComfyUI's models/loras, and load it with a strength of 1\n"
    back = call("import", "cat.safetensors", "--base", SD15, "--out", "again", "--erase", "cat")
    assert (back.code, back.err) == (0, "")
    assert Path("again", FILE_NAME).is_file()
    assert same(load_patch("again").tensors, load_patch("cat").tensors)
    empty = call("import", "cat.safetensors", "--base", SD15, "--out", "xl", "--erase", " ")
    assert (empty.code, empty.err.count("\n")) == (2, 1)
    assert empty.err.startswith("error: --erase: ")
    wrong = call("import", "cat.safetensors", "--base", SDXL, "--out", "xl")
    assert wrong.code == 2
    assert wrong.err.endswith(" and its partner are (1, 768) and (640, 1); in the base the layer is (640, 2048)\n")
    assert not Path("xl").exists()
    name = call("export", "cat", "--to", "kohya", "--out", "cat.pt")
    assert (name.code, name.err) == (2, "error: --out cat.pt: name a file that ends in .safetensors\n")
    taken = Path("cat.safetensors").read_bytes()
    for place in ("cat.safetensors", f"cat/{FILE_NAME}"):
        again = call("export", "cat:0.5", "--to", "kohya", "--out", place)
        assert (again.code, again.err) == (2, f"error: {place}: exists; choose another --out\n")
    assert Path("cat.safetensors").read_bytes() == taken


def test_a_patch_goes_out_at_its_weight(call: Call) -> None:
    patch = patch_for(SD15, "esd-x-strict")
    patch.save("cat")
    assert call("export", "cat:0.5", "--to", "kohya", "--out", "half.safetensors").code == 0
    half = import_lora(Path("half.safetensors"), SD15)[0]
    factors = {"lora_A": 1.0, "lora_B": 0.5}
    assert same(half.tensors, {k: v * factors[k.split(".")[-2]] for k, v in patch.tensors.items()})
    assert half.info["stack"][0]["weight"] == 0.5
