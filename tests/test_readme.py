"""What the README says of commands, fields and recipes is what the package has."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import esd_lora
from esd_lora.cli import RECIPES, app
from esd_lora.evaluate.answers import read_answers
from esd_lora.evaluate.ways import BASELINES
from esd_lora.recipe import Concept, Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
