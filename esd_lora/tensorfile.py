"""Safetensors files of strangers, read so that nothing of what they claim is believed before it has been checked.

    8 bytes: length of the header │ header: JSON, each tensor's dtype, shape and place │ the tensors, end to end

The length, the JSON, every name, dtype, shape and place are held against each other and against the size of the file before
anything of a claimed size is allocated; only then is torch imported, and the library reads the tensors. There is no other
format: a pickle is never opened.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from esd_lora.errors import PatchError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 4 * 2**30
"""A rank of 256 on every layer of SDXL, in float32, is 3 GB."""
MAX_HEADER = 8 * 2**20
"""What trainers write about their data sets has been seen to take two."""
MAX_TENSORS = 10_000
"""Adapters on every layer of SDXL and of its text encoders are 3,000 with their alphas."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of a value, by the name of its type."""
_NAME = re.compile(r"[\w.\-/]{1,256}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor: type by safetensors' name, shape, and its place after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_floating_point(self) -> bool:
        """Whether its values have fractions."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


class TensorFile:
    """A safetensors file whose header is sound: what it tells, and its tensors once they are asked for.

    metadata: What its header tells beside the tensors, as text.
    entries: The tensors, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            PatchError: It is not a safetensors file, or not a sound one.
        """
        self.path = path
        with _one_line(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ValueError(f"{size:,} bytes, more than any patch has")
            self._body, header = _read_header(file, size)
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self.entries: Mapping[str, Entry] = _entries(header, size - self._body)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name.

        Raises:
            PatchError: The file has changed, or cannot be read any more.
        """
        import safetensors.torch

        with _one_line(self.path):
            loaded: dict[str, Tensor] = safetensors.torch.load(self.path.read_bytes())
            if loaded.keys() != self.entries.keys():
                raise ValueError("it has changed while it was read")
        return {name: loaded[name] for name in sorted(loaded)}


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text of a stranger; a name that comes twice is an error, and so is a number that is none.

    Raises:
        ValueError: It is not JSON, nested too deeply, or holds characters that command a terminal.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    for name in _texts(values):
        if _CONTROL.search(name):
            raise ValueError(f"control characters in {ascii(name)[:80]}")
    return values


def _finite(text: str) -> float:
    """The number of a text, which JSON cannot say otherwise.

    Raises:
        ValueError: It is none, such as NaN, or too large for one.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file inside, as one line.

    Raises:
        PatchError: Always where something is.
    """
    try:
        yield
    except OSError as error:
        raise PatchError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, SafetensorError) as error:
        raise PatchError(f"{path}: not a safetensors file: {' '.join(str(error).split())[:200]}") from error


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the header's values.

    Raises:
        ValueError: There is none.
    """
    first = file.read(8)
    (length,) = struct.unpack("<Q", first) if len(first) == 8 else (size,)
    if length > size - 8:
        pickled = first[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
        raise ValueError("a pickle, which is never opened" if pickled else "cut off, or of another kind")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length:,} bytes; more than {MAX_HEADER:,} is not read")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("JSON with a name that comes twice")
    return values


def _texts(values: Any) -> Iterator[str]:
    """Every name and text of a JSON document; not recursive, for its depth is a stranger's."""
    left = [values]
    while left:
        match left.pop():
            case str(text):
                yield text
            case dict(items):
                left += [*items, *items.values()]
            case list(items):
                left += items


def _metadata(told: object) -> dict[str, str]:
    """What a header tells beside the tensors.

    Raises:
        ValueError: It is not names and texts.
    """
    if not isinstance(told, dict) or not all(isinstance(v, str) for v in told.values()):
        raise ValueError("its __metadata__ is not names and texts")
    return told


def _entries(header: Mapping[str, Any], room: int) -> dict[str, Entry]:
    """The tensors of a header, which lie end to end in `room` bytes.

    Raises:
        ValueError: The first that is not what it claims.
    """
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors; more than {MAX_TENSORS:,} are not read")
    entries = {name: _entry(name, told) for name, told in header.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != place:
            raise ValueError(f"{name} begins at {entry.start}, where {place} is right")
        place = entry.end
    if place != room:
        raise ValueError(f"its tensors take {place} bytes, and the file has {room} for them")
    return entries


def _entry(name: str, told: object) -> Entry:
    """What a header says of one tensor.

    Raises:
        ValueError: It contradicts itself.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.startswith("/"):
        raise ValueError(f"a tensor may not be called {ascii(name)[:80]}")
    match told:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)], **rest} if not rest:
            sound = dtype in SIZES and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**31 for n in shape)
            if sound and 0 <= start <= end and end - start == math.prod(shape) * SIZES[dtype]:
                return Entry(dtype, tuple(shape), start, end)
    raise ValueError(f"{name} has no type, shape and place that fit together")
