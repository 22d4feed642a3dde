"""How a version lies in a repository of the Hub.

    adapter_model.safetensors ...     the files of the newest version, as the expert's folder has them
    README.md                         its model card; of a version without one, a short one made here
    .xpert/OWNER/NAME@3.json ...      the documents of all versions

A commit per version, with the git tag `v3`; the other tags of the registry are git tags too, beside the documents.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from xpert.errors import BadInput
from xpert.registry.documents import DocumentName, parse_document
from xpert.registry.names import LATEST, NAME_PATTERN
from xpert.registry.versions import Record, StoredFile

__all__ = [
    "CARD",
    "FOLDER",
    "Entry",
    "Head",
    "document_path",
    "documents_in",
    "faults",
    "git_oid",
    "git_tag",
    "plain_card",
    "title_of",
]

FOLDER = ".xpert"
CARD = "README.md"
TAG = "xpert"
MIXTURE_TAG = "xpert-mixture"
# What the Hub's own pages put into a new repository.
_OF_THE_HUB = frozenset({".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"})
_VERSION_TAG = re.compile(r"v[0-9]+")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: its size, git's name of its content, and the sha256 where it is a large one (LFS)."""

    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class Head:
    """A commit with all its files."""

    repository: str
    commit: str
    files: Mapping[str, Entry]

    @cached_property
    def documents(self) -> dict[str, str]:
        """Name of every document -> git's name of its content."""
        return documents_in((path, entry.oid) for path, entry in self.files.items())

    @cached_property
    def names(self) -> set[str]:
        """The names of the experts and mixtures whose documents are here: one, unless someone meddled."""
        return {parse_document(document).name for document in self.documents}

    def numbers(self) -> list[int]:
        """The versions that are not removed, ascending."""
        parsed = map(parse_document, self.documents)
        return sorted(name.version for name in parsed if name.kind == "record" and name.version is not None)

    def check_is_for(self, name: str) -> None:
        """Raises BadInput where the repository belongs to something else than the versions of `name`."""
        others = sorted(self.names - {name})
        if others:
            raise BadInput(
                f"the repository keeps the versions of {others[0]}",
                where=self.repository,
                hint=f"publish {name} under another name, or to another namespace",
            )
        strangers = sorted(set(self.files) - _OF_THE_HUB) if not self.names else []
        if strangers:
            raise BadInput(
                f"the repository exists and holds something else: {strangers[0]}",
                where=self.repository,
                hint=f"publish {name} under another name, or to another namespace",
            )
        if ".gitignore" in self.files:
            raise BadInput(
                "the repository has a .gitignore, by which the Hub would leave out files of the version",
                where=self.repository,
                hint="delete that file on the Hub",
            )


def document_path(document: str) -> str:
    return f"{FOLDER}/{document}"


def documents_in(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of (path, mark), those that are documents: name -> mark. Other files under `.xpert/` are passed over."""
    found = {}
    for path, mark in files:
        folder, _, rest = path.partition("/")
        if folder == FOLDER and _is_document(rest):
            found[rest] = mark
    return found


def _is_document(text: str) -> bool:
    try:
        return str(parse_document(text)) == text
    except BadInput:
        return False


def git_oid(data: bytes) -> str:
    """The name that git gives a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def git_tag(document: DocumentName) -> str | None:
    """The git tag beside a tag's document; None for `latest`, which is `main`, and for what looks like a version's."""
    tag = document.tag
    return None if tag is None or tag in (LATEST, "main") or _VERSION_TAG.fullmatch(tag) else tag


def title_of(record_ref: str) -> str:
    """The first line of the commit that published a version, by which it is found where its git tag is lost."""
    return f"Publish {record_ref}"


def faults(files: Iterable[StoredFile], tree: Mapping[str, Entry]) -> dict[str, str]:
    """path -> what is wrong with it, by what a commit's listing tells: sizes, and the sha256 of large files."""
    found = {}
    for file in files:
        entry = tree.get(file.path)
        if entry is None:
            found[file.path] = "missing"
        elif entry.size != file.size:
            found[file.path] = f"holds {entry.size:,} bytes instead of {file.size:,}"
        elif entry.sha256 is not None and entry.sha256 != file.sha256:
            found[file.path] = "another content than recorded"
    return found


def plain_card(record: Record) -> bytes:
    """README.md for a version that brings none, as a mixture does; it is no file of the version."""
    version = record.version
    lines = ["---", "library_name: xpert", "tags:", f"- {TAG}"]
    if version.kind == "mixture":
        lines.append(f"- {MIXTURE_TAG}")
    if NAME_PATTERN.fullmatch(version.base):
        lines.append(f"base_model: {json.dumps(version.base)}")
    lines += ["---", "", f"# {version.name}", ""]
    if version.description:
        lines += [html.escape(" ".join(version.description.split()), quote=False), ""]
    if version.uses:
        lines += ["A mixture of these experts:", "", *(f"- {ref}" for ref in version.uses), ""]
    lines += [f"Version {version.version}, published with xpert.", ""]
    return "\n".join(lines).encode()
