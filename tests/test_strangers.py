"""Files of strangers: whatever they hold, one line of our own comes of it, soon, and nothing of it is executed.

python -m pytest tests/test_strangers.py                          a few hundred mutated files
FUZZ=100000 python -m pytest tests/test_strangers.py -k mutated   a hundred thousand
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hostile import CORPUS, KOHYA, SOUND
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esd_lora import exporting
from esd_lora.errors import PatchError
from esd_lora.patch import load_patch
from esd_lora.tensorfile import MAX_BYTES

EXAMPLES = int(os.environ.get("FUZZ", "300"))


@pytest.mark.parametrize("kind", CORPUS)
def test_each_file_of_the_corpus_is_refused_in_one_line_of_its_own(kind: str, tmp_path: Path) -> None:
    data, message = CORPUS[kind]
    file = tmp_path / "file.safetensors"
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(PatchError) as caught:
        load_patch(file)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{file}: {message}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert not Path("executed").exists()
    # JSON values take up to twenty times their text; a claimed size would take gigabytes
    assert used < 30 * len(data) + 2**20


def test_the_corpus_begins_with_files_that_are_sound(tmp_path: Path, tiny_folder: Path) -> None:
    for name, data in (("ours", SOUND), ("theirs", KOHYA)):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    assert load_patch(tmp_path / "ours.safetensors").erases == "cat"
    assert exporting.import_lora(tmp_path / "theirs.safetensors", str(tiny_folder))[0].shapes


def test_a_file_too_large_for_a_patch_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    with file.open("wb") as out:
        out.write(SOUND)
        out.truncate(MAX_BYTES + 1)  # of holes: it takes no room on the disk
    with pytest.raises(PatchError, match=r"not a safetensors file: 4,294,967,297 bytes, more than any patch has$"):
        load_patch(file)


def test_a_file_that_is_exchanged_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.safetensors"
    file.write_bytes(SOUND)
    monkeypatch.setattr(Path, "read_bytes", lambda self: KOHYA)
    with pytest.raises(PatchError, match="not a safetensors file: it has changed while it was read"):
        load_patch(file)


# ---- mutated files -----------------------------------------------------------------------------------------------

WORDS = [
    b"unet",
    b"lora_A",
    b'"dtype"',
    b'"F32"',
    b'"BF16"',
    b'"I64"',
    b"[",
    b"]",
    b"{",
    b"}",
    b"-1",
    b"1e400",
    b"NaN",
    b"0",
]
WORDS += [
    b"999999999999",
    b"null",
    b"true",
    b'""',
    b"../",
    b"\xff",
    b"\x00",
    b"\x1b[2J",
    b".lora_B.weight",
    b"alpha",
    b",",
]


@st.composite
def scratched(draw: st.DrawFn) -> bytes:
    """A sound file, or one of the corpus, with a few bytes or words exchanged, cut or repeated, and often a right length."""
    small = [d for d, _ in CORPUS.values() if len(d) < 4096]
    data = bytearray(draw(st.sampled_from([SOUND, KOHYA] * len(small) + small)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        new = draw(st.one_of(st.binary(max_size=4), st.sampled_from(WORDS), st.just(bytes(data[at:to]) * 2)))
        data[at:to] = new
    if draw(st.booleans()) and b"}" in data:  # the header's length as it is now, or the mutation seldom gets past it
        data[:8] = struct.pack("<Q", max(0, data.rindex(b"}") + 1 - 8))
    return bytes(data)


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 24, 32, 56, 64, -1, 2**31, 2**63, 1e308, math.nan, math.inf, True, None, "2"]
)
PATTERNS = st.sampled_from(
    ["to_k", "block.to_k", ".*to_k", "^unet.*", "(", "(a+)+b", "a" * 300, ".*.*.*.*x", "attn2", ""]
)
CONCEPTS = st.sampled_from(["cat", "", None, {"erase": "cat"}, {"erase": "cat", "from": "cat"}, {"erase": 7}, {}, []])
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "schema": NUMBERS,
        "recipe": st.one_of(st.fixed_dictionaries({"concepts": st.lists(CONCEPTS, max_size=3)}), NUMBERS),
        "base": st.fixed_dictionaries({}, optional={"name": CONCEPTS, "fingerprint": NUMBERS}),
        "stack": st.lists(st.fixed_dictionaries({"weight": NUMBERS, "digest": CONCEPTS}), max_size=2),
        "cost": CONCEPTS,
    },
)
ADAPTERS = st.fixed_dictionaries(
    {},
    optional={
        "unet.r": NUMBERS,
        "unet.lora_alpha": NUMBERS,
        "unet.rank_pattern": st.dictionaries(PATTERNS, NUMBERS, max_size=3),
        "unet.alpha_pattern": st.one_of(st.dictionaries(PATTERNS, NUMBERS, max_size=3), NUMBERS),
        "unet.use_rslora": NUMBERS,
    },
)


@st.composite
def lying(draw: st.DrawFn) -> bytes:
    """A file whose header is JSON of the right kind and says something else than the file holds."""
    data = draw(st.sampled_from([SOUND, KOHYA]))
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [n for n in header if n != "__metadata__"]
    for _ in range(draw(st.integers(0, 2))):
        told = header[draw(st.sampled_from(names))]
        match draw(st.integers(0, 3)):
            case 0:
                told["dtype"] = draw(
                    st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "", None])
                )
            case 1:
                told["shape"] = draw(st.lists(NUMBERS, max_size=3))
            case 2:
                told["data_offsets"] = draw(st.lists(NUMBERS, min_size=1, max_size=3))
            case 3:
                header[draw(st.sampled_from([*names, "unet.x.lora_A.weight", "unet.lora_B.weight", "x.alpha"]))] = told
    texts = {"esd_lora": DOCUMENTS, "lora_adapter_metadata": ADAPTERS}
    header["__metadata__"] = {k: json.dumps(draw(v)) for k, v in texts.items() if draw(st.booleans())}
    for _ in range(draw(st.integers(0, 3))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(scope="module")
def layers(tiny_folder: Path) -> dict[str, tuple[int, int]]:
    return exporting.layers_of(str(tiny_folder))


@settings(
    max_examples=EXAMPLES,
    deadline=2000,  # milliseconds; one that hangs is a failure
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.one_of(scratched(), lying(), lying()))
def test_a_mutated_file_is_a_patch_or_refused_in_one_line(
    data: bytes, layers: dict[str, tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "layers_of", lambda *_: layers)
    file = tmp_path / "file.safetensors"
    file.write_bytes(data)
    for read in (load_patch, lambda f: exporting.import_lora(f, "tiny", partial=True)[0]):
        patch, refusal = None, ""
        try:
            patch = read(file)
        except PatchError as error:
            refusal = str(error)
        assert refusal.isprintable()
        if patch:
            assert patch.shapes
            assert all(torch.isfinite(t).all() for t in patch.tensors.values())
            assert sum(t.numel() for t in patch.tensors.values()) <= len(data)
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


def test_the_corpus_needs_no_more_memory_than_a_sound_file(tmp_path: Path) -> None:
    """In a process of its own whose memory is looked at: what tracemalloc does not see, such as torch's tensors."""
    for i, (data, _) in enumerate(CORPUS.values()):
        (tmp_path / f"{i}.safetensors").write_bytes(data)
    code = (
        "import sys\nfrom pathlib import Path\nfrom esd_lora.errors import PatchError\nfrom esd_lora.patch import load_patch\n"
        "import resource\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for p in Path(sys.argv[1]).glob('*.safetensors'):\n"
        "    try: load_patch(p)\n"
        "    except PatchError: continue\n"
        "    sys.exit(f'{p} was read')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 200 * 2**20  # the 10,001 tensors' JSON is the largest; a lie would be gigabytes
