"""Bases: the teacher is the frozen model bit for bit, adapters come and go without a trace, and errors say what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import same, wake, weights_of
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import errors as hub_errors
from tiny import TINY, save_tiny, tiny_pipeline
from torch import Tensor

from esd_lora.bases import Base, load_base, local_file, pick_device, quick_dtype
from esd_lora.bases.base import Condition, fingerprint_of
from esd_lora.bases.facts import facts_of
from esd_lora.bases.stable_diffusion import StableDiffusionBase
from esd_lora.errors import BaseModelError, PatchError, RecipeError
from esd_lora.pictures import generate


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def answer(base: Base) -> Tensor:
    """The denoiser's prediction for some inputs."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(base.dtype)
    return base.predict(x, torch.tensor([10, 900]), base.encode(["a cat", ""]))


# ---- teacher and student -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["esd-x", "full"])
def test_the_teacher_is_the_base_bit_for_bit_under_strong_adapters(base: Base, layers: str) -> None:
    bare = answer(base)
    base.add_adapter(layers=layers, rank=4)  # type: ignore[arg-type]
    wake(base)
    with base.teacher():
        taught = answer(base)
    assert torch.equal(taught, bare)
    assert not taught.requires_grad
    assert (answer(base) - bare).abs().max() > 0.1


def test_after_the_teacher_the_student_is_as_before_even_if_the_lesson_failed(base: Base) -> None:
    base.add_adapter(layers="esd-x", rank=4)
    wake(base)
    frozen = base.adapter_parameters()[0].requires_grad_(False)
    before, trained = answer(base), [id(p) for p in base.adapter_parameters()]
    with pytest.raises(ZeroDivisionError), base.teacher():
        _ = 1 / 0
    assert torch.equal(answer(base), before)
    assert [id(p) for p in base.adapter_parameters()] == trained
    assert not frozen.requires_grad
    assert torch.is_grad_enabled()


def test_a_teacher_inside_a_teacher_stays_one(base: Base) -> None:
    bare = answer(base)
    base.add_adapter(layers="esd-x", rank=4)
    wake(base)
    with base.teacher():
        with base.teacher():
            pass
        assert torch.equal(answer(base), bare)


def test_an_untrained_adapter_changes_no_picture(base: Base) -> None:
    bare = generate(base, ["a cat", ""], [0, 1], steps=3)
    base.add_adapter(layers="full", rank=4)
    null = generate(base, ["a cat", ""], [0, 1], steps=3)
    assert [p.tobytes() for p in null] == [p.tobytes() for p in bare]
    wake(base)  # the pictures do listen to the adapters
    assert [p.tobytes() for p in generate(base, ["a cat", ""], [0, 1], steps=3)] != [p.tobytes() for p in bare]


def test_only_adapters_are_trained(base: Base) -> None:
    assert not any(p.requires_grad for part in (base.pipe.unet, base.pipe.vae) for p in part.parameters())
    assert not any(m.training for m in (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder))
    base.add_adapter(layers="esd-x", rank=4)
    trained = {n for n, p in base.denoiser.named_parameters() if p.requires_grad}
    assert len(trained) == 32
    assert all("lora_A" in n or "lora_B" in n for n in trained)


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "modules", "kinds"),
    [  # four transformer blocks: down, up twice, middle
        ("esd-x", 16, {"attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"}),
        ("esd-x-strict", 8, {"attn2.to_k", "attn2.to_v"}),
        ("esd-u", 16, {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}),
        ("full", 32, {f"attn{i}.to_{k}" for i in (1, 2) for k in ("q", "k", "v", "out.0")}),
    ],
)
def test_presets_adapt_the_layers_that_they_name(base: Base, layers: str, modules: int, kinds: set[str]) -> None:
    matched = base.matched(layers)  # type: ignore[arg-type]
    assert len(matched) == modules
    assert {re.search(r"attn\d\..*", m)[0] for m in matched} == kinds  # type: ignore[index]
    base.add_adapter(layers=layers, rank=3)  # type: ignore[arg-type]
    assert base.matched(layers) == matched  # type: ignore[arg-type]  # adapters do not change what a preset names
    names = {f"unet.{m}.lora_{k}.weight" for m in matched for k in "AB"}
    state = base.adapter_state()
    assert set(state) == names
    assert all(v.shape[0 if ".lora_A." in k else 1] == 3 for k, v in state.items())


def test_a_rank_that_no_layer_can_use_is_refused_and_leaves_the_base_bare(base: Base) -> None:
    before = weights_of(base)
    with pytest.raises(RecipeError) as caught:
        base.add_adapter(layers="esd-x", rank=33)
    smallest = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert str(caught.value) == f"rank: must be at most 32, the size of {smallest}, got 33"
    assert same(weights_of(base), before)
    base.add_adapter(layers="esd-x", rank=32)


def test_layers_that_are_not_there_are_refused_with_what_there_is(base: Base) -> None:
    bare = StableDiffusionBase(tiny_pipeline(cross_attention=False), name="plain")
    with pytest.raises(BaseModelError) as caught:
        bare.add_adapter(layers="esd-x", rank=2)
    assert str(caught.value) == ("plain: layers esd-x match nothing in the denoiser; it has no attention layers at all")
    base.layers = {"esd-x": r".*\.attn9\..*"}  # type: ignore[misc]
    with pytest.raises(BaseModelError, match=r"match nothing in the denoiser; it has down_blocks.*attn1\.to_q, .* …$"):
        base.matched("esd-x")


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_adapters_of_a_half_precision_base_are_float32(tiny_folder: Path, dtype: str, expected: torch.dtype) -> None:
    base = load_base(str(tiny_folder), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    assert base.dtype == expected
    base.add_adapter(layers="esd-x", rank=2)
    assert {p.dtype for p in base.adapter_parameters()} == {torch.float32}
    assert base.dtype == expected  # of the base, not of its adapters
    assert {p.dtype for n, p in base.denoiser.named_parameters() if "lora_" not in n} == {expected}


def test_removing_adapters_leaves_no_trace(base: Base) -> None:
    before, bare = weights_of(base), answer(base)
    for seed in (1, 2):  # twice, for a base is used again
        base.add_adapter(layers="full", rank=4)
        wake(base, seed)
        base.remove_adapters()
        assert same(weights_of(base), before)
        assert torch.equal(answer(base), bare)
    base.remove_adapters()  # nothing to remove


def test_an_adapters_state_can_be_given_back(base: Base) -> None:
    base.add_adapter(layers="esd-x", rank=4)
    wake(base)
    state, predicted = base.adapter_state(), answer(base)
    wake(base, seed=2)
    assert not torch.equal(next(iter(state.values())), next(iter(base.adapter_state().values())))
    base.load_adapter_state(state)
    assert same(base.adapter_state(), state)
    assert torch.equal(answer(base), predicted)
    with pytest.raises(PatchError, match=r"has no layer for nowhere"):
        base.load_adapter_state({"unet.nowhere.lora_A.weight": torch.zeros(4, 4)})


# ---- prompts and noise -------------------------------------------------------------------------------------------


def test_conditions_are_those_of_the_pipeline_and_can_be_indexed(base: Base) -> None:
    found = base.encode(["", "a cat"])
    for row, prompt in enumerate(["", "a cat"]):
        expected, _ = base.pipe.encode_prompt(prompt, "cpu", 1, False)
        alone = found[row : row + 1].tensors["encoder_hidden_states"]
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-6)  # batches of another size
    assert len(found) == 2
    again = Condition.cat([found[1:], found[:1]])
    assert torch.equal(again[torch.tensor([1, 0])].tensors["encoder_hidden_states"], *found.tensors.values())
    assert found[:1].expand(5).tensors["encoder_hidden_states"].shape == (5, 16, 32)


def test_noise_follows_from_the_seed_alone(base: Base) -> None:
    noise = base.noise([5, 2**62, 5])
    assert noise.shape == (3, 4, 8, 8)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(base.noise([2**62])[0], noise[1])
    assert not torch.equal(noise[0], noise[1])
    assert base.noise([0], resolution=32).shape == (1, 4, 16, 16)


# ---- loading -----------------------------------------------------------------------------------------------------


def test_fingerprint_is_that_of_the_weights_in_any_precision(tiny_folder: Path) -> None:
    bases = {d: load_base(str(tiny_folder), device="cpu", dtype=d) for d in ("fp32", "fp16", "bf16")}  # type: ignore[arg-type]
    assert len({b.fingerprint for b in bases.values()}) == 1
    base = bases["fp32"]
    base.add_adapter(layers="full", rank=2)
    assert fingerprint_of(base.denoiser) == base.fingerprint  # adapters do not count
    weight = base.denoiser.get_parameter("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.base_layer.weight")
    weight.data[0, 0] += 0.01
    assert fingerprint_of(base.denoiser) != base.fingerprint


def test_the_fingerprint_is_of_what_a_bf16_number_is_in_float16_with_or_without_float32_between() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    assert torch.equal(numbers.half().view(torch.int16), numbers.float().half().view(torch.int16))


@pytest.mark.parametrize("family", TINY)
def test_what_is_stored_in_bf16_is_loaded_so_with_the_same_fingerprint(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TINY[family]().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded: list[torch.dtype] = []

    def reckoned(denoiser: torch.nn.Module) -> str:
        loaded.append(next(denoiser.parameters()).dtype)
        return fingerprint_of(denoiser)

    monkeypatch.setattr("esd_lora.bases.fingerprint_of", reckoned)
    half, full = (load_base(str(tmp_path), device="cpu", dtype=d) for d in ("bf16", "fp32"))  # type: ignore[arg-type]
    assert loaded == [torch.bfloat16, torch.float32]
    assert half.fingerprint == full.fingerprint
    full.denoiser.to(torch.bfloat16)
    for of in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        assert same(dict(of(half.denoiser)), dict(of(full.denoiser)))


def test_a_download_is_asked_for_its_precision_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "snapshots" / "c0ffee"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, *, revision: str(folder / file))
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda name, **how: folder)
    for precision in (torch.float32, torch.bfloat16):
        tiny_pipeline().to(precision).save_pretrained(folder)
        with monkeypatch.context() as once:
            once.setattr("esd_lora.bases.fingerprint_of", lambda d: str(next(d.parameters()).dtype))
            assert load_base("someone/tiny", device="cpu", dtype="bf16").fingerprint == str(precision)


def test_a_base_loaded_from_disk_is_the_pipeline_that_was_saved(base: Base, tiny_folder: Path) -> None:
    saved = tiny_pipeline()
    assert same(base.denoiser.state_dict(), saved.unet.state_dict())
    assert (base.name, base.device.type, base.dtype) == (str(tiny_folder), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "./nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        ("nowhere", "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        ("/a/b", "/a/b: neither `emoji`, nor a folder or file, nor a Hub id"),
        ("some one/a:b", "some one/a:b: neither `emoji`, nor a folder or file, nor a Hub id"),
        (
            "someone/missing",
            "someone/missing: no such folder; the Hub cannot be reached, and model_index.json is not in the cache",
        ),
        ("empty", "empty: no model_index.json in this folder, so it is not a diffusers pipeline"),
        (
            "model.ckpt",
            "model.ckpt: .ckpt files are pickles, which can run code as they are opened; use the .safetensors file that most "
            "models have beside it, or convert it on a machine that you can lose",
        ),
    ],
)
def test_a_base_that_is_not_there_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    with pytest.raises(BaseModelError) as caught:
        load_base(name, device="cpu")
    assert str(caught.value) == message


@pytest.mark.parametrize("asked", [load_base, facts_of])
def test_a_revision_of_what_has_none_is_refused(asked: Callable[..., object], tiny_folder: Path) -> None:
    for name in ("emoji", str(tiny_folder)):
        with pytest.raises(
            BaseModelError, match=r": has no revisions, as a base on the Hub has; leave revision v2 out$"
        ):
            asked(name, revision="v2")


@pytest.mark.parametrize("kind", [hub_errors.HTTPError, RuntimeError])  # the latter is hf_xet's
def test_a_connection_that_breaks_off_is_one_line(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise kind("407 Proxy Authentication Required")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(BaseModelError, match=r"^a/b: no such folder, and the Hub cannot be reached: 407 Proxy"):
        load_base("a/b", device="cpu")


def test_a_cache_that_cannot_be_written_to_is_not_taken_for_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/cache/blobs")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(BaseModelError, match=r"^a/b: cannot write to /cache/blobs: Permission denied$"):
        load_base("a/b", device="cpu")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "SanaPipeline"}, "SanaPipeline is not supported; supported: StableDiffusionPipeline"),
        ({"unet": []}, "no pipeline class is not supported; supported: StableDiffusionPipeline"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(index: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match=rf"^{re.escape(f'{tmp_path}: {message}')}"):
        load_base(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", b"{", "cannot read model_index.json: not JSON: "),
        ("model_index.json", b"[]", "cannot read model_index.json: not a JSON object"),
        ("model_index.json", b"[" * 10**5, "cannot read model_index.json: not JSON: "),  # too deep to be read
        ("unet/config.json", b"{", "cannot load the pipeline: "),
        ("unet/config.json", None, "cannot load the pipeline: "),
        ("unet/diffusion_pytorch_model.safetensors", b"cut off", "cannot load the pipeline: "),
        ("unet/diffusion_pytorch_model.safetensors", None, "cannot load the pipeline: "),
        ("text_encoder/model.safetensors", b"cut off", "cannot load the pipeline: "),
        ("text_encoder/model.safetensors", None, "cannot load the pipeline: "),
        ("text_encoder/config.json", b"{}", "cannot load the pipeline: "),
    ],
)
def test_a_broken_pipeline_is_named_in_one_line(copied: Path, file: str, content: bytes | None, message: str) -> None:
    if content is None:
        (copied / file).unlink()
    else:
        (copied / file).write_bytes(content)
    with pytest.raises(BaseModelError) as caught:
        load_base(str(copied), device="cpu")
    assert str(caught.value).startswith(f"{copied}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("model_index.json", "scheduler", [], "a wrong value in its configs (IndexError: list index out of range)"),
        ("text_encoder/config.json", "hidden_act", "sigh", "a wrong value in its configs (KeyError: 'sigh')"),
        ("unet/config.json", "norm_num_groups", 0, "a wrong value in its configs (ZeroDivisionError: "),
    ],
)
def test_a_config_with_a_wrong_value_is_named_in_one_line(
    copied: Path, file: str, key: str, value: object, message: str
) -> None:
    config = copied / file
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(BaseModelError) as caught:
        load_base(str(copied), device="cpu")
    assert str(caught.value).startswith(f"{copied}: cannot load the pipeline: {message}")
    assert "\n" not in str(caught.value)


def test_a_library_that_a_part_needs_is_named_with_how_to_install_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise ImportError(
            "\nIt requires the scipy library. You can install it with pip: `pip install\nscipy`\n"
        )  # as it is broken

    monkeypatch.setattr(DDIMScheduler, "from_pretrained", lacking)
    with pytest.raises(BaseModelError) as caught:
        load_base(str(copied), device="cpu")
    told = "It requires the scipy library. You can install it with pip: `pip install scipy`"
    assert str(caught.value) == f"{copied}: cannot load the pipeline: {told}"


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        (
            "scheduler",
            ["diffusers", "NoSuchScheduler"],
            "its scheduler is a NoSuchScheduler, which diffusers does not have",
        ),
        ("scheduler", None, "model_index.json does not say what its scheduler is"),
        ("text_encoder", ["transformers", "NoSuch"], "its text_encoder is a NoSuch, which transformers does not have"),
    ],
)
def test_the_classes_of_a_pipelines_parts_are_those_of_its_index(
    copied: Path, part: str, entry: object, message: str
) -> None:
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text("{}")  # diffusers does without a class here, too
    assert facts_of(str(copied)).scheduler == {"_class_name": "DDIMScheduler"}
    config.write_text('{"_class_name": "NoSuchScheduler"}')
    assert facts_of(str(copied)).scheduler["_class_name"] == "DDIMScheduler"
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: entry}))
    with pytest.raises(BaseModelError) as caught:
        facts_of(str(copied))
    assert str(caught.value) == f"{copied}: {message}"


def test_a_config_that_is_no_object_is_named(copied: Path) -> None:
    (copied / "unet" / "config.json").write_text("[]")
    with pytest.raises(BaseModelError, match=r": cannot read unet/config\.json: not a JSON object$"):
        facts_of(str(copied))


def test_a_folder_has_no_revision_and_the_hubs_cache_has(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "snapshots" / "sd15"))
    assert load_base(str(folder), device="cpu").revision is None
    commit = Path(shutil.copytree(tiny_folder, tmp_path / "models--someone--tiny" / "snapshots" / "c0ffee"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, *, revision: str(commit / file))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **how: tiny_pipeline())
    assert load_base("someone/tiny", revision="main", device="cpu").revision == "c0ffee"


# ---- files beside the pipeline -----------------------------------------------------------------------------------


def test_a_file_of_a_folder_is_there_or_not(base: Base) -> None:
    assert local_file(base, "esd_lora.json") is None
    assert local_file(base, "model_index.json") == Path(base.name) / "model_index.json"


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_of_a_hub_id_is_missing_where_the_hub_or_else_its_cache_says_so(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    base.name, base.revision = "someone/tiny", "c0ffee"
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if cached:
        (snapshot / "model_index.json").write_text("{}")
    remote = hub_errors.RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
    offline = hub_errors.LocalEntryNotFoundError("offline")
    for error, known in ((remote, True), (offline, cached), (ConnectionError("no route"), False)):

        def download(name: str, file: str, *, revision: str, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        if known:
            assert local_file(base, "esd_lora.json") is None
        else:
            with pytest.raises(BaseModelError, match=r"^someone/tiny: no such folder"):
                local_file(base, "esd_lora.json")


def test_the_device_is_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert pick_device(None).type == expected
        assert pick_device("cpu").type == "cpu"


def test_devices_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for name, message in [
        ("cuda:7", "no device cuda:7 here; this machine has cuda, cpu"),
        ("mps", "no device mps here; this machine has cuda, cpu"),
        ("gpu", "unknown device gpu; this machine has cuda, cpu"),
        ("", "unknown device ; this machine has cuda, cpu"),
    ]:
        with pytest.raises(BaseModelError) as caught:
            load_base(str(tiny_folder), device=name)
        assert str(caught.value) == message


def test_v_prediction_is_kept(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "v", prediction_type="v_prediction")
    assert load_base(str(folder), device="cpu").scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_the_quick_precision_only_where_it_is_computed(
    native: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    expected = "bf16" if native else "fp32"
    assert (quick_dtype("cpu"), quick_dtype("cuda"), quick_dtype()) == (expected, expected, expected)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_base(str(tiny_folder), device="cpu", dtype="bf16")
    slow = f"{tiny_folder}: this CPU does not compute in bf16, which takes many times as long as fp32"
    assert [str(w.message) for w in told if "bf16" in str(w.message)] == ([] if native else [slow])
