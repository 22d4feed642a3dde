"""From logged requests to the different prompts in them: who was served, who was not, and how badly they fit."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xpert.boilerplate import Boilerplate
from xpert.experts.server.request_log import RequestRecord
from xpert.near_duplicates import NearDuplicates
from xpert.overlap import same_text_key
from xpert.records import Message
from xpert.words import hash_words

__all__ = ["AskedPrompt", "different_prompts", "is_served", "lacks_of_fit", "shared_system", "unserved"]


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt that was asked, perhaps often and in near copies; `messages` and `text` are those of its first request.

    requests: those that asked it. lack: the mean of their lack of fit. chance, score: the means of their chances and
    of their best candidates' scores, where there are any; candidates: each expert's mean score.
    """

    id: str
    messages: tuple[Message, ...]
    text: str
    requests: int
    lack: float
    chance: float | None
    score: float | None
    candidates: Mapping[str, float]


def is_served(record: RequestRecord, below: float | None) -> bool:
    """Whether an expert answered by the router's choice, with a chance (else a best score) of at least `below`."""
    if not record.experts:
        return False
    fit = record.chance if record.chance is not None else record.score
    return below is None or fit is None or fit >= below


def unserved(records: Sequence[RequestRecord], below: float | None) -> list[RequestRecord]:
    """The routed requests, in order of time, that nobody serves: of a text whose latest request is served, none."""
    last: dict[str, bool] = {}
    routed = [record for record in records if record.routed]
    keys = [_key(record.messages) for record in routed]
    for record, key in zip(routed, keys, strict=True):
        last[key] = is_served(record, below)
    return [record for record, key in zip(routed, keys, strict=True) if not last[key] and not is_served(record, below)]


def lacks_of_fit(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Request id -> how badly the experts fit it, in [0, 1].

    1 - chance, where the router is calibrated. Else the share of the requests to the same state of the mixture whose
    best candidate scores higher, since scores can be compared within one router only; 1 where it told no candidates.
    """
    routed = [record for record in records if record.routed]
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for record in routed:
        if record.score is not None:
            scores[record.fingerprint].append(record.score)
    for known in scores.values():
        known.sort()

    def lack(record: RequestRecord) -> float:
        if record.chance is not None:
            return 1 - record.chance
        if record.score is None:
            return 1.0
        known = scores[record.fingerprint]
        return (len(known) - bisect.bisect_right(known, record.score)) / len(known)

    return {record.id: lack(record) for record in routed}


def shared_system(records: Iterable[RequestRecord]) -> str | None:
    """The system text of more than half of the requests: the client's, which tells no task from another."""
    texts = ["\n\n".join(m.content for m in record.messages if m.role == "system") for record in records]
    [(text, count)] = Counter(texts).most_common(1) or [("", 0)]
    return text if text and 2 * count > len(texts) else None


def different_prompts(
    records: Sequence[RequestRecord], lacks: Mapping[str, float], *, near: float, system: str | None = None
) -> list[AskedPrompt]:
    """The prompts of these requests, each once, by the time they were first asked.

    One prompt are: the same text but for case, spaces and punctuation at its ends; near duplicates by `near`; and the
    later turns of a conversation with its first turn here, so that one long conversation is not many prompts. The text
    is that of the system's and user's turns, without the turn `system`. Time: linear in words.
    """
    groups: dict[str, list[RequestRecord]] = {}
    roots: dict[tuple[Message, ...], str] = {}  # a request's turns -> the key of its prompt
    for record in records:
        turns = record.messages
        before = (turns[:end] for end in range(1, len(turns)) if turns[end - 1].role == "user")
        key = next((roots[part] for part in before if part in roots), None) or _key(turns)
        roots.setdefault(turns, key)
        groups.setdefault(key, []).append(record)
    prompts = [_asked(group, lacks, system) for group in groups.values()]
    return _merged(prompts, list(groups.values()), lacks, near, system)


def _merged(
    prompts: list[AskedPrompt],
    groups: list[list[RequestRecord]],
    lacks: Mapping[str, float],
    near: float,
    system: str | None,
) -> list[AskedPrompt]:
    texts = [prompt.text for prompt in prompts]
    earlier = dict(_near_pairs(texts, near))
    for later, first in earlier.items():
        groups[first] = groups[first] + groups[later]
    return [
        prompt if len(group) == prompt.requests else _asked(group, lacks, system)
        for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        if number not in earlier
    ]


def _near_pairs(texts: Sequence[str], near: float) -> list[tuple[int, int]]:
    if not texts:
        return []
    prompts, answers = (pa.array(column, pa.large_string()) for column in (texts, [""] * len(texts)))
    batch = pa.record_batch({"prompt": prompts, "response": answers})
    boilerplate = Boilerplate.learn([batch], len(texts))
    search = NearDuplicates(near, boilerplate)
    source = hash_words(prompts)
    search.add(source, boilerplate.covers(source))

    def fetch(numbers: NDArray[np.int64]) -> list[tuple[str, str]]:
        return [(texts[number], "") for number in numbers.tolist()]

    return [(pair.later, pair.earlier) for pair in search.find(fetch)]


def _asked(group: Sequence[RequestRecord], lacks: Mapping[str, float], system: str | None) -> AskedPrompt:
    first = group[0]
    turns = tuple(turn for turn in first.messages if turn.role != "system" or turn.content != system)
    chances = [record.chance for record in group if record.chance is not None]
    scores = [record.score for record in group if record.score is not None]
    each: defaultdict[str, list[float]] = defaultdict(list)
    for record in group:
        for candidate in record.candidates:
            each[candidate.expert].append(candidate.score)
    return AskedPrompt(
        id=first.id,
        messages=turns or first.messages,
        text=_text(turns or first.messages),
        requests=len(group),
        lack=sum(lacks[record.id] for record in group) / len(group),
        chance=_mean(chances),
        score=_mean(scores),
        candidates={key: sum(values) / len(values) for key, values in each.items()},
    )


def _text(turns: Iterable[Message]) -> str:
    return "\n\n".join(turn.content for turn in turns if turn.role in ("system", "user"))


def _key(turns: Iterable[Message]) -> str:
    return same_text_key(_text(turns))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
