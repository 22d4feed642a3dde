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

__all__ = [
    "CARD_FILE",
    "EXEMPLARS_FILE",
    "SCHEMA",
    "BaseModel",
    "Consistency",
    "ExpertCard",
    "Interval",
    "Prototypes",
    "SkillProfile",
    "SkillScore",
]

_MOST_BYTES = 16 << 20
CARD_FILE = "expert.json"
EXEMPLARS_FILE = "exemplars.jsonl"
SCHEMA = 2
"""What `write` writes. Schema 1 had no consistency, clusters, keywords, prototypes and spent; it is read as it is."""


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
class Consistency:
    """How evenly an expert does on probes that ask for one thing in several ways; n counts clusters of such probes.

    `all_right`: the share of clusters whose every item is right. `agreement`: the mean over clusters of the chance that
    two of its items, drawn without replacement, are both right or both wrong.
    """

    all_right: Interval
    agreement: Interval


@dataclass(frozen=True)
class SkillScore:
    """One skill (or cluster, or keyword) of a profile. `choice` scores are accuracies by likelihood over choices, where
    items have choices: they compare skill with the answer format taken out."""

    metric: str
    expert: Interval
    base: Interval
    expert_choice: Interval | None = None
    base_choice: Interval | None = None
    consistency: Consistency | None = None
    base_consistency: Consistency | None = None


@dataclass(frozen=True)
class SkillProfile:
    """Scores on one suite: per declared skill, per cluster of the items, and per keyword of theirs.

    An item counts for each of its keywords. `how` says how clusters, keywords and related probes were found (the
    embedder's identity, the language model's fingerprint or `telling-terms`); `figures` what the scoring took
    (`items`, `seconds`, `tokens`, and `seconds_per_item` of the expert).
    """

    suite: str
    suite_fingerprint: str
    skills: Mapping[str, SkillScore]
    clusters: Mapping[str, SkillScore] = field(default_factory=dict)
    keywords: Mapping[str, SkillScore] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prototypes:
    """Centroids [len(labels), dimensions] float32, L2-normalised, of an expert's exemplars, in one embedder's space.

    They are the tensor `tensor` of `file` in the expert's folder; row i is of skill `labels[i]` ("" where none is
    stated) and stands for `counts[i]` exemplars. Only vectors of the same `embedder` (its identity) may be compared.
    """

    embedder: str
    dimensions: int
    file: str
    tensor: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ExpertCard:
    """`expert.json`.

    `selection` is what the training data was (method, budget, fingerprints of pool and shots), `training` the
    configuration and figures, `spent` the sums over all that was done to make it (`tokens`, `seconds`), `licences`
    count the rows seen under each licence, `files` map names to sha256. `gates`: for each token gate whose vectors are
    in the folder, of what and how they were made; `prototypes`: the same for routers that compare embeddings.
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
    prototypes: tuple[Prototypes, ...] = ()
    spent: Mapping[str, float] = field(default_factory=dict)
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
            plain["prototypes"] = tuple(
                Prototypes(**part | {"labels": tuple(part["labels"]), "counts": tuple(part["counts"])})
                for part in value.get("prototypes", ())
            )
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
            hint = "check the path, or take one out of a registry: `xpert registry pull OWNER/NAME -o DIR`"
            raise NotFound("no such expert folder", where=str(folder), hint=hint)
        if not path.is_file():
            raise NotFound(
                f"not an expert folder: it has no {CARD_FILE}", where=str(folder), hint="`xpert train` writes one"
            )
        return cls.from_dict(read_json(path, most=_MOST_BYTES), where=str(path))


def _profile(value: Mapping[str, Any]) -> SkillProfile:
    return SkillProfile(
        value["suite"],
        value["suite_fingerprint"],
        _scores(value["skills"]),
        _scores(value.get("clusters", {})),
        _scores(value.get("keywords", {})),
        value.get("how", {}),
        value.get("figures", {}),
    )


def _scores(value: Mapping[str, Any]) -> dict[str, SkillScore]:
    def interval(part: Mapping[str, Any] | None) -> Interval | None:
        return Interval(**part) if part else None

    def consistency(part: Mapping[str, Any] | None) -> Consistency | None:
        return Consistency(Interval(**part["all_right"]), Interval(**part["agreement"])) if part else None

    found = {}
    for name, score in value.items():
        expert, base = interval(score["expert"]), interval(score["base"])
        if expert is None or base is None:
            raise KeyError(f"scores of {name}")
        found[name] = SkillScore(
            metric=score["metric"],
            expert=expert,
            base=base,
            expert_choice=interval(score.get("expert_choice")),
            base_choice=interval(score.get("base_choice")),
            consistency=consistency(score.get("consistency")),
            base_consistency=consistency(score.get("base_consistency")),
        )
    return found
