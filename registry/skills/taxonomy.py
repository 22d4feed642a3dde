"""The taxonomy of skills: which skill is part of which, by what other names it goes, and what words tell it.

    taxonomy = Taxonomy.open()                       # $XPERT_TAXONOMY, or the built-in one
    taxonomy.find("translation_fr").name             # "french-translation"
    taxonomy.path("french-translation")              # ("language", "translation", "french-translation")
    taxonomy.expand("into French")                   # ("french-translation",)
    taxonomy.roll_up(profile.skills)["translation"]  # the mean of its scored children

A file is YAML or JSON: `kind: taxonomy`, `schema: 1`, and `skills`, a list of `name`, `parent` (or `parents`), `about`,
`aliases` and `words`. Spelling does not tell skills apart: case, `-`, `_`, plurals and -ise/-ize are folded, and where
no skill has the words in the order given, their order is.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from xpert.errors import BadInput, Corrupt, NotFound, nearest, unknown
from xpert.registry.skills.roll_up import RollUp, Scored, roll_up
from xpert.storage import hash_json

__all__ = ["Skill", "Taxonomy", "skill_words"]

SCHEMA = 1
BUILTIN = Path(__file__).with_name("taxonomy.yaml")
VARIABLE = "XPERT_TAXONOMY"
MAX_BYTES = 4 << 20
_NAME = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_FIELDS = {"name", "parent", "parents", "about", "aliases", "words"}


@dataclass(frozen=True)
class Skill:
    """One skill. `words` are words, or runs of them, that tell it in a request; several skills may share one."""

    name: str
    about: str = ""
    parents: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        lists = {"parents": list(self.parents), "aliases": list(self.aliases), "words": list(self.words)}
        return {"name": self.name, "about": self.about, **lists}


@dataclass(frozen=True)
class Taxonomy:
    """Skills by name, in the file's order. Made by `read`, `builtin` or `of`, which check it."""

    skills: Mapping[str, Skill]
    source: str = field(default="", compare=False)

    # ── making ───────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def open(cls, path: str | Path | None = None) -> Self:
        """That of `path`, else of `$XPERT_TAXONOMY`, else the built-in one."""
        chosen = path or os.environ.get(VARIABLE)
        return cls.read(chosen) if chosen else cls.builtin()

    @classmethod
    def builtin(cls) -> Self:
        """About a hundred skills of instruction data."""
        return cls(cls.read(BUILTIN).skills, "the built-in taxonomy")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises NotFound where there is no such file, BadInput where it is no sound taxonomy."""
        where = str(path)
        value = _load(Path(path))
        if not isinstance(value, Mapping) or value.get("kind") != "taxonomy":
            raise BadInput("not a taxonomy", where=where, hint="it begins with `kind: taxonomy` and `schema: 1`")
        if value.get("schema") != SCHEMA:
            raise BadInput(f"its schema is {value.get('schema')!r}; this xpert reads {SCHEMA}", where=where)
        entries = value.get("skills")
        if not isinstance(entries, list) or not entries:
            raise BadInput("it has no skills", where=where, hint="write `skills:` and a list of `name: ...`")
        return cls.of((_skill(entry, number, where) for number, entry in enumerate(entries, 1)), where=where)

    @classmethod
    def of(cls, skills: Iterable[Skill], *, where: str = "the taxonomy") -> Self:
        """Raises BadInput for a name said twice, an alias of two skills, an unknown parent, a skill above itself."""
        named: dict[str, Skill] = {}
        for skill in skills:
            if skill.name in named:
                raise BadInput(f"the skill {skill.name} stands twice", where=where, hint="delete or rename one")
            named[skill.name] = skill
        made = cls(named, where)
        for skill in named.values():
            for parent in skill.parents:
                if parent not in named:
                    raise unknown(f"parent of {skill.name}", parent, named, where=where)
        made._check_aliases(where)
        made._check_cycles(where)
        return made

    def _check_aliases(self, where: str) -> None:
        owner: dict[tuple[str, ...], str] = {}
        for skill in self.skills.values():
            for name in (skill.name, *skill.aliases):
                key = skill_words(name)
                if not key:
                    raise BadInput(f"{skill.name} has an alias without a word: {name!r}", where=where)
                other = owner.setdefault(key, skill.name)
                if other != skill.name:
                    raise BadInput(f"{name!r} names both {other} and {skill.name}", where=where, hint="take one away")

    def _check_cycles(self, where: str) -> None:
        """Kahn's order: what is left when no skill has all its parents done lies on a cycle or below one."""
        left = dict(self.skills)
        while left:
            ready = [name for name, skill in left.items() if not any(parent in left for parent in skill.parents)]
            if not ready:
                chain = [min(left)]  # going up from any of them meets the cycle
                while (parent := next(p for p in left[chain[-1]].parents if p in left)) not in chain:
                    chain.append(parent)
                loop = [*chain[chain.index(parent) :], parent]
                raise BadInput(f"skills stand above themselves: {' < '.join(loop)}", where=where, hint="break the ring")
            for name in ready:
                del left[name]

    # ── the tree ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def fingerprint(self) -> str:
        """Hash of all that it says, whatever the order of its skills."""
        return hash_json(sorted((skill.to_dict() for skill in self.skills.values()), key=lambda entry: entry["name"]))

    def __len__(self) -> int:
        return len(self.skills)

    def __iter__(self) -> Iterator[Skill]:
        return iter(self.skills.values())

    def __getitem__(self, name: str) -> Skill:
        """The skill of exactly this name. Raises NotFound with the nearest one."""
        if name not in self.skills:
            raise unknown("skill", name, self.skills)
        return self.skills[name]

    @cached_property
    def _children(self) -> dict[str, tuple[str, ...]]:
        below: dict[str, list[str]] = {name: [] for name in self.skills}
        for skill in self.skills.values():
            for parent in skill.parents:
                below[parent].append(skill.name)
        return {name: tuple(names) for name, names in below.items()}

    @property
    def roots(self) -> tuple[str, ...]:
        return tuple(skill.name for skill in self.skills.values() if not skill.parents)

    def parents(self, name: str) -> tuple[str, ...]:
        return self[name].parents

    def children(self, name: str) -> tuple[str, ...]:
        return self._children[self[name].name]

    def descendants(self, name: str) -> tuple[str, ...]:
        """All skills below one, each once, a skill before those below it and without the skill itself."""
        return _reached(self.children, self[name].name)

    def ancestors(self, name: str) -> tuple[str, ...]:
        """All skills above one, the nearest first."""
        return _reached(self.parents, self[name].name)

    def path(self, name: str) -> tuple[str, ...]:
        """From a root down to the skill, by its first parents."""
        chain = [self[name].name]
        while parents := self.parents(chain[0]):
            chain.insert(0, parents[0])
        return tuple(chain)

    # ── finding ──────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _named(self) -> dict[tuple[str, ...], str]:
        return {skill_words(name): skill.name for skill in self for name in (skill.name, *skill.aliases)}

    @cached_property
    def _unordered(self) -> dict[frozenset[str], str | None]:
        """The skill by its words in any order; None where two skills have the same."""
        found: dict[frozenset[str], str | None] = {}
        for key, name in self._named.items():
            words = frozenset(key)
            found[words] = name if found.get(words, name) == name else None
        return found

    def find(self, name: str) -> Skill | None:
        """The skill of this name or alias, however spelt; None where there is none."""
        if name in self.skills:
            return self.skills[name]
        key = skill_words(name)
        found = self._named.get(key) or self._unordered.get(frozenset(key))
        return self.skills[found] if found else None

    def lookup(self, name: str) -> Skill:
        """`find`, but raises NotFound with the skill that the words mean, or else the nearest name."""
        found = self.find(name)
        if found is None:
            meant = next(iter(self.expand(name)), None) or nearest(name, self.skills)
            hint = f"did you mean {meant!r}?" if meant else "`xpert registry skills` shows them all"
            raise NotFound(f"unknown skill {name!r}", where=self.source or None, hint=hint)
        return found

    @cached_property
    def _telling(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        told: dict[tuple[str, ...], list[str]] = {}
        for skill in self:
            for key in dict.fromkeys(map(skill_words, skill.words)):
                told.setdefault(key, []).append(skill.name)
        return {key: tuple(names) for key, names in told.items() if key}

    def expand(self, query: str | Sequence[str]) -> tuple[str, ...]:
        """The skills that a request's words mean, best first, each followed by those below it.

        Names and aliases that stand in the query count first, the longest ones, and each word once; a skill gives way
        to one below it that the query names or tells as well ("translate into French"). Where no name stands there, the
        skills whose telling words do: a word of k skills counts 1/k for each, and skills with at least half the best
        count are kept. Empty where nothing fits. Time O(words).
        """
        words = skill_words(query if isinstance(query, str) else " ".join(query))
        whole = self.find(" ".join(words))
        found = [whole.name] if whole else self._meant_by(words)
        return tuple(dict.fromkeys(name for skill in found for name in (skill, *self.descendants(skill))))

    def _meant_by(self, words: Sequence[str]) -> list[str]:
        named, told = self._named_in(words), self._told_by(words)
        under_named = [name for name in told if set(self.ancestors(name)) & set(named)]
        meant = [*named, *under_named] if named else told
        return [name for name in meant if not set(self.descendants(name)) & set(meant)]

    def _named_in(self, words: Sequence[str]) -> list[str]:
        """The skills of the longest runs of words that name one; no word serves twice."""
        found: dict[str, None] = {}
        free = [True] * len(words)
        for size in range(min(len(words), max(map(len, self._named), default=0)), 0, -1):
            for start in range(len(words) - size + 1):
                run = slice(start, start + size)
                skill = self.find(" ".join(words[run])) if all(free[run]) else None
                if skill is not None:
                    free[run] = [False] * size
                    found[skill.name] = None
        return list(found)

    def _told_by(self, words: Sequence[str]) -> list[str]:
        counts: dict[str, float] = {}
        sizes = range(1, max(map(len, self._telling), default=0) + 1)  # no run of more words tells anything
        for run in {tuple(words[a : a + size]) for size in sizes for a in range(len(words) - size + 1)}:
            holders = self._telling.get(run, ())
            for name in holders:
                counts[name] = counts.get(name, 0.0) + len(run) / len(holders)
        best = max(counts.values(), default=0.0)
        order = list(self.skills)
        kept = [name for name in order if counts.get(name, 0.0) >= best / 2 > 0]
        return sorted(kept, key=lambda name: -counts[name])

    # ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────

    def roll_up(self, scores: Mapping[str, Scored]) -> dict[str, RollUp]:
        """For every skill that is not scored but stands above scored ones: their mean (see `roll_up.py`).

        `scores` go by any name that `find` knows; other names stand nowhere in the tree and count for no parent.
        """
        known: dict[str, Scored] = {}
        also: dict[str, list[str]] = {}  # a skill may be scored under several of its names, each with items of its own
        for name in sorted(scores, key=lambda name: name not in self.skills):
            skill = self.find(name)
            if skill is not None and skill.name in known:
                also.setdefault(skill.name, []).append(name)
            elif skill is not None:
                known[skill.name] = scores[name]
        above = dict.fromkeys(parent for name in known for parent in self.ancestors(name) if parent not in known)
        known |= {name: scores[name] for names in also.values() for name in names}

        def below(name: str) -> list[str]:
            return [held for child in self.children(name) for held in (child, *also.get(child, ()))]

        return {name: roll_up(name, known, below) for name in self.skills if name in above}


def skill_words(name: str) -> tuple[str, ...]:
    """The words of a name as they are compared: small letters, no plural s, -ise as -ize."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return tuple(_folded(word) for word in re.findall(r"[^\W_]+", folded))


def _folded(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and word[-2] not in "sui":
        word = word[:-1]
    return re.sub(r"is(ation|ing|e|ed|er)$", r"iz\1", word) if len(word) > 6 else word


def _reached(step: Any, start: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    ahead = list(step(start))
    while ahead:
        name = ahead.pop(0)
        if name not in found:
            found[name] = None
            ahead = [*ahead, *step(name)]
    return tuple(found)


def _load(path: Path) -> Any:
    import yaml

    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"larger than {MAX_BYTES >> 20} MiB, which no taxonomy is", where=str(path))
        # JSON is YAML; the C parser, where it is there, is ten times as fast.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # a safe loader: plain values only
    except FileNotFoundError:
        raise NotFound("no such taxonomy", where=str(path), hint=f"check --taxonomy and ${VARIABLE}") from None
    except IsADirectoryError:
        raise BadInput("a folder, not a taxonomy file", where=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise Corrupt(f"neither YAML nor JSON: {reason}", where=str(path)) from None


def _skill(entry: Any, number: int, where: str) -> Skill:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise BadInput(f"skill {number} has no name", where=where, hint="write `- name: ...`")
    name = entry["name"]
    if _NAME.fullmatch(name) is None:
        raise BadInput(f"{name!r} is no name of a skill", where=where, hint="write words joined by `-`")
    for key in entry:
        if key not in _FIELDS:
            raise unknown(f"field of {name}", str(key), _FIELDS, where=where)
    about = entry.get("about") or ""
    if not isinstance(about, str):
        raise BadInput(f"about of {name} is no text", where=where)
    lists = {key: _texts(entry, key, name, where) for key in ("parents", "aliases", "words")}
    parents = dict.fromkeys((*_texts(entry, "parent", name, where), *lists.pop("parents")))
    return Skill(name, about, tuple(parents), **lists)


def _texts(entry: Mapping[Any, Any], key: str, name: str, where: str) -> tuple[str, ...]:
    value = entry.get(key)
    if value is None:
        return ()
    items = value if isinstance(value, list) and key != "parent" else [value]
    if not all(isinstance(item, str) and item.strip() for item in items):
        hint = f"write `{key}: name`" if key == "parent" else f'write `{key}: ["...", "..."]`'
        raise BadInput(f"{key} of {name} are not texts", where=where, hint=hint)
    return tuple(items)
