"""What a request log says of a mixture: usage, gaps and pilots, and the folder they are written to.

gaps.json             usage per expert and day, gaps ranked, pilots per expert
shots-SLUG.jsonl      per gap the prompts that stand for it, to be labelled or taken as shots as they are
pilots-KEY.jsonl      per expert its pilots, for `xpert prototypes EXPERT --pilots FILE`
manifest.json         kind "gaps"

The folder is its owner's alone (mode 0700): it holds what users wrote.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xpert.errors import BadInput
from xpert.experts.gaps.finding import Found, Gap, find_gaps
from xpert.experts.gaps.options import GapOptions
from xpert.experts.gaps.pilots import Pilot, find_pilots
from xpert.experts.gaps.reading import Requests
from xpert.experts.mixture import Mixture
from xpert.experts.request_usage import RequestUsage, request_usage
from xpert.progress import SILENT, Progress
from xpert.records import Message, Row
from xpert.registry.skills.skill_holders import Library
from xpert.registry.skills.taxonomy import Taxonomy
from xpert.shot_files import unlabelled_lines
from xpert.source_files import encode
from xpert.storage import draft_folder, write_file, write_json, write_manifest

__all__ = ["GapsReport", "gaps_report", "write_gaps"]

KIND = "gaps"


@dataclass(frozen=True)
class GapsReport:
    """`requests` as far as they are of the mixture in question; `others`: requests to other mixtures, left out.
    without_chance: served requests whose router was not calibrated, of which no pilots can be."""

    requests: Requests
    usage: RequestUsage
    found: Found
    pilots: Mapping[str, Sequence[Pilot]]
    options: GapOptions
    others: int
    without_chance: int
    mixture: str | None
    seed: int
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def next(self) -> Gap | None:
        """The gap for which an expert should be built next."""
        return self.found.gaps[0] if self.found.gaps else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "mixture": self.mixture,
            "files": self.requests.files,
            "torn_lines": self.requests.torn,
            "requests": len(self.requests),
            "requests_to_other_mixtures": self.others,
            "usage": self.usage.to_dict(),
            "unserved_requests": self.found.unserved,
            "unserved_prompts": self.found.prompts,
            "withheld_requests": self.found.withheld,
            "next": None if self.next is None else self.next.slug,
            "gaps": [gap.to_dict() for gap in self.found.gaps],
            "pilots": {key: [pilot.to_dict() for pilot in pilots] for key, pilots in self.pilots.items()},
            "served_without_chance": self.without_chance,
        }


def gaps_report(
    requests: Requests,
    options: GapOptions | None = None,
    *,
    mixture: Mixture | None = None,
    registry: Library | None = None,
    taxonomy: Taxonomy | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> GapsReport:
    """Usage, gaps and pilots of all requests, or of those to `mixture`, whose experts' exemplars are then read too.

    Without a mixture there are no pilots, since what they are to be far from is not known. Raises BadInput where no
    request is to the mixture.
    """
    options = options or GapOptions()
    records = [record for record in requests.records if mixture is None or record.mixture == mixture.name]
    if mixture is not None and not records:
        there = ", ".join(sorted({record.mixture for record in requests.records}))
        raise BadInput(f"no request of the log is to the mixture {mixture.name!r}", hint=f"there are those to {there}")
    experts = [expert.routable() for expert in mixture.experts] if mixture is not None else []
    begin = time.perf_counter()
    found = find_gaps(
        records,
        options,
        experts=experts,
        registry=registry,
        taxonomy=taxonomy,
        device=device,
        seed=seed,
        progress=progress,
    )
    if mixture is not None:
        found = _without_own(found, mixture)
    middle = time.perf_counter()
    pilots = find_pilots(records, experts, options, device=device, seed=seed, progress=progress)
    return GapsReport(
        requests=Requests(tuple(records), requests.files, requests.torn, requests.repeated),
        usage=request_usage(records, known=[expert.key for expert in experts]),
        found=found,
        pilots=pilots,
        options=options,
        others=len(requests) - len(records),
        without_chance=sum(record.routed and bool(record.experts) and record.chance is None for record in records),
        mixture=mixture.name if mixture is not None else None,
        seed=seed,
        timings={"gaps": middle - begin, "pilots": time.perf_counter() - middle},
    )


def _without_own(found: Found, mixture: Mixture) -> Found:
    """Experts that the mixture holds already, in whatever version, fill no gap of it."""
    own = {expert.ref.partition("@")[0] for expert in mixture.experts}
    gaps = (replace(gap, holders=tuple(r for r in gap.holders if r.partition("@")[0] not in own)) for gap in found.gaps)
    return replace(found, gaps=tuple(gaps))


def shots_file(gap: Gap) -> str:
    return f"shots-{gap.slug}.jsonl"


def pilots_file(key: str) -> str:
    """`owner/name` becomes `owner-name`."""
    return f"pilots-{re.sub(r'[^A-Za-z0-9._-]+', '-', key).strip('-.') or 'expert'}.jsonl"


def write_gaps(out: Path, report: GapsReport) -> None:
    """Writes the folder, whole or not at all. Raises BadInput where `out` exists."""
    with draft_folder(out) as draft:
        draft.chmod(0o700)
        write_json(draft / "gaps.json", report.to_dict())
        for gap in report.found.gaps:
            write_file(draft / shots_file(gap), _lines(_shot_lines(gap)))
        for key, pilots in report.pilots.items():
            write_file(draft / pilots_file(key), _lines(_pilot_lines(pilots)))
        write_manifest(
            draft,
            KIND,
            inputs={"requests": report.requests.fingerprint, "mixture": report.mixture},
            config=report.options.to_dict(),
            seed=report.seed,
            figures={
                "requests": len(report.requests),
                "routed": report.usage.routed,
                "fell_back": report.usage.fell_back,
                "unserved_prompts": report.found.prompts,
                "gaps": len(report.found.gaps),
                "pilots": sum(len(pilots) for pilots in report.pilots.values()),
            },
            timings=report.timings,
        )


def _shot_lines(gap: Gap) -> list[dict[str, Any]]:
    rows = [Row(prompt.id, prompt.messages, "", gap.label) for prompt in gap.chosen]
    reasons = [
        f"asked {prompt.requests} times, lack of fit {prompt.lack:.2f}"
        if prompt.requests > 1
        else f"asked once, lack of fit {prompt.lack:.2f}"
        for prompt in gap.chosen
    ]
    return unlabelled_lines(rows, [prompt.requests * prompt.lack for prompt in gap.chosen], reasons)


def _pilot_lines(pilots: Sequence[Pilot]) -> list[dict[str, Any]]:
    rows = [Row(pilot.prompt.id, (Message("user", pilot.prompt.text),), "", pilot.skill) for pilot in pilots]
    chances = [pilot.prompt.chance or 0.0 for pilot in pilots]
    reasons = [f"cosine {pilot.cosine:.2f} to the nearest exemplar" for pilot in pilots]
    return unlabelled_lines(rows, chances, reasons)


def _lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(encode(value) + b"\n" for value in values)
