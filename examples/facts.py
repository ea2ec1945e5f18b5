"""Does what is known of large models hold on the embedded base? Eight facts, two of them in two halves.

    python examples/facts.py [--docs docs] > docs/facts.md

Reads what other scripts measured: `benchmark.json` of benchmark.py, `frontier.json` of frontier.py, `guards.json` of
guards.py, `stacking.json` of stacking.py, and `attacks/*/attacks.json` of attacks.py. More or fewer means that 95 % intervals
lie apart, or for rates of the same targets that the interval of their differences lies on one side of 0; otherwise a fact is
not shown, nor is anything by an average of fewer than five targets. What was not measured is said to be so.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import frontier
import guards
import stacking
from benchmark import more_by

from esd_lora.evaluate.rates import Rate, cluster_bootstrap, mean_of_few, rate


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
        """How often a concept is found by name and by inversion, one patch at a time."""
        return [row for row in self._read("frontier.json") if row["k"] == 1 and row["way"] != "base"]

    @cached_property
    def guards(self) -> Sequence[Mapping[str, Any]]:
        """What is seen of concepts behind guards, however they are asked for."""
        rows: Sequence[Mapping[str, Any]] = self._read("guards.json")
        return rows

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

Rows = Sequence[Mapping[str, Any]]

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
    return one_side(more_by(these, others))


def one_side(difference: Rate) -> Verdict:
    """Whether a mean difference is above 0, or below it, with its interval."""
    return True if difference.low > 0 else False if difference.high < 0 else None


def apart(these: Mapping[str, float], others: Mapping[str, float]) -> Verdict:
    """Whether these are above the others, which are of other targets: the intervals of both means lie apart."""
    if min(len(these), len(others)) < FEWEST:
        return None
    groups = [list(some.values()) for some in (these, others)]
    return more(*map(mean_of_few, groups))


def more(a: Rate, b: Rate) -> Verdict:
    """Whether the first is above the second, or below it, intervals apart."""
    return True if a.low > b.high else False if a.high < b.low else None


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether all hold."""
    found = set(verdicts)
    return False if False in found else None if None in found else True


ESD = {"method": "ESD-x, fine-tuned", "strength": 1.0}
HIGH = 0.9
"""A UA that is high: those of large models are above it."""
RATES = ("UA", "IRA", "CRA")


def by_esd(found: Measured, kind: str) -> tuple[Rows, str]:
    """The rows of what fine-tuned ESD-x erased of a kind, and its rates in words."""
    rows = such(found.benchmark, "UA", kind=kind, **ESD)
    figures = ", ".join(f"{r} {100 * share(rows, r):.1f}" for r in RATES)
    return rows, f"{len(rows)} {kind}s: {figures}"


def of_a_style(found: Measured) -> Told:
    """F1, first half: the style is erased, and other styles suffer more than objects do."""
    rows, said = by_esd(found, "style")
    return every([share(rows, "UA") >= HIGH, higher(changes(rows, "CRA"), changes(rows, "IRA"))]), said


def of_an_object(found: Measured) -> Told:
    """F1, second half: what is kept of either kind falls, and further than where a style is erased."""
    (style, _), (thing, said) = (by_esd(found, kind) for kind in ("style", "object"))
    return every(apart(changes(style, r), changes(thing, r)) for r in ("IRA", "CRA")), said


def behind_patches(found: Measured) -> Told:
    """F2: of each concept and patch, by words that were trained on the erased model."""
    rows = found.frontier
    pairs = {f"{r['way']}, {r['concept']}": [Rate(**r[how]) for how in frontier.HOW] for r in rows}
    return beyond_names(pairs, of="frontier")


def behind_guards(found: Measured) -> Told:
    """F4: of each concept and guard, by words of who knows; negative prompts change nothing that words are trained through."""
    pairs: dict[str, list[Rate]] = {}
    for target in dict.fromkeys(row["target"] for row in found.guards):
        rates = guards.rates_of(found.guards, target)
        for guard, how in ((guards.NEGATIVE, guards.UNAWARE), *((name, guards.AWARE) for name in guards.THROUGH)):
            if (guard, how) in rates:
                pairs[f"{guard}, {target}"] = [rates[guard, guards.NAMED], rates[guard, how]]
    return beyond_names(pairs, of="guards")


def beyond_names(pairs: Mapping[str, Sequence[Rate]], *, of: str) -> Told:
    """Whether inversion finds each more often than its name does, which is the first of a pair; the figures.

    Raises:
        NotMeasured: There are none.
    """
    if not pairs:
        raise NotMeasured(of)
    said = [f"{what} {100 * name.value:.0f} → {100 * inverted.value:.0f}" for what, (name, inverted) in pairs.items()]
    return every(more(inverted, name) for name, inverted in pairs.values()), "; ".join(said)


def presets(found: Measured) -> Told:
    """F3: each preset erases more than the one before, and keeps less."""
    rows = [such(found.benchmark, "UA", method="SLD", strength=k) for k in (1, 2, 3, 4)]
    erased, kept = ([changes(some, r) for some in rows] for r in ("UA", "kept"))
    verdicts = [higher(b, a) for a, b in itertools.pairwise(erased)] + [
        higher(a, b) for a, b in itertools.pairwise(kept)
    ]
    figures = ", ".join(f"UA {100 * share(some, 'UA'):.1f} kept {100 * share(some, 'kept'):.1f}" for some in rows)
    return every(verdicts), f"{len(rows[0])} targets: {figures}"


def completed(found: Measured) -> Told:
    """F5: of each erasure the step that shows it best."""
    pairs = [(name, back, c["gold base"]) for name, back, c in found.attacks("completion") if "gold base" in c]
    if not pairs:
        raise NotMeasured("completion")
    said = [f"{name} {100 * back.value:.0f}, gold {100 * gold.value:.0f}" for name, back, gold in pairs]
    of_erasure: dict[str, set[Verdict]] = {}
    for name, back, gold in pairs:
        of_erasure.setdefault(name.split(",")[0], set()).add(more(back, gold))
    best = [next(v for v in (True, None, False) if v in verdicts) for verdicts in of_erasure.values()]
    return every(best), "; ".join(said)


def one_after_another(found: Measured) -> tuple[Rows, Rows]:
    """The answers of the fewest patches, of two and more, and of the most that were trained one after another.

    Raises:
        NotMeasured: There are not both.
    """
    rows = stacking.by_way(found.stacking).get("sequential", {})
    several = sorted(k for k in rows if k > 1)
    if len(several) < 2:
        raise NotMeasured("sequential")
    return rows[several[0]], rows[several[-1]]


def rebound(found: Measured) -> Told:
    """F6, first half: of each concept, from its first answers to those of most patches, in each order."""
    _, many = one_after_another(found)
    rows = [row for row in found.stacking if row["way"] == "sequential"]
    between, concepts = [], []
    for last in many:
        for concept, (left, n) in last["answers"]["erased"].items():
            own = [r for r in rows if r["run"] == last["run"] and concept in r["answers"]["erased"]]
            first = min(own, key=lambda r: r["k"])
            if first is not last:
                was, of = first["answers"]["erased"][concept]
                between.append(left / n - was / of)
                concepts.append(concept)
    change = Rate(sum(between) / len(between), len(between), *cluster_bootstrap(between, concepts))
    figures = ", ".join(f"{100 * v:+.1f}" for v in (change.value, change.low, change.high))
    verdict = None if len(set(concepts)) < FEWEST else one_side(change)
    return verdict, f"change of what is left, and its interval, of {change.n} concepts in their orders: {figures}"


def collateral(found: Measured) -> Told:
    """F6, second half: less is kept by the most patches."""
    kept = [(rows[0]["k"], stacking.rate_of(rows, "objects")) for rows in one_after_another(found)]
    (_, few), (_, many) = kept
    return more(few, many), "; ".join(f"{k} patches: kept {rate.interval()}" for k, rate in kept)


def resurged(found: Measured) -> Told:
    """F7: of each erasure, beside what its name gave before."""
    some = [(name, back, controls["by name"]) for name, back, controls in found.attacks("benign relearning")]
    if not some:
        raise NotMeasured("relearning")
    said = [f"{name.split(',')[0]} {100 * before.value:.0f} → {100 * back.value:.0f}" for name, back, before in some]
    return every(more(back, before) for _, back, before in some), "; ".join(said)


def neighbours(found: Measured) -> Told:
    """F8: of the objects and styles that have neighbours, beside the base's own rates."""
    rows = such(found.benchmark, "near", **ESD)
    near, far = ([100 * share(rows, group, of=of) for of in (0, 1)] for group in ("near", "far"))
    figures = f"neighbours {near[0]:.1f} of the base's {near[1]:.1f}, others {far[0]:.1f} of {far[1]:.1f}"
    said = f"{len(rows)} targets: {figures}"
    return higher(changes(rows, "far"), changes(rows, "near")), said


class Fact(NamedTuple):
    """What is known of large models, by whom, and how it is asked here."""

    name: str
    source: str
    ask: Callable[[Measured], Told]


ONE_AFTER = "Zhang et al. 2024, UnlearnCanvas; CUIG, 2026: one erasure after another"
CANVAS = "Zhang et al. 2024, UnlearnCanvas: UA, IRA, CRA"
FACTS: Sequence[Fact] = (
    Fact("F1, of a style: ESD-x has a high UA, and IRA < CRA", f"{CANVAS} 98.6, 81.0, 94.0", of_a_style),
    Fact("F1, of an object: IRA and CRA fall, and further", f"{CANVAS} 92.2, 55.8, 44.2", of_an_object),
    Fact(
        "F2: an attack on the weights finds what was erased more often than its name",
        "Zhang et al. 2024, UnlearnDiffAtk, of ESD: 20 → 76, 2 → 32, 4 → 54",
        behind_patches,
    ),
    Fact(
        "F3: SLD erases more from weak to max, and keeps less",
        "Schramowski et al. 2023: 29, 19, 13, 9 of 100 unsafe",
        presets,
    ),
    Fact(
        "F4: inversion beats SLD and negative prompts where it knows of them",
        "Pham et al. 2024",
        behind_guards,
    ),
    Fact(
        "F5: a started picture is completed with the concept, more often than by a base that never saw it",
        "our guess, from what Lu et al. 2025 call avoidance and destruction",
        completed,
    ),
    Fact("F6, rebound: what one patch erased comes back as more are trained after it", ONE_AFTER, rebound),
    Fact("F6, collateral: and less is kept", ONE_AFTER, collateral),
    Fact("F7: training on anything else brings some of a concept back", "Suriyakumar et al. 2024", resurged),
    Fact("F8: near neighbours are hurt more than others", "Amara et al. 2025, EraseBench", neighbours),
)


HEAD = """# Does what is known of large models hold on the embedded base?

By `python examples/facts.py`, of what is in this folder. The list of facts is older than all measurements here; how each is
asked is not: of F2 and F6 some answers were there before the script, and F4's *where it knows of them* was put into it after
its first answer. The rules were made stricter since, and F1 and F6 were split into their halves.

*More* and *fewer* mean that 95 % intervals lie apart, or for rates of the same targets (F1, F3, F8, rebound) that the
interval of their differences, Student's or for rebound a bootstrap's, lies on one side of 0; *high* is 90 %. *Not shown*:
intervals overlap or hold 0, or averages are of fewer than five targets; figures of these are shares of all pictures
together. F2, F4, F5 and F7 are of the single concepts that are named, one attack each, with intervals over its pictures:
they hold of these if each shows it, F5 at the best of five steps. F6 is of patches of the previous defaults.

What is asked is not what was published. F2 is of our patches and of inversion, not of ESD and UnlearnDiffAtk, and asks for
more, not for far more. F3 has what is kept in the place of quality. Of F4, SLD and the separate negative prompt were trained
through, SLD with the momentum that its steps have in the mean; a plain negative prompt takes the place of the empty prompt,
which words are not trained through. How methods rank is compared with no published table, for these have two of the methods
here, ESD and UCE.
"""


def lines_of(found: Measured) -> Iterator[str]:
    """A table of the facts in Markdown."""
    yield "| fact | here | figures here, per cent | of large models, per cent |"
    yield "|---|---|---|---|"
    for fact in FACTS:
        try:
            verdict, figures = fact.ask(found)
        except NotMeasured:
            yield f"| {fact.name} | not measured | | {fact.source} |"
        else:
            yield f"| {fact.name} | {SAID[verdict]} | {figures} | {fact.source} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the answers are")
    docs = parser.parse_args().docs
    if not docs.is_dir():
        parser.error(f"--docs: there is no folder {docs}")
    print("\n".join([HEAD, *lines_of(Measured(docs))]))


if __name__ == "__main__":
    main()
