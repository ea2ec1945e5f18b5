"""`Recipe`: what a user writes to have a patch made. Typed, frozen, an unknown key is an error, all errors at once.

A recipe comes from a YAML file, from options of the command line, or from both (options win). What the trainer gets and
what the patch carries is the resolved recipe: every field with its value.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from esd_lora.errors import RecipeError, unreadable

Layers = Literal["esd-x", "esd-x-strict", "esd-u", "full"]
DType = Literal["fp32", "bf16", "fp16"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


def _sequence(value: object) -> object:
    """One value stands for a list of one."""
    return [value] if isinstance(value, (str, Mapping)) else value


Words = Annotated[str, AfterValidator(_not_blank)]


class Concept(BaseModel):
    """One thing to erase. In a recipe, plain words stand for `{erase: words}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    erase: Words = Field(description="The concept, in words: c of the equation.")
    from_: Words | None = Field(
        None,
        alias="from",
        description="Erase the concept only as an attribute of this prompt, which is what the patch is trained on; "
        "the prompt itself is the anchor, so that the rest of it stays. Not with closed forms.",
    )
    replace_with: Words | None = Field(
        None, description="Draw this instead: the anchor a of the equation. Without it the anchor is the empty prompt."
    )
    synonyms: Annotated[tuple[Words, ...], BeforeValidator(_sequence)] = Field(
        (),
        description="Other words for the concept: closed-form keys answer to them too, the default `preserve` leaves them "
        "out, and with `robust` the concept is erased for them as well.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, value: object) -> object:
        return {"erase": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _differ(self) -> Concept:
        for name, other in (("from", self.from_), ("replace_with", self.replace_with)):
            if other is not None and other.lower() == self.erase.lower():
                raise ValueError(f"{name} must differ from erase, both are {self.erase!r}")
        return self

    @property
    def prompt(self) -> str:
        """What the student is asked with: the prompt to erase from, or the concept itself."""
        return self.from_ or self.erase

    @property
    def anchor(self) -> str:
        """What the student shall predict instead: replacement, the prompt to erase from, or nothing."""
        return self.replace_with or self.from_ or ""


class Recipe(BaseModel):
    """How to make one patch. Symbols in the descriptions are those of `esd_lora.esd`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: Words = Field(
        description="`emoji`, a folder with a diffusers pipeline, a single `.safetensors` checkpoint, or a Hub id."
    )
    revision: Words | None = Field(None, description="Branch, tag or commit of the base on the Hub.")
    concepts: Annotated[tuple[Concept, ...], BeforeValidator(_sequence)] = Field(
        min_length=1, description="What to erase: one concept or several, together in one patch."
    )
    preserve: Annotated[tuple[str, ...], BeforeValidator(_sequence)] | None = Field(
        None,
        description="Prompts whose pictures must stay. Default: a list of everyday subjects and styles without the "
        "words of the concepts, and the empty prompt.",
    )
    preserve_weight: float = Field(4.0, ge=0, description="λ: weight of the preservation loss; 0 turns it off.")
    preserve_beside: bool = Field(
        False,
        description="Ask for half of what is preserved beside the concept, as `p, c`: p stays there, much of which goes with a "
        "style otherwise. Less of the style is erased for it, and with an object, beside which p stays anyway, a little "
        "less is kept. Not for concepts with a `from` or `replace_with`.",
    )
    layers: Layers = Field(
        "esd-x",
        description="`esd-x`: cross-attention q, k, v, out. `esd-x-strict`: cross-attention k, v. `esd-u`: "
        "self-attention. `full`: both. In the joint attention of Stable Diffusion 3 and FLUX, the projections of the words, "
        "their k and v, those of the picture, and all.",
    )
    keys: Literal["learned", "closed-form"] = Field(
        "learned",
        description="`learned`: for one patch, of one concept or of several together. `closed-form`: for patches that are made "
        "apart and stacked: lora_A of cross-attention k and v is computed from the text encoder's vocabulary; by default "
        "`layers` is then `esd-x-strict`, `objective` `closed-form`, `rank` 2, `eta` 0.5 and `preserve_weight` 2. With "
        "`objective: paper` lora_B is trained from what the closed form gives, which wants an `lr` of about 2e-2.",
    )
    rank: int = Field(4, ge=1, description="Rank of the adapters; alpha equals it.")
    init: Literal["differences", "random"] = Field(
        "differences",
        description="What lora_A starts from: `differences`, the directions in which the concept moves what a layer reads, or "
        "`random` numbers, with which it depends on the seed whether a patch learns in time.",
    )
    objective: Literal["paper", "authors", "closed-form"] = Field(
        "paper",
        description="`paper`: the anchor minus η times the guidance. `authors`: as their later code, anchored on the "
        "concept itself where there is no other anchor, so that `eta` is their negative_guidance (paper's η plus one). "
        "`closed-form`: the words' keys and values moved to the anchor's without training, as UCE; `eta`, by default 0.5, "
        "`preserve_weight`, by default 2, `rank` and `preserve` still count.",
    )
    eta: float = Field(1.5, ge=0, description="η: how far to push away from the concept; 0 moves to the anchor.")
    x_t: Literal["base", "edited"] = Field(
        "base",
        description="Whose denoising trajectories are trained on: the frozen model's, as the authors' current code, "
        "or the edited model's own, as the paper.",
    )
    refresh_every: int = Field(20, ge=1, description="With `x_t: edited`, steps between new trajectories.")
    trajectories: int = Field(4, ge=1, description="Trajectories per concept.")
    trajectory_steps: int = Field(
        20,
        ge=2,
        le=500,
        description="Denoising steps S of a trajectory. Prompts to preserve get no more than training can use once.",
    )
    guidance_scale: float = Field(
        3.0,
        ge=1,
        description="Classifier-free guidance of the concepts' trajectories: 1 for turbo models, which have none. FLUX.1-dev "
        "and latent consistency models are told it instead, in training too, so that what they predict is guided already and "
        "η counts from there.",
    )
    steps: int = Field(60, ge=1, description="Gradient steps.")
    batch_size: int = Field(2, ge=1, description="Examples a step; as many preservation examples come on top.")
    lr: float = Field(5e-3, gt=0, lt=1e38, description="Learning rate of AdamW.")
    lr_schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule, by diffusers' names."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up of the learning rate.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    robust: int = Field(
        0,
        ge=0,
        description="Rounds of an adversary, evenly spaced over the steps: each finds soft words with which the edited model "
        "still draws the concept, and from then on it is erased for them too; 0 for none.",
    )
    resolution: int | None = Field(
        None, ge=8, multiple_of=8, description="Side of the pictures in pixels. Default: the base's own."
    )
    dtype: DType = Field("fp32", description="Precision of the frozen base; the adapters are always float32.")
    gradient_checkpointing: bool = Field(False, description="Less memory for a third more time.")
    seed: int = Field(0, ge=0, lt=2**63, description="Everything random follows from it.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints that `--resume` starts from.")
    sample_every: int = Field(0, ge=0, description="Steps between sample pictures; 0 for none.")
    log_with: Literal["tensorboard", "wandb"] | None = Field(None, description="Where to log the losses.")

    @model_validator(mode="before")
    @classmethod
    def _closed_form_defaults(cls, value: object) -> object:
        if not isinstance(value, Mapping) or "closed-form" not in (value.get("keys"), value.get("objective")):
            return value
        filled = {"layers": "esd-x-strict", "preserve_weight": 2.0, **value}
        if value.get("keys") == "closed-form":
            solved = "closed-form" if filled["layers"] == "esd-x-strict" else "paper"
            filled = {"objective": solved, "rank": 2, **filled}
        # farther from the concept than that, what is drawn in its place is a texture and nothing else
        return {"eta": 0.5, **filled} if filled.get("objective") == "closed-form" else filled

    @model_validator(mode="after")
    def _fields_agree(self) -> Recipe:
        for i, concept in enumerate(self.concepts):
            if concept in self.concepts[:i]:
                raise ValueError(f"concepts: {concept.erase!r} comes twice")
        erased = {words.lower() for c in self.concepts if not c.from_ for words in (c.erase, *c.synonyms)}
        for prompt in self.preserve or ():
            if prompt.strip().lower() in erased:
                raise ValueError(f"preserve: {prompt!r} is what is to be erased; leave it out")
        if self.warmup_steps and self.lr_schedule == "constant":
            raise ValueError("warmup_steps: lr_schedule constant has no warm-up; use constant_with_warmup")
        if self.keys == "closed-form" and self.layers == "esd-u":
            raise ValueError("keys: closed-form is for cross-attention, which layers esd-u does not adapt")
        if self.objective == "closed-form" and self.layers != "esd-x-strict":
            raise ValueError(f"objective: closed-form is for layers esd-x-strict, not {self.layers}")
        if "closed-form" in (self.keys, self.objective) and any(concept.from_ for concept in self.concepts):
            raise ValueError(
                "concepts.from: closed forms move words wherever they stand, which leaves what is to go from one prompt alone; "
                "use keys: learned, and an objective that is trained"
            )
        if self.objective == "authors" and self.eta < 1 and any(not c.anchor for c in self.concepts):
            raise ValueError(
                f"eta: must be at least 1 with objective authors, where 0 changes nothing, got {self.eta:g}"
            )
        alone = all(concept.anchor for concept in self.concepts)
        if self.preserve_beside and (alone or not self.preserve_weight or self.objective == "closed-form"):
            raise ValueError(
                "preserve_beside: needs an objective that is trained, a preserve_weight above 0, and a concept without from or "
                "replace_with"
            )
        if self.preserve_beside and self.preserve is not None and not any(p.strip() for p in self.preserve):
            raise ValueError("preserve_beside: needs prompts to preserve, and preserve names none that says anything")
        if self.objective == "closed-form" and (self.log_with or self.sample_every or self.x_t == "edited"):
            raise ValueError(
                "log_with, sample_every, x_t: nothing is trained with objective closed-form; leave them out"
            )
        if self.robust and self.objective == "closed-form":
            raise ValueError("robust: nothing is trained with objective closed-form; use objective: paper")
        if self.robust and self.robust >= self.steps:
            raise ValueError(
                f"robust: must be below the {self.steps} steps, for each round is between two, got {self.robust}"
            )
        return self

    def eta_of(self, concept: Concept) -> float:
        """The paper's η for a concept: the authors' is one more where their anchor is the concept itself."""
        return self.eta - 1 if self.objective == "authors" and not concept.anchor else self.eta

    def to_yaml(self) -> str:
        """The recipe as YAML; reading it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, in the order of the fields."""
        return self.model_dump(mode="json", by_alias=True)

    def equals(self, values: object) -> bool:
        """Whether these are its keys and values; a key that an earlier version did not know yet has its default."""
        try:
            return Recipe.model_validate(values) == self
        except ValidationError:
            return False


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, not yet validated.

    Raises:
        RecipeError: The file is missing, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is a folder" if path.is_dir() else unreadable(error)
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from error
    data = parse_yaml(text, source=path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, such as `base: emoji`")
    return data


def parse_yaml(text: str, *, source: Path) -> Any:
    """What the YAML text of a file says.

    Raises:
        RecipeError: It is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{source}{where}: not YAML: {getattr(error, 'problem', None) or 'cannot be read'}"
        ) from error


def make_recipe(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """The validated recipe.

    Args:
        values: Keys and values, from YAML or options.
        source: What to call the origin in messages.

    Raises:
        RecipeError: One line for each problem, with its place, what is wrong and what would be right.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        errors = error.errors()
        places = [e["loc"] for e in errors]
        # a list that is too short because its items are wrong is no problem of its own
        problems = [
            _explain(e)
            for e in errors
            if e["type"] != "too_short" or not any(p != e["loc"] and p[:1] == e["loc"][:1] for p in places)
        ]
    head = f"{source}: " + ("" if len(problems) == 1 else f"{len(problems)} problems\n  ")
    raise RecipeError(head + "\n  ".join(problems))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe of a YAML file, with `key=value` overrides.

    Raises:
        RecipeError: The file or an override is wrong; all problems at once.
    """
    return make_recipe({**read_recipe(Path(path)), **parse_overrides(overrides)}, source=str(path))


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """The keys and values of `key=value` strings; a value is read as YAML.

    Raises:
        RecipeError: A pair has no `=` or its value is not YAML.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {pair}: write key=value, such as --set rank=8")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"--set {pair}: the value is not YAML") from error
    return values


def _explain(error: Mapping[str, Any]) -> str:
    """One problem of pydantic's as `place: what is wrong, what would be right`."""
    place = ".".join(str(p) for p in error["loc"] if p not in ("tuple", "function-before"))
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = list(Concept.model_fields) if place.startswith("concepts") else list(Recipe.model_fields)
        known = ["from" if k == "from_" else k for k in known]
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{place}: unknown key; {hint}"
    if kind == "missing":
        return f"{place}: missing"
    if kind == "too_short":
        return f"{place}: name at least one"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if kind == "value_error" else f", got {given!r}"
    return (f"{place}: " if place else "") + f"{message[0].lower()}{message[1:]}{shown}"
