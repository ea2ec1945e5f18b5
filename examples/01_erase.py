"""Erase the clock from the embedded base, and look at it before and after.

python examples/01_erase.py runs/example-erase
"""

import sys
from pathlib import Path

from esd_lora import Recipe, attach, generate, load_base, train
from esd_lora.pictures import grid, save_picture

out = Path(sys.argv[1])
base = load_base("emoji")
prompts = ["a clock in sticker style", "a clock in neon style", "a moon in sticker style", "a tree in neon style"]
seeds = [0, 1, 2, 3]

before = generate(base, prompts, seeds)
patch = train(Recipe(base="emoji", concepts=("clock",)), base, out=out)
attach(base, [patch])
after = generate(base, prompts, seeds)

save_picture(grid([("before", before), ("after", after)], prompts, side=192), out / "grid.png")
print(
    f"{len(patch.ranks)} layers, {(out / 'pytorch_lora_weights.safetensors').stat().st_size} bytes; see {out}/grid.png"
)
