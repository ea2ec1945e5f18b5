"""The examples run as they stand, and are short."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RecipeOf, same, weights_of
from test_page import sample

from esd_lora.bases import Base, load_base
from esd_lora.compose import attach, stack
from esd_lora.emoji.vocabulary import NEIGHBOURS, OBJECTS, STYLES, prompt
from esd_lora.evaluate.attacks import INVERT
from esd_lora.evaluate.baselines import PRESETS, safety_guidance
from esd_lora.evaluate.comparing import Sampling
from esd_lora.evaluate.page import make_report, points_of
from esd_lora.evaluate.rates import rate
from esd_lora.evaluate.scores import AttributeScores, Scores
from esd_lora.evaluate.suite import Budget
from esd_lora.patch import Patch
from esd_lora.training import train

EXAMPLES = Path(__file__).parent.parent / "examples"
KNOWING = "by words that know"
"""How guards.py calls the words of who knows of a guard."""
USUALLY = {"target": "cat", "tokens": 4, "steps": 250}
"""Of a cat, with the budget of an attacker of whom nobody says more."""


def run(name: str, out: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_are_at_most_forty_lines() -> None:
    scripts = sorted(EXAMPLES.glob("0*.py"))
    assert len(scripts) == 3
    assert all(len(p.read_text().splitlines()) <= 40 for p in scripts)


def test_a_patch_is_trained_and_then_used_by_plain_diffusers(tmp_path: Path) -> None:
    assert "layers" in run("01_erase.py", tmp_path / "cat")
    run("02_plain_diffusers.py", tmp_path / "cat")
    made = {p.name: p.read_bytes() for p in (tmp_path / "cat").glob("*.png")}
    assert made.keys() == {"grid.png", "erased.png", "back.png"}
    assert made["erased.png"] != made["back.png"]


def test_patches_are_scaled_and_combined(tmp_path: Path) -> None:
    run("03_scale_and_combine.py", tmp_path)
    assert (tmp_path / "grid.png").exists()


# ---- what the longer scripts keep on disk ------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The module of a script, by name, as the scripts import each other."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES / "emoji")
    return importlib.import_module


@pytest.mark.parametrize("count", [7, 45])
def test_kept_pictures_are_spread_over_all_cells_that_stay(script: Callable[[str], Any], count: int) -> None:
    erased = ["cat", "neon"]
    rows = list(script("stacking").cells_of(erased, count=count, salt=3))
    kept = [(c.obj, c.style) for group, c in rows if group == "kept"]
    assert len(kept) == len(set(kept)) == count
    assert not {name for cell in kept for name in cell} & set(erased)
    assert len({style for _, style in kept}) > 2  # the first styles are not all
    assert rows == list(script("stacking").cells_of(erased, count=count, salt=3))
    assert rows != list(script("stacking").cells_of(erased, count=count, salt=4))


def test_sequential_patches_are_kept_by_what_was_erased_before(
    script: Callable[[str], Any], base: Base, recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacking = script("stacking")
    trained_on: dict[str, str] = {}

    def patch_of(base: Base, concepts: list[str], kind: str, seed: int, folder: Path) -> Patch:
        recipe = recipe_of(concepts=concepts, seed=seed, lr=0.05, max_grad_norm=1e3)
        patch = train(recipe, base, out=folder, resume=True)
        assert trained_on.setdefault(folder.name, base.fingerprint) == base.fingerprint
        assert patch.info["base"]["fingerprint"] == base.fingerprint
        return patch

    monkeypatch.setattr(stacking, "patch_of", patch_of)
    before = weights_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orders = (["fox", "owl"], ["fox", "owl"], ["owl", "fox"])
        first, again, other = (stack(stacking.sequential(base, o, 0, tmp_path)) for o in orders)
        attach(base, [first])
        base.remove_adapters()
    assert first.digest == again.digest != other.digest
    assert set(trained_on) == {"fox", "fox-owl", "owl", "owl-fox"}
    assert trained_on["fox"] == trained_on["owl"] == base.fingerprint
    assert len(set(trained_on.values())) == 3
    assert same(weights_of(base), before)


def test_keys_are_made_with_other_constants_and_then_with_the_packages_own_again(
    script: Callable[[str], Any], base: Base, tmp_path: Path
) -> None:
    stacking = script("stacking")
    own = stacking.patch_of(base, ["cat"], "keyed, eta 2", 0, tmp_path / "cat")
    for changed in stacking.MADE_WITH.values():
        (other,) = stacking.made_with(base, ["cat"], **changed)
        assert not same(other.tensors, own.tensors)
        assert same(stacking.made_with(base, ["cat"])[0].tensors, own.tensors)


def test_the_page_of_what_was_put_together_has_every_row_once(script: Callable[[str], Any]) -> None:
    stacking = script("stacking")

    def row(way: str, k: int, run: int, weight: float = 1) -> dict[str, Any]:
        answers = {
            "erased": {"cat": (1, 10)},
            "objects": {"tiger": (9, 10), "bus": (10, 10)},
            "styles": {"ink": (8, 10)},
        }
        return {"way": way, "k": k, "run": run, "weight": weight, "erased": ["cat"], "answers": answers}

    rows = [row("keyed", 8, 0), row("keyed", 8, 1), row("keyed", 8, 0, 0.5), row("keyed, rank 4", 16, 0)]
    lines = [line for line in stacking.page([*rows, row("ties", 2, 0)]).splitlines() if line.startswith("| ")]
    found = [line.split(" | ") for line in lines if not line.startswith("| way")]
    assert [(line[0], line[1], line[2]) for line in found] == [
        ("| keyed", "8", "20"),
        ("| ties", "2", "10"),
        ("| keyed × 0.5", "8", "10"),  # beside the same at a weight of 1
        ("| keyed", "8", "20"),
        ("| keyed, rank 4", "16", "10"),
    ]
    assert found[0][4] == "cat 10.0"
    rates = [float(cell.split(" ")[0]) for cell in (found[0][3], *found[0][5:])]
    assert rates == [10, 95, 80, 90]  # erased left, objects, styles, the tiger


def test_orders_that_differ_widen_the_interval_of_pictures(script: Callable[[str], Any]) -> None:
    def rows(*hits: int) -> list[dict[str, Any]]:
        return [{"run": run, "answers": {"objects": {"bus": (n, 100)}}} for run, n in enumerate(hits)]

    stacking = script("stacking")
    alike, apart = (stacking.rate_of(rows(*hits), "objects") for hits in ((60, 60, 60), (30, 60, 90)))
    assert alike == rate([i < 180 for i in range(300)])
    assert (apart.value, apart.n) == (alike.value, alike.n)
    assert apart.low < alike.low - 0.1 < alike.high + 0.1 < apart.high
    assert stacking.rate_of(rows(1), "objects", only=["cat"]) is None


def test_an_attacker_asks_for_an_object_in_every_style_and_for_a_style_of_every_object(
    script: Callable[[str], Any],
) -> None:
    frontier = script("frontier")
    assert frontier.asking("cat", "{}", 2) == [prompt("{}", style) for style in list(STYLES)[:2]]
    assert frontier.asking("neon", "{}", 2, first=1) == [prompt(obj, "{}") for obj in list(OBJECTS)[1:3]]


def test_the_frontier_is_drawn_and_told_of_kept_under_eight_against_found(
    script: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frontier = script("frontier")
    never = vars(rate([False] * 64))
    found = [
        {"way": way, "k": k, "concept": "cat", "by name": never, "by inversion": vars(rate([i < n for i in range(64)]))}
        for way, k, n in (("keyed", 8, 48), ("fused", 8, 0), ("fused", 1, 16))
    ]
    answers = [
        {"way": "fused", "k": k, "run": 0, "weight": w, "answers": {"objects": {"dog": (hits, 10), "car": (10, 10)}}}
        for k, w, hits in ((8, 1.0, 4), (8, 1.0, 6), (8, 2.0, 0), (16, 1.0, 0))
    ]
    kept = frontier.kept_of(answers)
    assert {way: (r.value, r.n) for way, r in kept.items()} == {"fused": (0.75, 40)}
    frontier.table(found, kept)
    keyed, fused = capsys.readouterr().out.splitlines()[2:]
    assert keyed.startswith("| keyed |  | 0.0 [0, 6] | 75.0 [")
    assert fused.startswith("| fused | 75.0 [")
    assert "] | 0.0 [0, 6] | 0.0 [0, 6] | 0.0 [0, 6] | 25.0 [" in fused
    frontier.plot([row for row in found if row["k"] == 8 and row["way"] in kept], kept, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size
    frontier.plot([], kept, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_pictures_are_drawn_anew_where_the_art_or_the_count_has_changed(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py")
    render = script("render")
    drawn: list[tuple[int, bool, bool]] = []

    def draw(path: Path, *, count: int, test: bool, typical: bool) -> tuple[np.ndarray, np.ndarray]:
        drawn.append((count, test, typical))
        return np.zeros((count, 64, 64, 3), np.uint8), np.zeros((count, 4), np.uint8)

    def run_with(count: int) -> list[tuple[int, bool, bool]]:
        drawn.clear()
        monkeypatch.setattr(
            "sys.argv", ["render.py", "--work", str(tmp_path), "--count", str(count), "--test-count", "1"]
        )
        render.main()
        return drawn

    monkeypatch.setattr(render, "draw", draw)
    (tmp_path / "art.npz").write_bytes(b"first")
    assert run_with(2) == [(2, False, True), (2, False, False), (1, True, False)]
    assert run_with(2) == []
    assert run_with(3) == [(3, False, True), (3, False, False)]
    assert len(render.load(tmp_path / "typical.npz")[0]) == 3
    (tmp_path / "art.npz").write_bytes(b"second")
    assert len(run_with(3)) == 3
    np.savez(tmp_path / "test.npz", pictures=np.zeros(1), labels=np.zeros(1))  # as before files told what made them
    assert run_with(3) == [(1, True, False)]
    assert {p.name for p in tmp_path.iterdir()} == {"art.npz", "typical.npz", "pictures.npz", "test.npz"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"without": ["cat"]}, "a gold model, which lacks some concepts; gold.py measures it"),
        ({"without": "cat"}, "a gold model, which lacks some concepts; gold.py measures it"),
        (None, "no finished run of train_unet.py"),
    ],
)
def test_only_a_finished_run_of_a_whole_base_becomes_the_base(
    script: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: object,
    message: str,
) -> None:
    if told:
        (tmp_path / "training.json").write_text(json.dumps(told))
    monkeypatch.setattr("sys.argv", ["card.py", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        script("card").main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{tmp_path}: {message}\n"


def test_the_page_of_patches_has_a_row_for_each_measured_concept(script: Callable[[str], Any], patch: Patch) -> None:
    half, every = rate([True, False] * 10, [True] * 20), rate([True] * 40, [True] * 40)
    cat = Scores("cat", half, every, every, every, {"dog": half}, {}, "measure 0123").to_dict()
    hat = AttributeScores("cat", half, every, None, every, half, "measure 0123").to_dict()
    rows = script("patches").rows_of("emoji/cat", replace(patch, info={**patch.info, "scores": [cat, hat]}))
    assert [row.count(" | ") for row in rows] == [script("patches").HEAD.splitlines()[-2].count(" | ")] * 2
    assert "| cat | esd-x | 2 | " in rows[0]
    whole = "100.0 [91, 100] /40, base 100.0"
    assert rows[0].endswith(f"| 50.0 [30, 70] /20, base 100.0 | {whole} | {whole} | dog 50 |")
    assert "| hat from cat | " in rows[1]
    assert "| 100.0 [91, 100] /40, base 100.0 | 50.0 [30, 70] /20, base 100.0 |" in rows[1]  # others, styles


def test_a_training_script_goes_on_only_with_what_it_was_told(script: Callable[[str], Any], tmp_path: Path) -> None:
    checkpoint, path, told = script("checkpoint"), tmp_path / "vae.ckpt", {"steps": 8, "pictures": "0123"}
    assert checkpoint.load(path, told=told, resume=False) is None
    checkpoint.save(path, {"step": 4}, told=told)
    drawn = torch.rand(3)
    assert checkpoint.load(path, told=told, resume=True)["step"] == 4
    assert torch.equal(torch.rand(3), drawn)  # as if it had not stopped
    with pytest.raises(SystemExit, match="an earlier run; go on with it by --resume"):
        checkpoint.load(path, told=told, resume=False)
    for other in ({"steps": 9, "pictures": "0123"}, {"steps": 8, "pictures": "4567"}):
        with pytest.raises(SystemExit, match=r"of a run with .*; remove it to begin anew"):
            checkpoint.load(path, told=other, resume=True)


@pytest.mark.parametrize("target", ["cat", "dog", "neon"])
def test_the_benchmark_asks_for_as_many_of_every_target(script: Callable[[str], Any], target: str) -> None:
    benchmark, kind = script("benchmark"), "object" if target in OBJECTS else "style"
    answers = benchmark.answers_of(target)
    groups = Counter(ask.group for ask in answers.asks)
    assert groups == {g: n for g, n in benchmark.PICTURES.items() if g != "neighbour" or target in NEIGHBOURS}
    assert all((ask.group == "target") == (ask.wanted[kind] == target) for ask in answers.asks)
    assert len({ask.wanted["object" if kind == "style" else "style"] for ask in answers.asks}) >= len(STYLES)
    assert answers == benchmark.answers_of(target)


def test_the_page_of_attacks_has_every_patch_that_was_attacked(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(name: str, back: int, **more: Any) -> dict[str, Any]:
        rows = [{"prompt": "a cat", "seed": i, "seen": "cat" if i < back else "dog"} for i in range(10)]
        return {"name": name, "passes": 10, "seconds": 1, "rows": rows} | more

    controls = [trial("by name", 1, role="floor"), trial("random words", 2, role="floor")]
    controls.append(trial("unerased base", 10, role="ceiling"))
    evidence = {"base": "emoji", "target": {"kind": "object", "label": "cat"}, "evaluator": "emoji", "patches": []}
    attack = trial("inversion", 6, controls=controls, about="8 soft words", looks=[[0, 0], [2, 1]])
    evidence |= {"schema": 1, "settings": {}, "attacks": [attack]}
    folder = tmp_path / "cat-keyed"
    folder.mkdir()
    attacks = script("attacks")
    monkeypatch.setattr("sys.argv", ["attacks.py", "--out", str(tmp_path), "--patches"])
    with pytest.raises(SystemExit) as caught:
        attacks.main()
    assert caught.value.code == 2
    (folder / "attacks.json").write_text(json.dumps(evidence))
    with monkeypatch.context() as wrong:
        wrong.setattr("sys.argv", ["attacks.py", "--out", str(tmp_path / "other"), "--set", "tokens=none"])
        with pytest.raises(SystemExit, match="2"):  # before anything is trained
            attacks.main()
    assert not (tmp_path / "other").exists()
    attacks.main()
    assert (tmp_path / "attacks.png").stat().st_size
    page = (tmp_path / "attacks.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## cat-keyed"]
    row = "| inversion | 60.0 [31, 83] of 10 | 20.0 [6, 51] | random words | 40.0 [-2, 67] | 100.0 [72, 100] | 10 | 1 |"
    assert row in page.splitlines()
    assert "* inversion: 8 soft words" in page.splitlines()


def test_guards_are_attacked_by_who_knows_of_them_and_who_does_not(
    script: Callable[[str], Any], recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is drawn once, behind nothing as by the base; the base is as it was."""
    guards, base = script("guards"), load_base("emoji")
    before = weights_of(base)
    train(recipe_of(keys="closed-form"), base, out=tmp_path / "keyed")
    budget = Budget(3, 2, 2, inversion=replace(INVERT, steps=1, batch_size=2), sampling=Sampling(steps=2))
    monkeypatch.setattr(guards, "patch_of", lambda *_: tmp_path / "keyed")
    monkeypatch.setattr(guards, "USUAL", budget)
    monkeypatch.setattr(guards, "ROUNDS", 1)
    monkeypatch.setattr(guards, "FEWEST", 1)
    monkeypatch.setattr("sys.argv", ["guards.py", "--out", str(tmp_path), "--targets", "cat"])
    guards.main()
    assert same(weights_of(base), before)
    rows = json.loads((tmp_path / "guards.json").read_text())
    knowing = [row["guard"] for row in rows if row["how"] == guards.AWARE]
    assert knowing == ["separate negative prompt", "SLD max", "post-filter", "learned patch", "keyed patch"]
    everywhere = Counter(row["how"] for row in rows if row["how"] != guards.AWARE)
    assert everywhere == dict.fromkeys((guards.NAMED, *guards.FLOORS, guards.UNAWARE), len(guards.GUARDS) + 3)
    assert {len(row["seen"]) for row in rows} == {3}
    target = guards.Target.of("cat", base, tmp_path, budget=budget)
    named = target.erasure.drawing("measured")
    pictures = guards.Behind.of(named, list(target.guards.values())).draw(base)
    bare, *guarded = ([p.tobytes() for p in pictures[i : i + 3]] for i in range(0, len(pictures), 3))
    assert bare == [p.tobytes() for p in named.draw(base)]
    assert all(some != bare for some in guarded)
    assert all(row["looks"] == [] for row in rows if row["how"] in (guards.NAMED, guards.FLOORS[0]))
    assert all(row["looks"] for row in rows if row["how"] == guards.UNAWARE)
    never = replace(target, gold=base).place_of(f"{guards.AWARE}: {guards.NEVER}")
    assert never["gold"] == base.fingerprint  # one gold base's rows are no other's
    monkeypatch.setattr(guards.attacks, "inversion", None)  # is not called again
    guards.main()
    assert json.loads((tmp_path / "guards.json").read_text()) == rows


def test_words_are_trained_through_the_push_that_sld_has_in_the_mean_of_its_steps(script: Callable[[str], Any]) -> None:
    """Of steps that all lead to the same place, by the pipeline's own recursion in float64."""
    guards, most = script("guards"), PRESETS["max"]
    eps = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn, momentum = [], torch.zeros(2, 4, dtype=torch.float64)
    for _ in range(guards.Drawing.steps):
        gamma = safety_guidance(*eps, momentum, guidance=most)
        momentum = most.momentum_beta * momentum + (1 - most.momentum_beta) * gamma
        drawn.append(eps[0] - gamma)
    assert torch.allclose(guards.through_sld(*eps), torch.stack(drawn).mean(0), rtol=1e-12, atol=1e-12)


def test_what_guards_leave_is_told_beside_patches(script: Callable[[str], Any]) -> None:
    guards = script("guards")

    def row(guard: str, how: str, cats: int) -> dict[str, Any]:
        return {**USUALLY, "guard": guard, "how": how, "seen": ["cat"] * cats + [""] * (50 - cats)}

    rows = [row("learned patch", guards.NAMED, 2), row("learned patch", guards.AWARE, 10)]
    rows += [row("SLD max", how, 5) for how in (guards.NAMED, *guards.FLOORS)]
    rows += [row("SLD max", guards.UNAWARE, 45), {**row("SLD max", guards.AWARE, 0), "seen": []}]
    sld, learned = list(guards.lines_of(rows))[-2:]
    assert sld.startswith("| SLD max | 10.0 [4, 21] | 90.0 [79, 96] (10.0) |  | 90.0 [79, 96] | 70.0 [")
    assert learned == "| learned patch | 4.0 [1, 13] |  | 20.0 [11, 33] | 20.0 [11, 33] |  |  |"


def test_the_benchmark_counts_what_a_report_shows(script: Callable[[str], Any]) -> None:
    benchmark = script("benchmark")
    report = sample()
    rows = [benchmark.counts_of("cat", "object", p) for p in points_of(make_report(report))]
    ours = next(r for r in rows if (r["method"], r["strength"]) == ("patch", 1))
    asked = [r for r in report["rows"] if (r["method"], r["strength"], r["group"]) == ("patch", 1, "target")]
    gone = sum(r["seen"]["object"] != "cat" for r in asked)
    assert ours["counts"]["UA"][::2] == [gone, len(asked)]
    near = [r for r in report["rows"] if (r["method"], r["strength"], r["group"]) == ("patch", 1, "neighbour")]
    kept = sum(r["seen"]["object"] == r["wanted"]["object"] for r in near)
    assert ours["counts"]["near"][::2] == [kept, len(near)]
    other = {**ours, "target": "dog", "counts": {**ours["counts"], "UA": [0, 0, 10]}}
    half = f"{50 * gone / len(asked):.1f}"
    # of two targets, one of which is erased and one never: bootstrapped means lie anywhere between
    assert benchmark.mean([ours, other], "UA").interval().startswith(f"{half} [0, ")
    assert sum(line.startswith("| objects | patch") for line in benchmark.table(rows)) == 4


def test_methods_are_compared_at_the_strength_that_keeps_most_and_erases_enough(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    benchmark = script("benchmark")

    def row(target: str, method: str, strength: float, gone: int, kept: int, seed: int = 0) -> dict[str, Any]:
        counts = {"UA": [gone, 0, 100], "kept": [kept, 100, 100]}
        where = {"target": target, "kind": "object", "method": method, "strength": strength, "seed": seed}
        return {**where, "counts": counts, "label": f"weight {strength:g}", "cost": None}

    rows = [
        row(target, method, strength, gone, kept - 2 * (target == "dog"), seed)
        for target in ("cat", "dog")
        for method, strength, gone, kept, seed in (
            ("base", 1, 0, 100, 0),
            ("esd_lora", 1, 98, 96, 0),
            ("esd_lora", 1, 96, 92, 1),
            ("esd_lora", 0.5, 60, 99, 0),
            ("esd_lora, keyed", 1, 97, 90, 0),
            ("other", 1, 95, 84, 0),
            ("other", 1.5, 100, 50, 0),
            ("weak", 1, 94, 100, 0),
        )
    ]
    rows.append(row("cat", "other", 1.2, 100, 100))  # the best by far, but of the cat alone
    lines = [line.split(" | ") for line in benchmark.matched(rows)[2:]]
    assert [line[1] for line in lines] == ["esd_lora weight 1", "esd_lora, keyed weight 1", "other weight 1", "weak"]
    assert [line[3].split(" ")[0] for line in lines[:3]] == ["93.0", "89.0", "83.0"]
    assert lines[1][4:6] == ["+4.0 [+4.0, +4.0]", ""]
    assert lines[2][4:6] == ["+10.0 [+10.0, +10.0]", "+6.0 [+6.0, +6.0]"]  # of each target 94 - 84 and 90 - 84
    assert lines[3][2] == "at no strength 95"
    setting = {"ours": {"esd_lora": benchmark.made_by({"rank": 7})}}
    known = {"targets": {name: {**setting, "against": ["other"]} for name in ("cat", "dog")}, "rows": rows}
    benchmark.write_page_of(known, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"benchmark.md", "benchmark.png"}
    assert "rank 7, eta 1.5" in (tmp_path / "benchmark.md").read_text()
    known["targets"]["dog"]["ours"] = {"esd_lora": benchmark.made_by({})}  # of other defaults
    left = benchmark.standing_with(known, setting)
    assert set(left["targets"]) == {r["target"] for r in left["rows"]} == {"cat"}


def test_the_benchmark_goes_back_to_a_target_for_the_methods_that_it_lacks(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark, asked, short, had = script("benchmark"), [], [], {}

    def row(target: str, method: str, gone: int) -> dict[str, Any]:
        found = {"UA": [gone, 0, 100], "kept": [90, 100, 100]}
        where = {"target": target, "kind": "object", "method": method, "strength": 1, "seed": 0, "label": ""}
        return {**where, "counts": found, "cost": None}

    def run(_: Any, name: str, against: list[str], *, ours: bool, have: Any) -> list[dict[str, Any]]:
        asked.append((name, against, ours))
        had[name] = have
        return [row(name, method, 97) for method in ("base", *(["esd_lora"] if ours else []), *against)]

    def benchmarked(*against: str) -> dict[tuple[str, str], int]:
        asked.clear()
        arguments = ["--out", str(tmp_path), "--targets", "cat", "dog", "--against", *against]
        monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
        benchmark.main()
        rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
        return {(r["target"], r["method"]): r["counts"]["UA"][0] for r in rows}

    setting = {"ours": {"esd_lora": benchmark.made_by({})}}
    fakes = {
        "run": run,
        "setting": setting,
        "lacking": lambda _, name, against, have: [m for m in short if m in against],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(benchmark.Bench, name, fake)
    for name in ("load_base", "EmojiEvaluator"):
        monkeypatch.setattr(benchmark, name, lambda *_, **__: None)
    rows = [row("cat", method, 50) for method in ("base", "esd_lora", "sld")]
    known = {"targets": {"cat": {**setting, "against": ["sld"]}}, "rows": rows}
    (tmp_path / "benchmark.json").write_text(json.dumps(known))
    found = benchmarked("sld", "uce")
    assert asked == [("cat", ["uce"], False), ("dog", ["sld", "uce"], True)]
    assert had == {"cat": {("base", 1), ("esd_lora", 1), ("sld", 1)}, "dog": set()}  # each its own
    of_cat = {method: gone for (target, method), gone in found.items() if target == "cat"}
    assert of_cat == {"base": 97, "esd_lora": 50, "sld": 50, "uce": 97}
    assert {method for target, method in found if target == "dog"} == {"base", "esd_lora", "sld", "uce"}
    assert benchmarked("uce") == found
    assert asked == []
    short.append("sld")  # at a strength that there was not then
    assert benchmarked("sld")["cat", "sld"] == 97
    assert asked == [("cat", ["sld"], False), ("dog", ["sld"], False)]
    short.clear()
    (tmp_path / "cat" / "methods" / "esd_lora-0").mkdir(parents=True)  # all that was drawn is there
    benchmarked("filter")
    assert asked == [("cat", ["sld", "filter", "uce"], True), ("dog", ["filter"], False)]
    before = (tmp_path / "benchmark.json").read_text()
    monkeypatch.setattr(benchmark.Bench, "setting", {"ours": {"esd_lora": benchmark.made_by({"eta": 9.0})}})
    with pytest.raises(SystemExit, match="2"):  # what was measured otherwise is not written over
        benchmarked("esd-x")
    assert (tmp_path / "benchmark.json").read_text() == before


def test_the_benchmark_measures_another_gold_base_anew(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gold base's counts are no other's, and are kept under its own fingerprint."""
    benchmark, asked = script("benchmark"), []
    stubs = {
        "setting": {"ours": {}},
        "lacking": lambda *_: [],
        "run": lambda _, __, against, **___: asked.append(against) or [],
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(benchmark.Bench, name, stub)
    for name in ("load_base", "EmojiEvaluator", "write_page_of"):
        monkeypatch.setattr(benchmark, name, lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", f"b --out {tmp_path} --targets cat dog --against sld --gold {tmp_path}".split())
    (tmp_path / "training.json").touch()
    told = {name: {"ours": {}, "against": ["sld"]} for name in ("cat", "dog")}
    (tmp_path / "benchmark.json").write_text(json.dumps({"targets": told, "rows": []}))
    for fingerprint, new in (("one", True), ("one", False), ("another", True)):
        gold = benchmark.Gold(SimpleNamespace(fingerprint=fingerprint), frozenset({"cat"}))
        monkeypatch.setattr(benchmark.Gold, "of", lambda *_, gold=gold, **__: gold)
        asked.clear()
        benchmark.main()
        assert asked == ([["gold"]] if new else [])
        told = json.loads((tmp_path / "benchmark.json").read_text())["targets"]
        assert told["cat"] == {"ours": {}, "against": ["sld", "gold"], "gold": fingerprint}
        assert told["dog"] == {"ours": {}, "against": ["sld"]}


def test_the_benchmark_draws_only_the_strengths_that_a_target_lacks(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark, drawn = script("benchmark"), []
    base = load_base("emoji", device="cpu")
    bench = benchmark.Bench(base, base, None, tmp_path, 1, None, "fp32")
    presets = {("SLD", float(k)) for k in (1, 2, 3, 4)}
    assert bench.lacking("cat", ["sld", "uce"], presets) == ["sld"]
    assert bench.lacking("cat", ["sld"], presets | {("SLD", k) for k in (3.25, 3.5, 3.75)}) == []
    assert bench.lacking("cat", ["sld"], {("UCE", 1.0)}) == ["sld"]

    def compare(_: Any, ways: list[Any], **__: Any) -> Any:
        drawn.append({way.method.name: way.strengths for way in ways})
        raise InterruptedError

    monkeypatch.setattr(benchmark, "compare", compare)
    for have in (presets, ()):
        with pytest.raises(InterruptedError):
            bench.run("cat", ["sld"], ours=False, have=have)
    assert drawn == [{"SLD": (3.25, 3.5, 3.75)}, {"SLD": (1.0, 2.0, 3.0, 3.25, 3.5, 3.75, 4.0)}]


def counts(method: str, kind: str, strength: float, **found: int) -> dict[str, Any]:
    """Hits of a hundred pictures, where the base has 90."""
    shares = {k: [v, 90, 100] for k, v in found.items()}
    return {"method": method, "kind": kind, "strength": strength, "counts": shares}


def of_targets(n: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same counts for so many targets of each kind, or of the name that a row has."""
    return {"rows": [{**row, "target": f"{row.get('target', row['kind'])} {i}"} for row in rows for i in range(n)]}


def left(k: int, erased: int, kept: int) -> dict[str, Any]:
    """What so many patches, trained one after another, leave of five things, and keep."""
    things = dict.fromkeys(("cat", "bus", "book", "star", "moon"), (erased, 100))
    answers = {"erased": things, "objects": {"dog": (kept, 100)}, "styles": {"neon": (100, 100)}}
    return {"way": "sequential", "weight": 1, "k": k, "run": 0, "answers": answers}


def behind(guard: str, inverted: int) -> list[dict[str, Any]]:
    """A cat by name behind a guard, and by words of an attacker who knows of it."""
    rows = ({"how": how, "seen": ["cat"] * n + ["dog"] * (64 - n)} for how, n in (("by name", 1), (KNOWING, inverted)))
    return [{**USUALLY, "guard": guard, **row} for row in rows]


def trial(name: str, back: int) -> dict[str, Any]:
    """An attack or a control that finds so many cats."""
    return {"name": name, "rows": [{"seen": "cat" if i < back else "dog"} for i in range(50)]}


def test_facts_hold_by_what_was_measured_or_are_not_measured(script: Callable[[str], Any], tmp_path: Path) -> None:
    def inverted(way: str, found: int, k: int = 1) -> dict[str, Any]:
        shares = (rate([i < n for i in range(64)]) for n in (1, found))
        return {"way": way, "k": k, "concept": "cat"} | dict(
            zip(script("frontier").HOW, map(vars, shares), strict=True)
        )

    def write(name: str, values: Any) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))

    def told() -> list[str]:
        return [line.split(" | ")[1] for line in list(script("facts").lines_of(script("facts").Measured(tmp_path)))[2:]]

    assert told() == ["not measured"] * 10
    write("stacking.json", [left(1, 50, 50), left(2, 1, 99)])  # nothing to compare two patches with
    assert told() == ["not measured"] * 10
    rows = [
        counts("ESD-x, fine-tuned", "style", 1.0, UA=98, IRA=80, CRA=93, near=20, far=60),
        counts("ESD-x, fine-tuned", "object", 1.0, UA=92, IRA=55, CRA=44, near=62, far=60),  # styles count as well
        *(counts("SLD", "object", k, UA=10 * k, kept=90 - 10 * k) for k in (1, 2, 3, 4)),
    ]
    completions = [{**trial("completion, 2 of 20 steps", 25), "controls": [trial("gold base", 3)]}]
    again = [{**trial("benign relearning", 20), "controls": [trial("by name", 1)]}]
    evidence = {"target": {"label": "cat"}, "attacks": [*completions, *again]}
    write("benchmark.json", of_targets(5, rows))
    write("frontier.json", [inverted("keyed", 50), inverted("base", 1), inverted("keyed", 1, k=8)])
    write("guards.json", behind("SLD max", 50))
    write("stacking.json", [left(1, 1, 50), left(2, 1, 99), left(16, 30, 40)])
    write("attacks/cat/attacks.json", evidence)
    assert told() == ["holds"] * 10
    rows[0]["counts"]["near"] = [70, 90, 100]
    rows.append({**counts("ESD-x, fine-tuned", "object", 1.0, far=99), "target": "without neighbours"})
    rows[2]["counts"]["UA"] = [99, 100, 100]
    again[0]["controls"] = [trial("by name", 20)]
    write("benchmark.json", of_targets(5, rows))
    write("guards.json", behind("SLD max", 2))
    write("stacking.json", [left(2, 1, 99), left(16, 30, 99)])
    write("attacks/cat/attacks.json", evidence)
    yes, no, unclear = "holds", "does not hold", "not shown"
    assert told() == [yes, yes, yes, no, unclear, yes, yes, unclear, unclear, no]
    write("guards.json", behind("learned patch", 2))  # which is no guard that F4 is about
    write("frontier.json", [inverted("base", 50)])
    assert [told()[i] for i in (2, 4)] == ["not measured"] * 2
    write("frontier.json", [inverted("keyed", 50)])
    write("guards.json", behind("SLD max", 2))
    write("stacking.json", [left(2, 30, 99), left(16, 1, 40)])
    again[0]["controls"] = [trial("by name", 45)]
    completions[0]["controls"] = [trial("gold base", 50)]
    write("attacks/cat/attacks.json", evidence)
    assert told() == [yes, yes, yes, no, unclear, no, no, yes, no, no]


@pytest.mark.parametrize(("erased", "verdict"), [(90, "holds"), (89, "does not hold")])
def test_a_style_is_not_erased_by_a_low_rate(
    erased: int, verdict: str, script: Callable[[str], Any], tmp_path: Path
) -> None:
    rows = [counts("ESD-x, fine-tuned", "style", 1.0, UA=erased, IRA=80, CRA=93)]
    (tmp_path / "benchmark.json").write_text(json.dumps(of_targets(5, rows)))
    _, _, first, *_ = script("facts").lines_of(script("facts").Measured(tmp_path))
    assert first.split(" | ")[1] == verdict


@pytest.mark.parametrize(
    ("targets", "near", "verdict"), [(5, 20, "holds"), (2, 20, "not shown"), (5, 58, "not shown")], ids=str
)
def test_a_fact_on_averages_wants_five_targets_that_agree(
    targets: int, near: int, verdict: str, script: Callable[[str], Any], tmp_path: Path
) -> None:
    """Of objects 62 are left near them and 60 elsewhere; styles decide, and of two of each kind there are too few."""
    rows = [
        counts("ESD-x, fine-tuned", "style", 1.0, near=near, far=60),
        counts("ESD-x, fine-tuned", "object", 1.0, near=62, far=60),
    ]
    (tmp_path / "benchmark.json").write_text(json.dumps(of_targets(targets, rows)))
    *_, last = script("facts").lines_of(script("facts").Measured(tmp_path))
    assert last.startswith("| F8")
    assert last.split(" | ")[1] == verdict
