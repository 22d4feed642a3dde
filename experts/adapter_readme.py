"""What a stranger's model card says of its adapter: licence, description, skills. Read as data, and little trusted.

The front matter is YAML between two lines of `---`; of what follows, the first paragraph of plain words counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.progress import SILENT, Progress

__all__ = ["AdapterReadme", "read_readme"]

_MOST_BYTES = 1 << 20
_MOST_HEAD = 64 << 10
_MOST_DESCRIPTION = 500
_HEAD = re.compile(r"---\s*\n(?P<head>.*?)\n---\s*(?:\n|$)", re.DOTALL)
_NOT_PROSE = re.compile(r"\s*(?:[#|>*\-!<\[`]|\d+\.|This repo(?:sitory)? contains|$)")
# The Hub's template of a model card, which peft puts beside every adapter, has sentences of its own.
_UNFILLED = re.compile(
    r"more information needed|provide a (?:quick|longer) summary|use the code below to get started with the model"
    r"|should be made aware of the risks, biases and limitations|carbon emissions can be estimated using the",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class AdapterReadme:
    """Empty where the card says nothing."""

    description: str = ""
    licence: str = ""
    skills: tuple[str, ...] = ()


def read_readme(path: Path | None, progress: Progress = SILENT) -> AdapterReadme:
    """Reads a model card of at most 1 MiB; what cannot be read is said and counts as unsaid, since no answer hangs
    on it."""
    if path is None:
        return AdapterReadme()
    with path.open("rb") as stream:
        data = stream.read(_MOST_BYTES + 1)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > _MOST_BYTES:
        progress.say(f"{path.name} is not read: it is no text of at most {_MOST_BYTES:,} bytes.")
        return AdapterReadme()
    match = _HEAD.match(text)
    head = _front_matter(match["head"], path.name, progress) if match else {}
    body = text[match.end() :] if match else text
    described = next((head[key] for key in ("description", "summary") if isinstance(head.get(key), str)), "")
    licence = head.get("license_name") if head.get("license") == "other" else head.get("license")
    return AdapterReadme(
        description=_one_line(described) or _first_paragraph(body),
        licence=_one_line(licence)[:100] if isinstance(licence, str) else "",
        skills=_texts(head.get("skills")),
    )


def _front_matter(text: str, name: str, progress: Progress) -> dict[str, Any]:
    import yaml

    try:
        # Aliases let a small text stand for a huge value, and no model card needs them.
        if len(text) > _MOST_HEAD or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("too long, or with aliases")
        head = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        progress.say(f"The front matter of {name} is not read: it is no plain YAML.")
        return {}
    return head if isinstance(head, dict) else {}


def _first_paragraph(body: str) -> str:
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", body):
        if not _NOT_PROSE.match(paragraph) and not _UNFILLED.search(paragraph):
            return _one_line(paragraph)
    return ""


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_DESCRIPTION else line[: _MOST_DESCRIPTION - 1].rstrip() + "…"


def _texts(value: Any) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(_one_line(item)[:100] for item in given[:50] if isinstance(item, str) and item.strip()))
