"""Other programs' names for a patch's tensors, both ways.

    diffusers, peft    unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight
    kohya, SD 1 and 2  lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight, … .alpha
    kohya, SDXL        lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight, … .alpha

sd-scripts names a layer by its own UNet, which for SDXL is that of Stability's sgm, and joins the names by underscores. ComfyUI
and A1111 read just these names for every base, so that one file serves all three. Alpha is written as the rank and nothing is
left to scale: it is right where alpha is ignored.

The way back looks every name up among the layers that the base has, rather than to guess where an underscore was a dot.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from esd_lora.bases import FAMILIES, commit_of, index_path
from esd_lora.bases.facts import facts_of, on_meta
from esd_lora.card import LICENCES, for_others
from esd_lora.errors import BaseModelError, PatchError
from esd_lora.patch import Patch, encode, patch_of, read_info, write_file
from esd_lora.recipe import make_recipe
from esd_lora.tensorfile import Entry, TensorFile, parse_json

Program = Literal["kohya", "comfyui", "a1111"]

NEXT: Mapping[Program, str] = {
    "kohya": "give it to sd-scripts as --network_weights, to train on with --dim_from_weights",
    "comfyui": "put it into ComfyUI's models/loras, and load it with a strength of 1",
    "a1111": "put it into A1111's models/Lora, and write <lora:{name}:1> into the prompt",
}
"""What to do with an exported file."""


class Architecture(NamedTuple):
    """A UNet that these programs know."""

    base: str
    """A base that has it."""
    version: str
    """sd-scripts' name of it; A1111 hides files of another version than its model's."""


SDXL = Architecture("stabilityai/stable-diffusion-xl-base-1.0", "sdxl_base_v1-0")
ARCHITECTURES = (
    Architecture("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd_v1"),
    Architecture("stabilityai/stable-diffusion-2-1", "sd_v2"),
    SDXL,
)


def export(patch: Patch, file: Path) -> Path:
    """The file with the patch in it under kohya's names, which ComfyUI and A1111 read too.

    The tensors are the patch's own, bit for bit, and its header travels along, so that `import_lora` gives an equal patch.

    Raises:
        PatchError: The patch adapts what these programs have no name for.
        OutputError: The file cannot be written.
    """
    if patch.prefix != "unet":
        raise PatchError(f"the patch adapts a {patch.prefix}; kohya's names are known for a UNet alone")
    built = architecture_of(patch)
    if built is None:
        warnings.warn(
            "the patch fits neither Stable Diffusion 1, 2 nor SDXL, and these programs load no other base", stacklevel=2
        )
    tensors: dict[str, Tensor] = {}
    for module, rank in patch.ranks.items():
        plain = module.removeprefix("unet.")
        name = sgm_name(plain) if built is SDXL else plain
        if name is None:
            raise PatchError(f"{module}: kohya has no name for it in SDXL")
        name = "lora_unet_" + name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = patch.tensors[f"{module}.lora_A.weight"]
        tensors[f"{name}.lora_up.weight"] = patch.tensors[f"{module}.lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    rank = max(patch.ranks.values())
    header = {
        "format": "pt",
        "esd_lora": json.dumps(for_others(patch.info), sort_keys=True),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
    }
    if built:
        header |= {"ss_base_model_version": built.version, "ss_v2": str(built.version == "sd_v2")}
    write_file(file, encode(tensors, header))
    return file


def architecture_of(patch: Patch) -> Architecture | None:
    """The architecture that has all of a patch's layers, in its shapes; None where none has.

    Self-attention is the same in Stable Diffusion 1 and 2: there it is that of the base which the patch was made for, where
    the configs of that can be had, or the older one.
    """
    fitting = [a for a in ARCHITECTURES if patch.shapes.items() <= layers_of(a.base).items()]
    if len(fitting) > 1:
        with suppress(BaseModelError):
            origin = patch.info.get("base", {})
            own = layers_of(str(origin.get("name")), origin.get("revision"))
            fitting = [a for a in fitting if layers_of(a.base) == own] or fitting
    return next(iter(fitting), None)


def layers_of(base: str, revision: str | None = None) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a base's denoiser, by diffusers' names, from its configs alone.

    Raises:
        BaseModelError: The base is not found, or of no known family.
    """
    facts = facts_of(base, revision)
    network = on_meta(getattr(diffusers, facts.denoiser["_class_name"]).from_config, facts.denoiser, base)
    prefix = FAMILIES[facts.pipeline].prefix
    layers = {f"{prefix}.{n}": m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    return {n: (m.out_features, m.in_features) for n, m in layers.items()}


def _commit_of(base: str, revision: str | None) -> str | None:
    """The commit that the revision of a Hub id means today, where that can be had; by it a card knows that it is one."""
    if base == "emoji" or Path(base).exists():
        return None
    if base not in LICENCES:
        with suppress(BaseModelError):
            return commit_of(index_path(base, base, revision)) or revision
    return revision


_ATTENTION = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(.+)")


def sgm_name(module: str) -> str | None:
    """The name of an attention layer in Stability's own UNet; None for other layers.

    A level has two blocks and a downsampler on the way down, and three blocks on the way up. Before the first is the input's
    convolution; in a block the attention comes second.
    """
    match = _ATTENTION.fullmatch(module)
    if match is None:
        return None
    way, level, block, rest = match.groups()
    if way is None:
        return f"middle_block.1.{rest}"
    place = 3 * int(level) + int(block)
    return f"input_blocks.{1 + place}.1.{rest}" if way == "down" else f"output_blocks.{place}.1.{rest}"


# ---- the way back ------------------------------------------------------------------------------------------------

_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.alpha|[._]lora[._](?:(?P<down>down|A)|(?P<up>up|B))(?:\.\w+)?\.weight)", re.ASCII
)
"""A tensor's layer and which factor it is, or its alpha, in the manners of kohya, LECO, peft and older diffusers."""
_PREFIX = re.compile(r"(base_model\.model\.)?(unet\.|transformer\.|lora_unet_|diffusion_model\.)?")
_TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoder|te\d?\.)")


def import_lora(
    file: Path, base: str, *, revision: str | None = None, erase: Sequence[str] = (), partial: bool = False
) -> tuple[Patch, list[str]]:
    """The patch in another program's file, and the names of the layers that it leaves out.

    Args:
        file: Of kohya's sd-scripts, LECO, sliders, peft or diffusers. Alphas are folded into lora_B; where a file tells none,
            alpha is the rank, as everywhere.
        base: What it was made for; its layers are looked at, its weights are not.
        revision: Of the base on the Hub.
        erase: What it erases, in words, which such a file does not tell.
        partial: Leave out what a patch does not hold, such as layers of text encoders and convolutions.

    Raises:
        PatchError: Not a LoRA file, it does not fit the base, has layers that a patch does not hold and `partial` is off, or is
            a stack of ours and `erase` is told.
        RecipeError: A word of `erase` cannot be a concept.
        BaseModelError: The base is not found, or of no known family.
    """
    if file.is_dir():
        raise PatchError(f"{file}: is a folder; name the .safetensors file in it")
    if not file.is_file():
        raise PatchError(f"{file}: no such file; name the .safetensors file of another program")
    named = make_recipe({"base": base, "concepts": list(erase)}, source="--erase").to_dict() if erase else {}
    store = TensorFile(file)
    layers, left_out = _sorted_out(file, store.entries, layers_of(base, revision))
    if left_out and not partial:
        kind = "text encoder" if _TEXT.match(left_out[0]) else "convolution, or not in the base"
        hint = "without them it would be another LoRA; --partial imports the rest" if layers else "there are no others"
        raise PatchError(
            f"{file}: adapts {len(left_out)} layers that a patch does not hold, first {left_out[0]} ({kind}); {hint}"
        )
    if not layers:
        raise PatchError(f"{file}: none of its layers is one of {base}")
    loaded, tensors = store.tensors(), {}
    for layer, keys in layers.items():
        down, up = loaded[keys["down"]], loaded[keys["up"]]
        scale = _alpha(file, keys["alpha"], loaded) / len(down) if "alpha" in keys else 1.0
        tensors[f"{layer}.lora_A.weight"] = down
        tensors[f"{layer}.lora_B.weight"] = up if scale == 1 else up.float() * scale
    info = read_info(file, store.metadata.get("esd_lora", "{}"))
    if not info.get("base"):
        info |= {"base": {"name": base, "revision": _commit_of(base, revision)}, "imported": file.name}
    if erase:
        if "stack" in info:
            raise PatchError(f"{file}: a stack, which tells what each of its parts erases; leave --erase out")
        info["recipe"] = {**info.get("recipe", {}), "concepts": named["concepts"]}
    adapter = _adapter(file, store.metadata, prefix=next(iter(layers)).split(".", 1)[0])
    alphas = any("alpha" in keys for keys in layers.values())
    return patch_of(file, tensors, info, adapter="{}" if alphas else adapter), left_out


def _sorted_out(
    file: Path, entries: Mapping[str, Entry], have: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of each layer that a patch can hold, `down`, `up` and perhaps `alpha`, and the layers that it cannot.

    Raises:
        PatchError: A tensor is no factor and no alpha, lacks its partner, or does not fit the base's layer.
    """
    plain_names = {n.split(".", 1)[1]: n for n in have}
    known = {p.replace(".", "_"): n for p, n in plain_names.items()}
    known |= {s.replace(".", "_"): n for p, n in plain_names.items() if (s := sgm_name(p))}
    found: dict[str, dict[str, str]] = {}
    for key in sorted(entries):
        match = _KEY.fullmatch(key)
        if match is None:
            raise PatchError(
                f"{file}: {key} is neither a LoRA factor nor an alpha (DoRA, LoHa and LoKr are no patches)"
            )
        part = "down" if match["down"] else "up" if match["up"] else "alpha"
        layer = match["layer"]
        if not _TEXT.match(layer):
            plain = _PREFIX.sub("", layer, count=1).replace(".processor.", ".").replace(".", "_")
            layer = known.get(plain) or known.get(f"{plain}_0", layer)  # older diffusers write to_out for to_out.0
        if part in found.setdefault(layer, {}):
            raise PatchError(f"{file}: {key} comes twice, as {found[layer][part]} too")
        found[layer][part] = key
    held: dict[str, dict[str, str]] = {}
    for layer, keys in found.items():
        if not {"down", "up"} <= keys.keys():
            raise PatchError(f"{file}: {next(iter(keys.values()))} lacks a factor of its layer")
        down, up = entries[keys["down"]], entries[keys["up"]]
        if layer in have and len(down.shape) == len(up.shape) == 2:
            _check_pair(file, keys, down, up, have[layer])
            held[layer] = keys
    return held, [layer for layer in found if layer not in held]


def _check_pair(file: Path, keys: Mapping[str, str], down: Entry, up: Entry, shape: tuple[int, int]) -> None:
    """Nothing, if two factors make a ΔW of this shape.

    Raises:
        PatchError: They do not.
    """
    if not (down.is_floating_point and up.is_floating_point) or 0 in (*down.shape, *up.shape):
        raise PatchError(f"{file}: {keys['down']} has no values that a factor can have")
    if down.shape[0] != up.shape[1] or (up.shape[0], down.shape[1]) != shape:
        pair = f"{keys['down']} and its partner are {down.shape} and {up.shape}"
        raise PatchError(f"{file}: {pair}; in the base the layer is {shape}")


def _alpha(file: Path, key: str, loaded: Mapping[str, Tensor]) -> float:
    """The alpha of a layer.

    Raises:
        PatchError: It is not a number.
    """
    tensor = loaded[key]
    if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)):
        raise PatchError(f"{file}: {key} is not a number")
    return alpha


def _adapter(file: Path, metadata: Mapping[str, str], *, prefix: str) -> str:
    """What is told of rank and alpha outside the tensors, as `lora_adapter_metadata` with the denoiser's prefix.

    diffusers writes it into the header, with the prefix or without; peft into `adapter_config.json` beside the file.

    Raises:
        PatchError: It is not a JSON object.
    """
    beside = file.with_name("adapter_config.json")
    try:
        text = beside.read_bytes() if beside.is_file() and file.name == "adapter_model.safetensors" else None
        told: Any = parse_json(text or metadata.get("lora_adapter_metadata", "{}"))
        told = {k if k.startswith(f"{prefix}.") else f"{prefix}.{k}": v for k, v in told.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise PatchError(f"{file}: what is told of its rank and alpha is not a JSON object") from error
    return json.dumps(told)
