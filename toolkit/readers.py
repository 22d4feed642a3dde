"""Reading sources, streaming: each source gives blocks of rows with their line numbers and their JSON text.

Files (`.jsonl .json .jsonl.gz .jsonl.zst .csv .parquet`, `.json` also compressed), folders saved by `datasets`, and
`hf:owner/name[:config][:split]`. Memory is that of one block (a few MiB), whatever the size of the source.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.storage import hash_file

__all__ = ["EXTENSIONS", "Block", "Source", "open_source"]

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


class Source(Protocol):
    """Something rows can be read from."""

    name: str
    """How rows and messages name it: the file's name."""
    where: str
    """How errors name it: the path as the user gave it."""
    size: int | None
    """Bytes on disk, for progress."""

    def blocks(self, moved: Callable[[int], None] = ...) -> Iterator[Block]:
        """The rows in order. `moved` is told how many bytes of the source were read since the last call."""

    def fingerprint(self) -> str:
        """Hash of the content."""


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


def open_source(spec: str | Path, *, block_bytes: int = BLOCK_BYTES) -> Source:
    """The source a user named. Raises NotFound or BadInput where there is none that can be read."""
    text = str(spec)
    if text.startswith("hf:"):
        from xpert.hub_reader import HubSource

        return HubSource(text)
    path = Path(spec)
    if path.is_dir():
        return _folder_source(path)
    if not path.exists():
        hint = "to read from the Hugging Face hub write hf:owner/name" if text.count("/") == 1 else None
        raise NotFound("no such file", where=text, hint=hint or "check the path")
    for extension, make in EXTENSIONS.items():
        if path.name.lower().endswith(extension):
            if path.stat().st_size == 0:
                raise BadInput("the file is empty", where=text, hint="it must hold at least one row")
            return make(path, block_bytes)
    raise BadInput(
        f"unknown kind of file {path.suffix or path.name!r}", where=text, hint=f"known: {' '.join(EXTENSIONS)}"
    )


def _folder_source(path: Path) -> Source:
    from xpert.hub_reader import DatasetFolder

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return DatasetFolder(path)
    raise BadInput(
        "the folder is neither a pool nor a dataset saved by `datasets`",
        where=str(path),
        hint="name a file in it, or save it with Dataset.save_to_disk",
    )


class _File:
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
            with open(self.path, "rb") as file:
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


def _ignore(_: int) -> None:
    pass


class JsonLines(_File):
    """One JSON object a line. The line itself becomes the row's JSON text: nothing is encoded again."""

    def blocks(self, moved: Callable[[int], None] = _ignore) -> Iterator[Block]:
        line = 1
        for data in self._whole_lines(moved):
            lines = data.split(b"\n")
            block = Block()
            try:
                # The common case at full speed: every line is one JSON value.
                block.values = list(map(orjson.loads, lines))
                block.raws = [raw.strip() for raw in lines] if b"\r" in data or b" \n" in data else lines
                block.lines = list(range(line, line + len(lines)))
            except orjson.JSONDecodeError:
                block = self._careful(lines, line)
            line += len(lines)
            if block.lines:
                yield block

    def _whole_lines(self, moved: Callable[[int], None]) -> Iterator[bytes]:
        """The content in blocks that end with a line, without that last line break."""
        rest = b""
        first = True
        with self._open(moved) as stream:
            while data := stream.read(self.block_bytes):
                if first:
                    data, first = _without_bom(data, self.where), False
                cut = data.rfind(b"\n")
                if cut < 0:
                    rest += data
                    continue
                yield rest + data[:cut]
                rest = data[cut + 1 :]
        if rest:
            yield rest

    def _careful(self, lines: list[bytes], first: int) -> Block:
        block = Block()
        for number, raw in enumerate(lines, first):
            if raw and not raw.isspace():
                value, text = decode_line(raw.strip(), number, self.where)
                block.add(number, value, text)
        return block


def decode_line(raw: bytes, number: int, where: str) -> tuple[Any, bytes]:
    """A line's value and its JSON text; raises BadInput naming the line."""
    try:
        return orjson.loads(raw), raw
    except orjson.JSONDecodeError as error:
        text = decode_text(raw, number, where)
        reason = error.msg
    try:
        # Python's own writers put NaN and Infinity into JSON: they are read as empty.
        value = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        raise BadInput(
            f"line {number} is not valid JSON ({reason})", where=where, hint="mend or delete that line"
        ) from None
    return value, encode(value)


def decode_text(raw: bytes, number: int, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_byte(raw[error.start], number, where) from None


def _bad_byte(byte: int, number: int, where: str) -> BadInput:
    return BadInput(
        f"line {number} is not UTF-8 (byte 0x{byte:02x})",
        where=where,
        hint="convert the file first: iconv -f LATIN1 -t UTF-8 OLD > NEW",
    )


def _without_bom(data: bytes, where: str) -> bytes:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadInput(
            "line 1 is UTF-16, not UTF-8",
            where=where,
            hint="convert the file first: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        )
    return data.removeprefix(b"\xef\xbb\xbf")


class JsonArray(_File):
    """`[{...}, {...}]`, read element by element. A `.json` file of JSON lines, as hubs have many, is read as such."""

    def blocks(self, moved: Callable[[int], None] = _ignore) -> Iterator[Block]:
        with self._open(_ignore) as stream:
            head = _without_bom(stream.read(1 << 16), self.where).lstrip()
        if head.startswith(b"["):
            yield from self._elements(moved)
        elif head.startswith(b"{"):
            yield from JsonLines(self.path, self.block_bytes).blocks(moved)
        elif head:
            decode_text(head[:1], 1, self.where)
            raise BadInput("neither a JSON array of rows nor JSON lines", where=self.where, hint="write [{...}, {...}]")
        else:
            raise BadInput("the file is empty", where=self.where, hint="it must hold at least one row")

    def _elements(self, moved: Callable[[int], None]) -> Iterator[Block]:
        with self._open(moved) as stream:
            text = _ArrayText(stream, self.where, self.block_bytes)
            block, size = Block(), 0
            for line, value, width in text.elements():
                block.add(line, value)
                size += width
                if len(block) >= BLOCK_ROWS or size >= self.block_bytes:
                    yield block
                    block, size = Block(), 0
            if len(block):
                yield block


class _ArrayText:
    """A window on the text of a JSON array that grows until the next element fits into it."""

    _SPACE = " \t\r\n"

    def __init__(self, stream: IO[bytes], where: str, chunk: int) -> None:
        import codecs

        self.stream, self.where, self.chunk = stream, where, chunk
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def elements(self) -> Iterator[tuple[int, Any, int]]:
        """(line, value, characters) of each element."""
        scan = json.JSONDecoder(parse_constant=lambda name: None).raw_decode
        self._expect("[", "a JSON array of rows")
        if self._peek() == "]":
            self.at += 1
        else:
            while True:
                self._peek()
                start = self.line
                value, width = self._scan(scan)
                yield start, value, width
                if self._expect(",]", "',' or ']' after a row") == "]":
                    break
        if self._peek():
            raise self._broken("something follows the array's end")

    def _scan(self, scan: Callable[[str, int], tuple[Any, int]]) -> tuple[Any, int]:
        while True:
            try:
                value, end = scan(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number at the window's edge may go on
                    width = end - self.at
                    self._move(end)
                    return value, width
            except RecursionError:
                raise self._broken("too deeply nested") from None
            except json.JSONDecodeError as error:
                if self.ended:
                    self.line += self.text.count("\n", self.at, error.pos)
                    raise self._broken(error.msg) from None
            self._grow(len(self.text) - self.at)

    def _peek(self) -> str:
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in self._SPACE:
                end += 1
            self._move(end)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._grow(0)

    def _expect(self, wanted: str, what: str) -> str:
        found = self._peek()
        if not found or found not in wanted:
            raise self._broken(f"expected {what}" if found else "the file ends too early")
        self.at += 1
        return found

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _grow(self, kept: int) -> None:
        data = self.stream.read(max(self.chunk, kept))
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + data.count(b"\n", 0, error.start)
            raise _bad_byte(error.object[error.start], line, self.where) from None
        self.text, self.at = self.text[self.at :] + more, 0

    def _broken(self, reason: str) -> BadInput:
        return BadInput(f"line {self.line} is not valid JSON ({reason})", where=self.where, hint="mend the file there")


class Csv(_File):
    """Comma-separated values under a header line; every value is a text."""

    def blocks(self, moved: Callable[[int], None] = _ignore) -> Iterator[Block]:
        csv.field_size_limit(sys.maxsize)  # answers longer than the module's 128 KiB are not broken files
        with self._open(moved) as stream:
            reader = csv.reader(self._lines(stream), strict=True)
            try:
                yield from self._rows(reader)
            except csv.Error as error:
                raise BadInput(
                    f"line {reader.line_num} is not valid CSV ({error})", where=self.where, hint="mend that line"
                ) from None

    def _rows(self, reader: Any) -> Iterator[Block]:
        header = next(reader, None)
        if header is None:
            raise BadInput("the file is empty", where=self.where, hint="it must hold a header line and rows")
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise BadInput(f"line 1 names the column {twice!r} twice", where=self.where, hint="rename one of them")
        block = Block()
        before = reader.line_num
        for values in reader:
            line, before = before + 1, reader.line_num
            if not values:
                continue
            if len(values) != len(header):
                block.faults[len(block)] = f"has {len(values)} fields, the header {len(header)}"
            block.add(line, dict(zip(header, values, strict=False)))
            if len(block) >= BLOCK_ROWS:
                yield block
                block = Block()
        if len(block):
            yield block

    def _lines(self, stream: IO[bytes]) -> Iterator[str]:
        rest, number, first = b"", 0, True
        while data := stream.read(self.block_bytes):
            if first:
                data, first = _without_bom(data, self.where), False
            *whole, rest = (rest + data).split(b"\n")
            for raw in whole:
                number += 1
                yield decode_text(raw, number, self.where) + "\n"
        if rest:
            yield decode_text(rest, number + 1, self.where)


class Parquet(_File):
    """A parquet file; a row's line is its number, counted from 1."""

    def blocks(self, moved: Callable[[int], None] = _ignore) -> Iterator[Block]:
        import pyarrow as pa
        import pyarrow.parquet

        try:
            with pa.parquet.ParquetFile(self.path) as file:
                rows = max(1, file.metadata.num_rows)
                line = 1
                for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                    yield arrow_block(batch, line)
                    line += batch.num_rows
                    moved(round((self.size or 0) * batch.num_rows / rows))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).split(".")[0]
            raise Corrupt(f"not a sound parquet file ({reason})", where=self.where) from None


def arrow_block(batch: Any, first: int) -> Block:
    """A block of a record batch or table whose first row has the number `first`."""
    values = batch.to_pylist()
    return Block(list(range(first, first + len(values))), values, [encode(value) for value in values])


EXTENSIONS: dict[str, Callable[[Path, int], Source]] = {
    ".jsonl": JsonLines,
    ".jsonl.gz": JsonLines,
    ".jsonl.zst": JsonLines,
    ".json": JsonArray,
    ".json.gz": JsonArray,
    ".json.zst": JsonArray,
    ".csv": Csv,
    ".parquet": Parquet,
}
