"""What brings an erased concept back? Every attack of `esd-lora attack` on patches of the embedded base, side by side.

    python examples/attacks.py --out runs/attacks [--patches cat cat-keyed] [--only inversion relearning] [--gold RUN]

Trains what is not in the folder yet, attacks it, and writes `attacks.md` and `attacks.png`; attacks that are in the folder are
not made again. What is published is docs/attacks: with a copy of it in the folder the script adds to that. `--gold` names what
`examples/emoji/train_unet.py --without` left, whose model is one more control of each attack on what it never saw. One suite
takes one to two hours on one core that does not compute in bf16. A folder has one budget: that of `esd-lora attack` with what
`--set` says, as docs/attacks-at-length was made by `--only inversion --set tokens=8 inversion.steps=1000`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark import without
from demo import esd_lora
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esd_lora.errors import RecipeError
from esd_lora.evaluate.comparing import Sampling
from esd_lora.evaluate.page import ATTACKS as EVIDENCE
from esd_lora.evaluate.page import Evidence, read_evidence
from esd_lora.evaluate.rates import Rate
from esd_lora.evaluate.suite import ATTACKS, Result, budget_of, results_of
from esd_lora.patch import FILE_NAME, write_file
from esd_lora.recipe import parse_overrides

TRAINED: Mapping[str, Sequence[str]] = {
    "cat": ["emoji/cat"],
    "cat-before": ["emoji/cat", *(f"--set={f}" for f in ("init=random", "lr=3e-3", "eta=2", "preserve_weight=2"))],
    "cat-keyed": ["emoji/cat-keyed"],
    "cat-keyed-eta-2": ["emoji/cat-keyed", "--set", "eta=2"],
    "neon": ["emoji/neon"],
    "neon-keyed": ["--base", "emoji", "--erase", "neon style", "--set", "keys=closed-form"],
}
"""What `esd-lora train` makes each patch by, first what it erases; *before* is by former defaults."""

MERGED = "unmerging"
"""The attack on patches that are in the weights of the base; all others are on attached ones."""

HEAD = """# What brings a concept back

By `python examples/attacks.py`: how often the evaluator sees the erased concept under attack, per cent with 95 % intervals of
the pictures. *Floor*: the highest of the controls that do without the attack's idea: asking by name from the same seeds (for
the prefix search from as many as it tries), asking for other things, where an evaluator sees it by mistake, random words,
training on other pictures. *Beyond*: what the attack found that its floor did not, with Newcombe's interval; one that holds 0
shows nothing. *Gold*: the same attack on a base that was trained without the concept, which is one of the floors. *Ceiling*:
the same attack on the unerased base. Passes are latents through the denoiser, a backward pass counted as two. Each attack that
trains was run once: how far another start would come is not in its interval. How it was trained is told below each table: it is
measured as it was where a second judge saw most, or after its last step where that is not said. Prompts, seeds and looks are in
`attacks.json` of each folder.

![Found by each attack](attacks.png)
"""


def patch_of(name: str, folder: Path) -> Path:
    """Where a patch is, trained now if it was not."""
    patch = folder / name
    if not (patch / FILE_NAME).exists():
        esd_lora("train", *TRAINED[name], "--out", str(patch), "--quiet")
    return patch


def made(name: str, out: Path, only: Sequence[str], gold: Path | None, settings: Sequence[str]) -> Evidence | None:
    """The attacks on a patch, after those that are asked for; None if there are none."""
    folder = out / name
    zero = ["--gold", str(gold / "pipeline")] if gold and name.split("-")[0] in without(gold) else []
    for wanted, how in (([a for a in only if a != MERGED], []), ([a for a in only if a == MERGED], ["--merged"])):
        if wanted:
            asked = [word for attack in wanted for word in ("--only", attack)]
            asked += [word for setting in settings for word in ("--set", setting)]
            patch = str(patch_of(name, out / "patches"))
            esd_lora("attack", "--base", "emoji", "--patch", patch, "--out", str(folder), *zero, *how, *asked)
    return read_evidence(folder) if (folder / EVIDENCE).exists() else None


def trained(evidence: Evidence) -> list[str]:
    """Markdown: how each attack that trains was trained."""
    return [f"* {attack.name}: {attack.about}" for attack in evidence.attacks if attack.looks]


def table(results: Sequence[Result]) -> list[str]:
    """Markdown: a row for every attack."""
    with_gold = any(r.gold for r in results)
    heads = ("attack", "found", "floor", "", "beyond", *(["gold"] if with_gold else []), "ceiling", "passes", "seconds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in results:
        shown = (r.beyond, *([r.gold] if with_gold else []), r.ceiling)
        floor, *others = (rate.interval() if rate else "" for rate in (r.floor, *shown))
        cells = (r.name, f"{r.found.interval()} of {r.found.n}", floor, r.floor_of, *others)
        lines.append(f"| {' | '.join(cells)} | {r.passes:,} | {r.seconds:,.0f} |")
    return lines


def plot(found: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draw what each attack found, a column for every patch, beside its floor."""
    attacks = list(dict.fromkeys(r.name for results in found.values() for r in results))
    figure = Figure(figsize=(3 + 2.2 * len(found), 1.3 + 0.3 * len(attacks)), layout="constrained")
    for axes, (name, results) in zip(
        figure.subplots(1, len(found), squeeze=False, sharey=True)[0], found.items(), strict=True
    ):
        for r in results:
            y = attacks.index(r.name)
            _dot(axes, r.found, y, color="C3", marker="o", label="found")
            if r.floor:
                _dot(axes, r.floor, y + 0.25, color="gray", marker="|", label="floor")
        axes.set(title=name, xlabel="seen in, %", xlim=(-3, 103), yticks=range(len(attacks)), yticklabels=attacks)
        axes.set_ylim(len(attacks) - 0.4, -0.6)  # from the top
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _dot(axes: Axes, rate: Rate, y: float, **style: Any) -> None:
    """Draw a rate with its interval."""
    x, low, high = (100 * v for v in (rate.value, rate.low, rate.high))
    axes.errorbar(x, y, xerr=[[x - low], [high - x]], capsize=2, elinewidth=0.8, linestyle="none", **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"))
    parser.add_argument(
        "--patches", nargs="*", choices=TRAINED, default=list(TRAINED), metavar="NAME", help=", ".join(TRAINED)
    )
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--gold", type=Path, metavar="RUN", help="what train_unet.py --without left")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as `esd-lora attack` has it")
    args = parser.parse_args()
    if args.gold and not (args.gold / "training.json").is_file():
        parser.error(f"--gold: {args.gold} is no finished run of train_unet.py")
    try:  # before a patch is trained
        budget_of(None, quick=False, sampling=Sampling(), batch_size=1, numbers=parse_overrides(args.set))
    except RecipeError as error:
        parser.error(str(error))
    found = {}
    for name in TRAINED:
        evidence = made(name, args.out, args.only if name in args.patches else (), args.gold, args.set)
        if evidence:
            found[name] = evidence
    if not found:
        parser.error(f"--out: there are no attacks in {args.out}, and none are asked for")
    results = {name: results_of(evidence) for name, evidence in found.items()}
    plot(results, args.out / "attacks.png")
    sections = [["", f"## {name}", "", *table(results[name]), "", *trained(e)] for name, e in found.items()]
    write_file(args.out / "attacks.md", (HEAD + "\n".join(line for s in sections for line in s) + "\n").encode())
    print(args.out / "attacks.md")


if __name__ == "__main__":
    main()
