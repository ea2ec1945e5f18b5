"""Recipes: what is accepted, and what is said about what is not. Messages are compared whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import esd_lora
from esd_lora.errors import RecipeError
from esd_lora.recipe import Concept, Recipe, load_recipe, make_recipe, parse_overrides, read_recipe

PACKAGE = Path(esd_lora.__file__).parent
RECIPES = sorted((PACKAGE.parent / "recipes").rglob("*.yaml"))
MINIMAL = {"base": "emoji", "concepts": "cat"}


def problem(**values: Any) -> str:
    """What is said about a recipe that is wrong."""
    with pytest.raises(RecipeError) as caught:
        make_recipe({**MINIMAL, **values})
    return str(caught.value)


def test_what_is_left_out_has_its_documented_default() -> None:
    recipe = make_recipe(MINIMAL)
    given = {"base": "emoji", "concepts": [{"erase": "cat", "from": None, "replace_with": None, "synonyms": []}]}
    assert recipe.to_dict() == given | {
        "revision": None,
        "preserve": None,
        "preserve_weight": 4.0,
        "preserve_beside": False,
        "layers": "esd-x",
        "keys": "learned",
        "rank": 4,
        "init": "differences",
        "objective": "paper",
        "eta": 1.5,
        "x_t": "base",
        "refresh_every": 20,
        "trajectories": 4,
        "trajectory_steps": 20,
        "guidance_scale": 3.0,
        "steps": 60,
        "batch_size": 2,
        "lr": 5e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "robust": 0,
        "resolution": None,
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "seed": 0,
        "checkpoint_every": 50,
        "sample_every": 0,
        "log_with": None,
    }


@pytest.mark.parametrize(
    ("concept", "prompt", "anchor"),
    [
        ({"erase": "hat"}, "hat", ""),
        ({"erase": "hat", "from": "cowboy"}, "cowboy", "cowboy"),
        ({"erase": "hat", "replace_with": "cap"}, "hat", "cap"),
        ({"erase": "hat", "from": "cowboy", "replace_with": "man"}, "cowboy", "man"),
    ],
)
def test_prompt_and_anchor_follow_from_the_concept(concept: dict[str, str], prompt: str, anchor: str) -> None:
    made = Concept.model_validate(concept)
    assert (made.prompt, made.anchor) == (prompt, anchor)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"concepts": ["cat", {"erase": "hat", "from": "cowboy"}], "preserve": ["", "Ein Bär: süß"], "lr": 3e-5},
        {"concepts": {"erase": "no", "replace_with": "1e-4"}, "revision": "0123", "resolution": 512, "seed": 2**62},
        {"preserve": [], "log_with": "wandb", "gradient_checkpointing": True, "x_t": "edited", "eta": 0},
    ],
)
def test_yaml_of_a_recipe_reads_as_an_equal_recipe(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe({**MINIMAL, **values})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_recipes_of_the_same_values_are_the_same_text() -> None:
    assert make_recipe({"concepts": ["cat"], "base": "emoji"}).to_yaml() == make_recipe(MINIMAL).to_yaml()


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("0.0001", 1e-4), ("1", 1.0)])
def test_a_learning_rate_is_a_number_however_it_is_written(text: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: emoji\nconcepts: cat\nlr: {text}\n")  # YAML reads 1e-4 as words
    assert load_recipe(path).lr == value
    assert load_recipe(path, ["lr=0.5", f"lr={text}"]).lr == value


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe(MINIMAL).rank = 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 8}, "recipe: rnak: unknown key; did you mean rank?"),
        ({"stesp": 8}, "recipe: stesp: unknown key; did you mean steps?"),
        (
            {"zzz": 8},
            f"recipe: zzz: unknown key; known keys: {', '.join(Recipe.model_fields)}",
        ),
        (
            {"concepts": {"erase": "cat", "form": "dog"}},
            "recipe: concepts.0.form: unknown key; did you mean from?",
        ),
        (
            {"concepts": ["dog", {"erase": "cat", "xyz": "dog"}]},
            "recipe: concepts.1.xyz: unknown key; known keys: erase, from, replace_with, synonyms",
        ),
        ({"concepts": {"from": "dog"}}, "recipe: concepts.0.erase: missing"),
        ({"concepts": ""}, "recipe: concepts.0.erase: must not be empty"),
        ({"concepts": " \t"}, "recipe: concepts.0.erase: must not be empty"),
        ({"concepts": ["cat", ""]}, "recipe: concepts.1.erase: must not be empty"),
        (
            {"keys": "closed-form", "layers": "esd-u"},
            "recipe: keys: closed-form is for cross-attention, which layers esd-u does not adapt",
        ),
        (
            {"objective": "authors", "eta": 0.5},  # 1 is η = 0, which their SDXL trainer has by default
            "recipe: eta: must be at least 1 with objective authors, where 0 changes nothing, got 0.5",
        ),
        (
            {"objective": "closed-form", "layers": "full"},
            "recipe: objective: closed-form is for layers esd-x-strict, not full",
        ),
        (
            {"warmup_steps": 5, "lr_schedule": "constant"},
            "recipe: warmup_steps: lr_schedule constant has no warm-up; use constant_with_warmup",
        ),
        *(
            (
                {"objective": "closed-form", **others},
                "recipe: log_with, sample_every, x_t: nothing is trained with objective closed-form; leave them out",
            )
            for others in ({"log_with": "tensorboard"}, {"sample_every": 5}, {"x_t": "edited"})
        ),
        (
            {"preserve_beside": True, "preserve": [""]},
            "recipe: preserve_beside: needs prompts to preserve, and preserve names none that says anything",
        ),
        *(
            (
                {"preserve_beside": True, **others},
                "recipe: preserve_beside: needs an objective that is trained, a preserve_weight above 0, and a concept without "
                "from or replace_with",
            )
            for others in (
                {"objective": "closed-form"},
                {"preserve_weight": 0},
                {"concepts": {"erase": "cat", "replace_with": "dog"}},
            )
        ),
        ({"robust": -1}, "recipe: robust: input should be greater than or equal to 0, got -1"),
        (
            {"robust": 1, "objective": "closed-form"},
            "recipe: robust: nothing is trained with objective closed-form; use objective: paper",
        ),
        (
            {"robust": 1, "keys": "closed-form"},
            "recipe: robust: nothing is trained with objective closed-form; use objective: paper",
        ),
        (
            {"robust": 60},
            "recipe: robust: must be below the 60 steps, for each round is between two, got 60",
        ),
        ({"concepts": []}, "recipe: concepts: name at least one"),
        ({"concepts": ["cat", "dog", "cat"]}, "recipe: concepts: 'cat' comes twice"),
        ({"preserve": ["dog", " Cat"]}, "recipe: preserve: ' Cat' is what is to be erased; leave it out"),
        (
            {"concepts": {"erase": "cat", "synonyms": "kitty"}, "preserve": "kitty"},
            "recipe: preserve: 'kitty' is what is to be erased; leave it out",
        ),
        ({"concepts": {"erase": "cat", "from": " "}}, "recipe: concepts.0.from: must not be empty"),
        ({"concepts": {"erase": "cat", "replace_with": ""}}, "recipe: concepts.0.replace_with: must not be empty"),
        (
            {"concepts": {"erase": "cat", "from": "Cat "}},
            "recipe: concepts.0: from must differ from erase, both are 'cat'",
        ),
        (
            {"concepts": {"erase": "cat", "replace_with": "CAT"}},
            "recipe: concepts.0: replace_with must differ from erase, both are 'cat'",
        ),
        ({"concepts": {"erase": 1984}}, "recipe: concepts.0.erase: input should be a valid string, got 1984"),
        ({"base": " "}, "recipe: base: must not be empty"),
        ({"base": 3}, "recipe: base: input should be a valid string, got 3"),
        ({"preserve": ["dog", 3]}, "recipe: preserve.1: input should be a valid string, got 3"),
        ({"rank": 0}, "recipe: rank: input should be greater than or equal to 1, got 0"),
        (
            {"rank": 1.5},
            "recipe: rank: input should be a valid integer, got a number with a fractional part, got 1.5",
        ),
        (
            {"rank": "many"},
            "recipe: rank: input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ({"rank": None}, "recipe: rank: input should be a valid integer, got None"),
        *(
            (
                {"concepts": {"erase": "hat", "from": "cowboy"}, field: "closed-form"},
                "recipe: concepts.from: closed forms move words wherever they stand, which leaves what is to go from one "
                "prompt alone; use keys: learned, and an objective that is trained",
            )
            for field in ("keys", "objective")
        ),
        ({"lr": 0}, "recipe: lr: input should be greater than 0, got 0"),
        ({"lr": float("nan")}, "recipe: lr: input should be a finite number, got nan"),
        ({"lr": ".inf"}, "recipe: lr: input should be a valid number, unable to parse string as a number, got '.inf'"),
        ({"eta": float("inf")}, "recipe: eta: input should be a finite number, got inf"),
        ({"eta": -0.5}, "recipe: eta: input should be greater than or equal to 0, got -0.5"),
        ({"preserve_weight": -1}, "recipe: preserve_weight: input should be greater than or equal to 0, got -1"),
        ({"guidance_scale": 0.5}, "recipe: guidance_scale: input should be greater than or equal to 1, got 0.5"),
        ({"max_grad_norm": 0}, "recipe: max_grad_norm: input should be greater than 0, got 0"),
        ({"trajectory_steps": 1}, "recipe: trajectory_steps: input should be greater than or equal to 2, got 1"),
        ({"resolution": 500}, "recipe: resolution: input should be a multiple of 8, got 500"),
        ({"seed": -1}, "recipe: seed: input should be greater than or equal to 0, got -1"),
        ({"seed": 2**63}, f"recipe: seed: input should be less than {2**63}, got {2**63}"),
        (
            {"layers": "esd-y"},
            "recipe: layers: input should be 'esd-x', 'esd-x-strict', 'esd-u' or 'full', got 'esd-y'",
        ),
        ({"dtype": "fp8"}, "recipe: dtype: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ({"x_t": "own"}, "recipe: x_t: input should be 'base' or 'edited', got 'own'"),
        ({"objective": "esd"}, "recipe: objective: input should be 'paper', 'authors' or 'closed-form', got 'esd'"),
        ({"log_with": "csv"}, "recipe: log_with: input should be 'tensorboard' or 'wandb', got 'csv'"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_remedy(values: dict[str, Any], message: str) -> None:
    assert problem(**values) == message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({}, source="empty.yaml")
    assert str(caught.value) == "empty.yaml: 2 problems\n  base: missing\n  concepts: missing"


def test_all_mistakes_are_named_at_once() -> None:
    message = problem(concepts=["", {"erase": "a", "from": "a"}], rank=0, dtype="fp8", sede=1)
    assert message.splitlines() == [
        "recipe: 5 problems",
        "  concepts.0.erase: must not be empty",
        "  concepts.1: from must differ from erase, both are 'a'",
        "  rank: input should be greater than or equal to 1, got 0",
        "  dtype: input should be 'fp32', 'bf16' or 'fp16', got 'fp8'",
        "  sede: unknown key; did you mean seed?",
    ]


def test_overrides_are_read_as_yaml_and_win(tmp_path: Path) -> None:
    assert parse_overrides(["rank=8", "preserve=[a, 'b=c']", "resolution=null", " lr =x=y"]) == {
        "rank": 8,
        "preserve": ["a", "b=c"],
        "resolution": None,
        "lr": "x=y",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text("base: emoji\nconcepts: cat\nrank: 2\nsteps: 7\n")
    recipe = load_recipe(path, ["rank=8"])
    assert (recipe.rank, recipe.steps) == (8, 7)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("rank", "--set rank: write key=value, such as --set rank=8"),
        ("=8", "--set =8: write key=value, such as --set rank=8"),
        (" =8", "--set  =8: write key=value, such as --set rank=8"),
        ("preserve=[a", "--set preserve=[a: the value is not YAML"),
        ("rank=!!python/object:os.system x", "--set rank=!!python/object:os.system x: the value is not YAML"),
        ("concepts=2020-13-45", "--set concepts=2020-13-45: the value is not YAML"),  # a date that there is not
    ],
)
def test_overrides_that_cannot_be_read_are_named(pair: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_overrides(["steps=3", pair])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: cannot read the recipe: No such file or directory"),
        (b"\xff\xfe\x00", "{path}: cannot read the recipe: not a text file"),
        (b"base: [emoji\nrank: 3\n", "{path}, line 2: not YAML: expected ',' or ']', but got ':'"),
        (b"base: 2020-13-45\n", "{path}: not YAML: cannot be read"),
        (b"", "{path}: a recipe is a mapping of keys to values, such as `base: emoji`"),
        (b"- base\n", "{path}: a recipe is a mapping of keys to values, such as `base: emoji`"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value) == message.format(path=path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot read the recipe: is a folder"


def test_recipes_are_shipped() -> None:
    assert len(RECIPES) >= 13


@pytest.mark.parametrize("path", RECIPES, ids=[p.relative_to(PACKAGE.parent).as_posix() for p in RECIPES])
def test_a_shipped_recipe_loads_and_says_first_what_it_is(path: Path) -> None:
    assert re.match(r"# \S", path.read_text(encoding="utf-8"))
    recipe = load_recipe(path)
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(Recipe.model_fields)
    assert recipe.concepts


@pytest.mark.parametrize("field", list(Recipe.model_fields))
def test_every_field_of_a_recipe_is_read_by_the_package(field: str) -> None:
    code = "\n".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py") if p.name != "recipe.py")
    assert re.search(rf"\b(recipe|wanted)\.{field}(_of)?\b", code)  # η is read for each concept, by `eta_of`
