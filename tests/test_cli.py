"""The command line: what it prints, what it leaves, and one line and an exit code for whatever is wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call, RecipeOf, Result
from PIL import Image
from test_processes import launch
from tiny import save_tiny, tiny_pipeline
from torch import Tensor

import esd_lora
from esd_lora import bases, cli, training
from esd_lora.errors import TrainingError
from esd_lora.patch import FILE_NAME, Patch, load_patch
from esd_lora.recipe import load_recipe, make_recipe

SHORT = [
    *("--set", "steps=3", "--set", "trajectories=1", "--set", "trajectory_steps=2", "--set", "preserve=[dog]"),
    *("--set", "batch_size=2"),
]


# ---- what it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["recipes"], ["--version"], ["train", "no-such-recipe"]], ids=str
)
def test_what_needs_no_model_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['esd-lora', *{arguments}]\nfrom esd_lora.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(3 if {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "esd_lora", "recipes", "nothing"], check=False, capture_output=True, text=True
    )
    told = "error: nothing: no such file and no shipped recipe; `esd-lora recipes` lists them\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


@pytest.mark.parametrize("json", [(), ("--json",)], ids=str)
def test_show_imports_no_torch(patch_folder: Path, json: tuple[str, ...]) -> None:
    code = (
        f"import sys; sys.argv = ['esd-lora', 'show', {str(patch_folder)!r}, *{json}]\nfrom esd_lora.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "sys.exit(3 if {'torch', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, "cat" in done.stdout) == (0, True), done.stderr


def test_importing_the_package_is_free_and_its_names_are_there() -> None:
    assert esd_lora.__all__ == sorted(esd_lora.__all__)
    assert all(getattr(esd_lora, name).__name__ == name for name in esd_lora.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'erase'"):
        _ = esd_lora.erase


def test_version_is_the_packages(call: Call) -> None:
    result = call("--version")
    assert (result.code, result.out) == (0, f"esd_lora {esd_lora.__version__}\n")
    alone = call()
    assert "Usage" in alone.out + alone.err


def test_train_leaves_patch_curve_and_grid_and_prints_json(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    result = call(
        *("train", "--base", tiny_folder, "--erase", "hat", "--from", "cowboy", *SHORT),
        *("--set", "sample_every=2", "--seed", 7, "--out", "run", "--json"),
    )
    assert (result.code, result.err) == (0, "")
    info = json.loads(result.out)
    assert info["patch"] == "run"
    assert info["erases"] == ["hat from cowboy"]
    assert (info["base"], info["layers"], info["modules"], info["rank"]) == (str(tiny_folder), "esd-x", 16, [4])
    assert info["parameters"] == 16 * 4 * (32 + 32)
    names = {p.name for p in Path("run").iterdir()}
    assert names == {
        *(FILE_NAME, "recipe.yaml", "loss.csv", "run.yaml"),
        *("loss.png", "grid.png", "sample-00002.png"),
    }
    recipe = load_recipe("run/recipe.yaml")
    assert (recipe.steps, recipe.seed, recipe.preserve) == (3, 7, ("dog",))
    assert load_patch("run").info["recipe"] == recipe.to_dict()
    with Image.open("run/grid.png") as grid:
        assert grid.height > 2 * 128  # before and after
    with Image.open("run/sample-00002.png") as sample:
        assert 128 < sample.height < 2 * 128  # as it is now


def test_train_takes_a_recipe_and_options_win(call: Call, tiny_folder: Path) -> None:
    Path("cat.yaml").write_text(
        f"base: {tiny_folder}\nconcepts: cat\nsteps: 2\ntrajectories: 1\ntrajectory_steps: 2\npreserve: [fox]\nrank: 2\n"
    )
    result = call("train", "cat.yaml", "--set", "rank=3", "--erase", "dog", "--replace-with", "a bird", "-q")
    assert (result.code, result.err) == (0, "")
    assert load_patch("runs/dog").info["recipe"]["concepts"] == [
        {"erase": "dog", "from": None, "replace_with": "a bird", "synonyms": []}
    ]
    assert set(load_patch("runs/dog").ranks.values()) == {3}
    again = call("train", "cat.yaml", "--set", "rank=3", "--erase", "dog", "--replace-with", "a bird", "--resume", "-q")
    assert (again.code, again.err) == (0, "")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that are loaded from now on."""
    honest, names = bases.load_base, []

    def load(name: str, **how: Any) -> Any:
        names.append(name)
        return honest(name, **how)

    monkeypatch.setattr(bases, "load_base", load)
    return names


def written(name: str, tiny_folder: Path, **values: object) -> str:
    """A recipe file that trains in no time."""
    short = {"base": str(tiny_folder), "steps": 2, "trajectories": 1, "trajectory_steps": 2, "preserve": ["fox"]}
    Path(name).write_text(json.dumps({**short, **values}))  # JSON is YAML
    return name


def test_several_recipes_are_trained_with_one_base_as_each_alone(
    call: Call, tiny_folder: Path, loads: list[str]
) -> None:
    names = [written(f"{c}.yaml", tiny_folder, concepts=c, rank=r) for c, r in (("cat", 2), ("dog", 3), ("bird", 1))]
    result = call("train", *names, "--out", "all", "--set", "steps=3", "--json")
    assert (result.code, result.err, loads) == (0, "", [str(tiny_folder)])
    told = json.loads(result.out)
    assert [(k, v["erases"], v["rank"]) for k, v in told.items()] == [
        ("all/cat", ["cat"], [2]),
        ("all/dog", ["dog"], [3]),
        ("all/bird", ["bird"], [1]),
    ]
    call("train", "dog.yaml", "--out", "alone", "--set", "steps=3")
    for name in (FILE_NAME, "loss.csv", "grid.png", "recipe.yaml"):
        assert Path("all/dog", name).read_bytes() == Path("alone", name).read_bytes(), name
    before = {p: p.stat().st_mtime_ns for p in Path("all").rglob("*.*")}
    again = call("train", *names, "--out", "all", "--set", "steps=3", "--json", "--resume")
    assert (again.code, json.loads(again.out)) == (0, told)
    assert {p: p.stat().st_mtime_ns for p in Path("all").rglob("*.*")} == before  # done, and not done again


def test_a_recipe_that_fails_does_not_lose_the_others(call: Call, tiny_folder: Path) -> None:
    first = written("first.yaml", tiny_folder, concepts="cat", rank=33)  # only the base knows that it is too much
    second = written("second.yaml", tiny_folder, concepts="dog", base="nowhere")
    third = written("third.yaml", tiny_folder, concepts="bird")
    result = call("train", first, second, third, "--json")
    assert (result.code, list(json.loads(result.out))) == (2, ["runs/third"])
    lines = result.err.splitlines()
    assert lines[0].startswith("error: runs/first: rank: must be at most 32, ")
    assert lines[1].startswith("error: runs/second: nowhere: neither `emoji`, nor a folder")
    assert lines[2:] == ["error: 2 of 3 recipes failed: runs/first, runs/second"]
    assert [p.name for p in Path("runs").iterdir()] == ["third"]


def test_a_failure_among_mistakes_is_a_failure(call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [written(f"{c}.yaml", tiny_folder, concepts=c, rank=33) for c in ("cat", "dog")]
    monkeypatch.setattr(training, "finished_run", lambda out, *_, **__: broken() if out.name == "dog" else None)

    def broken() -> None:
        raise TrainingError("the loss was nan")

    assert call("train", *names).code == 1


def test_what_a_failed_run_had_in_memory_is_free_for_the_next(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [written(f"{c}.yaml", tiny_folder, concepts=c) for c in ("cat", "dog")]
    runs: list[weakref.ref[Tensor]] = []

    def full(*_: object, **__: object) -> None:
        assert all(run() is None for run in runs)
        activations = torch.zeros(8)
        runs.append(weakref.ref(activations))
        out_of_memory()

    monkeypatch.setattr(training, "_loop", full)
    result = call("train", *names)
    assert (result.code, len(runs)) == (1, 2)
    assert result.err.splitlines()[-1] == "error: 2 of 2 recipes failed: runs/cat, runs/dog"


def test_several_recipes_are_all_read_before_anything_is_trained(
    call: Call, tiny_folder: Path, loads: list[str]
) -> None:
    good = written("cat.yaml", tiny_folder, concepts="cat")
    Path("below").mkdir()
    twin = written("below/cat.yaml", tiny_folder, concepts="dog")
    bad = written("bad.yaml", tiny_folder, concepts="dog", rnak=3)
    result = call("train", good, bad, twin, "nothing")
    assert (result.code, result.out, loads) == (2, "", [])
    assert result.err.splitlines() == [
        "error: bad.yaml: rnak: unknown key; did you mean rank?",
        "below/cat.yaml: another recipe has runs/cat already; train it by itself, with --out",
        "nothing: no such file and no shipped recipe; `esd-lora recipes` lists them",
    ]
    one_error(call("train", good, bad, "--erase", "dog"), "--erase would be the concept of all these recipes; ")
    assert not Path("runs").exists()


def test_generate_makes_the_same_noise_with_and_without_a_patch(
    call: Call, tiny_folder: Path, patch_folder: Path
) -> None:
    common = ["generate", "--base", tiny_folder, "--prompt", "cat", "--prompt", "dog", "-n", 2, "--steps", 3]
    without = call(*common, "--out", "without", "--json", "--seed", 5)
    assert (without.code, without.err) == (0, "")
    rows = json.loads(without.out)["pictures"]
    assert [(r["prompt"], r["seed"]) for r in rows] == [("cat", 5), ("cat", 6), ("dog", 5), ("dog", 6)]
    assert sorted(p.name for p in Path("without").iterdir()) == [*(f"{k:04}.png" for k in range(4)), "grid.png"]
    call(*common, "--out", "zero", "--seed", 5, "--patch", f"{patch_folder}:0")
    call(*common, "--out", "with", "--seed", 5, "--patch", patch_folder)
    first = {name: Path(name, "0000.png").read_bytes() for name in ("without", "zero", "with")}
    assert first["zero"] == first["without"] != first["with"]
    one_error(call(*common, "--out", "with"), "with/0000.png: exists; choose another --out")
    assert Path("with", "0000.png").read_bytes() == first["with"]
    twice = call(*common, "-n", 1, "--out", "twice", "--patch", f"{patch_folder}:0", "--patch", f"{patch_folder}:0")
    assert (twice.code, "".join(twice.err.split())) == (0, f"warning:--patch{patch_folder}:0:isgivenmorethanonce")


def test_show_tells_what_a_patch_is(call: Call, patch_folder: Path) -> None:
    told = call("show", patch_folder)
    assert (told.code, told.err) == (0, "")
    lines = dict(line.strip().split(maxsplit=1) for line in told.out.splitlines())
    assert (lines["erases"], lines["layers"], lines["rank"], lines["modules"]) == ("cat", "esd-x", "2", "16")
    info = json.loads(call("show", patch_folder, "--json").out)
    assert info["recipe"]["concepts"][0]["erase"] == "cat"
    assert info["forward_passes"] == 90


def test_what_is_counted_of_a_patch_wins_over_what_its_header_claims(call: Call, patch: Patch) -> None:
    claimed = {"rank": [64], "parameters": 5, "erases": ["dog"], "scores": [{"file": 1}]}
    replace(patch, info={**patch.info, **claimed}).save("claiming")
    info = json.loads(call("show", "claiming", "--json").out)
    assert (info["rank"], info["parameters"], info["erases"]) == ([2], patch.parameters, ["cat"])
    assert call("show", "claiming").code == 0


def test_a_run_whose_folder_is_called_like_a_file_leaves_its_patch_there(call: Call, tiny_folder: Path) -> None:
    told = call("train", "--base", tiny_folder, "--erase", "cat", *SHORT, "--out", "cat.safetensors", "--quiet")
    assert (told.code, told.err) == (0, "")
    assert load_patch("cat.safetensors").erases == "cat"


def out_of_memory(*_: object, **__: object) -> None:
    """What a device that is full answers."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_a_picture_that_there_is_no_memory_for_is_left_out_and_the_patch_is_there(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_lora.report.draw_run", out_of_memory)
    told = call(
        "train", "--base", tiny_folder, "--erase", "cat", *SHORT, "--set", "sample_every=3", "--out", "run", "--quiet"
    )
    assert told.code == 0
    assert "left out a picture, for which the device has too little memory" in told.err
    assert load_patch("run").erases == "cat"


def test_plan_counts_what_training_will_do(call: Call, tiny_folder: Path, patch: Patch) -> None:
    Path("recipe.yaml").write_text(json.dumps(patch.info["recipe"]))  # JSON is YAML
    plan = call("plan", "recipe.yaml", "--json")
    assert (plan.code, plan.err) == (0, "")
    assert json.loads(plan.out)["passes"]["total"] == patch.info["cost"]["forward_passes"]
    assert json.loads(plan.out)["modules"] == 16
    assert "modules" in call("plan", "--base", tiny_folder).out
    assert not Path("runs").exists()


def test_recipes_are_listed_and_printed(call: Call) -> None:
    heads = json.loads(call("recipes", "--json").out)
    assert len(heads) >= 13
    assert all(heads.values())
    assert list(heads) == sorted(heads)
    name = next(iter(heads))
    printed = call("recipes", name)
    assert printed.out == (cli.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert heads[name] in printed.out.splitlines()[0]
    assert "base" in json.loads(call("recipes", name, "--json").out)
    Path("latin.yaml").write_bytes("concepts: Käfer".encode("latin-1"))
    one_error(call("recipes", "latin.yaml"), "latin.yaml: cannot read the recipe: not a text file")
    Path("odd.yaml").write_text("base: emoji\nconcepts: cat\nrnak: 3")
    one_error(call("recipes", "odd.yaml"), "odd.yaml: rnak: unknown key; did you mean rank?")
    one_error(call("recipes", ""), ": no such file and no shipped recipe; `esd-lora recipes` lists them")


# ---- several patches -------------------------------------------------------------------------------------------------


def test_stack_writes_one_patch_with_its_error_where_compressed(call: Call, patch_folder: Path, tmp_path: Path) -> None:
    result = call("stack", patch_folder, f"{patch_folder}:0.5", "--out", tmp_path / "both", "--json")
    assert result.code == 0
    assert "cat is erased by more than one of the patches" in result.err
    assert json.loads(result.out)["rank"] == [4]
    assert [p["weight"] for p in load_patch(tmp_path / "both").info["stack"]] == [1.0, 0.5]
    result = call("stack", patch_folder, "--out", tmp_path / "small", "--rank", 1, "--json")
    assert json.loads(result.out)["rank"] == [1]
    assert 0 < json.loads(result.out)["relative_error"]["worst"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{patch}", "--rank", "0"], "rank: a patch can be compressed to a rank of 1 or more, got 0"),
        (["{patch}:0"], "no patch is left: name at least one with a weight other than 0"),
        (["{patch}:0.5:0.5"], "{patch}:0.5:0.5: has two weights; write one, as in {patch}:0.5"),
        ([""], "the name of a patch must not be empty"),
        ([":0.5"], "the name of a patch must not be empty"),
        (["{patch}:nan"], "{patch}:nan: the weight after the colon must be a number, got 'nan'"),
        (
            ["nowhere"],
            "nowhere: no patch here; a patch is a folder with pytorch_lora_weights.safetensors, or such a file",
        ),
    ],
    ids=str,
)
def test_what_stack_cannot_do_is_one_line(
    call: Call, patch_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = call("stack", *(o.format(patch=patch_folder) for o in options), "--out", tmp_path / "out")
    assert (result.code, result.err.strip()) == (2, "error: " + message.format(patch=patch_folder))
    assert not (tmp_path / "out").exists()


def test_eval_of_a_file_prints_scores_and_writes_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe({"base": "emoji", "concepts": "cat", "keys": "closed-form"})
    training.train(recipe, bases.load_base("emoji"), out=tmp_path / "cat")
    before = {p: p.read_bytes() for p in (tmp_path / "cat").iterdir()}
    monkeypatch.setattr("esd_lora.report.draw", lambda base, cells, *_, **__: [Image.new("RGB", (64, 64))] * len(cells))
    result = call("eval", "--base", "emoji", "--patch", tmp_path / "cat" / FILE_NAME, "--json", "--quiet")
    assert [s["target"] for s in json.loads(result.out)[str(tmp_path / "cat" / FILE_NAME)]] == ["cat"]
    assert {p: p.read_bytes() for p in (tmp_path / "cat").iterdir()} == before


def test_eval_refuses_a_weight(call: Call, patch_folder: Path) -> None:
    result = call("eval", "--base", "emoji", "--patch", f"{patch_folder}:0.5")
    told = f"{patch_folder}:0.5: no weight can be told like that here (eval has --weight); write {patch_folder}"
    assert (result.code, result.err) == (2, f"error: {told}\n")


def test_stack_never_overwrites_a_patch(call: Call, patch_folder: Path) -> None:
    before = (patch_folder / FILE_NAME).read_bytes()
    result = call("stack", patch_folder, "--out", patch_folder)
    assert (result.code, result.err.strip()) == (2, f"error: {patch_folder}: not empty; choose another folder")
    assert (patch_folder / FILE_NAME).read_bytes() == before


def test_overlap_prints_and_draws_what_patches_share(
    call: Call, patch_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    options = [patch_folder, patch_folder, "--base", tiny_folder, "--out", tmp_path / "shared.png"]
    result = call("overlap", *options, "--json")
    actions = json.loads(result.out)["actions"]
    assert (result.code, len(actions), actions[0]) == (0, 2, actions[1])  # a patch acts on its own concept as its twin
    assert actions[0][0] > 0
    with Image.open(tmp_path / "shared.png") as picture:
        assert picture.format == "PNG"
    again = call("overlap", *options)
    assert (again.code, again.err) == (2, f"error: {tmp_path / 'shared.png'}: exists; choose another --out\n")
    assert "leaks to" in call("overlap", patch_folder, "--base", tiny_folder).out


@pytest.mark.parametrize("command", ["show", "overlap"])
def test_a_weight_where_none_counts_is_not_dropped_silently(
    command: str, call: Call, patch_folder: Path, tiny_folder: Path
) -> None:
    base = ("--base", tiny_folder) if command == "overlap" else ()
    result = call(command, f"{patch_folder}:0.5", *base)
    assert (result.code, f"{patch_folder}:0.5: no weight can be told like that here" in result.err) == (2, True)


def test_the_hint_after_training_is_a_command_that_runs(
    call: Call, patch_folder: Path, tiny_folder: Path, recipe_of: RecipeOf
) -> None:
    recipe = recipe_of(base=str(tiny_folder), concepts='the cat\'s "whiskers"')
    words = shlex.split(cli.next_command(recipe, patch_folder))
    result = call(*words[1:], "-n", 1, "--steps", 1)
    assert (words[0], result.code, (patch_folder / "pictures" / "grid.png").exists()) == ("esd-lora", 0, True)
    shutil.rmtree(patch_folder / "pictures")
    turbo = recipe_of(guidance_scale=1, trajectory_steps=2, resolution=32)
    result = call(*shlex.split(cli.next_command(turbo, patch_folder))[1:], "-n", 1)
    picture = Image.open(patch_folder / "pictures" / "0000.png")
    assert (result.code, picture.size) == (0, (32, 32))
    assert "--guidance-scale 1.0 --steps 2" in cli.next_command(turbo, patch_folder)
    assert "--revision v2" in cli.next_command(recipe.model_copy(update={"revision": "v2"}), patch_folder)
    shutil.rmtree(patch_folder / "pictures")


def test_what_looks_like_an_emoji_code_is_printed_as_it_is(call: Call, patch_folder: Path) -> None:
    result = call("stack", f"{patch_folder}:x:", "--out", "stack")
    assert (result.code, result.err.strip().startswith(f"error: {patch_folder}:x:: the weight")) == (2, True)


def test_a_recipe_can_be_set_without_a_file(call: Call, tiny_folder: Path) -> None:
    result = call("plan", "--set", f"base={tiny_folder}", "--set", "concepts=[cat, dog]", "--json")
    assert result.code == 0


def test_fuse_writes_one_patch(call: Call, patch_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    result = call("fuse", patch_folder, "--base", tiny_folder, "--out", tmp_path / "fused", "--json")
    assert (result.code, json.loads(result.out)["erases"]) == (0, ["cat"])
    again = call("fuse", patch_folder, "--base", tiny_folder, "--out", tmp_path / "fused")
    assert (again.code, "not empty; choose another folder" in again.err) == (2, True)


def test_merge_writes_a_pipeline_and_only_once(
    call: Call, patch_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    result = call("merge", patch_folder, "--base", tiny_folder, "--out", tmp_path / "merged", "--json")
    assert (result.code, json.loads(result.out)["erased"]) == (0, ["cat"])
    assert (tmp_path / "merged" / "model_index.json").exists()
    again = call("merge", patch_folder, "--base", tmp_path / "merged", "--out", tmp_path / "twice")
    assert again.code == 2
    assert f"the patch that erases cat is in the weights of {tmp_path / 'merged'} already" in again.err
    assert not (tmp_path / "twice").exists()


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are not quite a base or a patch."""
    folder = tmp_path_factory.mktemp("worlds")
    tiny_pipeline(cross_attention=False).save_pretrained(folder / "no-attention")
    (folder / "photos").mkdir()
    (folder / "sana").mkdir()
    (folder / "sana" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    shutil.copytree(tiny_folder, folder / "broken")
    (folder / "broken" / "unet" / "config.json").write_text("{")
    (folder / "file").write_text("a file")
    return folder


def one_error(result: Result, message: str) -> None:
    """One line on stderr that begins so, nothing on stdout, and the exit code of a user's mistake."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}"), result.err
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "rnak=8"], "options: rnak: unknown key; did you mean rank?"),
        (["--set", "rank=many"], "options: rank: input should be a valid integer, "),
        (["--set", "rank"], "--set rank: write key=value, such as --set rank=8"),
        (["--set", "rank=0"], "options: rank: input should be greater than or equal to 1, got 0"),
        (["--set", "lr=.nan"], "options: lr: input should be a finite number, got nan"),
        (["--set", "layers=esd-y"], "options: layers: input should be 'esd-x', "),
        (["--set", "dtype=fp8"], "options: dtype: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        (["--from", ""], "options: concepts.0.from: must not be empty"),
        (["--from", "CAT"], "options: concepts.0: from must differ from erase, both are 'cat'"),
        (["--replace-with", " "], "options: concepts.0.replace_with: must not be empty"),
        (["--seed", "-1"], "options: seed: input should be greater than or equal to 0, got -1"),
        (["--set", "rank=33"], "rank: must be at most 32, the size of down_blocks"),
        (["--device", "toaster"], "unknown device toaster; this machine has "),
        (["--device", "cuda:99"], "no device cuda:99 here; this machine has "),
        (["--base", "nowhere"], "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        (["--base", "some/where"], "some/where: no such folder; the Hub cannot be reached, and model_index.json"),
        (["--set", "revision=v2"], "{tiny}: has no revisions, as a base on the Hub has; leave revision v2 out"),
        (["--base", "{worlds}/photos"], "{worlds}/photos: no model_index.json in this folder"),
        (["--base", "{worlds}/file"], "{worlds}/file: not a safetensors file: "),
        (["--base", "{worlds}/sana"], "{worlds}/sana: SanaPipeline is not supported; supported: Stable"),
        (["--base", "{worlds}/broken"], "{worlds}/broken: cannot load the pipeline: "),
        (["--base", "{worlds}/no-attention"], "{worlds}/no-attention: layers esd-x match nothing in the denoiser"),
        (["--out", "{worlds}/file/out"], "{worlds}/file/out: cannot write: Not a directory"),
        (["--out", "{worlds}/file"], "{worlds}/file: is a file; name a folder"),
        (["--out", "{worlds}/photos/../sana"], "{worlds}/photos/../sana: not empty, and holds no run"),
    ],
)
def test_train_refuses_in_one_line_and_leaves_nothing(
    call: Call, tiny_folder: Path, worlds: Path, arguments: list[str], message: str
) -> None:
    before = sorted(worlds.rglob("*"))
    given = [a.format(worlds=worlds) for a in arguments]
    # an option that is given twice counts as it was given last
    result = call("train", "--base", tiny_folder, "--erase", "cat", *SHORT, "--out", "out", *given)
    one_error(result, message.format(worlds=worlds, tiny=tiny_folder))
    assert list(Path().iterdir()) == []
    assert sorted(worlds.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "emoji", "--erase", ""], "options: concepts.0.erase: must not be empty"),
        (["--base", "emoji"], "name a recipe, or --base and --erase; `esd-lora recipes` lists the shipped recipes"),
        (["--erase", "cat"], "name a recipe, or --base and --erase; "),
        (["nothing"], "nothing: no such file and no shipped recipe; `esd-lora recipes` lists them"),
        (["nothing.yaml"], "nothing.yaml: cannot read the recipe: No such file or directory"),
        (["recipe.yaml", "--from", "dog"], "--from and --replace-with belong to an --erase"),
        (["recipe.yaml", "--set", "rank=0"], "recipe.yaml: rank: input should be greater than or equal to 1, got 0"),
    ],
)
def test_recipes_that_say_nothing_are_refused(call: Call, arguments: list[str], message: str) -> None:
    Path("recipe.yaml").write_text("base: emoji\nconcepts: cat\n")
    one_error(call("train", *arguments), message)
    assert [p.name for p in Path().iterdir()] == ["recipe.yaml"]


def test_all_problems_are_told_at_once(call: Call) -> None:
    result = call("train", "--base", "emoji", "--erase", "", "--set", "rank=0", "--set", "x=1")
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert lines[:3] == [
        "error: options: 3 problems",
        "  concepts.0.erase: must not be empty",
        "  rank: input should be greater than or equal to 1, got 0",
    ]
    assert lines[3].startswith("  x: unknown key; known keys: base, revision, ")
    assert len(lines) == 4  # long lines are not broken


def test_a_folder_that_holds_another_run_is_left_as_it_was(call: Call, tiny_folder: Path, patch_folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in patch_folder.iterdir()}
    arguments = ["train", "--base", tiny_folder, "--erase", "cat", *SHORT, "--out", patch_folder]
    one_error(
        call(*arguments), f"{patch_folder}: holds another run; choose another --out, or go on with it by --resume"
    )
    one_error(call(*arguments, "--resume"), f"{patch_folder}: holds a run of another recipe, which this one cannot")
    assert {p.name: p.read_bytes() for p in patch_folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "--prompt: must not be empty"),
        (["--patch", "nowhere"], f"nowhere: no patch here; a patch is a folder with {FILE_NAME}, or such a file"),
        (["--patch", "nowhere:0.5"], "nowhere: no patch here; "),
        (["--patch", "{patch}:heavy"], "{patch}:heavy: the weight after the colon must be a number, got 'heavy'"),
        (["--base", "nowhere"], "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        (["--device", "toaster"], "unknown device toaster; this machine has "),
        (
            ["--base", "{worlds}/no-attention", "--patch", "{patch}"],
            "the patch that erases cat (made for {tiny}) adapts "
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k, which {worlds}/no-attention does not have",
        ),
        (["--out", "{worlds}/file/out"], "{worlds}/file/out/0000.png: cannot write: Not a directory"),
    ],
)
def test_generate_refuses_in_one_line_and_leaves_nothing(
    call: Call, tiny_folder: Path, worlds: Path, patch_folder: Path, arguments: list[str], message: str
) -> None:
    names = {"worlds": worlds, "patch": patch_folder, "tiny": tiny_folder}
    given = [a.format(**names) for a in arguments]
    usual = ["--base", tiny_folder, "--prompt", "cat", "--out", "out", "-n", 1, "--steps", 2]
    one_error(call("generate", *usual, *given), message.format(**names))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--dtype", "fp8"], ["-n", "0"], ["--seed", "-1"], ["--guidance-scale", "0"], ["--guidance-scale", "inf"]],
)
def test_generate_refuses_values_out_of_range(call: Call, tiny_folder: Path, arguments: list[str]) -> None:
    result = call("generate", "--base", tiny_folder, "--prompt", "cat", "--out", "out", *arguments)
    assert (result.code, result.out) == (2, "")
    assert arguments[0] in result.err
    assert list(Path().iterdir()) == []


def test_a_patch_of_other_weights_is_warned_of_in_one_line(call: Call, patch: Patch, tmp_path: Path) -> None:
    stranger = replace(patch, info={**patch.info, "base": {"name": "sd15", "fingerprint": "0"}})
    stranger.save("patch")
    save_tiny(tmp_path / "base")
    result = call(
        "generate", "--base", "base", "--prompt", "a", "--patch", "patch", "-n", 1, "--steps", 2, "--out", "o"
    )
    assert result.code == 0
    assert "".join(result.err.split()).startswith("warning:thepatchwasmadeforsd15,andtheweightsofbasediffer;")
    assert "UserWarning" not in result.err
    replace(patch, info={**patch.info, "base": {"name": "base", "fingerprint": "0"}}).save("patch")
    result = call(
        "generate", "--base", "base", "--prompt", "a", "--patch", "patch", "-n", 1, "--steps", 2, "--out", "p"
    )
    assert "".join(result.err.split()).startswith("warning:thepatchwasmadeforotherweightsthanthoseofbasehere;")


def test_show_refuses_what_is_no_patch(call: Call) -> None:
    Path("text.safetensors").write_text("words and words and words")
    one_error(call("show", "text.safetensors"), "text.safetensors: not a safetensors file: ")
    one_error(call("show", "nowhere"), "nowhere: no patch here; ")


def test_a_run_that_breaks_is_a_failure_and_not_a_mistake(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TrainingError("the loss was nan")

    monkeypatch.setattr(training, "train", broken)
    result = call("train", "--base", tiny_folder, "--erase", "cat")
    assert (result.code, result.out, result.err) == (1, "", "error: the loss was nan\n")


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", ["_step", "load_base"])
def test_an_interrupted_run_says_how_to_go_on(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, by: int, code: int, place: str
) -> None:
    module: Any = training if place == "_step" else bases
    honest = getattr(module, place)

    def struck(*given: Any, **how: Any) -> Any:
        signal.raise_signal(by)
        return honest(*given, **how)

    command = ["train", "--base", str(tiny_folder), "--erase", "a cat", *SHORT]
    with monkeypatch.context() as once:
        once.setattr(module, place, struck)
        result = call(*command, "--out", "run")
    again = shlex.join(["esd-lora", *command, "--out", "run", "--resume"])
    assert (result.code, result.out, result.err) == (code, "", f"interrupted; go on with: {again}\n")
    left = [p.name for p in Path("run").iterdir()] if Path("run").exists() else []
    assert sorted(left) == ([] if place == "load_base" else ["checkpoint-00001.safetensors", "recipe.yaml"])
    assert call(*shlex.split(again)[1:]).code == 0
    call(*command, "--out", "whole")
    assert Path("run", FILE_NAME).read_bytes() == Path("whole", FILE_NAME).read_bytes()


def test_a_device_that_is_out_of_memory_is_a_failure_in_one_line(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_lora.pictures.generate", out_of_memory)
    told = call("generate", "--base", tiny_folder, "--prompt", "a cat", "--out", "pictures", "--quiet")
    hint = "try a smaller --batch-size or --resolution, or --dtype bf16"
    assert (told.code, told.out, told.err) == (1, "", f"error: the device is out of memory: {hint}\n")
    assert not Path("pictures").exists()


def test_a_cpu_that_is_out_of_memory_is_a_failure_in_one_line(call: Call, tiny_folder: Path) -> None:
    wanted = ["--prompt", "a cat", "-n", 1, "--steps", 1, "--resolution", 10**8]
    told = call("generate", "--base", tiny_folder, *wanted, "--out", "pictures", "--quiet")
    assert (told.code, told.out, told.err.count("\n")) == (1, "", 1)
    assert told.err.startswith("error: the device is out of memory: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fuse", "{patch}", "--base", "nowhere"], "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        (["merge", "{patch}", "--base", "nowhere"], "nowhere: neither `emoji`, nor a folder or file, nor a Hub id"),
        (["pull", "cat"], "cat: a repository is called user/name"),
    ],
)
def test_libraries_do_not_speak_beside_the_line_that_says_what_is_wrong(
    words: list[str], told: str, patch_folder: Path
) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.endswith("_VERBOSITY")}
    command = [sys.executable, "-m", "esd_lora", *(w.format(patch=patch_folder) for w in words), "--out", "out"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_of_several_processes_the_first_alone_speaks_and_draws(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        result = call("train", "--base", tiny_folder, "--erase", "cat", *SHORT, "--out", "run", "--json")
        assert (result.code, result.err) == (0, "")
        assert result.out if rank == 0 else not result.out

    def refused(rank: int) -> None:
        result = call("train", "--base", tiny_folder, "--erase", "cat", *SHORT, "--out", "run")
        assert (result.code, result.err.count("\n")) == (2, 1 if rank == 0 else 0)

    assert launch(work) == [0, 0]
    assert launch(refused) == [0, 0]
    assert {p.name for p in Path("run").iterdir()} == {
        *(FILE_NAME, "recipe.yaml", "loss.csv", "run.yaml", "loss.png", "grid.png"),
    }
