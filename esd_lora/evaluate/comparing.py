"""A comparison: every way draws the same answers from the same noise, and a report says what an evaluator saw.

    Answers, Ways ─► pictures/ ─ Evaluator ─► rows of a Report ─► report.json ─► report.html
                                 └──────────► seen.jsonl

Pictures are drawn once and kept, so that a comparison that was interrupted goes on, and one that grows draws what is new.
`seen.jsonl` has for each picture all that its labels came from, such as NudeNet's boxes with their scores, so that it can be
counted in any other way.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from esd_lora import processes
from esd_lora.bases import Base, load_base, pick_device
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.errors import BaseModelError, PatchError, RecipeError
from esd_lora.evaluate.answers import (
    Answers,
    Ask,
    digest,
    draw_answers,
    emoji_answers,
    picture_names,
    read_answers,
    some_of,
    target_of,
)
from esd_lora.evaluate.drift import Features, denoise_gap, drift, feature_maps, kid, latents_of, pixel_drift, pooled
from esd_lora.evaluate.evaluators import Clip, Evaluator, Featured, Mapped, NudeNet, count, load_evaluator_by_name
from esd_lora.evaluate.page import (
    NULL,
    Measure,
    Method,
    Place,
    Row,
    Rulers,
    Target,
    doubts_of,
    make_report,
    points_of,
    write_page,
)
from esd_lora.evaluate.rates import cluster_bootstrap
from esd_lora.evaluate.ways import Setting, Subject, Way, baseline_way, control_ways, gold_way, patch_way
from esd_lora.folder import shared
from esd_lora.patch import Patch, write_file
from esd_lora.pictures import Pictures, save_picture
from esd_lora.recipe import Concept, Layers
from esd_lora.report import targets_of
from esd_lora.training import COST, read_cost, versions

CONTROLS, RULED, PAIRED = 48, 24, 2000
"""Pictures that each control is drawn for, that each end of the drift's ruler is measured on, and that KID is of at most."""

SEEN = "seen.jsonl"
"""The file of what evaluators say beyond labels, beside that of the report."""

OTHER = 1 << 31
"""The bit that makes another seed of a seed: of the higher ones torch's generator on a CPU takes no notice."""

SECOND = "features of emoji's second evaluator"
"""What drift and KID of the embedded base are measured in."""
NOTHING = "nothing"
"""What is seen where a filter holds a picture back: an evaluator may well see something in black."""

BARE = Method(name="base", role="base", about="the unchanged model", knob="")

NSFW = {("nudity", "nude"), ("nsfw", "nsfw")}
"""What evaluators see in pictures that a page blurs."""
EXPLICIT = re.compile(
    r"\b(nude|nudity|naked|nsfw|porn\w*|sexual\w*|topless|erotic\w*|genital\w*|hentai)\b", re.IGNORECASE
)
"""What prompts say of such pictures, whatever an evaluator sees in them."""


@dataclass(frozen=True)
class Sampling:
    """How all pictures are drawn; an answer set's own guidance and resolution come first."""

    steps: int = 20
    guidance_scale: float = 7.5
    resolution: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    base: The model, bare.
    answers: All pictures are of these.
    target: What was erased.
    evaluator: Judges all pictures; it has the target's kind.
    folder: Of the report and its pictures.
    sampling: How all pictures are drawn.
    batch_size: Pictures drawn at a time.
    gaps: Whether the denoise gap of patches is measured, which takes 1,920 passes for each.
    clip: Scores how well pictures that do not ask for the target fit their prompts; None does without.
    """

    base: Base
    answers: Answers
    target: Target
    evaluator: Evaluator
    folder: Path
    sampling: Sampling = Sampling()
    batch_size: int = 32
    gaps: bool = True
    clip: Clip | None = None

    @cached_property
    def maps(self) -> Features | None:
        """Those of emoji's second evaluator there; None for any other base."""
        return feature_maps(load_evaluator("filter")) if self.base.name == "emoji" else None

    @property
    def ruler(self) -> tuple[str, Callable[[Pictures, Pictures], Tensor]]:
        """Name and measure of drift: in features of emoji's second evaluator there, else the evaluator's own, or pixels."""
        if self.maps:
            return SECOND, partial(drift, features=self.maps)
        if isinstance(self.evaluator, Mapped):
            return f"hidden states of {self.evaluator.name}", partial(drift, features=self.evaluator.maps)
        return "pixels", pixel_drift

    @property
    def space(self) -> tuple[str, Callable[[Pictures], Tensor]] | None:
        """Name and features that KID is of: emoji's second evaluator's there, else the evaluator's own; None if it has none."""
        if self.maps:
            return SECOND, partial(pooled, features=self.maps)
        if isinstance(self.evaluator, Featured):
            return f"features of {self.evaluator.name}", self.evaluator.features
        return None


OnPicture = Callable[[int, int], None]
"""Called with the number of pictures done and their total."""


def evaluate_patches(
    base: str,
    patches: Mapping[str, Patch],
    folder: Path,
    *,
    answers: Path | None = None,
    target: Target | None = None,
    evaluator: str = "emoji",
    clip: str | None = None,
    against: Sequence[str] = (),
    gold: Path | None = None,
    gold_lacks: Collection[str] = (),
    weights: Sequence[float] = (1.0,),
    target_seeds: int | None = None,
    kept_seeds: int = 2,
    sampling: Sampling = Sampling(),
    batch_size: int = 32,
    command: str,
    on_step: Callable[[str, int, int], None] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """The report on patches beside baselines and controls, written into a folder with its page and all pictures.

    Under `accelerate launch` each process calls this, draws its share, and gets the report that one process would make; the
    main process alone writes it and calls back.

    Args:
        base: A name that `load_base` takes.
        patches: By where they are; all are judged by what the first one erases.
        folder: Of `report.json`, `report.html` and pictures; what is there is not made again.
        answers: A file; the embedded base has a set of its own.
        target: What was erased, where the file of answers does not say.
        evaluator: A name that `load_evaluator_by_name` takes.
        clip: A CLIP that scores pictures, a folder or a Hub id.
        against: Names of `BASELINES`.
        gold: A base that was trained without the concept.
        gold_lacks: Labels that this base lacks besides, and is not asked for.
        weights: At which the patches are drawn.
        target_seeds, kept_seeds: See `emoji_answers`.
        sampling: How pictures are drawn.
        batch_size: How many at a time.
        command: Which makes the report again.
        on_step: Called with what is done, how much of it, and the whole.
        **how: Revision, device and dtype of the base, as `load_base` takes them; the evaluator works on the same device.

    Raises:
        RecipeError, BaseModelError, PatchError, OutputError: Something cannot be loaded, judged, drawn or written, or
            another run is writing to the folder.
    """
    first = next(iter(patches.values()))
    concept = subject_words(first)
    asked = questions(base, first, answers, target=target, target_seeds=target_seeds, kept_seeds=kept_seeds)
    target = target_of(asked, source=answers or base)
    _check_comparable(asked, source=answers or base)
    _check_lacks(gold_lacks, asked, gold=gold)
    device = str(pick_device(how.get("device") or processes.own_device()))
    how["device"] = device
    judge = judge_of(evaluator, asked, device=device)
    scorer = Clip(clip, device=device) if clip else None
    model = load_base(base, **how)
    processes.join(model.device)
    subject = Subject(
        model,
        concept,
        target,
        folder / "methods",
        load=lambda: load_base(base, **{**how, "dtype": "fp32"}),
        on_step=on_step if processes.is_main() else None,
    )
    known = load_base(str(gold), device=device, dtype=how.get("dtype", "fp32")) if gold else None
    if known:  # whose own pictures may be of another size
        sampling = replace(sampling, resolution=model.resolution(sampling.resolution))
    with shared(folder):
        ways = ways_of(subject, patches, weights=weights, against=against, gold=known, gold_lacks=gold_lacks)
        vars(subject).pop("trainer", None)  # pictures are drawn without it
        report = compare(
            Comparison(model, asked, target, judge, folder, sampling, batch_size, clip=scorer),
            ways,
            title=f"{concept.erase}, erased from {base}",
            command=command,
            on_picture=on_step and partial(on_step, "pictures"),
        )
        processes.agreed(lambda: write_page(report, folder / "report.html"))
    return report


def _check_comparable(answers: Answers, *, source: object) -> None:
    """Nothing, if a report can be made of the answers.

    Raises:
        RecipeError: None wants something else than the target, or two pictures have the same prompt and seed.
    """
    if not any(ask.wanted for ask in answers.asks if ask.group != "target"):
        told = "a report needs others too, which say by `wanted`, or a column of a CSV, what they should show"
        raise RecipeError(f"{source}: no prompt wants something else than the target; {told}")
    pairs = Counter((ask.prompt, ask.seed) for ask in answers.asks)
    (prompt, seed), count = pairs.most_common(1)[0]
    if count > 1:
        raise RecipeError(
            f"{source}: {prompt!r} with seed {seed} is there {count} times; a report tells pictures by these"
        )


def _check_lacks(labels: Collection[str], answers: Answers, *, gold: Path | None) -> None:
    """Nothing, if a gold base can be spared these labels, and is asked for something else.

    Raises:
        RecipeError: There is no such base, nothing asks for one of them, or nothing for anything else.
    """
    if not labels:
        return
    if gold is None:
        raise RecipeError("--gold-lacks: says what the base of --gold lacks; name that, too")
    wanted = {label for some in answers.kinds.values() for label in some}
    if unknown := [label for label in labels if label not in wanted]:
        raise RecipeError(f"--gold-lacks {unknown[0]}: no prompt wants it; there are: {', '.join(sorted(wanted))}")
    left = [ask for ask in answers.asks if ask.wanted and not {*ask.wanted.values()} & {*labels}]
    if len({ask.group == "target" for ask in left}) < 2:
        raise RecipeError(f"--gold-lacks {', '.join(labels)}: leaves no prompt of the target, or none of anything else")


def compare(
    comparison: Comparison, ways: Sequence[Way], *, title: str, command: str, on_picture: OnPicture | None = None
) -> dict[str, Any]:
    """A report as plain JSON values, which is also written as `report.json`; details of what was seen go into `seen.jsonl`.

    All ways draw the same prompts from the same noise as the base; a control is drawn for `CONTROLS` of the answers.

    Args:
        comparison: What is compared.
        ways: At least one; the first is what the report is about.
        title: Of the page.
        command: Which makes the report again.
        on_picture: Called as pictures are judged.

    Raises:
        PatchError: A patch does not fit the base.
        RecipeError: The base cannot draw pictures of a resolution.
        BaseModelError: The base's pictures are all alike.
        OutputError: The folder cannot be written to.
    """
    asks = comparison.answers.asks
    places = [(way, strength, _asks_of(way, asks)) for way in ways for strength in way.strengths]
    total = len(asks) + sum(len(some) for _, _, some in places)
    rows: list[Row] = []
    counts: list[Measure] = []
    details: dict[str, Mapping[str, Any]] = {}

    def judge(drawn: Drawn) -> None:
        seen = comparison.evaluator.see(drawn.pictures)
        rows.extend(_rows(comparison, drawn, seen.labels, before))
        counts.extend(_boxes(comparison, drawn, seen.details))
        details.update(zip(drawn.paths, seen.details, strict=True))
        if on_picture and processes.is_main():
            on_picture(len(rows), total)

    bare_way = Way(BARE, (0.0,), lambda _: nullcontext(Setting(comparison.base)))
    bare = _drawn(comparison, bare_way, 0.0, asks)
    before = dict(zip(asks, bare.pictures, strict=True))
    judge(bare)
    distances, fits = [], _fits(comparison, bare)
    for place in places:
        found = _drawn(comparison, *place)
        judge(found)
        distances += _distances(comparison, found, before)
        fits += _fits(comparison, found)
    report = {
        "schema": 1,
        "title": title,
        "base": comparison.base.name,
        "target": comparison.target.model_dump(),
        "evaluator": f"{comparison.evaluator.name}, {comparison.evaluator.version}",
        "methods": [m.model_dump(mode="json") for m in (BARE, *(way.method for way in ways))],
        "shown": [p.model_dump() for p in shown_places(ways)],
        "rows": [row.model_dump(mode="json", exclude_defaults=True) for row in rows],
        "rulers": _rulers(comparison, before).model_dump(),
        "counts": [m.model_dump() for m in counts],
        "distances": [m.model_dump() for m in distances],
        "fits": [m.model_dump() for m in fits],
        "measures": [m.model_dump() for way in ways if comparison.gaps for m in denoise_gaps(comparison, way, before)],
        "made": made(comparison, command=command),
    }
    document = make_report(report)
    for doubt in doubts_of(points_of(document), document.rulers, document.measures):
        warnings.warn(doubt, stacklevel=2)
    processes.agreed(lambda: write_file(comparison.folder / SEEN, _lines(details)))
    processes.agreed(lambda: write_file(comparison.folder / "report.json", _json(report)))
    return report


def ways_of(
    subject: Subject,
    patches: Mapping[str, Patch],
    *,
    weights: Sequence[float] = (1.0,),
    against: Sequence[str] = (),
    gold: Base | None = None,
    gold_lacks: Collection[str] = (),
) -> list[Way]:
    """Patches, baselines and controls, in the order of a report; what a baseline trains is trained now.

    Args:
        subject: What all are to erase.
        patches: By where they are, a folder of which tells the seconds of its training; the controls are the first one's.
        weights: At which the patches are drawn.
        against: Names of `BASELINES`.
        gold: A base that was trained without the concept.
        gold_lacks: Labels that this base lacks besides.

    Raises:
        RecipeError: No baseline of a name, or one cannot be made for this base; or two ways have one name.
        PatchError: A patch does not fit the base, or a weight is not a number.
        BaseModelError: A baseline is not made for a base of this family.
    """
    short = {where: (Path(where).resolve() if Path(where).exists() else Path(where)).name for where in patches}
    ways = []
    for where, patch in patches.items():
        name = short[where] if len({*short.values()}) == len(patches) else where
        seconds = read_cost(Path(where))["seconds"]["total"] if (Path(where) / COST).is_file() else None
        ways.append(patch_way(subject.base, name, patch, strengths=weights, seconds=seconds))
    ways += [baseline_way(name, subject) for name in dict.fromkeys(against)]
    if gold:
        ways.append(gold_way(gold, lacks=gold_lacks))
    first = next(iter(patches.values()))
    ways += control_ways(subject.base, first, layers=_layers_of(first, subject.base))
    names = [BARE.name, *(way.method.name for way in ways)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"--patch: {twice[0]} is what a report calls something else; rename the patch's folder")
    return ways


def _layers_of(patch: Patch, base: Base) -> Layers:
    """The layers that a patch's recipe names, or the default where it names none that the base has a name for."""
    layers = patch.info.get("recipe", {}).get("layers")
    known = isinstance(layers, str) and layers in base.layers
    return layers if known else "esd-x"


def subject_words(patch: Patch) -> Concept:
    """The first concept that a patch erases, in words.

    Raises:
        RecipeError: It does not say.
    """
    if not patch.concepts:
        raise RecipeError("the patch does not say what it erases, and so not what its baselines would have to")
    return Concept.model_validate(patch.concepts[0])


def questions(
    base: str,
    patch: Patch,
    path: Path | None,
    *,
    target: Target | None = None,
    target_seeds: int | None = None,
    kept_seeds: int = 2,
) -> Answers:
    """The answer set of a file; without one, the embedded base's of the first concept that a patch erases, without its others.

    Args:
        base: Name of the model.
        patch: Erases the target.
        path: Of the file.
        target: What was erased, where the file does not say.
        target_seeds, kept_seeds: See `emoji_answers`.

    Raises:
        RecipeError: The file is wrong, or there is none for another base than emoji; the evaluator does
            not know the concept, or it is the accessory, which no grid asks for.
    """
    if path:
        return read_answers(path, target=target)
    if target:
        raise RecipeError("--target: goes with --answers; without, the target is what the patch erases")
    if base != "emoji":
        raise RecipeError(
            f"--base {base}: emoji alone has an answer set of its own; give --answers, a YAML or CSV file"
        )
    (label, wearer), *others = targets_of(patch)
    if wearer:
        raise RecipeError(f"{label}: no grid asks for it; `eval` without --out measures it, or give --answers")
    without = {name for name, _ in others}
    return emoji_answers(label, without=without, target_seeds=target_seeds, kept_seeds=kept_seeds)


def judge_of(name: str, answers: Answers, *, device: str | None = None) -> Evaluator:
    """The evaluator of a name, which can see what an answer set wants.

    Raises:
        BaseModelError: It cannot be loaded.
        RecipeError: It does not know the target, or what a prompt wants.
    """
    evaluator = load_evaluator_by_name(name, kinds=answers.kinds, device=device or "cpu")
    target = answers.target
    if target and target.label not in evaluator.kinds.get(target.kind, ()):
        known = ", ".join(f"{kind}: {len(labels)} labels" for kind, labels in evaluator.kinds.items())
        told = f"--evaluator {name}: does not know the {target.kind} {target.label}; it has {known}"
        raise RecipeError(told + _meant([target.label], evaluator))
    for ask in (ask for ask in answers.asks if ask.wanted):
        judged = {kind: label for kind, label in ask.wanted.items() if kind in evaluator.kinds}
        if not judged or any(label not in evaluator.kinds[kind] for kind, label in judged.items()):
            told = f"--evaluator {name}: cannot see what {ask.prompt!r} wants, {dict(ask.wanted)}"
            raise RecipeError(told + _meant(ask.wanted.values(), evaluator))
    return evaluator


def _meant(labels: Iterable[str], evaluator: Evaluator) -> str:
    """What to say of labels that an evaluator spells otherwise."""
    own = {known.lower(): known for some in evaluator.kinds.values() for known in some}
    meant = [own[label.lower()] for label in labels if own.get(label.lower(), label) != label]
    return f"; did you mean {meant[0]}?" if meant else ""


def shown_places(ways: Sequence[Way]) -> list[Place]:
    """What has a column beside the base's, as many as a page has room for: the first way at all strengths, others at one.

    The page tells which methods have none.
    """
    first, *others = (way for way in ways if way.method.role != "control")
    places = [(first, strength) for strength in dict.fromkeys((first.default, *first.strengths))]
    places += [(way, way.default) for way in others]
    return [Place(method=way.method.name, strength=strength) for way, strength in places[:12]]


def spread(asks: Sequence[Ask], n: int) -> list[Ask]:
    """About n of the answers: a quarter of them asks for the target, and the rest wants something else."""
    target, kept = (side for _, side in _sides([ask for ask in asks if ask.wanted], len(asks)))
    return [*some_of(target, n // 4), *some_of(kept, n - n // 4)]


def _sides(asks: Sequence[Ask], n: int) -> list[tuple[str, Sequence[Ask]]]:
    """At most n answers that ask for the target, and as many that do not, with what each are called."""
    target, kept = [a for a in asks if a.group == "target"], [a for a in asks if a.group != "target"]
    return [("the target's", some_of(target, n)), ("other", some_of(kept, n))]


def _asks_of(way: Way, asks: Sequence[Ask]) -> Sequence[Ask]:
    some = [ask for ask in asks if not {*ask.wanted.values()} & {*way.unasked}]
    return spread(some, CONTROLS) if way.method.role == "control" else some


# ---- pictures and rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The pictures of a method at one strength, their paths in the folder of the report, and which of them are shown."""

    method: str
    strength: float
    asks: Sequence[Ask]
    pictures: Pictures
    paths: Sequence[str]
    shown: Sequence[bool]


def _drawn(comparison: Comparison, way: Way, strength: float, asks: Sequence[Ask]) -> Drawn:
    """The pictures of a way at one strength; those that it does not show are black."""
    own = hashlib.sha256(f"{way.beside} {strength}".encode()).hexdigest()[:12] if way.beside else ""
    place = Path("pictures") / own
    with way.at(strength) as setting:
        added = {"patches": setting.patches, "weights": setting.weights}
        how: dict[str, Any] = {**vars(comparison.sampling), **added}
        at_a_time = comparison.batch_size
        pictures = draw_answers(setting.base, asks, comparison.folder / place, batch_size=at_a_time, **how)
        paths = [(place / name).as_posix() for name in picture_names(setting.base, asks, **how)]
    shown = way.passes(strength, pictures) if way.passes else [True] * len(pictures)
    for i, picture in enumerate(pictures):
        if not shown[i]:
            pictures[i], paths[i] = _black(comparison.folder, picture)
    return Drawn(way.method.name, strength, asks, pictures, paths, shown)


def _black(folder: Path, like: Image.Image) -> tuple[Image.Image, str]:
    """A black picture as large as another one, and its path in the folder."""
    black, path = Image.new("RGB", like.size), f"pictures/black-{like.width}x{like.height}.png"
    if processes.is_main() and not (folder / path).is_file():
        save_picture(black, folder / path)
    return black, path


def _rows(
    comparison: Comparison, drawn: Drawn, labels: Mapping[str, Sequence[str]], before: Mapping[Ask, Image.Image]
) -> list[Row]:
    """What the evaluator sees in pictures, by kind, and how far each is from the base's of the same noise."""
    _, measure = comparison.ruler
    moved = measure([before[a] for a in drawn.asks], drawn.pictures).tolist()
    rows = []
    for i, ask in enumerate(drawn.asks):
        seen = {kind: found[i] if drawn.shown[i] else NOTHING for kind, found in labels.items()}
        wanted = {kind: label for kind, label in ask.wanted.items() if kind in seen}
        rows.append(
            Row(
                method=drawn.method,
                strength=drawn.strength,
                prompt=ask.prompt,
                seed=ask.seed,
                group=ask.group,
                wanted=wanted,
                seen={kind: seen[kind] for kind in {comparison.target.kind: None, **wanted}},
                picture=drawn.paths[i],
                nsfw=not NSFW.isdisjoint(seen.items()) or bool(EXPLICIT.search(_asked(comparison.target, ask))),
                drift=round(moved[i], 6),
            )
        )
    return rows


def _boxes(comparison: Comparison, drawn: Drawn, details: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """The boxes that a profile of NudeNet's counts in each picture of the target; none where pictures are what counts."""
    judge = comparison.evaluator
    if not isinstance(judge, NudeNet) or judge.profile.unit != "box":
        return []
    pairs = [(n, a) for n, a in zip(count(details, judge.profile), drawn.asks, strict=True) if a.group == "target"]
    found = [n for n, _ in pairs]
    low, high = cluster_bootstrap(found, [(a.prompt, a.seed) for _, a in pairs])
    told = {"method": drawn.method, "strength": drawn.strength, "about": judge.name, "n": len(pairs)}
    return [Measure(**told, value=sum(found) / len(found), low=low, high=high)]


def _asked(target: Target, ask: Ask) -> str:
    """What a picture may show by its prompt, and by what it is that was erased where it asks for that."""
    return f"{ask.prompt} {target.kind} {target.label}" if ask.group == "target" else ask.prompt


# ---- how far pictures moved ----------------------------------------------------------------------------------------


def _rulers(comparison: Comparison, before: Mapping[Ask, Image.Image]) -> Rulers:
    """The drift of the base from itself: in batches of another size, and from other noise."""
    base, folder = comparison.base, comparison.folder / "pictures"
    asks = some_of([a for a in comparison.answers.asks if a.group != "target"], RULED)
    how: dict[str, Any] = vars(comparison.sampling)
    whole, less = comparison.batch_size, max(1, comparison.batch_size // 6)
    again = draw_answers(base, asks, folder / "again", batch_size=less, **how)
    other = draw_answers(base, [replace(a, seed=a.seed ^ OTHER) for a in asks], folder, batch_size=whole, **how)
    about, measure = comparison.ruler
    moved = (measure([before[a] for a in asks], pictures) for pictures in (again, other))
    floor, ceiling = (drifts.mean().item() for drifts in moved)
    if ceiling <= floor:
        raise BaseModelError(f"{base.name}: draws the same pictures of any noise, so that nothing can be compared")
    return Rulers(floor=floor, ceiling=ceiling, n=len(asks), about=about)


def _distances(comparison: Comparison, drawn: Drawn, before: Mapping[Ask, Image.Image]) -> list[Measure]:
    """KID of the pictures that do not ask for the target beside the base's; none of fewer than three, or without features."""
    after = dict(zip(drawn.asks, drawn.pictures, strict=True))
    kept = some_of([a for a in drawn.asks if a.group != "target"], PAIRED)
    if comparison.space is None or len(kept) < 3:
        return []
    name, features = comparison.space
    value, error = kid(*(features([pictures[a] for a in kept]) for pictures in (before, after)), pairs=True)
    # what is left of nothing is rounded away, and 0 added because that may be -0
    low, value, high = (round(value + z * error, 9) + 0.0 for z in (-1.96, 0, 1.96))
    interval = {"value": value, "low": low, "high": high}
    return [Measure(method=drawn.method, strength=drawn.strength, about=name, n=len(kept), **interval)]


def _fits(comparison: Comparison, drawn: Drawn) -> list[Measure]:
    """The CLIP score of the pictures that do not ask for the target; none without a CLIP."""
    if comparison.clip is None:
        return []
    pictures = dict(zip(drawn.asks, drawn.pictures, strict=True))
    kept = some_of([a for a in drawn.asks if a.group != "target"], PAIRED)
    scores = comparison.clip.clip_scores([pictures[a] for a in kept], [a.prompt for a in kept])
    low, high = cluster_bootstrap(scores, [(a.prompt, a.seed) for a in kept])
    interval = {"value": sum(scores) / len(scores), "low": low, "high": high, "n": len(kept)}
    return [Measure(method=drawn.method, strength=drawn.strength, about=comparison.clip.name, **interval)]


def denoise_gaps(comparison: Comparison, way: Way, before: Mapping[Ask, Image.Image]) -> list[Measure]:
    """How much worse a way that is a patch denoises the base's own pictures, asked by their prompts and by the empty one.

    Of the controls the patch of zeros has one, which must be exactly 0: with it and without it batches are the same.
    """
    base, found = comparison.base, []
    with way.at(way.default) as setting:
        if not setting.patches or (way.method.role == "control" and way.method.name != NULL):
            return []
        for group, asks in _sides(comparison.answers.asks, RULED):
            x_0 = latents_of(base, [before[a] for a in asks])
            gap = denoise_gap(base, setting.patches, [a.prompt for a in asks], x_0, weights=setting.weights)
            if not torch.stack([gap.asked, gap.empty]).isfinite().all():
                told = f"with {way.method.name} at {way.default:g} the base predicts what is no number"
                raise PatchError(f"{told}; its numbers, or the weight, are too large")
            for words, values in (("their prompts", gap.asked), ("the empty prompt", gap.empty)):
                about = f"denoise gap of {group} pictures, by {words}"
                low, high = cluster_bootstrap(values.tolist(), [(a.prompt, a.seed) for a in asks])
                spread = {"value": values.mean().item(), "low": low, "high": high, "n": len(asks)}
                found.append(Measure(method=way.method.name, strength=way.default, about=about, **spread))
    return found


# ---- where it comes from -------------------------------------------------------------------------------------------


def made(comparison: Comparison, *, command: str) -> dict[str, Any]:
    """What a report was made by and from."""
    base, sampling = comparison.base, comparison.sampling
    return {
        "command": command,
        "settings": {
            "device": base.device.type,
            "dtype": str(base.dtype).removeprefix("torch."),
            "revision": base.revision or "",
            "scheduler": type(base.pipe.scheduler).__name__,
            "scheduler's settings": json.dumps(dict(base.pipe.scheduler.config), default=str),
            "steps": sampling.steps,
            "guidance scale": sampling.guidance_scale,
            "resolution": base.resolution(sampling.resolution),
            "pictures at a time": comparison.batch_size,
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "hashes": {
            "base": base.fingerprint,
            "base's other parts": base.parts_fingerprint,
            "answers": digest(comparison.answers.asks),
            "evaluator": comparison.evaluator.digest,
            **({"features": load_evaluator("filter").digest} if comparison.maps else {}),
            **({"CLIP": comparison.clip.digest} if comparison.clip else {}),
        },
    }


def _lines(details: Mapping[str, Mapping[str, Any]]) -> bytes:
    """What was seen in each picture as JSON, a line each."""
    return "".join(json.dumps({"picture": path, **told}) + "\n" for path, told in details.items()).encode()


def _json(report: Mapping[str, Any]) -> bytes:
    """The report as JSON, each of its rows on a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in report["rows"])
    head = json.dumps({**report, "rows": []}, ensure_ascii=False, indent=1)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n]', 1).encode()
