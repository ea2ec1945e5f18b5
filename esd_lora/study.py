"""A study with people: pages on which they rate pictures without knowing what made them, and what their answers say.

    draw_questions ─► write_study ─► index.html for readers, key.json for you ─► answers-READER.csv ─► score_study ─► Rating

After the study of Gandikota et al. 2023 (arXiv:2303.07345), whose readers rated from 1 to 5 how similar a picture is to an
artist's style. The page is one file that asks no network: it opens from a disk, keeps answers in the browser, and saves them
as CSV.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esd_lora.errors import UserError, unreadable
from esd_lora.evaluate.page import data_uri, render
from esd_lora.evaluate.rates import cluster_bootstrap
from esd_lora.patch import Patch, check_empty, write_file

if TYPE_CHECKING:
    from esd_lora.bases.base import Base

COLUMNS = ["reader", "item", "answer", "milliseconds"]
SCALE = 5
"""The highest answer; the lowest is 1."""
ASK = "How similar is the picture to the style of the reference?"
BARE = "base"
"""The method that is the base alone."""


class Question(NamedTuple):
    """A picture to rate, the method and prompt that made it, and a picture to compare it with."""

    picture: Image.Image
    method: str
    prompt: str
    reference: Image.Image | None = None


class Item(BaseModel):
    """What made one picture of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    prompt: str


class Key(BaseModel):
    """What the readers of a study must not see: what made the picture of each item."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = Field(1, alias="schema")
    title: str
    seed: int
    items: Mapping[str, Item]


def write_study(
    out: Path,
    *,
    questions: Sequence[Question],
    seed: int,
    title: str,
    ask: str = ASK,
    ends: tuple[str, str] = ("not at all", "very similar"),
    introduction: str = "There are no right answers: say what you see, and do not think long.",
    side: int = 512,
) -> Path:
    """The page that readers open, `index.html`; beside it `key.json`, which they must not get.

    Neither methods nor prompts are in the page; the pictures are encoded anew, without their metadata. Every reader rates all
    pictures, in an order that follows from the items' ids and from the reader's own; `index.html#NAME` proposes a reader's id.

    Args:
        out: A folder that is new or empty.
        questions: N pictures; equal reference pictures are stored once.
        seed: Of the items' ids, and so of the order; they follow from the questions too.
        title: Over the page.
        ask: The question.
        ends: What 1 and 5 mean.
        introduction: What readers are told before they start.
        side: Pictures are made no larger than this, in pixels.

    Raises:
        UserError: There are no questions.
        OutputError: The folder is not empty, or cannot be written to.
    """
    if not questions:
        raise UserError("a study needs at least one picture, got none")
    check_empty(out)
    encode = partial(data_uri, side=side, quality=90)
    pictures = [encode(q.picture) for q in questions]
    # of what is asked too, so that answers to another study name no item of this one
    content = [seed, title, ask, pictures, [[q.method, q.prompt] for q in questions]]
    chance = random.Random(hashlib.sha256(json.dumps(content).encode()).hexdigest())
    ids = [f"p{n:08x}" for n in chance.sample(range(16**8), len(questions))]  # no spreadsheet takes them for numbers
    references: dict[str, int] = {}
    items = []
    for name, picture, question in zip(ids, pictures, questions, strict=True):
        uri = encode(question.reference) if question.reference is not None else None
        shown = None if uri is None else references.setdefault(uri, len(references))
        items.append({"id": name, "picture": picture, "reference": shown})
    items.sort(key=lambda item: str(item["id"]))
    page = {"items": items, "references": list(references), "scale": SCALE, "columns": COLUMNS}
    page["id"] = hashlib.sha256(json.dumps([title, ask, page]).encode()).hexdigest()[:16]
    told = {i: Item(method=q.method, prompt=q.prompt) for i, q in sorted(zip(ids, questions, strict=True))}
    key = Key(schema=1, title=title, seed=seed, items=told)
    write_file(out / "key.json", f"{key.model_dump_json(indent=2, by_alias=True)}\n".encode())
    how = {"title": title, "ask": ask, "ends": ends, "introduction": introduction}
    write_file(out / "index.html", render("study.html", study=page, **how))
    return out / "index.html"


def draw_questions(
    base: Base,
    patches: Mapping[str, tuple[Patch, float]],
    prompts: Sequence[str],
    *,
    n: int = 4,
    seed: int = 0,
    reference: Image.Image | None = None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[Question]:
    """The same prompts drawn from the same noise by the bare base and with each patch, as questions.

    All are drawn as the first patch's recipe has it: of its size, and without guidance where it goes without.

    Args:
        base: The model, called `base` among the methods; bare again afterwards.
        patches: A patch and its weight by the name of the method.
        prompts: At least one.
        n: Pictures of each prompt by each method.
        seed: Of each prompt's first picture; the next ones count up.
        reference: Shown beside every picture.
        batch_size: Pictures at a time.
        on_batch: Called with the number of pictures of each finished batch.

    Raises:
        PatchError: A patch does not fit.
        UserError: A patch has the name of the base among the methods.
    """
    if BARE in patches:
        raise UserError(
            f"--patch {BARE}: is what a study calls the base alone; name the patch otherwise, as in ./{BARE}"
        )
    from esd_lora.compose import attached  # scoring, which draws nothing, does without torch
    from esd_lora.pictures import drawn_by, generate

    every = [(p, seed + k) for p in prompts for k in range(n)]
    recipe: Mapping[str, Any] = next((patch.info.get("recipe", {}) for patch, _ in patches.values()), {})
    how = {"batch_size": batch_size, "on_batch": on_batch, **drawn_by(recipe)}
    questions = []
    ways: dict[str, list[tuple[Patch, float]]] = {BARE: [], **{name: [added] for name, added in patches.items()}}
    for method, added in ways.items():
        with attached(base, [patch for patch, _ in added], [weight for _, weight in added]):
            pictures = generate(base, [p for p, _ in every], [s for _, s in every], **how)
        questions += [Question(x, method, p, reference) for x, (p, _) in zip(pictures, every, strict=True)]
    return questions


@dataclass(frozen=True)
class Rating:
    """The mean answer to the pictures of one method, from 1 to 5, with its 95 % interval over readers."""

    mean: float
    low: float
    high: float
    answers: int
    pictures: int
    readers: int


class Answer(NamedTuple):
    """One line of a reader's file, and where it stands."""

    reader: str
    item: str
    answer: int
    place: str


def score_study(key: Path, answers: Sequence[Path]) -> dict[str, Rating]:
    """The rating of every method, the highest mean first.

    The interval is a cluster bootstrap (`esd_lora.evaluate.rates`): readers are drawn with all their answers, which go together
    more than the answers of different people. Of few readers it is too narrow.

    Args:
        key: The `key.json` of the study.
        answers: Files that its page saved, of any number of readers.

    Raises:
        UserError: A file cannot be read, a line is malformed, or the second of its reader and item; or a method was rated by
            fewer than two readers, which no interval over readers can be had from.
    """
    items = read_key(key).items
    seen: dict[tuple[str, str], str] = {}
    rated: dict[str, list[Answer]] = {}
    for answer in (a for path in answers for a in read_answers(path, items)):
        pair = (answer.reader, answer.item)
        if pair in seen:
            raise UserError(f"{answer.place}: {answer.reader} has rated {answer.item} already, in {seen[pair]}")
        seen[pair] = answer.place
        rated.setdefault(items[answer.item].method, []).append(answer)
    missing = sorted({item.method for item in items.values()} - rated.keys())
    if missing:
        raise UserError(f"no answers to pictures of {missing[0]}")
    found = {method: _rating(method, some) for method, some in rated.items()}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1].mean, pair[0])))


def _rating(method: str, answers: Sequence[Answer]) -> Rating:
    """The mean of some answers, and its interval over readers."""
    given, readers = [a.answer for a in answers], [a.reader for a in answers]
    count = len(set(readers))
    if count < 2:
        raise UserError(f"{method}: rated by {readers[0]} alone; an interval over readers needs two at least")
    low, high = cluster_bootstrap(given, readers)
    return Rating(sum(given) / len(given), low, high, len(given), len({a.item for a in answers}), count)


def read_key(path: Path) -> Key:
    """The key of a study.

    Raises:
        UserError: It cannot be read, or is not what `write_study` writes.
    """
    try:
        return Key.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read the key: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(f"{path}: not the key.json of a study") from error


def read_answers(path: Path, items: Mapping[str, Item]) -> Iterator[Answer]:
    """The answers of a file that the page of a study saved.

    Raises:
        UserError: It cannot be read, or a line is malformed; the first that is.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before what they save
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the answers: {unreadable(error)}") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file: {error}") from error
    if not lines or lines[0] != COLUMNS:
        raise UserError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
    for number, fields in enumerate(lines[1:], 2):
        place = f"{path}, line {number}"
        if len(fields) != len(COLUMNS):
            raise UserError(f"{place}: needs {len(COLUMNS)} fields, has {len(fields)}")
        reader, item, answer, milliseconds = fields
        if not reader:
            raise UserError(f"{place}: the reader is missing")
        if item not in items:
            raise UserError(f"{place}: {item!r} is no item of this study")
        if answer not in map(str, range(1, SCALE + 1)):
            raise UserError(f"{place}: the answer must be 1 to {SCALE}, got {answer!r}")
        if not (milliseconds.isascii() and milliseconds.isdigit()):
            raise UserError(f"{place}: milliseconds must be a whole number, got {milliseconds!r}")
        yield Answer(reader, item, int(answer), place)
