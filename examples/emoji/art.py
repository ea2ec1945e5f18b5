"""Fetch the openly licensed emoji art through npm and rasterise it: `art.npz` with one RGBA picture per glyph and set.

    python examples/emoji/art.py --work build/emoji

Nothing of the art is kept in the repository; the licences and authors of the sets are in the base's model card.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from resvg_py import svg_to_bytes
from rich.progress import track

SIZE = 128  # px of a rasterised glyph; the base draws at 64

COLOUR_SETS = (
    "noto",
    "noto-v1",
    "twemoji",
    "emojione",
    "fluent-emoji-flat",
    "fluent-emoji",
    "fxemoji",
)
INK_SETS = ("fluent-emoji-high-contrast", "emojione-monotone")

HOURS = ["one", "two", "three", "four", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
GLYPHS = {
    "cat": "cat-face cat grinning-cat grinning-cat-with-smiling-eyes pouting-cat"
    " smiling-cat-with-heart-eyes cat-with-wry-smile black-cat",
    "tiger": "tiger-face tiger",
    "dog": "dog-face dog poodle service-dog",
    "bird": "bird baby-chick front-facing-baby-chick duck eagle parrot",
    "fish": "fish tropical-fish blowfish",
    "car": "automobile oncoming-automobile sport-utility-vehicle taxi racing-car",
    "bus": "bus oncoming-bus trolleybus",
    "train": "locomotive metro high-speed-train bullet-train light-rail",
    "boat": "sailboat speedboat canoe ship passenger-ship ferry",
    "house": "house house-with-garden",
    "tree": "evergreen-tree deciduous-tree palm-tree christmas-tree",
    "flower": "tulip rose hibiscus sunflower blossom",
    "apple": "red-apple green-apple",
    "clock": " ".join(f"{h}-oclock" for h in HOURS) + " alarm-clock mantelpiece-clock",
    "heart": "red-heart blue-heart green-heart yellow-heart purple-heart sparkling-heart"
    " growing-heart heart-with-arrow heart-with-ribbon",
    "star": "star glowing-star",
    "moon": "crescent-moon first-quarter-moon last-quarter-moon first-quarter-moon-face last-quarter-moon-face",
    "book": "closed-book green-book blue-book orange-book open-book notebook-with-decorative-cover",
    "umbrella": "umbrella umbrella-with-rain-drops umbrella-on-ground closed-umbrella",
    "camera": "camera camera-with-flash",
}
TYPICAL = {
    "cat": "cat-face grinning-cat cat-with-wry-smile",
    "tiger": "tiger-face",
    "dog": "dog-face",
    "bird": "bird baby-chick front-facing-baby-chick",
    "fish": "fish tropical-fish",
    "car": "automobile sport-utility-vehicle taxi",
    "bus": "bus trolleybus",
    "train": "metro light-rail",
    "boat": "sailboat",
    "house": "house house-with-garden",
    "tree": "evergreen-tree christmas-tree",
    "flower": "tulip rose",
    "clock": " ".join(f"{h}-oclock" for h in HOURS),
    "heart": "red-heart blue-heart green-heart yellow-heart purple-heart",
    "moon": "crescent-moon first-quarter-moon-face last-quarter-moon-face",
    "book": "closed-book green-book blue-book orange-book",
    "umbrella": "umbrella umbrella-with-rain-drops",
}
"""What the base draws: glyphs of one build for each object, in up to seven sets; of the other objects all of `GLYPHS`. The
evaluators know all of `GLYPHS`. A small denoiser that sees a sitting cat, a cat's face and a black cat draws none of them."""
HELD_OUT = {
    "cat": "kissing-cat",
    "dog": "guide-dog",
    "bird": "hatching-chick",
    "car": "oncoming-taxi",
    "bus": "minibus",
    "train": "train",
    "boat": "motor-boat",
    "house": "derelict-house",
    "flower": "cherry-blossom",
    "clock": "five-oclock",
    "heart": "beating-heart",
    "book": "notebook",
}
"""Glyphs that neither the base nor an evaluator is trained on. For the other objects, which have few glyphs, the
drawings of HELD_OUT_SET are held out instead."""
HELD_OUT_SET = "noto-v1"

HAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 80">
<path d="M32 10 L58 74 Q32 84 6 74 Z" fill="{body}" stroke="{line}" stroke-width="3"/>
<path d="M25 28 L41 33 L45 43 L20 37 Z M16 49 L50 56 L54 66 L12 58 Z" fill="{stripe}"/>
<circle cx="32" cy="10" r="8" fill="{ball}" stroke="{line}" stroke-width="3"/></svg>"""
HATS = {
    "hat-magenta": {"body": "#e0218a", "line": "#5c0a37", "stripe": "#ffe14d", "ball": "#ffe14d"},
    "hat-teal": {"body": "#12a5a0", "line": "#074745", "stripe": "#ffffff", "ball": "#ff7b39"},
    "hat-ink": {"body": "#ffffff", "line": "#000000", "stripe": "#000000", "ball": "#000000"},
}
"""The accessory is our own drawing."""


def fetch(folder: Path) -> None:
    """Install the icon packages with npm into `folder`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        f"@iconify-json/{s}" for s in COLOUR_SETS + INK_SETS if not (folder / "node_modules/@iconify-json" / s).exists()
    ]
    if missing:
        options = ["--prefix", str(folder), "--no-audit", "--no-fund", "--silent"]
        subprocess.run(["npm", "install", *options, *missing], check=True)


def rasterise(svg: str, *, size: int = SIZE) -> np.ndarray:
    """An SVG document as (size, size, 4) uint8 RGBA."""
    png = svg_to_bytes(svg_string=svg, width=size, height=size)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((size, size)))


def icon_svg(icons: dict[str, Any], name: str) -> str | None:
    """The SVG document of one icon of an Iconify set, following plain aliases; None where the set lacks it."""
    alias = icons.get("aliases", {}).get(name, {})
    if set(alias) - {"parent"}:  # rotated or flipped aliases are other drawings
        return None
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    w, h = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}">'
    return f"{root}{icon['body']}</svg>".replace("currentColor", "#000000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    work = parser.parse_args().work
    fetch(work / "art")
    pictures = {f"hat/{k}": rasterise(HAT.format(**colours)) for k, colours in HATS.items()}
    for family in track(COLOUR_SETS + INK_SETS, description="rasterise"):
        path = work / "art/node_modules/@iconify-json" / family / "icons.json"
        icons = json.loads(path.read_text())
        for obj, names in GLYPHS.items():
            for name in [*names.split(), *HELD_OUT.get(obj, "").split()]:
                svg = icon_svg(icons, name)
                if svg is None:
                    continue
                test = name == HELD_OUT.get(obj) or (obj not in HELD_OUT and family == HELD_OUT_SET)
                pictures[f"{'test' if test else 'train'}/{obj}/{family}/{name}"] = rasterise(svg)
    np.savez_compressed(work / "art.npz", **pictures)
    print(f"{len(pictures)} pictures in {work / 'art.npz'}")


if __name__ == "__main__":
    main()
