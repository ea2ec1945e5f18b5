"""Pictures: one seed is one picture whatever the batch, and grids have the size that they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image

from esd_lora.bases import Base
from esd_lora.errors import OutputError, RecipeError
from esd_lora.pictures import drawn_by, generate, grid, save_picture, step_noise

RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=int)


def test_a_seed_gives_the_same_picture_whatever_the_batch(base: Base) -> None:
    prompts, seeds = ["cat", "dog", "cat", "", "a bird"], [4, 4, 9, 4, 0]
    counts: list[int] = []
    together = generate(base, prompts, seeds, steps=4)
    apart = generate(base, prompts, seeds, steps=4, batch_size=2, on_batch=counts.append)
    alone = generate(base, ["cat"], [9], steps=4)
    assert counts == [2, 2, 1]
    for many, few in [*zip(together, apart, strict=True), (together[2], alone[0])]:
        # float32 sums differ in the last bits between batches, which may round a colour the other way
        assert np.abs(pixels(many) - pixels(few)).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(together[2])).max() > 10  # another seed is another picture


def test_noise_on_the_way_is_a_seeds_own_too(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = EulerAncestralDiscreteScheduler.from_config(base.pipe.scheduler.config)
    monkeypatch.setattr(base.pipe, "scheduler", scheduler)
    together = generate(base, ["cat"] * 3, [4, 9, 4], steps=4)
    torch.manual_seed(1)  # whatever else was drawn
    again = [generate(base, ["cat"], [seed], steps=4)[0] for seed in (4, 9)]
    for many, one in zip(together, again, strict=False):
        assert np.abs(pixels(many) - pixels(one)).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(together[1])).max() > 10
    start, way = base.noise([4])[0], torch.randn(base.latent_shape(), generator=step_noise([4])[0])
    assert not torch.equal(start, way)


def test_a_prompt_is_listened_to(base: Base) -> None:
    one, two = generate(base, ["cat", "a very long dog"], [4, 4], steps=4, guidance_scale=50)
    assert np.abs(pixels(one) - pixels(two)).max() > 1


def test_pictures_have_the_size_that_was_asked_for(base: Base) -> None:
    assert generate(base, ["cat"], [0], steps=2)[0].size == (16, 16)
    assert generate(base, ["cat"], [0], steps=2, resolution=32)[0].size == (32, 32)
    assert generate(base, [], []) == []


def test_prompts_need_as_many_seeds(base: Base) -> None:
    with pytest.raises(RecipeError, match=r"^2 prompts need as many seeds, got 1$"):
        generate(base, ["a", "b"], [0])


def test_pictures_for_a_recipe_are_drawn_as_it_samples() -> None:
    """A model that draws without guidance in four steps is burnt by guidance and twenty."""
    assert drawn_by({"guidance_scale": 1.0, "trajectory_steps": 4, "resolution": 512}) == {
        "guidance_scale": 1.0,
        "steps": 4,
        "resolution": 512,
    }
    assert drawn_by({"guidance_scale": 3.0, "trajectory_steps": 4}) == {"resolution": None}


def test_a_grid_has_a_row_for_each_label_and_the_pictures_in_their_places() -> None:
    plain = grid([("before", [RED, BLUE]), ("after", [BLUE, RED])], side=32)
    labelled = grid([("before", [RED, BLUE]), ("after", [BLUE, RED])], ["one", "two"], footer="seeds", side=32)
    left = plain.width - 2 * (32 + 4)
    assert plain.height == 4 + 2 * (32 + 4)
    assert labelled.size == (plain.width, plain.height + 22 + 24)  # a line above, a line below
    for picture, top in ((plain, 4), (labelled, 26)):
        places = [(left + 16 + k * 36, top + 16 + r * 36) for r in range(2) for k in range(2)]
        red, blue = (255, 0, 0), (0, 0, 255)
        assert [picture.getpixel(p) for p in places] == [red, blue, blue, red]
    assert grid([("a", [RED])], footer="a footer that is much longer than the pictures").width > 200
    assert grid([("a long label", [RED])], side=32).width > grid([("a", [RED])], side=32).width


def test_a_saved_picture_is_a_png_of_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    save_picture(RED, path)
    with Image.open(path) as read:
        assert read.format == "PNG"
        assert np.array_equal(pixels(read), pixels(RED))
    with pytest.raises(OutputError, match="cannot write"):
        save_picture(RED, path / "below.png")
