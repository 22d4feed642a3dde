"""What is known of experts by keyword: votes of their profiles, or what their cards and exemplars let one assume."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xpert.experts.term_keywords import term_reader
from xpert.protocols import RoutableExpert

__all__ = ["ASSUMED", "PRIOR", "KeywordVotes", "Vote"]

PRIOR = 5
"""A vote is (right - wrong) / (items + PRIOR): few items say little."""

ASSUMED = 5
"""Items that an unprofiled expert is taken to have got right of what it was made for: at most so many a keyword."""

_TERMS = 20
"""Terms that stand for an unprofiled expert's exemplars."""


@dataclass(frozen=True)
class Vote:
    """Items of a keyword that an expert got right and wrong."""

    right: float
    wrong: float
    assumed: bool = False

    @property
    def value(self) -> float:
        return (self.right - self.wrong) / (self.right + self.wrong + PRIOR)

    def __str__(self) -> str:
        measured = f"{self.right:g} right, {self.wrong:g} wrong"
        return f"{measured} assumed" if self.assumed else measured


class KeywordVotes:
    """Votes by expert and by keyword.

    An expert with `keyword_votes` has those. Another one is taken to know what it was made for: its declared skills
    (ASSUMED items, right by the skill's profile score where it is profiled, else all right), and the twenty most
    telling terms of its exemplars (as many items right as exemplars hold the term, at most ASSUMED). So its vote on a
    keyword is 0.5 at most, as five right answers give, and a measured vote soon outweighs it.

    standing [experts]: (right - wrong) / (items + PRIOR) over all keywords; of an unprofiled expert over its profiled
    skills, and 0 without any. items: of a keyword, the most that any expert was asked. Time O(votes), and O(words) of
    unprofiled experts' exemplars.
    """

    def __init__(self, experts: Sequence[RoutableExpert]) -> None:
        unprofiled = [expert for expert in experts if not expert.keyword_votes]
        terms = dict(zip((e.key for e in unprofiled), _telling_terms([e.exemplars for e in unprofiled]), strict=True))
        self.of_expert: list[Mapping[str, Vote]] = []
        standing = []
        for expert in experts:
            votes: dict[str, Vote]
            if expert.keyword_votes:
                votes = {word: Vote(*counts) for word, counts in expert.keyword_votes.items()}
                measured = list(votes.values())
            else:
                skills = {skill: ASSUMED * score for skill, score in expert.skill_scores.items()}
                measured = [Vote(right, ASSUMED - right, True) for right in skills.values()]
                declared = {skill: float(ASSUMED) for skill in expert.skills} | skills
                votes = {word: Vote(float(min(n, ASSUMED)), 0.0, True) for word, n in terms[expert.key].items()}
                votes |= {_as_words(skill): Vote(right, ASSUMED - right, True) for skill, right in declared.items()}
            self.of_expert.append(votes)
            standing.append(Vote(sum(v.right for v in measured), sum(v.wrong for v in measured)).value)
        self.standing: NDArray[np.float64] = np.array(standing)
        self.items: dict[str, float] = {}
        places: dict[str, list[int]] = {}
        for place, known in enumerate(self.of_expert):
            for word, vote in known.items():
                self.items[word] = max(self.items.get(word, 0.0), vote.right + vote.wrong)
                places.setdefault(word, []).append(place)
        self._columns = {
            word: (np.array(own), np.array([self.of_expert[place][word].value for place in own]))
            for word, own in places.items()
        }

    def local(self, keywords: Sequence[str]) -> NDArray[np.float64]:
        """[experts]: each expert's votes on the keywords, added up; one without a vote on a keyword adds nothing."""
        total = np.zeros(len(self.of_expert))
        for word in keywords:
            places, votes = self._columns[word]
            total[places] += votes
        return total


def _telling_terms(exemplars: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Per expert its most telling terms, each with the number of exemplars that hold it.

    share of the expert's exemplars with the term x log(1 + experts / experts with it), over the terms of two exemplars
    or more (of one, where there are fewer than four exemplars); ties by the term.
    """
    read: Callable[[str], list[str]] = term_reader()
    counted: list[dict[str, int]] = []
    for texts in exemplars:
        held = Counter(term for text in texts for term in set(read(text)))
        least = 2 if len(texts) >= 4 else 1
        counted.append({term: count for term, count in held.items() if count >= least})
    holders = Counter(term for counts in counted for term in counts)
    found = []
    for counts in counted:

        def telling(term: str, counts: dict[str, int] = counts) -> tuple[float, str]:
            return -counts[term] * math.log1p(len(counted) / holders[term]), term

        found.append({term: counts[term] for term in sorted(counts, key=telling)[:_TERMS]})
    return found


def _as_words(skill: str) -> str:
    return " ".join(skill.replace("_", " ").replace("-", " ").lower().split()) or skill
