"""The files of the page at `/`: what a browser is told of them, and that they fit together. Needs no browser."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import Any

import httpx
import pytest

from xpert.experts.server import page_files
from xpert.registry.names import NAME_PATTERN

VOID = {"meta", "link", "input", "br", "img", "hr"}


def text_of(path: str) -> str:
    found = page_files.get(path)
    assert found is not None
    return found[0].decode()


def scripts() -> dict[str, str]:
    return {PurePosixPath(path).name: text_of(path) for path in page_files.PATHS if path.endswith(".js")}


class Read(HTMLParser):
    """The elements of the page; fails where a tag is closed that is not open, or never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), f"an attribute stands twice in {tag}"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))


@pytest.fixture(scope="module")
def page() -> Read:
    return Read(text_of("/"))


def test_every_file_has_a_path_and_no_other_path_a_file() -> None:
    named = {"index.html" if path == "/" else PurePosixPath(path).name for path in page_files.PATHS}
    assert named == {path.name for path in page_files.FOLDER.iterdir()}
    for path in ("", "/page", "/page/", "/page/index.html", "/page/../app.py", "/page/nothing.js", "/page.css"):
        assert page_files.get(path) is None


@pytest.mark.parametrize("path", page_files.PATHS)
def test_headers(path: str) -> None:
    found = page_files.get(path)
    assert found is not None
    content, headers = found
    assert content and headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
    kinds = {"": "text/html", ".css": "text/css", ".js": "text/javascript"}
    assert headers["content-type"] == f"{kinds[PurePosixPath(path).suffix]}; charset=utf-8"
    assert re.fullmatch(r'"[0-9a-f]{32}"', headers["etag"])


def test_the_policy_lets_nothing_in() -> None:
    rules = dict(rule.strip().partition(" ")[::2] for rule in page_files.POLICY.split(";"))
    assert "unsafe" not in page_files.POLICY and "*" not in page_files.POLICY and "http" not in page_files.POLICY
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'" and rules["trusted-types"] == "'none'"


def test_the_server_sends_them_and_a_browser_that_has_them_gets_none(served: Any) -> None:
    with httpx.Client(base_url=served.url) as client:
        for path in page_files.PATHS:
            answer = client.get(path)
            found = page_files.get(path)
            assert found is not None and answer.content == found[0] and found[1].items() <= dict(answer.headers).items()
            again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert again.status_code == 304 and again.content == b""
            assert client.get(path, headers={"if-none-match": '"older"'}).status_code == 200
        assert client.get("/page/nothing.js").status_code == 404
        described = client.get("/openapi.json").json()["paths"]
        assert "/" in described and "/page/page.js" not in described


def test_nothing_is_written_into_the_page_that_the_policy_refuses(page: Read) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("style", "iframe", "object", "base"), tag
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag != "script" or attributes.get("src")
    assert not [data for tag, data in page.texts if tag in ("script", "style")]


def test_nothing_comes_from_elsewhere(page: Read) -> None:
    for path in page_files.PATHS:
        addresses = re.findall(r"[a-z]+://[^\s\"'`]*|url\([^)]*\)|@import[^;]*", text_of(path))
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path  # a name, which is not fetched
    known = {*page_files.PATHS, "/registry/", "/registry/heat.html", "/openapi.json"}
    for tag, attributes in page.elements:
        for address in (attributes.get("src"), attributes.get("href")):
            if address and not address.startswith("#") and (tag, address) != ("link", "data:,"):
                # relative, so that the page may stand behind a proxy's prefix
                assert f"/{address}" in known, (tag, address)


def test_texts_cannot_become_markup() -> None:
    for name, script in scripts().items():
        found = re.findall(
            r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|setHTML\w*|document\.write|eval|Function|createContextualFragment|DOMParser)\b",
            script,
        )
        assert not found, (name, found)
        assert not re.search(r"setAttribute\([\"'](?:style|on)", script), name


def test_what_refers_is_there(page: Read) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in page.elements:
        for relation in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            for name in (attributes.get(relation) or "").split():
                assert name in ids, (tag, relation, name)
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in ids
    for file, script in scripts().items():
        asked = set(re.findall(r"\$\(\"([\w-]+)\"\)", script))
        for listed in re.findall(r"const id of \[([^\]]*)\]|const NUMBERS = \[([^\]]*)\]", script):
            asked |= set(re.findall(r"\"([\w-]+)\"", "".join(listed)))
        assert asked <= set(ids), (file, asked - set(ids))


def test_what_the_scripts_import_is_exported(page: Read) -> None:
    exported = {
        name: set(re.findall(r"^export (?:async )?(?:function\*?|const|let|class) ([\w$]+)", script, re.MULTILINE))
        for name, script in scripts().items()
    }
    for file, script in scripts().items():
        for names, source in re.findall(r"^import \{([^}]*)\} from \"\./([\w.]+)\"", script, re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= exported[source], (file, source)
        for alias, source in re.findall(r"^import \* as (\w+) from \"\./([\w.]+)\"", script, re.MULTILINE):
            used = set(re.findall(rf"(?<![\w./]){alias}\.(\w+)", script))
            assert used and used <= exported[source], (file, source, used - exported[source])
    loaded = {a["href"] for tag, a in page.elements if tag == "link" and a.get("rel") == "modulepreload"}
    assert loaded == {f"page/{name}" for name in exported} - {"page/page.js"}  # none is waited for twice


def test_experts_are_linked_where_the_registry_has_their_pages() -> None:
    pattern = NAME_PATTERN.pattern.replace("/", "\\/")
    assert f"/^{pattern}$/" in text_of("/page/experts.js")


def test_every_control_has_a_name(page: Read) -> None:
    text = text_of("/")
    wrapped = set(re.findall(r"<label[^>]*>(?:(?!</label>).)*?<(?:input|select|textarea) id=\"([\w-]+)\"", text))
    named = {attributes["for"] for tag, attributes in page.elements if tag == "label" and "for" in attributes}
    controls = {a["id"] for tag, a in page.elements if tag in ("input", "select", "textarea")}
    assert controls == wrapped | named


# ── contrast ─────────────────────────────────────────────────────────────────────────────────────────────────────


def palette(dark: bool) -> dict[str, str]:
    blocks = re.findall(r":root \{(.*?)\}", text_of("/page/page.css"), re.DOTALL)
    assert len(blocks) == 2
    found: dict[str, str] = {}
    for block in blocks[: 2 if dark else 1]:
        found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", block))
    return found


def luminance(colour: str) -> float:
    """Relative luminance. Source: WCAG 2.2."""
    digits = colour.lstrip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_rightly() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read_in_both_schemes(dark: bool) -> None:
    colour = palette(dark)
    texts = [
        *((ink, back) for ink in ("ink", "soft", "chosen", "bad") for back in ("paper", "ground")),
        *(("ink", back) for back in ("raised", "chosen-soft", "bad-soft")),
        *(("soft", "bad-soft"), ("bad", "bad-soft"), ("soft", "raised"), ("on-chosen", "chosen")),
        *(("on-deep" if step > 5 else "on-pale", f"s{step}") for step in range(9)),
    ]
    poor = {pair: contrast(colour[pair[0]], colour[pair[1]]) for pair in texts}
    assert {pair: ratio for pair, ratio in poor.items() if ratio < 4.5} == {}
    edges = {back: contrast(colour["edge"], colour[back]) for back in ("paper", "ground")}
    assert {back: ratio for back, ratio in edges.items() if ratio < 3} == {}  # borders of controls
