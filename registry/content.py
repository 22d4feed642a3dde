"""Whether the content of one file may be in the registry, whatever its name: safetensors and text, nothing else.

A file is opened once and read once: what is hashed is what was judged, even where someone changes it meanwhile.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from xpert.errors import BadInput, Corrupt
from xpert.registry.blobs import open_plain
from xpert.registry.strict_json import check_json_text
from xpert.registry.tensor_header import tensor_header

__all__ = ["MOST_TEXT", "Judged", "check_content", "check_stored", "open_inside"]

MOST_TEXT = 256 << 20  # bytes of any text
_TEXTS = frozenset({".json", ".jsonl", ".md", ".html", ".txt", ".jinja", ".yaml", ".yml"})
_CHUNK = 1 << 20
_MOST_ARGUMENT = 16 << 20  # bytes of one argument of a pickle program
# What a pickle needs to do harm: to find a function or class, or to call one.
_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2"})


@dataclass(frozen=True, slots=True)
class Judged:
    """What was read: size in bytes, sha256 (None where it was not asked for), and the text of a file that is one."""

    size: int
    sha256: str | None
    text: str | None


def check_content(stream: BinaryIO, suffix: str, *, where: str, hashed: bool = True) -> Judged:
    """Reads an open file, to its end if `hashed`; raises BadInput or Corrupt for what may not enter.

    Memory: a text whole (at most 256 MiB), of safetensors the header alone (at most 100 MB).
    """
    size = os.fstat(stream.fileno()).st_size
    reader = _Hashing(stream)
    if suffix == ".safetensors":
        _check_tensors(stream, reader, size, where)
        return Judged(size, reader.finish() if hashed else None, None)
    start = reader.read(4096)
    if (seems := _binary_kind(start)) is not None:
        raise _refused(seems, where)
    if suffix not in _TEXTS:
        raise BadInput(
            "not a file of an expert, which are safetensors and text",
            where=where,
            hint=f"remove it; taken are .safetensors {' '.join(sorted(_TEXTS))}",
        )
    data = start + reader.read(MOST_TEXT + 1 - len(start))
    if len(data) > MOST_TEXT:
        raise BadInput(f"a text of more than {MOST_TEXT:,} bytes", where=where)
    try:
        text = data.decode()
        if "\0" in text:
            raise ValueError("it holds a NUL character")
    except ValueError as error:
        raise BadInput(f"not UTF-8 text: {error}", where=where, hint="remove it from the folder") from None
    if _runs_as_pickle(io.BytesIO(data), len(data)):
        raise _refused("a pickle", where)
    _check_json(text, suffix, where)
    return Judged(len(data), reader.finish() if hashed else None, text)


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens a plain file of a folder by its path inside (`a/b.json`), following no link on the way.

    Raises BadInput where any part of the path is a symbolic link by now, or the file is no plain one.
    """
    *folders, last = PurePosixPath(name).parts
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held)
            os.close(held)
            held = inner
        descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=held)
    except OSError as error:
        raise BadInput(
            f"a symbolic link, or changed while it was being read ({error.strerror})",
            where=str(folder / name),
            hint="put the file itself there",
        ) from None
    finally:
        os.close(held)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput("not a plain file", where=str(folder / name), hint="remove it from the folder")
    return os.fdopen(descriptor, "rb")


def check_stored(path: Path, *, where: str) -> None:
    """The same judgement of a file that came out of a store: who filled the store may have passed by `intake.py`."""
    with open_plain(path) as stream:
        check_content(stream, path.suffix, where=where, hashed=False)


class _Hashing:
    """Reads on from a stream and hashes what it reads."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        while self.read(_CHUNK):
            pass
        return self._digest.hexdigest()


def _check_tensors(stream: BinaryIO, reader: _Hashing, size: int, where: str) -> None:
    # A header of 640 bytes begins like a pickle of protocol 2, so the first bytes alone say nothing here.
    start = stream.read(4096)
    stream.seek(0)
    try:
        tensor_header(reader, size, where=where)
    except Corrupt:
        if (seems := _binary_kind(start)) is not None:
            raise _refused(seems, where) from None
        raise
    position = stream.tell()
    stream.seek(0)
    both = _runs_as_pickle(stream, size, harmless=False)  # one file can be sound for both kinds of readers
    stream.seek(position)
    if both:
        raise _refused("a pickle", where)


def _refused(seems: str, where: str) -> BadInput:
    return BadInput(f"refused: it is {seems}, whatever its name", where=where, hint="remove it from the folder")


def _binary_kind(start: bytes) -> str | None:
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return "a pickle"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "a zip archive (as torch.save writes its pickles)"
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[257:262] == b"ustar":
        return "an archive"
    return None


class _Arguments:
    """What pickletools reads from: refuses to read an argument that is not there, or is larger than any of ours."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int) -> bytes:
        if size > min(self._left, _MOST_ARGUMENT):
            return b""
        self._left -= size
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(_MOST_ARGUMENT)
        self._left -= len(line)
        return line


def _runs_as_pickle(stream: BinaryIO, size: int, *, harmless: bool = True) -> bool:
    """True where the bytes run through as a pickle program, as those of the old text protocols do.

    Without `harmless`, only where it could do more than make plain values.
    """
    count, calls, last = 0, False, ""
    try:
        for opcode, _, _ in pickletools.genops(cast(IO[bytes], _Arguments(stream, size))):
            count, last = count + 1, opcode.name
            calls = calls or last in _CALLS
    except Exception:  # whatever ails the parser: these bytes are no pickle
        return False
    return count > 1 and last == "STOP" and (harmless or calls)


def _check_json(text: str, suffix: str, where: str) -> None:
    lines = text.split("\n") if suffix == ".jsonl" else [text] if suffix == ".json" else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip() or suffix == ".json":
                check_json_text(line)
        except (ValueError, RecursionError) as error:
            place = f" in line {number}" if suffix == ".jsonl" else ""
            raise Corrupt(f"not valid JSON{place}: {error}", where=where) from None
