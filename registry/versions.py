"""Versions and their records: what was published, of which files, under which number. Immutable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from xpert.errors import BadInput, Corrupt
from xpert.registry.documents import MOST_NUMBER, SCHEMA, DocumentName, document_bytes, read_checked
from xpert.registry.names import check_name, parse_ref, portable
from xpert.storage import hash_json

__all__ = ["KINDS", "MOST_VERSION", "Part", "Record", "StoredFile", "Version", "base_shown", "content_digest"]

KINDS = ("expert", "mixture")
MOST_VERSION = 999_999_999
"""Names of documents have room for nine digits."""
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+=-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Version:
    """One published version, without its files.

    `digest` is the hash of the content and the same under any name; `scores` the expert's profile (skill -> score);
    `uses` the versions a mixture refers to; `repeated` is set on the answer of a publish that found the content
    published already.
    """

    name: str
    version: int
    kind: str
    digest: str
    created: str
    size: int
    base: str = ""
    base_fingerprint: str = ""
    description: str = ""
    skills: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    repeated: bool = field(default=False, compare=False)

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def base_shown(self) -> str:
        return base_shown(self.base)

    def is_of(self, base: str) -> bool:
        """Whether `base` means its base model: by reference, by what is shown of it, or by the beginning of its
        fingerprint (8 characters or more)."""
        if base and base in (self.base, self.base_shown):
            return True
        return len(base) >= 8 and self.base_fingerprint.startswith(base)

    @property
    def strengths(self) -> tuple[str, ...]:
        """Its skills, except those it was found to have nothing of (a score of 0 or less)."""
        return tuple(skill for skill in self.skills if self.scores.get(skill, 1.0) > 0)

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name != "repeated"},
            "skills": list(self.skills),
            "scores": dict(self.scores),
            "uses": list(self.uses),
        }


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file that is a blob of its own: its sha256 and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not _is_sha256(self.sha256) or not _is_count(self.size):
            raise BadInput("a part has no sound size and sha256")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a version: its path inside the folder (`/` between parts), size in bytes and sha256.

    With `parts` it lies in the store as these blobs, end to end; without, as the one blob of its own sha256.
    """

    path: str
    size: int
    sha256: str
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        names = self.path.split("/") if isinstance(self.path, str) else []
        if not 1 <= len(names) <= 8 or not all(_PATH_PART.fullmatch(name) and portable(name) for name in names):
            raise BadInput(f"{self.path!r} may not be the name of a file of an expert", hint="rename or remove it")
        if not _is_sha256(self.sha256) or not _is_count(self.size):
            raise BadInput(f"{self.path!r} has no sound size and sha256")
        if self.parts and sum(part.size for part in self.parts) != self.size:
            raise BadInput(f"the parts of {self.path!r} do not add up to its size")

    @property
    def blobs(self) -> tuple[Part, ...]:
        """The blobs it lies in, in order."""
        return self.parts or (Part(self.sha256, self.size),)


@dataclass(frozen=True)
class Record:
    """A version and its files, as its record file holds them.

    One that was read keeps the file's very bytes and checksum, so that a copy of it elsewhere is the same, whatever
    fields later versions add.
    """

    version: Version
    files: tuple[StoredFile, ...]
    written: bytes | None = field(default=None, compare=False, repr=False)
    sealed: str | None = field(default=None, compare=False, repr=False)

    @property
    def checksum(self) -> str:
        """The checksum in its file; signatures bind it."""
        return self.sealed or str(self.to_dict()["checksum"])

    @property
    def document(self) -> DocumentName:
        return DocumentName(self.version.name, "record", self.version.version)

    def to_dict(self) -> dict[str, Any]:
        value = {"schema": SCHEMA, **self.version.to_dict(), "files": [_file_value(file) for file in self.files]}
        return value | {"checksum": hash_json(value)}

    def to_bytes(self) -> bytes:
        return self.written or document_bytes(self.to_dict())

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Record:
        """Raises Corrupt where the record does not match its own checksum, BadInput for a newer schema."""
        return replace(cls.from_dict(read_checked(data, where=where), where=where), written=data)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, where: str) -> Record:
        """A record whose checksum is known to be right; raises Corrupt where it contradicts itself."""
        plain = {key: item for key, item in value.items() if key not in ("checksum", "schema")}
        try:
            files = tuple(_file(entry) for entry in plain.pop("files"))
            if not isinstance(plain["skills"], list) or not isinstance(plain["uses"], list):
                raise ValueError("its skills and uses are no lists")
            version = Version(**plain | {"skills": tuple(plain["skills"]), "uses": tuple(plain["uses"])})
            check_name(version.name)
            _check_fields(version)
        except (KeyError, TypeError, AttributeError, ValueError, BadInput) as error:
            raise Corrupt(f"the record is damaged: {error}", where=where) from None
        if version.kind not in KINDS or version.digest != content_digest(files) or _collide(files):
            raise Corrupt("the record contradicts itself", where=where)
        if type(version.version) is not int or not 1 <= version.version <= MOST_VERSION:
            raise Corrupt(f"the record has the version number {version.version!r}", where=where)
        return cls(version, files, sealed=value.get("checksum"))


def _check_fields(version: Version) -> None:
    texts = (version.created, version.base, version.base_fingerprint, version.description, *version.skills)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a field that must be text is none")
    if not _is_count(version.size):
        raise ValueError("its size is no count")
    scores = version.scores
    if not isinstance(scores, dict) or not all(
        type(score) in (int, float) and abs(score) <= MOST_NUMBER for score in scores.values()
    ):
        raise ValueError("a score is no number, or none that a score can be")
    if any(parse_ref(ref).version is None for ref in version.uses):
        raise ValueError("it uses something that is no version")


def _collide(files: tuple[StoredFile, ...]) -> bool:
    """Whether two files cannot lie in one folder: names equal but for case, or one the folder of another."""
    folded = {file.path.casefold() for file in files}
    folders = {name.rpartition("/")[0] for name in folded}
    while inner := {name.rpartition("/")[0] for name in folders} - folders:
        folders |= inner
    return len(folded) != len(files) or bool(folded & folders)


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number <= MOST_NUMBER


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def _file_value(file: StoredFile) -> dict[str, Any]:
    value: dict[str, Any] = {"path": file.path, "size": file.size, "sha256": file.sha256}
    return value | ({"parts": [[part.sha256, part.size] for part in file.parts]} if file.parts else {})


def _file(value: Mapping[str, Any]) -> StoredFile:
    parts = tuple(Part(sha256, size) for sha256, size in value.get("parts", ()))
    return StoredFile(value["path"], value["size"], value["sha256"], parts)


def base_shown(reference: str) -> str:
    """A base model's reference in a line; of a path its last part, since folders of other machines say nothing here."""
    is_path = reference.startswith(("/", "~", ".")) or "\\" in reference
    return re.split(r"[/\\]", reference.rstrip("/\\"))[-1] if is_path else reference


def content_digest(files: tuple[StoredFile, ...]) -> str:
    """The hash of a version's content: of the paths and hashes of its files, in any order and however they are cut."""
    return hash_json({file.path: file.sha256 for file in files})
