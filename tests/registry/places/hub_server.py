"""A stand-in of the Hugging Face Hub: enough of its HTTP interface for the real `huggingface_hub` client, in memory.

    with HubServer() as hub:
        hub.add_account("alice", token="hf_alice")
        HfApi(endpoint=hub.url, token="hf_alice").create_repo("alice/dates")

Model repositories only. Large files travel as on the Hub: by the LFS protocol (in one or several parts), and out by a
redirect to another host (`localhost` instead of `127.0.0.1`) that refuses requests bearing a token. Xet is not spoken:
clients need HF_HUB_DISABLE_XET=1. Faults are laid on by appending to `hub.faults`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

from tests.registry.places.hub_state import LFS_SUFFIXES, Account, Blob, HubState, Refusal, Repository

__all__ = ["Fault", "HubServer"]

LFS_FROM = 10 << 20  # bytes from which any file goes to LFS
_SIGNATURE = "signed"


@dataclass
class Fault:
    """Something that goes wrong with requests whose "METHOD /path" `on` is found in.

    `status` answers it; `cut` closes the connection after so many bytes of the body; `forget` does what was asked and
    closes the connection without a reply; `seconds` delays. Strikes every `every`-th of them after the first `skip`,
    `times` times.
    """

    on: str
    status: int = 0
    cut: int | None = None
    forget: bool = False
    seconds: float = 0.0
    skip: int = 0
    every: int = 1
    times: int = 1_000_000
    seen: int = field(default=0, init=False)
    struck: int = field(default=0, init=False)

    def strikes(self, line: str) -> bool:
        if re.search(self.on, line) is None or self.struck >= self.times:
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.seen - self.skip) % self.every:
            return False
        self.struck += 1
        return True


class HubServer:
    """The server in a thread of its own; `url` is its address, `requests` what it was asked ("METHOD /path")."""

    def __init__(self, *, page: int = 1000, part: int | None = None) -> None:
        self.state = HubState()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []  # the Range of every download from storage, or ""
        self.page = page  # entries a page of listings
        self.part = part  # bytes a part of multi-part uploads; None: always in one
        self.parts: dict[tuple[str, int], bytes] = {}
        self.connections: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self.connections):  # clients keep them open for their next request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def add_account(
        self, name: str, *, token: str, role: str = "write", organizations: tuple[str, ...] = ()
    ) -> Account:
        self.state.accounts[token] = Account(name, role, organizations)
        return self.state.accounts[token]

    def repository(self, name: str) -> Repository:
        return self.state.repositories[name]

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        repository = self.repository(name)
        return repository.content(repository.at(revision).tree[path])

    def flip(self, name: str, path: str, revision: str = "main") -> None:
        """Turns one bit of a file over, behind the back of everything that knows its hash."""
        repository = self.repository(name)
        commit = repository.at(revision)
        blob = commit.tree[path]
        data = bytearray(repository.content(blob))
        data[len(data) // 2] ^= 1
        if blob.sha256:
            repository.lfs[blob.sha256] = bytes(data)
        else:
            commit.tree[path] = Blob(blob.size, bytes(data))  # type: ignore[index]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *arguments: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small answers need not wait
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    # ── the way of a request ─────────────────────────────────────────────────────────────────────────────────────

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self.body = self._chunks()
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        line = f"{self.command} {unquote(self.route)}"
        with self.hub.state.lock:
            self.hub.requests.append(line)
            struck = [fault for fault in self.hub.faults if fault.strikes(line)]
        self.fault = struck[0] if struck else None
        for fault in struck:
            time.sleep(fault.seconds)
        if self.fault is not None and self.fault.status:
            self._refuse(Refusal(self.fault.status, "the stand-in was told to fail"))
            return
        try:
            with self.hub.state.lock:
                answer = self._dispatch()
        except Refusal as refusal:
            self._refuse(refusal)
            return
        self._answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _dispatch(self) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match is not None and self.command in method.split():
                if function.__name__.startswith("cdn"):
                    return function(self, **_unquoted(match))
                account = self.hub.state.account(self.headers.get("Authorization"))
                return function(self, account=account, **_unquoted(match))
        raise Refusal(404, f"the stand-in knows no {self.command} {self.route}")

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        self._answer(refusal.status, headers, json.dumps({"error": refusal.message}).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        fault = self.fault
        if fault is not None and fault.forget:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            body = body[: fault.cut]
            self.close_connection = True
        self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()

    def _sent(self) -> Any:
        return json.loads(self.body or b"{}")

    def _flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def _paged(self, items: list[Any]) -> tuple[int, dict[str, str], bytes]:
        """A page of a listing, with the address of the next one in a Link header."""
        size = min(self.hub.page, int(self.query.get("limit", ["1000"])[0]))
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(items):
            rest = {name: value for name, value in self.query.items() if name != "cursor"}
            following = urlencode(rest | {"cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.hub.url}{self.route}?{following}>; rel="next"'
        return self._json(items[start : start + size], **headers)

    # ── accounts and repositories ────────────────────────────────────────────────────────────────────────────────

    def whoami(self, account: Account | None) -> tuple[int, dict[str, str], bytes]:
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name} for name in account.organizations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        return self._json({"type": "user", "name": account.name, "orgs": organizations, "auth": token})

    def create(self, account: Account | None) -> tuple[int, dict[str, str], bytes]:
        sent = self._sent()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{sent.get('organization') or account.name}/{sent['name']}"
        self.hub.state.may_write(name.partition("/")[0], account)
        if name in self.hub.state.repositories:
            refused = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            return self._json(refused, 409, **{"X-Error-Message": refused["error"]})
        private = sent.get("visibility") == "private" or bool(sent.get("private"))
        self.hub.state.repositories[name] = Repository(name, private)
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def drop(self, account: Account | None) -> tuple[int, dict[str, str], bytes]:
        sent = self._sent()
        name = f"{sent.get('organization') or (account.name if account else '')}/{sent['name']}"
        self.hub.state.writable(name, account)
        del self.hub.state.repositories[name]
        return self._json({})

    def check_yaml(self, account: Account | None) -> tuple[int, dict[str, str], bytes]:
        text = self._sent()["content"]
        start, _, rest = text.partition("---\n")
        if start or not rest:
            return self._json({"errors": [], "warnings": []})
        try:
            value = yaml.safe_load(rest.partition("\n---")[0])
            problem = None if isinstance(value, dict) else "metadata is no mapping"
        except yaml.YAMLError as error:
            problem = str(error).splitlines()[0]
        if problem:
            return self._json({"errors": [{"message": problem}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def models(self, account: Account | None) -> tuple[int, dict[str, str], bytes]:
        state, asked = self.hub.state, self.query
        author, search = asked.get("author", [""])[0], asked.get("search", [""])[0].lower()
        found = []
        for name, repository in sorted(state.repositories.items()):
            info = repository.info(repository.head)
            if author and info["author"].lower() != author.lower():
                continue
            if (
                search in name.lower()
                and set(asked.get("filter", ())) <= set(info["tags"])
                and state.sees(repository, account)
            ):
                found.append(self._shown(info))
        return self._paged(found)

    def _shown(self, info: dict[str, Any]) -> dict[str, Any]:
        """As much of a model as listings show: what `expand` names, or more with `full` and `cardData`."""
        expand = self.query.get("expand")
        if expand:
            return {key: value for key, value in info.items() if key in ("_id", "id", *expand)}
        hidden = set() if self._flag("full") else {"sha", "lastModified", "siblings", "author", "gated", "disabled"}
        hidden |= set() if self._flag("cardData") else {"cardData"}
        return {key: value for key, value in info.items() if key not in hidden}

    def model(self, account: Account | None, id: str, rev: str = "main") -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.readable(id, account)
        info = repository.info(repository.at(rev), blobs=self._flag("blobs"))
        return self._json(self._shown(info) if self.query.get("expand") else info)

    # ── revisions and trees ──────────────────────────────────────────────────────────────────────────────────────

    def tree(self, account: Account | None, id: str, rev: str, path: str = "") -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.readable(id, account)
        return self._paged(repository.entries(repository.at(rev), path, recursive=self._flag("recursive")))

    def paths_info(self, account: Account | None, id: str, rev: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.readable(id, account)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = self._sent()["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        tree = repository.at(rev).tree
        return self._json([tree[path].described(path) for path in paths if path in tree])

    def refs(self, account: Account | None, id: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.readable(id, account)
        branches = [_ref(name, f"refs/heads/{name}", oid) for name, oid in repository.branches.items()]
        tags = [_ref(name, f"refs/tags/{name}", oid) for name, oid in repository.tags.items()]
        return self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, account: Account | None, id: str, rev: str) -> tuple[int, dict[str, str], bytes]:
        history = self.hub.state.readable(id, account).history(rev)
        return self._paged(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.description,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in history
            ]
        )

    def tag(self, account: Account | None, id: str, name: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.writable(id, account)
        if self.command == "DELETE":
            if name not in repository.tags:
                raise Refusal(404, f"Tag not found: {name}", "RevisionNotFound")
            del repository.tags[name]
            return self._json({})
        tag = self._sent()["tag"]
        commit = repository.at(name)
        if tag in repository.tags:
            raise Refusal(409, "Tag reference exists already")
        repository.tags[tag] = commit.oid
        return self._json({})

    def branch(self, account: Account | None, id: str, name: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.writable(id, account)
        if self.command == "DELETE":
            if repository.branches.pop(name, None) is None:
                raise Refusal(404, f"Branch not found: {name}", "RevisionNotFound")
            return self._json({})
        if name in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[name] = repository.at(self._sent().get("startingPoint") or "main").oid
        return self._json({})

    # ── uploads ──────────────────────────────────────────────────────────────────────────────────────────────────

    def preupload(self, account: Account | None, id: str, rev: str) -> tuple[int, dict[str, str], bytes]:
        tree = self.hub.state.writable(id, account).at(rev).tree
        files = []
        for file in self._sent()["files"]:
            large = file["size"] >= LFS_FROM or file["path"].endswith(LFS_SUFFIXES)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            known = tree.get(file["path"])
            if known is not None:
                answer["oid"] = known.sha256 or known.oid
            files.append(answer)
        return self._json({"files": files})

    def lfs_batch(self, account: Account | None, id: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.writable(id, account)
        objects = []
        for wanted in self._sent()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repository.lfs:
                place = f"{self.hub.url}/lfs/{id}/{oid}"
                upload: dict[str, Any] = {"href": f"{place}?{_SIGNATURE}=1"}
                if self.hub.part and size > self.hub.part:
                    count = -(-size // self.hub.part)
                    header = {str(number): f"{place}/{number}?{_SIGNATURE}=1" for number in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part), **header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{id}/verify"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def cdn_put(self, id: str, oid: str, part: str = "") -> tuple[int, dict[str, str], bytes]:
        self._signed()
        if part:
            self.hub.parts[oid, int(part)] = self.body
            return 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}, b""
        return self._keep(id, oid, self.body)

    def cdn_join(self, id: str, oid: str) -> tuple[int, dict[str, str], bytes]:
        numbers = [part["partNumber"] for part in self._sent()["parts"]]
        return self._keep(id, oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))

    def _keep(self, id: str, oid: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the content does not match its sha256")
        self.hub.repository(id).lfs[oid] = data
        return self._json({})

    def verify(self, account: Account | None, id: str) -> tuple[int, dict[str, str], bytes]:
        sent = self._sent()
        data = self.hub.state.writable(id, account).lfs.get(sent["oid"])
        if data is None or len(data) != sent["size"]:
            raise Refusal(404, "no such object")
        return self._json({})

    def commit(self, account: Account | None, id: str, rev: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.writable(id, account)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        for operation in operations:
            if operation["key"] == "file":
                operation["value"]["content"] = base64.b64decode(operation["value"]["content"])
        sent = header["value"]
        made = repository.commit(
            rev,
            sent.get("parentCommit") or "",
            operations,
            sent["summary"],
            sent.get("description") or "",
            account.name if account else "",
        )
        url = f"{self.hub.url}/{id}/commit/{made.oid}"
        return self._json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    # ── downloads ────────────────────────────────────────────────────────────────────────────────────────────────

    def resolve(self, account: Account | None, id: str, rev: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.hub.state.downloadable(id, account)
        commit = repository.at(rev)
        blob = commit.tree.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if not blob.sha256:
            return self._ranged(blob.data, headers)
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        place = f"http://localhost:{self.hub.port}/cdn/{quote(id)}/{blob.sha256}?{_SIGNATURE}=1"
        return 302, {**headers, "Location": place}, b""

    def cdn_get(self, id: str, oid: str) -> tuple[int, dict[str, str], bytes]:
        self._signed()
        self.hub.ranges.append(self.headers.get("Range") or "")
        return self._ranged(self.hub.repository(id).lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _signed(self) -> None:
        """Storage goes by the address alone, and refuses those who bear a token besides, as S3 does."""
        if self.headers.get("Authorization") or _SIGNATURE not in self.query:
            raise Refusal(400, "Only one auth mechanism allowed")

    def _ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 200, {**headers, "Content-Length": str(len(data))}, data
        start, stop = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if start >= len(data):
            raise Refusal(416, f"bytes */{len(data)}")
        part = data[start : stop + 1]
        span = f"bytes {start}-{stop}/{len(data)}"
        return 206, {**headers, "Content-Range": span, "Content-Length": str(len(part))}, part


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


def _unquoted(match: re.Match[str]) -> dict[str, str]:
    return {name: unquote(value) for name, value in match.groupdict().items() if value is not None}


_ID = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/models/{_ID}"
_REV = r"(?P<rev>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., tuple[int, dict[str, str], bytes]]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.drop),
    ("POST", r"/api/validate-yaml", _Handler.check_yaml),
    ("GET", r"/api/models", _Handler.models),
    ("GET", rf"{_API}(?:/revision/{_REV})?", _Handler.model),
    ("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REV}", _Handler.paths_info),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET", rf"{_API}/commits/{_REV}", _Handler.commits),
    ("POST DELETE", rf"{_API}/tag/(?P<name>[^/]+)", _Handler.tag),
    ("POST DELETE", rf"{_API}/branch/(?P<name>[^/]+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/{_REV}", _Handler.preupload),
    ("POST", rf"{_API}/commit/{_REV}", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{_ID}/verify", _Handler.verify),
    ("PUT", rf"/lfs/{_ID}/(?P<oid>[0-9a-f]+)(?:/(?P<part>\d+))?", _Handler.cdn_put),
    ("POST", rf"/lfs/{_ID}/(?P<oid>[0-9a-f]+)", _Handler.cdn_join),
    ("GET HEAD", rf"/{_ID}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
    ("GET HEAD", rf"/cdn/{_ID}/(?P<oid>[0-9a-f]+)", _Handler.cdn_get),
]
