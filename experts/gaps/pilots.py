"""Pilots: prompts that an expert serves well and that lie far from its exemplars, which may so reach further.

After the pilot embeddings of RouterRetriever (arXiv:2409.02685): there, queries that an expert answers best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xpert.experts.gaps.grouping import embed_together
from xpert.experts.gaps.options import GapOptions
from xpert.experts.gaps.prompts import AskedPrompt, different_prompts, lacks_of_fit, shared_system
from xpert.experts.server.request_log import RequestRecord
from xpert.overlap import same_text_key
from xpert.progress import SILENT, Progress
from xpert.protocols import RoutableExpert

__all__ = ["Pilot", "find_pilots"]

TOO_NEAR = 0.8
"""Cosine to an exemplar, or to a pilot before, from which a prompt brings nothing new."""
WHOLE = ("stop", "length")


@dataclass(frozen=True)
class Pilot:
    """A served prompt; cosine: to the nearest exemplar or earlier pilot of its expert. skill: of the nearest exemplar,
    None where that has none."""

    prompt: AskedPrompt
    cosine: float
    skill: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.prompt.id,
            "prompt": self.prompt.text,
            "requests": self.prompt.requests,
            "chance": self.prompt.chance,
            "cosine": round(self.cosine, 4),
            "skill": self.skill,
        }


def find_pilots(
    records: Sequence[RequestRecord],
    experts: Sequence[RoutableExpert],
    options: GapOptions | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, list[Pilot]]:
    """Expert key -> its pilots, the farthest from its exemplars first; experts without any are left out.

    Candidates were routed to the expert first, with a calibrated chance of at least `pilot_chance`, and answered to the
    end; without a calibrated router there are none. Of them the farthest from exemplars and earlier pilots is taken,
    again and again (Gonzalez 1985), until `pilots` are there or the farthest is as near as 0.8.
    """
    options = options or GapOptions()
    lacks, system = lacks_of_fit(records), shared_system(records)
    found: dict[str, list[Pilot]] = {}
    for expert in experts:
        served = [record for record in records if _serves_well(record, expert.key, options.pilot_chance)]
        known_already = {same_text_key(text) for text in expert.exemplars}
        prompts = [
            prompt
            for prompt in different_prompts(served, lacks, near=options.near, system=system)
            if same_text_key(prompt.text) not in known_already
        ]
        if not (prompts and options.pilots and expert.exemplars):
            continue
        texts = [*expert.exemplars, *(prompt.text for prompt in prompts)]
        space = embed_together(texts, options.embedder, device=device, seed=seed, progress=progress)
        known, mine = space[: len(expert.exemplars)], space[len(expert.exemplars) :]
        to_exemplars = np.round(mine @ known.T, 6)
        nearest, cosine = to_exemplars.argmax(axis=1), to_exemplars.max(axis=1)
        labels = expert.exemplar_skills or ("",) * len(expert.exemplars)
        pilots: list[Pilot] = []
        while len(pilots) < min(options.pilots, len(prompts)):
            farthest = int(cosine.argmin())
            if cosine[farthest] >= TOO_NEAR:
                break
            skill = labels[int(nearest[farthest])] or None
            pilots.append(Pilot(prompts[farthest], float(cosine[farthest]), skill))
            cosine = np.maximum(cosine, np.round(mine @ mine[farthest], 6))
            cosine[farthest] = np.inf
        if pilots:
            found[expert.key] = pilots
    return found


def _serves_well(record: RequestRecord, key: str, chance: float) -> bool:
    if not record.routed or not record.experts or record.experts[0][0] != key:
        return False
    return record.chance is not None and record.chance >= chance and record.finished in WHOLE
