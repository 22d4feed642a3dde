"""Replies that follow a schema, an expression or a grammar, by the library `llguidance`.

A constraint becomes a grammar once per engine; each request takes a copy of its matcher, asks it before every token for
a mask over the vocabulary and tells it the token that was chosen. The library's own limits bound what a grammar may
cost per step. They do not bound everything that a hostile one may cost when it is made: the library loops for very long
over some schemas, and overflows the stack on chains of thousands of rules. A new grammar is therefore made in a child
process first, within a time and a memory limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert.errors import BadInput, Unavailable, unknown
from xpert.protocols import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

__all__ = ["CONSTRAINT_BYTES", "Grammars", "Guide", "check_constraint", "choices_of"]

CONSTRAINT_BYTES = 64 << 10
"""The longest text of a constraint, in UTF-8."""
CONSTRAINT_SECONDS = 2
"""Seconds of one core that making a grammar may take; ordinary schemas take milliseconds."""
TRIAL_BYTES = 2 << 30
"""Address space that making a grammar may take."""
KEPT = 64
"""Grammars that are kept; the one used longest ago leaves first."""

_LIMITS: Mapping[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
"""A state of the lexer takes 1 to 2 kB; the library's other limits are left as they are."""
_JSON: JsonCompileOptions = {"whitespace_pattern": r" |\n[ \t]{0,32}"}
"""Between JSON's tokens stands at most one space, or a new line and its indentation: no endless blanks."""
_NOTHING = "no text satisfies it"
_COSTLY = "it is too complex: making its grammar takes too long, or too much memory"

_TRIAL = """
import json, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
asked = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
except ImportError:
    pass
matcher = LLMatcher(LLTokenizer("byte"), asked["grammar"], log_level=0, limits=LLParserLimits(**asked["limits"]))
print(json.dumps(matcher.get_error()))
"""


class Guide:
    """One reply's way through its grammar. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, where: str) -> None:
        self._matcher = matcher
        self._where = where

    def mask(self) -> NDArray[np.bool_]:
        """bool [vocabulary of the tokenizer]: what may come next, the base's ends included where the reply may end.

        Raises BadInput where the grammar became too costly to follow.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(packed, bitorder="little").view(np.bool_)

    def advance(self, token: int) -> bool:
        """Takes a token that the mask allowed; True where nothing can follow. Raises as `mask` does."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadInput(
                f"the constraint cannot be followed further: {_line(self._matcher.get_error())}",
                where=self._where,
                hint="use a simpler one",
            )


class Grammars:
    """The grammars of one tokenizer. Any thread may ask; a new grammar is made on the thread that asks for it.

    `ends`: the tokens that end a reply. Cost: about half a second for the first constraint of an engine (the vocabulary
    is sorted into a tree), a tenth for each further one that is new, and microseconds for one that is kept.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int], *, where: str) -> None:
        self._tokenizer = tokenizer
        self._ends = sorted(ends)
        self._where = where
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, constraint: Constraint, *, where: str) -> Guide:
        """Raises BadInput for a constraint that makes no sense or costs too much, Unavailable without llguidance."""
        check_constraint(constraint, where=where)
        with self._lock:
            made = self._kept.get(constraint)
            if made is not None:
                self._kept.move_to_end(constraint)
                return Guide(made.deep_copy(), where)
        made = self._make(constraint, where)
        copy = made.deep_copy()  # before others can see it: a matcher is for one thread at a time
        with self._lock:
            self._kept[constraint] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return Guide(copy, where)

    def _make(self, constraint: Constraint, where: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise Unavailable(
                f"constrained replies need llguidance, which cannot be loaded ({error})",
                where=where,
                hint='run `pip install "xpert-toolkit[serve]"` or `pip install llguidance`',
            ) from None
        grammar = _GRAMMARS[constraint.kind](constraint.text, where)
        wrong = _tried(grammar)
        if wrong:
            raise _refused(constraint, wrong, where)
        made = LLMatcher(self._tokens(), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if not made.is_error():
            made.compute_bitmask()  # the copies find what it worked out
        if made.is_error():
            message = made.get_error()
            raise _refused(constraint, _NOTHING if message.startswith("NoExtension") else message, where)
        return made

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                import llguidance.hf

                try:
                    self._vocabulary = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self._ends or None)
                except ValueError as error:
                    raise BadInput(
                        f"replies of this base cannot be constrained: {error}",
                        where=self._where,
                        hint="use a base whose tokenizer is one of the tokenizers library",
                    ) from None
            return self._vocabulary


def check_constraint(constraint: Constraint, *, where: str) -> None:
    """Raises BadInput for an unknown kind, a text that is missing, out of place or too long, and a bad list."""
    if constraint.kind not in _GRAMMARS:
        raise unknown("constraint", constraint.kind, _GRAMMARS, where=where)
    try:
        size = len(constraint.text.encode())
    except UnicodeEncodeError as error:
        raise BadInput(f"the constraint's text is not Unicode: {error.reason}", where=where) from None
    if size > CONSTRAINT_BYTES:
        raise BadInput(f"the constraint has {size:,} bytes; the most is {CONSTRAINT_BYTES:,}", where=where)
    if constraint.kind == "json" and constraint.text:
        raise BadInput("the constraint json takes no text", where=where, hint="use json_schema for a schema")
    if constraint.kind == "choice":
        choices_of(constraint.text, where=where)
    if constraint.kind == "json_schema":
        _schema(constraint.text, where)
    if constraint.kind == "lark" and not constraint.text.strip():
        raise BadInput("the lark grammar is empty", where=where)


def choices_of(text: str, *, where: str) -> list[str]:
    """The texts of a choice; raises BadInput where they are not a JSON list of texts, or one is empty."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the choices are not JSON: {error}", where=where) from None
    if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
        raise BadInput("the choices are not a JSON list of texts", where=where)
    if not found:
        raise BadInput("there are no choices", where=where)
    if "" in found:
        raise BadInput("a choice is empty", where=where)
    if any("\ud800" <= letter <= "\udfff" for choice in found for letter in choice):
        raise BadInput("a choice is not Unicode: it holds half a surrogate pair", where=where)
    return found


def _schema(text: str, where: str) -> Mapping[str, Any] | bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the JSON schema is not JSON: {error}", where=where) from None
    if not isinstance(found, dict | bool):
        raise BadInput("the JSON schema is neither an object nor true or false", where=where)
    return found


def _json_schema(text: str, where: str) -> str:
    from llguidance import LLMatcher

    schema = _schema(text, where)
    if schema is False:
        raise BadInput(f"the JSON schema cannot be used: {_NOTHING}", where=where)
    return LLMatcher.grammar_from_json_schema({} if schema is True else text, defaults=_JSON)


def _regex(text: str, where: str) -> str:
    from llguidance import LLMatcher

    del where
    return LLMatcher.grammar_from_regex(text)


def _lark(text: str, where: str) -> str:
    from llguidance import LLMatcher

    del where
    return LLMatcher.grammar_from_lark(text)


def _choice(text: str, where: str) -> str:
    choices = dict.fromkeys(choices_of(text, where=where))
    return _lark("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices), where)


_GRAMMARS: dict[str, Callable[[str, str], str]] = {
    "json": lambda _, where: _json_schema('{"type": "object"}', where),
    "json_schema": _json_schema,
    "regex": _regex,
    "lark": _lark,
    "choice": _choice,
}


def _tried(grammar: str) -> str:
    """What is wrong with a grammar ("": nothing), found where it can do no harm.

    By bytes instead of the base's tokens, which shortens the start and changes little in the cost of a grammar.
    """
    limits = {"limits": _LIMITS, "seconds": CONSTRAINT_SECONDS, "bytes": TRIAL_BYTES}
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL],
            input=json.dumps({"grammar": grammar, **limits}).encode(),
            capture_output=True,
            timeout=10 * CONSTRAINT_SECONDS,  # of the clock: the machine may be busy with other things
        )
    except subprocess.TimeoutExpired:
        return _COSTLY
    return str(json.loads(child.stdout)) if child.returncode == 0 else _COSTLY


def _refused(constraint: Constraint, message: str, where: str) -> BadInput:
    what = {"json_schema": "the JSON schema", "regex": "the regular expression", "lark": "the lark grammar"}
    subject = what.get(constraint.kind, f"the constraint {constraint.kind}")
    return BadInput(f"{subject} cannot be used: {_line(message)}", where=where)


def _line(message: str) -> str:
    """The first lines of the library's message as one, without its drawing of the place."""
    lines = [
        line.strip() for line in message.splitlines() if line.strip() and "|" not in line.lstrip("0123456789 ")[:1]
    ]
    return " ".join(line for line in lines if line.strip("^ ") and line != "<non-verbose/>")[:300]
