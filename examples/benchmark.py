"""The published benchmark: every object and style of the embedded base, erased by every method, with three training seeds.

    python examples/benchmark.py --out runs/benchmark [--targets cat neon] [--against sld esd-x] [--seeds 3] [--gold RUN]

Each target gets a report of its own in a folder of its name; what was trained or drawn is kept, so that the script goes on
where it stopped, for some hours on two cores, and goes back to a target where more methods are asked for; to these alone
where our own patches are no longer there, and to the strengths that it lacks. The counts of all reports are in
`benchmark.json`, with hashes of what they were measured with, and in the precision of the first; of these `benchmark.md` and
its plot are made, and `facts.py` says what follows. Rates are means over targets, their intervals over targets and, within
each, training seeds. Pictures take half the usual steps, by which the base draws as well. What is published is
docs/benchmark.json: with a copy of it in the folder the script adds to that. `--gold` names what `emoji/train_unet.py
--without` left; it is compared for the targets that it lacks, and asked for no other that it lacks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from esd_lora.bases import Base, load_base, quick_dtype
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.evaluate.answers import Answers, emoji_answers, some_of
from esd_lora.evaluate.baselines import uce_recipe
from esd_lora.evaluate.comparing import Comparison, Sampling, compare
from esd_lora.evaluate.evaluators import EmojiEvaluator
from esd_lora.evaluate.page import Group, Point, Target, make_report, points_of, write_page
from esd_lora.evaluate.rates import Rate, cluster_bootstrap, mean_of_few, wilson
from esd_lora.evaluate.ways import BASELINES, ON_EMOJI, Subject, Way, baseline_way, control_ways, gold_way, patch_way
from esd_lora.patch import write_file
from esd_lora.recipe import Concept, DType, Recipe
from esd_lora.training import read_cost, train

PICTURES: Mapping[Group, int] = {"target": 30, "neighbour": 12, "unrelated": 36}
"""Of each target at every strength: few, for intervals are over targets, which are many. Its neighbours, where it has any, are
all or 12 of those that are kept, so that what happens to them can be told."""

SAMPLING = Sampling(steps=10)

OURS: Mapping[str, Mapping[str, Any]] = {
    "esd_lora": {},
    "esd_lora, nothing preserved": {"preserve_weight": 0.0},
    "esd_lora, keyed": {"keys": "closed-form"},
}
"""Our methods, by what a recipe has besides its concept. The first, our defaults, has every training seed, the others one."""

STRENGTHS: Mapping[str, tuple[float, ...]] = {"esd_lora, keyed": (1.0, 2.0, 3.0)}
"""Weights of patches, where these are not 0.5, 1 and 1.5: at twice its weight a keyed patch is one of η = 2."""


UNTRAINED = ("sld", "negative-prompt", "separate-negative")
"""Methods that train nothing, and have more strengths now than when the first targets were measured."""
GOLD = "gold"
"""What `--against` does not name: a base that lacks the target."""


def without(run: Path) -> list[str]:
    """What a run of train_unet.py left out."""
    names: list[str] = json.loads((run / "training.json").read_text())["without"]
    return names


@dataclass(frozen=True)
class Gold:
    """A base that lacks some targets."""

    base: Base
    lacks: frozenset[str]

    @classmethod
    def of(cls, run: Path, *, dtype: DType) -> Gold:
        """What a run of train_unet.py left."""
        return cls(load_base(str(run / "pipeline"), dtype=dtype), frozenset(without(run)))


def others_for(subject: Subject, against: Sequence[str], gold: Gold | None) -> Iterator[Way]:
    """The methods that ours are compared with; what they train is kept on disk."""
    yield from (baseline_way(name, subject) for name in against if name != GOLD)
    if gold and GOLD in against and subject.target.label in gold.lacks:
        yield gold_way(gold.base, lacks=gold.lacks - {subject.target.label})


def ours_for(subject: Subject, seeds: int) -> Iterator[Way]:
    """Our methods, and the controls, of which the random one is as large as our defaults; what is trained is kept on disk."""
    patches = []
    for name, fields in OURS.items():
        for seed in range(1 if fields else seeds):
            recipe = Recipe(base="emoji", concepts=(subject.concept,), seed=seed, **fields)
            out = subject.folder / f"{name.replace(', ', '-')}-{seed}"
            patches.append(train(recipe, subject.trainer, out=out, resume=True))
            some = STRENGTHS.get(name, (0.5, 1.0, 1.5))
            told, strengths = (name, some) if seed == 0 else (f"{name}, seed {seed}", (1.0,))
            seconds = read_cost(out)["seconds"]["total"]
            yield patch_way(subject.base, told, patches[-1], strengths=strengths, seconds=seconds)
    yield from control_ways(subject.base, patches[0], layers="esd-x")


Had = Collection[tuple[str, float]]
"""The methods and strengths that a target has rows of."""


@dataclass(frozen=True)
class Bench:
    """What all targets share."""

    base: Base
    trainer: Base
    evaluator: EmojiEvaluator
    out: Path
    seeds: int
    gold: Gold | None
    dtype: DType

    @property
    def setting(self) -> dict[str, Any]:
        """Whatever else must be the same for the counts of targets to stand together."""
        base, evaluator = self.base, self.evaluator
        solved = uce_recipe(base, [concept_of("cat")])
        hashes = {"base": base.fingerprint, "parts": base.parts_fingerprint, "evaluator": evaluator.digest}
        return {
            **hashes,
            "dtype": self.dtype,
            "sampling": asdict(SAMPLING),
            "pictures": dict(PICTURES),
            "seeds": self.seeds,
            "ours": {name: made_by(fields) for name, fields in OURS.items()},
            "baselines": {**{name: dict(numbers) for name, numbers in ON_EMOJI.items()}, "uce": made_with(solved)},
        }

    def methods_of(self, name: str) -> Path:
        """The folder of what is trained for a target."""
        return self.out / name / "methods"

    def subject(self, name: str) -> Subject:
        """A target as the methods are to erase it."""
        target = Target(kind="object" if name in OBJECTS else "style", label=name)
        return Subject(self.base, concept_of(name), target, self.methods_of(name), load=lambda: self.trainer)

    def lacking(self, name: str, against: Iterable[str], have: Had) -> list[str]:
        """Those of these methods that train nothing, which a target does not have at all their strengths."""
        ways = {method: baseline_way(method, self.subject(name)) for method in against if method in UNTRAINED}
        return [m for m, way in ways.items() if any((way.method.name, s) not in have for s in way.strengths)]

    def run(self, name: str, against: Sequence[str], *, ours: bool, have: Had) -> list[dict[str, Any]]:
        """The counts of these methods, and maybe of ours, for one target, whose report is written too.

        At every strength or, without ours, at those that it does not have.
        """
        subject, folder = self.subject(name), self.out / name
        kind, concept, target = subject.target.kind, subject.concept, subject.target
        ways = others_for(subject, against, self.gold)
        others = ways if ours else (at_others(way, have) for way in ways)
        told = ["--gold RUN" if method == GOLD else method for method in against]
        report = compare(
            Comparison(self.base, answers_of(name), target, self.evaluator, folder, SAMPLING, gaps=False),
            [*(ours_for(subject, self.seeds) if ours else ()), *others],
            title=f"{concept.erase}, erased from emoji",
            command=f"python examples/benchmark.py --targets {name} --against {' '.join(told)}",
        )
        write_page(report, folder / "report.html")
        return [counts_of(name, kind, point) for point in points_of(make_report(report))]


def at_others(way: Way, have: Had) -> Way:
    """A way at the strengths that a target does not have; at all where it has each."""
    lacking = tuple(s for s in way.strengths if (way.method.name, s) not in have) or way.strengths
    return replace(way, strengths=lacking, default=way.default if way.default in lacking else lacking[-1])


def concept_of(target: str) -> Concept:
    """What a recipe erases for a target."""
    return Concept(erase=target if target in OBJECTS else f"{target} style")


def made_with(recipe: Recipe) -> dict[str, Any]:
    """What a recipe has besides its concept and its seed, the defaults of today among it."""
    return {k: v for k, v in recipe.to_dict().items() if k not in ("concepts", "seed")}


def made_by(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same of one with these fields."""
    return made_with(Recipe(base="emoji", concepts=(concept_of("cat"),), **fields))


def answers_of(target: str) -> Answers:
    """So many pictures of each group, drawn at random once and for all."""
    crossing = len(STYLES if target in OBJECTS else OBJECTS)
    every = emoji_answers(target, target_seeds=math.ceil(PICTURES["target"] / crossing), kept_seeds=1)
    groups = ([ask for ask in every.asks if ask.group == group] for group in PICTURES)
    some = (some_of(asks, n) for asks, n in zip(groups, PICTURES.values(), strict=True))
    return replace(every, asks=tuple(itertools.chain(*some)))


def counts_of(target: str, kind: str, point: Point) -> dict[str, Any]:
    """How many pictures of a point are hits, how many of the base's, and how many there are, by rate."""

    def group(name: str) -> Rate | None:
        return point.share_if_any(lambda r: r.group == name, lambda r: r.seen[kind] == r.wanted[kind])

    rates = {"UA": point.erased, "kept": point.kept, "IRA": point.ira, "CRA": point.cra, "at target": point.at_target}
    rates |= {"near": group("neighbour"), "far": group("unrelated")}
    name, _, seed = point.method.name.partition(", seed ")
    row = {"target": target, "kind": kind, "method": name, "seed": int(seed or 0), "strength": point.strength}
    row["counts"] = {k: [round(r.value * r.n), round((r.base or 0) * r.n), r.n] for k, r in rates.items() if r}
    return row | {"label": point.label, "cost": point.method.cost and point.method.cost.model_dump()}


Rows = Sequence[Mapping[str, Any]]


def mean(rows: Rows, rate: str) -> Rate | None:
    """The mean over targets with its interval over targets and seeds or, where that is wider, over pictures; None of none."""
    have = [r for r in rows if rate in r["counts"]]
    if not have:
        return None
    shares = [share(r, rate) for r in have]
    targets = by_target(have, rate)
    value = sum(targets.values()) / len(targets)
    n = sum(r["counts"][rate][2] for r in have)
    over_targets = cluster_bootstrap(shares, [(r["target"], r["seed"]) for r in have])
    low, high = zip(over_targets, wilson(value, n), strict=True)
    return Rate(value, n, min(low), max(high))


def interval_of(rows: Rows, rate: str) -> str:
    """The mean in per cent with its interval, in words; nothing where there is none."""
    found = mean(rows, rate)
    return found.interval() if found else ""


def share(row: Mapping[str, Any], rate: str) -> float:
    """Hits over pictures."""
    hits, _, n = row["counts"][rate]
    return float(hits / n)


def by_target(rows: Rows, rate: str) -> dict[str, float]:
    """The mean over seeds, for each target."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["target"], []).append(share(row, rate))
    return {target: sum(some) / len(some) for target, some in shares.items()}


def settings(rows: Rows, kind: str) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The rows of one kind of target by method and strength, that in words, weakest first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for row in sorted(rows, key=lambda r: (methods.index(r["method"]), r["strength"])):
        if row["kind"] == kind:
            groups.setdefault((row["method"], row["label"]), []).append(row)
    return groups


def settings_of_all(rows: Rows, kind: str) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The same without strengths that only some of a method's targets have, which cannot stand beside its others."""
    groups = settings(rows, kind)
    targets: dict[str, set[str]] = {}
    for (method, _), some in groups.items():
        targets.setdefault(method, set()).update(r["target"] for r in some)
    return {key: some for key, some in groups.items() if {r["target"] for r in some} == targets[key[0]]}


def table(rows: Rows) -> list[str]:
    """Markdown: every method at every strength, for objects and for styles."""
    rates = ("UA", "IRA", "CRA", "at target", "near")
    lines = [f"| erased | method | {' | '.join(rates)} | targets | seconds | passes |", "|---" * (len(rates) + 5) + "|"]
    for kind in ("object", "style"):
        for (method, label), some in settings(rows, kind).items():
            costs = [r["cost"] for r in some if r["cost"]]
            cost = (
                [f"{sum(c[k] for c in costs) / len(costs):,.0f}" for k in ("seconds", "passes")] if costs else ["", ""]
            )
            shown = [interval_of(some, rate) for rate in rates]
            targets = len({r["target"] for r in some})
            lines.append(f"| {kind}s | {method} {label} | {' | '.join(shown)} | {targets} | {' | '.join(cost)} |")
    return lines


TOLD = ("objective", "keys", "layers", "rank", "eta", "preserve_weight")
TOLD_OF_TRAINING = ("preserve_beside", "init", "steps", "batch_size", "lr")
"""What the page tells of our recipes."""
ERASED = 0.95
"""The mean UA at which methods are compared."""
CONTROLS = ("base", "null", "random", "scrambling")
"""What is not compared."""
COMPARED = {"esd_lora": "the defaults", "esd_lora, keyed": "keyed"}
"""What the others are compared with, and its name in a heading."""


def best_of(rows: Rows, kind: str) -> dict[str, tuple[str, list[Mapping[str, Any]]]]:
    """Of every method the strength that keeps most, among those that erase enough; its label and rows."""
    enough: dict[str, list[tuple[float, str, list[Mapping[str, Any]]]]] = {}
    for (method, label), some in settings_of_all(rows, kind).items():
        erased, kept = mean(some, "UA"), mean(some, "kept")
        if erased and kept and erased.value >= ERASED:
            enough.setdefault(method, []).append((kept.value, label, some))
    return {method: max(found, key=lambda one: one[0])[1:] for method, found in enough.items()}


def matched(rows: Rows) -> list[str]:
    """Markdown: each method at the strength that keeps most of those that erase enough, beside our defaults and keyed."""
    heads = (
        "erased",
        "method",
        "UA",
        "kept",
        *(f"{name} keep more by" for name in COMPARED.values()),
        "at target",
        "targets",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in ("object", "style"):
        best = best_of(rows, kind)
        for method in dict.fromkeys(r["method"] for r in rows if r["kind"] == kind and r["method"] not in CONTROLS):
            if method not in best:
                lines.append(f"| {kind}s | {method} | at no strength {100 * ERASED:.0f} |{' |' * (len(heads) - 3)}")
                continue
            label, some = best[method]
            erased, kept, at_target = (interval_of(some, rate) for rate in ("UA", "kept", "at target"))
            more = [difference(best[one][1], some) if one in best and one != method else "" for one in COMPARED]
            targets = len({r["target"] for r in some})
            cells = (f"{kind}s", f"{method} {label}", erased, kept, *more, at_target, f"{targets}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def more_by(these: Mapping[str, float], others: Mapping[str, float]) -> Rate:
    """The mean of how much more these are over the targets that both have, two at least, with Student's interval over them."""
    return mean_of_few([these[t] - others[t] for t in these if t in others])


def difference(ours: Rows, others: Rows) -> str:
    """How much more is kept, in points with its interval over targets, where there are several."""
    these, theirs = by_target(ours, "kept"), by_target(others, "kept")
    if len(both := these.keys() & theirs.keys()) == 1:
        (target,) = both
        return f"{100 * (these[target] - theirs[target]):+.1f}"
    more = more_by(these, theirs)
    return f"{100 * more.value:+.1f} [{100 * more.low:+.1f}, {100 * more.high:+.1f}]"


def plot(rows: Rows, path: Path) -> None:
    """Draw erased over kept: a line for every method, over its strengths."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m not in CONTROLS]
    colors = dict(zip(methods, matplotlib.colormaps["tab20"].colors, strict=False))
    for axes, kind in zip(figure.subplots(1, 2), ("object", "style"), strict=True):
        lines: dict[str, list[tuple[Rate, Rate]]] = {}
        for (method, _), some in settings_of_all(rows, kind).items():
            kept, erased = mean(some, "kept"), mean(some, "UA")
            if method in colors and kept and erased:
                lines.setdefault(method, []).append((kept, erased))
        for method, points in lines.items():
            x, y = ([p[i].value for p in points] for i in (0, 1))
            across, along = (
                [[p[i].value - p[i].low for p in points], [p[i].high - p[i].value for p in points]] for i in (0, 1)
            )
            style = {"color": colors[method], "linewidth": 3 if method == "esd_lora" else 1, "label": method}
            axes.errorbar(x, y, along, across, fmt="o-", markersize=4, capsize=2, elinewidth=0.6, **style)
        targets = len({r["target"] for r in rows if r["kind"] == kind})
        axes.axhline(ERASED, color="gray", linestyle=":", linewidth=1)
        axes.set(title=f"{targets} {kind}s", xlabel="kept", ylabel="erased")
        axes.set_xlim(right=1.01)
        axes.set_ylim(top=1.02)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


HEAD = """# The published benchmark

By `python examples/benchmark.py`, of [benchmark.json](benchmark.json). Per cent, means over targets with 95 % intervals over
them and, within each, training seeds (of few targets they are too narrow), or of all pictures where these are wider. UA: the
target gone; kept: object and style right where something else is asked for; IRA and CRA: the rest of its kind, and the other
kind, right; at target: the other kind right where the target is asked for; near: its neighbours kept. Of each kept concept a
target has two pictures or so: too few to tell which are the worst.

Our defaults are trained three times. All else is made once: keyed patches and UCE are solved for, and have no seed;
fine-tuning by ESD takes ten minutes of one core and LECO twenty, so that they have few targets, which the tables tell, and in
the plot lines of a few or of one. *Data filtering* is one base that was trained without cats and neon (`python
examples/emoji/train_unet.py --without cat neon --steps 3000`, then `benchmark.py --targets cat neon --against uce --gold
RUN`). Every method draws the same prompts from the same noise, of which the three controls draw 12 of the target and 36
others, so that *null* may differ from *base* in the rates of a few targets though every picture is the same. These are a
choice from the grid: neighbours are a quarter of what is to be kept where the target has any. In CRA, prompts for the target
weigh a seventh to a ninth for objects and a quarter to a third for styles; in UnlearnCanvas a twentieth and a sixth.

Ours and UCE preserve what a list of everyday words names, most of the kept objects and styles among them; the authors' ESD and
LECO preserve nothing, as ours in *nothing preserved*. The rates and steps of ESD and LECO were fitted to this base, on which
ESD-x and LECO erase too little by their own: four times the rate of the authors' code for ESD-x, ten times that of LECO's and
two fifths of its steps, and for ESD-u twenty times the rate of the paper and a fifth of its steps. ESD-u has every weight
outside cross-attention, as in the paper; the authors' present code leaves out norms. The presets of Safe Latent Diffusion are
in units of Stable Diffusion 1's ε: other λ between its last two are tried as well, as are negative prompts of 4 and 10, of
some targets, which the last table tells; strengths that not all of a method's targets have are in that table alone. Keyed
patches and UCE are solved for the concept in a few templates, of which one is that of the answers, "a {} in {} style": of
prompts in other words they may erase less.

![Erased over kept](benchmark.png)

Every method at the strength that keeps most of those with a mean UA of 95 or more, chosen by these pictures themselves, and how
much more our defaults and our keyed patches, chosen likewise, keep of the same targets, with Student's intervals over these:

"""


Known = dict[str, Any]
"""What benchmark.json has: by target its setting and what it was compared with, and the rows of counts."""


BESIDE = ("against", "gold")
"""What may differ between targets that stand together."""


def standing_with(known: Known, setting: Mapping[str, Any]) -> Known:
    """What of it was measured by this setting, so that it stands together."""
    targets = {t: s for t, s in known["targets"].items() if setting == {k: v for k, v in s.items() if k not in BESIDE}}
    return {"targets": targets, "rows": [r for r in known["rows"] if r["target"] in targets]}


def joined(known: Rows, new: Rows) -> list[Mapping[str, Any]]:
    """All rows; those of a method that was measured again at a strength for a target are the new ones."""

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["target"], row["method"], row["seed"], row["strength"]

    again = {place(row) for row in new}
    return [*(row for row in known if place(row) not in again), *new]


def write_page_of(known: Known, folder: Path) -> None:
    """Write the page of all counts, and its plot."""
    rows, ours = known["rows"], next(iter(known["targets"].values()))["ours"]
    plot(rows, folder / "benchmark.png")
    lines = [*matched(rows), "", "Every method at every strength:", "", *table(rows), "", "What our recipes have:", ""]
    for name, fields in ours.items():
        told = (*TOLD, *(() if fields["objective"] == "closed-form" else TOLD_OF_TRAINING))
        lines.append(f"* {name}: {', '.join(f'{k} {fields[k]}' for k in told)}")
    write_file(folder / "benchmark.md", (HEAD + "\n".join(lines) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--targets", nargs="+", choices=(*OBJECTS, *STYLES), default=(*OBJECTS, *STYLES), metavar="NAME"
    )
    parser.add_argument("--against", nargs="+", choices=tuple(BASELINES), default=tuple(BASELINES), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gold", type=Path, metavar="RUN", help="what train_unet.py --without left")
    args = parser.parse_args()
    if args.gold and not (args.gold / "training.json").is_file():
        parser.error(f"--gold: {args.gold} is no finished run of train_unet.py")
    path = args.out / "benchmark.json"
    found: Known = json.loads(path.read_text()) if path.exists() else {"targets": {}, "rows": []}
    dtype: DType = next((s["dtype"] for s in found["targets"].values() if "dtype" in s), quick_dtype())
    gold = Gold.of(args.gold, dtype=dtype) if args.gold else None
    quick, trainer = load_base("emoji", dtype=dtype), load_base("emoji")
    bench = Bench(quick, trainer, EmojiEvaluator(), args.out, args.seeds, gold, dtype)
    known = standing_with(found, bench.setting)
    if others := [t for t in found["targets"] if t not in known["targets"]]:
        parser.error(
            f"--out: {path} has targets that were measured otherwise: {', '.join(others)}; choose another folder"
        )
    for name in args.targets:
        before = known["targets"].get(name, {})
        other_gold = gold and before.get("gold") != gold.base.fingerprint
        done = [b for b in before.get("against", ()) if b != GOLD or not other_gold]
        asked = {*args.against, *([GOLD] if gold and name in gold.lacks else [])}
        have = {(r["method"], r["strength"]) for r in known["rows"] if r["target"] == name}
        lacking = bench.lacking(name, asked & {*done}, have)
        if done and asked <= {*done} and not lacking:
            continue
        against = [b for b in (*BASELINES, GOLD) if b in {*before.get("against", ()), *asked}]
        whole = not before or bench.methods_of(name).joinpath(f"{next(iter(OURS))}-0").exists()
        some = [b for b in against if whole or b not in done or b in lacking]
        new = bench.run(name, some, ours=whole, have=have)
        rows = joined(known["rows"], new)
        made = {**before, **bench.setting, "against": against}
        if gold and GOLD in asked:
            made["gold"] = gold.base.fingerprint
        known = {"targets": {**known["targets"], name: made}, "rows": rows}
        lines = ",\n".join(map(json.dumps, rows))
        write_file(path, f'{json.dumps({"targets": known["targets"]})[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())
        print(f"{name}: done", flush=True)
    write_page_of(known, args.out)
    print(args.out / "benchmark.md")


if __name__ == "__main__":
    main()
