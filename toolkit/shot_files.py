"""Files of shots: rows to be labelled, exemplars in order, prompts with their exemplars; each with its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpert.errors import BadInput
from xpert.few_shot import few_shot_messages
from xpert.protocols import Exemplars
from xpert.records import Row, Shots
from xpert.row_forms import RowParser, Unfit
from xpert.source_files import encode
from xpert.storage import check_output, write_file, write_json

__all__ = ["check_shot_file", "exemplar_lines", "manifest_path", "prompt_lines", "unlabelled_lines", "write_shot_file"]


def manifest_path(out: Path) -> Path:
    """Where the manifest of a file of shots lies: `chosen.jsonl` has `chosen.manifest.json` beside it."""
    return out.with_suffix(".manifest.json")


def check_shot_file(out: Path) -> None:
    """Refuses an output path that is taken, or whose name readers would not know; call it before the work."""
    if out.is_dir():
        raise BadInput("is a folder; the shots are a file", where=str(out), hint="write -o FOLDER/shots.jsonl")
    if out.suffix != ".jsonl":
        raise BadInput("the output is a file of JSON lines", where=str(out), hint="give it a name that ends in .jsonl")
    check_output(out)
    check_output(manifest_path(out))


def write_shot_file(out: Path, lines: Iterable[Mapping[str, Any]], manifest: Mapping[str, Any]) -> None:
    """The lines, and then the manifest beside them."""
    write_file(out, b"".join(encode(line) + b"\n" for line in lines))
    write_json(manifest_path(out), manifest)


def unlabelled_lines(rows: Sequence[Row], scores: Sequence[float], reasons: Sequence[str]) -> list[dict[str, Any]]:
    """Rows to be labelled: prompt as it was asked, and an empty `completion`.

    Once it is filled in, `read_shots` reads the file. An answer that a row carried is left out.
    """
    lines = []
    for rank, (row, score, reason) in enumerate(zip(rows, scores, reasons, strict=True), 1):
        single = len(row.messages) == 1 and row.messages[0].role == "user"
        line: dict[str, Any] = {"id": row.id, "prompt": row.prompt if single else row.chat(), "completion": ""}
        if row.skill is not None:
            line["skill"] = row.skill
        if row.licence is not None:
            line["licence"] = row.licence
        lines.append({**line, "_xpert": {"rank": rank, "score": round(float(score), 6), "reason": reason}})
    return lines


def exemplar_lines(shots: Shots, found: Exemplars) -> list[dict[str, Any]]:
    """Exemplars in the order of the prompt, as their source wrote them: `read_shots` reads them."""
    return [
        {**_columns(shots.rows[row]), "id": shots.rows[row].id, "_xpert": {"rank": rank, "reason": reason}}
        for rank, (row, reason) in enumerate(zip(found.rows, found.reasons, strict=True), 1)
    ]


def prompt_lines(shots: Shots, queries: Sequence[Row], found: Sequence[Exemplars]) -> list[dict[str, Any]]:
    """A line per query: the few-shot prompt as `messages`, which `read_prompts` reads, and whose exemplars it has."""
    lines = []
    for one in found:
        assert one.query is not None
        query, exemplars = queries[one.query], [shots.rows[row] for row in one.rows]
        messages = [{"role": turn.role, "content": turn.content} for turn in few_shot_messages(exemplars, query)]
        mark = {"exemplars": [row.id for row in exemplars], "reasons": list(one.reasons), "score": round(one.score, 6)}
        skill = {"skill": query.skill} if query.skill is not None else {}
        lines.append({"id": query.id, "messages": messages, **skill, "_xpert": mark})
    return lines


def _columns(row: Row) -> dict[str, Any]:
    """The row as its source wrote it, or in normal form where that needs a --map to be read, or is not there."""
    columns = dict(row.columns)
    try:
        parsed = RowParser().parse(columns)
    except Unfit:
        parsed = None
    if parsed is not None and (parsed.prompt, parsed.response) == (row.prompt, row.response):
        return columns
    skill = {"skill": row.skill} if row.skill is not None else {}
    return {"messages": [*row.chat(), {"role": "assistant", "content": row.response}], **skill}
