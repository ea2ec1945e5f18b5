"""Put a trained pipeline into the package: measure it, draw its grid, write its card and licence.

    python examples/emoji/card.py --run build/emoji/base          [--check: measure the shipped base, write nothing]

The gate: over the whole object × style grid with fixed seeds the evaluator finds the right object in at least 90 % and the
right style in at least 95 % of the pictures. A pipeline that fails it stays out of the package, and the script exits with 1;
so does a gold model, which would pass it with 19 of the 20 objects, and the script exits with 2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from esd_lora.bases import EMOJI, load_base, quick_dtype
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.emoji.vocabulary import ACCESSORY, OBJECTS, STYLES, WEARERS
from esd_lora.evaluate.scores import GATE, draw, gate, whole_grid
from esd_lora.pictures import grid, save_picture

SETS = {
    "Noto Emoji": ("Google", "Apache-2.0", "googlefonts/noto-emoji"),
    "Noto Emoji v1": ("Google", "Apache-2.0", "googlefonts/noto-emoji"),
    "FxEmojis": ("Mozilla", "Apache-2.0", "mozilla/fxemoji"),
    "Fluent Emoji, Flat and High Contrast": ("Microsoft", "MIT", "microsoft/fluentui-emoji"),
    "Twemoji": ("Twitter and contributors", "CC-BY-4.0", "twitter/twemoji"),
    "EmojiOne 2, colour and monotone": ("Ranks.com", "CC-BY-4.0", "joypixels/emojione"),
}

CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, concept-erasure]
---
# emoji

A small but real text-to-image latent diffusion model: {objects} objects in {styles} styles at 64 px, {size:.1f} MB, made to
measure concept erasure on two CPU cores. Stock classes: `StableDiffusionPipeline.from_pretrained(folder)` loads it.

![Every object in every style]({grid})

*Columns: {names}. Rows: {looks}. The first seed of every cell, not selected.*

| measured over | right | 95 % interval | n |
|---|---|---|---|
{table}

{gate}
By the evaluator `measure`, {seeds} seeds a cell, 20 DDIM steps, guidance 7.5, bfloat16; `examples/emoji/card.py` prints it.

**Prompts.** "a cat in neon style", "neon style cat", "a cat, neon" and more; each object and style has synonyms and a German
name; {wearers} can wear a {accessory}: "a cat with a {accessory} in ink style".

**Model.** UNet of 64, 128 and 192 channels with cross-attention at every level, text encoder of 3 layers and 128 channels
trained with it, autoencoder with 4 × 16 × 16 latents of unit variance, v-prediction, scaled-linear β from 0.00085 to 0.012.
Trained by the scripts in `examples/emoji` on pictures rendered from openly licensed emoji art: {training}.

**What it is not.** It tests software and relative behaviour. It says nothing about the safety of large models.

## Art and licence

The weights are under CC-BY-4.0 ([LICENSE](LICENSE)). None of the art itself is here; the pictures that the model was trained
on were drawn from

| set | by | licence | repository |
|---|---|---|---|
{sets}
"""

LICENSE = """The weights in this folder are under the Creative Commons Attribution 4.0 International licence (CC-BY-4.0),
https://creativecommons.org/licenses/by/4.0/legalcode

They were trained on pictures rendered from these sets, changed in pose, colour and style:

{sets}
"""


def training_of(parser: argparse.ArgumentParser, run: Path) -> dict[str, Any]:
    """What `train_unet.py` told of a run; exits with 2 where it is not finished, or not one of a base."""
    path = run / "training.json"
    if not path.exists():
        parser.exit(2, f"{run}: no finished run of train_unet.py\n")
    told: dict[str, Any] = json.loads(path.read_text())
    if told.get("without"):
        parser.exit(2, f"{run}: a gold model, which lacks some concepts; gold.py measures it\n")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("build/emoji/base"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    told = {} if args.check else training_of(parser, args.run)
    base = load_base("emoji" if args.check else str(args.run / "pipeline"), dtype=quick_dtype())
    rates = gate(base, load_evaluator("measure"), seeds=args.seeds)
    for name, found in rates.items():
        print(f"{name}: {found.short()}")
    failed = [name for name, least in GATE.items() if rates[name].value < least]
    gate_line = " and ".join(f"{name} at least {100 * least:.0f} %" for name, least in GATE.items())
    gate_line = f"The gate, {gate_line}, is {'not passed: ' + ', '.join(failed) if failed else 'passed'}."
    print(gate_line)
    if args.check or failed:
        sys.exit(bool(failed))
    cells = whole_grid(seeds=1)
    pictures = draw(base, cells)
    rows = [(s, [p for p, c in zip(pictures, cells, strict=True) if c.style == s]) for s in STYLES]
    shutil.copytree(args.run / "pipeline", EMOJI, dirs_exist_ok=True)
    sheet: Image.Image = grid(rows, list(OBJECTS), side=64)
    save_picture(sheet, EMOJI / "grid.png")
    table = [
        f"| {n} | {100 * r.value:.1f} % | {100 * r.low:.1f} to {100 * r.high:.1f} | {r.n} |" for n, r in rates.items()
    ]
    size = sum(p.stat().st_size for p in EMOJI.rglob("*.safetensors")) / 1e6
    card = CARD.format(
        training=f"{told['steps']:,} steps of {told['batch']} pictures"
        + (", from the weights of the version before" if told.get("init") else ""),
        objects=len(OBJECTS),
        styles=len(STYLES),
        size=size,
        grid="grid.png",
        names=", ".join(OBJECTS),
        looks=", ".join(STYLES),
        seeds=args.seeds,
        wearers=", ".join(WEARERS),
        accessory=ACCESSORY,
        table="\n".join(table),
        gate=gate_line,
        sets="\n".join(f"| {s} | {by} | {licence} | {repo} |" for s, (by, licence, repo) in SETS.items()),
    )
    (EMOJI / "README.md").write_text(card, encoding="utf-8")
    (EMOJI / "gate.json").write_text(json.dumps({k: vars(r) for k, r in rates.items()}, indent=2) + "\n")
    notice = "\n".join(
        f"{s}, by {by}, {licence}, from the repository {repo}" for s, (by, licence, repo) in SETS.items()
    )
    (EMOJI / "LICENSE").write_text(LICENSE.format(sets=notice), encoding="utf-8")
    print(f"{size:.1f} MB of weights in {EMOJI.name}/, with its card, licence and grid.png")


if __name__ == "__main__":
    main()
