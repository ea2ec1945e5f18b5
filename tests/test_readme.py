"""What the README says of commands, fields and recipes is what the package has, and its tables are what was measured."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import test_examples
import yaml

import esd_lora
from esd_lora.cli import RECIPES, app
from esd_lora.evaluate.answers import read_answers
from esd_lora.evaluate.page import Evidence, read_evidence, tried
from esd_lora.evaluate.suite import GOLD
from esd_lora.evaluate.ways import BASELINES
from esd_lora.recipe import Concept, Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")

script = test_examples.script
Script = Callable[[str], Any]


def test_every_command_is_in_the_table_of_commands() -> None:
    names = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    assert names == set(re.findall(r"^\| `esd-lora (\w+)", README, re.MULTILINE))


def test_every_field_of_a_recipe_is_explained_with_its_default() -> None:
    fields = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    for model, place in ((Recipe, ""), (Concept, "concepts.")):
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else yaml.safe_dump(field.default).splitlines()[0]
            row = f"| `{place}{field.alias or name}` | {default} | {field.description} |"
            assert row.replace(" | null | ", " | | ") in fields, row


def test_every_recipe_is_in_the_table_of_recipes() -> None:
    rows = re.findall(r"^\| `(\w+/[\w-]+)` \| (.*) \|$", README, re.MULTILINE)
    files = {p.relative_to(RECIPES).with_suffix("").as_posix(): p for p in RECIPES.rglob("*.yaml")}
    assert dict(rows) == {k: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for k, p in files.items()}


def test_its_answer_set_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(target:.*?)```", README, re.DOTALL)
    (tmp_path / "church.yaml").write_text(example)
    columns = "prompt,evaluation_seed,evaluation_guidance,class\n"
    (tmp_path / "imagenette.csv").write_text(f"{columns}an image of a church,7,7.5,church\na dog,8,7.5,dog\n")
    (tmp_path / "coco.csv").write_text("caption\na man riding a wave\n")
    groups = Counter(ask.group for ask in read_answers(tmp_path / "church.yaml").asks)
    assert groups == {"target": 101, "neighbour": 50, "unrelated": 2}


def test_it_names_every_baseline() -> None:
    told = README.partition("## Measure it")[2].partition("## Share it")[0]
    assert all(f"`{name}`" in told for name in BASELINES)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_what_a_page_links_to_exists(page: Path) -> None:
    """A file that is not there, or a heading that it does not have, is a dead end."""
    links = re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
    assert links or page.parent != ROOT
    for link, _, heading in links:
        if not link.startswith("https://"):
            place = page.parent / link if link else page
            assert place.exists(), link
            assert not heading or heading in headings_of(place), f"{link}#{heading}"


def headings_of(page: Path) -> list[str]:
    """As GitHub makes links of them: lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


def test_the_changelog_is_about_this_version() -> None:
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == esd_lora.__version__


# ---- what was measured -------------------------------------------------------------------------------------------


def data_of(name: str) -> Any:
    return json.loads((DOCS / name).read_text())


PAGES = {
    "benchmark.md": "examples/benchmark.py --out docs --against uce",
    "stacking.md": "examples/stacking.py --out docs --ways base --k 16",
    "facts.md": "examples/facts.py > docs/facts.md",
    "guards.md": "examples/guards.py --out docs --targets",
    "attacks/attacks.md": "examples/attacks.py --out docs/attacks --patches",
    "attacks-at-length/attacks.md": "examples/attacks.py --out docs/attacks-at-length --patches",
}
"""What is published, and the command that makes it of the data beside it, and measures nothing where all of them are there."""


@pytest.mark.parametrize("page", PAGES)
def test_a_published_page_is_what_its_script_makes_of_its_data(
    page: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(Path(page).stem)
    if page == "benchmark.md":
        module.write_page_of(data_of("benchmark.json"), tmp_path)
        made = (tmp_path / page).read_text()
    elif page == "stacking.md":
        made = module.page(data_of("stacking.json"))
    elif page == "guards.md":
        made = module.page(data_of("guards.json"))
    elif page == "facts.md":
        monkeypatch.setattr("sys.argv", ["facts.py", "--docs", str(DOCS)])
        module.main()
        made = capsys.readouterr().out
    else:
        folder = Path(page).parent
        shutil.copytree(DOCS / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.md"))
        monkeypatch.setattr("sys.argv", ["attacks.py", "--out", str(tmp_path / folder), "--patches"])
        module.main()
        made = (tmp_path / page).read_text()
    assert made == (DOCS / page).read_text(), f"docs/{page} is not of its data: python {PAGES[page]}"


def table_under(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the README, without the marks of Markdown; first its heads."""
    below = re.split(rf"^#+ {re.escape(heading)}$", README, flags=re.MULTILINE)[1]
    rows = re.search(r"^(\|.*\n)+", below, re.MULTILINE)
    assert rows, heading
    return [[cell.strip(" *") for cell in row[1:-1].split("|")] for row in rows[0].splitlines() if row[:4] != "|---"]


def named(row: str, name: Hashable, names: Mapping[Any, Any]) -> Any:
    """What a row of the README is about, by the name that it has elsewhere."""
    assert name in names, f"README: tests/test_readme.py must tell what {row!r} is; {name!r} is none of {[*names]}"
    return names[name]


METHODS = {
    "esd_lora, `keys: closed-form`": ("esd_lora, keyed", 1),
    "esd_lora, the defaults": ("esd_lora", 1),
    "ESD-x, fine-tuned as its authors do": ("ESD-x, fine-tuned", 1),
    "ESD-u, fine-tuned as its authors do": ("ESD-u, fine-tuned", 1),
    "Safe Latent Diffusion, max": ("SLD", 4),
    "the same, with λ = 0.4": ("SLD", 3.75),
    "post-filter": ("post-filter", 0.5),
}
"""Methods of the benchmark, by what the README calls them, and the strength of a row that tells none; of all others it is 1."""


def test_methods_erase_and_keep_what_the_benchmark_measured(script: Script) -> None:
    benchmark, rows, kind = script("benchmark"), data_of("benchmark.json")["rows"], ""
    told, measured = {}, {}
    heads, *lines = table_under("Beside what the field has")
    for erased, name, *cells in lines:
        kind = erased.removesuffix("s") or kind
        plain, strength = re.findall(r"^(.*?)(?:, at (?:\w+ )?([\d.]+))?$", name)[0]
        method, usual = METHODS.get(plain, (plain, 1))
        places = {
            (m, some[0]["strength"]): (label, some) for (m, label), some in benchmark.settings(rows, kind).items()
        }
        label, some = named(name, (method, float(strength or usual)), places)
        seconds = [r["cost"]["seconds"] for r in some if r["cost"]]
        counted = {"targets": str(len({r["target"] for r in some})), "seconds": f"{fmean(seconds or [0]):,.0f}"}
        for head, cell in zip(heads[2:], cells, strict=True):
            told[kind, name, head] = cell
            measured[kind, name, head] = counted.get(head) or benchmark.interval_of(some, head)
        if (method, label) in benchmark.settings_of_all(rows, kind):  # others stand beside the one that keeps most
            told[kind, name, "strength"] = label
            measured[kind, name, "strength"], _ = benchmark.best_of(rows, kind).get(method, (label, some))
    assert told == measured


TOGETHER = {
    "none: the base": "base",
    "keyed": "keyed",
    "UCE, an edit of each": "uce",
    "UCE, one edit of all sixteen, at 1.5": "uce, one edit × 1.5",
    "learned, nothing preserved": "learned",
    "learned": "preserved",
    "one learned patch of all sixteen": "one patch",
}
"""Ways to put patches together, by what the README calls them."""


def test_sixteen_patches_keep_what_stacking_measured(script: Script) -> None:
    stacking, told, measured = script("stacking"), {}, {}
    ways = stacking.by_way(data_of("stacking.json"))
    for name, *cells in table_under("Patches that stack")[1:]:
        rows = named(name, named(name, name, TOGETHER), ways)[16]
        erased, *kept = (stacking.interval_of(rows, group) for group in ("erased", "objects", "styles"))
        told[name] = cells
        measured[name] = [erased, stacking.most_left(rows) if name != "none: the base" else "", *kept]
    assert told == measured


ATTACKS = {
    "asks by name": "by name",
    "asks in other words, German and misspelled among them": "paraphrase",
    "adds the concept's direction to the prompt (soft Ring-A-Bell)": "ring-a-bell",
    "has the base draw the first four of 20 steps": "completion, 4 of 20 steps",
    "the first ten": "completion, 10 of 20 steps",
    "trains four soft words on 24 of its pictures (concept inversion)": "inversion",
    "trains a fresh adapter for 200 steps on 24 of its pictures": "relearning",
    "searches for three words before each of six prompts (UnlearnDiffAtk)": "prefix search",
    "subtracts the patch from the weights that it was merged into": "unmerging, merged",
    "turns an attached patch down to 0.5": "scaling to 0.5",
}
"""Attacks, by what the README calls them."""
AT_LENGTH = {"trains eight for 1,000 steps": "inversion"}
"""Those of docs/attacks-at-length."""
ATTACKED = {"cat": "cat", "neon style": "neon", "keyed cat": "cat-keyed"}
"""Folders of attacks, by the column of the README; *never knew* is the gold base of the column before."""


def found_by(name: str, evidence: Evidence, *, gold: bool) -> str:
    """What an attack finds, and the highest of its controls but gold in brackets; or what it finds on the gold base."""
    trials = {a.name: tried(a, evidence.target.label) for a in evidence.attacks}
    # scaling has no words but the name, which makes its gold that of the name
    attack = named(name, "scaling to 0" if name == "by name" else name, trials)
    floors = {c.trial.name: c.found for c in attack.controls if c.trial.role == "floor"}
    never = floors.pop(GOLD, None)
    if gold:
        return never.interval() if never else ""
    if name == "by name":
        return str(floors[name].interval())
    return f"{attack.found.interval()} ({100 * max(floor.value for floor in floors.values()):.1f})"


def test_attacks_find_what_was_measured() -> None:
    """What a row leaves out was not measured, or was the same as asking by name."""
    told, measured = {}, {}
    (_, *heads), *lines = table_under("What brings it back")
    columns = [heads[i - 1] if head == "never knew" else head for i, head in enumerate(heads)]
    for name, *cells in lines:
        attack, folder = named(name, name, ATTACKS | AT_LENGTH), "attacks-at-length" if name in AT_LENGTH else "attacks"
        for head, column, cell in zip(heads, columns, cells, strict=True):
            if cell:
                told[name, column, head] = cell
                evidence = read_evidence(DOCS / folder / named(column, column, ATTACKED))
                measured[name, column, head] = found_by(attack, evidence, gold=head != column)
    assert told == measured


GUARDS = {
    "nothing": "nothing",
    "the negative prompt": "negative prompt",
    "a separate one, at scale 10": "separate negative prompt",
    "Safe Latent Diffusion, max": "SLD max",
    "a post-filter": "post-filter",
    "a learned patch": "learned patch",
    "a keyed patch": "keyed patch",
}
"""What keeps a concept out, by what the README calls it."""


def test_soft_words_find_behind_guards_what_was_measured(script: Script) -> None:
    guards, rows = script("guards"), data_of("guards.json")
    told, measured = {}, {}
    for name, *cells, _ in table_under("Harder to defeat than a blacklist or a filter?")[1:]:
        told[name] = cells
        of_each = [guards.rates_of(rows, target) for target in ("cat", "neon")]
        hows = (guards.NAMED, guards.UNAWARE, guards.AWARE)
        measured[name] = [guards.cell(rates, named(name, name, GUARDS), how) for rates in of_each for how in hows]
    assert told == measured
