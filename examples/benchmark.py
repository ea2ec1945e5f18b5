"""The published benchmark: every object and style of the embedded base, erased by every method, with three training seeds.

    python examples/benchmark.py --out runs/benchmark [--targets cat neon] [--against sld esd-x] [--seeds 3]

Each target gets a report of its own in a folder of its name; what was trained or drawn is kept, so that the script goes on
where it stopped, for some hours on two cores, and goes back to a target where more methods are asked for. The counts of all
reports are in `benchmark.json`, with hashes of what they were measured with; of these the table is made, and `facts.py` says
what follows. Rates are means over targets, their intervals over targets and, within each, training seeds. Pictures take half
the usual steps, by which the base draws as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esd_lora.bases import Base, load_base, quick_dtype
from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.evaluate.answers import Target, emoji_answers
from esd_lora.evaluate.comparing import Comparison, Sampling, compare
from esd_lora.evaluate.evaluators import EmojiEvaluator
from esd_lora.evaluate.page import Point, make_report, points_of, write_page
from esd_lora.evaluate.rates import Rate, cluster_bootstrap
from esd_lora.evaluate.ways import BASELINES, Subject, Way, baseline_way, control_ways, patch_way
from esd_lora.patch import write_file
from esd_lora.recipe import Concept, Recipe
from esd_lora.training import read_cost, train

TARGET_PICTURES = 60
"""Of each target; of every other cell there is one."""

SAMPLING = Sampling(steps=10)

OURS: Mapping[str, Mapping[str, Any]] = {"esd_lora": {}, "esd_lora, keyed": {"keys": "closed-form"}}
"""Our methods, by what a recipe has besides its concept. The first is trained with every seed; the other has none."""


def ways_for(subject: Subject, against: Sequence[str], seeds: int) -> Iterator[Way]:
    """Our methods, these others, and the controls; what is trained is kept in the subject's folder."""
    for name, fields in OURS.items():
        for seed in range(1 if fields else seeds):
            recipe = Recipe(base="emoji", concepts=(subject.concept,), seed=seed, **fields)
            out = subject.folder / f"{name.replace(', ', '-')}-{seed}"
            patch = train(recipe, subject.trainer, out=out, resume=True)
            told, strengths = (name, (0.5, 1.0, 1.5)) if seed == 0 else (f"{name}, seed {seed}", (1.0,))
            seconds = read_cost(out)["seconds"]["total"]
            yield patch_way(subject.base, told, patch, strengths=strengths, seconds=seconds)
    yield from (baseline_way(name, subject) for name in against)
    yield from control_ways(subject.base, patch, layers="esd-x-strict")


@dataclass(frozen=True)
class Bench:
    """What all targets share."""

    base: Base
    trainer: Base
    evaluator: EmojiEvaluator
    out: Path
    seeds: int

    def run(self, name: str, against: Sequence[str]) -> list[dict[str, Any]]:
        """The counts of every method at every strength for one target, whose report is written too."""
        kind, folder = "object" if name in OBJECTS else "style", self.out / name
        cells = len(STYLES if kind == "object" else OBJECTS)
        answers = emoji_answers(name, target_seeds=-(-TARGET_PICTURES // cells), kept_seeds=1)
        target = Target(kind=kind, label=name)
        concept = Concept(erase=name if kind == "object" else f"{name} style")
        subject = Subject(self.base, concept, target, folder / "methods", load=lambda: self.trainer)
        report = compare(
            Comparison(self.base, answers, target, self.evaluator, folder, SAMPLING),
            list(ways_for(subject, against, self.seeds)),
            title=f"{concept.erase}, erased from emoji",
            command=f"python examples/benchmark.py --targets {name} --against {' '.join(against)}",
        )
        write_page(report, folder / "report.html")
        return [counts_of(name, kind, point) for point in points_of(make_report(report))]


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


def mean(rows: Sequence[Mapping[str, Any]], rate: str) -> str:
    """The mean over targets with its interval over targets and seeds, in per cent; empty where there is none."""
    have = [r for r in rows if rate in r["counts"]]
    if not have:
        return ""
    shares = [r["counts"][rate][0] / r["counts"][rate][2] for r in have]
    by_target = {
        r["target"]: [s for s, x in zip(shares, have, strict=True) if x["target"] == r["target"]] for r in have
    }
    value = sum(sum(s) / len(s) for s in by_target.values()) / len(by_target)
    low, high = cluster_bootstrap(shares, [(r["target"], r["seed"]) for r in have])
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: every method at every strength, for objects and for styles."""
    rates = ("UA", "IRA", "CRA", "at target", "near")
    lines = [f"| erased | method | {' | '.join(rates)} | targets | seconds | passes |", "|---" * (len(rates) + 5) + "|"]
    for kind in ("object", "style"):
        groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["kind"] == kind:
                groups.setdefault((row["method"], row["strength"], row["label"]), []).append(row)
        for (method, _, label), some in groups.items():
            costs = [r["cost"] for r in some if r["cost"]]
            cost = (
                [f"{sum(c[k] for c in costs) / len(costs):,.0f}" for k in ("seconds", "passes")] if costs else ["", ""]
            )
            shown = [mean(some, rate) for rate in rates]
            targets = len({r["target"] for r in some})
            lines.append(f"| {kind}s | {method} {label} | {' | '.join(shown)} | {targets} | {' | '.join(cost)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--targets", nargs="+", choices=(*OBJECTS, *STYLES), default=(*OBJECTS, *STYLES), metavar="NAME"
    )
    parser.add_argument("--against", nargs="+", choices=tuple(BASELINES), default=tuple(BASELINES), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    bench = Bench(load_base("emoji", dtype=quick_dtype()), load_base("emoji"), EmojiEvaluator(), args.out, args.seeds)
    path = args.out / "benchmark.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"against": {}, "rows": []}
    for name in args.targets:
        done = known["against"].get(name, ())
        if {*args.against} <= {*done}:
            continue
        against = [b for b in BASELINES if b in (*done, *args.against)]
        rows = [r for r in known["rows"] if r["target"] != name] + bench.run(name, against)
        known = {"against": {**known["against"], name: against}, "rows": rows}
        hashes = {"base": bench.base.fingerprint, "evaluator": bench.evaluator.digest}
        head = json.dumps({"hashes": hashes, "sampling": asdict(SAMPLING), "against": known["against"]})
        lines = ",\n".join(map(json.dumps, rows))
        write_file(path, f'{head[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())
        print(f"{name}: done", flush=True)
    rows = known["rows"]
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
