"""What a base's configs say of it, a few kilobytes, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn

from esd_lora.bases import EMOJI, first_line, from_hub, model_index, read_json
from esd_lora.errors import BaseModelError

CONFIGS = Path(__file__).parent / "configs"
"""A file for each architecture that most people use, with the Hub ids of its bases and where these differ."""


@dataclass(frozen=True)
class Facts:
    """A text-to-image pipeline around a UNet."""

    family: str
    unet: Mapping[str, Any]
    """Config of diffusers' UNet2DConditionModel."""
    prediction_type: str
    scheduler: Mapping[str, Any]
    """Its class and, where they say how many steps it takes, its settings."""
    vae_scale_factor: int
    """Pixels by latents along a side."""
    text_encoder_parameters: int
    vae_parameters: int

    def denoising_steps(self, steps: int) -> int:
        """How often the denoiser is asked in a trajectory of so many steps: PNDM asks once more."""
        scheduler = getattr(diffusers, self.scheduler["_class_name"]).from_config(self.scheduler)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)


def facts_of(name: str, revision: str | None = None) -> Facts:
    """The facts of a known Hub id as shipped, of any other base from its config files.

    Args:
        name: `emoji`, a folder with a diffusers pipeline, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        BaseModelError: The base is not found, out of reach, or not a pipeline around a UNet.
    """
    for path in sorted(CONFIGS.glob("*.json")):
        shipped = json.loads(path.read_text(encoding="utf-8"))
        variants = shipped.pop("hub_ids")
        if name in variants:
            unet = shipped["unet"] | variants[name].get("unet", {})
            return Facts(**(shipped | variants[name] | {"unet": unet}))
    source = str(EMOJI) if name == "emoji" else name
    index = model_index(name, source, revision)
    if "unet" not in index:
        raise BaseModelError(f"{name}: {index.get('_class_name', 'its pipeline')} has no UNet to adapt")

    def config(file: str) -> dict[str, Any]:
        return _read(name, source, revision, file)

    unet, vae = config("unet/config.json"), config("vae/config.json")
    kind = _class_of(name, index, "scheduler", diffusers)  # its config may name another, or none
    scheduler = config("scheduler/scheduler_config.json") | {"_class_name": kind.__name__}
    xl = unet.get("addition_embed_type") == "text_time"
    encoders = [k for k, v in index.items() if k.startswith("text_encoder") and v != [None, None]]
    return Facts(
        family="stable-diffusion-xl" if xl else "stable-diffusion",
        unet=unet,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        scheduler=scheduler,
        vae_scale_factor=2 ** (len(vae.get("block_out_channels", ())) - 1),
        text_encoder_parameters=sum(
            _text_encoder_size(name, _class_of(name, index, k, transformers), config(f"{k}/config.json"))
            for k in encoders
        ),
        vae_parameters=size_of(on_meta(AutoencoderKL.from_config, vae, name).parameters()),
    )


def on_meta(build: Callable[[Any], Any], config: Any, name: str) -> nn.Module:
    """A network built from its config, with shapes and no weights; `name` is the base's, for messages.

    Raises:
        BaseModelError: The config does not fit the class.
    """
    try:
        with torch.device("meta"):
            network: nn.Module = build(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(f"{name}: cannot be built from its config: {first_line(error)}") from error
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
