"""A Hub in a thread, speaking the protocol that huggingface_hub's client speaks, with faults to order.

It keeps what it is given in memory: repositories with commits, branches and pull requests, large files by SHA-256, users by
token, collections. The real Hub refuses weights as plain blobs; so does this one, and they go the way of LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png", ".bin")
"""Files of these kinds are stored as LFS objects."""


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's SHA-1 of a small one."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, and the branches and pull requests that name them."""

    owner: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, files: dict[str, Blob], message: str) -> str:
        """The id of a new commit of these files."""
        told = json.dumps([len(self.commits), message, sorted((k, v.oid) for k, v in files.items())])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha


@dataclass
class Fault:
    """What happens, so many times, to requests of a method whose path matches."""

    method: str
    path: str
    times: int
    status: int | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    """Close the connection in the middle: of the body that comes, or of the one that goes."""
    spoil: bool = False
    """Send other bytes of the right number."""
    then: Callable[[], None] | None = None
    """Something else that happens at this moment."""


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class FakeHub:
    """The server and what it holds. `users` are names by token."""

    def __init__(self) -> None:
        self.users = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.uploaded = 0
        self.gone = False
        self.visibility = "public"  # of what is made without a word on it, as organisations set it
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Be gone: connections that are open get no answer either."""
        self.gone = True
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str, *, times: int = 1, **what: Any) -> None:
        """Order a fault; see `Fault`."""
        self.faults.append(Fault(method, path, times, **what))

    def files(self, repo: str, ref: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        found = self.repos[repo]
        return {name: blob.data for name, blob in found.commits[found.refs[ref]].items()}

    def asked(self, method: str, path: str) -> int:
        """How many requests there were of a method whose path matches."""
        return sum(m == method and bool(re.search(path, p)) for m, p in self.requests)


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            """One request, from its fault to its route."""
            if hub.gone:
                self.connection.close()
                self.close_connection = True
                return
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            hub.requests.append((self.command, url.path))
            found = (f for f in hub.faults if f.times and f.method == self.command and re.search(f.path, url.path))
            self.fault = next(found, None)
            try:
                if self.fault:
                    self.fault.times -= 1
                    if self.fault.then:
                        self.fault.then()
                if self.fault and self.fault.cut and self.command in ("PUT", "POST"):
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self.connection.close()
                    self.close_connection = True
                    return
                self.body = self.read_body()
                if self.fault and self.fault.status:
                    self.send(self.fault.status, self.fault.body or {"error": "ordered"}, self.fault.headers)
                    return
                for method, pattern, name in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in method.split():
                        getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                        return
                raise Refused(404, f"no route {self.command} {url.path}")
            except Refused as refused:
                headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
                self.send(refused.status, {"error": str(refused)}, headers)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def send(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.fault and self.fault.spoil:
                raw = bytes(b ^ 1 for b in raw)
            if self.fault and self.fault.cut:
                raw, self.close_connection = raw[: len(raw) // 2], True
            self.wfile.write(raw)

        # ---- who asks, and for what -------------------------------------------------------------------------------

        def user(self) -> str | None:
            """Who asks; None without a token."""
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in hub.users:
                raise Refused(401, "Invalid credentials in Authorization header")
            return hub.users.get(token)

        def repo(self, id: str, *, write: bool = False) -> Repo:
            """A repository that the user may see, and write to where that is asked for."""
            user, repo = self.user(), hub.repos.get(id)
            if repo is None or (repo.private and repo.owner != user):
                raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
            if write and repo.owner != user:
                raise Refused(403 if user else 401, "You don't have the rights to write here")
            return repo

        def commit_of(self, repo: Repo, rev: str) -> str:
            sha = repo.refs.get(rev, rev)
            if sha not in repo.commits:
                raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            return sha

        # ---- routes ------------------------------------------------------------------------------------------------

        def whoami(self) -> None:
            user = self.user()
            if user is None:
                raise Refused(401, "Invalid username or password.")
            self.send(200, {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

        def create(self) -> None:
            asked, user = json.loads(self.body), self.user()
            if user is None:
                raise Refused(401, "Invalid username or password.")
            owner = asked.get("organization") or user
            id = f"{owner}/{asked['name']}"
            if owner != user:
                raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
            if id in hub.repos:
                self.send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{id}"})
                return
            repo = hub.repos[id] = Repo(owner, asked.get("visibility", hub.visibility) == "private")
            repo.add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
            self.send(200, {"url": f"{hub.url}/{id}"})

        def validate_yaml(self) -> None:
            import yaml

            content = json.loads(self.body)["content"]
            head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            told = yaml.safe_load(head[1]) if head else {}
            wrong = [] if told.get("license") else [{"message": '"license" is missing'}]
            if told.get("base_model") == "emoji":
                wrong.append({"message": '"base_model" must be a Hub id'})
            self.send(400 if wrong else 200, {"errors": wrong, "warnings": []})

        def preupload(self, id: str, rev: str) -> None:
            repo = self.repo(id, write="create_pr" not in self.query)
            there = repo.commits[self.commit_of(repo, rev)]
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": there[f["path"]].oid if f["path"] in there else None,
                }
                for f in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": files})

        def batch(self, id: str) -> None:
            self.repo(id)
            if self.user() is None:
                raise Refused(401, "Invalid username or password.")
            objects = []
            for told in json.loads(self.body)["objects"]:
                link = {"upload": {"href": f"{hub.url}/lfs/{told['oid']}", "header": {}}}
                link["verify"] = {"href": f"{hub.url}/lfs-verify", "header": {}}
                objects.append({**told, **({} if told["oid"] in hub.objects else {"actions": link})})
            self.send(200, {"transfer": "basic", "objects": objects})

        def put(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, "the content has another hash")
            hub.objects[oid] = self.body
            hub.uploaded += len(self.body)
            self.send(200, {})

        def verify(self) -> None:
            told = json.loads(self.body)
            if len(hub.objects.get(told["oid"], b"")) != told["size"]:
                raise Refused(400, "the object is not here")
            self.send(200, {})

        def branch(self, id: str, rev: str) -> None:
            repo = self.repo(id, write=True)
            if rev in repo.refs:
                raise Refused(409, "Reference already exists")
            repo.refs[rev] = repo.refs["main"]
            self.send(200, {})

        def commit(self, id: str, rev: str) -> None:
            pull_request = "create_pr" in self.query
            repo = self.repo(id, write=not pull_request)
            lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
            head = next(line["value"] for line in lines if line["key"] == "header")
            parent = self.commit_of(repo, rev)
            if head.get("parentCommit") not in (None, parent):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[parent])
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "file":
                        if value["path"].endswith(LARGE):
                            raise Refused(400, f"{value['path']} must be stored as LFS")
                        files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                    case "lfsFile":
                        if value["oid"] not in hub.objects:
                            raise Refused(400, f"{value['path']} was not uploaded")
                        files[value["path"]] = Blob(hub.objects[value["oid"]], True)
                    case "deletedFile":
                        if files.pop(value["path"], None) is None:
                            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            number = sum(r.startswith("refs/pr/") for r in repo.refs) + 1
            ref = f"refs/pr/{number}" if pull_request else rev
            sha = repo.add(ref, files, head["summary"])
            told = {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{id}/commit/{sha}"}
            if pull_request:
                told["pullRequestUrl"] = f"{hub.url}/{id}/discussions/{number}"
            self.send(200, told)

        def info(self, id: str, rev: str = "main") -> None:
            repo = self.repo(id)
            sha = self.commit_of(repo, rev)
            names = [{"rfilename": n} for n in sorted(repo.commits[sha])]
            self.send(200, {"_id": id, "id": id, "modelId": id, "sha": sha, "private": repo.private, "siblings": names})

        def tree(self, id: str, rev: str) -> None:
            repo = self.repo(id)
            entries = []
            for name, blob in sorted(repo.commits[self.commit_of(repo, rev)].items()):
                more = {"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}} if blob.large else {}
                entries.append({"type": "file", "path": name, "size": len(blob.data), "oid": blob.oid, **more})
            self.send(200, entries)

        def resolve(self, id: str, rev: str, path: str) -> None:
            repo = self.repo(id)
            sha = self.commit_of(repo, rev)
            if path not in repo.commits[sha]:
                raise Refused(404, "Entry not found", "EntryNotFound")
            blob = repo.commits[sha][path]
            headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
            if blob.large:
                headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
            if ranged := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                last = min(int(ranged[2] or len(blob.data) - 1), len(blob.data) - 1)
                headers["Content-Range"] = f"bytes {ranged[1]}-{last}/{len(blob.data)}"
                self.send(206, blob.data[int(ranged[1]) : last + 1], headers)
                return
            self.send(200, blob.data, headers)

        def create_collection(self) -> None:
            asked, user = json.loads(self.body), self.user()
            if asked["namespace"] != user:
                raise Refused(403, "You don't have the rights to create a collection there")
            slug = f"{user}/{asked['title'].lower().replace(' ', '-')}-{hashlib.sha1(asked['title'].encode()).hexdigest()[:24]}"
            taken = slug in hub.collections
            made = {"slug": slug, "title": asked["title"], "owner": {"name": user}, "items": [], "private": False}
            made |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
            found = hub.collections.setdefault(slug, made)
            self.send(409 if taken else 200, found)

        def collection(self, slug: str) -> None:
            if slug not in hub.collections:
                raise Refused(404, "Collection not found")
            self.send(200, hub.collections[slug])

        def collect(self, slug: str) -> None:
            if slug not in hub.collections:
                raise Refused(404, "Collection not found")
            found, item = hub.collections[slug], json.loads(self.body)["item"]
            taken = any(i["id"] == item["id"] for i in found["items"])
            if not taken:
                found["items"].append({"_id": "0", "position": 0, **item})
            self.send(409 if taken else 200, found)

    return Handler


ID = r"(?P<id>[^/]+/[^/]+)"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{ID}/preupload/{REV}", "preupload"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    ("POST", r"/lfs-verify", "verify"),
    ("POST", rf"/api/models/{ID}/branch/{REV}", "branch"),
    ("POST", rf"/api/models/{ID}/commit/{REV}", "commit"),
    ("GET", rf"/api/models/{ID}", "info"),
    ("GET", rf"/api/models/{ID}/revision/{REV}", "info"),
    ("GET", rf"/api/models/{ID}/tree/{REV}", "tree"),
    ("GET HEAD", rf"/{ID}/resolve/{REV}/(?P<path>.+)", "resolve"),
    ("POST", r"/api/collections", "create_collection"),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "collect"),
]
"""Method, path and what answers."""
