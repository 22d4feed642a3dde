"""Documents: the small JSON files that say what is published. Each proves itself by a checksum over its content.

OWNER/NAME@3.json             the record of version 3
OWNER/NAME@2.removed.json     the mark that version 2 was removed
OWNER/NAME@stable.tag.json    where the tag `stable` points
OWNER/NAME@3.signatures.json  who vouches for version 3
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xpert.errors import BadInput, Corrupt
from xpert.registry.names import NAME_PATTERN, TAG_PATTERN, check_name
from xpert.registry.strict_json import parse_json
from xpert.storage import hash_json

__all__ = [
    "MOST_BYTES",
    "MOST_NUMBER",
    "SCHEMA",
    "DocumentName",
    "Tag",
    "document_bytes",
    "parse_document",
    "read_checked",
    "removal",
]

SCHEMA = 2
MOST_NUMBER = 1 << 53
"""No number in a document is larger: above it JSON's readers disagree, and an index holds none above 2^63."""
MOST_BYTES = 4 << 20
"""No document is larger; a record of a thousand files with all their parts is far below."""

_NAME = re.compile(
    r"(?P<name>[^@]+)@(?:(?P<version>[1-9][0-9]{0,8})(?P<kind>\.removed|\.signatures)?|(?P<tag>[^@]+)\.tag)\.json"
)


@dataclass(frozen=True, slots=True)
class DocumentName:
    """What a document's name says: of what name, version (or tag), and of which kind it is."""

    name: str
    kind: str  # record, removed, signatures, tag
    version: int | None = None
    tag: str | None = None

    def __str__(self) -> str:
        if self.kind == "tag":
            return f"{self.name}@{self.tag}.tag.json"
        return f"{self.name}@{self.version}{'' if self.kind == 'record' else '.' + self.kind}.json"

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]


def parse_document(text: str) -> DocumentName:
    """Raises BadInput for anything that is not the name of a document."""
    match = _NAME.fullmatch(text)
    if match is None or NAME_PATTERN.fullmatch(match["name"]) is None:
        raise BadInput(f"{text!r} is not the name of a document of a registry")
    if match["tag"] is not None:
        if TAG_PATTERN.fullmatch(match["tag"]) is None:
            raise BadInput(f"{text!r} is not the name of a document of a registry")
        return DocumentName(match["name"], "tag", tag=match["tag"])
    return DocumentName(match["name"], (match["kind"] or ".record")[1:], int(match["version"]))


@dataclass(frozen=True)
class Tag:
    """A name that moves: `version` is where it points, None where it points nowhere any more.

    `revision` counts its moves. `through` is the newest version there was when it was moved: `latest` follows newer
    ones by itself.
    """

    name: str
    tag: str
    version: int | None
    through: int
    revision: int
    moved: str

    @property
    def document(self) -> DocumentName:
        return DocumentName(self.name, "tag", tag=self.tag)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": "tag", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, where: str) -> Tag:
        """Raises Corrupt where a field is missing or of the wrong form."""
        try:
            found = cls(**{field.name: value[field.name] for field in dataclasses.fields(cls)})
            check_name(found.name)
            numbers = (found.through, found.revision, *(() if found.version is None else (found.version,)))
            if value["kind"] != "tag" or TAG_PATTERN.fullmatch(found.tag) is None or not isinstance(found.moved, str):
                raise ValueError("it is not a tag")
            if not all(type(number) is int and 0 <= number <= MOST_NUMBER for number in numbers):
                raise ValueError("its numbers are not counts")
        except (KeyError, TypeError, ValueError, BadInput) as error:
            raise Corrupt(f"the tag is damaged: {error}", where=where) from None
        return found


def removal(name: str, version: int) -> dict[str, Any]:
    """The content of the mark that a version was removed."""
    return {"schema": SCHEMA, "kind": "removed", "name": name, "version": version}


def document_bytes(value: Mapping[str, Any]) -> bytes:
    """A document as it is written: indented JSON with sorted keys and a checksum over all the rest."""
    plain = {key: item for key, item in value.items() if key != "checksum"}
    text = json.dumps(
        plain | {"checksum": hash_json(plain)}, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False
    )
    return (text + "\n").encode()


def read_checked(data: bytes, *, where: str) -> dict[str, Any]:
    """A document's content, its checksum verified; raises Corrupt for damage, BadInput for a newer schema."""
    if len(data) > MOST_BYTES:
        raise Corrupt(f"{len(data):,} bytes; no document has more than {MOST_BYTES:,}", where=where)
    value = parse_json(data, where=where)
    if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
        raise Corrupt("not a document of a registry", where=where)
    # Every schema, also one to come, has its checksum over the rest: damage to the number is told from a newer number.
    if value.get("checksum") != hash_json({key: item for key, item in value.items() if key != "checksum"}):
        raise Corrupt("damaged: the document does not match its checksum", where=where)
    if value["schema"] > SCHEMA:
        raise BadInput(f"written by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
    return value
