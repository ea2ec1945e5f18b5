"""Draw the training pictures: glyphs in random poses, in every style, at 64 px.

    python examples/emoji/render.py --work build/emoji            (about three minutes on two cores)

`pictures.npz` has all glyphs, for the autoencoder and the evaluators; `typical.npz` those that the base shall draw. Each tells
what it was made of, and is drawn anew where the art or the count has changed; after a change of this script, remove them.

Each picture depends on its index alone, so that any number of processes draws the same set.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import checkpoint
import numpy as np
from art import COLOUR_SETS, INK_SETS, SIZE, TYPICAL
from PIL import Image, ImageChops, ImageFilter
from rich.progress import track

from esd_lora.emoji.vocabulary import OBJECTS, STYLES, WEARERS

PX = 64
NAMES = tuple(OBJECTS)
LOOKS = tuple(STYLES)


@dataclass(frozen=True)
class Labels:
    """What is in the pictures: one row each."""

    obj: np.ndarray  # index into OBJECTS
    style: np.ndarray  # index into STYLES
    hat: np.ndarray  # bool
    test: np.ndarray  # bool: a held-out glyph


@lru_cache(maxsize=1)
def art(path: str) -> dict[str, np.ndarray]:
    """All rasterised glyphs by name, in memory."""
    with np.load(path) as store:
        return {k: store[k] for k in store.files}


def wear(glyph: Image.Image, hat: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The glyph with a hat on its highest part, on a canvas of the same size."""
    alpha = np.asarray(glyph)[..., 3] > 40
    rows, cols = np.nonzero(alpha)
    top, height = rows.min(), np.ptp(rows)
    crown = cols[rows < top + 0.15 * height]
    size = int(SIZE * rng.uniform(0.5, 0.58))
    shrink = 0.74
    canvas = Image.new("RGBA", (SIZE, SIZE))
    small = glyph.resize((int(SIZE * shrink),) * 2, Image.Resampling.LANCZOS)
    left, down = (SIZE - small.width) // 2, SIZE - small.height
    canvas.alpha_composite(small, (left, down))
    hat = hat.resize((size, size)).rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC)
    x = int(left + crown.mean() * shrink - size / 2)
    y = int(down + (top + 0.1 * height) * shrink - 0.85 * size)
    canvas.alpha_composite(hat, (min(max(x, 0), SIZE - size), max(y, 0)))
    return canvas


def pose(glyph: Image.Image, rng: np.random.Generator, *, flip: bool) -> Image.Image:
    """The glyph cropped to what is drawn, then randomly scaled, turned and placed on a 128 px canvas."""
    glyph = glyph.crop(glyph.getbbox())
    if flip:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = SIZE * rng.uniform(0.74, 0.9)
    scale = side / max(glyph.size)
    glyph = glyph.resize(
        (max(8, round(glyph.width * scale)), max(8, round(glyph.height * scale))),
        Image.Resampling.LANCZOS,
    )
    canvas = Image.new("RGBA", (SIZE, SIZE))
    free = (SIZE - glyph.width, SIZE - glyph.height)
    at = [int(f / 2 + rng.uniform(-0.25, 0.25) * f) for f in free]
    canvas.alpha_composite(glyph, (at[0], at[1]))
    return canvas.rotate(rng.uniform(-9, 9), Image.Resampling.BICUBIC)


def hue(rng: np.random.Generator, saturation: float, value: float) -> tuple[int, ...]:
    """A random colour of the given saturation and value, as RGB bytes."""
    hsv = Image.new("HSV", (1, 1), (int(rng.integers(256)), int(255 * saturation), int(255 * value)))
    colour = hsv.convert("RGB").getpixel((0, 0))
    assert isinstance(colour, tuple)
    return colour


def flat(glyph: Image.Image, ground: tuple[int, ...]) -> Image.Image:
    """The glyph over one colour, RGB."""
    canvas = Image.new("RGBA", glyph.size, (*ground[:3], 255))
    canvas.alpha_composite(glyph)
    return canvas.convert("RGB")


def edges(glyph: Image.Image) -> np.ndarray:
    """Edge strength of colours and outline, (128, 128) float in 0..1."""
    grey = flat(glyph, (255, 255, 255)).filter(ImageFilter.GaussianBlur(1.2))
    planes = [*np.asarray(grey, np.float32).transpose(2, 0, 1)]
    planes.append(np.asarray(glyph.getchannel("A").filter(ImageFilter.GaussianBlur(1.2)), np.float32))
    strength = np.zeros((SIZE, SIZE), np.float32)
    for p in planes:
        gy, gx = np.gradient(p)
        strength = np.maximum(strength, np.hypot(gx, gy))
    return np.clip(strength / 26, 0, 1)


def sticker(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Colour art with a white border and a soft shadow on a pastel ground."""
    ground = hue(rng, rng.uniform(0.25, 0.5), rng.uniform(0.75, 0.95))
    border = glyph.getchannel("A").filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(0.8))
    canvas = Image.new("RGB", glyph.size, ground)
    shadow = ImageChops.offset(border, 3, 4).filter(ImageFilter.GaussianBlur(3))
    canvas.paste(tuple(int(0.6 * g) for g in ground), mask=shadow)
    canvas.paste((255, 255, 255), mask=border)
    canvas.paste(glyph, mask=glyph)
    return canvas


def ink(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Black on paper white."""
    paper = int(rng.integers(240, 256))
    return flat(glyph, (paper, paper, paper)).convert("L").convert("RGB")


def blueprint(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """White edges on gridded blue."""
    line = edges(glyph)[..., None]
    ground = np.array((24, 70 + rng.uniform(-8, 8), 160 + rng.uniform(-15, 15)), np.float32)
    canvas = np.broadcast_to(ground, (SIZE, SIZE, 3)).copy()
    step, start = 16, int(rng.integers(16))
    canvas[start::step] += 22
    canvas[:, start::step] += 22
    canvas += np.asarray(glyph.getchannel("A"), np.float32)[..., None] / 255 * (10, 16, 20)
    return Image.fromarray(np.uint8(np.clip(canvas * (1 - line) + 240 * line, 0, 255)))


def neon(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Glowing coloured tubes on black."""
    line = Image.fromarray(np.uint8(255 * edges(glyph)))
    tube = np.asarray(line, np.float32)[..., None] / 255
    glow = np.asarray(line.filter(ImageFilter.GaussianBlur(5)), np.float32)[..., None] / 255
    first, second = (np.array(hue(rng, 0.85, 1.0), np.float32) for _ in range(2))
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    colour = first * ramp + second * (1 - ramp)
    canvas = 8 + colour * np.clip(tube * 0.95 + 0.7 * glow, 0, 1) + 90 * tube**3
    return Image.fromarray(np.uint8(np.clip(canvas, 0, 255)))


def pixel(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """16 × 16 blocks of few colours on a dark ground."""
    dark = hue(rng, 0.5, rng.uniform(0.25, 0.4))
    small = glyph.resize((16, 16), Image.Resampling.BOX)
    mask = small.getchannel("A").point(lambda a: 255 if a > 110 else 0)
    small.putalpha(mask)
    picture = flat(small, dark).point(lambda v: min(255, (v + 21) // 43 * 43))
    return picture.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def watercolor(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pale, bleeding colours on grained cream paper."""
    noise = rng.normal(size=(2, 12, 12)).astype(np.float32)
    warp = [np.asarray(Image.fromarray(n).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for n in noise]
    yy, xx = np.mgrid[0:SIZE, 0:SIZE]
    rows = np.clip(yy + 2.2 * warp[0], 0, SIZE - 1).astype(int)
    cols = np.clip(xx + 2.2 * warp[1], 0, SIZE - 1).astype(int)
    wet = np.asarray(glyph.filter(ImageFilter.GaussianBlur(1.6)), np.float32)[rows, cols]
    cover = wet[..., 3:] / 255
    rim = np.abs(
        cover
        - np.asarray(Image.fromarray(np.uint8(255 * cover[..., 0])).filter(ImageFilter.GaussianBlur(4)), np.float32)[
            ..., None
        ]
        / 255
    )
    wash = np.asarray(
        Image.fromarray(rng.normal(size=(6, 6)).astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    )[..., None]
    paper = np.array((250, 245, 230), np.float32) + rng.normal(size=(SIZE, SIZE, 1)) * 3
    pigment = 0.74 * wet[..., :3] + 0.26 * 250 + 12 * wash - 60 * rim
    canvas = paper * (1 - 0.9 * cover) + pigment * 0.9 * cover
    return Image.fromarray(np.uint8(np.clip(canvas, 0, 255)))


DRAW = dict(zip(LOOKS, (sticker, ink, blueprint, neon, pixel, watercolor), strict=True))


def picture(
    index: int, path: str, *, test: bool, typical: bool = False
) -> tuple[np.ndarray, tuple[int, int, bool, bool]]:
    """Picture number `index`: (64, 64, 3) uint8 and its labels; cells take turns, the rest is drawn at random."""
    rng = np.random.default_rng((index, int(test)))
    obj, style = index % len(NAMES), index // len(NAMES) % len(LOOKS)
    is_ink = LOOKS[style] == "ink"
    families = INK_SETS if is_ink else COLOUR_SETS
    prefix = f"{'test' if test else 'train'}/{NAMES[obj]}/"
    pool = [k for k in art(path) if k.startswith(prefix) and k.split("/")[2] in families]
    if not pool:  # an object whose held-out drawings have no ink version
        pool = [k for k in art(path) if k.startswith(f"train/{NAMES[obj]}/") and k.split("/")[2] in families]
        test = False
    if typical and NAMES[obj] in TYPICAL:
        pool = [k for k in pool if k.split("/")[3] in TYPICAL[NAMES[obj]].split()]
    names = sorted({k.split("/")[3] for k in pool})
    name = names[rng.integers(len(names))]  # glyphs alike often, whatever the number of sets that have them
    pool = [k for k in pool if k.endswith("/" + name)]
    key = pool[rng.integers(len(pool))]
    glyph = Image.fromarray(art(path)[key])
    hat = NAMES[obj] in WEARERS and rng.random() < 0.3
    flip = rng.random() < 0.5 and NAMES[obj] not in ("clock", "book")
    if hat:
        choice = "hat-ink" if is_ink else ("hat-magenta", "hat-teal")[rng.integers(2)]
        glyph = wear(glyph, Image.fromarray(art(path)[f"hat/{choice}"]), rng)
    drawn = DRAW[LOOKS[style]](pose(glyph, rng, flip=flip), rng)
    small = drawn.resize((PX, PX), Image.Resampling.BOX)
    return np.asarray(small), (obj, style, hat, test)


def _chunk(job: tuple[range, str, bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    rows, path, test, typical = job
    drawn, labels = zip(*(picture(i, path, test=test, typical=typical) for i in rows), strict=True)
    return np.stack(drawn), np.array(labels, np.uint8)


def draw(
    path: Path, *, count: int, test: bool, typical: bool = False, workers: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures (count, 64, 64, 3) uint8 with labels (count, 4), drawn by `workers` processes."""
    jobs = [(range(s, min(s + 500, count)), str(path), test, typical) for s in range(0, count, 500)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(track(pool.map(_chunk, jobs), total=len(jobs), description="draw"))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def load(path: Path) -> tuple[np.ndarray, Labels]:
    """The pictures of a file that `main` wrote, with their labels."""
    with np.load(path) as store:
        pictures, labels = store["pictures"], store["labels"]
    obj, style, hat, test = labels.T
    return pictures, Labels(obj, style, hat.astype(bool), test.astype(bool))


def made_of(path: Path) -> str:
    """What the pictures of a file were made of; empty where there are none, or the file does not tell."""
    if not path.exists():
        return ""
    with np.load(path) as store:
        return str(store["made_of"]) if "made_of" in store else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--count", type=int, default=48_000)
    parser.add_argument("--test-count", type=int, default=2_400)
    args = parser.parse_args()
    glyphs = args.work / "art.npz"
    digest = checkpoint.digest(glyphs)
    for name, count in (("typical", args.count), ("pictures", args.count), ("test", args.test_count)):
        path, wanted = args.work / f"{name}.npz", f"{count} of {digest}"
        if made_of(path) == wanted:
            continue
        pictures, labels = draw(glyphs, count=count, test=name == "test", typical=name == "typical")
        part = path.with_suffix(".part.npz")
        np.savez(part, pictures=pictures, labels=labels, made_of=wanted)
        part.replace(path)
        print(f"{count} pictures in {path}")


if __name__ == "__main__":
    main()
