"""The pages of a catalogue, each made when it is asked for: a folder holds them all, a server shows one by one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from xpert.registry.names import NAME_PATTERN
from xpert.registry.site import wording
from xpert.registry.site.data import Catalogue, ShownName, ShownVersion
from xpert.registry.site.facts import card_facts, chain, rows_of_profile, training_facts
from xpert.registry.site.matrix import GROUPS, MOST_LIKENED, Matrix, likeness_order, member_grid, skill_matrix

__all__ = ["MEDIA_TYPES", "POLICY", "Site", "page_path"]

HERE = Path(__file__).parent
ASSETS = ("site.css", "site.js")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
"""What the pages' browser may load and run: the one script and style of the site. JSON blocks do not run."""
MOST_LINKS = 1_000
"""Names that the list shows where scripts do not run."""


def page_path(name: str) -> str:
    """Where a name's page lies. Keys of experts in folders need not be OWNER/NAME: their hash keeps them apart."""
    if NAME_PATTERN.fullmatch(name):
        return f"names/{name}.html"
    plain = re.sub(r"[^A-Za-z0-9-]+", "-", name)[:40].strip("-")
    return f"names/_/{plain}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}.html"


class Site:
    """All pages of one catalogue. `render` is pure: the same catalogue gives the same bytes."""

    def __init__(self, found: Catalogue) -> None:
        self.catalogue = dataclasses.replace(found, title=wording.shown(found.title, 200))
        self._names = {page_path(name.name): name for name in found.names}
        self._fixed: dict[str, Callable[[], str]] = {
            "index.html": self._index,
            "heat.html": self._heat,
            "compare.html": self._compare,
            "mixtures.html": self._mixtures,
        }

    def paths(self) -> list[str]:
        """Every file of the site, by its path with `/` between parts."""
        return [*self._fixed, *ASSETS, *self._names]

    def render(self, path: str) -> bytes | None:
        """The content of one file; None for a path that is none of `paths()`."""
        if path in ASSETS:
            return (HERE / "assets" / path).read_bytes()
        if path in self._fixed:
            return self._fixed[path]().encode("utf-8", "replace")
        if path in self._names:
            return self._name(self._names[path], path).encode("utf-8", "replace")
        return None

    # ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _index(self) -> str:
        names = self.catalogue.names
        return self._page(
            "index.html.jinja",
            title=self.catalogue.title,
            page="index",
            data=index_data(names),
            links=[(name.name, page_path(name.name)) for name in names[:MOST_LINKS]],
            left_out=max(0, len(names) - MOST_LINKS),
            experts=sum(name.kind == "expert" for name in names),
            mixtures=sum(name.kind == "mixture" for name in names),
        )

    def _heat(self) -> str:
        tables = {group: self._latest(group) for group in GROUPS}
        data = {group: _heat_data(matrix) for group, matrix in tables.items() if matrix.versions}
        rows = len(tables["skills"].versions)
        return self._page(
            "heat.html.jinja",
            title=f"Heat map · {self.catalogue.title}",
            page="heat",
            data=data,
            rows=rows,
            columns=len(tables["skills"].columns),
            unprofiled=sum(name.kind == "expert" for name in self.catalogue.names) - rows,
        )

    def _compare(self) -> str:
        matrix = skill_matrix(self.catalogue, every=True)
        plain = matrix.to_plain()
        cells = dict(zip((v.version.ref for v in matrix.versions), plain["cells"], strict=True))
        versions = [
            [
                *(wording.shown(v.version.ref, 150), "latest" if v is name.latest else "", page_path(name.name)),
                [[label, text] for label, text in card_facts(v, self._base)],
                cells.get(v.version.ref, []),
            ]
            for name in self.catalogue.names
            for v in name.versions
            if v.card is not None
        ]
        data = {"columns": matrix.to_plain()["columns"], "versions": versions}
        return self._page(
            "compare.html.jinja",
            title=f"Compare · {self.catalogue.title}",
            page="compare",
            data=data,
            count=len(versions),
        )

    def _mixtures(self) -> str:
        mixtures = [name for name in self.catalogue.names if name.kind == "mixture"]
        return self._page(
            "mixtures.html.jinja", title=f"Mixtures · {self.catalogue.title}", page="mixtures", mixtures=mixtures
        )

    def _name(self, name: ShownName, path: str) -> str:
        return self._page(
            "name.html.jinja",
            title=f"{wording.shown(name.name, 140)} · {self.catalogue.title}",
            page="name",
            root="../" * path.count("/"),
            name=name,
            history=history(name),
        )

    # ── what they share ──────────────────────────────────────────────────────────────────────────────────────────

    def _latest(self, group: str) -> Matrix:
        return skill_matrix(self.catalogue, group=group)

    def _base(self, entry: ShownVersion) -> str:
        """The base's name; with the beginning of its fingerprint where another model bears the same name."""
        name, fingerprint = wording.place(entry.version.base, 80), entry.version.base_fingerprint
        return name if len(self._bases.get(name, ())) < 2 else f"{name} ({fingerprint[:8]})"

    @cached_property
    def _bases(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in self.catalogue.names:
            for entry in name.versions:
                found.setdefault(wording.place(entry.version.base, 80), set()).add(entry.version.base_fingerprint)
        return found

    @cached_property
    def _known(self) -> dict[str, str]:
        """ref -> the page it is on, with the place on it."""
        return {
            v.version.ref: f"{page_path(name.name)}#v{v.version.version}"
            for name in self.catalogue.names
            for v in name.versions
        }

    @cached_property
    def _versions(self) -> dict[str, ShownVersion]:
        return {v.version.ref: v for name in self.catalogue.names for v in name.versions}

    @cached_property
    def _environment(self) -> Any:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "shown": wording.shown,
            "place": wording.place,
            "number": wording.number,
            "size": wording.size,
            "date": wording.date,
            "quoted": lambda text: json.dumps(text, ensure_ascii=False),
        }
        told = (card_facts, chain, training_facts, rows_of_profile, page_path, embed, wording.verdict, wording.gain)
        environment.globals |= {function.__name__: function for function in told}
        environment.globals["member_grid"] = lambda mixture: member_grid(mixture, self._versions)
        return environment

    def _page(self, template: str, *, root: str = "", **context: Any) -> str:
        text: str = self._environment.get_template(template).render(
            root=root, policy=POLICY, catalogue=self.catalogue, base_of=self._base, known=self._known, **context
        )
        return wording.seen(text)


def embed(value: Any) -> Any:
    """JSON that may stand inside `<script type="application/json">`: no character of it can end that element."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def index_data(names: Iterable[ShownName]) -> dict[str, Any]:
    """The list: one row a name, with skills, bases and kinds as numbers of their lists.

    rows: [name, path, kind, base, versions, other tags, [skills], [[skill, score, gain]] best first, bytes, date,
    description].
    """
    lists: dict[str, dict[str, int]] = {"skills": {}, "bases": {}, "kinds": {}}

    def at(which: str, text: str) -> int:
        return lists[which].setdefault(text, len(lists[which]))

    rows = []
    for name in names:
        latest, profile = name.latest, name.latest.profile
        version = latest.version
        scores = [
            [at("skills", wording.shown(skill, 80)), round(s.expert.score, 3), round(s.expert.score - s.base.score, 3)]
            for skill, s in (profile.skills.items() if profile else ())
        ]
        tags = sorted({f"{tag}@{v.version.version}" for v in name.versions for tag in v.tags if tag != "latest"})
        rows.append(
            [
                *(wording.shown(name.name, 140), page_path(name.name), at("kinds", version.kind)),
                at("bases", wording.place(version.base, 80)),
                *([v.version.version for v in reversed(name.versions)], [wording.shown(tag, 80) for tag in tags]),
                [at("skills", wording.shown(skill, 80)) for skill in version.skills[:50]],
                sorted(scores, key=lambda score: (-score[1], score[0]))[:50],
                *(version.size, wording.date(version.created), wording.shown(version.description, 160)),
            ]
        )
    return {"rows": rows, **{which: list(texts) for which, texts in lists.items()}}


def history(name: ShownName) -> list[tuple[str, list[Any]]]:
    """(skill, its score in every version from the oldest, or None), where two versions or more have profiles."""
    versions = list(reversed(name.versions))
    if sum(version.profile is not None for version in versions) < 2:
        return []
    skills = sorted({skill for v in versions if v.profile for skill in v.profile.skills})[:100]
    return [(skill, [v.profile.skills.get(skill) if v.profile else None for v in versions]) for skill in skills]


def _heat_data(matrix: Matrix) -> dict[str, Any]:
    values = matrix.scores()
    plain: dict[str, Any] = matrix.to_plain()
    plain["rows"] = [
        [
            *(wording.shown(v.version.name, 140), v.version.version, page_path(v.version.name)),
            wording.place(v.version.base, 80),
        ]
        for v in matrix.versions
    ]
    if len(matrix.versions) <= MOST_LIKENED:
        plain["like"] = likeness_order(values)
    if len(matrix.columns) <= MOST_LIKENED:
        plain["like_columns"] = likeness_order(values.T)
    return plain
