"""Looking into a source or a pool: counts, forms, lengths, skills, licences and samples, in one streaming pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput
from xpert.pool import Pool, is_pool
from xpert.pool_build import PoolOptions
from xpert.progress import SILENT, Progress
from xpert.readers import open_source
from xpert.records import licence_of
from xpert.row_forms import RowParser, Unfit, parse_mapping

__all__ = ["inspect_source"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLES = 3


@dataclass
class _Lengths:
    """Characters and words of texts, four bytes each."""

    parts: list[NDArray[np.int32]] = field(default_factory=list)

    def add(self, texts: Sequence[str]) -> None:
        self.parts.append(np.array([(len(text), len(text.split())) for text in texts], dtype=np.int32).reshape(-1, 2))

    def quantiles(self) -> dict[str, dict[str, int]]:
        table = np.concatenate(self.parts) if self.parts else np.zeros((0, 2), np.int32)
        if not len(table):
            return {}
        values = np.quantile(table, QUANTILES, axis=0, method="nearest")
        names = [f"{quantile:.0%}" for quantile in QUANTILES]
        return {
            unit: dict(zip(names, values[:, column].tolist(), strict=True))
            for column, unit in enumerate(("characters", "words"))
        }


class _Tally:
    def __init__(self) -> None:
        self.prompts, self.responses = _Lengths(), _Lengths()
        self.skills: Counter[str] = Counter()
        self.licences: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.samples: list[dict[str, Any]] = []
        self.rows = 0

    def add(self, rows: Sequence[tuple[str, str, str, str | None, dict[str, Any]]]) -> None:
        """Rows as (id, prompt, response, skill, columns)."""
        self.prompts.add([row[1] for row in rows])
        self.responses.add([row[2] for row in rows])
        self.skills.update(row[3] or "none" for row in rows)
        for row in rows:
            self.licences[licence_of(row[4]) or "none stated"] += 1
        for row in rows[: SAMPLES - len(self.samples)]:
            self.samples.append({"id": row[0], "skill": row[3], "prompt": row[1], "response": row[2]})
        self.rows += len(rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "prompt": self.prompts.quantiles(),
            "response": self.responses.quantiles(),
            "skills": dict(self.skills.most_common()),
            "licences": dict(self.licences.most_common()),
            "samples": self.samples,
        }


def inspect_source(
    source: str | Path, options: PoolOptions | None = None, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """What a pool folder or any source holds, as plain JSON values; nothing is written or dropped.

    `rows` are those that could be used, `unusable` counts the others by reason. Lengths are quantiles of characters and
    words. Raises BadInput where the source cannot be read.
    """
    path, tally = Path(source), _Tally()
    if path.is_dir() and is_pool(path):
        pool = Pool.open(path)
        for batch in pool.table.to_batches(max_chunksize=4096):
            rows = [(row.id, row.prompt, row.response, row.skill, dict(row.columns)) for row in Pool.of_batch(batch)]
            tally.add(rows)
        return {"source": str(source), "pool": pool.fingerprint, **tally.to_dict()}
    options = options or PoolOptions()
    opened, parser = open_source(source), RowParser(options.format, parse_mapping(options.map))
    with progress.task(f"reading {opened.name}", opened.size) as task:
        for block in opened.blocks(task.advance):
            tally.add(_usable(block, parser, opened.name, tally.reasons))
    if not tally.rows and not tally.reasons:
        raise BadInput("holds no rows", where=opened.where, hint="it must hold at least one")
    found = {
        "forms": dict(parser.forms),
        "columns": list(parser.columns),
        "unusable": dict(tally.reasons.most_common()),
    }
    return {"source": str(source), **tally.to_dict(), **found}


def _usable(
    block: Any, parser: RowParser, name: str, reasons: Counter[str]
) -> list[tuple[str, str, str, str | None, dict[str, Any]]]:
    rows = []
    for at, (line, value) in enumerate(zip(block.lines, block.values, strict=True)):
        try:
            if at in block.faults:
                raise Unfit(block.faults[at])
            parsed = parser.parse(value)
        except Unfit as unfit:
            reasons[str(unfit)] += 1
            continue
        label = parser.id_of(value) or f"{name}:{line}"
        rows.append((label, parsed.prompt, parsed.response, parser.skill_of(value), value))
    return rows
