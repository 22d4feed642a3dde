"""The artifact of a selection: a folder with the chosen rows, the shots, how they were chosen, and the report.

selected.jsonl   the chosen rows as their sources wrote them, best first, with `_xpert`: rank, score, reason, ...
rows.jsonl       the same rows in normal form (`messages`, the answer last): what training reads
shots.jsonl      the shots in the same form, where there were any
log.jsonl        what the method says of its rounds, where it says something
manifest.json    inputs by content hash, configuration, seed, figures, timings
report.html      the selection to look at
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import Corrupt
from xpert.records import Message, Row, Shots
from xpert.storage import hash_file, read_manifest

__all__ = ["SelectionFolder", "read_selection", "write_jsonl", "write_rows"]

SELECTED, ROWS, SHOTS, REPORT = "selected.jsonl", "rows.jsonl", "shots.jsonl", "report.html"
LOG, LEFT_OUT = "log.jsonl", "left_out.jsonl"


@dataclass(frozen=True)
class SelectionFolder:
    """A finished selection; `rows` are best first, their `columns` as the source wrote them."""

    path: Path
    rows: list[Row]
    shots: Shots | None
    manifest: dict[str, Any]

    @property
    def figures(self) -> Mapping[str, Any]:
        """Rows, tokens, skills and what else the manifest counts."""
        figures: Mapping[str, Any] = self.manifest["figures"]
        return figures

    def marks(self) -> list[dict[str, Any]]:
        """`_xpert` of every chosen row: id, rank, score, reason, cluster."""
        return [line["_xpert"] for line in _read_jsonl(self.path / SELECTED)]

    def log(self) -> list[dict[str, Any]]:
        path = self.path / LOG
        return list(_read_jsonl(path)) if path.is_file() else []


def read_selection(folder: Path | str) -> SelectionFolder:
    """Raises NotFound or BadInput where the folder is no selection, Corrupt where a file was changed since."""
    folder = Path(folder)
    manifest = read_manifest(folder, "selection")
    for name, digest in manifest.get("figures", {}).get("files", {}).items():
        path = folder / name
        if not path.is_file() or hash_file(path) != digest:
            state = "was changed since it was selected" if path.is_file() else "is missing"
            raise Corrupt(f"{state}", where=str(path), hint="select again into another folder")
    columns = [{k: v for k, v in line.items() if k != "_xpert"} for line in _read_jsonl(folder / SELECTED)]
    rows = [_row(line, own) for line, own in zip(_read_jsonl(folder / ROWS), columns, strict=True)]
    shots_file = folder / SHOTS
    shots = None
    if shots_file.is_file():
        shots = Shots(tuple(_row(line, line.get("columns", {})) for line in _read_jsonl(shots_file)))
    return SelectionFolder(folder, rows, shots, manifest)


def write_rows(path: Path, rows: Iterable[Row], *, columns: bool = False) -> None:
    """Rows in normal form, one JSON object a line; `columns` adds the source's own."""
    lines = []
    for row in rows:
        messages = [*row.chat(), {"role": "assistant", "content": row.response}]
        line: dict[str, Any] = {"id": row.id, "messages": messages, "skill": row.skill}
        if columns:
            line["columns"] = dict(row.columns)
        lines.append(line)
    write_jsonl(path, lines)


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", "surrogatepass")
        return [json.loads(line) for line in text.split("\n") if line]
    except FileNotFoundError:
        raise Corrupt("is missing", where=str(path), hint="select again into another folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"not valid JSON lines: {error}", where=str(path)) from None


def _row(line: Mapping[str, Any], columns: Mapping[str, Any]) -> Row:
    messages = tuple(Message(message["role"], message["content"]) for message in line["messages"])
    return Row(line["id"], messages[:-1], messages[-1].content, line.get("skill"), columns)
