"""`verify`: whether a patch is what its card says, checked and measured again by whoever is about to use it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from esd_lora.bases import Base, load_base, quick_dtype
from esd_lora.card import WORST, attack_rows, evidence_of, rates_of, results_of, rows_of, scores_of, target_of
from esd_lora.compose import check_fits
from esd_lora.emoji.evaluators import load_evaluator
from esd_lora.errors import BaseModelError, PatchError, RepositoryError
from esd_lora.evaluate.page import ATTACKS
from esd_lora.evaluate.rates import Rate, wilson
from esd_lora.evaluate.scores import AttributeScores, Scores, draw, score, score_attribute
from esd_lora.exporting import layers_of
from esd_lora.hub import HASH, REFERENCE, download
from esd_lora.patch import FILE_NAME, Patch, load_patch
from esd_lora.report import Job, jobs_of

INTERVAL = re.compile(r"\| *[\d.]+ to [\d.]+ *\|")
"""What a row of a card's table of scores has, and no other row."""


@dataclass(frozen=True)
class Check:
    """Something that was looked at: right, wrong, or None where it could not be."""

    what: str
    ok: bool | None
    found: str


@dataclass(frozen=True)
class Claim:
    """A rate that the patch claims, beside what was measured now."""

    target: str
    what: str
    claimed: Rate
    measured: Rate

    @property
    def holds(self) -> bool:
        """Whether the two intervals have a value in common, and those of the base's own rates too."""
        pairs = [[(r.low, r.high) for r in (self.claimed, self.measured)]]
        if self.claimed.base is not None and self.measured.base is not None:
            pairs.append([wilson(r.base, r.n) for r in (self.claimed, self.measured) if r.base is not None])
        return all(a[0] <= b[1] and b[0] <= a[1] for a, b in pairs)


@dataclass(frozen=True)
class Verification:
    """All that `verify` found."""

    checks: list[Check]
    claims: list[Claim]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and every claim holds."""
        return all(c.ok is not False for c in self.checks) and all(c.holds for c in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        claims = [{**asdict(c), "holds": c.holds} for c in self.claims]
        return {"ok": self.ok, "checks": [asdict(c) for c in self.checks], "claims": claims}


def verify(
    reference: str,
    *,
    target_seeds: int = 2,
    kept_seeds: int = 1,
    device: str | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> Verification:
    """What is right and wrong with a patch: file, hash, card, base, and its scores measured again where that can be.

    Args:
        reference: A folder, a file, or a Hub id.
        target_seeds: Pictures of each cell of an erased concept; few, so that intervals are wide.
        kept_seeds: Pictures of every other cell.
        device: By default the first of cuda, mps, cpu that is there.
        on_picture: Called with the number of pictures drawn and their total.

    Raises:
        PatchError: There is no patch, or it cannot even be read.
        RepositoryError: See `hub.find_patch`.
        HubError: See `hub.download`.
    """
    file, card, from_hub = _places(reference)
    patch = load_patch(file)
    kept = f"{len(patch.ranks)} layers, {len(patch.tensors)} tensors, all finite"
    checks = [Check("file", True, kept), _check_hash(file, from_hub=from_hub), _check_card(patch, card)]
    if patch.info.get("base", {}).get("name") != "emoji":
        unmeasured = Check("scores", None, "no evaluator for this base is here yet; not measured")
        return Verification([*checks, _check_layers(patch), unmeasured], [])
    base = load_base("emoji", device=device, dtype=quick_dtype(device))
    checks.append(_check_base(patch, base))
    claimed = scores_of(patch)
    if not claimed or not checks[-1].ok:
        why = "none are claimed" if not claimed else "not measured, for it does not fit"
        return Verification([*checks, Check("scores", None, why)], [])
    jobs = {_named(job): job for job in jobs_of(patch, target_seeds=target_seeds, kept_seeds=kept_seeds)}
    unknown = [target_of(s) for s in claimed if target_of(s) not in jobs]
    if unknown:
        found = f"it claims some for {unknown[0]}, which its recipe does not erase"
        return Verification([*checks, Check("scores", False, found)], [])
    total, done, claims = 2 * sum(len(jobs[target_of(s)].cells) for s in claimed), 0, []

    def batch(count: int) -> None:
        nonlocal done
        done += count
        if on_picture:
            on_picture(done, total)

    for told in claimed:
        now = _measure(base, patch, jobs[target_of(told)], batch)
        claims += _claims(told, now)
    return Verification(checks, claims)


def _claims(told: Scores | AttributeScores, now: Scores | AttributeScores) -> list[Claim]:
    """What scores claim beside what was measured, the three that lost most among it: claimed ones against these, by rank."""
    claimed, rates = ({k: r for k, r in rates_of(s).items() if not k.startswith(WORST)} for s in (told, now))
    claims = [Claim(target_of(told), k, r, rates[k]) for k, r in claimed.items() if k in rates]
    if isinstance(told, Scores) and isinstance(now, Scores):
        pairs = zip(told.worst.items(), now.worst.items(), strict=False)
        for (name, one), (other, found) in pairs:
            claims.append(Claim(told.target, f"{WORST}{name}{'' if name == other else f', now {other}'}", one, found))
    return claims


def _places(reference: str) -> tuple[Path, Path | None, bool]:
    """Where a patch's file and its card are, None where there is no card; whether they are of the Hub."""
    match = REFERENCE.fullmatch(reference)
    if Path(reference).exists() or match is None:
        file = Path(reference) / FILE_NAME if Path(reference).is_dir() else Path(reference)
        return file, beside if (beside := file.with_name("README.md")).is_file() else None, False
    file = download(match["repo"], match["revision"])
    card, _ = (_download_if_any(match["repo"], file.parent.name, name) for name in ("README.md", ATTACKS))
    return file, card, True


def _download_if_any(repo: str, commit: str, file: str) -> Path | None:
    """Where a file of a commit is in the hub's cache, beside the others; None if the repository has none."""
    try:
        return download(repo, commit, file=file)
    except RepositoryError:
        return None


def _check_hash(file: Path, *, from_hub: bool) -> Check:
    """`download` has compared what came from the Hub with the hash there, where the cache tells it by links to files so named.

    A local file has nothing to be compared with.
    """
    if not from_hub:
        return Check("hash", None, "a local file; nothing to compare it with")
    name = file.resolve().name
    if not HASH.fullmatch(name):
        return Check("hash", None, "the hub's cache has no links here, by which it would tell the hash")
    return Check("hash", True, f"SHA-256 as the Hub tells it: {name[:16]} …")


def _check_card(patch: Patch, card: Path | None) -> Check:
    """Whether the card names this patch's tensors, and claims what the patch's header does."""
    if card is None:
        return Check("card", None, "there is none")
    try:
        text = card.read_text(encoding="utf-8")
        told = {(r.dataset_name, r.metric_name): r.metric_value for r in ModelCard(text).data.eval_results or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return Check("card", False, "cannot be read")
    if patch.digest not in text:
        return Check("card", False, "is about another patch; its SHA-256 is not that of these tensors")
    scores = scores_of(patch)
    own = {(r.dataset_name, r.metric_name): r.metric_value for s in scores for r in results_of(s)}
    try:
        evidence = evidence_of(patch, card.parent)
    except PatchError as error:
        return Check("card", False, str(error))
    rows = [row for s in scores for row in rows_of(s)] + (attack_rows(evidence) if evidence else [])
    shown = [line for line in text.split("\n") if line[:1] == "|" == line[-1:] and INTERVAL.search(line)]
    if told != own or Counter(shown) != Counter(rows):
        beside = f" and {ATTACKS}" if evidence else ""
        return Check("card", False, f"claims other scores than the patch's own header{beside}")
    return Check("card", True, "names these tensors, and claims what the patch's header does")


def _check_base(patch: Patch, base: Base) -> Check:
    """Whether the patch fits the base, whose weights are the ones that it was made for."""
    try:
        check_fits(patch, base)
    except PatchError as error:
        return Check("base", False, str(error))
    same = patch.info["base"].get("fingerprint") == base.fingerprint
    return Check(
        "base", same, "emoji, these very weights" if same else "made for other weights than those of emoji here"
    )


def _check_layers(patch: Patch) -> Check:
    """Whether the base's configs have the patch's layers, where they can be had."""
    name, revision = (patch.info.get("base", {}).get(k) for k in ("name", "revision"))
    if name is None:
        return Check("base", None, "the patch names no base")
    try:
        have = layers_of(name, revision)
    except BaseModelError as error:
        return Check("base", None, str(error))
    wrong = [n for n, shape in patch.shapes.items() if have.get(n) != shape]
    if wrong:
        return Check("base", False, f"{name} has no {wrong[0]} of this shape")
    return Check("base", True, f"{name} has all of its layers; its weights were not looked at")


def _named(job: Job) -> str:
    """The name under which `target_of` knows the scores of a job."""
    return f"hat from {job.wearer}" if job.wearer else job.target


def _measure(base: Base, patch: Patch, job: Job, on_batch: Callable[[int], None]) -> Scores | AttributeScores:
    """The scores of one concept on these cells, now."""
    evaluator = load_evaluator("measure")
    before, after = (evaluator.judge(draw(base, job.cells, p, on_batch=on_batch)) for p in ([], [patch]))
    how = partial(score_attribute, job.wearer) if job.wearer else partial(score, job.target)
    return how(job.cells, after, before, evaluator)
