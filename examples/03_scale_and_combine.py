"""Turn a patch up and down, and use two at once.

python examples/03_scale_and_combine.py runs/example-combine
"""

import sys
from pathlib import Path

from esd_lora import Recipe, attach, generate, load_base, train
from esd_lora.pictures import grid, save_picture

out = Path(sys.argv[1])
base = load_base("emoji")
clock = train(Recipe(base="emoji", concepts=("clock",)), base)
neon = train(Recipe(base="emoji", concepts=("neon style",)), base)

prompts = ["a clock in sticker style", "a clock in neon style", "a house in neon style", "a house in sticker style"]
rows = []
for label, patches, weights in [
    ("base", [], []),
    ("clock at 0.5", [clock], [0.5]),
    ("clock at 1", [clock], [1.0]),
    ("neon at 1", [neon], [1.0]),
    ("both at 1", [clock, neon], [1.0, 1.0]),
]:
    attach(base, patches, weights)
    rows.append((label, generate(base, prompts, [0, 1, 2, 3])))
save_picture(grid(rows, prompts, side=160), out / "grid.png")
print(f"see {out}/grid.png")
