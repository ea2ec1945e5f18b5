"""Patches on the Hub: `push` publishes one, `pull` fetches one, `find_patch` loads whatever a reference names.

A push is one commit: patch, recipe, card, scores and pictures appear together or not at all. They are read once, before
anything is sent, so a file that changes meanwhile does no harm; large files that arrived before a connection broke are not
sent again, and a push of what is there already sends nothing. Who is asking follows from the hub's own login, or HF_TOKEN.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

import esd_lora
from esd_lora.errors import HubError, OutputError, RepositoryError, unwritable
from esd_lora.patch import FILE_NAME, Patch, check_empty, load_patch, whole

OURS = (
    FILE_NAME,
    "README.md",
    "recipe.yaml",
    "scores.json",
    "attacks.json",
    "grid.png",
    "loss.png",
    "images/*.png",  # and none in folders below
    "images/pairs.json",
)
"""What a patch's repository has of us; a push replaces these, and a pull brings no others."""
REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
"""A patch on the Hub: `user/name`, or `user/name@revision`."""
ATTEMPTS = 4
"""How often a commit is tried; all other requests are repeated by the hub's own client."""
BUSY = (429, 500, 502, 503, 504)
"""Answers after which a request is repeated, by their status."""
UNTOUCHED = (429, 503)
"""Those of them by which it was not even begun."""


@dataclass(frozen=True)
class Pushed:
    """What a push did: where the patch is now, and whether anything had to be sent for it."""

    url: str
    commit: str
    changed: bool
    pull_request: str | None = None
    collection: str | None = None


def find_patch(reference: str) -> Patch:
    """The patch in a folder or file, or else on the Hub.

    Args:
        reference: A path, `user/name`, or `user/name@revision`. What was downloaded once is found without a connection too.

    Raises:
        PatchError: There is none, or it is broken.
        RepositoryError: The Hub has no such repository or revision, or does not show it.
        HubError: The Hub cannot be reached.
    """
    return load_patch(place_of(reference))


def place_of(reference: str) -> Path:
    """Where the patch of a reference is: the path itself, or in the hub's cache; see `find_patch`."""
    like_one = REFERENCE.fullmatch(reference.removesuffix("@"))
    if Path(reference).exists() or like_one is None:
        return Path(reference)
    return download(*named(reference))


def named(reference: str) -> tuple[str, str | None]:
    """Repository and revision, of `user/name` or `user/name@revision`.

    Raises:
        RepositoryError: It is neither.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        missing = REFERENCE.fullmatch(reference.removesuffix("@"))
        right = "the revision after @ is missing" if missing else "a repository is called user/name"
        raise RepositoryError(f"{reference}: {right}")
    return match["repo"], match["revision"]


def check_name(repo: str) -> None:
    """Nothing, if a repository can be called so.

    Raises:
        RepositoryError: It cannot.
    """
    if not REFERENCE.fullmatch(repo) or "@" in repo:
        raise RepositoryError(f"{repo}: a repository is called user/name; a branch is given by --revision")


def download(repo: str, revision: str | None = None, *, file: str = FILE_NAME) -> Path:
    """The place in the hub's cache of a file of a repository, whose content has been checked against its hash.

    Raises:
        RepositoryError: See `find_patch`.
        HubError: The Hub cannot be reached, or sends something else than it promised.
        OutputError: The cache cannot be written to.
    """

    def fetch(**how: bool) -> Path:
        return Path(HfApi().hf_hub_download(repo, file, revision=revision, **how))

    with explained(repo, revision):
        try:
            path = fetch()
        except errors.HfHubHTTPError:
            raise
        except (
            errors.HTTPError
        ):  # a connection that broke off, which is no reason for the client to look into the cache
            path = fetch(local_files_only=True)
        if not _is_whole(path):
            path = fetch(force_download=True)
    if not _is_whole(path):
        raise HubError(f"{repo}: {file} arrives with another SHA-256 than the Hub tells; try again later")
    return path


HASH = re.compile(r"[0-9a-f]{64}")
"""What the cache calls a file of some size: its SHA-256."""


def _is_whole(path: Path) -> bool:
    """Whether a file in the cache has the hash that it is stored under; small files are stored under another kind.

    So are all where the cache has no links, as on systems that allow none: these are taken as they are.
    """
    name = path.resolve().name
    if not HASH.fullmatch(name):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == name


def pull(repo: str, out: Path, *, revision: str | None = None) -> Patch:
    """The patch of a repository, written to a folder with its card, recipe, scores and pictures.

    Raises:
        PatchError: It is broken.
        RepositoryError: See `find_patch`.
        HubError: See `download`.
        OutputError: The folder holds something, or cannot be written to; nothing is left behind.
    """
    check_empty(out)
    path = download(repo, revision)
    patch, commit = load_patch(path), path.parent.name
    with explained(repo, revision):
        snapshot = Path(HfApi().snapshot_download(repo, revision=commit, allow_patterns=list(OURS)))
    with whole(out) as folder:
        for file in sorted(p for p in snapshot.rglob("*") if p.is_file()):
            name = file.relative_to(snapshot).as_posix()
            if _ours(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(file.read_bytes())
    return patch


def files_of(place: str | Path, *, repo: str) -> dict[str, bytes]:
    """What a push of a patch's folder or file would publish, by names in the repository.

    Raises:
        PatchError: It is broken, or its list of pictures is.
        RepositoryError: No repository can be called so.
    """
    from esd_lora.card import evidence_of, for_others, make_card, pairs_of, recipe_text

    check_name(repo)
    patch, place = load_patch(place), Path(place)
    patch = Patch(patch.tensors, for_others(patch.info))
    folder = place if place.is_dir() else None
    files = {FILE_NAME: patch.to_bytes(), "README.md": make_card(patch, folder, repo=repo).encode()}
    if recipe := patch.info.get("recipe"):
        files["recipe.yaml"] = recipe_text(recipe).encode()
    if scores := patch.info.get("scores"):
        files["scores.json"] = f"{json.dumps(scores, indent=2)}\n".encode()
    if folder:
        if evidence := evidence_of(patch, folder):
            files["attacks.json"] = evidence.to_bytes()
        pairs = pairs_of(folder)
        pictures = [name for pair in pairs for name in (pair.before, pair.after)]
        beside = [*pictures, *(["images/pairs.json"] if pairs else []), "grid.png", "loss.png"]
        files |= {n: (folder / n).read_bytes() for n in beside if (folder / n).is_file()}
    return files


def push(
    files: Mapping[str, bytes],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload an erasure patch",
    collection: str | None = None,
) -> Pushed:
    """What the push did; the files are in the repository together, in one commit, or not at all.

    Args:
        files: See `files_of`.
        repo: `user/name`; made if it is not there.
        private: Make it private; a public one is then refused. Without it a new one is what its owner's are by default.
        revision: Branch to commit to; made if it is not there.
        create_pr: Open a pull request instead of writing to the branch.
        message: The commit's.
        collection: Slug or title of a collection to add the repository to; made if there is none of the title.

    Raises:
        RepositoryError: Not logged in, no right to write there, or the repository holds something else.
        HubError: The Hub cannot be reached, or fails; nothing is published, and the next push goes on from there.
    """
    check_name(repo)
    api = HfApi(library_name="esd_lora", library_version=esd_lora.__version__)
    with explained(repo, revision):
        if not (create_pr and api.repo_exists(repo)):
            api.create_repo(repo, private=private or None, exist_ok=True)  # None: as its owner's are made
        if private and not api.model_info(repo).private:
            raise RepositoryError(f"{repo}: is public; make it private on the Hub first, or choose another name")
        if revision and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        head = api.model_info(repo, revision=revision)
        there = [s.rfilename for s in head.siblings or []]
        if other := _holds_else(api, repo, there, head.sha):
            raise RepositoryError(f"{repo}: holds something else than a patch, such as {other}; choose another name")

        def commit() -> Any:
            adds = [CommitOperationAdd(name, data) for name, data in files.items()]
            gone = [CommitOperationDelete(name) for name in there if _ours(name) and name not in files]
            parent = None if create_pr else head.sha
            how = {"revision": revision, "create_pr": create_pr, "parent_commit": parent}
            return api.create_commit(repo, [*adds, *gone], commit_message=message, **how)

        # what may have arrived though the answer is lost is sent again only where that changes nothing
        harmful = create_pr or any(_ours(name) and name not in files for name in there)
        made = _patiently(commit, UNTOUCHED if harmful else BUSY)
    changed = made.oid != head.sha
    where = None if collection is None else _collect(api, repo, collection, private=private)
    return Pushed(f"{api.endpoint}/{repo}", made.oid, changed, made.pr_url, where)


def _ours(name: str) -> bool:
    """Whether a file of a repository is one that a push makes."""
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in OURS)


def _holds_else(api: HfApi, repo: str, there: Sequence[str], commit: str | None) -> str:
    """A file by which a repository holds something else than a patch of ours; empty where it does not.

    diffusers gives any LoRA the name of a patch's file, and the header alone tells them apart.
    """
    if FILE_NAME not in there:
        return next((name for name in reversed(there) if name not in (".gitattributes", "README.md")), "")
    try:
        header = api.parse_safetensors_file_metadata(repo, FILE_NAME, revision=commit)
    except errors.SafetensorsParsingError:
        return FILE_NAME
    return "" if "esd_lora" in header.metadata else f"{FILE_NAME} of another program"


def _patiently(send: Callable[[], Any], busy: Sequence[int]) -> Any:
    """What `send` returns, tried again while the Hub gives such answers."""
    for attempt in range(1, ATTEMPTS):
        try:
            return send()
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in busy:
                raise
            wait = error.response.headers.get("Retry-After", "")
            time.sleep(min(60, int(wait)) if wait.isdigit() else 2**attempt)
    return send()


def _collect(api: HfApi, repo: str, collection: str, *, private: bool) -> str:
    """The slug of the collection that the repository is in now.

    Raises:
        RepositoryError: There is no such collection, or it is someone else's.
        HubError: The Hub cannot be reached.
    """
    with explained(f"{repo} is pushed, but collection {collection}"):
        if "/" in collection:
            slug = collection
        else:
            owner = repo.split("/")[0]
            slug = api.create_collection(collection, namespace=owner, private=private, exists_ok=True).slug
        api.add_collection_item(slug, repo, "model", exists_ok=True)
    return slug


@contextmanager
def explained(name: str, revision: str | None = None) -> Iterator[None]:
    """Whatever the hub's client raises inside, as one line that says what to do; `name` is what it is about.

    Raises:
        RepositoryError: The user can put it right.
        OutputError: The Hub's cache cannot be written to.
        HubError: The Hub or the connection failed.
    """
    try:
        yield
    except errors.HFValidationError:
        raise RepositoryError(f"{name}: not a name that the Hub allows; a repository is called user/name") from None
    except errors.LocalTokenNotFoundError:
        raise RepositoryError(f"{name}: not logged in; `hf auth login`, or set HF_TOKEN") from None
    except errors.GatedRepoError:
        raise RepositoryError(f"{name}: accept its terms on the Hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise RepositoryError(f"{name}: the Hub has no revision {revision} of it") from None
    except errors.RemoteEntryNotFoundError:
        raise RepositoryError(f"{name}: no patch here; its repository on the Hub has no {FILE_NAME}") from None
    except errors.RepositoryNotFoundError:
        hint = "or it is private and needs a login"
        raise RepositoryError(f"{name}: no such folder, and no such repository on the Hub, {hint}") from None
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _of_status(name, cause) from None
        raise HubError(f"{name}: no such folder; the Hub cannot be reached, and it is not in the cache") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{name}: HF_HUB_OFFLINE is set, so the Hub is not asked") from None
    except errors.HfHubHTTPError as error:
        raise _of_status(name, error) from None
    except RuntimeError as error:  # what the client makes of a large file that does not get through
        if error.__cause__ is None:
            raise HubError(f"{name}: the transfer failed ({_told(error)}); try again") from None
        with explained(name, revision):
            raise error.__cause__ from None
    except (json.JSONDecodeError, UnicodeDecodeError):  # the page of something on the way, taken for an answer
        raise HubError(f"{name}: the Hub's answer cannot be read; try again later") from None
    except ValueError as error:  # what the Hub says of a card's metadata
        raise RepositoryError(f"{name}: the Hub refuses it: {_told(error)}") from None
    except (errors.HTTPError, OSError) as error:  # no answer at all, or one that broke off
        if refusal := unwritable(error):
            raise OutputError(f"{name}: {refusal}") from None
        failed = f"the connection to the Hub failed ({_told(error)})"
        raise HubError(f"{name}: {failed}; nothing is half-done, try again") from None


def _told(error: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _of_status(name: str, error: errors.HfHubHTTPError) -> HubError | RepositoryError:
    """What an answer of the Hub means by its status."""
    status = error.response.status_code
    told = " ".join(str(error.server_message or "").split())[:200]
    match status:
        case 401:
            return RepositoryError(
                f"{name}: the Hub refuses the token, or there is none; `hf auth login`, or set HF_TOKEN"
            )
        case 403:
            return RepositoryError(f"{name}: this login may not write there; choose a name of your own, or --create-pr")
        case 404:
            return RepositoryError(f"{name}: not on the Hub, or this login may not see it")
        case 409 | 412:
            return HubError(
                f"{name}: someone else changed it at the same time; nothing of this push is there, push again"
            )
        case 429:
            return HubError(f"{name}: the Hub has had too many requests (429); wait a few minutes and try again")
        case _ if status >= 500:
            return HubError(f"{name}: the Hub fails ({status}); nothing is half-done, try again later")
    return RepositoryError(f"{name}: the Hub refuses it ({status}): {told or 'it does not say why'}")
