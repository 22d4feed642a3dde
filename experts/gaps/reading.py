"""Reading request logs: files, or folders of them, as the server writes them; packed ones too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.server.request_log import SCHEMA, RequestRecord
from xpert.progress import SILENT, Progress
from xpert.source_files import SourceFile
from xpert.storage import hash_texts

__all__ = ["ENDINGS", "Requests", "read_requests"]

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Requests:
    """Records by time, each request once. `torn`: files whose last line was not written to its end; `repeated`: records
    that stand in the files again."""

    records: tuple[RequestRecord, ...]
    files: int = 0
    torn: int = 0
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """Hash of the requests' ids, which no two requests share."""
        return hash_texts(record.id for record in self.records)


def read_requests(paths: Sequence[str | Path], *, progress: Progress = SILENT) -> Requests:
    """The records of files and folders, without replies. Memory: the prompts, each once.

    A last line that is no JSON is what a killed process left, and is passed over. Raises NotFound for what is not there
    or holds no log, Corrupt naming any other line that is no record, BadInput for one by a newer xpert.
    """
    found: dict[str, RequestRecord] = {}
    files = [file for path in paths for file in _files(Path(path))]
    torn = repeated = 0
    with progress.task("reading the request log", total=len(files)) as task:
        for file in dict.fromkeys(files):
            log = _LogFile(file)
            for record in log.records():
                repeated += record.id in found
                found.setdefault(record.id, record)
            torn += log.torn
            task.advance(1)
    if not found:
        where = ", ".join(str(path) for path in paths)
        raise BadInput("holds no requests", where=where, hint="`xpert serve --request-log FOLDER` keeps them")
    by_time = sorted(found.values(), key=lambda record: (record.time, record.id))
    return Requests(tuple(by_time), len(set(files)), torn, repeated)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
        if not found:
            raise NotFound("the folder holds no request log", where=str(path), hint="its files end in .jsonl")
        return found
    if not path.exists():
        raise NotFound("no such file or folder", where=str(path))
    if not path.name.endswith(ENDINGS):
        raise BadInput("not a request log by its name", where=str(path), hint=f"it ends in {', '.join(ENDINGS)}")
    return [path]


class _LogFile(SourceFile):
    def records(self) -> Iterator[RequestRecord]:
        self.torn = False
        failed: int | None = None
        with self._open(lambda _: None) as stream:
            for number, line in enumerate(_lines(stream, self.block_bytes), 1):
                if failed is not None:
                    raise self._no_record(failed)
                if not line.strip():
                    continue
                try:
                    value = orjson.loads(line)
                except orjson.JSONDecodeError:
                    failed = number  # to be forgiven if no line follows
                    continue
                yield self._record(value, number)
        self.torn = failed is not None

    def _record(self, value: object, number: int) -> RequestRecord:
        if isinstance(value, dict):
            schema = value.get("schema")
            if isinstance(schema, int) and schema > SCHEMA:
                raise BadInput(f"written by a newer xpert (schema {schema})", where=self.where, hint="upgrade xpert")
            value.pop("reply", None)
            try:
                return RequestRecord.from_dict(value)
            except (ValueError, KeyError, TypeError):
                pass
        raise self._no_record(number)

    def _no_record(self, number: int) -> Corrupt:
        return Corrupt(
            f"line {number} is no record of a request",
            where=self.where,
            hint="mend or delete that line, or leave it out",
        )


def _lines(stream: IO[bytes], size: int) -> Iterator[bytes]:
    rest = b""
    while data := stream.read(size):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
    if rest:
        yield rest
