"""`verify`: a patch that is what it says passes, and each way not to be is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from fakehub import FakeHub
from test_card import attacked
from test_hub import hub  # noqa: F401 (a fixture)

from esd_lora import verifying
from esd_lora.bases import Base, load_base, quick_dtype
from esd_lora.card import make_card, scores_of
from esd_lora.evaluate.rates import rate
from esd_lora.evaluate.scores import AttributeScores, Scores, draw, score
from esd_lora.hub import files_of, push
from esd_lora.patch import FILE_NAME, Patch
from esd_lora.report import Job, jobs_of
from esd_lora.verifying import Claim, verify


@pytest.fixture(scope="module")
def emoji() -> Base:
    return load_base("emoji", device="cpu", dtype=quick_dtype("cpu"))


def few(patch: Patch, **_: int) -> list[Job]:
    """The true answer set of emoji's cat, three cats and five others of it."""
    (job,) = jobs_of(patch, target_seeds=1, kept_seeds=1)
    target = [c for c in job.cells if c.obj == "cat"][:3]
    return [Job("cat", None, [*target, *[c for c in job.cells if c.obj in ("dog", "house")][:5]])]


@pytest.fixture(scope="module")
def measured(emoji: Base) -> Patch:
    """A patch for emoji's cat that does nothing, and its true scores on a handful of pictures."""
    emoji.add_adapter(layers="esd-x-strict", rank=1)  # lora_B is zero
    origin = {"name": "emoji", "revision": None, "fingerprint": emoji.fingerprint}
    info = {
        "recipe": {"concepts": [{"erase": "cat", "from": None, "replace_with": None, "synonyms": []}]},
        "base": origin,
    }
    patch = Patch(emoji.adapter_state(), info)
    emoji.remove_adapters()
    (job,) = few(patch)
    evaluator = verifying.load_evaluator("measure")
    seen = evaluator.judge(draw(emoji, job.cells))
    return replace(patch, info={**info, "scores": [score("cat", job.cells, seen, seen, evaluator).to_dict()]})


@pytest.fixture
def known(emoji: Base, measured: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are not about takes no time: the base is loaded, and measuring gives the true scores."""
    monkeypatch.setattr(verifying, "load_base", lambda *_, **__: emoji)
    (scores,) = scores_of(measured)
    monkeypatch.setattr(verifying, "_measure", lambda *_: scores)


def shared(patch: Patch, folder: Path) -> Path:
    patch.save(folder)
    (folder / "README.md").write_text(make_card(patch, folder))
    return folder


def wrong(found: verifying.Verification) -> dict[str, str]:
    return {c.what: c.found for c in found.checks if c.ok is False}


def test_a_true_patch_passes_and_its_claims_are_measured_again(
    measured: Patch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifying, "jobs_of", few)
    seen: list[tuple[int, int]] = []
    found = verify(str(shared(measured, tmp_path / "cat")), device="cpu", on_picture=lambda n, of: seen.append((n, of)))
    assert found.ok
    assert {c.what: c.ok for c in found.checks} == {"file": True, "hash": None, "card": True, "base": True}
    assert seen[-1] == (16, 16)
    (gone,) = [c for c in found.claims if c.what == "UA: target gone"]
    assert (gone.claimed, gone.holds) == (gone.measured, True)  # the same machine, the same pictures


@pytest.mark.usefixtures("known")
def test_a_claim_that_does_not_hold_fails(measured: Patch, tmp_path: Path, call: Call) -> None:
    shown = call("verify", shared(measured, tmp_path / "true"))
    assert (shown.code, shown.err) == (0, "")
    assert "UA: target gone" in shown.out
    (scores,) = measured.info["scores"]
    perfect = Scores(**{**scores, "ua": rate([True] * 200, [False] * 200).__dict__}).to_dict()
    shared(replace(measured, info={**measured.info, "scores": [perfect]}), tmp_path / "cat")
    done = call("verify", tmp_path / "cat", "--json")
    told = json.loads(done.out)
    assert (done.code, told["ok"]) == (1, False)
    assert [c["what"] for c in told["claims"] if not c["holds"]] == ["UA: target gone"]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("claim", [{"low": 0.0}, {"high": 1.0}, {"n": 0}, {"value": 1.5}, {"n": 20_000}], ids=str)
def test_a_claim_comes_with_the_interval_of_its_pictures(
    claim: dict[str, float], measured: Patch, tmp_path: Path, call: Call
) -> None:
    """An interval that holds everything would hold whatever is measured."""
    (scores,) = measured.info["scores"]
    told = {**rate([True] * 150 + [False] * 50).__dict__, **claim}
    replace(measured, info={**measured.info, "scores": [{**scores, "ua": told}]}).save(tmp_path / "cat")
    shown = call("verify", tmp_path / "cat")
    assert shown.code == 2
    assert "UA: target gone: no such share of" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("claim", ["worst", "base"])
def test_what_is_told_beside_the_rates_is_measured_too(claim: str, measured: Patch, tmp_path: Path) -> None:
    """Others than those that lost most, or a base that was no better, would make a patch look better than it is."""
    (scores,) = measured.info["scores"]
    told = {**scores, "worst": {name: rate([False] * 200).__dict__ for name in ("moon", "star", "heart")}}
    if claim == "base":
        told = {**scores, "ira": {**scores["ira"], "base": 0.0}}
    folder = shared(replace(measured, info={**measured.info, "scores": [told]}), tmp_path / "cat")
    found = verify(str(folder), device="cpu")
    assert all(c.ok is not False for c in found.checks)
    assert not found.ok
    assert {c.what.split(":")[0] for c in found.claims if not c.holds} == {
        "kept, worst three" if claim == "worst" else "IRA"
    }


@pytest.mark.usefixtures("known")
def test_a_table_of_scores_that_the_header_does_not_have_is_named(
    patch: Patch, measured: Patch, tmp_path: Path
) -> None:
    for i, some in enumerate((patch, measured)):
        folder = shared(some, tmp_path / str(i))
        card = folder / "README.md"
        card.write_text(card.read_text() + "\n| UA: target gone | 100.0 | 98.2 to 100.0 | 204 | 0.0 |\n")
        assert wrong(verify(str(folder), device="cpu"))["card"] == "claims other scores than the patch's own header"


@pytest.mark.usefixtures("known")
def test_a_table_of_attacks_is_that_of_the_file_beside_it(patch: Patch, tmp_path: Path) -> None:
    folder = shared(patch, attacked(patch, tmp_path / "cat", base="emoji"))
    card = folder / "README.md"
    assert "| paraphrase | 25.0 | 11.2 to 46.9 |" in card.read_text()
    assert "card" not in wrong(verify(str(folder), device="cpu"))
    card.write_text(card.read_text().replace("| 25.0 | 11.2 to", "| 5.0 | 1.2 to"))
    told = "claims other scores than the patch's own header and attacks.json"
    assert wrong(verify(str(folder), device="cpu"))["card"] == told


def test_a_local_copy_of_the_hubs_cache_was_compared_with_nothing(patch: Patch, tmp_path: Path) -> None:
    patch.save(tmp_path / "snapshots" / "0123")
    (found,) = [c for c in verify(str(tmp_path / "snapshots" / "0123"), device="cpu").checks if c.what == "hash"]
    assert (found.ok, found.found) == (None, "a local file; nothing to compare it with")


@pytest.mark.usefixtures("known")
def test_scores_of_something_else_than_the_recipe_erases_fail(measured: Patch, tmp_path: Path) -> None:
    (scores,) = measured.info["scores"]
    alien = replace(measured, info={**measured.info, "scores": [{**scores, "target": "dog"}]})
    assert wrong(verify(str(shared(alien, tmp_path)), device="cpu")) == {
        "scores": "it claims some for dog, which its recipe does not erase"
    }


@pytest.mark.usefixtures("known")
def test_a_card_of_another_patch_and_a_card_that_claims_more_are_named(measured: Patch, tmp_path: Path) -> None:
    folder = shared(measured, tmp_path / "cat")
    card = (folder / "README.md").read_text()
    for text, found in (
        (card.replace(measured.digest, "0" * 64), "is about another patch; its SHA-256 is not that of these tensors"),
        (card.replace("      value: 0.0\n", "      value: 100.0\n"), "claims other scores than the patch's own header"),
        (card.replace("---\n", "---\n- [", 1), "cannot be read"),
        (card.replace("---\n", f"---\na: {'[' * 3000}{']' * 3000}\n", 1), "cannot be read"),  # too deep
        (card + "|1 to 1" * 10**5 + "x", None),  # no row of a table, and told in no time
    ):
        assert text != card
        (folder / "README.md").write_text(text)
        assert wrong(verify(str(folder), device="cpu")) == ({"card": found} if found else {})


@pytest.mark.usefixtures("known")
def test_a_patch_for_other_weights_or_other_layers_of_emoji_is_named(measured: Patch, tmp_path: Path) -> None:
    base = {**measured.info["base"], "fingerprint": "0"}
    other = replace(measured, info={**measured.info, "base": base})
    with pytest.warns(UserWarning, match="other weights than those of emoji here"):
        found = verify(str(shared(other, tmp_path / "a")), device="cpu")
    assert wrong(found) == {"base": "made for other weights than those of emoji here"}
    name = "unet.nowhere.to_k"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(3, 1)}
    found = verify(str(shared(replace(measured, tensors=tensors), tmp_path / "b")), device="cpu")
    told = "the patch that erases cat (made for emoji) adapts unet.nowhere.to_k, which emoji does not have"
    assert wrong(found) == {"base": told}
    assert not found.claims


@pytest.mark.parametrize(
    ("base", "ok", "found"),
    [
        (None, None, "the patch names no base"),
        ("{tiny}", True, "{tiny} has all of its layers; its weights were not looked at"),
        ("{tiny}@main", None, "{tiny}: has no revisions"),  # a folder here that is called as what the patch is for
        (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            False,
            "stable-diffusion-v1-5/stable-diffusion-v1-5 has no unet.",
        ),
    ],
)
def test_of_other_bases_the_layers_are_checked_and_nothing_is_measured(
    base: str | None, ok: bool | None, found: str, patch: Patch, tiny_folder: Path, tmp_path: Path
) -> None:
    name, _, revision = (base or "").format(tiny=tiny_folder).partition("@")
    told = {"name": name, "revision": revision or None} if name else {}
    replace(patch, info={**patch.info, "base": told}).save(tmp_path)
    made = verify(str(tmp_path))
    checks: dict[str, Any] = {c.what: c for c in made.checks}
    assert checks["base"].ok is ok
    assert checks["base"].found.startswith(found.format(tiny=tiny_folder))
    assert checks["scores"].found == "no evaluator for this base is here yet; not measured"
    assert (checks["card"].ok, made.claims) == (None, [])


def test_a_patch_on_the_hub_is_verified_with_its_card_and_hash(
    hub: FakeHub,  # noqa: F811
    patch: Patch,
    tmp_path: Path,
) -> None:
    patch.save(tmp_path / "cat")
    push(files_of(tmp_path / "cat", repo="alice/cat"), "alice/cat")
    checks = {c.what: c for c in verify("alice/cat").checks}
    assert (checks["hash"].ok, checks["card"].ok) == (True, True)
    assert checks["hash"].found.startswith("SHA-256 as the Hub tells it: ")
    assert hub.asked("GET", FILE_NAME) == 1


def test_a_hash_that_the_hubs_cache_does_not_tell_is_not_called_right(patch: Patch, tmp_path: Path) -> None:
    """As where it has no links, by the names of which it tells them: a file of its own name."""
    check = verifying._check_hash(patch.save(tmp_path), from_hub=True)
    assert (check.ok, check.found) == (None, "the hub's cache has no links here, by which it would tell the hash")


def test_intervals_that_share_no_value_do_not_hold() -> None:
    few, many = rate([True] * 3), rate([True] * 150 + [False] * 50)
    assert Claim("cat", "x", few, many).holds
    assert not Claim("cat", "x", rate([True] * 200), many).holds


def test_an_accessory_is_measured_by_its_own_scores(emoji: Base, measured: Patch) -> None:
    concept = {"erase": "party hat", "from": "cat", "replace_with": None, "synonyms": []}
    patch = replace(measured, info={**measured.info, "recipe": {"concepts": [concept]}})
    (job,) = jobs_of(patch, target_seeds=1, kept_seeds=1)
    short = job._replace(cells=[*job.cells[:2], *[c for c in job.cells if not c.hat][:2]])
    scores = verifying._measure(emoji, patch, short, lambda _: None)
    assert isinstance(scores, AttributeScores)
    assert verifying._named(job) == verifying.target_of(scores)
