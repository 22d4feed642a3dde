"""Readers of JSON: one object a line, or an array of objects; both streaming."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

import orjson

from xpert.errors import BadInput
from xpert.source_files import BLOCK_ROWS, Block, SourceFile, decode_text, encode, no_report, not_utf8, without_bom

__all__ = ["JsonArray", "JsonLines"]


class JsonLines(SourceFile):
    """One JSON object a line. The line itself becomes the row's JSON text: nothing is encoded again."""

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
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
                    data, first = without_bom(data, self.where), False
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
                value, text = _decode_line(raw.strip(), number, self.where)
                block.add(number, value, text)
        return block


def _decode_line(raw: bytes, number: int, where: str) -> tuple[Any, bytes]:
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


class JsonArray(SourceFile):
    """`[{...}, {...}]`, read element by element. A `.json` file of JSON lines, as hubs have many, is read as such."""

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
        with self._open(no_report) as stream:
            head = without_bom(stream.read(1 << 16), self.where).lstrip()
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
            raise not_utf8(error.object[error.start], line, self.where) from None
        self.text, self.at = self.text[self.at :] + more, 0

    def _broken(self, reason: str) -> BadInput:
        return BadInput(f"line {self.line} is not valid JSON ({reason})", where=self.where, hint="mend the file there")
