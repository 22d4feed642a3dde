"""`xpert run`: a file of prompts in, a file of answers out; an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from xpert.experts.aggregated import choices_of
from xpert.experts.journal import append_line, read_journal
from xpert.experts.mixture import Mixture
from xpert.experts.serving import EngineChoice, MixtureRunner, Reply
from xpert.progress import SILENT, Progress
from xpert.protocols import Sampling
from xpert.records import Row
from xpert.storage import check_output, disk_errors, hash_json, write_file

__all__ = ["answer_file"]


def answer_file(
    mixture: Mixture,
    rows: Sequence[Row],
    out: Path,
    sampling: Sampling,
    *,
    seed: int = 0,
    engine: EngineChoice | None = None,
    open_runner: Callable[[], MixtureRunner],
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Answers `rows` into `out`, one JSON line each in their order, written whole at the end.

    Meanwhile finished answers lie in `.NAME.partial` beside it; the same call reads them and answers only the rest.
    `engine` is the one that `open_runner` opens, since answers may depend on it (on packed experts, for one).
    `open_runner` loads the models, and is not called where nothing is left to answer.
    """
    check_output(out)
    key = hash_json(
        [_identity(mixture), [_question(row, mixture) for row in rows], sampling.to_dict(), seed, *_engine(engine)]
    )
    partial = out.parent / f".{out.name}.partial"
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        done: dict[int, dict[str, Any]] = {line["index"]: line["reply"] for line in read_journal(partial, key)}
        left = [index for index in range(len(rows)) if index not in done]
        if done and left:
            progress.say(f"{len(done):,} of {len(rows):,} were answered before; going on with the rest")
        if left:
            with open(partial, "a" if done else "w", encoding="utf-8") as journal:
                if not done:
                    append_line(journal, {"key": key})
                done |= _answer(open_runner(), rows, left, sampling, journal, progress)
        lines = [done[index] for index in range(len(rows))]
        write_file(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        partial.unlink(missing_ok=True)
    return lines


def _answer(
    runner: MixtureRunner,
    rows: Sequence[Row],
    left: Sequence[int],
    sampling: Sampling,
    journal: TextIO,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}

    def finished(position: int, reply: Reply) -> None:
        found[left[position]] = reply.to_dict()
        append_line(journal, {"index": left[position], "reply": found[left[position]]})

    # Row i keeps its own seed whether or not the rows before it are answered again.
    try:
        runner.answer([rows[index] for index in left], sampling, progress=progress, finished=finished, numbers=left)
    finally:
        runner.close()
    return found


def _identity(mixture: Mixture) -> dict[str, Any]:
    """What of a mixture decides its answers."""
    return {
        "base": mixture.base.fingerprint,
        "experts": [[e.key, e.fingerprint, e.weight] for e in mixture.experts],
        "router": [mixture.router, dict(mixture.router_params)],
        "gate": mixture.gate and [mixture.gate.name, dict(mixture.gate.params), mixture.gate.fingerprint],
        **({"router_state": mixture.router_state.fingerprint} if mixture.router_state is not None else {}),
        **({"calibration": mixture.calibration.to_dict()} if mixture.calibration is not None else {}),
        "aggregator": mixture.aggregator and mixture.aggregator.to_dict(),
    }


def _engine(engine: EngineChoice | None) -> list[Any]:
    default = engine is None or engine == EngineChoice()
    return [] if engine is None or default else [engine.name, dict(engine.params)]


def _question(row: Row, mixture: Mixture) -> Mapping[str, Any]:
    choices = choices_of(row) if mixture.aggregator is not None else ()  # which nobody else reads
    return {
        "id": row.id,
        "messages": row.chat(),
        "skill": row.skill,
        **({"choices": choices} if choices else {}),
    }
