"""The index as a file: its tables and how they are brought forward, who may write it, and what its errors mean."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from xpert.errors import BadInput, Corrupt, Unavailable
from xpert.storage import exclusive

__all__ = [
    "MIGRATIONS",
    "WAIT_SECONDS",
    "NoRoom",
    "alone",
    "damaged",
    "database_errors",
    "identity",
    "lock_of",
    "prepare",
    "tables",
]

WAIT_SECONDS = 120.0

# Script n brings an index from user_version n to n + 1; only ever append.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE versions (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL, kind TEXT NOT NULL, digest TEXT NOT NULL,
        created TEXT NOT NULL, size INTEGER NOT NULL, base TEXT NOT NULL, base_fingerprint TEXT NOT NULL,
        description TEXT NOT NULL, skills TEXT NOT NULL, scores TEXT NOT NULL, uses TEXT NOT NULL,
        UNIQUE (name, version)
    );
    CREATE INDEX versions_by_digest ON versions (name, digest);
    CREATE INDEX versions_by_kind ON versions (kind);
    CREATE TABLE removed (name TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (name, version)) WITHOUT ROWID;
    """,
    # Tags; which version `latest` means, kept since every list and search asks for it; when an owner's documents had
    # last changed. The rows go: they are made anew from the records, with other words.
    """
    DELETE FROM versions;
    DELETE FROM removed;
    ALTER TABLE versions ADD COLUMN latest INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX versions_latest ON versions (name) WHERE latest;
    CREATE TABLE tags (
        name TEXT NOT NULL, tag TEXT NOT NULL, version INTEGER, through INTEGER NOT NULL, revision INTEGER NOT NULL,
        moved TEXT NOT NULL, mark TEXT NOT NULL, PRIMARY KEY (name, tag)
    ) WITHOUT ROWID;
    CREATE TABLE skills (skill TEXT NOT NULL, id INTEGER NOT NULL, PRIMARY KEY (skill, id)) WITHOUT ROWID;
    CREATE TABLE vectors (
        embedder TEXT NOT NULL, id INTEGER NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (embedder, id)
    );
    CREATE TABLE owners (owner TEXT PRIMARY KEY, changed INTEGER NOT NULL) WITHOUT ROWID;
    """,
)
_WORD_TABLE = (
    "CREATE VIRTUAL TABLE words USING fts5(name, description, skills, tokenize='unicode61 remove_diacritics 2')"
)


class NoRoom(Unavailable):
    """The disk has no room for the index, or fails."""


def prepare(connection: sqlite3.Connection, path: Path | None, full_text: bool) -> None:
    """Sets the journal mode and applies the migrations that are missing."""
    connection.execute("PRAGMA synchronous = NORMAL")  # the index can be made again; the records are fsynced
    if path is not None:
        _patiently(connection, "PRAGMA journal_mode = WAL")
    if connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    _patiently(connection, "BEGIN IMMEDIATE")
    try:
        at = connection.execute("PRAGMA user_version").fetchone()[0]
        if at > len(MIGRATIONS):
            raise BadInput(
                f"the index was written by a newer xpert (schema {at})", where=str(path), hint="upgrade xpert"
            )
        for script in MIGRATIONS[at:]:
            for statement in script.split(";"):
                connection.execute(statement)
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'").fetchone():
            connection.execute("DELETE FROM words")
        elif at == 0 and full_text and _has_fts5(connection):
            connection.execute(_WORD_TABLE)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _has_fts5(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").fetchone() is not None


def lock_of(path: Path) -> Path:
    return path.with_name("index.lock")


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """No other process or thread writes the registry of this index meanwhile.

    SQLite's own lock belongs to a file: where that is removed or exchanged, two writers would each hold one.
    """
    with ExitStack() as held:
        if lock is not None:
            try:
                held.enter_context(exclusive(lock, wait_seconds=WAIT_SECONDS))
            except TimeoutError:
                raise _locked(lock) from None
        yield


def identity(path: Path) -> tuple[int, int] | None:
    """Tells one file from another that has taken its name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _locked(path: Path | None) -> Unavailable:
    return Unavailable("another process keeps the index locked", where=str(path), hint="try again later")


def damaged(path: Path | None, error: Exception) -> Corrupt:
    hint = "`xpert registry rebuild` makes it again"
    return Corrupt(f"the index is damaged: {error}", where=str(path), hint=hint)


def tables(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """Name and definition of all there is, except for what SQLite and its full-text search make by themselves."""
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {(name, sql) for name, sql in rows if not name.startswith(("sqlite_", "words"))}


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Runs a statement for which SQLite does not itself wait: several processes may be making the index at once."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


@contextmanager
def database_errors(path: Path | None) -> Iterator[None]:
    where = str(path)
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise _locked(path) from None
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise NoRoom(f"the disk failed: {error}", where=where, hint="free some space and run it again") from None
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise BadInput(f"the index may not be written: {error}", where=where) from None
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or str(error).startswith("no such table"):
            raise damaged(path, error) from None
        raise
