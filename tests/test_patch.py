"""The patch file: what is written, what plain diffusers makes of it, and what is said about broken ones."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same, weights_of
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esd_lora.bases import Base
from esd_lora.compose import attach
from esd_lora.errors import OutputError, PatchError
from esd_lora.patch import FILE_NAME, Patch, check_empty, encode, load_patch, read_outline, whole, write_file

A, B = "unet.block.to_k.lora_A.weight", "unet.block.to_k.lora_B.weight"


def factors(**replaced: Tensor) -> dict[str, Tensor]:
    """A small patch's tensors."""
    return {A: torch.ones(2, 3), B: torch.ones(4, 2), **replaced}


def test_a_patch_reads_as_it_was_written(patch: Patch, tmp_path: Path) -> None:
    file = patch.save(tmp_path / "a")
    assert file == tmp_path / "a" / FILE_NAME
    for place in (tmp_path / "a", file):
        again = load_patch(place)
        assert same(again.tensors, {k: patch.tensors[k] for k in sorted(patch.tensors)})
        assert again.info == patch.info
    assert patch.save(tmp_path / "b.safetensors") == tmp_path / "b.safetensors"
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
    assert again.save(tmp_path / "c").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_outline_tells_what_the_patch_would(patch: Patch, tmp_path: Path, dtype: torch.dtype) -> None:
    made = Patch({k: v.to(dtype) for k, v in patch.tensors.items()}, patch.info)
    outline = read_outline(made.save(tmp_path))
    assert outline == Patch(dict(sorted(made.tensors.items())), load_patch(patch.save(tmp_path / "b")).info).outline
    assert outline.ranks == patch.ranks
    assert (outline.parameters, outline.nbytes) == (16 * 2 * (32 + 32), 16 * 2 * (32 + 32) * dtype.itemsize)
    assert outline.concepts == patch.concepts != []


def test_a_patch_knows_the_shapes_of_its_layers() -> None:
    patch = Patch(factors())
    assert patch.shapes == {"unet.block.to_k": (4, 3)}
    assert (patch.concepts, patch.erases) == ([], "")


def test_equal_patches_are_equal_files() -> None:
    metadata = dict.fromkeys("abcdefgh", "x")
    first = encode(factors(), metadata)
    for _ in range(20):  # the library would order eight keys at random
        assert encode(dict(reversed(factors().items())), dict(reversed(metadata.items()))) == first
    assert encode(factors(), metadata | {"a": "y"}) != first


def test_the_file_has_the_tensors_aligned_and_whole(tmp_path: Path) -> None:
    values = {"b": torch.randn(3, 5).half(), "a": torch.arange(7.0), "s": torch.tensor(3), "t": torch.ones(2, 3).t()}
    path = tmp_path / "file"
    path.write_bytes(encode(values, {"some": "é"}))
    with safe_open(path, framework="pt") as store:
        assert store.metadata() == {"some": "é"}
        assert same({k: store.get_tensor(k) for k in values}, values)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_header_has_only_what_every_diffusers_accepts(patch_folder: Path, patch: Patch) -> None:
    with safe_open(patch_folder / FILE_NAME, framework="pt") as store:
        metadata = store.metadata()
    assert sorted(metadata) == ["esd_lora", "format", "lora_adapter_metadata"]
    adapter = json.loads(metadata["lora_adapter_metadata"])
    modules = sorted(k.removeprefix("unet.") for k in patch.ranks)
    assert adapter == {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": modules}
    assert metadata["format"] == "pt"
    assert json.loads(metadata["esd_lora"])["schema"] == 1


def test_a_patch_says_where_it_comes_from(patch: Patch, base: Base, tiny_folder: Path) -> None:
    assert patch.info["base"] == {"name": str(tiny_folder), "revision": None, "fingerprint": base.fingerprint}
    concept = {"erase": "cat", "from": None, "replace_with": None, "synonyms": []}
    assert patch.info["recipe"]["concepts"] == [concept]
    assert patch.info["versions"]["torch"] == torch.__version__
    # 3 steps × {c, ∅}; preserving, without guidance: 3 × {∅} + 3 × {dog}; directions of 3 × {c, ∅}; 6 × (2 + 2) × 3
    assert patch.info["cost"] == {"forward_passes": 6 + 3 + 3 + 6 + 72}
    assert 0 < patch.info["loss"] < 10
    assert set(patch.ranks.values()) == {2}


def test_plain_diffusers_draws_the_same_with_the_patch_and_the_base_without(
    base: Base, tiny_folder: Path, patch_folder: Path, patch: Patch
) -> None:
    def draw(pipe: Any) -> np.ndarray:
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipe(["cat", "dog"], latents=noise, num_inference_steps=4, output_type="np").images

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    bare = draw(pipe)
    pipe.load_lora_weights(patch_folder)
    attach(base, [patch])
    patched = draw(pipe)
    assert np.array_equal(patched, draw(base.pipe))
    assert np.abs(patched - bare).max() > 0.01
    pipe.unload_lora_weights()
    base.remove_adapters()
    assert same(pipe.unet.state_dict(), weights_of(base))
    assert np.array_equal(draw(pipe), bare)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 6, "rank_pattern": {"attn2.to_q": 3}, "alpha_pattern": {"attn2.to_q": 1, "^mid_block.*to_v": 2}},
        {"lora_alpha": 6, "use_rslora": True},
    ],
    ids=["patterns", "rslora"],
)
def test_the_alpha_of_another_program_counts_as_in_plain_diffusers(
    config: dict[str, Any], base: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    modules = ["attn2.to_q", "attn2.to_v", "attn1.to_k"]
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=modules, init_lora_weights="gaussian", **config))
    generator = torch.Generator().manual_seed(0)
    state = get_peft_model_state_dict(pipe.unet)
    state = {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}
    pipe.save_lora_weights(tmp_path, state, **_collate_lora_metadata({"unet": pipe.unet}))
    pipe.unet.unload_lora()

    def predict() -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return pipe.unet(x, 500, base.encode(["cat", "dog"]).tensors["encoder_hidden_states"]).sample

    bare = predict()
    pipe.load_lora_weights(tmp_path)
    theirs = predict()
    pipe.unload_lora_weights()
    patch = load_patch(tmp_path)
    plain = Patch({f"unet.{k}": v for k, v in state.items()})
    ours = []
    for loaded in (patch, plain):
        attach(base, [loaded])
        pipe.unet = base.denoiser
        ours.append(predict())
    # the scale is on B here and on B A x there: roundings of float32 in a few layers
    torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-5)
    assert (ours[1] - theirs).abs().max() > 0.01  # without the scale it is another picture
    assert (bare - theirs).abs().max() > 0.01
    patch.save(tmp_path / "again")
    assert same(load_patch(tmp_path / "again").tensors, dict(sorted(patch.tensors.items())))


# ---- broken files ------------------------------------------------------------------------------------------------


def document(text: str) -> Callable[[Path], None]:
    return lambda path: save_file(factors(), path, {"esd_lora": text})


def adapter(text: str) -> Callable[[Path], None]:
    return lambda path: save_file(factors(), path, {"lora_adapter_metadata": text})


def concept(text: str) -> Callable[[Path], None]:
    return document(f'{{"recipe": {{"concepts": [{text}]}}}}')


def tensors(replaced: Mapping[str, Tensor | None]) -> Callable[[Path], None]:
    kept = {k: v for k, v in {**factors(), **replaced}.items() if v is not None}
    return lambda path: save_file(kept, path)


ALIEN = "is not a low-rank factor in diffusers' naming"
MALFORMED = "its esd_lora header is malformed: "
ADAPTER = "its lora_adapter_metadata "


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a safetensors file: "),
        (lambda path: path.write_text("Not a patch, but long enough to have a length."), "not a safetensors file: "),
        (lambda path: path.write_bytes(encode(factors(), {})[:-1]), "not a safetensors file: "),
        (lambda path: path.write_bytes(encode(factors(), {})[:40]), "not a safetensors file: "),
        (lambda path: path.write_bytes(encode(factors(), {}) + b"more"), "not a safetensors file: "),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a safetensors file: "),
        (document("{"), "its esd_lora header is not JSON"),
        (document("[1]"), "written in a form that this version cannot read; update esd_lora"),
        (document('{"schema": 2}'), "written in a form that this version cannot read; update esd_lora"),
        (document('{"base": null}'), f"{MALFORMED}base: "),
        (document('{"base": {"name": null}}'), f"{MALFORMED}base.name: "),
        (document('{"recipe": null}'), f"{MALFORMED}recipe: "),
        (document('{"recipe": {"concepts": "cat"}}'), f"{MALFORMED}recipe.concepts: "),
        (document('{"cost": 7}'), f"{MALFORMED}cost: "),
        (document('{"stack": []}'), f"{MALFORMED}stack: "),
        (document('{"stack": [{}]}'), f"{MALFORMED}stack.0.weight: Field required"),
        (document('{"stack": [{"weight": "x", "digest": ""}]}'), f"{MALFORMED}stack.0.weight: "),
        (document('{"loss": NaN}'), "its esd_lora header is not JSON that can be read: NaN is no finite number"),
        (document('{"loss": 1e999}'), "its esd_lora header is not JSON that can be read: 1e999 is no finite number"),
        (concept("{}"), f"{MALFORMED}recipe.concepts.0.erase: Field required"),
        (concept('{"erase": "cat", "form": "dog"}'), f"{MALFORMED}recipe.concepts.0.form: "),
        (concept('{"erase": "cat", "from": "cat"}'), f"{MALFORMED}recipe.concepts.0: "),
        (adapter("{"), f"{ADAPTER}is not what diffusers writes"),
        (adapter("[1]"), f"{ADAPTER}is not what diffusers writes"),
        (adapter('{"unet.r": 2}'), f"{ADAPTER}is not what diffusers writes"),
        (adapter('{"unet.r": 2, "unet.lora_alpha": "4"}'), f"{ADAPTER}is not what diffusers writes"),
        (adapter('{"unet.r": 0, "unet.lora_alpha": 4}'), f"{ADAPTER}is not what diffusers writes"),
        (
            adapter('{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}'),
            f"{ADAPTER}is not what diffusers writes",
        ),
        (adapter('{"unet.r": 3, "unet.lora_alpha": 3}'), f"{ADAPTER}does not fit unet.block.to_k of rank 2"),
        (adapter('{"unet.r": 2, "unet.lora_alpha": 1e99}'), f"{ADAPTER}does not fit unet.block.to_k of rank 2"),
        (lambda path: save_file({}, path), "holds no tensors"),
        (
            tensors(
                {"text_encoder.x.lora_A.weight": torch.ones(2, 3), "text_encoder.x.lora_B.weight": torch.ones(3, 2)}
            ),
            "adapts text_encoder and unet; a patch adapts unet or transformer alone",
        ),
        (
            tensors({A: None, B: None, "lora_unet_x.alpha": torch.ones(1)}),
            "adapts lora_unet_x; a patch adapts unet or transformer alone; `esd-lora import` makes a patch of such a file",
        ),
        (tensors({A: None, B: None, "lora_A": torch.ones(2, 3)}), "adapts lora_A; a patch adapts unet or transformer"),
        (tensors({"unet.conv_in.weight": torch.ones(2, 2)}), f"unet.conv_in.weight {ALIEN}"),
        (tensors({"unet.x.lora_down.weight": torch.ones(2, 2)}), f"unet.x.lora_down.weight {ALIEN}"),
        (tensors({"unet.x.lora_A.bias": torch.ones(2, 2)}), f"unet.x.lora_A.bias {ALIEN}"),
        (tensors({A: torch.ones(2, 3, 1, 1)}), f"{A} {ALIEN}"),
        (tensors({A: torch.ones(2, 3, dtype=torch.int64)}), f"{A} {ALIEN}"),
        (tensors({A: torch.ones(0, 3), B: torch.ones(4, 0)}), f"{A} {ALIEN}"),
        (tensors({B: None}), f"{A} lacks its other factor"),
        (tensors({A: None}), f"{B} lacks its other factor"),
        (tensors({A: torch.ones(3, 3)}), f"{A} is (3, 3), which does not fit (4, 2)"),
        (tensors({A: torch.full((2, 3), torch.nan)}), f"{A} has values that are not finite"),
        (tensors({B: torch.full((4, 2), -torch.inf)}), f"{B} has values that are not finite"),
    ],
)
def test_a_broken_patch_is_refused_in_one_line(breaks: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    breaks(file)
    for place in (tmp_path, file):
        with pytest.raises(PatchError) as caught:
            load_patch(place)
        assert str(caught.value).startswith(f"{file}: {message}")
        assert "\n" not in str(caught.value)
        if "not finite" in message or ADAPTER in message:
            read_outline(place)  # what the numbers are is not its business
        else:
            with pytest.raises(PatchError) as again:
                read_outline(place)
            assert str(again.value) == str(caught.value)


def test_a_sound_patch_of_another_program_is_accepted(tmp_path: Path) -> None:
    save_file(factors(), tmp_path / "lora.safetensors")  # no header at all
    assert load_patch(tmp_path / "lora.safetensors").info == {}


def test_a_patch_of_a_transformer_says_so_in_its_header_and_is_read_again(tmp_path: Path) -> None:
    made = Patch({k.replace("unet", "transformer"): v for k, v in factors().items()})
    with safe_open(made.save(tmp_path), framework="pt") as store:
        told = json.loads(store.metadata()["lora_adapter_metadata"])
    assert told == {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": ["block.to_k"]}
    assert same(load_patch(tmp_path).tensors, made.tensors)


def test_the_concepts_of_a_loaded_patch_have_all_their_keys(tmp_path: Path) -> None:
    cat = {"erase": "cat", "from": None, "replace_with": None, "synonyms": []}
    alone = {"recipe": {"concepts": [{"erase": "cat"}], "rank": 2}, "note": "mine"}
    Patch(factors(), alone).save(tmp_path / "alone")
    patch = load_patch(tmp_path / "alone")
    assert (patch.concepts, patch.erases) == ([cat], "cat")
    assert patch.info == {"schema": 1, "note": "mine", "recipe": {"concepts": [cat], "rank": 2}}
    part = {"weight": 1, "digest": "0", "recipe": {"concepts": [{"erase": "cat"}]}, "fused": True}
    Patch(factors(), {"stack": [part, part]}).save(tmp_path / "stack")
    stack = load_patch(tmp_path / "stack")
    assert (stack.concepts, stack.erases) == ([cat, cat], "cat")
    assert stack.info["stack"][0] == {**part, "recipe": {"concepts": [cat]}}


@pytest.mark.parametrize("place", ["nowhere", "nowhere.safetensors", "empty"])
def test_where_no_patch_is_one_is_told_what_a_patch_is(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchError) as caught:
        load_patch(place)
    assert str(caught.value) == f"{place}: no patch here; a patch is a folder with {FILE_NAME}, or such a file"


# ---- writing -----------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for place in (path, tmp_path / "a" / "b" / "file"):
        with pytest.raises(OutputError) as caught:
            write_file(place, b"new")
        assert str(caught.value) == f"{place}: cannot write: No space left on device"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_place_that_may_not_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bool:  # as Path.exists under a folder without permission, which root would not notice
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(OutputError, match=r"/file: cannot write: Permission denied$"):
        write_file(tmp_path / "file", b"data")
    with pytest.raises(OutputError, match=r"/file: cannot read: Permission denied$"):
        check_empty(tmp_path / "file")


def test_only_what_holds_nothing_is_empty(tmp_path: Path) -> None:
    check_empty(tmp_path)
    check_empty(tmp_path / "new")
    write_file(tmp_path / "folder" / "file", b"data")
    for name, told in (("folder", "not empty; choose another folder"), ("folder/file", "is a file; name a folder")):
        with pytest.raises(OutputError) as caught:
            check_empty(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {told}"


def make(part: Path) -> None:
    """A folder with something in it, at two levels."""
    (part / "images").mkdir(parents=True)
    (part / "images" / "0.png").write_bytes(b"picture")
    (part / "card").write_bytes(b"card")


@pytest.mark.parametrize("out", [Path(), Path("empty"), Path("new/below")], ids=str)
def test_a_folder_is_whole_and_an_empty_one_is_filled_where_it_is(out: Path) -> None:
    """What we are in, a mount point, and a folder in one that cannot be written to, cannot be replaced."""
    if out == Path("empty"):
        out.mkdir()
    before = out.stat().st_ino if out.exists() else None
    with whole(out) as part:
        make(part)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) == ["card", "images", "images/0.png"]
    assert (out / "images" / "0.png").read_bytes() == b"picture"
    assert before in (None, out.stat().st_ino)


def test_an_empty_folder_that_cannot_be_filled_is_empty_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target == Path("out/images"):  # the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(self, target)

    Path("out").mkdir()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"^out: cannot write: No space left on device$"), whole(Path("out")) as part:
        make(part)
    assert list(Path("out").rglob("*")) == []


def test_a_folder_that_is_filled_by_another_in_the_meantime_is_left_to_it() -> None:
    Path("out").mkdir()

    def late() -> None:
        with whole(Path("out")) as part:
            make(part)
            Path("out/card").write_bytes(b"theirs")

    with pytest.raises(OutputError, match=r"^out: cannot write: Directory not empty$"):
        late()
    assert [p.read_bytes() for p in Path("out").rglob("*")] == [b"theirs"]


def test_files_can_be_read_by_others_and_folders_are_made(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "file", b"data")
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o644
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(OutputError, match=r"plain/file: cannot write: "):
        write_file(tmp_path / "plain" / "file", b"data")
