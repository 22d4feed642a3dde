"""What the stand-in of the Hugging Face Hub holds, in memory: accounts, repositories, their commits, branches and tags.

Every refusal is a `Refusal` with the status and the `X-Error-Code` that the Hub answers.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Account", "Blob", "Commit", "HubState", "Refusal", "Repository"]

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".npz", ".parquet", ".zst", ".gz")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Account:
    """Who a token belongs to: `role` "read" may not write."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.organizations)


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or for LFS the sha256 under which the repository keeps them."""

    size: int
    data: bytes = b""
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        content = self.pointer if self.sha256 else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str
    tree: Mapping[str, Blob]
    title: str
    description: str
    author: str
    date: str

    def card(self) -> dict[str, Any]:
        """The metadata of README.md."""
        text = self.tree["README.md"].data.decode() if "README.md" in self.tree else ""
        start, _, rest = text.partition("---\n")
        value = yaml.safe_load(rest.partition("\n---")[0]) if not start and rest else {}
        return value if isinstance(value, dict) else {}


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._add("main", "", {".gitattributes": Blob(len(ATTRIBUTES), ATTRIBUTES)}, "initial commit", "", "system")

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit's hash means."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def content(self, blob: Blob) -> bytes:
        return self.lfs[blob.sha256] if blob.sha256 else blob.data

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def commit(
        self,
        branch: str,
        parent: str,
        operations: Iterable[Mapping[str, Any]],
        title: str,
        description: str,
        author: str,
    ) -> Commit:
        """All operations or none. Refuses where the branch is not at `parent`, if that is given."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.commits[self.branches[branch]]
        if parent and not head.oid.startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            self._apply(tree, operation["key"], operation["value"])
        for path in tree:
            if any(folder in tree for folder in _folders(path)):
                raise Refusal(400, f"{path}: a file and a folder have the same name")
        return self._add(branch, head.oid, tree, title, description, author)

    def _apply(self, tree: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = Blob(len(value["content"]), value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.lfs:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            tree[path] = Blob(len(self.lfs[value["oid"]]), sha256=value["oid"])
        elif key == "deletedFile":
            if path not in tree:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            del tree[path]
        elif key == "deletedFolder":
            for inside in [other for other in tree if other.startswith(path.rstrip("/") + "/")]:
                del tree[inside]
        else:
            raise Refusal(400, f"unknown operation {key}")

    def _add(
        self, branch: str, parent: str, tree: dict[str, Blob], title: str, description: str, author: str
    ) -> Commit:
        files = {path: blob.oid for path, blob in sorted(tree.items())}
        seed = json.dumps([parent, files, title, description, time.time_ns()])
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, tree, title, description, author, date)
        self.commits[made.oid] = made
        self.branches[branch] = made.oid
        return made

    def entries(self, commit: Commit, under: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders as the tree listing gives them."""
        prefix = under.strip("/") + "/" if under.strip("/") else ""
        inside = [path for path in sorted(commit.tree) if path.startswith(prefix)]
        if prefix and not inside:
            raise Refusal(404, f"{under} does not exist on {commit.oid}", "EntryNotFound")
        folders = {folder for path in inside for folder in _folders(path) if folder.startswith(prefix)}
        found: list[dict[str, Any]] = [
            {"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in folders
        ]
        found += [commit.tree[path].described(path) for path in inside]
        shown = [entry for entry in found if recursive or "/" not in entry["path"][len(prefix) :]]
        return sorted(shown, key=lambda entry: str(entry["path"]))

    def info(self, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
        card = commit.card()
        tags = [str(tag) for tag in card.get("tags") or ()]
        for key in ("license", "base_model"):
            values = card.get(key)
            tags += [f"{key}:{value}" for value in ([values] if isinstance(values, str) else values or ())]
        siblings = []
        for path, blob in sorted(commit.tree.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                entry = blob.described(path)
                sibling |= {"size": blob.size, "blobId": blob.oid}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
            siblings.append(sibling)
        first = self.history(commit.oid)[-1]
        return {
            "_id": hashlib.sha1(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.partition("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": first.date,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": siblings,
        }


class HubState:
    """All repositories and accounts. Whoever touches it holds `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}

    def account(self, authorization: str | None) -> Account | None:
        if not authorization:
            return None
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def readable(self, name: str, account: Account | None) -> Repository:
        """A repository that the account may see; for others it does not exist, as on the Hub."""
        found = self.repositories.get(name)
        if found is not None and self.sees(found, account):
            return found
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    @staticmethod
    def sees(repository: Repository, account: Account | None) -> bool:
        return not repository.private or (account is not None and repository.id.partition("/")[0] in account.namespaces)

    def writable(self, name: str, account: Account | None) -> Repository:
        found = self.readable(name, account)
        self.may_write(name.partition("/")[0], account)
        return found

    @staticmethod
    def may_write(namespace: str, account: Account | None) -> Account:
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account.role != "write" or namespace not in account.namespaces:
            raise Refusal(
                403, f"You don't have the rights to create or change a model under the namespace {namespace!r}"
            )
        return account

    def downloadable(self, name: str, account: Account | None) -> Repository:
        """A repository whose files the account may read: of a gated one its members alone."""
        found = self.readable(name, account)
        if found.gated and (account is None or name.partition("/")[0] not in account.namespaces):
            raise Refusal(403 if account else 401, f"Access to model {name} is restricted", "GatedRepo")
        return found


def _folders(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
