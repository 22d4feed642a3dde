"""The SQLite index of a registry: what `list` and `search` read. The record files are the truth; it follows them.

index.sqlite    the index; whoever removes it loses nothing
index.lock      held while someone writes the registry: it keeps writers apart also where the index is exchanged
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import orjson

from xpert.errors import Corrupt, Unavailable
from xpert.registry.documents import Tag
from xpert.registry.index_file import (
    WAIT_SECONDS,
    NoRoom,
    alone,
    damaged,
    database_errors,
    identity,
    lock_of,
    prepare,
    tables,
)
from xpert.registry.names import LATEST
from xpert.registry.versions import Version

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Index", "NoRoom", "lock_of", "search_words"]

_COLUMNS = "name, version, kind, digest, created, size, base, base_fingerprint, description, skills, scores, uses"
_FIELDS = _COLUMNS.split(", ")
_TAG_COLUMNS = "name, tag, version, through, revision, moved"


class Index:
    """One connection to the index; close it after use. Many processes may hold one each."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None, lock: Path | None, *, words: bool) -> None:
        self._db = connection
        self._path = path
        self._lock = lock
        self._opened = None if path is None else identity(path)
        self.has_words = words

    @classmethod
    @contextmanager
    def open(cls, path: Path | None, *, lock: Path | None = None, full_text: bool = True) -> Iterator[Self]:
        """The index at `path`, made or migrated where needed; None keeps one in memory, whose writers keep apart by
        the `lock` of the index for which it stands in.

        `full_text=False` makes a new index without the FTS5 table, as a SQLite without that extension does.
        Raises Unavailable where it stays locked, BadInput where it may not be written, Corrupt where it is damaged.
        """
        with database_errors(path):
            connection = sqlite3.connect(path or ":memory:", timeout=WAIT_SECONDS, isolation_level=None)
            try:
                prepare(connection, path, full_text)
                found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'").fetchone()
                yield cls(connection, path, lock or (path and lock_of(path)), words=found is not None)
            finally:
                connection.close()

    @staticmethod
    def discard_damaged(path: Path) -> None:
        """Removes an index that SQLite cannot read; one that it can stays."""
        with alone(lock_of(path)):
            try:
                with Index.open(path) as index:
                    sound = not index.unsound()
            except Corrupt:
                sound = False
            if not sound:
                for file in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm"))):
                    file.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction that no other writer shares; undone where the block fails.

        Raises Unavailable where others write for two minutes, or the index was removed or exchanged meanwhile.
        """
        with alone(self._lock):
            if self._path is not None and identity(self._path) != self._opened:
                raise Unavailable("the index was removed meanwhile", where=str(self._path), hint="run it again")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # SQLite may have undone it: a full disk ends a transaction
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ── what it knows of the records ─────────────────────────────────────────────────────────────────────────────

    def listing(self, owner: str | None = None) -> dict[tuple[str, int], bool]:
        """(name, version) -> whether it was removed, as `RecordFolder.listing` tells it."""
        where, given = ("", ()) if owner is None else (" WHERE name >= ? AND name < ?", (f"{owner}/", f"{owner}0"))
        found = dict.fromkeys(self._db.execute(f"SELECT name, version FROM versions{where}", given), False)
        return found | dict.fromkeys(self._db.execute(f"SELECT name, version FROM removed{where}", given), True)

    def owners(self) -> dict[str, int]:
        """Owner -> the time of change that `looked_at` noted."""
        return dict(self._db.execute("SELECT owner, changed FROM owners"))

    def looked_at(self, owner: str, changed: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", (owner, changed))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, version: Version) -> None:
        row = (
            *(version.name, version.version, version.kind, version.digest, version.created, version.size),
            *(version.base, version.base_fingerprint, version.description, json.dumps(version.skills)),
            *(json.dumps(dict(version.scores)), json.dumps(version.uses)),
        )
        marks = ", ".join("?" * len(row))
        cursor = self._db.execute(f"INSERT INTO versions ({_COLUMNS}) VALUES ({marks})", row)
        if self.has_words:
            self._db.execute(
                "INSERT INTO words (rowid, name, description, skills) VALUES (?, ?, ?, ?)",
                (cursor.lastrowid, version.name, version.description, " ".join(version.strengths)),
            )
        self._db.executemany(
            "INSERT OR IGNORE INTO skills VALUES (?, ?)", [(skill, cursor.lastrowid) for skill in version.strengths]
        )
        self._settle_latest(version.name)

    def mark_removed(self, name: str, version: int) -> None:
        found = self._db.execute("SELECT id FROM versions WHERE name = ? AND version = ?", (name, version)).fetchone()
        if found is not None:
            for table in ("skills", "vectors"):
                self._db.execute(f"DELETE FROM {table} WHERE id = ?", found)
            self._db.execute("DELETE FROM versions WHERE id = ?", found)
            if self.has_words:
                self._db.execute("DELETE FROM words WHERE rowid = ?", found)
        self._db.execute("INSERT OR IGNORE INTO removed VALUES (?, ?)", (name, version))
        self._settle_latest(name)

    def set_tag(self, tag: Tag, mark: str) -> None:
        """`mark` is that of its document (`RecordFolder.mark`): while it stays, the document need not be read again."""
        row = (tag.name, tag.tag, tag.version, tag.through, tag.revision, tag.moved, mark)
        self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._settle_latest(tag.name)

    def forget_all(self) -> None:
        """Empties the index; it is then filled from the records again."""
        for table in (
            "versions",
            "removed",
            "tags",
            "owners",
            "skills",
            "vectors",
            *(("words",) if self.has_words else ()),
        ):
            self._db.execute(f"DELETE FROM {table}")

    def _settle_latest(self, name: str) -> None:
        latest = self.latest(name)
        self._db.execute(
            "UPDATE versions SET latest = 0 WHERE name = ? AND latest AND version IS NOT ?", (name, latest)
        )
        self._db.execute("UPDATE versions SET latest = 1 WHERE name = ? AND version = ? AND NOT latest", (name, latest))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def names(self) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT name FROM versions WHERE latest ORDER BY name")]

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, oldest first."""
        return self._versions("WHERE name = ? ORDER BY version", (name,))

    def all(self, *, kind: str | None = None) -> list[Version]:
        where, given = ("WHERE kind = ?", (kind,)) if kind else ("", ())
        return self._versions(f"{where} ORDER BY name, version", given)

    def entries(self) -> list[tuple[Version, tuple[int, ...]]]:
        """(the version that `latest` means, the numbers of all), by name."""
        numbers: dict[str, list[int]] = {}
        for name, number in self._db.execute("SELECT name, version FROM versions ORDER BY name, version"):
            numbers.setdefault(name, []).append(number)
        return [(latest, tuple(numbers[latest.name])) for latest in self._versions("WHERE latest ORDER BY name", ())]

    def latest(self, name: str) -> int | None:
        """The number that `latest` means: where it was moved to, or the newest where there is a newer one since."""
        newest = self._db.execute("SELECT max(version) FROM versions WHERE name = ?", (name,)).fetchone()[0]
        tag = self.tag(name, LATEST)
        if newest is None or tag is None or tag.version is None or tag.through < newest:
            return newest if newest is None else int(newest)
        known = self._db.execute("SELECT 1 FROM versions WHERE name = ? AND version = ?", (name, tag.version))
        return tag.version if known.fetchone() else int(newest)

    def tag(self, name: str, tag: str) -> Tag | None:
        row = self._db.execute(f"SELECT {_TAG_COLUMNS} FROM tags WHERE name = ? AND tag = ?", (name, tag)).fetchone()
        return None if row is None else Tag(*row)

    def tags(self, name: str | None = None) -> list[Tag]:
        """All tags, of one name or of all; also those that point nowhere any more."""
        where, given = ("", ()) if name is None else (" WHERE name = ?", (name,))
        return [
            Tag(*row) for row in self._db.execute(f"SELECT {_TAG_COLUMNS} FROM tags{where} ORDER BY name, tag", given)
        ]

    def tag_marks(self, owner: str) -> dict[tuple[str, str], str]:
        """(name, tag) -> the mark of its document, of all tags of an owner."""
        rows = self._db.execute(
            "SELECT name, tag, mark FROM tags WHERE name >= ? AND name < ?", (f"{owner}/", f"{owner}0")
        )
        return {(name, tag): mark for name, tag, mark in rows}

    def clash(self, name: str) -> str | None:
        """A name that differs from `name`, or whose owner differs from its owner, by case only."""
        owner = name.partition("/")[0]
        size = len(owner) + 1
        row = self._db.execute(
            "SELECT name FROM versions WHERE (lower(name) = lower(:name) AND name != :name)"
            " OR (lower(substr(name, 1, :size)) = lower(:owner) AND substr(name, 1, :size) != :owner) LIMIT 1",
            {"name": name, "owner": owner + "/", "size": size},
        ).fetchone()
        return row[0] if row else None

    def search(self, text: str, *, every: bool = True) -> list[Version]:
        """The latest version of every name that matches all words of `text` by their beginnings, best match first.

        With `every` false one of the words is enough. Without the FTS5 table the same versions are found, in the order
        of their names.
        """
        words = search_words(text)
        if not words:
            return self._versions("WHERE latest ORDER BY name", ())
        if self.has_words:
            query = (" " if every else " OR ").join(f'"{word}"*' for word in words)
            return self._versions(
                "JOIN words ON words.rowid = versions.id WHERE words MATCH ? AND latest"
                " ORDER BY bm25(words, 4, 1, 2), versions.name",
                (query,),
                table="versions.",
            )
        latest = self._versions("WHERE latest ORDER BY name", ())
        return [version for version in latest if _matches(version, words, every)]

    # ── skills and vectors ───────────────────────────────────────────────────────────────────────────────────────

    def skill_names(self) -> list[str]:
        """All skills that some version has, by the names that versions give them."""
        return [skill for (skill,) in self._db.execute("SELECT DISTINCT skill FROM skills ORDER BY skill")]

    def of_skills(self, skills: Iterable[str]) -> list[Version]:
        """The latest versions that have one of these skills."""
        wanted = json.dumps(sorted(skills))
        return self._versions(
            "WHERE latest AND id IN (SELECT id FROM skills WHERE skill IN (SELECT value FROM json_each(?)))", (wanted,)
        )

    def of_refs(self, refs: Sequence[str]) -> list[Version]:
        """The versions `owner/name@3`, in the order given."""
        found = self._versions("WHERE name || '@' || version IN (SELECT value FROM json_each(?))", (json.dumps(refs),))
        by_ref = {version.ref: version for version in found}
        return [by_ref[ref] for ref in refs if ref in by_ref]

    def without_vector(self, embedder: str) -> list[Version]:
        """The latest versions that have no vector of this embedder yet."""
        return self._versions(
            "WHERE latest AND id NOT IN (SELECT id FROM vectors WHERE embedder = ?) ORDER BY name", (embedder,)
        )

    def keep_vectors(self, embedder: str, versions: Sequence[Version], vectors: NDArray[np.float32]) -> None:
        """vectors [n, d], of n versions, kept in half precision (a cosine is then right to 0.001); a version that is no
        longer there is passed over."""
        rows = [
            (embedder, vector.astype("<f2").tobytes(), version.name, version.version)
            for version, vector in zip(versions, vectors, strict=True)
        ]
        self._db.executemany(
            "INSERT OR REPLACE INTO vectors SELECT ?, id, ? FROM versions WHERE name = ? AND version = ?", rows
        )

    def closest(self, embedder: str, vector: NDArray[np.float32]) -> dict[str, float]:
        """Ref -> cosine of the latest versions with `vector` [d], the closest first. Time O(n d)."""
        import numpy as np

        refs = dict(self._db.execute("SELECT id, name || '@' || version FROM versions WHERE latest"))
        # Not by the index: the vectors lie one after the other, and nearly all are asked for.
        scan = self._db.execute("SELECT id, vector FROM vectors NOT INDEXED WHERE embedder = ?", (embedder,))
        rows = [row for row in scan if row[0] in refs]
        if not rows:
            return {}
        matrix = (
            np.frombuffer(b"".join([row[1] for row in rows]), dtype="<f2").reshape(len(rows), -1).astype(np.float32)
        )
        cosines = matrix @ vector
        order = np.argsort(-cosines, kind="stable").tolist()
        values = cosines.tolist()
        return {refs[rows[row][0]]: values[row] for row in order}

    def unsound(self) -> list[str]:
        """What SQLite's own check finds wrong, in its words, or that these are not the tables of an index."""
        found = [line for (line,) in self._db.execute("PRAGMA quick_check(20)")]
        if found != ["ok"]:
            return found
        with Index.open(None) as fresh:
            return [] if tables(self._db) == tables(fresh._db) else ["its tables are not those of an index"]

    def _versions(self, rest: str, given: Sequence[object], *, table: str = "") -> list[Version]:
        columns = ", ".join(table + column for column in _FIELDS)
        rows = self._db.execute(f"SELECT {columns} FROM versions {rest}", given)
        try:
            return [_version(row) for row in rows]
        except (ValueError, TypeError) as error:
            raise damaged(self._path, error) from None


def _version(row: Sequence[Any]) -> Version:
    name, version, kind, digest, created, size, base, fingerprint, description, skills, scores, uses = row
    lists = tuple(orjson.loads(skills)), orjson.loads(scores), tuple(orjson.loads(uses) if uses != "[]" else ())
    return Version(name, version, kind, digest, created, size, base, fingerprint, description, *lists)


def search_words(text: str) -> list[str]:
    """The words of a text as the index compares them: runs of letters and digits, folded in case and accents."""
    plain = unicodedata.normalize("NFKD", text.lower())
    return re.findall(r"[^\W_]+", "".join(letter for letter in plain if not unicodedata.combining(letter)))


def _matches(version: Version, words: Iterable[str], every: bool) -> bool:
    held = search_words(" ".join((version.name, version.description, *version.strengths)))
    found = (any(other.startswith(word) for other in held) for word in words)
    return all(found) if every else any(found)
