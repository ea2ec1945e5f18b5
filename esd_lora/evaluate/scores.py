"""Scores of patches on the embedded base: what was erased, what was kept, beside the base's own rates.

    UA    share of target pictures in which the evaluator does not find the erased concept
    IRA   share of the other concepts of the same kind that it still finds
    CRA   share of the concepts of the other kind that it still finds, the target's pictures included, every cell as often

as UnlearnCanvas defines them (Zhang et al. 2024, arXiv:2402.11846). Every rate comes with its n and 95 % Wilson interval,
and with the base's own rate on the same prompts and the same noise; `retained` is patched over base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from esd_lora.bases.base import Base
from esd_lora.compose import attached
from esd_lora.emoji.evaluators import Evaluator, Judgement
from esd_lora.emoji.vocabulary import OBJECTS, STYLES, WEARERS, prompt
from esd_lora.errors import RecipeError
from esd_lora.evaluate.rates import Rate, rate
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate

FIRST_SEED = 10_000
"""Seeds of the answer sets start here; training noise is seeded by 62-bit numbers."""


@dataclass(frozen=True)
class Cell:
    """One picture of an answer set."""

    obj: str
    style: str
    seed: int
    hat: bool = False

    @property
    def prompt(self) -> str:
        """What the base is asked for."""
        return prompt(self.obj, self.style, accessory=self.hat)


ENOUGH = 200
"""Pictures of a target where nobody asks for another number: a rate of 95 % is then known to within 4 %."""


def answer_set(
    target: str, *, without: Collection[str] = (), target_seeds: int | None = None, kept_seeds: int = 2
) -> list[Cell]:
    """The pictures that an erasure is judged by: every object in every style, the target's cells more often.

    A cell's seeds follow from the cell alone, not from the order or the target.

    Args:
        target: The erased object or style.
        without: Objects and styles whose cells are left out.
        target_seeds: Pictures of each of the target's cells; by default `ENOUGH` in all.
        kept_seeds: Pictures of every other cell.

    Raises:
        RecipeError: The base does not know the target.
    """
    if target not in (*OBJECTS, *STYLES):
        known = ", ".join((*OBJECTS, *STYLES))
        raise RecipeError(f"{target}: not a concept that the evaluators know: {known}")
    crossing = [name for name in (STYLES if target in OBJECTS else OBJECTS) if name not in without]
    target_seeds = target_seeds or math.ceil(ENOUGH / max(1, len(crossing)))
    cells = []
    for o, obj in enumerate(OBJECTS):
        for s, style in enumerate(STYLES):
            if obj in without or style in without:
                continue
            first = FIRST_SEED + 1000 * (o * len(STYLES) + s)
            count = target_seeds if target in (obj, style) else kept_seeds
            cells += [Cell(obj, style, first + k) for k in range(count)]
    return cells


def accessory_set(wearer: str, *, seeds: int | None = None) -> list[Cell]:
    """Pictures of one wearer with the accessory, in every style; by default `ENOUGH` in all."""
    seeds = seeds or math.ceil(ENOUGH / len(STYLES))
    o = list(OBJECTS).index(wearer)
    return [
        Cell(wearer, style, FIRST_SEED + 1000 * (o * len(STYLES) + s) + 500 + k, hat=True)
        for s, style in enumerate(STYLES)
        for k in range(seeds)
    ]


def draw(
    base: Base,
    cells: Sequence[Cell],
    patches: Sequence[Patch] = (),
    weights: Sequence[float] | None = None,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Pictures:
    """The pictures of the cells, with the patches active; the base is bare again afterwards."""
    with attached(base, patches, weights):
        prompts, seeds = [c.prompt for c in cells], [c.seed for c in cells]
        return generate(base, prompts, seeds, batch_size=48, on_batch=on_batch)


def whole_grid(*, seeds: int) -> list[Cell]:
    """Every object in every style, style by style, `seeds` pictures of each."""
    return [
        Cell(obj, style, FIRST_SEED + 1000 * (o * len(STYLES) + s) + k)
        for k in range(seeds)
        for s, style in enumerate(STYLES)
        for o, obj in enumerate(OBJECTS)
    ]


GATE: Mapping[str, float] = {"object": 0.90, "style": 0.95}
"""What the embedded base must reach over the whole grid."""


def gate(base: Base, evaluator: Evaluator, *, seeds: int) -> dict[str, Rate]:
    """How often the bare base draws what it is asked for: object and style over the whole grid, and the accessory."""
    cells = whole_grid(seeds=seeds)
    hats = [c for wearer in WEARERS for c in accessory_set(wearer, seeds=seeds)]
    seen, worn = evaluator.judge(draw(base, cells)), evaluator.judge(draw(base, hats))
    wearers = [hat for c, hat in zip(cells, seen.hats, strict=True) if c.obj in WEARERS]
    return {
        "object": rate([o == c.obj for o, c in zip(seen.objects, cells, strict=True)]),
        "style": rate([s == c.style for s, c in zip(seen.styles, cells, strict=True)]),
        "hat where asked for": rate(worn.hats),
        "no hat where not asked for": rate([not h for h in wearers]),
        "wearer under the hat": rate([o == c.obj for o, c in zip(worn.objects, hats, strict=True)]),
    }


@dataclass(frozen=True)
class Scores:
    """How well one concept was erased and everything else kept; `ua` counts pictures without the concept.

    `at_target` is the other half of the erased pictures: the style of an erased object, the object in an erased style.
    `worst` has the rates of the three kept concepts of the target's kind that lost most.
    """

    target: str
    ua: Rate
    ira: Rate
    cra: Rate
    at_target: Rate
    worst: Mapping[str, Rate]
    replaced_by: Mapping[str, int]
    evaluator: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def score(target: str, cells: Sequence[Cell], judged: Judgement, base: Judgement, evaluator: Evaluator) -> Scores:
    """The scores of one erased object or style.

    Args:
        target: Its canonical name.
        cells: The answer set.
        judged: What the evaluator sees in the patched pictures of the cells.
        base: What it sees in the base's pictures of the same cells.
        evaluator: The one that judged.
    """
    is_object = target in OBJECTS
    own = [c.obj if is_object else c.style for c in cells]
    cross = [c.style if is_object else c.obj for c in cells]

    def found(seen: Judgement, *, same_kind: bool) -> list[bool]:
        answers = seen.objects if same_kind == is_object else seen.styles
        return [a == wanted for a, wanted in zip(answers, own if same_kind else cross, strict=True)]

    now, before = found(judged, same_kind=True), found(base, same_kind=True)
    now_cross, before_cross = found(judged, same_kind=False), found(base, same_kind=False)
    hit = [i for i, name in enumerate(own) if name == target]
    rest = [i for i, name in enumerate(own) if name != target]

    def over(rows: Sequence[int], patched: list[bool], bare: list[bool]) -> Rate:
        return rate([patched[i] for i in rows], [bare[i] for i in rows])

    each = {n: over([i for i in rest if own[i] == n], now, before) for n in dict.fromkeys(own) if n != target}
    # a concept that the base itself never draws has lost nothing
    worst = sorted(each, key=lambda n: r if (r := each[n].retained) is not None else 1.0)[:3]
    answers = judged.objects if is_object else judged.styles
    seen = [answers[i] for i in hit]
    return Scores(
        target=target,
        ua=rate([not now[i] for i in hit], [not before[i] for i in hit]),
        ira=over(rest, now, before),
        cra=over(_first_of_each(cells), now_cross, before_cross),
        at_target=over(hit, now_cross, before_cross),
        worst={n: each[n] for n in worst},
        replaced_by={n: seen.count(n) for n in sorted(set(seen), key=lambda n: -seen.count(n))},
        evaluator=f"{evaluator.name} {evaluator.digest[:12]}",
    )


def _first_of_each(cells: Sequence[Cell]) -> list[int]:
    """Rows that hold every cell equally often: of each, as many of its first as the rarest has."""
    rows: dict[tuple[str, str], list[int]] = {}
    for i, c in enumerate(cells):
        rows.setdefault((c.obj, c.style), []).append(i)
    least = min(len(r) for r in rows.values())
    return [i for r in rows.values() for i in r[:least]]


@dataclass(frozen=True)
class AttributeScores:
    """How well the accessory was erased from one wearer, and everything else kept.

    Of pictures that ask for both: `gone` counts those without the accessory, `carrier` those that show the wearer.
    `elsewhere` counts the accessories of other wearers, which nobody erased, if there are any; `ira` and `cra` the right
    objects and styles where no accessory is asked for.
    """

    wearer: str
    gone: Rate
    carrier: Rate
    elsewhere: Rate | None
    ira: Rate
    cra: Rate
    evaluator: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def score_attribute(
    wearer: str, cells: Sequence[Cell], judged: Judgement, base: Judgement, evaluator: Evaluator
) -> AttributeScores:
    """The scores of the accessory erased from one wearer.

    Args:
        wearer: Its canonical name.
        cells: With the accessory on this wearer and on others, and without it.
        judged: What the evaluator sees in the patched pictures of the cells.
        base: What it sees in the base's pictures of the same cells.
        evaluator: The one that judged.
    """
    own = [i for i, c in enumerate(cells) if c.hat and c.obj == wearer]
    others = [i for i, c in enumerate(cells) if c.hat and c.obj != wearer]
    plain = [i for i, c in enumerate(cells) if not c.hat]

    def over(rows: Sequence[int], right: Callable[[Judgement, int], bool]) -> Rate:
        return rate([right(judged, i) for i in rows], [right(base, i) for i in rows])

    return AttributeScores(
        wearer=wearer,
        gone=over(own, lambda seen, i: not seen.hats[i]),
        carrier=over(own, lambda seen, i: seen.objects[i] == wearer),
        elsewhere=over(others, lambda seen, i: seen.hats[i]) if others else None,
        ira=over(plain, lambda seen, i: seen.objects[i] == cells[i].obj),
        cra=over(plain, lambda seen, i: seen.styles[i] == cells[i].style),
        evaluator=f"{evaluator.name} {evaluator.digest[:12]}",
    )
