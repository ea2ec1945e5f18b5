"""`Patch`: the low-rank tensors that erase a concept, and where they come from, in one safetensors file.

The file is `pytorch_lora_weights.safetensors` in diffusers' own naming, so `pipe.load_lora_weights(folder)` needs
nothing of us. Its header has `lora_adapter_metadata`, with only the keys that every diffusers version accepts, and
`esd_lora`: recipe, base, fingerprint, seed, versions, cost and, once measured, scores. Equal patches are equal files, byte
for byte. Alpha equals the rank, so that programs which ignore metadata scale the patch right.

    ΔW = lora_B · lora_A          (out, in) = (out, r) · (r, in)

torch is imported where numbers are handled, so that what a patch is can be told without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from safetensors import SafetensorError
from typing_extensions import TypedDict

from esd_lora.errors import OutputError, PatchError
from esd_lora.recipe import Concept
from esd_lora.tensorfile import Entry, TensorFile, parse_json

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "pytorch_lora_weights.safetensors"
SCHEMA = 1
PREFIXES = ("unet", "transformer")
"""The denoiser's name in a pipeline."""


# ---- what a header tells, as far as anything here reads it ------------------------------------------------------


@with_config({"extra": "allow"})
class Origin(TypedDict, total=False):
    """The base that a patch was made for."""

    name: str
    fingerprint: str
    revision: str | None


@with_config({"extra": "allow"})
class Made(TypedDict, total=False):
    """The recipe that a patch was made by; its concepts have all their keys."""

    concepts: list[Annotated[Concept, AfterValidator(lambda c: c.model_dump(mode="json", by_alias=True))]]
    preserve: list[str] | None
    resolution: int | None


@with_config({"extra": "allow"})
class Part(TypedDict):
    """A part of a stack, or of what was merged into a base."""

    weight: FiniteFloat
    digest: str
    recipe: NotRequired[Made]
    base: NotRequired[Origin]


Parts = Annotated[list[Part], Field(min_length=1)]


@with_config({"extra": "allow"})
class Header(TypedDict, total=False):
    """A patch, or a stack of patches."""

    recipe: Made
    base: Origin
    cost: dict[str, Any]
    stack: Parts


HEADER: TypeAdapter[Any] = TypeAdapter(Header)
PARTS: TypeAdapter[Any] = TypeAdapter(Parts)
"""A header as plain values, and the parts of a stack: what they validate is returned with all keys of its concepts."""


@dataclass(frozen=True)
class Outline:
    """What a patch is without its numbers: the shapes of its tensors, their bytes, and its `info`."""

    sizes: Mapping[str, tuple[int, ...]]
    nbytes: int
    info: Mapping[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module, by its name with the denoiser's prefix."""
        return {k.removesuffix(".lora_A.weight"): v[0] for k, v in self.sizes.items() if ".lora_A." in k}

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(map(math.prod, self.sizes.values()))

    @property
    def concepts(self) -> list[dict[str, Any]]:
        """The concepts that it erases, as its recipe names them, or the recipes of all parts of a stack."""
        parts = self.info.get("stack", [self.info])
        return [concept for part in parts for concept in part.get("recipe", {}).get("concepts", [])]


@dataclass(frozen=True)
class Patch:
    """An erasure patch: tensors by diffusers' names and a JSON document about them.

    tensors: `unet.<module>.lora_A.weight` (r, in) and `….lora_B.weight` (out, r), on the CPU; `transformer.` where the
        denoiser is one.
    info: `schema`, `recipe`, `base`, `versions`, `cost`, `loss`, and `scores` once measured; of a stack `base` and
        `stack`, with weight, digest, recipe and base of each part; `fused` and `compressed` where it was.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outline(self) -> Outline:
        """What it is without its numbers."""
        sizes = {k: tuple(v.shape) for k, v in self.tensors.items()}
        return Outline(sizes, sum(v.nbytes for v in self.tensors.values()), self.info)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module, by its name with the denoiser's prefix."""
        return self.outline.ranks

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return self.outline.parameters

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.outline.nbytes

    @property
    def prefix(self) -> str:
        """What diffusers' LoRA files put before the names of the denoiser's modules: `unet` or `transformer`."""
        return next(iter(self.tensors)).split(".", 1)[0]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each adapted module's ΔW, by its name with the denoiser's prefix."""
        pairs = {n: (self.tensors[f"{n}.lora_B.weight"], self.tensors[f"{n}.lora_A.weight"]) for n in self.ranks}
        return {n: (len(up), down.shape[1]) for n, (up, down) in pairs.items()}

    @property
    def concepts(self) -> list[dict[str, Any]]:
        """The concepts that it erases, as its recipe names them, or the recipes of all parts of a stack."""
        return self.outline.concepts

    @property
    def erases(self) -> str:
        """What it erases, in a few words; empty where it does not say."""
        return ", ".join(dict.fromkeys(c["erase"] for c in self.concepts))

    @property
    def digest(self) -> str:
        """SHA-256 of its tensors, in hexadecimal: the same for equal tensors, whatever is told about them."""
        return hashlib.sha256(encode(self.tensors, {})).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the patch to a folder or a `.safetensors` file; returns the file.

        Raises:
            OutputError: The place cannot be written to; nothing is left behind.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / FILE_NAME
        write_file(file, self.to_bytes())
        return file

    def to_bytes(self) -> bytes:
        """The file that `save` writes; the same for equal patches."""
        ranks, prefix = self.ranks, self.prefix
        adapter: dict[str, Any] = {
            f"{prefix}.r": max(ranks.values()),
            f"{prefix}.lora_alpha": max(ranks.values()),
            f"{prefix}.target_modules": sorted(k.split(".", 1)[1] for k in ranks),
        }
        if len(set(ranks.values())) > 1:
            pattern = {k.split(".", 1)[1]: r for k, r in sorted(ranks.items())}
            adapter |= {f"{prefix}.rank_pattern": pattern, f"{prefix}.alpha_pattern": pattern}
        header = {
            "format": "pt",
            "esd_lora": json.dumps({"schema": SCHEMA, **self.info}, sort_keys=True),
            "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        }
        return encode(self.tensors, header)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of these tensors, the same bytes every time (the library orders metadata at random)."""
    import safetensors.torch

    raw: bytes = safetensors.torch.save({k: tensors[k].contiguous() for k in sorted(tensors)})
    (length,) = struct.unpack("<Q", raw[:8])
    body = json.loads(raw[8 : 8 + length])
    head = json.dumps({"__metadata__": dict(sorted(metadata.items())), **body}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + raw[8 + length :]


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside its place, flushed to the disk, then renamed.

    Raises:
        OutputError: The folder cannot be made or written to, or the disk is full.
    """
    with whole(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place for a file or folder that is at `path` afterwards, for all to read; where that fails nothing is left.

    An empty folder at `path` is filled and not replaced, which may be impossible: it may be the one that we are in, a mount
    point, or in a folder that cannot be written to.

    Raises:
        OutputError: The folder cannot be made or written to, or the disk is full.
    """
    made: list[Path] = []
    try:
        made = [p for p in path.parents if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.is_dir()
        with tempfile.TemporaryDirectory(dir=path if there else path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / "part"
            yield part
            for p in (part, *part.rglob("*")):
                p.chmod(0o755 if p.is_dir() else 0o644)
            if there and part.is_dir():
                _fill(path, part)
            else:
                part.replace(path)
        made = []
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot write: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for p in made:  # deepest first
            with suppress(OSError):
                p.rmdir()


def _fill(folder: Path, part: Path) -> None:
    """Move all that is in a part to the folder that it is made in; where that fails, or the folder holds more, nothing."""
    if any(p.name != part.parent.name for p in folder.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    with ExitStack() as undone:
        for p in sorted(part.iterdir()):
            moved = p.replace(folder / p.name)
            undone.callback(moved.replace, p)
        undone.pop_all()


def unfinished(folder: Path) -> list[Path]:
    """What a process that was killed left of the files that it was writing to a folder by `whole`."""
    found = (p for p in folder.glob(".*.????????") if p.is_dir())
    return [p for p in found if {q.name for q in p.iterdir()} <= {"part"}]


def check_empty(out: Path) -> None:
    """Nothing, if a new folder can be at `out`.

    Raises:
        OutputError: It is a file, or a folder that holds anything.
    """
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file; name a folder")
        taken = out.exists() and any(out.iterdir())
    except OSError as error:
        raise OutputError(f"{out}: cannot read: {error.strerror or error}") from error
    if taken:
        raise OutputError(f"{out}: not empty; choose another folder")


def load_patch(path: str | Path) -> Patch:
    """The patch in a folder or file; alpha over rank, where another program wrote one, is in its lora_B.

    Raises:
        PatchError: Nothing there, not a safetensors file, not a patch, or a tensor that is not finite.
    """
    file, store, info = _opened(path)
    return patch_of(file, store.tensors(), info, adapter=store.metadata.get("lora_adapter_metadata", "{}"))


def read_outline(path: str | Path) -> Outline:
    """What the patch in a folder or file is; its numbers are not looked at.

    Raises:
        PatchError: Nothing there, not a safetensors file, or not a patch.
    """
    _, store, info = _opened(path)
    sizes = {name: entry.shape for name, entry in store.entries.items()}
    return Outline(sizes, sum(entry.end - entry.start for entry in store.entries.values()), info)


def _opened(path: str | Path) -> tuple[Path, TensorFile, dict[str, Any]]:
    """The file of a patch's folder, or the file itself, with its header read and checked, and what that tells of the patch.

    Raises:
        PatchError: There is none, or it is not a patch.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        weighted, _, _ = str(path).rpartition(":")
        if weighted and Path(weighted).exists():
            raise PatchError(f"{path}: no weight can be told like that here (eval has --weight); write {weighted}")
        raise PatchError(f"{path}: no patch here; a patch is a folder with {FILE_NAME}, or such a file")
    store = TensorFile(file)
    info = read_info(file, store.metadata.get("esd_lora", "{}"))
    _check_entries(file, store.entries)
    return file, store, info


def patch_of(file: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any], *, adapter: str = "{}") -> Patch:
    """The patch of a file's tensors, with the scale that `adapter`, its `lora_adapter_metadata`, tells folded into lora_B.

    Raises:
        PatchError: A tensor is not finite, or `adapter` does not fit.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PatchError(f"{file}: {name} has values that are not finite")
    return Patch(_scaled(file, tensors, adapter), info)


def read_info(file: Path, text: str) -> dict[str, Any]:
    """What the header `esd_lora` tells.

    Raises:
        PatchError: It is not JSON, of another schema, or malformed; the first place where it is.
    """
    try:
        info = parse_json(text)
    except ValueError as error:
        raise PatchError(f"{file}: its esd_lora header is not JSON that can be read: {error}") from error
    if not isinstance(info, dict) or info.get("schema", SCHEMA) != SCHEMA:
        raise PatchError(f"{file}: written in a form that this version cannot read; update esd_lora")
    try:
        told: dict[str, Any] = HEADER.validate_python(info)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise PatchError(f"{file}: its esd_lora header is malformed: {place}: {first['msg']}") from error
    return told


def _scaled(file: Path, tensors: Mapping[str, Tensor], text: str) -> dict[str, Tensor]:
    """The tensors with the scale that `lora_adapter_metadata` tells, alpha over rank, folded into lora_B.

    Raises:
        PatchError: The metadata is not what diffusers writes, or contradicts the tensors.
    """
    scaled = dict(tensors)
    prefix = f"{Patch(tensors).prefix}."
    try:
        told = {k.removeprefix(prefix): v for k, v in parse_json(text).items() if k.startswith(prefix)}
        ranks, alphas = (_Told(told, *keys) for keys in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")))
        for name, rank in Patch(tensors).ranks.items() if told else ():
            r, alpha = (of(name.split(".", 1)[1]) for of in (ranks, alphas))
            scale = alpha / (math.sqrt(r) if told.get("use_rslora") else r)
            up = tensors[f"{name}.lora_B.weight"]
            up = up if scale == 1 else up.float() * scale
            if r != rank or not up.isfinite().all():
                raise PatchError(f"{file}: its lora_adapter_metadata does not fit {name} of rank {rank}")
            scaled[f"{name}.lora_B.weight"] = up
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise PatchError(f"{file}: its lora_adapter_metadata is not what diffusers writes") from error
    return scaled


class _Told:
    """Rank or alpha of a module: that of the first pattern that peft would find in its name, or else of all modules.

    peft takes any regular expression, and some of them never end. Plain names are looked up; the others may have names, dots,
    anchors and two `.*`, which is what people write by hand.
    """

    def __init__(self, told: Mapping[str, Any], key: str, pattern: str) -> None:
        patterns: dict[str, Any] = told.get(pattern) or {}
        self.plain = {k: (i, v) for i, (k, v) in enumerate(patterns.items()) if _PLAIN.fullmatch(k)}
        others = [(i, k, v) for i, (k, v) in enumerate(patterns.items()) if k not in self.plain]
        if len(others) > 64 or any(not _SIMPLE.fullmatch(k) or k.count(".*") > 2 for _, k, _ in others):
            raise ValueError(f"{pattern} has expressions that are not matched")
        self.others = [(i, re.compile(rf"(.*\.)?({k})$"), v) for i, k, v in others]
        self.default = told.get(key)

    def __call__(self, module: str) -> Any:
        """Its value for a module."""
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        found = [self.plain[e] for e in ends if e in self.plain]
        found += [(i, v) for i, k, v in self.others if k.match(module)]
        return min(found, key=lambda f: f[0])[1] if found else self.default


_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_SIMPLE = re.compile(r"\^?(\w|\\?\.|\.\*)*\$?", re.ASCII)
"""Patterns that are plain names, and those that cannot take long to match."""


def _check_entries(file: Path, entries: Mapping[str, Entry]) -> None:
    """Every tensor of a file is a low-rank factor with its partner.

    Raises:
        PatchError: The first one that is not.
    """
    if not entries:
        raise PatchError(f"{file}: holds no tensors")
    prefixes = sorted({name.split(".", 1)[0] for name in entries})
    if len(prefixes) > 1 or prefixes[0] not in PREFIXES:
        hint = "; `esd-lora import` makes a patch of such a file" if prefixes[0].startswith("lora_") else ""
        adapted = " and ".join(prefixes[:3])
        raise PatchError(f"{file}: adapts {adapted}; a patch adapts {' or '.join(PREFIXES)} alone{hint}")
    for name, entry in entries.items():
        kind = ".lora_A." if ".lora_A." in name else ".lora_B."
        other = entries.get(name.replace(kind, ".lora_B." if kind == ".lora_A." else ".lora_A."))
        module = name.partition(".")[2].removesuffix(f"{kind}weight")
        factor = module and name.endswith(f"{kind}weight") and len(entry.shape) == 2 and 0 not in entry.shape
        if not factor or not entry.is_floating_point:
            raise PatchError(f"{file}: {name} is not a low-rank factor in diffusers' naming")
        if other is None:
            raise PatchError(f"{file}: {name} lacks its other factor")
        if kind == ".lora_A." and (len(other.shape) != 2 or entry.shape[0] != other.shape[1]):
            raise PatchError(f"{file}: {name} is {entry.shape}, which does not fit {other.shape}")
