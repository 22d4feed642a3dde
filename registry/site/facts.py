"""A card in words: its facts, its way from shots to scores, and the lines of its profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xpert.registry.card import SkillScore
from xpert.registry.site.data import ShownVersion
from xpert.registry.site.wording import number, place, shown, size

__all__ = ["MOST_LINES", "ProfileLine", "Step", "card_facts", "chain", "rows_of_profile", "training_facts"]

Fact = tuple[str, str]
MOST_LINES = 300
"""Lines of a table of scores that are shown; the card has them all."""


@dataclass(frozen=True)
class Step:
    """One link of the chain: what it is, its facts, and whether anything is known of it."""

    title: str
    facts: tuple[Fact, ...]
    absent: str = ""


@dataclass(frozen=True)
class ProfileLine:
    """A skill's scores, with where its marks stand on an axis from 0 to 1, in percent."""

    name: str
    score: SkillScore

    @staticmethod
    def at(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, value)):.2f}%"


def rows_of_profile(scores: Mapping[str, SkillScore], first: Sequence[str] = ()) -> list[ProfileLine]:
    """The lines of a table of scores: those named `first`, then by gain; at most 300, those with the most items."""
    kept = sorted(scores, key=lambda name: -scores[name].expert.n)[:MOST_LINES]
    place_of = {name: index for index, name in enumerate(first)}

    def order(name: str) -> tuple[int, float, str]:
        score = scores[name]
        return place_of.get(name, len(place_of)), score.base.score - score.expert.score, name

    return [ProfileLine(shown(name, 120), scores[name]) for name in sorted(kept, key=order)]


def card_facts(entry: ShownVersion, base_of: Callable[[ShownVersion], str]) -> list[Fact]:
    """What two experts are compared by and a version shows of its card; facts that are not stated are left out."""
    version, card = entry.version, entry.card
    if card is None:
        return []
    figures, adapter = _mapping(card.training, "figures"), card.adapter
    selection = _mapping(card.selection, "config")
    facts = {
        "base model": base_of(entry),
        "adapter": _adapter(adapter),
        "selected by": shown(selection.get("method", ""), 80),
        "budget": shown(selection.get("budget", ""), 80),
        "rows trained on": _told(figures.get("rows")),
        "tokens trained on": _told(figures.get("tokens")),
        "seconds of training": _told(figures.get("seconds")),
        "spent in all": _spent(card.spent),
        "licences of the rows": ", ".join(f"{shown(k, 60)} ({number(v)})" for k, v in list(card.licences.items())[:12]),
        "token gates": ", ".join(shown(gate, 40) for gate in list(card.gates)[:20]),
        "prototypes": ", ".join(f"{len(p.labels)} by {shown(p.embedder, 60)}" for p in card.prototypes[:5]),
        "size": size(version.size),
        "made": shown((card.created or version.created).replace("T", " ").removesuffix("Z"), 40),
    }
    return [(name, text) for name, text in facts.items() if text]


def chain(entry: ShownVersion) -> list[Step]:
    """From the shots to the scores; a step of which the card knows nothing says so."""
    card = entry.card
    if card is None:
        return []
    selection, config, inputs = card.selection, _mapping(card.selection, "config"), _mapping(card.selection, "inputs")
    figures, profile = _mapping(card.training, "figures"), card.profile
    shots = _facts(
        ("shots trained on", figures.get("shots")),
        ("held out", figures.get("held_out_shots")),
        ("hash", _short(inputs.get("shots"))),
    )
    chosen = _facts(
        ("method", config.get("method")),
        ("budget", config.get("budget")),
        ("rows", selection.get("rows")),
        ("pool", _short(inputs.get("pool") or selection.get("pool")) or selection.get("source")),
        ("seed", selection.get("seed")),
    )
    trained = _facts(
        ("rows", figures.get("rows")),
        ("tokens", figures.get("tokens")),
        ("seconds", figures.get("seconds")),
        ("loss", _arrow(figures.get("first_loss"), figures.get("final_loss"))),
        ("held-out loss", _arrow(figures.get("validation_loss_before"), figures.get("validation_loss"))),
        ("data", _short(selection.get("fingerprint"))),
    )
    if "experts" in card.training:
        trained = _facts(("merged of", [m.get("key") for m in card.training["experts"] if isinstance(m, Mapping)]))
    scored = (
        _facts(
            ("suite", profile.suite),
            ("skills", len(profile.skills)),
            ("items", sum(int(score.expert.n) for score in profile.skills.values())),
            ("hash", _short(profile.suite_fingerprint)),
        )
        if profile
        else ()
    )
    return [
        Step("Shots", shots, "the card names none"),
        Step("Selection", chosen, "the card does not say how the rows were chosen"),
        Step("Training", trained, "the card has no figures of it"),
        Step("Profile", scored, "not profiled yet: `xpert profile` scores it"),
    ]


def training_facts(entry: ShownVersion) -> list[Fact]:
    """The options it was trained with, and what with; of paths only the last part."""
    card = entry.card
    if card is None:
        return []
    facts = [
        (shown(name, 60).replace("_", "-"), number(value)) for name, value in _mapping(card.training, "options").items()
    ]
    plain = ("seed", "device", "dtype")
    facts += [(name, number(card.training[name])) for name in plain if name in card.training]
    facts += [(shown(name, 60), number(value)) for name, value in _mapping(card.training, "versions").items()]
    return facts[:200]


def _adapter(adapter: Mapping[str, Any]) -> str:
    kind = adapter.get("type") or "LoRA"
    rank, alpha = adapter.get("rank", adapter.get("r")), adapter.get("alpha", adapter.get("lora_alpha"))
    modules = adapter.get("target_modules")
    parts = [shown(kind, 30)]
    parts += [f"rank {number(rank)}"] if rank is not None else []
    parts += [f"alpha {number(alpha)}"] if alpha is not None else []
    if isinstance(modules, list | tuple):
        # Modules may be named in full, layer by layer: what kind they are is told by the last word.
        modules = list(dict.fromkeys(shown(module, 200).rpartition(".")[2] for module in modules))
    parts += [f"on {number(modules)}"] if modules else []
    return ", ".join(parts) if len(parts) > 1 else ""


def _spent(spent: Mapping[str, Any]) -> str:
    return ", ".join(f"{number(value)} {shown(name, 40)}" for name, value in list(spent.items())[:10])


def _facts(*pairs: tuple[str, Any]) -> tuple[Fact, ...]:
    return tuple((name, _told(value)) for name, value in pairs if value not in (None, "", [], {}))


def _told(value: Any) -> str:
    return "" if value is None else place(number(value), 300) if isinstance(value, str) else number(value)


def _arrow(before: Any, after: Any) -> str:
    return "" if before is None or after is None else f"{number(before)} → {number(after)}"


def _short(fingerprint: Any) -> str:
    return shown(fingerprint, 400)[:12] if fingerprint else ""


def _mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}
