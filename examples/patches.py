"""The patches that this project trains on the embedded base, with what was measured of each: docs/patches.md.

    python examples/patches.py --out runs/patches                     all recipes of the embedded base
    python examples/patches.py --out runs/patches emoji/cat emoji/neon

Trains and measures what is not in the folder yet, writes each patch's card, and then the table.
"""

import argparse
from pathlib import Path

from demo import esd_lora

from esd_lora.card import WORST, rates_of, scores_of, target_of
from esd_lora.cli import RECIPES
from esd_lora.patch import FILE_NAME, Patch, load_patch, write_file

PAGE = Path(__file__).parent.parent / "docs" / "patches.md"
HEAD = """# Patches of the embedded base

By `python examples/patches.py`. Each is made by `esd-lora train` from the recipe of its name; *gone* is the share of
pictures of the erased concept in which the evaluator does not find it, *kept* the shares of others of its kind and of
the other kind that it does. Percent with 95 % Wilson intervals and the number of pictures, beside it the base's own.
*kB*: of a patch's numbers, beside which its file has a header.

| patch | erases | layers | rank | kB | gone | others of its kind kept | the other kind kept | worst three kept |
|---|---|---|---|---|---|---|---|---|
"""


def rows_of(name: str, patch: Patch) -> list[str]:
    """A row of the table for each concept of a patch that was measured."""
    recipe = patch.info.get("recipe", {})
    size = sum(t.numel() * t.element_size() for t in patch.tensors.values()) / 1e3
    rows = []
    for scores in scores_of(patch):
        rates = list(rates_of(scores).items())
        promised = [r.short() for k, r in rates if not k.startswith(WORST)]
        gone, kept = promised[0], promised[1:3] if hasattr(scores, "ua") else promised[2:4]
        worst = ", ".join(f"{k.removeprefix(WORST)} {100 * r.value:.0f}" for k, r in rates if k.startswith(WORST))
        what = [
            f"[`{name}`](../recipes/{name}.yaml)",
            target_of(scores),
            recipe.get("layers", ""),
            f"{recipe.get('rank', '')}",
        ]
        rows.append("| " + " | ".join([*what, f"{size:.0f}", gone, *kept, worst]) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="recipes; by default all of the embedded base")
    parser.add_argument("--out", type=Path, default=Path("runs/patches"), help="where the patches' folders are")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    wanted = parser.parse_args()
    shipped = sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.glob("emoji/*.yaml"))
    folders = {name: wanted.out / name for name in wanted.names or shipped}
    for name, folder in folders.items():
        if not (folder / FILE_NAME).exists():
            esd_lora("train", name, "--out", str(folder), "--quiet")
    unmeasured = [str(folder) for folder in folders.values() if not load_patch(folder).info.get("scores")]
    if unmeasured:  # all at once, for they share the base's own pictures
        esd_lora("eval", "--base", "emoji", *(a for folder in unmeasured for a in ("--patch", folder)), "--quiet")
    rows = []
    for name, folder in folders.items():
        esd_lora("card", str(folder), *([] if (folder / "images").exists() else ["--base", "emoji"]))
        rows += rows_of(name, load_patch(folder))
    write_file(wanted.page, (HEAD + "\n".join(rows) + "\n").encode())
    print(wanted.page)


if __name__ == "__main__":
    main()
