"""Answer sets: the pictures that a patch is judged by, for any base, and how they are drawn once and kept.

An `Ask` is one picture: prompt, seed, and what it should show. `emoji_answers` asks for the grid of the embedded base,
`read_answers` for what a YAML file says, or a CSV with the columns that the field uses. `draw_answers` keeps the pictures
as PNGs in a folder, where those that are there already are not drawn again.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from PIL import Image
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from esd_lora import processes
from esd_lora.bases.base import Base
from esd_lora.compose import attached
from esd_lora.emoji.vocabulary import NEIGHBOURS, OBJECTS
from esd_lora.errors import OutputError, RecipeError, unreadable
from esd_lora.evaluate.page import Group, Target
from esd_lora.evaluate.scores import answer_set
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate, read_picture, save_picture
from esd_lora.recipe import Words, parse_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """One picture of an answer set.

    wanted: Kind → label that the picture should show, such as {"object": "cat", "style": "neon"}; empty for a caption, whose
        picture counts for how far pictures move and for the CLIP score, and for no rate.
    group: Whether it shows what was erased, something near it, or neither.
    guidance_scale, resolution: Of this picture alone; None for those of all.
    """

    prompt: str
    seed: int
    wanted: Mapping[str, str] = field(hash=False)
    group: Group
    guidance_scale: float | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class Answers:
    """An answer set, and the target that was erased where it has one."""

    asks: tuple[Ask, ...]
    target: Target | None = None

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The labels that are wanted, by kind: what a zero-shot evaluator chooses from."""
        kinds: dict[str, dict[str, None]] = {}
        for ask in self.asks:
            for kind, label in ask.wanted.items():
                kinds.setdefault(kind, {})[label] = None
        return {kind: tuple(labels) for kind, labels in kinds.items()}


def target_of(answers: Answers, *, source: object) -> Target:
    """The target of an answer set.

    Raises:
        RecipeError: It names none; `source` is where it comes from.
    """
    if answers.target is None:
        raise RecipeError(f"{source}: names no target; give --target KIND:LABEL, such as object:church")
    return answers.target


def target_named(text: str) -> Target:
    """The target of `KIND:LABEL`.

    Raises:
        RecipeError: It is not of this form.
    """
    kind, _, label = (part.strip() for part in text.partition(":"))
    if not kind or not label:
        raise RecipeError(f"--target {text}: must be KIND:LABEL, as an evaluator names them, such as object:church")
    return Target(kind=kind, label=label)


def some_of(items: Sequence[T], n: int) -> Sequence[T]:
    """At most n of them in their order, drawn once and for all: a stride might miss what recurs, such as styles."""
    if len(items) <= n:
        return items
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), n))]


def digest(asks: Iterable[Ask]) -> str:
    """SHA-256 that names an answer set, in hexadecimal; the order of the pictures does not count."""
    rows = sorted(json.dumps({**vars(ask), "wanted": dict(ask.wanted)}, sort_keys=True) for ask in asks)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def seed_of(prompt: str, number: int) -> int:
    """The seed of a prompt's picture where nobody names one, below 2³¹: it follows from the two alone."""
    return int.from_bytes(hashlib.sha256(f"{number}\n{prompt}".encode()).digest()[:4]) >> 1


def emoji_answers(
    target: str, *, without: Collection[str] = (), target_seeds: int | None = None, kept_seeds: int = 2
) -> Answers:
    """The answer set of an erased object or style of the embedded base: `answer_set` in words that hold for any base.

    Args:
        target, without, target_seeds, kept_seeds: As `answer_set` takes them.

    Raises:
        RecipeError: The base does not know the target.
    """
    cells = answer_set(target, without=without, target_seeds=target_seeds, kept_seeds=kept_seeds)
    kind = "object" if target in OBJECTS else "style"
    near = NEIGHBOURS.get(target, ())

    def group_of(label: str) -> Group:
        return "target" if label == target else "neighbour" if label in near else "unrelated"

    pairs = [(cell, {"object": cell.obj, "style": cell.style}) for cell in cells]
    asks = (Ask(cell.prompt, cell.seed, wanted, group_of(wanted[kind])) for cell, wanted in pairs)
    return Answers(tuple(asks), Target(kind=kind, label=target))


# ---- files ------------------------------------------------------------------------------------------------------


Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _some(items: tuple[T, ...]) -> tuple[T, ...]:
    if not items:
        raise ValueError("name at least one")
    return items


def _one_or_many(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


Seeds = Annotated[
    Annotated[int, Field(ge=1), Tag("number")] | Annotated[tuple[Seed, ...], AfterValidator(_some), Tag("list")],
    Discriminator(_one_or_many),
]


class _Entry(BaseModel):
    """One of `prompts`: a prompt, or a CSV with many."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: Words | None = None
    file: Path | None = None
    wanted: dict[Words, Words] = Field(default_factory=dict)
    group: Group | None = None
    seeds: Seeds = 1
    guidance_scale: float | None = Field(None, ge=0)
    resolution: int | None = Field(None, ge=8)

    @model_validator(mode="after")
    def _one_source(self) -> _Entry:
        if (self.prompt is None) == (self.file is None):
            raise ValueError("give either a prompt or a file")
        return self


class _Document(BaseModel):
    """A YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target | None = None
    prompts: Annotated[tuple[_Entry, ...], AfterValidator(_some)]


class _Row(BaseModel):
    """A row of a CSV, by the names that the field gives its columns; blank cells and other columns do not count."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    prompt: Words = Field(validation_alias=AliasChoices("prompt", "caption"))
    seed: Seed | None = Field(None, validation_alias=AliasChoices("evaluation_seed", "seed", "sd_seed"))
    guidance_scale: float | None = Field(
        None, ge=0, validation_alias=AliasChoices("evaluation_guidance", "sd_guidance_scale")
    )
    width: int | None = Field(None, ge=8, validation_alias="sd_image_width")
    height: int | None = Field(None, ge=8, validation_alias="sd_image_height")
    object: Words | None = Field(None, validation_alias="class")
    style: Words | None = Field(None, validation_alias="artist")
    concept: Words | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, cells: Mapping[str | None, Any]) -> dict[str, Any]:
        if None in cells:
            raise ValueError("more cells than columns; put quotes around a prompt that has commas")
        return {str(column): cell for column, cell in cells.items() if cell and cell.strip()}

    @property
    def wanted(self) -> dict[str, str]:
        """Kind → label."""
        told = {"object": self.object, "style": self.style, "concept": self.concept}
        return {kind: label for kind, label in told.items() if label}

    @property
    def resolution(self) -> int | None:
        """The side of a square picture."""
        return self.width if self.width == self.height else None


_ROWS = TypeAdapter(list[_Row])

SHOWN = 20
"""Problems that a message lists; a column of another kind has one in every row."""


def read_answers(path: str | Path, *, target: Target | None = None) -> Answers:
    """The answer set in a YAML or CSV file.

    A YAML file says what was erased, and names prompts, or CSV files beside it:

        target: {kind: object, label: church}
        prompts:
          - prompt: a photo of a church
            wanted: {object: church}            # kind → label that the picture should show
            seeds: 20                           # pictures, whose seeds follow from the prompt; or a list of seeds
          - prompt: a photo of a castle
            wanted: {object: castle}
            group: neighbour                    # target, neighbour or unrelated
            seeds: [188, 288]
            guidance_scale: 9                   # of these pictures; also resolution
          - file: i2p.csv
            group: target
          - file: coco_30k.csv

    Without `group`, what wants the target's label is of the target, and the rest is unrelated; with `group: target` the
    target's label is wanted. Keys of an entry with `file` hold for all its rows, `seeds` and the like for those that have
    none of their own.

    A CSV has the columns `prompt` or `caption`; `evaluation_seed`, `seed` or `sd_seed`; `evaluation_guidance` or
    `sd_guidance_scale`; `sd_image_width` and `sd_image_height`, where both are the same; and `class`, `artist` or
    `concept`, whose labels are of the kinds object, style and concept. Only the first is needed, and other columns do not
    count. Labels are compared letter by letter: "Van Gogh" is not "Vincent van Gogh".

    What the field's own files have beside that is left out, with a warning: rows without a prompt, and pictures that come
    again, of which the first counts.

    Args:
        path: Of the file; one that does not end in `.csv` is YAML.
        target: What was erased, where the file does not say; a CSV by itself cannot say it.

    Raises:
        RecipeError: The file cannot be read, or is wrong: one line for each problem, with its place. Or a target that no
            prompt wants, or that is not the file's own.
    """
    path = Path(path)
    values = {"prompts": [{"file": path.name}]} if path.suffix.lower() == ".csv" else _read_yaml(path)
    if target and values.get("target") and (told := _document_of(path, values).target) and told != target:
        raise RecipeError(
            f"{path}: its target is {told.kind}:{told.label}; leave --target {target.kind}:{target.label} out"
        )
    document = _document_of(path, values if target is None else {**values, "target": target})
    asks: list[Ask] = []
    problems: list[str] = []
    numbers: Counter[str] = Counter()
    for place, entry, row in _rows_of(document, path.parent):
        try:
            asks += _asks_of(entry, row, document.target, numbers)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise _refused(path, problems)
    answers = Answers(_once(asks, path), document.target)
    if (erased := answers.target) and not any(ask.group == "target" for ask in asks):
        known = ", ".join(answers.kinds.get(erased.kind, ())[:SHOWN]) or "none"
        raise RecipeError(f"{path}: no prompt wants the {erased.kind} {erased.label}; of this kind there are: {known}")
    return answers


def _once(asks: Sequence[Ask], path: Path) -> tuple[Ask, ...]:
    """The asks without those that ask again for a picture of the same prompt, seed, labels and group."""
    first: dict[tuple[Any, ...], Ask] = {}
    for ask in asks:
        first.setdefault((ask.prompt, ask.seed, ask.group, *sorted(ask.wanted.items())), ask)
    if again := len(asks) - len(first):
        told = f"left out {_counted(again, 'picture')} of a prompt and seed that come again"
        warnings.warn(f"{path}: {told}", stacklevel=3)
    return tuple(first.values())


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _rows_of(document: _Document, folder: Path) -> Iterator[tuple[str, _Entry, _Row]]:
    """Every prompt with its entry and its place."""
    for i, entry in enumerate(document.prompts):
        if entry.file is None:
            yield f"prompts.{i}", entry, _Row.model_validate({"prompt": entry.prompt})
            continue
        for line, row in _read_csv(folder / entry.file):
            yield f"{entry.file}, line {line}", entry, row


def _asks_of(entry: _Entry, row: _Row, target: Target | None, numbers: Counter[str]) -> list[Ask]:
    """The pictures of a prompt; `numbers` counts those whose seeds nobody names.

    Raises:
        ValueError: Its group is not what it wants.
    """
    wanted = row.wanted | entry.wanted
    if entry.group == "target":
        if target is None:
            raise ValueError("group target: the file names no target, such as `target: {kind: object, label: church}`")
        wanted = {target.kind: target.label} | wanted
    aimed = target is not None and wanted.get(target.kind) == target.label
    if entry.group and (entry.group == "target") != aimed:
        shown = ", ".join(f"{kind} {label}" for kind, label in wanted.items())
        raise ValueError(f"group {entry.group}: does not go with what is wanted, {shown}")
    if row.seed is not None:
        seeds: Sequence[int] = [row.seed]
    elif isinstance(entry.seeds, int):
        first = numbers[row.prompt]
        numbers[row.prompt] += entry.seeds
        seeds = [seed_of(row.prompt, first + k) for k in range(entry.seeds)]
    else:
        seeds = entry.seeds
    group: Group = entry.group or ("target" if aimed else "unrelated")
    guidance_scale = entry.guidance_scale if row.guidance_scale is None else row.guidance_scale
    resolution = row.resolution or entry.resolution
    return [Ask(row.prompt, seed, wanted, group, guidance_scale, resolution) for seed in seeds]


def _read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, not yet validated.

    Raises:
        RecipeError: The file is missing, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the answer set: {unreadable(error)}") from error
    data = parse_yaml(text, source=path)
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}: an answer set is a mapping with `target` and `prompts`, or a file that ends in .csv"
        )
    return data


def _document_of(path: Path, values: Mapping[str, Any]) -> _Document:
    """The validated keys of a YAML file.

    Raises:
        RecipeError: All that is wrong with them.
    """
    try:
        return _Document.model_validate(values)
    except ValidationError as error:
        raise _refused(path, [_explain(e) for e in error.errors()]) from None


def _read_csv(path: Path) -> list[tuple[int, _Row]]:
    """The rows of a CSV, each with the number of its line.

    Raises:
        RecipeError: It cannot be read, has no prompts, or has rows that are wrong, of which all are named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, cells) for cells in reader]
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error if isinstance(error, csv.Error) else unreadable(error)
        raise RecipeError(f"{path}: cannot read the answer set: {reason}") from error
    if not {"prompt", "caption"} & set(columns):
        raise RecipeError(f"{path}: no column prompt or caption; there are: {', '.join(columns) or 'none'}")
    asking = {line: cells for line, cells in rows if any((cells.get(c) or "").strip() for c in ("prompt", "caption"))}
    if not asking:
        raise RecipeError(f"{path}: no rows with a prompt")
    if blank := [str(line) for line, _ in rows if line not in asking]:
        shown = ", ".join(blank[:SHOWN])
        warnings.warn(f"{path}: left out {_counted(len(blank), 'row')} without a prompt, line {shown}", stacklevel=4)
    lines = list(asking)
    try:
        return list(zip(lines, _ROWS.validate_python(list(asking.values())), strict=True))
    except ValidationError as error:
        told = [f"line {lines[int(e['loc'][0])]}: {_explain({**e, 'loc': e['loc'][1:]})}" for e in error.errors()]
        raise _refused(path, told) from None


def _refused(path: Path, problems: Sequence[str]) -> RecipeError:
    """What is wrong with a file, a line for each problem."""
    if len(problems) == 1:
        return RecipeError(f"{path}: {problems[0]}")
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return RecipeError("\n  ".join([f"{path}: {len(problems)} problems", *problems[:SHOWN], *more]))


def _explain(error: Mapping[str, Any]) -> str:
    """One problem of pydantic's as `place: what is wrong, what would be right`."""
    loc = [str(part) for part in error["loc"] if part not in ("number", "list")]
    place = ".".join(loc) + ": " if loc else ""
    if error["type"] == "extra_forbidden":
        inner: Mapping[str, type[BaseModel]] = {"target": Target, "prompts": _Entry}
        known = (_Document if len(loc) == 1 else inner[loc[0]]).model_fields
        close = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{place}unknown key; {hint}"
    if error["type"] == "missing":
        return f"{place}missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{place}{message[0].lower()}{message[1:]}{shown}"


# ---- pictures ---------------------------------------------------------------------------------------------------


def draw_answers(
    base: Base,
    asks: Sequence[Ask],
    folder: Path,
    *,
    patches: Sequence[Patch] = (),
    weights: Sequence[float] | None = None,
    steps: int = 20,
    guidance_scale: float = 7.5,
    resolution: int | None = None,
    batch_size: int = 32,
    on_picture: Callable[[int, int], None] | None = None,
) -> Pictures:
    """The picture of each ask, in order, with the patches active; the base is bare again afterwards.

    Each is a PNG in the folder under the name that `picture_names` gives it. What is there is not drawn again, and every
    batch is written when it is done, so that a run that was interrupted goes on. Whatever else acts on the base, such as a
    hook or another sampler, is not in the names: it needs a folder of its own. All pictures are in memory in the end; of a
    very large set draw a part at a time.

    Under `accelerate launch` each process calls this, draws its share of the batches into a folder that all can read, and
    gets all pictures, the same as one process draws; the main process alone calls back.

    Args:
        base: The model.
        asks: N pictures; one that comes several times is drawn once.
        folder: Of the PNGs; it need not exist.
        patches: Any number; none draws with the bare base.
        weights: One for each patch, any sign; 1 by default.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance of the asks that have none of their own.
        resolution: Side in pixels of those that have none; None for the base's own.
        batch_size: Pictures at a time.
        on_picture: Called after each batch with the number of pictures drawn by this process, and how many it draws.

    Raises:
        PatchError: A patch does not fit the base, or a weight is not a number.
        RecipeError: The base cannot draw pictures of a resolution.
        OutputError: The folder cannot be written to, or a picture in it cannot be read.
    """
    processes.join(base.device)
    with attached(base, patches, weights):
        how: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "resolution": resolution}
        names = picture_names(base, asks, patches=patches, weights=weights, **how)
        wanted = dict(zip(names, asks, strict=True))
        missing = processes.agreed(lambda: [name for name in wanted if not (folder / name).is_file()])
        mine = list(_batches({name: wanted[name] for name in missing}, batch_size))[processes.mine()]

        def draw() -> None:
            done, of = 0, sum(map(len, mine))
            for batch in mine:
                _draw(base, batch, folder, **how)
                done += len(batch)
                if on_picture and processes.is_main():
                    on_picture(done, of)

        processes.each(draw)
    return [_read(folder / name) for name in names]


def picture_names(
    base: Base,
    asks: Sequence[Ask],
    *,
    patches: Sequence[Patch] = (),
    weights: Sequence[float] | None = None,
    steps: int = 20,
    guidance_scale: float = 7.5,
    resolution: int | None = None,
) -> list[str]:
    """The file name of each picture of `draw_answers`.

    It follows from the base's fingerprints, device, precision and scheduler, the patches' digests and weights, prompt, seed,
    guidance, resolution and steps.
    """
    weights = [1.0] * len(patches) if weights is None else weights
    added = [[patch.digest, float(weight)] for patch, weight in zip(patches, weights, strict=True)]
    parts = [base.fingerprint, base.parts_fingerprint, base.device.type, str(base.dtype)]
    shared = [*parts, base.pipe.scheduler.to_json_string(), added, steps]

    def name(ask: Ask) -> str:
        g = guidance_scale if ask.guidance_scale is None else ask.guidance_scale
        own = [ask.prompt, ask.seed, float(g), base.resolution(ask.resolution or resolution)]
        return hashlib.sha256(json.dumps([*shared, *own]).encode()).hexdigest()[:32] + ".png"

    return [name(ask) for ask in asks]


def _batches(asks: Mapping[str, Ask], size: int) -> Iterator[dict[str, Ask]]:
    """The asks by name, at most `size` together, whose pictures have one guidance scale and one resolution."""
    alike: dict[tuple[float | None, int | None], list[str]] = {}
    for name, ask in asks.items():
        alike.setdefault((ask.guidance_scale, ask.resolution), []).append(name)
    for names in alike.values():
        for start in range(0, len(names), size):
            yield {name: asks[name] for name in names[start : start + size]}


def _draw(
    base: Base, batch: Mapping[str, Ask], folder: Path, *, steps: int, guidance_scale: float, resolution: int | None
) -> None:
    """Draw the pictures of a batch, and write them under their names."""
    asks = list(batch.values())
    own = asks[0].guidance_scale
    pictures = generate(
        base,
        [ask.prompt for ask in asks],
        [ask.seed for ask in asks],
        steps=steps,
        guidance_scale=guidance_scale if own is None else own,
        resolution=asks[0].resolution or resolution,
        batch_size=len(asks),
    )
    for name, picture in zip(batch, pictures, strict=True):
        save_picture(picture, folder / name)


def _read(path: Path) -> Image.Image:
    """A picture as it was drawn.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        return read_picture(path)
    except OutputError as error:
        raise OutputError(f"{error}; delete it, and it is drawn again") from error
