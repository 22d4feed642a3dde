"""How a prediction is compared with the answers that count as right: each metric gives a score in [0, 1].

Several answers: the best one counts. Texts are compared after `normalise`, unless the metric says otherwise.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from xpert.errors import Unavailable, unknown
from xpert.row_files import METRICS as METRIC_NAMES

__all__ = [
    "METRICS",
    "RIGHT_OR_WRONG",
    "check_metric",
    "choice_index",
    "choice_letter",
    "last_number",
    "normalise",
    "score",
]

_EDGES = string.punctuation + "“”‘’«»…–—·" + string.whitespace
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_SEPARATOR = re.compile(r"[,;\n]|\band\b", re.IGNORECASE)
# A letter alone, in brackets, or before a mark that ends it; a capital before a space, unless it is a word of English.
_LETTER_FIRST = re.compile(r"^\s*(?:([A-Za-z])\s*$|\W*([A-Za-z])[).:,\]]|([B-HJ-Z])\s)")
# "Answer: B", "the answer is B", "option (b)"
_LETTER_NAMED = re.compile(r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\b(?:\s+is)?:?\s*(?:\(([A-Za-z])\)|([A-Z])\b(?!\s+\w))")


def normalise(text: str) -> str:
    """NFKC, lower case by casefold, white space folded, punctuation at both ends removed."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(_EDGES)


def score(metric: str, prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The prediction's score against the best of `answers`. Raises NotFound for an unknown metric.

    Where metric `choice` is given the item's choices, prediction and answers may name one by its text or its letter.
    """
    check_metric(metric)
    if metric == "choice" and choices:
        right = {choice_index(answer, choices) for answer in answers} - {None}
        return float(choice_index(prediction, choices) in right)
    return max(METRICS[metric](prediction, answer) for answer in answers)


def check_metric(metric: str) -> None:
    """Raises NotFound for a metric that does not exist, Unavailable for one that cannot run here."""
    if metric == "exec":
        raise Unavailable(
            "metric 'exec' runs generated code and needs a sandbox, which xpert does not have",
            hint="leave these items out with --skip-metric exec",
        )
    if metric not in METRICS:
        raise unknown("metric", metric, METRIC_NAMES)


def _exact(prediction: str, answer: str) -> float:
    """1 where both are the same text after normalisation."""
    return float(normalise(prediction) == normalise(answer))


def _choice(prediction: str, answer: str) -> float:
    """1 where the option named first is the answer. The answer is an option's letter, or its text."""
    if len(answer.strip()) != 1 or not answer.strip().isalpha():
        return _exact(prediction, answer)
    return float(choice_letter(prediction) == answer.strip().upper())


def choice_letter(prediction: str) -> str | None:
    """The option's letter a prediction names: `B`, `(b)`, `B. They eat`, `The answer is C`; not the word `A` or `I`."""
    named = _LETTER_NAMED.search(prediction) or _LETTER_FIRST.match(prediction)
    return next(letter for letter in named.groups() if letter).upper() if named else None


def choice_index(text: str, choices: Sequence[str]) -> int | None:
    """Which of `choices` a text names: by its own words, or by the letter of its place (A is the first)."""
    folded = [normalise(choice) for choice in choices]
    if normalise(text) in folded:
        return folded.index(normalise(text))
    letter = choice_letter(text)
    if letter is None:
        return None
    if letter.casefold() in folded:
        return folded.index(letter.casefold())
    index = ord(letter) - ord("A")
    return index if index < len(choices) else None


def _number(prediction: str, answer: str) -> float:
    """1 where the last number of the prediction equals the answer's last number (relative tolerance 1e-6)."""
    found, wanted = last_number(prediction), last_number(answer)
    if wanted is None or found is None:
        return 0.0
    return float(abs(found - wanted) <= 1e-6 * max(1.0, abs(wanted)))


def last_number(text: str) -> float | None:
    """The last number that stands in a text, thousands' commas read as such; None where there is none."""
    numbers = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return float(numbers[-1].replace(",", "")) if numbers else None


def _tokens(text: str) -> list[str]:
    # SQuAD's normalisation (Rajpurkar et al. 2016): no punctuation, no English articles.
    words = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).casefold()).split()
    return [word for word in words if word not in ("a", "an", "the")]


def _f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD."""
    found, wanted = Counter(_tokens(prediction)), Counter(_tokens(answer))
    if not found or not wanted:
        return float(found == wanted)
    common = sum((found & wanted).values())
    return 2 * common / (sum(found.values()) + sum(wanted.values()))


def _set(prediction: str, answer: str) -> float:
    """F1 over the items of two lists, separated by commas, semicolons, line breaks or `and`; order does not count."""
    found, wanted = _items(prediction), _items(answer)
    if not found or not wanted:
        return float(found == wanted)
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def _items(text: str) -> set[str]:
    return {item for part in _SEPARATOR.split(text) if (item := normalise(part))}


def _contains(prediction: str, answer: str) -> float:
    """1 where the answer stands in the prediction as whole words."""
    wanted = normalise(answer)
    pattern = rf"(?<!\w){re.escape(wanted)}(?!\w)"
    return float(bool(wanted) and re.search(pattern, normalise(prediction)) is not None)


def _chrf(prediction: str, answer: str) -> float:
    """chrF2 of the sentence (Popović 2015), by sacrebleu."""
    return float(_chrf_scorer().sentence_score(prediction, [answer]).score) / 100


def _rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F-measure with stemming (Lin 2004), by rouge-score."""
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "choice": _choice,
    "number": _number,
    "f1": _f1,
    "set": _set,
    "contains": _contains,
    "chrf": _chrf,
    "rougeL": _rouge_l,
}

RIGHT_OR_WRONG = frozenset({"exact", "choice", "number", "contains", "exec"})
"""The metrics that give 0 or 1 and nothing between."""
