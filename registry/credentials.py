"""What looks like a credential in a text: tokens, keys and passwords that must not be published by mistake.

Known forms only, so that few harmless texts are stopped: a token's fixed beginning and length, and enough different
characters to be no placeholder. What a form does not cover is not found; this is a safety net, not a proof.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Finding", "find_credentials"]


@dataclass(frozen=True)
class Finding:
    """Where something like a credential stands: its line (from 1) and its kind; never the credential itself."""

    line: int
    kind: str


@dataclass(frozen=True)
class _Form:
    """A kind of credential: words one of which stands in every match (a cheap look first), and the pattern.

    The group `secret` is the part that is drawn at random, if the pattern has one.
    """

    kind: str
    words: tuple[str, ...]
    pattern: re.Pattern[str]
    plausible: Callable[[str], bool]


def find_credentials(text: str) -> Iterator[Finding]:
    """All findings in a text, kind by kind. Cost: one search a kind, and a pattern only where its word stands."""
    for form in _FORMS:
        if not any(word in text for word in form.words):
            continue
        for match in form.pattern.finditer(text):
            if form.plausible(match["secret"]):
                yield Finding(text.count("\n", 0, match.start()) + 1, form.kind)


def _random(secret: str) -> bool:
    """No placeholder such as xxxx...x, 1234..., or a name in capitals: many different characters, and a digit."""
    plain = secret.upper()
    if any(word in plain for word in ("EXAMPLE", "XXXX", "PLACEHOLDER", "YOUR", "REDACTED", "ABCDEFGH", "12345678")):
        return False
    return len(set(secret)) >= 10 and any(c.isdigit() for c in secret) and any(c.isalpha() for c in secret)


def _letters(secret: str) -> bool:
    """As `_random`; but these tokens may lack digits, and then mix capitals and small letters."""
    mixed = secret.lower() != secret != secret.upper()
    return _random(secret) or (mixed and _random(f"{secret}0"))


_NO_PASSWORD = re.compile(
    r"(?:pass(?:word|wd|wort)?|pwd?|secret|token|test|user(?:name)?|changeme|example|foo|bar|none|null)?[0-9]{0,3}"
)


def _password(secret: str) -> bool:
    """Neither a name for a password, nor a variable or a mask in its place. (The form leaves out `guest:guest`.)"""
    if _NO_PASSWORD.fullmatch(secret.strip("*x.•-_").casefold()) or len(set(secret)) < 3:
        return False
    if re.search(r"pass(?:word|wd|wort)|secret|^your|^my[-_]", secret.casefold()):
        return False
    return secret[0] not in "$<{[%" and secret[-1] not in ">}]%"


def _form(
    kind: str, words: str, pattern: str, plausible: Callable[[str], bool] = _random, *, fold: bool = False
) -> _Form:
    return _Form(kind, tuple(words.split()), re.compile(pattern, re.IGNORECASE if fold else 0), plausible)


_ALONE, _END = r"(?<![A-Za-z0-9_-])", r"(?![A-Za-z0-9_-])"
_FORMS = (
    _form("a Hugging Face token", "hf_", rf"{_ALONE}hf_(?P<secret>[A-Za-z0-9]{{34,40}}){_END}", _letters),
    _form(
        "an AWS access key",
        "AKIA ASIA",
        rf"{_ALONE}A[KS]IA(?P<secret>[A-Z2-7]{{16}}){_END}",
        lambda s: _random(s + "0"),
    ),
    _form(
        "an AWS secret key",
        "secret SECRET Secret",
        r"secret_?(?:access_?)?key\W{1,8}(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        _letters,
        fold=True,
    ),
    _form("a GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", rf"{_ALONE}gh[pousr]_(?P<secret>[A-Za-z0-9]{{36,255}}){_END}"),
    _form(
        "a GitHub token",
        "github_pat_",
        rf"{_ALONE}github_pat_(?P<secret>[A-Za-z0-9]{{20,24}}_[A-Za-z0-9]{{50,64}}){_END}",
    ),
    _form("a GitLab token", "glpat-", rf"{_ALONE}glpat-(?P<secret>[A-Za-z0-9_-]{{20,64}}){_END}"),
    _form("an API key (sk-)", "sk-", rf"{_ALONE}sk-(?P<secret>[A-Za-z0-9]{{32,64}}){_END}"),
    _form(
        "an API key (sk-)",
        "sk-",
        rf"{_ALONE}sk-(?:proj|svcacct|admin|ant|or)-(?P<secret>[A-Za-z0-9_-]{{32,256}}){_END}",
    ),
    _form("a Slack token", "xox", rf"{_ALONE}xox[abeoprs]-(?P<secret>[0-9A-Za-z-]{{20,256}}){_END}"),
    _form("a Google API key", "AIza", rf"{_ALONE}AIza(?P<secret>[A-Za-z0-9_-]{{35}}){_END}"),
    _form(
        "a private key",
        "PRIVATE",
        # In JSON the line's end is written as \n. The names of the form alone, as in a lesson on keys, are no key.
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"(?:\s|\\[nr]|[A-Za-z-]{1,40}: [^\n\\]{0,200}(?=\n|\\[nr]))*"
        r"(?P<secret>[A-Za-z0-9+/]{40})",
        _letters,
    ),
    _form(
        "an address with a password",
        "://",
        r"""://(?P<user>[^\s/:@"'`<>\\?#]{1,64}):(?!(?P=user)@)(?P<secret>[^\s/:@"'`<>\\?#]{3,128})@[A-Za-z0-9\[]""",
        _password,
    ),
)
