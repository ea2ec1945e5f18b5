"""Sharing: the hub's real client and plain diffusers against a Hub of our own, in order and out of it."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import same
from fakehub import FakeHub
from huggingface_hub import HfApi, constants

from esd_lora.card import for_others
from esd_lora.compose import stack
from esd_lora.errors import HubError, OutputError, RepositoryError
from esd_lora.hub import download, explained, files_of, find_patch, pull, push
from esd_lora.patch import FILE_NAME, Patch, encode, load_patch


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that the client in this process talks to, as alice, with an empty cache and no patience."""
    fake = FakeHub()
    values: dict[str, Any] = {"ENDPOINT": fake.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    values |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token")}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": fake.url + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    yield fake
    fake.close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def published(patch_folder: Path, repo: str = "alice/cat", **how: Any) -> Any:
    return push(files_of(patch_folder, repo=repo), repo, **how)


# ---- in order --------------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_with_everything_in_it(hub: FakeHub, patch_folder: Path) -> None:
    pushed = published(patch_folder)
    assert (pushed.url, pushed.changed, pushed.pull_request) == (f"{hub.url}/alice/cat", True, None)
    files = hub.files("alice/cat")
    assert set(files) >= {".gitattributes", FILE_NAME, "README.md", "recipe.yaml"}
    patch = load_patch(patch_folder)
    assert files[FILE_NAME] == Patch(patch.tensors, for_others(patch.info)).to_bytes()
    assert hub.repos["alice/cat"].messages == ["initial commit", "Upload an erasure patch"]
    assert hub.repos["alice/cat"].refs["main"] == pushed.commit


def test_where_the_base_lies_on_this_machine_is_not_published(
    hub: FakeHub, patch: Patch, tiny_folder: Path, tmp_path: Path
) -> None:
    """Neither of a patch's base and recipe, nor of those of a stack's parts."""
    for name, some in (("one", patch), ("two", stack([patch, patch], [1.0, 0.5]))):
        assert some.info["base"]["name"] == str(tiny_folder)
        some.save(tmp_path / name)
        published(tmp_path / name, f"alice/{name}")
        for content in hub.files(f"alice/{name}").values():
            assert str(tiny_folder).encode() not in content
            assert str(tiny_folder.parent).encode() not in content


def test_what_is_there_already_is_not_sent_again(hub: FakeHub, patch_folder: Path) -> None:
    first = published(patch_folder)
    sent = hub.uploaded
    again = published(patch_folder)
    assert (again.commit, again.changed) == (first.commit, False)
    assert (hub.uploaded, hub.asked("POST", "/commit/")) == (sent, 1)


def test_what_a_patch_no_longer_has_goes_with_the_next_push(hub: FakeHub, patch: Patch) -> None:
    files = {
        FILE_NAME: patch.to_bytes(),
        "README.md": b"---\nlicense: mit\n---\n",
        "images/0-before.png": b"old",
        "scores.json": b"[]",
    }
    push(files, "alice/cat")
    own = ("images/mine/0.png", "notes.txt")
    for name in own:
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="alice/cat")
    push({k: v for k, v in files.items() if k != "scores.json" and "images" not in k}, "alice/cat")
    assert sorted(hub.files("alice/cat")) == sorted([".gitattributes", "README.md", *own, FILE_NAME])


def test_a_lora_of_another_program_is_not_pushed_over(hub: FakeHub, patch: Patch, patch_folder: Path) -> None:
    """diffusers gives any LoRA the name of a patch's file."""
    hub_of = HfApi()
    hub_of.create_repo("alice/dreambooth")
    file = encode(patch.tensors, {"format": "pt"})
    hub_of.upload_file(path_or_fileobj=file, path_in_repo=FILE_NAME, repo_id="alice/dreambooth")
    before = hub.files("alice/dreambooth")
    told = f"alice/dreambooth: holds something else than a patch, such as {FILE_NAME} of another program; choose another name"
    with pytest.raises(RepositoryError, match=f"^{re.escape(told)}$"):
        push(files_of(patch_folder, repo="alice/dreambooth"), "alice/dreambooth")
    assert hub.files("alice/dreambooth") == before


def test_a_commit_that_may_have_arrived_is_not_sent_twice_where_that_would_do_harm(
    hub: FakeHub, patch_folder: Path
) -> None:
    published(patch_folder)
    files = files_of(patch_folder, repo="alice/cat") | {"README.md": b"---\nlicense: mit\n---\n# Better\n"}
    hub.fault("POST", "/commit/", times=1, status=502)
    with pytest.raises(HubError, match="the Hub fails"):
        push(files, "alice/cat", create_pr=True)
    hub.fault("POST", "/commit/", times=1, status=503)
    assert push(files, "alice/cat", create_pr=True).pull_request == f"{hub.url}/alice/cat/discussions/1"


def test_what_was_pushed_is_pulled(hub: FakeHub, patch_folder: Path, patch: Patch, tmp_path: Path) -> None:
    published(patch_folder)
    got = pull("alice/cat", tmp_path / "got")
    assert same(got.tensors, load_patch(patch_folder).tensors)
    assert load_patch(tmp_path / "got").info == for_others(patch.info)
    files = {
        p.relative_to(tmp_path / "got").as_posix(): p.read_bytes() for p in (tmp_path / "got").rglob("*") if p.is_file()
    }
    assert files == {k: v for k, v in hub.files("alice/cat").items() if k != ".gitattributes"}


def test_a_reference_finds_a_patch_and_then_without_a_connection(
    hub: FakeHub, patch_folder: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = published(patch_folder, revision="v2").commit
    assert FILE_NAME not in hub.files("alice/cat")  # the branch alone has it
    for reference in ("alice/cat@v2", f"alice/cat@{commit}"):
        assert same(find_patch(reference).tensors, load_patch(patch_folder).tensors)
    hub.close()
    assert find_patch("alice/cat@v2").digest == patch.digest
    offline(monkeypatch)
    assert find_patch("alice/cat@v2").digest == patch.digest
    with pytest.raises(
        HubError, match=r"^alice/dog: no such folder; the Hub cannot be reached, and it is not in the cache$"
    ):
        find_patch("alice/dog")


def test_a_folder_goes_before_a_repository_of_the_same_name(hub: FakeHub, patch: Patch) -> None:
    patch.save(Path("alice/cat"))
    assert find_patch("alice/cat").digest == patch.digest
    assert not hub.requests


def test_a_branch_and_a_pull_request_leave_main_alone(
    hub: FakeHub, patch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(patch_folder)
    before = hub.files("alice/cat")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    files = files_of(patch_folder, repo="alice/cat") | {"README.md": b"---\nlicense: mit\n---\n# Better\n"}
    pushed = push(files, "alice/cat", create_pr=True, message="Say it better")
    assert pushed.pull_request == f"{hub.url}/alice/cat/discussions/1"
    assert hub.files("alice/cat") == before
    assert hub.files("alice/cat", "refs/pr/1")["README.md"].endswith(b"# Better\n")
    assert find_patch("alice/cat@refs/pr/1").digest == find_patch("alice/cat").digest


def test_a_collection_is_made_once_and_a_repository_is_in_it_once(hub: FakeHub, patch_folder: Path) -> None:
    slug = published(patch_folder, collection="Erased animals").collection
    assert slug == published(patch_folder, collection="Erased animals").collection
    assert published(patch_folder, "alice/cat2", collection=slug).collection == slug
    assert [i["id"] for i in hub.collections[slug]["items"]] == ["alice/cat", "alice/cat2"]
    with pytest.raises(RepositoryError, match=r"^alice/cat is pushed, but collection bob/none-0: not on the Hub, or"):
        published(patch_folder, collection="bob/none-0")


# ---- who may ---------------------------------------------------------------------------------------------------------


def test_a_private_repository_is_for_its_owner(
    hub: FakeHub, patch_folder: Path, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(patch_folder, private=True)
    assert hub.repos["alice/cat"].private
    for token in ("hf_bob", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            RepositoryError, match=r"^alice/cat: no such folder, and no such repository on the Hub, or it is"
        ):
            find_patch("alice/cat")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert find_patch("alice/cat").digest == patch.digest


def test_a_new_repository_is_private_where_those_of_its_owner_are(hub: FakeHub, patch_folder: Path) -> None:
    hub.visibility = "private"
    published(patch_folder)
    assert hub.repos["alice/cat"].private


def test_what_is_public_is_not_pushed_to_as_if_it_were_private(hub: FakeHub, patch_folder: Path) -> None:
    HfApi().create_repo("alice/cat")
    with pytest.raises(RepositoryError, match=r"^alice/cat: is public; make it private on the Hub first, or choose"):
        published(patch_folder, private=True)
    assert FILE_NAME not in hub.files("alice/cat")


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (
            "hf_wrong",
            "alice/cat",
            "alice/cat: the Hub refuses the token, or there is none; `hf auth login`, or set HF_TOKEN",
        ),
        ("", "alice/cat", "alice/cat: the Hub refuses the token, or there is none; `hf auth login`, or set HF_TOKEN"),
        ("hf_bob", "alice/new", "alice/new: this login may not write there; choose a name of your own, or --create-pr"),
        (
            "hf_bob",
            "alice/taken",
            "alice/taken: this login may not write there; choose a name of your own, or --create-pr",
        ),
        (
            "hf_alice",
            "alice/other",
            "alice/other: holds something else than a patch, such as model_index.json; choose anoth",
        ),
        ("hf_alice", "cat", "cat: a repository is called user/name; a branch is given by --revision"),
        ("hf_alice", "alice/cat@v2", "alice/cat@v2: a repository is called user/name; a branch is given by --revision"),
        ("hf_alice", "alice/a--b", "alice/a--b: not a name that the Hub allows; a repository is called user/name"),
    ],
)
def test_a_push_that_may_not_be_says_what_to_do_and_leaves_nothing(
    hub: FakeHub, patch_folder: Path, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, message: str
) -> None:
    for name in ("taken", "other"):
        HfApi().create_repo(f"alice/{name}")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="model_index.json", repo_id="alice/other")
    before = {name: hub.files(name) for name in hub.repos}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RepositoryError) as caught:
        published(patch_folder, repo)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2
    assert {name: hub.files(name) for name in hub.repos} == before


def test_what_is_not_there_is_told_apart(hub: FakeHub, patch_folder: Path) -> None:
    HfApi().create_repo("alice/empty")
    published(patch_folder)
    for reference, message in (
        (
            "alice/none",
            "alice/none: no such folder, and no such repository on the Hub, or it is private and needs a login",
        ),
        ("alice/cat@v9", "alice/cat: the Hub has no revision v9 of it"),
        ("alice/empty", f"alice/empty: no patch here; its repository on the Hub has no {FILE_NAME}"),
    ):
        with pytest.raises(RepositoryError) as caught:
            find_patch(reference)
        assert str(caught.value) == message


# ---- out of order ----------------------------------------------------------------------------------------------------

DOWN = "nothing is half-done, try again"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"method": "PUT", "path": "/lfs/", "cut": True, "times": 99}, "alice/cat: the connection to the Hub failed ("),
        (
            {"method": "POST", "path": "/commit/", "cut": True, "times": 99},
            "alice/cat: the connection to the Hub failed (",
        ),
        (
            {"method": "POST", "path": "/commit/", "status": 503, "times": 99},
            f"alice/cat: the Hub fails (503); {DOWN} later",
        ),
        (
            {"method": "PUT", "path": "/lfs/", "status": 500, "times": 99},
            f"alice/cat: the Hub fails (500); {DOWN} later",
        ),
        (
            {"method": "POST", "path": "/lfs-verify", "status": 400, "times": 99},
            "alice/cat: the Hub refuses it (400): order",
        ),
        (
            {"method": "POST", "path": "/preupload/", "status": 429, "times": 99},
            "alice/cat: the Hub has had too many requests",
        ),
        (
            {"method": "POST", "path": "/create", "status": 502, "times": 99},
            f"alice/cat: the Hub fails (502); {DOWN} later",
        ),
        (
            {
                "method": "POST",
                "path": "/validate-yaml",
                "status": 502,
                "body": b"<html>Bad gateway</html>",
                "times": 99,
            },
            "alice/cat: the Hub's answer cannot be read; try again later",
        ),
    ],
    ids=["cut", "cut commit", "503", "500", "not verified", "429", "502", "page"],
)
def test_a_push_that_fails_publishes_nothing_and_the_next_one_succeeds(
    hub: FakeHub, patch_folder: Path, fault: dict[str, Any], message: str
) -> None:
    hub.fault(**fault)
    with pytest.raises((HubError, RepositoryError)) as caught:
        published(patch_folder)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not hub.repos or set(hub.files("alice/cat")) == {".gitattributes"}
    hub.faults.clear()
    assert published(patch_folder).changed
    assert hub.files("alice/cat")[FILE_NAME] == files_of(patch_folder, repo="alice/cat")[FILE_NAME]


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "PUT", "path": "/lfs/", "cut": True},
        {"method": "PUT", "path": "/lfs/", "status": 503},
        {"method": "POST", "path": "/commit/", "status": 503, "times": 3},
        {"method": "POST", "path": "/commit/", "status": 429, "headers": {"Retry-After": "1"}},
        {"method": "POST", "path": "/preupload/", "status": 500},
    ],
    ids=["cut", "503", "503 of the commit", "429", "500"],
)
def test_a_fault_that_passes_is_sat_out(hub: FakeHub, patch_folder: Path, fault: dict[str, Any]) -> None:
    hub.fault(**fault)
    assert published(patch_folder).changed
    assert not any(f.times for f in hub.faults)
    assert hub.repos["alice/cat"].messages == ["initial commit", "Upload an erasure patch"]


def test_what_arrived_before_a_cut_is_not_sent_again(hub: FakeHub, patch_folder: Path) -> None:
    hub.fault("POST", "/commit/", cut=True, times=99)
    with pytest.raises(HubError):
        published(patch_folder)
    sent = hub.uploaded
    assert sent >= len(files_of(patch_folder, repo="alice/cat")[FILE_NAME])
    hub.faults.clear()
    published(patch_folder)
    assert hub.uploaded == sent


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: FakeHub, patch_folder: Path) -> None:
    published(patch_folder)
    files = files_of(patch_folder, repo="alice/cat") | {"README.md": b"---\nlicense: mit\n---\n# Better\n"}
    first = push(files, "alice/cat")
    assert not push(files, "alice/cat").changed
    assert hub.repos["alice/cat"].refs["main"] == first.commit


def test_a_file_that_changes_during_a_push_does_not_change_what_is_published(
    hub: FakeHub, patch_folder: Path, tmp_path: Path
) -> None:
    file = load_patch(patch_folder).save(tmp_path / "cat")
    sound = files_of(tmp_path / "cat", repo="alice/cat")[FILE_NAME]
    hub.fault("PUT", "/lfs/", times=1, then=lambda: file.write_bytes(b"torn"))
    published(tmp_path / "cat")
    assert file.read_bytes() == b"torn"
    assert hub.files("alice/cat")[FILE_NAME] == sound


def test_a_push_of_someone_else_at_the_same_time_is_not_overwritten(hub: FakeHub, patch_folder: Path) -> None:
    published(patch_folder)
    repo = hub.repos["alice/cat"]
    others = {**repo.commits[repo.refs["main"]]}
    hub.fault("POST", "/commit/", then=lambda: repo.add("main", others, "theirs"))
    files = files_of(patch_folder, repo="alice/cat") | {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}
    with pytest.raises(
        HubError, match=r"^alice/cat: someone else changed it at the same time; nothing of this push is"
    ):
        push(files, "alice/cat")
    assert repo.messages[-1] == "theirs"
    push(files, "alice/cat")
    assert hub.files("alice/cat")["README.md"].endswith(b"# Mine\n")


@pytest.mark.parametrize("what", ["cut", "spoil"])
def test_a_download_that_is_cut_or_spoilt_is_repeated_or_refused(
    hub: FakeHub, patch_folder: Path, patch: Patch, tmp_path: Path, what: str
) -> None:
    published(patch_folder)
    hub.fault("GET", f"/resolve/.*/{FILE_NAME}", **{what: True}, times=1)
    assert find_patch("alice/cat").digest == patch.digest  # asked for again
    hub.fault("GET", f"/resolve/.*/{FILE_NAME}", **{what: True}, times=99)
    for path in Path(constants.HF_HUB_CACHE).rglob("*"):
        path.unlink() if path.is_symlink() or path.is_file() else None
    with pytest.raises(HubError) as caught:
        pull("alice/cat", tmp_path / "got")
    assert re.match(
        r"alice/cat: (the connection to the Hub failed|.* arrives with another SHA-256|no such folder; )",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "got").exists()
    hub.faults.clear()
    assert pull("alice/cat", tmp_path / "got").digest == patch.digest


def test_a_file_that_went_bad_in_the_cache_is_fetched_again(hub: FakeHub, patch_folder: Path, patch: Patch) -> None:
    published(patch_folder)
    path = download("alice/cat")
    path.resolve().write_bytes(b"x" * path.stat().st_size)
    assert find_patch("alice/cat").digest == patch.digest


def test_a_hub_that_is_not_there_is_named_in_one_line(hub: FakeHub, patch_folder: Path) -> None:
    hub.close()
    with pytest.raises(
        HubError, match=r"^alice/cat: the connection to the Hub failed \(.*\); nothing is half-done, try again$"
    ):
        published(patch_folder)


def test_a_card_that_the_hub_refuses_is_one_line(hub: FakeHub, patch: Patch) -> None:
    with pytest.raises(RepositoryError) as caught:
        push({FILE_NAME: patch.to_bytes(), "README.md": b"---\ntags: []\n---\n"}, "alice/cat")
    told = 'the Hub refuses it: Invalid metadata in README.md. - "license" is missing'
    assert str(caught.value) == f"alice/cat: {told}"
    assert FILE_NAME not in hub.files("alice/cat")


def test_a_transfer_that_breaks_without_a_cause_is_one_line() -> None:
    refused = RuntimeError("Data processing error:\nconnection refused")  # as hf_xet raises it
    outer = RuntimeError("Error while uploading 'x' to the Hub.")
    outer.__cause__ = refused
    for error in (refused, outer):
        with pytest.raises(HubError) as caught, explained("alice/cat"):
            raise error
        told = "the transfer failed (Data processing error: connection refused); try again"
        assert str(caught.value) == f"alice/cat: {told}"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_cache_that_cannot_be_written_to_is_not_taken_for_the_connection(
    hub: FakeHub, patch_folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    published(patch_folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OutputError) as caught:
        find_patch("alice/cat")
    assert str(caught.value) == f"alice/cat: cannot write to the cache of the Hub: {os.strerror(code)}"
