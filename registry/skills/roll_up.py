"""What the scores below a skill say of it, where it has none of its own.

Scores of different metrics have no mean, so a number is given only where all that stand below were scored by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["RollUp", "Scored", "roll_up"]


class Mean(Protocol):
    """A mean over n items, as `card.Interval` is."""

    @property
    def score(self) -> float: ...

    @property
    def n(self) -> int: ...


class Scored(Protocol):
    """The score of a skill, as `card.SkillScore` is."""

    @property
    def metric(self) -> str: ...

    @property
    def expert(self) -> Mean: ...

    @property
    def base(self) -> Mean: ...


@dataclass(frozen=True)
class RollUp:
    """A skill's score by the skills `of` below it. `metric`, `expert` and `base` are None where there is no number,
    and `why` says which skills count, or what stands against a number."""

    of: tuple[str, ...]
    n: int
    why: str
    metric: str | None = None
    expert: float | None = None
    base: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "of": list(self.of)}


def roll_up(skill: str, scores: Mapping[str, Scored], children: Callable[[str], Sequence[str]]) -> RollUp:
    """The item-weighted mean of the nearest scored skills below `skill`, which must have one at least.

    A scored skill stands for all below it. One that is reached by two ways counts once.
    """
    of = tuple(dict.fromkeys(_nearest(skill, scores, children)))
    parts = [scores[name] for name in of]
    metrics = sorted({part.metric for part in parts})
    n = sum(part.expert.n for part in parts)
    named = ", ".join(of)
    if len(metrics) > 1:
        return RollUp(of, n, f"no number: {named} are scored by different metrics ({', '.join(metrics)})")
    if "+" in metrics[0]:
        return RollUp(of, n, f"no number: {named} mix the metrics {metrics[0].replace('+', ' and ')}")
    expert = sum(part.expert.score * part.expert.n for part in parts) / n
    base = sum(part.base.score * part.base.n for part in parts) / sum(part.base.n for part in parts)
    return RollUp(of, n, f"mean of {named}, weighted by items", metrics[0], expert, base)


def _nearest(skill: str, scores: Mapping[str, Scored], children: Callable[[str], Sequence[str]]) -> Iterable[str]:
    for child in children(skill):
        if child in scores:
            yield child
        else:
            yield from _nearest(child, scores, children)
