"""The evaluators that come with the package: what they know, what they refuse, and how they fail."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from math import cos, pi, sin
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from esd_lora.emoji import evaluators
from esd_lora.emoji.evaluators import (
    NETWORKS,
    OBJECT_CLASSES,
    OTHER,
    STYLE_CLASSES,
    Evaluator,
    EvaluatorName,
    load_evaluator,
)
from esd_lora.errors import BaseModelError

NAMES: tuple[EvaluatorName, ...] = get_args(EvaluatorName)
FIGURES: dict[str, Any] = json.loads((evaluators.WEIGHTS / "evaluators.json").read_text())


@pytest.fixture(scope="module", params=NAMES)
def evaluator(request: pytest.FixtureRequest) -> Evaluator:
    """Each of the two."""
    name: EvaluatorName = request.param
    return load_evaluator(name)


def ink(draw: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """A drawing in black on white, four times as large and averaged down."""
    canvas = Image.new("RGB", (256, 256), (250, 250, 250))
    draw(ImageDraw.Draw(canvas))
    return canvas.resize((64, 64), Image.Resampling.BOX)


def star(pen: ImageDraw.ImageDraw) -> None:
    """Five points."""
    radii = [100 if i % 2 == 0 else 42 for i in range(10)]
    pen.polygon([(128 + r * sin(i * pi / 5), 134 - r * cos(i * pi / 5)) for i, r in enumerate(radii)], "black")


def heart(pen: ImageDraw.ImageDraw) -> None:
    """The curve x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    turns = [2 * pi * i / 200 for i in range(200)]
    height = [13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) for t in turns]
    pen.polygon([(128 + 6 * 16 * sin(t) ** 3, 116 - 6 * h) for t, h in zip(turns, height, strict=True)], "black")


def crescent(pen: ImageDraw.ImageDraw) -> None:
    """A disc with a bite."""
    pen.ellipse((30, 30, 226, 226), "black")
    pen.ellipse((80, 0, 256, 176), (250, 250, 250))


DRAWINGS = {"star": star, "heart": heart, "moon": crescent}


def scrambled(picture: Image.Image, *, side: int = 8, seed: int = 0) -> np.ndarray:
    """The picture's squares in random order, (64, 64, 3) uint8."""
    n = 64 // side
    squares = np.asarray(picture).reshape(n, side, n, side, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, side, side, 3)
    mixed = np.random.default_rng(seed).permutation(squares).reshape(n, n, side, side, 3)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)


def noise(count: int) -> np.ndarray:
    """Random pixels, (count, 64, 64, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_both_know_the_drawings_of_the_tests(evaluator: Evaluator) -> None:
    seen = evaluator.judge([ink(draw) for draw in DRAWINGS.values()])
    assert seen.objects == list(DRAWINGS)
    assert seen.styles == ["ink"] * len(DRAWINGS)
    assert not any(seen.hats)


def test_scrambled_drawings_show_nothing_in_the_same_style(evaluator: Evaluator) -> None:
    pictures = np.stack([scrambled(ink(draw), seed=s) for draw in DRAWINGS.values() for s in range(4)])
    seen = evaluator.judge(pictures)
    assert set(seen.objects) == {OTHER}
    assert set(seen.styles) == {"ink"}


def test_noise_and_empty_pictures_show_nothing(evaluator: Evaluator) -> None:
    empty = np.stack([np.full((64, 64, 3), grey, np.uint8) for grey in (8, 128, 250)])
    assert set(evaluator.judge(np.concatenate([noise(8), empty])).objects) == {OTHER}


def test_a_judgement_has_one_row_a_picture_and_probabilities_that_sum_to_one(evaluator: Evaluator) -> None:
    seen = evaluator.judge(noise(5))
    assert len(seen) == len(seen.objects) == len(seen.styles) == len(seen.hats) == 5
    assert seen.object_probabilities.shape == (5, len(OBJECT_CLASSES))
    assert seen.style_probabilities.shape == (5, len(STYLE_CLASSES))
    assert seen.hat_probabilities.shape == (5,)
    for p in (seen.object_probabilities, seen.style_probabilities):
        torch.testing.assert_close(p.sum(1), torch.ones(5))


def test_no_pictures_give_an_empty_judgement(evaluator: Evaluator) -> None:
    assert len(evaluator.judge([])) == 0


def test_judging_twice_gives_the_same_bits(evaluator: Evaluator) -> None:
    first, second = (evaluator.judge(noise(6)).object_probabilities for _ in range(2))
    assert torch.equal(first, second)


def test_the_batch_size_does_not_change_the_judgement(evaluator: Evaluator) -> None:
    pictures = np.concatenate([np.stack([np.asarray(ink(d)) for d in DRAWINGS.values()]), noise(4)])
    one, all_ = (evaluator.judge(pictures, batch=b) for b in (1, 100))
    assert one.objects == all_.objects
    # other batch sizes pick other kernels, which add in another order
    torch.testing.assert_close(one.object_probabilities, all_.object_probabilities, atol=1e-5, rtol=0)


def test_an_array_and_pictures_of_other_modes_and_sizes_are_judged_alike(evaluator: Evaluator) -> None:
    picture = ink(star)
    forms = [picture, picture.convert("RGBA"), picture.convert("L"), picture.resize((256, 256), Image.Resampling.BOX)]
    assert evaluator.judge(forms).objects == ["star"] * 4
    a, b = evaluator.judge(np.asarray(picture)[None]), evaluator.judge(forms[:1])
    assert torch.equal(a.object_probabilities, b.object_probabilities)


@pytest.mark.parametrize("wrong", [np.zeros((1, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8)])
def test_an_array_of_another_kind_is_refused(evaluator: Evaluator, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 64, 64, 3\)"):
        evaluator.judge(wrong)


def test_the_digest_is_that_of_the_weights_file(evaluator: Evaluator) -> None:
    data = (evaluators.WEIGHTS / f"{evaluator.name}.safetensors").read_bytes()
    assert evaluator.digest == hashlib.sha256(data).hexdigest()


def test_the_evaluators_are_small_and_unlike() -> None:
    shapes = [sorted(tuple(p.shape) for p in NETWORKS[n]().parameters()) for n in NAMES]
    assert all(sum(p.numel() for p in NETWORKS[n]().parameters()) < 600_000 for n in NAMES)
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_that_are_shipped_belong_to_the_weights(name: EvaluatorName) -> None:
    assert FIGURES[name]["digest"] == load_evaluator(name).digest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pictures", ["training glyphs, new poses", "training glyphs, round trip"])
def test_known_glyphs_are_recognised(name: EvaluatorName, pictures: str) -> None:
    rates = {k: v["rate"] for k, v in FIGURES[name]["pictures"][pictures].items()}
    assert rates["object"] >= 0.97
    assert rates["style"] >= 0.99
    assert rates["hat"] >= 0.97
    assert rates["called other"] <= 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pictures", ["shuffled, 8 px", "shuffled, 16 px", "50-90 % noise", "static", "empty"])
def test_pictures_that_show_nothing_are_called_other(name: EvaluatorName, pictures: str) -> None:
    assert FIGURES[name]["pictures"][pictures]["called other"]["rate"] >= 0.9


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "WEIGHTS", tmp_path)
    with pytest.raises(BaseModelError) as e:
        load_evaluator("measure")
    path = tmp_path / "measure.safetensors"
    assert str(e.value) == f"evaluator measure: cannot read {path} (No such file or directory); reinstall esd_lora"


@pytest.mark.parametrize("content", [b"", b"not tensors at all", None])
def test_broken_weights_are_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (evaluators.WEIGHTS / "filter.safetensors").read_bytes()  # tensors, but of another network
    (tmp_path / "measure.safetensors").write_bytes(other if content is None else content)
    monkeypatch.setattr(evaluators, "WEIGHTS", tmp_path)
    with pytest.raises(BaseModelError, match=r"^evaluator measure: .*measure\.safetensors is not its weights"):
        load_evaluator("measure")


def test_an_unknown_evaluator_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(BaseModelError, match=r"^evaluator judge: unknown; there are measure, filter$"):
        load_evaluator("judge")  # type: ignore[arg-type]


def test_importing_the_emoji_package_loads_nothing_heavy() -> None:
    code = "import sys, esd_lora.emoji; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
