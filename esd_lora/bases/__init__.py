"""Base models: `load_base` finds a pipeline, loads it and gives it its family's contract."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from torch import nn

from esd_lora.bases.base import Base, Condition, fingerprint_of
from esd_lora.bases.single_file import SingleFile, single_file
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.bases.stable_diffusion_xl import StableDiffusionXLBase
from esd_lora.bases.transformers import FluxBase, StableDiffusion3Base
from esd_lora.errors import BaseModelError, unwritable
from esd_lora.recipe import DType

__all__ = ["Base", "Condition", "base_of", "load_base", "local_file", "pick_device", "quick_dtype"]

FAMILIES: dict[str, type[Base]] = {
    "StableDiffusionPipeline": StableDiffusionBase,
    "LatentConsistencyModelPipeline": StableDiffusionBase,
    "StableDiffusionXLPipeline": StableDiffusionXLBase,
    "StableDiffusion3Pipeline": StableDiffusion3Base,
    "FluxPipeline": FluxBase,
}
"""Pipeline class, as `model_index.json` names it → contract."""

DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_ODD = (ArithmeticError, AttributeError, LookupError, TypeError)
"""What the libraries raise when they stumble over a value in a config."""
BROKEN = (*_ODD, HTTPError, ImportError, OSError, RuntimeError, SafetensorError, SingleFileComponentError, ValueError)
"""What they raise for a pipeline that cannot be loaded, one way or another."""

EMOJI = Path(__file__).parent.parent / "emoji" / "base"
"""The embedded base."""


def load_base(name: str, *, revision: str | None = None, device: str | None = None, dtype: DType = "fp32") -> Base:
    """A base model, frozen, on its device.

    Args:
        name: `emoji`, a folder with a diffusers pipeline, a single `.safetensors` checkpoint, or a Hub id.
        revision: Branch, tag or commit on the Hub; a folder or file has none.
        device: Such as `cuda:1`; by default the first of cuda, mps, cpu that is there.
        dtype: Precision of the weights; see `quick_dtype`.

    Raises:
        BaseModelError: Nothing there, not a text-to-image pipeline of a known family, no such device, or a revision of what
            has none.
    """
    check_revision(name, revision)
    where = pick_device(device)
    if dtype == "bf16" and where.type == "cpu" and quick_dtype("cpu") == "fp32":
        warnings.warn(
            f"{name}: this CPU does not compute in bf16, which takes many times as long as fp32", stacklevel=2
        )
    source = str(EMOJI) if name == "emoji" else name
    file = single_file(Path(source)) if Path(source).is_file() else None
    path = configs_of(file) if file else index_path(name, source, revision)
    revision = None if Path(source).exists() else commit_of(path) or revision  # what a branch or tag means today
    index = read_json(name, "model_index.json", path)
    family = family_of(name, index)
    kind = getattr(diffusers, index["_class_name"])
    extra: dict[str, Any] = {k: None for k in ("safety_checker", "feature_extractor", "image_encoder") if k in index}
    how: dict[str, Any] = {"revision": revision, "use_safetensors": True, **extra}
    place = Path(source)
    try:
        if dtype == "bf16" and not place.exists():
            place = Path(kind.download(source, **how))
        # bfloat16 loses bits that the fingerprint is made of: a denoiser that is stored with more is cast afterwards
        widened = dtype == "bf16" and not stored_in_bf16(place, family.prefix)
        first = torch.float32 if widened else DTYPES[dtype]
        if file:
            pipe = file.load(kind, path.parent, dtype=first, **extra)
        else:
            dtypes = {"default": DTYPES[dtype], family.prefix: first}
            pipe = kind.from_pretrained(source, dtype=dtypes, **how)
    except BROKEN as error:
        raise BaseModelError(f"{name}: cannot load the pipeline: {reason_of(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    fingerprint = fingerprint_of(getattr(pipe, family.prefix))
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and dtype == "bf16":
            nn.Module.to(part, DTYPES[dtype])  # diffusers' own `to` warns even where nothing has to stay float32
    getattr(pipe, family.prefix).to(where)  # the others come when they are needed
    return family(pipe, name=name, revision=revision, fingerprint=fingerprint, device=where)


def stored_in_bf16(place: Path, part: str) -> bool:
    """Whether all of a single file, or a part of the pipeline in a folder, such as `unet`, is stored in bf16 alone."""
    found: set[str] = set()
    for path in [place] if place.is_file() else place.glob(f"{part}/*.safetensors"):
        with safe_open(path, framework="pt") as store:
            found |= {store.get_slice(key).get_dtype() for key in store.keys()}  # noqa: SIM118 (not a mapping)
    return found == {"BF16"}


def family_of(name: str, index: Mapping[str, Any]) -> type[Base]:
    """The contract of a pipeline, by what its `model_index.json` says; `name` is the base's, for messages.

    Raises:
        BaseModelError: It is of no known family.
    """
    kind = str(index.get("_class_name") or "")
    if kind not in FAMILIES:
        raise BaseModelError(
            f"{name}: {kind or 'no pipeline class'} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def base_of(pipe: DiffusionPipeline) -> Base:
    """The contract around a pipeline that is loaded already, which it freezes.

    Raises:
        BaseModelError: It is of no known family.
    """
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise BaseModelError(f"{kind} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind](pipe, name=pipe.name_or_path or kind)


def pick_device(name: str | None) -> torch.device:
    """The named device, or the first of cuda, mps and cpu that is there.

    Raises:
        BaseModelError: The name is unknown, or there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    have = [k for k, yes in there.items() if yes]
    if name is None:
        return torch.device(have[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BaseModelError(f"unknown device {name}; this machine has {', '.join(have)}") from None
    beyond = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if device.type not in have or beyond:
        raise BaseModelError(f"no device {name} here; this machine has {', '.join(have)}")
    return device


def quick_dtype(device: str | None = None) -> DType:
    """The precision to draw in on a device, named as for `pick_device`: bf16 where it is computed in hardware, else fp32.

    A CPU without kernels for bfloat16, as those with no more than AVX2, computes it number by number: a picture of the embedded
    base then takes 20 times as long as in float32, where CPUs with such kernels take a quarter.
    """
    where = pick_device(device)
    if where.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    kernels = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in builds without oneDNN
    return "bf16" if where.type == "cpu" and kernels and kernels() else "fp32"


def check_revision(name: str, revision: str | None) -> None:
    """Nothing, if a base has revisions or none is asked for.

    Raises:
        BaseModelError: It is `emoji`, a folder or a file.
    """
    if revision and (name == "emoji" or Path(name).exists()):
        raise BaseModelError(f"{name}: has no revisions, as a base on the Hub has; leave revision {revision} out")


def index_path(name: str, source: str, revision: str | None) -> Path:
    """Where the pipeline's `model_index.json` is, or where it was downloaded to.

    Raises:
        BaseModelError: There is none.
    """
    folder = Path(source)
    if not folder.is_dir():
        return from_hub(name, "model_index.json", revision)
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(f"{name}: no model_index.json in this folder, so it is not a diffusers pipeline")
    return folder / "model_index.json"


def commit_of(path: Path) -> str | None:
    """The commit that a file on top of a snapshot in the Hub's cache is of; None for a file that lies elsewhere."""
    return path.parent.name if path.parent.parent.name == "snapshots" else None


def configs_of(file: SingleFile) -> Path:
    """The `model_index.json` among the configs and the tokenizer that go with a single file, from the Hub or its cache.

    Raises:
        BaseModelError: They are not in the cache, and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        path = from_hub(file.like, "model_index.json", None)
        snapshot_download(file.like, allow_patterns=["*/*.json", "*/*.txt", "*/*.model"], revision=path.parent.name)
    except (BaseModelError, HTTPError, OSError, RuntimeError) as error:
        raise BaseModelError(
            f"{file.path}: a single file has no tokenizer and no configs, and those of {file.like} are not to be had: "
            f"{first_line(error)}"
        ) from error
    return path


def read_json(name: str, file: str, path: Path) -> dict[str, Any]:
    """What a JSON file of a base says; `path` is where it is.

    Raises:
        BaseModelError: It cannot be read, or is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaseModelError(f"{name}: cannot read {file}: {error.strerror or first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{name}: cannot read {file}: not JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise BaseModelError(f"{name}: cannot read {file}: not a JSON object")
    return values


@overload
def from_hub(name: str, file: str, revision: str | None) -> Path: ...
@overload
def from_hub(name: str, file: str, revision: str | None, *, optional: bool) -> Path | None: ...
def from_hub(name: str, file: str, revision: str | None, *, optional: bool = False) -> Path | None:
    """The downloaded copy of one file of a Hub id; None where it has no such file and that is `optional`.

    While the Hub cannot be asked, an optional file counts as missing if it is not in the cache and the base is.

    Raises:
        BaseModelError: It cannot be had; what to do about it.
    """
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    places = "`emoji`, nor a folder or file" if file == "model_index.json" else "a folder"
    wrong = f"{name}: neither {places}, nor a Hub id"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BaseModelError(wrong)
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except errors.HFValidationError:
        raise BaseModelError(wrong) from None
    except errors.GatedRepoError:
        raise BaseModelError(f"{name}: accept its terms on the Hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise BaseModelError(f"{name}: the Hub has no revision {revision} of it") from None
    except errors.RepositoryNotFoundError:
        raise BaseModelError(f"{name}: no such folder, and no such model on the Hub (or it is private)") from None
    except errors.EntryNotFoundError as error:
        cached = isinstance(try_to_load_from_cache(name, "model_index.json", revision=revision), str)
        answered = isinstance(error, errors.RemoteEntryNotFoundError)
        if optional and (cached or answered):
            return None
        lacks = f"its repository on the Hub has no {file}"
        what = lacks if answered else f"the Hub cannot be reached, and {file} is not in the cache"
        raise BaseModelError(f"{name}: no such folder; {what}") from None
    except (HTTPError, OSError, RuntimeError) as error:
        what = unwritable(error) or f"no such folder, and the Hub cannot be reached: {first_line(error)}"
        raise BaseModelError(f"{name}: {what}") from None


def local_file(base: Base, file: str) -> Path | None:
    """The path of a file of the base's repository or folder, or None where it has no such file.

    Raises:
        BaseModelError: The Hub cannot say, and the base is not in its cache.
    """
    folder = EMOJI if base.name == "emoji" else Path(base.name)
    if folder.is_file():
        return None
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    return from_hub(base.name, file, base.revision, optional=True)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def reason_of(error: Exception) -> str:
    """Why a pipeline or a part of it cannot be made, in one line, by one of the `BROKEN`."""
    if isinstance(error, ImportError):  # tells over several lines what to install
        return " ".join(str(error).split())
    if isinstance(error, _ODD):
        return f"a wrong value in its configs ({type(error).__name__}: {first_line(error)})"
    return first_line(error)
