"""Prompts that hold other replies or passages, and what is read out of likelihoods."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xpert.protocols import Question, Weighed
from xpert.records import Message

__all__ = [
    "cut_text",
    "cut_words",
    "mean_logprob",
    "merging_messages",
    "says_yes",
    "stated",
    "with_last",
    "without_thinking",
]

_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def with_last(messages: Sequence[Message], content: str) -> tuple[Message, ...]:
    """The conversation with another text in its last turn."""
    return (*messages[:-1], Message(messages[-1].role, content))


def stated(question: Question) -> str:
    """What the last turn asks."""
    return question.messages[-1].content


def merging_messages(messages: Sequence[Message], replies: Sequence[str]) -> tuple[Message, ...]:
    """A conversation whose last turn shows replies to it, in this order, and asks for the one answer.

    The form of mixture-of-agents (https://arxiv.org/abs/2406.04692): the reader is warned that replies may be wrong.
    """
    shown = "\n\n".join(f"Reply {number}:\n{reply}" for number, reply in enumerate(replies, 1))
    text = (
        f"{messages[-1].content}\n\n"
        f"Here are {len(replies)} replies to this. Some of them may be wrong.\n\n{shown}\n\n"
        "Weigh them critically, take what is right in them, and give the one final answer, in the form that was asked "
        "for."
    )
    return with_last(messages, text)


def without_thinking(text: str) -> str:
    """A reply without what stands between <think> tags; one that never ends its thinking has no other text."""
    return _THINKING.sub("", text).strip()


def cut_words(text: str, words: int) -> str:
    """The first `words` words at most, back to the last sentence that ends among them, if one does."""
    found = list(re.finditer(r"\S+", text))
    return _back_to_sentence(text[: found[words - 1].end()].strip()) if len(found) > words else text.strip()


def cut_text(text: str, characters: int) -> str:
    """The first `characters` characters at most, back to the last sentence that ends among them, or the last word."""
    if len(text) <= characters:
        return text
    kept = text[:characters]
    whole = _back_to_sentence(kept)
    if whole == kept and not text[characters].isspace():
        head = re.match(r".*(?=\s)", kept, re.DOTALL)
        kept = head[0] if head and head[0].strip() else kept
        return kept.strip()
    return whole.strip()


def _back_to_sentence(text: str) -> str:
    """Up to the end of the last sentence that ends in a text; all of it where none does."""
    if text[-1:] in ".!?":
        return text
    end = max(text.rfind(mark) for mark in (". ", "! ", "? ", ".\n"))
    return text[: end + 1] if end > 0 else text


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Mean log-probability of a token, in nats; minus infinity for no tokens."""
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


def says_yes(weighed: Weighed) -> float:
    """log P(Yes) - log P(No) of a Weigh over ("Yes", "No"), rounded so that a batch's last bits decide nothing."""
    yes, no = weighed.logprobs
    return round(sum(yes) - sum(no), 5)
