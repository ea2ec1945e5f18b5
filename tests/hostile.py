"""Files as a stranger might send them: broken, lying or malicious, each with what must be said of it.

`CORPUS` is the list that `test_strangers.py` goes through and that its fuzzing starts from. Everything is made here, so that
nothing in the repository is a file that a scanner would stop at.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import torch

from esd_lora.patch import encode

A, B = "unet.block.to_k.lora_A.weight", "unet.block.to_k.lora_B.weight"
TENSORS = {A: torch.ones(2, 3), B: torch.ones(4, 2)}
SOUND = encode(TENSORS, {"esd_lora": '{"recipe": {"concepts": [{"erase": "cat"}]}, "schema": 1}', "format": "pt"})
KOHYA = encode(
    {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(2, 32),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(32, 2).half(),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.alpha": torch.tensor(1.0),
    },
    {"ss_network_dim": "2"},
)
"""A sound patch, and a sound file of another program."""


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('executed', 'w').close()",)


def file_of(header: Any, body: bytes = b"\0" * 56, *, length: int | None = None) -> bytes:
    """A file with this header, JSON text or values, whatever they say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start: int = 0, end: int = 24, shape: Any = (2, 3), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """What a header says of a tensor; by default the truth about the first."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


SECOND = entry(24, 56, (4, 2))
PAIR = {A: entry(), B: SECOND}


def with_a(told: object) -> bytes:
    return file_of({**PAIR, A: told})


def told(**metadata: str) -> bytes:
    return encode(TENSORS, metadata)


BAD = "not a safetensors file: "
LIES = f"{BAD}{A} has no type, shape and place that fit together"
ADAPTER = "its lora_adapter_metadata is not what diffusers writes"
SLOW = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(b+)+x": 1}}
DEEP = "[" * 100_000

CORPUS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", f"{BAD}cut off, or of another kind"),
    "a few bytes": (b"abc", f"{BAD}cut off, or of another kind"),
    "a text": (b"Not a patch, but long enough to have a length.", f"{BAD}cut off, or of another kind"),
    "a pickle": (pickle.dumps(_Command()), f"{BAD}a pickle, which is never opened"),
    "a zip, as torch saves": (b"PK\x03\x04" + b"\0" * 60, f"{BAD}a pickle, which is never opened"),
    "a pickle with a header before": (
        file_of(b"{}", pickle.dumps(_Command())),
        f"{BAD}its tensors take 0 bytes, and the",
    ),
    "a header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", f"{BAD}cut off, or of another kind"),
    "a header longer than the file": (file_of(b"{}", b"", length=1000), f"{BAD}cut off, or of another kind"),
    "a huge header": (file_of(b"{}" + b" " * (9 << 20), b""), f"{BAD}a header of 9,437,186 bytes; more than"),
    "truncated": (SOUND[:-1], f"{BAD}its tensors take 56 bytes, and the file has 55"),
    "truncated header": (SOUND[:60], f"{BAD}cut off, or of another kind"),
    "something appended": (SOUND + b"x", f"{BAD}its tensors take 56 bytes, and the file has 57"),
    "a header that is no JSON": (file_of(b"{]"), f"{BAD}Expecting"),
    "a header that is no text": (file_of(b"{\xff}"), f"{BAD}'utf-8' codec can't decode"),
    "a header that is a list": (file_of([]), f"{BAD}its header is not a JSON object"),
    "deep JSON": (file_of(DEEP.encode()), f"{BAD}JSON nested too deeply"),
    "a number of 5,000 digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), f"{BAD}Exceeds the limit"),
    "a name twice": (file_of(f'{{"{A}": 1, "{A}": 2}}'.encode()), f"{BAD}JSON with a name that comes twice"),
    "no tensors": (file_of({}, b""), "holds no tensors"),
    "10,001 tensors": (
        file_of({f"unet.{i}": entry(0, 0, (0,)) for i in range(10_001)}, b""),
        f"{BAD}10,001 tensors; more than 10,000 are not read",
    ),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), f"{BAD}its __metadata__ is not names and texts"),
    "metadata that is a list": (file_of({"__metadata__": []}), f"{BAD}its __metadata__ is not names and texts"),
    "no place": (with_a({"dtype": "F32", "shape": [2, 3]}), LIES),
    "something else beside": (with_a(entry(more=1)), LIES),
    "a place before the file": (with_a(entry(-8, 16)), LIES),
    "a place that ends before it begins": (with_a(entry(24, 0)), LIES),
    "a place larger than the shape": (with_a(entry(shape=(2, 2))), LIES),
    "a shape larger than the place": (with_a(entry(shape=(2**30, 2**30))), LIES),
    "a shape whose product overflows": (with_a(entry(shape=(2**33, 2**31, 3))), LIES),
    "a negative shape": (with_a(entry(shape=(-2, -3))), LIES),
    "a shape of true": (with_a(entry(0, 4, (True, True))), LIES),
    "a shape of fractions": (with_a(entry(shape=(2.0, 3.0))), LIES),
    "a shape of 100 dimensions": (with_a(entry(0, 4, (1,) * 100)), LIES),
    "an unknown type": (with_a(entry(dtype="F33")), LIES),
    "a type that is no text": (with_a(entry(dtype=["F32"])), LIES),
    "overlapping places": (file_of({A: entry(), B: entry(0, 32, (4, 2))}), f"{BAD}{B} begins at 0, where 24 is right"),
    "a hole": (file_of({A: entry(), B: entry(32, 64, (4, 2))}, b"\0" * 64), f"{BAD}{B} begins at 32, where 24 is"),
    "places beyond the file": (file_of(PAIR, b"\0" * 8), f"{BAD}its tensors take 56 bytes, and the file has 8"),
    "a name that climbs": (file_of({"../../x.lora_A.weight": entry()}), f"{BAD}a tensor may not be called '../../x"),
    "a name that is a path": (file_of({"/x.lora_A.weight": entry()}), f"{BAD}a tensor may not be called '/x"),
    "a name that commands a terminal": (file_of({"\x1b[2J": entry()}), f"{BAD}control characters in '\\x1b[2J'"),
    "a name of another alphabet": (file_of({"unet.Ａ": entry()}), f"{BAD}a tensor may not be called 'unet.\\uff21'"),
    "a name without end": (file_of({"a" * 300: entry()}), f"{BAD}a tensor may not be called 'aaa"),
    "an empty name": (file_of({"": entry()}), f"{BAD}a tensor may not be called ''"),
    "not a number": (
        encode({A: torch.full((2, 3), torch.nan), B: TENSORS[B]}, {}),
        f"{A} has values that are not finite",
    ),
    "whole numbers": (encode({k: v.int() for k, v in TENSORS.items()}, {}), f"{A} is not a low-rank factor in"),
    "no values": (
        file_of({A: entry(0, 0, (0, 3)), B: entry(0, 0, (4, 0))}, b""),
        f"{A} is not a low-rank factor in",
    ),
    "a factor without its partner": (encode({A: TENSORS[A]}, {}), f"{A} lacks its other factor"),
    "ranks that differ": (
        encode({A: torch.ones(3, 3), B: TENSORS[B]}, {}),
        f"{A} is (3, 3), which does not fit (4, 2)",
    ),
    "another network": (
        encode({k.replace("unet", "vae"): v for k, v in TENSORS.items()}, {}),
        "adapts vae; a patch adapts",
    ),
    "a deep document": (
        told(esd_lora=DEEP),
        "its esd_lora header is not JSON that can be read: JSON nested too deeply",
    ),
    "a document that commands a terminal": (
        told(esd_lora='{"note": "\\u001b]0;owned\\u0007"}'),
        "its esd_lora header is not JSON that can be read: control characters in '\\x1b]0;owned",
    ),
    "half a character": (
        told(esd_lora='{"loss": "\\ud800"}'),
        "its esd_lora header is not JSON that can be read: control characters in '\\ud800'",
    ),
    "names of an adapter that peft saves": (
        encode({k.replace(".weight", ".default.weight"): v for k, v in TENSORS.items()}, {}),
        f"{A.replace('.weight', '.default.weight')} is not a low-rank factor in",
    ),
    "a recipe with a resolution in words": (
        told(esd_lora='{"recipe": {"resolution": "large"}}'),
        "its esd_lora header is malformed: recipe.resolution: ",
    ),
    "a recipe that preserves a number": (
        told(esd_lora='{"recipe": {"preserve": 5}}'),
        "its esd_lora header is malformed: recipe.preserve: ",
    ),
    "a revision that is a number": (
        told(esd_lora='{"base": {"revision": 5}}'),
        "its esd_lora header is malformed: base.revision: ",
    ),
    "a document of another kind": (told(esd_lora='{"base": 7}'), "its esd_lora header is malformed: base: "),
    "deep metadata": (told(lora_adapter_metadata=DEEP), ADAPTER),
    "an expression that never ends": (told(lora_adapter_metadata=json.dumps(SLOW)), ADAPTER),
    "10,000 expressions": (
        told(lora_adapter_metadata=json.dumps({**SLOW, "unet.alpha_pattern": {f".*{i}$": 1 for i in range(10_000)}})),
        ADAPTER,
    ),
    "an alpha that is infinite": (
        told(lora_adapter_metadata='{"unet.r": 2, "unet.lora_alpha": Infinity}'),
        "its lora_ad",
    ),
}
"""What it is → the file, and how its one line goes on after the file's name."""
