"""The pages as files: whole, linked, deterministic, and harmless whatever strangers wrote into a card."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.registry.card import Interval
from xpert.registry.names import NAME_PATTERN
from xpert.registry.site.data import Catalogue, ShownVersion, catalogue
from xpert.registry.site.matrix import likeness_order, skill_matrix
from xpert.registry.site.pages import Site, embed, page_path
from xpert.registry.site.wording import number, place, shown, verdict

Make = Callable[..., ShownVersion]

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onerror='alert(1)",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- <script>",
    "&lt;b&gt;&#x3c;",
    "\u202egnp.exe\u2066 \u200b\u2028\u0007\x00",
    "half a pair \ud800",
]
VOID = {"meta", "link", "input", "br", "hr", "img"}


def test_modules_named_in_full_are_told_by_their_kind(make_shown: Make) -> None:
    modules = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(30) for kind in "qv"]
    adapter = {"rank": 4, "target_modules": modules}
    page = Site(catalogue([make_shown("a/b", card={"adapter": adapter})])).render("names/a/b.html")
    assert page is not None and "LoRA, rank 4, on q_proj, v_proj<" in page.decode() and b"layers" not in page


class Page(HTMLParser):
    """What a page is made of: elements with attributes, ids, links, and its data; an unclosed element is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}

    @property
    def data(self) -> Any:
        return json.loads(next(filter(str.strip, self.scripts)))


def pages(found: Catalogue) -> dict[str, str]:
    site = Site(found)
    return {path: site.render(path).decode() for path in site.paths()}


def parsed(found: Catalogue) -> dict[str, Page]:
    return {path: Page(text) for path, text in pages(found).items() if path.endswith(".html")}


def test_every_link_resolves(sample: Catalogue) -> None:
    held = parsed(sample)
    links = 0
    for path, page in held.items():
        for _, attributes in page.elements:
            for target in (attributes.get("href"), attributes.get("src")):
                if not target or target == "data:,":
                    continue
                assert "//" not in target and ":" not in target.partition("#")[0], target
                file, _, place = target.partition("#")
                known = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(file))) if file else path
                assert known in Site(sample).paths(), f"{path}: {target}"
                if place and "=" not in place:
                    assert place in held[known].ids, f"{path}: {target}"
                links += 1
    assert links > 50


def test_the_pages_tell_what_the_cards_hold(sample: Catalogue) -> None:
    held = parsed(sample)
    dates = " ".join(held["names/acme/dates.html"].texts)
    for text in ("Version 2", "stable", "0.900", "0.850–0.950", "+70.0", "better, beyond both intervals", "a" * 64):
        assert text in dates
    assert "acme/both@1" in dates and "xpert registry pull acme/dates@2 -o dates" in dates
    assert "no clear difference" in dates  # sums: 0.25 beside 0.2
    both = " ".join(held["names/acme/both.html"].texts)
    assert "centroid" in both and "arrow" in both and "acme/sums@1" in both and "90" in both
    assert "Not profiled" in " ".join(held["names/north/new.html"].texts)
    rows = held["index.html"].data["rows"]
    assert [row[0] for row in rows] == ["acme/both", "acme/dates", "acme/sums", "north/new"]
    assert rows[1][4] == [1, 2] and rows[1][5] == ["stable@2"]
    heat = held["heat.html"].data["skills"]
    assert [column[0] for column in heat["columns"]] == ["dates", "sums"] and len(heat["rows"]) == 2
    assert heat["cells"][0][0] == [0, [0.9, 0.85, 0.95, 40], [0.2, 0.15, 0.25, 40]]
    assert [version[0] for version in held["compare.html"].data["versions"]] == [
        *("acme/dates@2", "acme/dates@1", "acme/sums@1", "north/new@1")
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_wrote_stays_text(make_shown: Make, make_mixed: Make, text: str) -> None:
    card = {
        "description": text,
        "skills": (text,),
        "licences": {text: 1},
        "selection": {"config": {"method": text, "budget": text}, "rows": text, "source": text},
        "training": {"options": {text: text}, "figures": {"rows": text, "first_loss": text, "final_loss": text}},
        "gates": {text: {}},
        "spent": {text: text},
        "adapter": {"rank": text, "target_modules": [text]},
        "created": text,
    }
    evil = make_shown(
        text, scores={text: 0.5, "y": 0.1}, description=text, suite=text, metric=text, base=text, card=card
    )
    other = make_shown(text, 2, scores={text: 0.7}, tags=(text,))
    found = catalogue([evil, other, make_mixed(f"{text}!", (evil.version.ref, f"{text}@9"), gate=text)], title=text)
    plain = parsed(catalogue([make_shown("a/b"), make_mixed("a/c", ("a/b@1",))]))
    assert plain  # the same templates without hostile text parse too
    for path, content in pages(found).items():
        if not path.endswith(".html"):
            continue
        page = Page(content)
        assert not re.search("[\u0000-\u0008\u200b\u2028\u202a-\u202e\u2066-\u2069]", content), path
        for tag, attributes in page.elements:
            assert tag not in ("img", "b", "iframe", "object"), path
            assert not [name for name in attributes if name.startswith("on") or name == "style"], path
            for name in ("href", "src", "action", "formaction"):
                assert not attributes.get(name, "").strip().lower().startswith(("javascript:", "//", "http")), path
        scripts = [attributes for tag, attributes in page.elements if tag == "script"]
        assert [s.get("type", "src") for s in scripts] in (["src"], ["src", "application/json"]), path
        assert "49" not in content or "{{" not in text


def test_nothing_is_loaded_from_elsewhere_or_run_inline(sample: Catalogue) -> None:
    for path, text in pages(sample).items():
        if path.endswith(".html"):
            assert "http:" not in text and "https:" not in text
            assert re.search(
                r"Content-Security-Policy\" content=\"default-src &#39;none&#39;; script-src &#39;self&#39;", text
            )
        elif path.endswith(".css"):
            assert "url(" not in text and "@import" not in text
        else:
            assert not re.search(
                r"\b(fetch|XMLHttpRequest|import|eval|Function|innerHTML|insertAdjacentHTML)\b\s*[(=]", text
            )


def test_a_megabyte_of_description_is_cut(make_shown: Make) -> None:
    found = catalogue([make_shown("a/b", scores={"s" * 100_000: 0.5}, description="word " * 200_000)])
    assert all(len(text) < 40_000 for text in pages(found).values())


def test_the_same_registry_gives_the_same_bytes(sample: Catalogue) -> None:
    assert pages(sample) == pages(sample)
    again = catalogue([v for name in reversed(sample.names) for v in name.versions], title=sample.title)
    assert pages(again) == pages(sample)


def test_only_the_sites_own_paths_are_rendered(sample: Catalogue) -> None:
    site = Site(sample)
    strange = ("", "..", "../pages.py", "assets/site.js", "names/acme/dates", "NAMES/acme/dates.html", "/index.html")
    assert [site.render(path) for path in strange] == [None] * len(strange)


@given(st.text(max_size=80))
def test_page_paths_stay_below_the_site(name: str) -> None:
    path = page_path(name)
    assert path == posixpath.normpath(path) and path.startswith("names/") and path.endswith(".html")
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", path)
    assert NAME_PATTERN.fullmatch(name) is None or path == f"names/{name}.html"


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_data_cannot_end_its_element(value: object) -> None:
    text = str(embed(value))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


@given(st.text())
def test_shown_texts_have_nothing_unseen(text: str) -> None:
    seen = shown(text, 20)
    assert len(seen) <= 21 and not re.search(
        "[\x00-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", seen
    )
    assert shown(seen, 25) == seen


INTERVALS = [
    ((0.8, 0.7, 0.9), (0.5, 0.4, 0.6), "better, beyond both intervals"),
    ((0.1, 0.0, 0.2), (0.5, 0.4, 0.6), "worse, beyond both intervals"),
    ((0.8, 0.55, 0.9), (0.5, 0.4, 0.6), "better, though the intervals overlap"),
    ((0.5, 0.4, 0.6), (0.8, 0.55, 0.9), "worse, though the intervals overlap"),
    ((0.55, 0.4, 0.6), (0.5, 0.4, 0.6), "no clear difference"),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "equal"),
]


@pytest.mark.parametrize(("one", "other", "words"), INTERVALS)
def test_verdicts(one: tuple[float, float, float], other: tuple[float, float, float], words: str) -> None:
    assert verdict(Interval(*one, 40), Interval(*other, 40)) == words


def test_numbers_and_places() -> None:
    assert [number(value) for value in (12345, 0.8734, 12345.6, None, True, ["a", 2])] == [
        *("12,345", "0.873", "12,346", "–", "yes", "a, 2")
    ]
    assert place("/data/secret/run/suite.jsonl") == "suite.jsonl" and place("C:\\x\\y") == "y"
    assert place("owner/name") == "owner/name"


def test_scores_of_other_suites_and_metrics_are_columns_of_their_own(make_shown: Make) -> None:
    found = catalogue(
        [
            make_shown("a/one", scores={"sums": 0.5}),
            make_shown("a/two", scores={"sums": 0.6}, suite="harder"),
            make_shown("a/three", scores={"sums": 0.7}, metric="f1"),
        ]
    )
    matrix = skill_matrix(found)
    assert matrix.columns == (("sums", "exact", "harder"), ("sums", "exact", "suite"), ("sums", "f1", "suite"))
    assert np.isfinite(matrix.scores()).sum() == 3


def test_like_experts_are_neighbours() -> None:
    kinds = np.eye(3)[[0, 1, 2] * 8]
    noisy = kinds + np.random.default_rng(0).normal(scale=0.05, size=kinds.shape)
    noisy[3, 0] = np.nan
    order = likeness_order(noisy)
    assert sorted(order) == list(range(24))
    assert sum(a % 3 != b % 3 for a, b in zip(order, order[1:], strict=False)) == 2


@pytest.mark.parametrize("found", [catalogue([]), None])
def test_empty_and_single(found: Catalogue | None, make_shown: Make) -> None:
    held = parsed(found or catalogue([make_shown("a/b")]))
    assert "No expert has a profile yet" in " ".join(held["heat.html"].texts)
    assert ("Nothing is published yet" in " ".join(held["index.html"].texts)) == (found is not None)
