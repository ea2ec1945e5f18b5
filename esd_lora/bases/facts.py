"""What a base's configs say of it, a few kilobytes, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from esd_lora.bases import BROKEN, EMOJI, check_revision, family_of, from_hub, index_path, read_json, reason_of
from esd_lora.bases.single_file import single_file
from esd_lora.errors import BaseModelError

CONFIGS = Path(__file__).parent / "configs"
"""A file for each architecture that most people use, with the Hub ids of its bases and where these differ."""


@dataclass(frozen=True)
class Facts:
    """A text-to-image pipeline."""

    pipeline: str
    """Its class, as `model_index.json` names it."""
    denoiser: Mapping[str, Any]
    """Config of the network that the adapters go on, with its class."""
    scheduler: Mapping[str, Any]
    """Config of its scheduler, with its class."""
    vae_scale_factor: int
    """Pixels by latents along a side."""
    text_encoder_parameters: int

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: epsilon, v_prediction or flow."""
        told: str = self.scheduler.get("prediction_type", "epsilon")
        return "flow" if "FlowMatch" in self.scheduler["_class_name"] else told


def facts_of(name: str, revision: str | None = None) -> Facts:
    """The facts of a known Hub id as shipped, of any other base from its config files.

    Args:
        name: `emoji`, a folder with a diffusers pipeline, a single-file checkpoint, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        BaseModelError: The base is not found, out of reach, not a pipeline of a known family, or a folder or file, and a
            revision is asked for.
    """
    check_revision(name, revision)
    if Path(name).is_file():
        file = single_file(Path(name))
        facts = facts_of(file.like)
        return replace(facts, scheduler={**facts.scheduler, **file.scheduler})
    for path in sorted(CONFIGS.glob("*.json")):
        shipped = json.loads(path.read_text(encoding="utf-8"))
        variants = shipped.pop("hub_ids")
        if name in variants:
            parts = {part: shipped[part] | variants[name].get(part, {}) for part in ("denoiser", "scheduler")}
            return Facts(**(shipped | parts))
    source = str(EMOJI) if name == "emoji" else name
    index = read_json(name, "model_index.json", index_path(name, source, revision))
    prefix = family_of(name, index).prefix

    def config(file: str) -> dict[str, Any]:
        return _read(name, source, revision, file)

    vae = config("vae/config.json")
    kinds = {part: _class_of(name, index, part, diffusers).__name__ for part in (prefix, "scheduler")}
    encoders = [k for k, v in index.items() if k.startswith("text_encoder") and v != [None, None]]
    return Facts(
        pipeline=index["_class_name"],
        denoiser=config(f"{prefix}/config.json") | {"_class_name": kinds[prefix]},
        # its config may name another class, or none
        scheduler=config("scheduler/scheduler_config.json") | {"_class_name": kinds["scheduler"]},
        vae_scale_factor=2 ** (len(vae.get("block_out_channels", ())) - 1),
        text_encoder_parameters=sum(
            _text_encoder_size(name, _class_of(name, index, k, transformers), config(f"{k}/config.json"))
            for k in encoders
        ),
    )


def on_meta(build: Callable[[Any], Any], config: Any, name: str) -> nn.Module:
    """A network built from its config, with shapes and no weights; `name` is the base's, for messages.

    Raises:
        BaseModelError: The config does not fit the class.
    """
    try:
        with torch.device("meta"):
            network: nn.Module = build(config)
    except BROKEN as error:
        raise BaseModelError(f"{name}: cannot be built from its config: {reason_of(error)}") from error
    return network


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in parameters)


def _class_of(name: str, index: Mapping[str, Any], part: str, library: ModuleType) -> Any:
    """The class of a part of a pipeline, which `model_index.json` names.

    Raises:
        BaseModelError: It names none, or the library has no such class.
    """
    match index.get(part):
        case [_, str(kind)] if hasattr(library, kind):
            return getattr(library, kind)
        case [_, str(kind)]:
            raise BaseModelError(f"{name}: its {part} is a {kind}, which {library.__name__} does not have")
    raise BaseModelError(f"{name}: model_index.json does not say what its {part} is")


def _text_encoder_size(name: str, build: Any, config: Mapping[str, Any]) -> int:
    """Parameters of a text encoder of a class of transformers."""
    return size_of(on_meta(lambda c: build(build.config_class.from_dict(c)), config, name).parameters())


def _read(name: str, source: str, revision: str | None, file: str) -> dict[str, Any]:
    """A config file of a base, from its folder or the Hub."""
    folder = Path(source)
    return read_json(name, file, folder / file if folder.is_dir() else from_hub(name, file, revision))
