"""The registry: a folder in which experts and mixtures have names, immutable versions, and files that prove themselves.

    registry.json       what this folder is
    blobs/              files, or their parts, by sha256     (blobs.py, cutting.py)
    blobs/documents/    a copy of every document, by sha256
    records/            the documents, by name               (documents.py, record_folder.py)
    index.sqlite        made from the records                (index.py)
    drafts/             files under way

Order of writing: blobs, then the record, then its copy, then the index. A process may die between any two steps: a blob
without a record is litter for `gc`, a record without a copy or an index row gets them when the registry is next opened.
Numbers are given out, tags are moved and things are removed inside the index's one writing transaction.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.progress import SILENT, Progress
from xpert.registry.collecting import Garbage, garbage_of
from xpert.registry.documents import SCHEMA, DocumentName, Tag, document_bytes
from xpert.registry.index import Index
from xpert.registry.intake import GIB, MIXTURE_FILE, WEIGHTS_FILE, Intake, examine
from xpert.registry.names import LATEST, Ref, check_name, check_tag, default_registry, parse_ref
from xpert.registry.reading import INDEX, MARK, Details, Entry, ReadableRegistry, tags_hint
from xpert.registry.rebuilding import Rebuilt, lost_documents, restore_names
from xpert.registry.searching import Hit
from xpert.registry.signing.keys import SigningKey
from xpert.registry.signing.signatures import SignatureList
from xpert.registry.soundness import Problem
from xpert.registry.versions import MOST_VERSION, Record, StoredFile, Version, content_digest
from xpert.storage import disk_errors, write_json

__all__ = [
    "INDEX",
    "MARK",
    "MAX_GIB",
    "Details",
    "Entry",
    "Garbage",
    "Hit",
    "Problem",
    "Rebuilt",
    "Registry",
    "Version",
    "default_registry",
]

MAX_GIB = 4.0


class Registry(ReadableRegistry):
    """A registry in a folder. Opens the index anew for every call, so it may be shared by threads and kept for long.

    `location` is a path or a `file://` URL; without one it is `$XPERT_REGISTRY` or the user's data folder, which may
    not exist yet and then reads as empty. `publish` makes the folder.
    """

    def publish(
        self,
        source: str | Path,
        name: str,
        *,
        tags: Sequence[str] = (),
        latest: bool = True,
        max_gib: float = MAX_GIB,
        allow_secret_like: bool = False,
        progress: Progress = SILENT,
    ) -> Version:
        """Files an expert folder or a mixture under `owner/name` as its next version, and moves `tags` to it.

        Content that the name has already is not published again: its version is returned, with `repeated` set.
        Without `latest`, that tag stays where it is. What a mixture names by folders must be published before: its
        experts are then the newest versions with those weights. Raises BadInput or Corrupt for anything that may not
        enter (see `intake.py`), and for a mixture whose experts are not all in this registry. Cost: each file is read
        twice and written once.
        """
        check_name(name)
        for tag in tags:
            check_tag(tag)
        intake = examine(
            Path(source),
            max_bytes=int(max_gib * GIB),
            allow_secret_like=allow_secret_like,
            registered=self._with_weights,
        )
        if intake.left_out:
            progress.say(f"left out: {', '.join(intake.left_out)}")
        with disk_errors(self.folder):
            self._make()
            for content, file in intake.files:
                self.blobs.put(content, file)
            version = self._enter(intake, name, tags, stay=not latest, progress=progress)
        if version.repeated:
            progress.say(f"this content is published already, as {version.ref}")
        return version

    def _enter(self, intake: Intake, name: str, tags: Sequence[str], *, stay: bool, progress: Progress) -> Version:
        """Makes what was examined, and whose contents are stored, a version with its tags."""
        with self._opened() as index, index.writing():
            version = self._file(index, intake, name, stay=stay)
            for tag in tags:
                self._move(index, version, tag)
        return version

    def _file(self, index: Index, intake: Intake, name: str, *, stay: bool) -> Version:
        """Inside the writing transaction: gives out the number, writes the record, adds it to the index."""
        self._follow(index, name.partition("/")[0])
        clash = index.clash(name)
        if clash is not None:
            raise BadInput(f"{name} differs from the published {clash} by case only", hint="choose another name")
        digest = content_digest(intake.stored)
        published = index.versions(name)
        for earlier in published:
            if earlier.digest == digest and self.records.record_path(name, earlier.version).is_file():
                self.records.keep_copy(DocumentName(name, "record", earlier.version))
                self._put_again(self.records.read(name, earlier.version), intake)
                return dataclasses.replace(earlier, repeated=True)
        if published and published[-1].kind != intake.kind:
            raise BadInput(
                f"{name} is the name of {_one(published[-1].kind)}, not of {_one(intake.kind)}",
                hint="choose another name",
            )
        skills = intake.skills if intake.kind == "expert" else self._check_uses(index, intake)
        for content, file in intake.files:
            if not self.blobs.holds(file):  # a `gc` ran since it was put there
                self.blobs.put(content, file)
        owner = name.partition("/")[0]
        taken = [number for other, number in index.listing(owner) if other == name]
        number = max([*self.records.numbers(name), *taken], default=0) + 1
        if number > MOST_VERSION:
            raise BadInput(f"{name} has no number left after {MOST_VERSION}", hint="choose another name")
        version = Version(
            name=name,
            version=number,
            kind=intake.kind,
            digest=digest,
            created=_now(),
            size=sum(file.size for file in intake.stored),
            base=intake.base,
            base_fingerprint=intake.base_fingerprint,
            description=intake.description,
            skills=skills,
            scores=intake.scores,
            uses=intake.uses,
        )
        if stay and published:
            self._move(index, published[-1], LATEST, to=index.latest(name), through=version.version)
        record = self._commit(Record(version, intake.stored))
        index.add(record.version)
        return record.version

    def _put_again(self, record: Record, intake: Intake) -> None:
        """Puts right what is missing or damaged of a version whose files were cut otherwise, as schema 1 did."""
        sources = {file.path: (content, file) for content, file in intake.files}
        for file in record.files:
            content, examined = sources[file.path]
            if file.blobs != examined.blobs or not self.blobs.holds(file):
                self.blobs.put(content, file)

    def _commit(self, record: Record) -> Record:
        """Makes a version count. Inside the writing transaction."""
        self.records.add(record)
        return record

    def adopt(
        self, record: Record, folder: Path, *, allow_secret_like: bool = False, progress: Progress = SILENT
    ) -> bool:
        """Files a version of another registry, its files lying in `folder`, under its own number and record.

        False where it is here already. What may enter is examined as by `publish`. Raises BadInput where its number is
        taken by another content or by a removed version, Corrupt where the folder is not what the record says.
        """
        version = record.version
        source = folder if version.kind == "expert" else folder / MIXTURE_FILE
        intake = examine(source, max_bytes=2 * version.size, allow_secret_like=allow_secret_like)
        found = {file.path: file.sha256 for file in intake.stored}
        said = {file.path: file.sha256 for file in record.files}
        if version.kind == "mixture":  # publishing writes its JSON anew; what lies here is hashed as it is taken in
            found[MIXTURE_FILE] = said.get(MIXTURE_FILE, "")
        if found != said:
            raise Corrupt("holds other files than the record says", where=version.ref)
        with disk_errors(self.folder):
            self._make()
            for file in record.files:
                self.blobs.put(folder / file.path, file)
            with self._opened() as index, index.writing():
                if self._has(index, record):
                    return False
                if version.kind == "mixture":
                    self._check_uses(index, intake)
                for file in record.files:
                    if not self.blobs.holds(file):  # a `gc` ran since it was put there
                        self.blobs.put(folder / file.path, file)
                index.add(self._commit(record).version)
        return True

    def _has(self, index: Index, record: Record) -> bool:
        """Whether the very version is here; raises BadInput where something else bears its name or number."""
        version = record.version
        self._follow(index, version.name.partition("/")[0])
        clash = index.clash(version.name)
        if clash is not None:
            raise BadInput(f"{version.name} differs from {clash} in {self.location} by case only")
        here = self.records.numbers(version.name).get(version.version)
        if here is None:
            published = index.versions(version.name)
            if published and published[-1].kind != version.kind:
                kind = _one(published[-1].kind)
                raise BadInput(f"{version.name} is the name of {kind} in {self.location}, not of {_one(version.kind)}")
            return False
        if here:
            raise BadInput(f"{version.ref} was removed from {self.location}; its number is not given out again")
        if self.records.read(version.name, version.version).version.digest != version.digest:
            raise BadInput(
                f"{version.ref} has another content in {self.location}",
                hint="pull it, and publish it there as the next version",
            )
        return True

    def take_over(self, signatures: SignatureList) -> None:
        """Adds the signatures that a version has in another registry; raises NotFound where the version is not here."""
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, Ref(signatures.name, signatures.version))
            self._sign(version, signatures)

    def fetch(self, record: Record, files: Sequence[StoredFile] | None = None, progress: Progress = SILENT) -> None:
        """Sees to it that files of a version (None: all) are among the blobs. In a folder they always are."""

    def tag(self, ref: str, tag: str) -> Version:
        """Moves a tag to a version and returns that version; raises NotFound where there is none such."""
        check_tag(tag)
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, parse_ref(ref))
            self._move(index, version, tag)
        return version

    def untag(self, name: str, tag: str) -> None:
        """Takes a tag away; `latest` then follows the newest version again. Raises NotFound where there is no tag."""
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, Ref(check_name(name)))
            known = index.tag(name, check_tag(tag))
            if known is None or known.version is None:
                raise NotFound(f"{name} has no tag {tag!r}", hint=tags_hint(index, name))
            self._move(index, version, tag, to=None)

    def _move(self, index: Index, version: Version, tag: str, *, to: int | None = -1, through: int = 0) -> None:
        """Writes where a tag points: to `version` unless `to` says otherwise (None: nowhere any more)."""
        known = index.tag(version.name, tag)
        target = version.version if to == -1 else to
        newest = max([through, *(v.version for v in index.versions(version.name))])
        if known is not None and (known.version, known.through) == (target, newest):
            return
        revision = known.revision + 1 if known is not None else 1
        moved = Tag(version.name, tag, target, newest, revision, _now())
        self._write(moved.document, document_bytes(moved.to_dict()))
        index.set_tag(moved, self.records.mark(moved.document))

    def sign(self, ref: str, key: SigningKey) -> Version:
        """Adds a signature to a version, and returns that version. Signing again changes nothing.

        Signed is what the record says: whoever vouches for a version has looked at its content before.
        """
        with disk_errors(self.folder), self._open() as index, index.writing():
            version = self._resolve(index, parse_ref(ref))
            self._sign(version, SignatureList(version.name, version.version, (key.sign(self._read(version)),)))
        return version

    def _sign(self, version: Version, more: SignatureList) -> None:
        known = self.records.read_signatures(version.name, version.version)
        merged = known.merged(more)
        if merged.signatures != known.signatures:
            self._write(DocumentName(version.name, "signatures", version.version), merged.to_bytes())

    def _write(self, document: DocumentName, data: bytes) -> None:
        """Creates or replaces a document that is no record. Inside the writing transaction."""
        self.records.replace(document, data)

    def _withdraw(self, version: Version) -> None:
        """Marks a version as removed. Inside the writing transaction."""
        self.records.remove(version.name, version.version)

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
            skills |= dict.fromkeys(expert.strengths)
        return tuple(skills)

    def _with_weights(self, sha256: str) -> str | None:
        """The newest version of an expert whose adapter weights are these, as OWNER/NAME@3. Reads every record."""
        if not (self.folder / MARK).is_file():
            return None
        with self._open() as index:
            for version in sorted(index.all(kind="expert"), key=lambda v: v.created, reverse=True):
                if sha256 in self._fingerprints(version):
                    return version.ref
        return None

    def _fingerprints(self, expert: Version) -> set[str]:
        """What a mixture may name an expert's content by: the version's digest, or the sha256 of its weights."""
        files = self.records.read(expert.name, expert.version).files
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
                self._withdraw(version)
                index.mark_removed(version.name, version.version)
            for tag in index.tags(wanted.name):
                if tag.version is not None and f"{tag.name}@{tag.version}" in refs:
                    self._move(index, latest, tag.tag, to=None, through=tag.through)
        return gone

    def gc(self, *, dry_run: bool = False) -> Garbage:
        """Removes what `garbage_of` finds: contents and documents that nothing needs, drafts of the dead.

        Raises Corrupt where a record is lost or cannot be read: what it needs would then be unknown.
        """
        with disk_errors(self.folder), self._open() as index, index.writing():
            self._refuse_lost(index)
            garbage = garbage_of(self.records, self.blobs, self.drafts)
            size = sum(path.lstat().st_size for path in garbage)
            for path in garbage if not dry_run else ():
                path.unlink(missing_ok=True)
        return Garbage(len(garbage), size)

    def _refuse_lost(self, index: Index) -> None:
        on_disk = self.records.listing()
        lost = [key for key, removed in index.listing().items() if not removed and key not in on_disk]
        lost += lost_documents(self.records)
        if lost:
            name, number = lost[0]
            raise Corrupt(
                f"the record of {name}@{number} is missing, so its files are unknown",
                where=self.location,
                hint="bring it back with `xpert registry rebuild`, or `xpert registry remove` that version",
            )

    def rebuild(self, progress: Progress = SILENT) -> Rebuilt:
        """Makes `records/` and the index again from the blobs alone.

        Documents that are there and sound stay, and get the copies they lack; a damaged or missing one is brought back
        from its copy. Cost: reads every document twice, no content.
        """
        if not self.records.copies.folder.is_dir() and not (self.folder / MARK).is_file():
            raise NotFound("there is no registry", where=str(self.folder), hint="`registry publish` makes one")
        self._refuse_links()
        with disk_errors(self.folder):
            if not (self.folder / MARK).is_file():
                write_json(self.folder / MARK, {"kind": "registry", "schema": SCHEMA})
            Index.discard_damaged(self.folder / INDEX)
            with Index.open(self.folder / INDEX) as index, index.writing():
                rebuilt = restore_names(self.records, progress)
                index.forget_all()
                self._follow(index)
        return rebuilt

    def _make(self) -> None:
        self._refuse_links()
        if (self.folder / MARK).is_file():
            return
        # Another process may be making it, or have made it since; only a folder of other things is refused.
        if self.folder.exists() and not self._only_drafts() and not (self.folder / MARK).is_file():
            raise BadInput("not a registry: it holds other things", where=str(self.folder))
        write_json(self.folder / MARK, {"kind": "registry", "schema": SCHEMA})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _one(kind: str) -> str:
    return "an expert" if kind == "expert" else f"a {kind}"
