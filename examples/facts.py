"""Does what is known of large models hold on the embedded base? Eight facts, written down before anything was measured.

    python examples/facts.py [--docs docs] > docs/facts.md

Reads what other scripts measured: `benchmark.json` of benchmark.py, `frontier.json` of frontier.py, `stacking.json` of
stacking.py, and `attacks/*/attacks.json` of attacks.py. More or fewer means that 95 % intervals lie apart, or for rates of the
same targets that the interval of their differences lies on one side of 0; otherwise a fact is not shown, nor is anything by an
average of fewer than five targets. What was not measured is said to be so.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import frontier
import stacking
from benchmark import more_by

from esd_lora.evaluate.rates import Rate, cluster_bootstrap, rate


class NotMeasured(Exception):
    """What a fact is about was not measured."""


class Measured:
    """What is in the folder; what is not there is empty."""

    def __init__(self, docs: Path) -> None:
        self.docs = docs

    def _read(self, name: str) -> Any:
        path = self.docs / name
        return json.loads(path.read_text()) if path.exists() else []

    @cached_property
    def benchmark(self) -> Sequence[Mapping[str, Any]]:
        """Counts of every method at every strength for each target."""
        found = self._read("benchmark.json")
        return found["rows"] if found else []

    @cached_property
    def frontier(self) -> Sequence[Mapping[str, Any]]:
        """How often a concept is found by name and by inversion, one patch or guard at a time."""
        return [row for row in self._read("frontier.json") if row["k"] == 1 and row["way"] != "base"]

    @cached_property
    def stacking(self) -> Sequence[Mapping[str, Any]]:
        """Answers of patches put together."""
        return self._read("stacking.json")

    def attacks(self, name: str) -> Iterator[tuple[str, Rate, Mapping[str, Rate]]]:
        """Of each attack of that name: erasure and setting, how often the target was back, and in each of its controls."""
        for path in sorted((self.docs / "attacks").glob("*/attacks.json")):
            evidence = json.loads(path.read_text())
            label = evidence["target"]["label"]
            for attack in evidence["attacks"]:
                if attack["name"].startswith(name):
                    controls = {c["name"]: seen_in(c, label) for c in attack["controls"]}
                    yield f"{path.parent.name}, {attack['name']}", seen_in(attack, label), controls


def seen_in(trial: Mapping[str, Any], label: str) -> Rate:
    """How often a label was seen in the pictures of an attack or a control."""
    return rate([row["seen"] == label for row in trial["rows"]])


Verdict = bool | None
"""Whether a fact holds; None where intervals overlap, or there are too few targets."""

Told = tuple[Verdict, str]
"""The verdict on a fact, and the figures."""

SAID: Mapping[Verdict, str] = {True: "holds", False: "does not hold", None: "not shown"}


def such(rows: Sequence[Mapping[str, Any]], rate: str, **where: object) -> list[Mapping[str, Any]]:
    """The rows that are so and have that rate.

    Raises:
        NotMeasured: There are none.
    """
    some = [r for r in rows if all(r[k] == v for k, v in where.items()) and rate in r["counts"]]
    if not some:
        raise NotMeasured(rate)
    return some


def share(rows: Sequence[Mapping[str, Any]], rate: str, *, of: int = 0) -> float:
    """Hits over pictures of all rows; with `of` 1, the base's hits."""
    return sum(r["counts"][rate][of] for r in rows) / sum(r["counts"][rate][2] for r in rows)


def changes(rows: Sequence[Mapping[str, Any]], rate: str) -> dict[str, float]:
    """Of each target, how far a rate is from the base's."""
    return {r["target"]: share([r], rate) - share([r], rate, of=1) for r in rows}


FEWEST = 5
"""Targets whose average says something."""


def higher(these: Mapping[str, float], others: Mapping[str, float]) -> Verdict:
    """Whether these are above the others, target by target: the interval of the mean difference lies on one side of 0."""
    if len(these.keys() & others.keys()) < FEWEST:
        return None
    between = more_by(these, others)
    return True if between.low > 0 else False if between.high < 0 else None


def apart(these: Mapping[str, float], others: Mapping[str, float]) -> Verdict:
    """Whether these are above the others, which are of other targets: the intervals of both means lie apart."""
    if min(len(these), len(others)) < FEWEST:
        return None
    groups = [list(some.values()) for some in (these, others)]
    return more(*(Rate(sum(g) / len(g), len(g), *cluster_bootstrap(g, range(len(g)))) for g in groups))


def more(a: Rate, b: Rate) -> Verdict:
    """Whether the first is above the second, or below it, intervals apart."""
    return True if a.low > b.high else False if a.high < b.low else None


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether all hold."""
    found = set(verdicts)
    return False if False in found else None if None in found else True


ESD = {"method": "ESD-x, fine-tuned", "strength": 1.0}


def styles_and_objects(found: Measured) -> Told:
    """F1 (Zhang et al. 2024, UnlearnCanvas: 98.6, 81.0, 94.0 of styles, 92.2, 55.8, 44.2 of objects)."""
    rates = ("UA", "IRA", "CRA")
    rows = {kind: such(found.benchmark, "UA", kind=kind, **ESD) for kind in ("style", "object")}
    style, thing = ({r: changes(some, r) for r in rates} for some in rows.values())
    lower = [higher(style["CRA"], style["IRA"]), *(apart(style[r], thing[r]) for r in ("IRA", "CRA"))]
    said = [
        f"{len(some)} {kind}s: {', '.join(f'{r} {100 * share(some, r):.1f}' for r in rates)}"
        for kind, some in rows.items()
    ]
    return every(lower), "; ".join(said)


def by_inversion(found: Measured, *, guards: bool) -> Told:
    """Whether inversion finds each concept more often than its name, over patches or over guards; the figures.

    Of guards, which the attacker knows of: those that were trained through, and negative prompts, where that is not needed.
    """
    known = {*frontier.KNOWN, "negative prompt"}
    rows = [r for r in found.frontier if (r["way"] in known if guards else r["way"] not in frontier.GUARDS)]
    if not rows:
        raise NotMeasured("frontier")
    rates = [[Rate(**row[how]) for how in frontier.HOW] for row in rows]
    said = [
        f"{row['way']}, {row['concept']} {100 * name.value:.0f} → {100 * inverted.value:.0f}"
        for row, (name, inverted) in zip(rows, rates, strict=True)
    ]
    return every(more(inverted, name) for name, inverted in rates), "; ".join(said)


def presets(found: Measured) -> Told:
    """F3 (Schramowski et al. 2023)."""
    rows = [such(found.benchmark, "UA", method="SLD", strength=k) for k in (1, 2, 3, 4)]
    erased, kept = ([changes(some, r) for some in rows] for r in ("UA", "kept"))
    verdicts = [higher(b, a) for a, b in itertools.pairwise(erased)] + [
        higher(a, b) for a, b in itertools.pairwise(kept)
    ]
    figures = ", ".join(f"UA {100 * share(some, 'UA'):.1f} kept {100 * share(some, 'kept'):.1f}" for some in rows)
    return every(verdicts), f"{len(rows[0])} targets: {figures}"


def completed(found: Measured) -> Told:
    """F5 (a hypothesis of ours, from the avoidance and destruction of Lu et al. 2025, arXiv:2505.17013): at some step."""
    pairs = [(name, back, c["gold base"]) for name, back, c in found.attacks("completion") if "gold base" in c]
    if not pairs:
        raise NotMeasured("completion")
    said = [f"{name} {100 * back.value:.0f}, gold {100 * gold.value:.0f}" for name, back, gold in pairs]
    of_erasure: dict[str, set[Verdict]] = {}
    for name, back, gold in pairs:
        of_erasure.setdefault(name.split(",")[0], set()).add(more(back, gold))
    best = [next(v for v in (True, None, False) if v in verdicts) for verdicts in of_erasure.values()]
    return every(best), "; ".join(said)


def one_after_another(found: Measured) -> Told:
    """F6: of patches trained one after another, few and many."""
    rows = stacking.by_way(found.stacking).get("sequential", {})
    several = sorted(k for k in rows if k > 1)
    if len(several) < 2:
        raise NotMeasured("sequential")
    few, many = rows[several[0]], rows[several[-1]]
    (left, kept), (left_many, kept_many) = (
        [stacking.rate_of(some, group) for group in ("erased", "objects")] for some in (few, many)
    )
    said = [
        f"{r[0]['k']} patches: left {a.interval()}, kept {b.interval()}"
        for r, a, b in ((few, left, kept), (many, left_many, kept_many))
    ]
    return every([more(left_many, left), more(kept, kept_many)]), "; ".join(said)


def resurged(found: Measured) -> Told:
    """F7 (Suriyakumar et al. 2024, arXiv:2410.08074)."""
    some = [(name, back, controls["by name"]) for name, back, controls in found.attacks("benign relearning")]
    if not some:
        raise NotMeasured("relearning")
    said = [f"{name.split(',')[0]} {100 * before.value:.0f} → {100 * back.value:.0f}" for name, back, before in some]
    return every(more(back, before) for _, back, before in some), "; ".join(said)


def neighbours(found: Measured) -> Told:
    """F8 (Amara et al. 2025, EraseBench): of the objects and styles that have neighbours, beside the base's own rates."""
    rows = such(found.benchmark, "near", **ESD)
    near, far = ([100 * share(rows, group, of=of) for of in (0, 1)] for group in ("near", "far"))
    figures = f"neighbours {near[0]:.1f} of the base's {near[1]:.1f}, others {far[0]:.1f} of {far[1]:.1f}"
    said = f"{len(rows)} targets: {figures}"
    return higher(changes(rows, "far"), changes(rows, "near")), said


FACTS: Sequence[tuple[str, Callable[[Measured], Told]]] = (
    ("F1: fine-tuned ESD-x erases a style with IRA < CRA, and an object at the cost of both", styles_and_objects),
    (
        "F2: inversion finds what a patch erased more often than its name",
        lambda found: by_inversion(found, guards=False),
    ),
    ("F3: SLD erases more from weak to max, and keeps less", presets),
    (
        "F4: so it does behind SLD and negative prompts, if it knows of them",
        lambda found: by_inversion(found, guards=True),
    ),
    ("F5: a started picture is completed with the concept, more than by a base that never saw it", completed),
    ("F6: of patches trained one after another more come back, and less is kept, the more they are", one_after_another),
    ("F7: training on anything else brings some of a concept back", resurged),
    ("F8: near neighbours are hurt more than others", neighbours),
)


HEAD = """# Does what is known of large models hold on the embedded base?

By `python examples/facts.py`, of what is in this folder. The facts were written down before anything was measured, with
their sources in the script; how they are decided was made stricter since. *More* and *fewer* mean that 95 % intervals lie
apart, or for rates of the same targets (F1, F3, F8) that the interval of their differences lies on one side of 0. *Not
shown*: they do not, or averages (F1, F3, F8) are of fewer than five targets; figures of these are shares of all pictures
together. F2, F4, F5 and F7 are of the single concepts that are named, one attack each, with intervals over its pictures:
they hold of these if each shows it. Of F4, SLD was trained through, without the momentum of earlier steps, and negative
prompts were not.
"""


def lines_of(found: Measured) -> Iterator[str]:
    """A table of the facts in Markdown."""
    yield "| known of large models | here | figures, per cent |"
    yield "|---|---|---|"
    for fact, ask in FACTS:
        try:
            verdict, figures = ask(found)
        except NotMeasured:
            yield f"| {fact} | not measured | |"
        else:
            yield f"| {fact} | {SAID[verdict]} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the answers are")
    docs = parser.parse_args().docs
    if not docs.is_dir():
        parser.error(f"--docs: there is no folder {docs}")
    print("\n".join([HEAD, *lines_of(Measured(docs))]))


if __name__ == "__main__":
    main()
