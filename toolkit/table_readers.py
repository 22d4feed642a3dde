"""Readers of tables: CSV and parquet; both streaming."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from xpert.errors import BadInput, Corrupt
from xpert.source_files import BLOCK_ROWS, Block, SourceFile, decode_text, encode, no_report, without_bom

__all__ = ["Csv", "Parquet", "arrow_block"]


class Csv(SourceFile):
    """Comma-separated values under a header line; every value is a text."""

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
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
                data, first = without_bom(data, self.where), False
            *whole, rest = (rest + data).split(b"\n")
            for raw in whole:
                number += 1
                yield decode_text(raw, number, self.where) + "\n"
        if rest:
            yield decode_text(rest, number + 1, self.where)


class Parquet(SourceFile):
    """A parquet file; a row's line is its number, counted from 1."""

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
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
