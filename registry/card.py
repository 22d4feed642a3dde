"""The expert card (`expert.json`): what an expert is, where it came from, and what it is good at.

Plain JSON, versioned, readable by eye. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.storage import read_json, write_json

__all__ = ["CARD_FILE", "EXEMPLARS_FILE", "BaseModel", "ExpertCard", "Interval", "SkillProfile", "SkillScore"]

CARD_FILE = "expert.json"
EXEMPLARS_FILE = "exemplars.jsonl"
SCHEMA = 1


@dataclass(frozen=True)
class BaseModel:
    """The model an adapter belongs to: the reference the user gave, and the content hash of its weights."""

    ref: str
    fingerprint: str
    architecture: str = ""


@dataclass(frozen=True)
class Interval:
    """A mean over n items with its 95 % bootstrap interval."""

    score: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class SkillScore:
    """One skill of a profile. `choice` scores are accuracies by likelihood over choices, where items have choices:
    they compare skill with the answer format taken out."""

    metric: str
    expert: Interval
    base: Interval
    expert_choice: Interval | None = None
    base_choice: Interval | None = None


@dataclass(frozen=True)
class SkillProfile:
    """Scores per skill on one suite."""

    suite: str
    suite_fingerprint: str
    skills: Mapping[str, SkillScore]


@dataclass(frozen=True)
class ExpertCard:
    """`expert.json`.

    `selection` is what the training data was (method, budget, fingerprints of pool and shots), `training` the
    configuration and figures, `licences` count the rows seen under each licence, `files` map names to sha256. `gates`:
    for each token gate whose vectors are in the folder, of what and how they were made.
    """

    base: BaseModel
    adapter: Mapping[str, Any]
    name: str = ""
    description: str = ""
    skills: tuple[str, ...] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, int] = field(default_factory=dict)
    profile: SkillProfile | None = None
    gates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "expert", "schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, where: str) -> ExpertCard:
        """Raises Corrupt where a field is missing or of the wrong form, BadInput for a newer schema."""
        if not isinstance(value, Mapping) or value.get("kind") != "expert":
            raise Corrupt("not an expert card", where=where)
        if value.get("schema", 0) > SCHEMA:
            raise BadInput(f"written by a newer xpert (schema {value['schema']})", where=where, hint="upgrade xpert")
        fields = {f.name for f in dataclasses.fields(cls)}
        plain = {key: value[key] for key in fields & value.keys()}
        try:
            plain["base"] = BaseModel(**value["base"])
            plain["skills"] = tuple(value.get("skills", ()))
            if value.get("profile"):
                plain["profile"] = _profile(value["profile"])
            return cls(**plain)
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"the card is damaged: {error}", where=where) from None

    def write(self, folder: Path) -> None:
        write_json(folder / CARD_FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> ExpertCard:
        """The card of an expert folder."""
        path = folder / CARD_FILE
        if not folder.exists():
            raise NotFound("no such expert folder", where=str(folder), hint="check the path")
        if not path.is_file():
            raise NotFound(
                f"not an expert folder: it has no {CARD_FILE}", where=str(folder), hint="`xpert train` writes one"
            )
        return cls.from_dict(read_json(path), where=str(path))


def _profile(value: Mapping[str, Any]) -> SkillProfile:
    def interval(part: Mapping[str, Any] | None) -> Interval | None:
        return Interval(**part) if part else None

    skills = {}
    for skill, score in value["skills"].items():
        expert, base = interval(score["expert"]), interval(score["base"])
        if expert is None or base is None:
            raise KeyError(f"scores of {skill}")
        skills[skill] = SkillScore(
            metric=score["metric"],
            expert=expert,
            base=base,
            expert_choice=interval(score.get("expert_choice")),
            base_choice=interval(score.get("base_choice")),
        )
    return SkillProfile(value["suite"], value["suite_fingerprint"], skills)
