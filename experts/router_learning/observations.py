"""Observations on disk: what every expert of a mixture and its base made of a suite's items.

    observations.jsonl    one line an item, in the suite's order:
                          id, messages, skill, answers, metric,
                          and lists that follow the manifest's `subjects`: outputs, scores, losses, confidences
    manifest.json         which subjects (with the sha256 of each expert's weights), which suite, how they were asked

Plain JSON lines, so that they can be read by eye and made elsewhere; numbers come back to the last bit. A confidence
is null where an answer had no tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput, Corrupt
from xpert.experts.mixture import BASE, Mixture
from xpert.protocols import Observations, RouteRequest
from xpert.records import Message
from xpert.storage import draft_folder, hash_file, hash_texts, read_manifest, write_file, write_manifest

__all__ = ["KIND", "ROWS_FILE", "Observed", "for_mixture", "is_observations", "read_observations", "write_observations"]

KIND = "observations"
ROWS_FILE = "observations.jsonl"

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """Observations and where they come from.

    experts: the sha256 of each expert's weights. `suite_fingerprint` is of the whole suite; `figures` as in the
    manifest, `metrics` [n] and `outputs` [n][m] as in the rows.
    """

    folder: Path
    observations: Observations
    base: str
    experts: Mapping[str, str]
    suite: str
    suite_fingerprint: str
    figures: Mapping[str, Any]
    metrics: tuple[str, ...]
    outputs: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.observations.requests)

    @cached_property
    def prompt_hashes(self) -> tuple[str, ...]:
        """Of each prompt, so that two sets of observations can be seen to share some."""
        return tuple(prompt_hash(request) for request in self.observations.requests)

    def subset(self, rows: Sequence[int]) -> Observed:
        """What was observed of some prompts, by their places. The suite's fingerprint and figures stay the whole's."""
        seen, places = self.observations, np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            observations=Observations(
                tuple(seen.requests[row] for row in rows),
                seen.subjects,
                seen.scores[places],
                seen.losses[places],
                None if seen.confidences is None else seen.confidences[places],
            ),
            metrics=tuple(self.metrics[row] for row in rows),
            outputs=tuple(self.outputs[row] for row in rows),
        )


def prompt_hash(request: RouteRequest) -> str:
    """48 bits of the sha256 of a prompt's turns."""
    return hash_texts(text for turn in request.messages for text in (turn.role, turn.content))[:12]


def is_observations(path: str | Path) -> bool:
    """Whether a path is a folder of observations, and no suite."""
    return (Path(path) / ROWS_FILE).is_file()


def write_observations(
    out: Path,
    lines: Sequence[Mapping[str, Any]],
    mixture: Mixture,
    *,
    suite: str,
    suite_fingerprint: str,
    config: Mapping[str, Any],
    seconds: float,
    seen_in_training: Mapping[str, int] | None = None,
) -> Observed:
    """Writes the folder whole. `lines` are rows in the suite's order, as above. `seen_in_training`: expert -> how many
    of the items it is known to have been trained on."""
    with draft_folder(out) as draft:
        text = "".join(json.dumps(dict(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        write_file(draft / ROWS_FILE, text)
        scores = np.array([line["scores"] for line in lines], dtype=np.float64)
        subjects = (*mixture.keys, BASE)
        write_manifest(
            draft,
            KIND,
            inputs={
                "base": mixture.base.fingerprint,
                "experts": {expert.key: expert.fingerprint for expert in mixture.experts},
                "suite": suite,
                "suite_fingerprint": suite_fingerprint,
                "rows": hash_file(draft / ROWS_FILE),
            },
            config={**config, "subjects": list(subjects)},
            seed=None,  # answers are greedy
            figures={
                "items": len(lines),
                "scores": dict(zip(subjects, scores.mean(axis=0).tolist(), strict=True)),
                "best_per_item": float(scores.max(axis=1).mean()),
                "seen_in_training": dict(seen_in_training or {}),
            },
            timings={"seconds": seconds},
        )
    return read_observations(out)


def read_observations(folder: str | Path) -> Observed:
    """Raises NotFound or BadInput where the folder holds something else, Corrupt where it is damaged."""
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    path = folder / ROWS_FILE
    if not path.is_file():
        raise Corrupt(f"it has no {ROWS_FILE}", where=str(folder), hint="observe again")
    try:
        inputs, subjects = manifest["inputs"], tuple(str(key) for key in manifest["config"]["subjects"])
        if hash_file(path) != inputs["rows"]:
            raise Corrupt("its content has changed since it was written", where=str(path), hint="observe again")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        requests = tuple(
            RouteRequest(
                str(line["id"]),
                tuple(Message(str(turn["role"]), str(turn["content"])) for turn in line["messages"]),
                line["skill"],
            )
            for line in lines
        )
        shape = (len(lines), len(subjects))
        seen = Observations(
            requests,
            subjects,
            _array(lines, "scores", shape),
            _array(lines, "losses", shape),
            _array(lines, "confidences", shape),
        )
        return Observed(
            folder,
            seen,
            str(inputs["base"]),
            {str(key): str(value) for key, value in inputs["experts"].items()},
            str(inputs["suite"]),
            str(inputs["suite_fingerprint"]),
            dict(manifest["figures"]),
            tuple(str(line["metric"]) for line in lines),
            tuple(tuple(str(output) for output in line["outputs"]) for line in lines),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"the observations are damaged: {error!r}", where=str(path), hint="observe again") from None


def for_mixture(observed: Observed, mixture: Mixture) -> Observed:
    """The observations with their subjects in the mixture's order; those of experts that it has not are left out.

    Raises BadInput for an expert that was not observed, or not with these weights, and for another base.
    """
    where = str(observed.folder)
    if observed.base != mixture.base.fingerprint:
        raise BadInput(
            f"observed on another base ({observed.base[:12]}) than the mixture's ({mixture.base.fingerprint[:12]})",
            where=where,
            hint="observe this mixture",
        )
    for expert in mixture.experts:
        known = observed.experts.get(expert.key)
        if known is None:
            raise BadInput(f"expert {expert.key!r} was not observed", where=where, hint="observe this mixture")
        if known != expert.fingerprint:
            raise BadInput(
                f"expert {expert.key!r} was observed with other weights than it has now",
                where=where,
                hint="observe this mixture",
            )
    seen = observed.observations
    subjects = (*mixture.keys, BASE)
    if subjects == seen.subjects:
        return observed
    columns = [seen.subjects.index(subject) for subject in subjects]
    ordered = Observations(
        seen.requests,
        subjects,
        seen.scores[:, columns],
        seen.losses[:, columns],
        None if seen.confidences is None else seen.confidences[:, columns],
    )
    outputs = tuple(tuple(line[column] for column in columns) for line in observed.outputs)
    return replace(observed, observations=ordered, outputs=outputs)


def _array(lines: Sequence[Mapping[str, Any]], name: str, shape: tuple[int, int]) -> _Floats:
    values = [[math.nan if value is None else float(value) for value in line[name]] for line in lines]
    found: _Floats = np.array(values, dtype=np.float64).reshape(shape)
    return found
