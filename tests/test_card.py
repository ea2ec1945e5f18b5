"""The card: what the Hub reads of it, what a person reads, and that the code on it runs as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Call, RecipeOf, same
from fakehub import FakeHub
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from safetensors.torch import load_file
from test_hub import hub  # noqa: F401 (a fixture)

from esd_lora.bases import Base, load_base
from esd_lora.card import LICENCES, Pair, draw_pairs, make_card, pairs_of
from esd_lora.compose import stack
from esd_lora.errors import PatchError
from esd_lora.evaluate.rates import rate
from esd_lora.evaluate.scores import AttributeScores, Scores
from esd_lora.hub import files_of, push
from esd_lora.patch import FILE_NAME, Patch, load_patch
from esd_lora.training import train

HALF, ALL = rate([True, False] * 10, [True] * 20), rate([True] * 40)
SCORES = Scores("cat", HALF, ALL, ALL, ALL, {"dog": HALF}, {"dog": 10}, "measure 0123").to_dict()
HAT = AttributeScores("cat", HALF, ALL, None, ALL, ALL, "measure 0123").to_dict()


def of(patch: Patch, name: str | None, revision: str | None = None, **info: Any) -> Patch:
    """The patch as if it had been made for another base."""
    return replace(patch, info={**patch.info, "base": {"name": name, "revision": revision}, **info})


def code_of(card: str) -> str:
    """The code on a card."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def run(code: str, where: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=where, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_its_metadata_is_what_the_hub_expects(patch: Patch, tmp_path: Path) -> None:
    sd = of(patch, "stable-diffusion-v1-5/stable-diffusion-v1-5", scores=[SCORES, HAT])
    data = ModelCard(make_card(sd, repo="alice/cat")).data
    assert (data.base_model, data.base_model_relation) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "diffusers",
        "text-to-image",
        "creativeml-openrail-m",
    )
    tags = {"text-to-image", "lora", "diffusers", "concept-erasure", "esd", "template:diffusion-lora"}
    assert set(data.tags) == tags
    results = {(r.dataset_name, r.metric_name): r for r in data.eval_results}
    gone = results["answer set of cat", "UA: target gone"]
    assert (data.model_name, gone.metric_value, gone.metric_args["n"]) == ("alice/cat", 50.0, 20)
    assert gone.metric_args == {"n": 20, "interval_95": [29.93, 70.07], "base": 100.0, "evaluator": "measure 0123"}
    assert results["answer set of hat from cat", "cat kept"].metric_value == 100.0


def attacked(patch: Patch, folder: Path, *, weight: float = 1.0, base: str = "/home/me/base") -> Path:
    """The folder of a patch, with what an attack on it found."""
    patch.save(folder)
    rows = [{"prompt": "a caat", "seed": i, "seen": "cat" if i < 5 else "dog"} for i in range(20)]
    by_name = {"name": "by name", "role": "floor", "passes": 1, "seconds": 1, "rows": [{**rows[0], "seen": "dog"}]}
    attack = {"name": "paraphrase", "passes": 1, "seconds": 1, "rows": rows, "controls": [by_name]}
    evidence = {"schema": 1, "base": base, "target": {"kind": "object", "label": "cat"}, "evaluator": "emoji, 1"}
    used = {"digest": patch.digest, "weight": weight, "erases": "cat"}
    values = {**evidence, "patches": [used], "settings": {}, "attacks": [attack]}
    (folder / "attacks.json").write_text(json.dumps(values))
    return folder


def test_attacks_that_lie_beside_a_patch_are_on_its_card_and_published(patch: Patch, tmp_path: Path) -> None:
    folder = attacked(of(patch, "/home/me/base"), tmp_path / "cat")
    row = "| paraphrase | 25.0 | 11.2 to 46.9 | 20 | 0.0, by name |"
    assert row in make_card(load_patch(folder), folder)
    files = files_of(folder, repo="alice/cat")
    assert row in files["README.md"].decode()
    published = json.loads(files["attacks.json"])
    assert published["base"] == "base"  # and not where it is on this machine
    assert published["attacks"][0]["rows"][0]["prompt"] == "a caat"
    with pytest.raises(PatchError, match="is on another patch, or on this one at another weight"):
        make_card(patch, attacked(patch, tmp_path / "weaker", weight=0.5))
    (folder / "attacks.json").write_text("{}")
    with pytest.raises(PatchError, match=r"attacks\.json: not what `attack` writes"):
        make_card(patch, folder)


def test_a_person_reads_scores_recipe_limits_and_licence(patch: Patch) -> None:
    card = make_card(replace(patch, info={**patch.info, "scores": [SCORES]}), repo="alice/cat")
    assert "| UA: target gone | 50.0 | 29.9 to 70.1 | 20 | 100.0 |" in card
    assert "| kept, worst three: dog | 50.0 | 29.9 to 70.1 | 20 | 100.0 |" in card
    assert "by evaluator `measure 0123`" in card
    assert "concepts:\n- erase: cat\n" in card
    assert "A loaded patch is a switch" in card
    assert "esd-lora stack alice/cat ANOTHER:0.5" in card
    assert patch.digest in card
    assert "Not measured." in make_card(patch)
    again = "`esd-lora train recipe.yaml` makes it anew. The patch's tensors"
    assert again in card
    without = {k: v for k, v in patch.info.items() if k != "recipe"}
    for other in (replace(patch, info=without), stack([patch])):
        assert "makes it anew" not in make_card(other)
        assert "\nThe patch's tensors have the SHA-256" in make_card(other)
    with pytest.raises(PatchError, match="the scores in the patch's header are not what `eval` writes"):
        make_card(replace(patch, info={**patch.info, "scores": [{"ua": 1}]}))


@pytest.mark.parametrize(
    ("base", "revision", "licence", "named"),
    [
        ("emoji", None, "cc-by-4.0", None),
        ("stabilityai/stable-diffusion-xl-base-1.0", None, "openrail++", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("someone/finetune", "0123abc", "other", "someone/finetune"),
        ("models/finetune", None, "other", None),  # a folder, for no commit is known of it
        ("/home/me/secret-place/finetune", None, "other", None),
        (None, None, "other", None),
    ],
)
def test_licence_and_base_follow_what_is_known(
    base: str | None, revision: str | None, licence: str, named: str | None, patch: Patch
) -> None:
    card = make_card(of(patch, base, revision), repo="alice/cat")
    data = ModelCard(card).data
    assert (data.license, data.get("base_model"), data.get("license_name")) == (
        licence,
        named,
        "as-the-base" if licence == "other" else None,
    )
    link = f"{constants.ENDPOINT}/someone/finetune" if named == "someone/finetune" else None
    assert data.get("license_link") == link
    assert "secret-place" not in card
    recipe = {**patch.info["recipe"], "base": base or "nothing"}
    assert "secret-place" not in make_card(of(patch, base, revision, recipe=recipe), repo="alice/cat")
    assert LICENCES["emoji"] in Path(__file__).parent.parent.joinpath("esd_lora/emoji/base/README.md").read_text()


def test_a_card_tells_how_a_single_file_is_loaded_and_exports_what_can_be(patch: Patch) -> None:
    code = code_of(make_card(of(patch, "models/mine.safetensors")))
    assert 'pipe = StableDiffusionPipeline.from_single_file("mine.safetensors")' in code
    assert "esd-lora export" in make_card(patch)
    renamed = {k.replace("unet.", "transformer."): v for k, v in patch.tensors.items()}
    assert "esd-lora export" not in make_card(replace(patch, tensors=renamed))


def test_a_stack_names_its_parts(patch: Patch) -> None:
    card = make_card(stack([patch, replace(patch, tensors={k: v * 2 for k, v in patch.tensors.items()})], [1.0, 0.5]))
    assert f"| cat | 1.0 | `{patch.digest[:16]}` |" in card
    assert card.count("- erase: cat") == 2


def test_the_gallery_has_pictures_before_and_after(
    base: Base, patch: Patch, patch_folder: Path, tmp_path: Path
) -> None:
    patch.save(tmp_path)
    pairs = draw_pairs(base, patch, tmp_path)
    assert [p.prompt for p in pairs] == ["cat", "dog"]
    assert pairs_of(tmp_path) == pairs
    assert pairs[0] == Pair("cat", 0, "images/0-before.png", "images/0-after.png")
    before, after = (Image.open(tmp_path / n) for n in (pairs[0].before, pairs[0].after))
    assert before.size == after.size == (16, 16)
    assert before.tobytes() != after.tobytes()
    card = make_card(patch, tmp_path)
    assert "<Gallery />" in card
    widget = ModelCard(card).data.widget
    assert widget[0] == {"text": "without the patch: cat", "output": {"url": "images/0-before.png"}}
    assert widget[1] == {"text": "cat", "output": {"url": "images/0-after.png"}}
    assert set(files_of(tmp_path, repo="a/b")) >= {"images/0-before.png", "images/1-after.png", "images/pairs.json"}
    (tmp_path / "images/1-after.png").unlink()
    with pytest.raises(
        PatchError, match=r"names images/1-after.png, which is not there; make it anew with `card --base`"
    ):
        make_card(patch, tmp_path)


@pytest.mark.parametrize(
    "text", ["{", '[{"prompt": "x"}]', '[{"prompt": "", "seed": 0, "before": "../../etc", "after": "x"}]']
)
def test_a_broken_list_of_pictures_is_named(patch: Patch, tmp_path: Path, text: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pairs.json").write_text(text)
    with pytest.raises(PatchError, match=r"pairs\.json: (not what `card --base` writes|names )"):
        make_card(patch, tmp_path)


def test_the_code_on_a_pushed_card_runs_in_plain_diffusers(
    hub: FakeHub,  # noqa: F811
    patch: Patch,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    api = HfApi()
    api.create_repo("alice/tiny")
    commit = api.upload_folder(repo_id="alice/tiny", folder_path=tiny_folder).oid
    of(patch, "alice/tiny", commit).save(tmp_path / "cat")
    push(files_of(tmp_path / "cat", repo="alice/cat"), "alice/cat", private=True)
    code = code_of(hub.files("alice/cat")["README.md"].decode())
    assert 'load_lora_weights("alice/cat"' in code
    there = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    keep = "\nfrom safetensors.torch import save_file\nloaded = pipe.unet.state_dict().items()\n"
    keep += "save_file({k: v for k, v in loaded if 'lora_' in k}, 'loaded.safetensors')\n"
    done = run(code + keep, tmp_path, HF_TOKEN="hf_alice", **there)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (16, 16)
    loaded = {f"unet.{k.replace('.default_0', '')}": v for k, v in load_file(tmp_path / "loaded.safetensors").items()}
    assert same({k: loaded[k] for k in sorted(loaded)}, dict(sorted(patch.tensors.items())))
    assert "hf_alice" not in done.stdout + done.stderr
    denied = run(code, tmp_path, HF_TOKEN="hf_bob", **{**there, "HF_HOME": str(tmp_path / "bob")})
    assert denied.returncode != 0


def test_the_code_on_an_emoji_card_runs_in_the_folder_of_the_patch(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(base="emoji", keys="closed-form", layers="esd-x-strict", objective="closed-form")
    patch = train(recipe, load_base("emoji", device="cpu"), out=tmp_path / "cat")
    (tmp_path / "cat" / "README.md").write_text(make_card(patch, tmp_path / "cat"))
    data = ModelCard.load(tmp_path / "cat" / "README.md").data
    assert (data.license, data.get("base_model")) == ("cc-by-4.0", None)  # emoji is no Hub id
    done = run(code_of((tmp_path / "cat" / "README.md").read_text()), tmp_path / "cat")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "cat" / "picture.png").size == (64, 64)


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_card_writes_it_into_the_folder(call: Call, patch: Patch, tiny_folder: Path) -> None:
    patch.save(Path("cat"))
    done = call("card", "cat", "--base", tiny_folder, "--json")
    assert (done.code, json.loads(done.out)) == (0, {"card": "cat/README.md", "pictures": 4})
    assert ModelCard.load("cat/README.md").data.widget
    refused = call("card", f"cat/{FILE_NAME}")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: cat/{FILE_NAME}: no folder; the card is written into a patch's folder")


def test_a_dry_run_shows_everything_and_asks_nothing(hub: FakeHub, call: Call, patch: Patch) -> None:  # noqa: F811
    patch.save(Path("cat"))
    told = call("push", "cat", "alice/cat", "--dry-run", "--json")
    data = json.loads(told.out)
    assert (told.code, told.err, data["repository"]) == (0, "", "alice/cat")
    assert data["bytes"][FILE_NAME] == len(files_of("cat", repo="alice/cat")[FILE_NAME])
    assert data["card"] == make_card(load_patch("cat"), Path("cat"), repo="alice/cat")
    assert "# cat, erased from" in call("push", "cat", "alice/cat", "--dry-run").out
    for name in ("cat", "alice/cat/dog", "al ice/cat", "", "alice/cat@v2", "alice/cat:0.5"):
        wrong = call("push", "cat", name, "--dry-run")
        message = f"error: {name}: a repository is called user/name; a branch is given by --revision\n"
        assert (wrong.code, wrong.err) == (2, message)
    for command, name, right in (
        ("pull", "cat", "a repository is called user/name"),
        ("pull", "alice/cat@", "the revision after @ is missing"),
        ("show", "alice/cat@", "the revision after @ is missing"),
    ):
        wrong = call(command, name, *(["--out", "out"] if command == "pull" else []))
        assert (wrong.code, wrong.err) == (2, f"error: {name}: {right}\n")
    assert not hub.requests


def test_push_pull_and_use_on_the_command_line(
    hub: FakeHub,  # noqa: F811
    call: Call,
    patch: Patch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch.save(Path("cat"))
    pushed = call("push", "cat", "alice/cat", "--collection", "Animals", "--json")
    assert (pushed.code, pushed.err) == (0, "")
    assert json.loads(pushed.out)["url"] == f"{hub.url}/alice/cat"
    assert hub.repos["alice/cat"].messages[-1] == "Upload the patch that erases cat"
    assert call("pull", "alice/cat@main", "--out", "got").code == 0
    assert load_patch("got").digest == patch.digest
    assert "hf_alice" not in "".join(p.read_text() for p in Path("got").glob("*.[my]*"))
    commit = json.loads(pushed.out)["commit"]
    both = call("stack", "alice/cat", f"alice/cat@{commit}:0.5", "--out", "both", "--json")
    assert both.code == 0
    assert [p["weight"] for p in load_patch("both").info["stack"]] == [1.0, 0.5]
    assert json.loads(call("show", "alice/cat", "--json").out)["erases"] == ["cat"]
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    wrong = call("push", "cat", "alice/cat")
    assert wrong.code == 2
    assert wrong.err == (
        "error: alice/cat: the Hub refuses the token, or there is none; `hf auth login`, or set HF_TOKEN\n"
    )
    hub.close()
    down = call("push", "cat", "alice/cat")
    assert down.code == 1
    assert down.err.count("\n") == 1
    assert "hf_secret" not in down.err + down.out
