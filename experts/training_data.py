"""What an expert is trained on: the selected rows and the shots, as token ids with the answers marked.

Only the answer is learned. A row longer than the limit is cut at its end; where nothing of the answer would be left
it is dropped, and both are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xpert.chat_form import encode_examples
from xpert.data import open_pool, read_rows
from xpert.errors import BadInput
from xpert.records import Row
from xpert.selection_folder import read_selection
from xpert.storage import MANIFEST, hash_texts, read_json

__all__ = [
    "Encoded",
    "TrainingRows",
    "encode_rows",
    "gather_rows",
    "held_out_count",
    "languages_of",
    "licences_of",
    "skills_of",
]


@dataclass(frozen=True)
class TrainingRows:
    """Rows to learn from (shots first), shots held out for validation, and what is known of the selection.

    unanswered: shots that are prompts alone; nothing is learned of them, but they say what the expert is meant for.
    """

    rows: tuple[Row, ...]
    shots: int
    validation: tuple[Row, ...]
    selection: Mapping[str, Any]
    unanswered: tuple[Row, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of every turn and answer, and of where the validation rows begin."""
        texts: list[str] = []
        for row in (*self.rows, *self.validation):
            texts += [text for message in row.messages for text in (message.role, message.content)]
            texts.append(row.response)
        texts += [row.prompt for row in self.unanswered]
        return hash_texts([str(len(self.rows)), *texts])


@dataclass(frozen=True)
class Encoded:
    """Token ids and answer starts of the rows that are trained on (`kept`: their positions among the rows given)."""

    examples: tuple[tuple[tuple[int, ...], int], ...]
    kept: tuple[int, ...]
    cut: int
    dropped: int

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.examples]

    @property
    def supervised(self) -> int:
        """Answer tokens per epoch."""
        return sum(len(ids) - start for ids, start in self.examples)


def gather_rows(source: str | Path, *, use_shots: bool, hold_out: str, seed: int) -> TrainingRows:
    """Reads a selection folder, a pool folder or any source of rows.

    Shots stand in the training set once, before the rows; `hold_out` of them (a number, or a share such as 0.25 or
    25%), drawn by the seed, are kept out of it; shots without answers always are. Raises BadInput where no row is left.
    """
    rows, shots, summary = _read(source)
    shots = shots if use_shots else []
    unanswered = tuple(shot for shot in shots if not shot.response)
    shots = [shot for shot in shots if shot.response]
    count = held_out_count(hold_out, len(shots), asked=use_shots)
    away = set(np.random.default_rng(seed).permutation(len(shots))[:count].tolist())
    validation = tuple(shot for index, shot in enumerate(shots) if index in away)
    learned = [shot for index, shot in enumerate(shots) if index not in away]
    seen = {(row.messages, row.response) for row in (*learned, *validation)}
    rest = [row for row in rows if (row.messages, row.response) not in seen]
    if not learned and not rest:
        raise BadInput("there is no row to train on", where=str(source), hint="select some rows first")
    if unanswered:
        summary = {**summary, "unanswered_shots": len(unanswered)}
    return TrainingRows((*learned, *rest), len(learned), validation, summary, unanswered)


def held_out_count(hold_out: str, shots: int, *, asked: bool = True) -> int:
    """`3`, `0.25` or `25%` of the shots as a number of shots."""
    hint = "write a number of shots (2) or a share (25%)"
    text = hold_out.strip()
    share = text.endswith("%") or "." in text
    try:
        amount = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise BadInput(f"hold-out-shots {hold_out!r} is not understood", hint=hint) from None
    if not (0 <= amount <= 1 if share else amount >= 0):
        raise BadInput(f"hold-out-shots {hold_out!r} is out of range", hint=hint)
    count = round(amount * shots) if share else int(amount)
    if amount > 0 and shots == 0:
        why = "the selection has no shots" if asked else "--no-shots leaves them out"
        raise BadInput(f"hold-out-shots {hold_out!r}: {why}")
    if count > shots:
        raise BadInput(f"hold-out-shots is {count}, but there are {shots} shots", hint=hint)
    return count


def encode_rows(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """Token ids of all rows, cut to `max_length`; rows whose answer would vanish are dropped. Cost O(text)."""
    examples, kept, cut = [], [], 0
    for index, (ids, start) in enumerate(encode_examples(tokenizer, rows)):
        if start >= max_length:
            continue
        cut += len(ids) > max_length
        examples.append((ids[:max_length], start))
        kept.append(index)
    return Encoded(tuple(examples), tuple(kept), cut, len(rows) - len(kept))


def licences_of(rows: Sequence[Row]) -> dict[str, int]:
    """Rows per licence, from a `licence` or `license` column; most frequent first."""
    return dict(Counter(row.licence or "unknown" for row in rows).most_common())


def languages_of(rows: Sequence[Row]) -> dict[str, int]:
    """Rows per language, most frequent first, from a column `language` or `lang` with ISO 639 codes (`en`, `en-GB`).

    Empty unless all rows have such a code: of a part of them the whole cannot be said.
    """
    codes = [_language(row.columns) for row in rows]
    known = [code for code in codes if code]
    return dict(Counter(known).most_common()) if len(known) == len(codes) else {}


def _language(columns: Mapping[str, Any]) -> str | None:
    named = {key.lower(): value for key, value in columns.items()}
    match = re.fullmatch(r"([a-z]{2,3})([-_][a-z0-9]+)*", str(named.get("language") or named.get("lang") or "").lower())
    return match[1] if match else None


def skills_of(data: TrainingRows) -> tuple[str, ...]:
    """The skills the expert is meant for: those of the shots, or of the rows where no shot names one."""
    shots = (*data.rows[: data.shots], *data.validation, *data.unanswered)
    for group in (shots, data.rows):
        counts = Counter(row.skill for row in group if row.skill)
        if counts:
            return tuple(skill for skill, _ in counts.most_common())
    return ()


def _read(source: str | Path) -> tuple[list[Row], list[Row], dict[str, Any]]:
    folder = Path(source)
    if not (folder / MANIFEST).is_file():
        rows = read_rows(source)
        name = str(source) if str(source).startswith("hf:") else folder.name
        return rows, [], {"source": name, "rows": len(rows), **_datasets([name])}
    manifest = read_json(folder / MANIFEST)
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind == "pool":
        pool = open_pool(folder)
        told = {"source": folder.name, "rows": len(pool), "pool": pool.fingerprint, **_datasets(pool.sources)}
        return pool.rows(range(len(pool))), [], told
    selection = read_selection(folder)
    return selection.rows, list(selection.shots or ()), {"rows": len(selection.rows), **_manifest(selection.manifest)}


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the card keeps of a selection's manifest; manifests of before may lack parts of it."""
    kept = {key: manifest[key] for key in ("inputs", "config", "seed", "created", "versions") if key in manifest}
    config = kept.get("config", {})
    if str(config.get("method", "")).endswith((".yaml", ".yml")):  # a pipeline's file; its steps are in the parameters
        kept["config"] = {**config, "method": Path(config["method"]).name}
    figures = {key: value for key, value in manifest.get("figures", {}).items() if key not in ("files", "sources")}
    if figures:
        kept["figures"] = figures
    if manifest.get("timings"):
        kept["seconds"] = round(sum(manifest["timings"].values()), 3)
    return {**kept, **_datasets(manifest.get("figures", {}).get("sources", ()))}


def _datasets(sources: Sequence[str]) -> dict[str, list[str]]:
    """The Hub's sets among the sources `hf:owner/name[:config][:split]`."""
    found = [source.removeprefix("hf:").partition(":")[0] for source in sources if source.startswith("hf:")]
    return {"datasets": list(dict.fromkeys(found))} if found else {}
