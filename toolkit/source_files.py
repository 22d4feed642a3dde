"""Files as sources: opening, decompressing, decoding, and the blocks of rows that every reader gives."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from xpert.errors import BadInput, Corrupt
from xpert.storage import hash_file

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_ROWS",
    "Block",
    "SourceFile",
    "decode_text",
    "encode",
    "no_report",
    "not_utf8",
    "without_bom",
]

BLOCK_BYTES = 1 << 22
BLOCK_ROWS = 4096


@dataclass(slots=True)
class Block:
    """Rows of one source in order: `values[i]` is the parsed row, `raws[i]` its JSON text, `lines[i]` where it stood.

    `faults` holds rows that could not be split into columns (a CSV row with too many fields), by position.
    """

    lines: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, value: Any, raw: bytes | None = None) -> None:
        self.lines.append(line)
        self.values.append(value)
        self.raws.append(encode(value) if raw is None else raw)


def encode(value: Any) -> bytes:
    """One line of JSON; what JSON cannot hold (dates, bytes, huge integers) is written as a text."""
    try:
        return orjson.dumps(value, default=_plain)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, default=_plain).encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def no_report(_: int) -> None:
    """Where nobody asked how far the reading is."""


class SourceFile:
    """What the readers of files have in common."""

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self.path = path
        self.name = path.name
        self.where = str(path)
        self.size: int | None = path.stat().st_size
        self.block_bytes = block_bytes

    def fingerprint(self) -> str:
        return hash_file(self.path)

    @contextmanager
    def _open(self, moved: Callable[[int], None]) -> Iterator[IO[bytes]]:
        """The file's bytes, decompressed; reading errors name the file."""
        try:
            with self.path.open("rb") as file:
                yield _decompressed(_Counted(file, moved), self.path.name.lower())
        except PermissionError:
            raise BadInput("may not be read", where=self.where, hint="check its permissions") from None
        except (EOFError, zlib.error) as error:
            raise Corrupt(f"the compressed file is damaged or cut short ({error})", where=self.where) from None
        except OSError as error:
            if type(error).__name__ == "BadGzipFile":
                raise Corrupt("not a gzip file", where=self.where, hint="rename it to .jsonl if it is plain") from None
            raise
        except Exception as error:
            if type(error).__name__ == "ZstdError":
                raise Corrupt(f"not a sound zstd file ({error})", where=self.where) from None
            raise


class _Counted(io.RawIOBase):
    """A binary file that says how far it was read, and keeps its compressed position for the progress bar."""

    def __init__(self, file: IO[bytes], moved: Callable[[int], None]) -> None:
        self.file, self.moved = file, moved

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.moved(count)
        return int(count)


def _decompressed(file: io.RawIOBase, name: str) -> IO[bytes]:
    if name.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=io.BufferedReader(file, 1 << 18))  # type: ignore[return-value]
    if name.endswith(".zst"):
        return _Zstd(file)  # type: ignore[return-value]
    return file  # type: ignore[return-value]


class _Zstd(io.RawIOBase):
    """zstd frames; unlike the library's own reader it notices a file that is cut short."""

    def __init__(self, file: io.RawIOBase) -> None:
        import zstandard

        self.file = file
        self.make = zstandard.ZstdDecompressor().decompressobj
        self.state = self.make()
        self.pending = b""
        self.inside = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        parts: list[bytes] = []
        total = 0
        while size is None or size < 0 or total < size:
            data = self.pending or self.file.read(1 << 18)
            self.pending = b""
            if not data:
                if self.inside:
                    raise EOFError("it ends inside a frame")
                break
            self.inside = True
            part = self.state.decompress(data)
            if self.state.eof:
                self.pending, self.inside = self.state.unused_data, False
                self.state = self.make()
            parts.append(part)
            total += len(part)
        return b"".join(parts)


def decode_text(raw: bytes, number: int, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(raw[error.start], number, where) from None


def not_utf8(byte: int, number: int, where: str) -> BadInput:
    return BadInput(
        f"line {number} is not UTF-8 (byte 0x{byte:02x})",
        where=where,
        hint="convert the file first: iconv -f LATIN1 -t UTF-8 OLD > NEW",
    )


def without_bom(data: bytes, where: str) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadInput(
            "line 1 is UTF-16, not UTF-8",
            where=where,
            hint="convert the file first: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        )
    return data.removeprefix(b"\xef\xbb\xbf")
