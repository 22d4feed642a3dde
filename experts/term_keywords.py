"""Keywords of a suite's items without a language model: the terms that tell an item among the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert.clustering import without_repeats
from xpert.experts.item_groups import MOST_KEYWORDS, ItemGroups, by_names, of_keywords
from xpert.storage import hash_texts

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import CountVectorizer

__all__ = ["keywords_by_terms", "telling_terms_of_items", "term_reader"]

MOST_PER_ITEM = 5
LONGEST = 60
COMMONEST = 0.5
"""A term of more items than this share tells none of them."""
ALIKE = 0.9
"""Terms of nearly the same items (Jaccard) say one thing: the one of more items stays."""


def keywords_by_terms(prompts: Sequence[str], least: int) -> ItemGroups:
    """Groups by telling term, each of `least` items or more. The 1,000 terms of most items. Time O(words + 1000²)."""
    found = by_names(telling_terms_of_items(prompts, least), least)
    kept: dict[str, tuple[int, ...]] = {}
    for name, rows in list(found.items())[:MOST_KEYWORDS]:  # every two are compared
        if not any(_alike(rows, other) for other in kept.values()):
            kept[name] = rows
    how: dict[str, Any] = {
        "by": "telling-terms",
        "most_per_item": MOST_PER_ITEM,
        "least_items": least,
        "prompts": hash_texts(prompts),
    }
    return of_keywords(kept, how, items=len(prompts), smaller=max(0, len(found) - MOST_KEYWORDS))


def telling_terms_of_items(prompts: Sequence[str], least: int) -> list[list[str]]:
    """Of each prompt up to five words and word pairs, the most telling first.

    Class-based TF-IDF with each prompt a class of its own and a term counted once in it: log(1 + A / f(t)), with A the
    mean number of terms of a prompt and f(t) the number of prompts with t (Grootendorst 2022, arXiv:2203.05794), over
    the terms of `least` prompts or more and at most half of them. English words that tell nothing are left out.
    """
    if len(prompts) * COMMONEST < least:
        return [[] for _ in prompts]
    vectorizer = _vectorizer(min_df=least, max_df=COMMONEST, binary=True)
    try:
        held = vectorizer.fit_transform(prompts).tocsr()
    except ValueError as error:
        if "empty vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
            raise
        return [[] for _ in prompts]
    names = vectorizer.get_feature_names_out()
    weights = np.log1p(held.sum() / len(prompts) / np.asarray(held.sum(axis=0)).ravel())
    found = []
    for row in range(len(prompts)):
        terms = held.indices[held.indptr[row] : held.indptr[row + 1]]
        ranked = terms[np.lexsort((terms, -weights[terms]))]
        short = (name for term in ranked if len(name := str(names[term])) <= LONGEST)
        found.append(without_repeats(short, MOST_PER_ITEM))
    return found


def term_reader() -> Callable[[str], list[str]]:
    """What reads a text's words and word pairs, in small letters and in their order, as they are counted here."""
    reader: Callable[[str], list[str]] = _vectorizer().build_analyzer()
    return reader


def _vectorizer(**settings: Any) -> CountVectorizer:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    return CountVectorizer(
        ngram_range=(1, 2), stop_words=sorted(ENGLISH_STOP_WORDS), token_pattern=r"[^\W\d_]{2,}", **settings
    )


def _alike(rows: Sequence[int], others: Sequence[int]) -> bool:
    common = len(set(rows) & set(others))
    return common >= ALIKE * (len(rows) + len(others) - common)
