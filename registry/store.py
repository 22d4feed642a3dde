"""The registry: a folder in which experts and mixtures have names, immutable versions, and files that prove themselves.

    registry.json       what this folder is
    blobs/              files by sha256               (blobs.py)
    records/            one JSON file a version       (versions.py)
    index.sqlite        made from the records         (index.py)
    drafts/             files under way

Order of writing: blobs, then the record, then the index. A process may die between any two steps: a blob without a
record is litter for `gc`, a record without an index row is indexed when the registry is next opened. Numbers are given
out, and things are removed, inside the index's one writing transaction.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, nearest
from xpert.progress import SILENT, Progress
from xpert.registry.blobs import BlobStore, Drafts
from xpert.registry.card import CARD_FILE
from xpert.registry.checkout import check_out, check_out_to_cache
from xpert.registry.index import Index, search_words
from xpert.registry.intake import GIB, MIXTURE_FILE, WEIGHTS_FILE, Intake, examine, read_document
from xpert.registry.names import LATEST, Ref, check_name, default_registry, parse_ref, registry_folder
from xpert.registry.soundness import Problem, problems
from xpert.registry.versions import Record, RecordFolder, StoredFile, Version, content_digest
from xpert.storage import disk_errors, read_json, write_json

__all__ = ["Details", "Entry", "Garbage", "Hit", "Problem", "Registry", "Version", "default_registry"]

MARK = "registry.json"
SCHEMA = 1
MAX_GIB = 4.0


@dataclass(frozen=True)
class Entry:
    """One name: its latest version, and the numbers of all."""

    latest: Version
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Details:
    """A version with its files and its document: the card of an expert, the JSON of a mixture."""

    version: Version
    files: tuple[StoredFile, ...]
    document: dict[str, Any]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Hit:
    """A version that a search found, with its best skill among those asked for, where it has a profile."""

    version: Version
    skill: str | None
    score: float | None


@dataclass(frozen=True)
class Garbage:
    """What `gc` removed, or would remove: blobs no version needs, and drafts of dead processes."""

    files: int
    size: int


class Registry:
    """A registry in a folder. Opens the index anew for every call, so it may be shared by threads and kept for long.

    `location` is a path or a `file://` URL; without one it is `$XPERT_REGISTRY` or the user's data folder, which may
    not exist yet and then reads as empty. `publish` makes the folder.
    """

    def __init__(self, location: str | Path | None = None) -> None:
        self._may_be_absent = location is None
        self.folder = default_registry() if location is None else registry_folder(location)
        drafts = Drafts(self.folder / "drafts")
        self._drafts = drafts
        self._blobs = BlobStore(self.folder / "blobs", drafts)
        self._records = RecordFolder(self.folder / "records", drafts)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def publish(
        self,
        source: str | Path,
        name: str,
        *,
        max_gib: float = MAX_GIB,
        allow_secret_like: bool = False,
        progress: Progress = SILENT,
    ) -> Version:
        """Files an expert folder or a mixture file under `owner/name` as its next version.

        Content that the name has already is not published again: its version is returned, with `repeated` set.
        Raises BadInput or Corrupt for anything that may not enter (see `intake.py`), and for a mixture whose experts
        are not all in this registry. Cost: each file is read twice and written once.
        """
        check_name(name)
        intake = examine(Path(source), max_bytes=int(max_gib * GIB), allow_secret_like=allow_secret_like)
        if intake.left_out:
            progress.say(f"left out: {', '.join(intake.left_out)}")
        with disk_errors(self.folder):
            self._make()
            for path, file in intake.files:
                self._blobs.put(path, file.sha256)
            with self._open() as index, index.writing():
                version = self._file(index, intake, name)
        if version.repeated:
            progress.say(f"this content is published already, as {version.ref}")
        return version

    def _file(self, index: Index, intake: Intake, name: str) -> Version:
        """Inside the writing transaction: gives out the number, writes the record, adds it to the index."""
        self._follow(index, name)
        clash = index.clash(name)
        if clash is not None:
            raise BadInput(f"{name} differs from the published {clash} by case only", hint="choose another name")
        digest = content_digest(intake.stored)
        published = index.versions(name)
        for earlier in published:
            if earlier.digest == digest and self._records.path(name, earlier.version).is_file():
                return dataclasses.replace(earlier, repeated=True)
        if published and published[-1].kind != intake.kind:
            raise BadInput(
                f"{name} is the name of {_one(published[-1].kind)}, not of {_one(intake.kind)}",
                hint="choose another name",
            )
        skills = intake.skills if intake.kind == "expert" else self._check_uses(index, intake)
        for path, file in intake.files:
            if not self._blobs.path(file.sha256).is_file():  # a `gc` ran since it was put there
                self._blobs.put(path, file.sha256)
        known = index.listing()
        taken = [*self._records.numbers(name), *(number for other, number in known if other == name)]
        version = Version(
            name=name,
            version=max(taken, default=0) + 1,
            kind=intake.kind,
            digest=digest,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            size=sum(file.size for file in intake.stored),
            base=intake.base,
            base_fingerprint=intake.base_fingerprint,
            description=intake.description,
            skills=skills,
            scores=intake.scores,
            uses=intake.uses,
        )
        self._records.add(Record(version, intake.stored))
        index.add(version)
        return version

    def _check_uses(self, index: Index, intake: Intake) -> tuple[str, ...]:
        """The skills of a mixture's experts; raises where one is not here or is not what the mixture says."""
        skills: dict[str, None] = {}
        for ref, fingerprint in zip(intake.uses, intake.use_fingerprints, strict=True):
            expert = self._resolve(index, parse_ref(ref))
            if expert.kind != "expert":
                raise BadInput(f"the mixture refers to {ref}, which is {_one(expert.kind)}")
            if intake.base_fingerprint and expert.base_fingerprint != intake.base_fingerprint:
                raise BadInput(f"{ref} belongs to another base model than the mixture")
            if fingerprint and fingerprint not in self._fingerprints(expert):
                raise BadInput(
                    f"the mixture means another content of {ref} than this registry holds",
                    hint="assemble the mixture again with `xpert mix`",
                )
            skills |= dict.fromkeys(expert.skills)
        return tuple(skills)

    def _fingerprints(self, expert: Version) -> set[str]:
        """What a mixture may name an expert's content by: the version's digest, or the sha256 of its weights."""
        files = self._records.read(expert.name, expert.version).files
        return {expert.digest, *(file.sha256 for file in files if file.path == WEIGHTS_FILE)}

    def remove(self, ref: str, *, force: bool = False) -> list[Version]:
        """Removes one version, or all versions of a name where `ref` has none; their numbers stay taken.

        Raises BadInput where a mixture that stays refers to one of them, unless forced. Files go with `gc`.
        """
        wanted = parse_ref(ref)
        every = "@" not in ref
        with disk_errors(self.folder), self._open() as index, index.writing():
            latest = self._resolve(index, wanted)
            gone = index.versions(wanted.name) if every else [latest]
            refs = {version.ref for version in gone}
            users = [m for m in index.all(kind="mixture") if refs & set(m.uses) and m.ref not in refs]
            if users and not force:
                raise BadInput(
                    f"{users[0].ref} refers to {min(refs & set(users[0].uses))}",
                    hint="remove that mixture first, or use --force",
                )
            for version in gone:
                self._records.remove(version.name, version.version)
                index.mark_removed(version.name, version.version)
        return gone

    def gc(self, *, dry_run: bool = False) -> Garbage:
        """Removes the blobs that no version needs, and drafts of processes that have ended.

        Raises Corrupt where a record cannot be read: what it needs would then be unknown.
        """
        with disk_errors(self.folder), self._open() as index, index.writing():
            on_disk = self._records.listing()
            lost = [key for key, removed in index.listing().items() if not removed and key not in on_disk]
            if lost:
                name, number = lost[0]
                raise Corrupt(
                    f"the record of {name}@{number} is missing, so its files are unknown",
                    where=str(self.folder),
                    hint="restore it, or `xpert registry remove` that version",
                )
            needed: set[str] = set()
            for (name, number), removed in on_disk.items():
                if not removed:
                    needed.update(file.sha256 for file in self._records.read(name, number).files)
            garbage = [path for sha256, path in self._blobs.all() if sha256 and sha256 not in needed]
            garbage += self._drafts.stale()
            size = sum(path.lstat().st_size for path in garbage)
            for path in garbage if not dry_run else ():
                path.unlink(missing_ok=True)
        return Garbage(len(garbage), size)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def resolve(self, ref: str | Ref) -> Version:
        """The version that `owner/name[@3|@latest]` means; raises NotFound with the nearest name."""
        with self._open() as index:
            return self._resolve(index, parse_ref(ref) if isinstance(ref, str) else ref)

    def list(self) -> Sequence[Entry]:
        """All names, sorted."""
        with self._open() as index:
            every = index.all()
        names: dict[str, builtins.list[Version]] = {}
        for version in every:
            names.setdefault(version.name, []).append(version)
        return [Entry(found[-1], tuple(v.version for v in found)) for found in names.values()]

    def show(self, ref: str) -> Details:
        """A version's record and document; raises Corrupt where either is damaged."""
        with self._open() as index:
            version = self._resolve(index, parse_ref(ref))
            numbers = tuple(other.version for other in index.versions(version.name))
        record = self._read(version)
        name = CARD_FILE if version.kind == "expert" else MIXTURE_FILE
        sha256 = next(file.sha256 for file in record.files if file.path == name)
        problem = self._blobs.problem(sha256)
        if problem:
            raise Corrupt(f"{name} is {problem}", where=version.ref)
        return Details(version, record.files, read_document(self._blobs.path(sha256)), numbers)

    def pull(self, ref: str | Ref, out: Path | None = None, *, progress: Progress = SILENT) -> Path:
        """Copies a version out, every file checked against its sha256, and returns the folder.

        Without `out` the folder lies in the cache under the content's digest; a sound one there is used again.
        Raises Corrupt where a file is missing or damaged, BadInput where `out` exists.
        """
        version = self.resolve(ref)
        record = self._read(version)
        if out is None:
            return check_out_to_cache(self._blobs, record, progress)
        return check_out(self._blobs, record, Path(out))

    def search(self, text: str = "", *, base: str | None = None, min_score: float | None = None) -> Sequence[Hit]:
        """The latest versions whose name, description or skills hold all words of `text` (their beginnings suffice).

        `base` is a base model's reference or the beginning of its fingerprint. `min_score` asks for a skill with at
        least that score: one that a word of `text` names, or any skill where none is named.
        """
        with self._open() as index:
            found = index.search(text)
        words = search_words(text)
        hits = []
        for version in found:
            if base is not None and base != version.base and not _begins(version.base_fingerprint, base):
                continue
            skill, score = _best_skill(version, words)
            if min_score is None or (score is not None and score >= min_score):
                hits.append(Hit(version, skill, score))
        return hits

    def verify(self, progress: Progress = SILENT) -> Sequence[Problem]:
        """Reads every file of the registry and tells what is unsound; an empty answer means that all is well."""
        with self._open() as index:
            return problems(self.folder, self._blobs, self._records, index, progress)

    # ── within ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _make(self) -> None:
        if (self.folder / MARK).is_file():
            return
        # Another process may be making it, or have made it since; only a folder of other things is refused.
        if self.folder.exists() and not self._only_drafts() and not (self.folder / MARK).is_file():
            raise BadInput("not a registry: it holds other things", where=str(self.folder))
        write_json(self.folder / MARK, {"kind": "registry", "schema": SCHEMA})

    def _only_drafts(self) -> bool:
        return self.folder.is_dir() and all(path.name.startswith(f".{MARK}.draft-") for path in self.folder.iterdir())

    @contextmanager
    def _open(self) -> Iterator[Index]:
        """The index, brought up to date with the records."""
        mark = self.folder / MARK
        if not mark.is_file():
            if self.folder.exists() and not self._only_drafts():
                raise BadInput("not a registry folder", where=str(self.folder))
            if not self._may_be_absent:
                raise NotFound("there is no registry", where=str(self.folder), hint="`registry publish` makes one")
            with Index.open(None) as index:
                yield index
            return
        value = read_json(mark)
        if not isinstance(value, dict) or value.get("kind") != "registry" or not isinstance(value.get("schema"), int):
            raise Corrupt("not the mark of a registry", where=str(mark))
        if value["schema"] > SCHEMA:
            raise BadInput(f"made by a newer xpert (schema {value['schema']})", where=str(mark), hint="upgrade xpert")
        # A registry that may only be read, as on a shared disk, gets an index in memory.
        path = self.folder / "index.sqlite" if os.access(self.folder, os.W_OK) else None
        with Index.open(path) as index:
            if self._records.listing() != index.listing():
                with index.writing():
                    self._follow(index)
            yield index

    def _follow(self, index: Index, name: str | None = None) -> None:
        """Brings into the index what the records hold and it does not. Damaged records are left to `verify`."""
        known = index.listing()
        if name is None:
            on_disk = self._records.listing()
        else:
            on_disk = {(name, number): removed for number, removed in self._records.numbers(name).items()}
        for key, removed in on_disk.items():
            if known.get(key) == removed:
                continue
            if removed:
                index.mark_removed(*key)
            elif key not in known:
                with contextlib.suppress(Corrupt):
                    index.add(self._records.read(*key).version)

    def _read(self, version: Version) -> Record:
        """The record, which is the truth; the index only says that there is one."""
        try:
            record = self._records.read(version.name, version.version)
        except NotFound:
            raise Corrupt("its record is missing", where=version.ref, hint="see `xpert registry verify`") from None
        if record.version.digest != version.digest:
            raise Corrupt("its record is not the one that was indexed", where=version.ref)
        return record

    def _resolve(self, index: Index, ref: Ref) -> Version:
        versions = index.versions(ref.name)
        if not versions:
            close = nearest(ref.name, index.names())
            hint = f"did you mean {close!r}?" if close else "`xpert registry list` shows what there is"
            raise NotFound(f"nothing is published as {ref.name!r}", where=str(self.folder), hint=hint)
        if ref.version is None:
            return versions[-1]
        for version in versions:
            if version.version == ref.version:
                return version
        numbers = ", ".join(str(version.version) for version in versions[-10:])
        raise NotFound(
            f"{ref.name} has no version {ref.version}", hint=f"it has {numbers} ({LATEST}: {versions[-1].ref})"
        )


def _one(kind: str) -> str:
    return "an expert" if kind == "expert" else f"a {kind}"


def _begins(fingerprint: str, text: str) -> bool:
    return len(text) >= 8 and fingerprint.startswith(text)


@functools.lru_cache(maxsize=4096)
def _skill_words(skill: str) -> tuple[str, ...]:
    return tuple(search_words(skill))


def _best_skill(version: Version, words: Sequence[str]) -> tuple[str | None, float | None]:
    named = [s for s in version.scores if any(held.startswith(word) for held in _skill_words(s) for word in words)]
    skill = max(named or version.scores, key=lambda s: version.scores[s], default=None)
    return skill, None if skill is None else version.scores[skill]
