"""Building a pool: sources are read once, streaming; what is dropped is written down with its reason.

Pass 1 reads, brings rows into normal form and drops exact duplicates. Pass 2 (near duplicates, overlap with the shots
or with `avoid` files) reads the rows of pass 1 from disk, because what is boilerplate shows only in the whole pool.
Memory: one block of rows, and about 100 bytes for each row of the pool.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.first_seen import FirstSeen, hash64
from xpert.overlap import Avoided
from xpert.pool import POOL_SCHEMA, Pool, RowsWriter, turns_json
from xpert.pool_clean import Dropped, clean
from xpert.progress import SILENT, Progress
from xpert.readers import BLOCK_BYTES, Block, Source, open_source
from xpert.records import Shots
from xpert.row_files import read_rows
from xpert.row_forms import RowParser, Unfit, form_summary, parse_mapping
from xpert.storage import check_output, disk_errors, draft_folder, write_manifest

__all__ = ["REJECTED_FILE", "PoolOptions", "build_pool"]

REJECTED_FILE = "rejected.jsonl"


@dataclass(frozen=True)
class PoolOptions(Config):
    """How sources become a pool."""

    format: str | None = option(None, "row form of the sources; found by their columns where it is not given")
    map: tuple[str, ...] = option((), "columns that bear other names: prompt=ask,response=reply,skill=task,id=key")
    duplicates: bool = option(True, "drop rows whose prompt and answer repeat an earlier row's, but for spaces")
    near_duplicates: bool = option(True, "drop rows that repeat an earlier one but for a few words")
    near_threshold: float = option(
        0.9,
        "share of three-word sequences two rows must have in common to count as near duplicates",
        minimum=0.5,
        maximum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "map", tuple(entry for entry in self.map if entry))  # an empty option is no option
        RowParser(self.format, parse_mapping(self.map))  # raises for an unknown format or part


def build_pool(
    sources: Sequence[str | Path],
    out: Path,
    options: PoolOptions | None = None,
    *,
    shots: Shots | None = None,
    avoid: Sequence[str | Path] = (),
    progress: Progress = SILENT,
    replace: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Pool:
    """Reads sources into a pool folder at `out`, which appears whole or not at all.

    Rows that overlap `shots` or a row of an `avoid` file are dropped (see `xpert.overlap`). Raises BadInput for a
    source that cannot be read, that holds no usable row, or where nothing is left.
    """
    options = options or PoolOptions()
    check_output(out, replace=replace)
    if not sources:
        raise BadInput("no source is given", hint="name at least one file, folder or hf:owner/name")
    opened = [open_source(source, block_bytes=block_bytes) for source in sources]
    avoided = Avoided()
    if shots is not None:
        avoided.add(shots, "the shots")
    for path in avoid:
        avoided.add(read_rows(path, need_answer=False), Path(path).name)
    with (
        draft_folder(out, replace=replace) as folder,
        _Builder(folder, options) as builder,
        ThreadPoolExecutor(1) as threads,  # hashes the sources meanwhile
    ):
        started = time.perf_counter()
        prints = [threads.submit(source.fingerprint) for source in opened]
        for source in opened:
            builder.read(source, progress)
        read = time.perf_counter()
        figures = builder.finish(avoided, progress)
        write_manifest(
            folder,
            "pool",
            inputs={
                "sources": [{"name": s.name, "hash": p.result()} for s, p in zip(opened, prints, strict=True)],
                "shots": shots.fingerprint if shots else None,
                "avoid": [{"name": Path(path).name, "hash": open_source(path).fingerprint()} for path in avoid],
            },
            config=options.to_dict(),
            seed=None,
            figures=figures,
            timings={"read": read - started, "clean": time.perf_counter() - read},
        )
    return Pool.open(out)


@dataclass(slots=True)
class _Rows:
    """Rows of one block in normal form, column by column, with their line numbers."""

    ids: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    turns: list[str | None] = field(default_factory=list)
    skills: list[str | None] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def batch(self) -> pa.RecordBatch:
        columns = (self.ids, self.prompts, self.responses, self.turns, self.skills, self.raws)
        arrays = [pa.array(values, type=kind.type) for values, kind in zip(columns, POOL_SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=POOL_SCHEMA)


class _Builder:
    """The state of one build."""

    def __init__(self, folder: Path, options: PoolOptions) -> None:
        self.folder, self.options = folder, options
        self.mapping = parse_mapping(options.map)
        self.rows = RowsWriter(folder / "rows")
        self.rejected = Rejected(folder / REJECTED_FILE)
        self.forms: Counter[str] = Counter()
        self.read_rows = 0
        self.seen_ids, self.seen_texts = FirstSeen(), FirstSeen()
        self.ids: list[pa.Array] = []
        self.starts: list[int] = []  # number of the first row of each entry of `ids`
        self.places: list[tuple[str, NDArray[np.int64]]] = []  # source and lines of the rows written, block by block

    def __enter__(self) -> _Builder:
        return self

    def __exit__(self, *error: object) -> None:
        self.rejected.close()

    def read(self, source: Source, progress: Progress) -> None:
        parser = RowParser(self.options.format, self.mapping)
        usable = before = 0
        reasons: Counter[str] = Counter()
        with progress.task(f"reading {source.name}", source.size) as task:
            for block in source.blocks(task.advance):
                before += len(block)
                usable += self._take(source, parser, block, reasons)
        self.read_rows += before
        if not usable:
            raise _nothing_usable(source, parser, before, reasons)
        self.forms.update(parser.forms)

    def _take(self, source: Source, parser: RowParser, block: Block, reasons: Counter[str]) -> int:
        """Writes the rows of a block that are new; returns how many could be used, repeated ones included."""
        rows = self._normal_form(source, parser, block, reasons)
        if not rows.ids:
            return 0
        rows.ids = self._unique_ids(source, rows)
        batch, lines = rows.batch(), np.array(rows.lines, dtype=np.int64)
        if self.options.duplicates:
            first = self.seen_texts.add(hash64(map(exact_key, rows.prompts, rows.responses)))
            self._remember(batch.column("id"))
            own = np.arange(self.seen_texts.count - len(rows.ids), self.seen_texts.count)
            for at in np.flatnonzero(first != own):
                self.rejected.write(
                    source.name,
                    rows.lines[at],
                    rows.ids[at],
                    "exact duplicate",
                    rows.raws[at],
                    of=self._id(int(first[at])),
                )
            batch, lines = batch.filter(pa.array(first == own)), lines[first == own]
        self.rows.write(batch)
        self.places.append((source.name, lines))
        return len(rows.ids)

    def _normal_form(self, source: Source, parser: RowParser, block: Block, reasons: Counter[str]) -> _Rows:
        even = None if block.faults else parser.parse_block(block.values)
        if even is not None:
            labels = [label or f"{source.name}:{line}" for label, line in zip(even.ids, block.lines, strict=True)]
            alone: list[str | None] = [None] * len(labels)
            return _Rows(labels, even.prompts, even.responses, alone, even.skills, block.raws, block.lines)
        rows = _Rows()
        parse, id_of, skill_of = parser.parse, parser.id_of, parser.skill_of
        for at, (line, value, raw) in enumerate(zip(block.lines, block.values, block.raws, strict=True)):
            try:
                if block.faults and at in block.faults:
                    raise Unfit(block.faults[at])
                prompt, response, turns = parse(value)
            except Unfit as unfit:
                reason = str(unfit)
                reasons[reason] += 1
                label = id_of(value) if isinstance(value, dict) else None
                self.rejected.write(source.name, line, label or f"{source.name}:{line}", reason, raw, kind="unusable")
                continue
            rows.ids.append(id_of(value) or f"{source.name}:{line}")
            rows.prompts.append(prompt)
            rows.responses.append(response)
            rows.turns.append(None if turns is None else turns_json(turns))
            rows.skills.append(skill_of(value))
            rows.raws.append(raw)
            rows.lines.append(line)
        return rows

    def _unique_ids(self, source: Source, rows: _Rows) -> list[str]:
        """The rows' ids; one that was used before gets its line as a suffix, and the file where that is used too."""
        ids = list(rows.ids)
        again = np.arange(len(ids))
        for suffix in ("~{line}", "~{name}:{line}", "~{name}:{line}~{count}"):
            count = self.seen_ids.count
            first = self.seen_ids.add(hash64(ids[at].encode("utf-8", "surrogatepass") for at in again))
            again = again[first != np.arange(count, count + len(again))]
            if not len(again):
                break
            for at in again:
                line = rows.lines[at]
                ids[at] = rows.ids[at] + suffix.format(line=line, name=source.name, count=self.seen_ids.count)
        return ids

    def _remember(self, ids: pa.Array) -> None:
        self.starts.append(self.starts[-1] + len(self.ids[-1]) if self.starts else 0)
        self.ids.append(ids)

    def _id(self, number: int) -> str:
        entry = int(np.searchsorted(self.starts, number, side="right")) - 1
        return str(self.ids[entry][number - self.starts[entry]])

    def finish(self, avoided: Avoided, progress: Progress) -> dict[str, Any]:
        self.rows.close()
        threshold = self.options.near_threshold if self.options.near_duplicates else None
        rows = clean(self.rows, avoided, threshold, self._reject, progress)
        self.rejected.close()
        if not rows.rows:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.counts.most_common())
            raise BadInput(f"no row is left of {self.read_rows:,} ({counts})", hint="add sources, or avoid fewer rows")
        return {
            "rows": rows.rows,
            "read": self.read_rows,
            "rejected": dict(self.rejected.counts.most_common()),
            "forms": dict(self.forms.most_common()),
            "fingerprint": rows.content.hexdigest(),
        }

    def _reject(self, batch: pa.RecordBatch, first: int, dropped: Sequence[Dropped]) -> None:
        """Writes down rows of pass 2; `first` is the number of the batch's first row."""
        starts = np.concatenate(([0], np.cumsum([len(lines) for _, lines in self.places])))
        for drop in dropped:
            entry = int(np.searchsorted(starts, drop.row, side="right")) - 1
            name, lines = self.places[entry]
            at = drop.row - first
            self.rejected.write(
                name,
                int(lines[drop.row - starts[entry]]),
                str(batch.column("id")[at]),
                drop.reason,
                str(batch.column("row")[at]).encode(),
                of=drop.of,
                kind=drop.kind,
            )


_SPACES = bytes(32 if byte in b"\t\n\v\f\r" else byte for byte in range(256))


def exact_key(prompt: str, response: str) -> bytes:
    """What two rows must have in common to be exact duplicates: runs of white space count as one space."""
    key = f"{prompt.strip()}\0{response.strip()}".encode("utf-8", "surrogatepass").translate(_SPACES)
    while b"  " in key:
        key = key.replace(b"  ", b" ")
    return key


def _nothing_usable(source: Source, parser: RowParser, rows: int, reasons: Counter[str]) -> BadInput:
    if not rows:
        return BadInput("holds no rows", where=source.where, hint="it must hold at least one")
    reason, _ = reasons.most_common(1)[0]
    why = f"each {reason}" if len(reasons) == 1 else f"{len(reasons)} reasons, most often: {reason}"
    what = f"none of its {rows:,} rows can be used ({why})"
    if not parser.columns:
        return BadInput(
            what, where=source.where, hint='each row must be an object, such as {"prompt": ..., "completion": ...}'
        )
    return BadInput(
        f"{what}; columns found: {', '.join(list(parser.columns)[:20])}",
        where=source.where,
        hint=f"known forms: {form_summary()}; name other columns with --map prompt=COLUMN,response=COLUMN",
    )


class Rejected:
    """`rejected.jsonl`: one line for each row that was dropped, with its reason and the row as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._stream: IO[bytes] | None = path.open("wb")

    def write(
        self,
        source: str,
        line: int,
        label: str,
        reason: str,
        raw: bytes,
        *,
        of: str | None = None,
        kind: str | None = None,
    ) -> None:
        """`of` names what the row repeats or overlaps. Counted under `kind`, else under the reason."""
        assert self._stream is not None
        self.counts[kind or reason] += 1
        entry: Mapping[str, Any] = {"source": source, "line": line, "id": label, "reason": reason}
        if of is not None:
            entry = {**entry, "of": of}
        with disk_errors(self.path):
            # The row's own text goes in as it is, so it is written exactly as the source wrote it.
            self._stream.write(orjson.dumps(entry)[:-1] + b',"row":' + raw + b"}\n")

    def close(self) -> None:
        if self._stream is not None:
            with disk_errors(self.path):
                self._stream.close()
            self._stream = None
