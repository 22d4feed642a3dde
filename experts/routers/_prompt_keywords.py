"""A prompt's keywords, among those that experts were profiled on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xpert.experts.prototypes import FixedSpace
from xpert.experts.term_keywords import term_reader

__all__ = ["MOST", "Keyword", "PromptKeywords", "stem"]

MOST = 5
"""Keywords of a prompt: as many as an item of a profile has at most."""

LONGEST = 3
"""Words of a keyword that is looked for in a prompt."""


@dataclass(frozen=True)
class Keyword:
    """A keyword of the vocabulary, what of the prompt it stands for, and the cosine of the two where it was looked for
    by an embedder."""

    name: str
    said: str = ""
    cosine: float | None = None

    def __str__(self) -> str:
        how = f" (from {self.said!r})" if self.said and self.said != self.name else ""
        return f"{self.name!r}{how}" if self.cosine is None else f"{self.name!r}{how} at cosine {self.cosine:.2f}"


class PromptKeywords:
    """Finds keywords of a vocabulary in texts, in other keywords, or near them.

    items: the vocabulary, each keyword with the items of its profile. Of a prompt's keywords the `MOST` of the fewest
    items are kept: those are the most telling. space: an embedder for what is not said in the vocabulary's words;
    threshold: the least cosine.
    """

    def __init__(self, items: Mapping[str, float], space: FixedSpace | None = None, threshold: float = 0.5) -> None:
        self._items = items
        self._read = term_reader()
        self._by_stem: dict[str, str] = {}
        for name in sorted(items, key=lambda name: (-items[name], name)):
            self._by_stem.setdefault(self._stems(name), name)
        self._space, self._threshold = space, threshold
        self._names = sorted(items)
        if space is not None:
            self._vectors = space.embed(self._names)

    def in_text(self, prompt: str) -> list[Keyword]:
        """The keywords of up to three words that the prompt holds, but for plural endings and for words that tell
        nothing (`the`). Time O(words)."""
        found: dict[str, Keyword] = {}
        words = self._words(prompt)
        stems = [stem(word) for word in words]
        for length in range(1, LONGEST + 1):
            for at in range(len(words) - length + 1):
                said = " ".join(words[at : at + length])
                name = said if said in self._items else self._by_stem.get(" ".join(stems[at : at + length]))
                if name is not None:
                    found.setdefault(name, Keyword(name, said))
        return sorted(found.values(), key=lambda keyword: (self._items[keyword.name], keyword.name))[:MOST]

    def near(self, prompts: Sequence[str]) -> list[list[Keyword]]:
        """Of each prompt the keywords nearest to it as a whole, nearest first."""
        assert self._space is not None, "needs an embedder"
        found = []
        for row in np.round(self._space.embed(list(prompts)) @ self._vectors.T, 5):
            best = np.argsort(-row, kind="stable")[:MOST]
            found.append([Keyword(self._names[i], "", float(row[i])) for i in best if row[i] >= self._threshold])
        return found

    def like(self, names: Sequence[str]) -> list[Keyword]:
        """Other keywords, each as the one of the vocabulary that is called so, or the nearest one. In their order."""
        found: dict[str, Keyword] = {}
        unknown = [name for name in names if self._known(name) is None]
        nearest = dict(zip(unknown, self._nearest(unknown), strict=True))
        for said in names:
            name = self._known(said)
            keyword = Keyword(name, said) if name is not None else nearest[said]
            if keyword is not None:
                found.setdefault(keyword.name, keyword)
        return list(found.values())[:MOST]

    def _nearest(self, names: Sequence[str]) -> list[Keyword | None]:
        if self._space is None or not names:
            return [None] * len(names)
        found: list[Keyword | None] = []
        for said, row in zip(names, np.round(self._space.embed(list(names)) @ self._vectors.T, 5), strict=True):
            best = int(row.argmax())
            far = row[best] < self._threshold
            found.append(None if far else Keyword(self._names[best], said, float(row[best])))
        return found

    def _known(self, said: str) -> str | None:
        return said if said in self._items else self._by_stem.get(self._stems(said))

    def _words(self, text: str) -> list[str]:
        return [term for term in self._read(text) if " " not in term]

    def _stems(self, said: str) -> str:
        """What is alike in the spellings of a keyword; itself where it has no words that tell something (`c++`)."""
        return " ".join(map(stem, self._words(said))) or said


def stem(word: str) -> str:
    """Without a plural ending: the S stemmer (Harman 1991, "How effective is suffixing?")."""
    if len(word) < 4:
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return f"{word[:-3]}y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word
