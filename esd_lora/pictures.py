"""Pictures: generate them with any base and patches, and set them side by side.

Every picture has the noise of its own seed, at the start and on the way, whatever the batch it is made in, so that a prompt's
pictures with and without a patch differ by the patch alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from esd_lora.bases.base import Base
from esd_lora.errors import OutputError, RecipeError
from esd_lora.patch import write_file

Pictures = list[Image.Image]


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float = 7.5,
    resolution: int | None = None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> Pictures:
    """One picture for each prompt and seed, in order, by the base's own pipeline with whatever adapters are active.

    Args:
        base: The model.
        prompts: N prompts; the same one may come several times.
        seeds: N seeds, each of one picture's initial noise.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        resolution: Side in pixels; None for the base's own.
        batch_size: Pictures at a time.
        on_batch: Called with the number of pictures of each finished batch.

    Raises:
        RecipeError: The number of prompts and seeds differ, or the base cannot draw at the resolution, or in so many steps.
    """
    if len(prompts) != len(seeds):
        raise RecipeError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    base.check_steps(steps, name="steps", resolution=resolution)
    base.pipe.to(base.device)
    pictures: Pictures = []
    for start in range(0, len(prompts), batch_size):
        some = slice(start, start + batch_size)
        out = base.pipe(
            list(prompts[some]),
            latents=base.packed(base.noise(seeds[some], resolution=resolution)),
            height=resolution,
            width=resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=step_noise(seeds[some]),
        )
        pictures += out.images
        if on_batch:
            on_batch(len(out.images))
    return pictures


def drawn_by(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How `generate` draws for a recipe: at its size, and where that goes without guidance, so and in as few steps."""
    how: dict[str, Any] = {"resolution": recipe.get("resolution")}
    if recipe.get("guidance_scale") == 1:
        how |= {"guidance_scale": 1.0, "steps": recipe.get("trajectory_steps", 20)}
    return how


def step_noise(seeds: Sequence[int]) -> list[torch.Generator]:
    """What schedulers that add noise on the way draw it from: for each picture its own, and not what it starts from again."""
    return [torch.Generator().manual_seed(seed ^ 1 << 30) for seed in seeds]  # of a seed 32 bits count


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, in RGB.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # the latter two are Pillow's of some broken PNGs
        reason = (
            "is a folder" if path.is_dir() else "not a picture that can be read" if path.exists() else "no such file"
        )
        raise OutputError(f"{path}: {reason}") from error


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        OutputError: The place cannot be written to.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_file(path, buffer.getvalue())


def grid(
    rows: Sequence[tuple[str, Pictures]], columns: Sequence[str] = (), *, footer: str = "", side: int = 96
) -> Image.Image:
    """A picture of labelled rows of pictures, such as "before" and "after".

    Args:
        rows: Label and pictures of each row, all with as many pictures.
        columns: Labels above the columns.
        footer: One line below, such as how the pictures were chosen.
        side: Size of a picture in the grid, in pixels.
    """
    font, gap = ImageFont.load_default(13), 4
    left = 16 + max((int(font.getlength(label)) for label, _ in rows), default=0)
    top = 26 if columns else gap
    width = left + max(len(p) for _, p in rows) * (side + gap)
    height = top + len(rows) * (side + gap) + (24 if footer else 0)
    width = max(width, int(font.getlength(footer)) + 16)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for k, label in enumerate(columns):
        x = left + k * (side + gap) + side / 2
        draw.text((x, top / 2), label, fill="black", font=font, anchor="mm")
    for r, (label, pictures) in enumerate(rows):
        y = top + r * (side + gap)
        draw.text((8, y + side / 2), label, fill="black", font=font, anchor="lm")
        for k, picture in enumerate(pictures):
            sharp = picture.width < side  # enlarge small pictures without blur
            how = Image.Resampling.NEAREST if sharp and side % picture.width == 0 else Image.Resampling.LANCZOS
            canvas.paste(picture.convert("RGB").resize((side, side), how), (left + k * (side + gap), y))
    if footer:
        draw.text((8, height - 12), footer, fill="#555555", font=font, anchor="lm")
    return canvas
