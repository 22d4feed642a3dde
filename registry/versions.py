"""Version records: one immutable JSON file per published version, from which the index can be made again.

records/OWNER/NAME@3.json            version 3 of OWNER/NAME
records/OWNER/NAME@2.removed.json    version 2 was removed; its number is not given out again
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, Unavailable
from xpert.registry.blobs import Drafts, sync_folder
from xpert.registry.names import NAME_PATTERN, check_name
from xpert.storage import hash_json, read_json

__all__ = ["Part", "Record", "RecordFolder", "StoredFile", "Version", "content_digest"]

SCHEMA = 1
KINDS = ("expert", "mixture")
_FILE = re.compile(r"(?P<name>[^@]+)@(?P<version>[1-9][0-9]{0,8})(?P<removed>\.removed)?\.json")
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
        if _SHA256.fullmatch(self.sha256) is None or type(self.size) is not int or self.size < 0:
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
        names = self.path.split("/")
        if len(names) > 8 or not all(_PATH_PART.fullmatch(name) for name in names):
            raise BadInput(f"{self.path!r} may not be the name of a file of an expert", hint="rename or remove it")
        if _SHA256.fullmatch(self.sha256) is None or type(self.size) is not int or self.size < 0:
            raise BadInput(f"{self.path!r} has no sound size and sha256")
        if self.parts and sum(part.size for part in self.parts) != self.size:
            raise BadInput(f"the parts of {self.path!r} do not add up to its size")

    @property
    def blobs(self) -> tuple[Part, ...]:
        """The blobs it lies in, in order."""
        return self.parts or (Part(self.sha256, self.size),)


@dataclass(frozen=True)
class Record:
    """A version and its files, as its record file holds them."""

    version: Version
    files: tuple[StoredFile, ...]

    def to_dict(self) -> dict[str, Any]:
        value = {"schema": SCHEMA, **self.version.to_dict(), "files": [dataclasses.asdict(f) for f in self.files]}
        return value | {"checksum": hash_json(value)}

    @classmethod
    def from_dict(cls, value: Any, *, where: str) -> Record:
        """Raises Corrupt where the record does not match its own checksum, BadInput for a newer schema."""
        if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
            raise Corrupt("not a version record", where=where)
        if value["schema"] > SCHEMA:
            raise BadInput(f"written by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
        plain = {key: item for key, item in value.items() if key != "checksum"}
        if value.get("checksum") != hash_json(plain):
            raise Corrupt("damaged: the record does not match its checksum", where=where)
        try:
            files = tuple(StoredFile(**entry) for entry in plain.pop("files"))
            del plain["schema"]
            version = Version(**plain | {"skills": tuple(plain["skills"]), "uses": tuple(plain["uses"])})
            check_name(version.name)
        except (KeyError, TypeError, BadInput) as error:
            raise Corrupt(f"the record is damaged: {error}", where=where) from None
        folded = {file.path.casefold() for file in files}
        if version.kind not in KINDS or version.digest != content_digest(files) or len(folded) != len(files):
            raise Corrupt("the record contradicts itself", where=where)
        return cls(version, files)


def content_digest(files: tuple[StoredFile, ...]) -> str:
    """The hash of a version's content: of the paths and hashes of its files, in any order."""
    return hash_json({file.path: file.sha256 for file in files})


class RecordFolder:
    """The record files of one registry: the truth of what is published."""

    def __init__(self, folder: Path, drafts: Drafts) -> None:
        self.folder = folder
        self._drafts = drafts

    def path(self, name: str, version: int, *, removed: bool = False) -> Path:
        return self.folder / f"{name}@{version}{'.removed' if removed else ''}.json"

    def listing(self) -> dict[tuple[str, int], bool]:
        """(name, version) -> whether it was removed, for every record file. Reads names, not contents."""
        found: dict[tuple[str, int], bool] = {}
        for owner in _entries(self.folder):
            if owner.is_dir(follow_symlinks=False):
                found |= self._owned(owner.name)
        return found

    def numbers(self, name: str) -> dict[int, bool]:
        """version -> whether it was removed, of one name."""
        owned = self._owned(name.partition("/")[0])
        return {version: removed for (found, version), removed in owned.items() if found == name}

    def _owned(self, owner: str) -> dict[tuple[str, int], bool]:
        found: dict[tuple[str, int], bool] = {}
        for entry in _entries(self.folder / owner):
            match = _FILE.fullmatch(entry.name)
            if match is not None:
                key = f"{owner}/{match['name']}", int(match["version"])
                found[key] = match["removed"] is not None or found.get(key, False)
        return found

    def strangers(self) -> list[Path]:
        """What lies among the records and is none."""
        found = []
        for owner in _entries(self.folder):
            if not owner.is_dir(follow_symlinks=False):
                found.append(Path(owner.path))
                continue
            for entry in _entries(Path(owner.path)):
                match = _FILE.fullmatch(entry.name)
                name = f"{owner.name}/{match['name']}" if match else ""
                if not NAME_PATTERN.fullmatch(name) or not entry.is_file(follow_symlinks=False):
                    found.append(Path(entry.path))
        return sorted(found)

    def read(self, name: str, version: int) -> Record:
        """Raises NotFound where there is no such record, Corrupt where it is damaged."""
        path = self.path(name, version)
        try:
            value = read_json(path)
        except RecursionError:
            raise Corrupt("damaged: nested too deeply", where=str(path)) from None
        record = Record.from_dict(value, where=str(path))
        if (record.version.name, record.version.version) != (name, version):
            raise Corrupt(f"holds the record of {record.version.ref}", where=str(path))
        return record

    def add(self, record: Record) -> None:
        """Writes a new record, whole; raises FileExistsError where that version has one."""
        target = self.path(record.version.name, record.version.version)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self._link(text + "\n", target)

    def remove(self, name: str, version: int) -> None:
        """Turns a record into the mark that its version was removed, in one step."""
        target = self.path(name, version, removed=True)
        try:
            self.path(name, version).rename(target)
            sync_folder(target.parent)
        except FileNotFoundError:  # someone deleted the record by hand: its number must stay taken all the same
            self._link(json.dumps({"schema": SCHEMA, "name": name, "version": version}) + "\n", target)

    def _link(self, text: str, target: Path) -> None:
        # A hard link appears whole and never replaces a file, which neither a rename nor O_EXCL gives alone.
        with self._drafts.new() as (draft, stream):
            stream.write(text.encode())
            stream.flush()
            os.fchmod(stream.fileno(), 0o444)
            os.fsync(stream.fileno())
            try:
                os.link(draft, target)
            except (PermissionError, NotImplementedError) as error:
                raise Unavailable(
                    f"the record could not be linked ({error})",
                    where=str(target),
                    hint="a registry needs a file system with hard links",
                ) from None
        sync_folder(target.parent)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
