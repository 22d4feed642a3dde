"""The pages of the registry behind a mixture, as its server shows them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from xpert.experts.mixture import Mixture, assemble, open_expert
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.experts.server import registry_pages
from xpert.experts.server.app import create_app
from xpert.experts.server.registry_pages import RegistryPages
from xpert.registry.site import pages as site_pages
from xpert.registry.store import Registry

Make = Callable[..., Path]


@dataclass
class Served:
    """What the pages need of what is served: the mixture alone. The engine is never started."""

    mixture: Mixture
    number: int = 1
    tokenizer: object = None
    stop_ids: frozenset[int] = frozenset()
    published: list[object] = field(default_factory=list)

    @property
    def current(self) -> Served:
        return self

    @property
    def lm(self) -> Served:
        return self


@pytest.fixture
def store(make_expert: Make, tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    for seed, skill in enumerate(("casing", "arithmetic"), 1):
        registry.publish(make_expert(skill, seed=seed), f"me/{skill}")
    return registry


@pytest.fixture
def registered(store: Registry) -> Mixture:
    experts = [open_expert(name, store) for name in ("me/casing", "me/arithmetic")]
    return assemble(experts, router="centroid", name="pair", registry=str(store.folder))


@pytest.fixture
def client(registered: Mixture) -> Iterator[TestClient]:
    yield TestClient(create_app(Served(registered)), raise_server_exceptions=False)  # type: ignore[arg-type]


def test_every_page_is_served_and_no_other_path(client: TestClient) -> None:
    assert client.get("/registry", follow_redirects=False).headers["location"] == "registry/"
    index = client.get("/registry/")
    assert index.status_code == 200 and "me/casing" in index.text
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert index.headers["content-security-policy"].startswith("default-src 'none'")
    assert index.headers["x-content-type-options"] == "nosniff"
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for path in ("heat.html", "site.css", "site.js", "names/me/casing.html"):
        found = client.get(f"/registry/{path}")
        assert found.status_code == 200 and found.headers["content-type"].startswith(types[Path(path).suffix])
    assert 'href="registry/"' in client.get("/").text
    strange = ("nothing.html", "names/me/nobody.html", "../app.py", "..%2f..%2fapp.py", "%2fetc%2fpasswd", "pages.py")
    for path in strange:
        answer = client.get(f"/registry/{path}")
        assert answer.status_code == 404 and "error" in answer.json(), path
    assert client.post("/registry/index.html").status_code == 405


def test_what_is_published_later_is_shown(
    registered: Mixture, store: Registry, make_expert: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(registry_pages, "Site", lambda found: made.append(found) or site_pages.Site(found))
    pages = RegistryPages(registered)
    assert pages.get("names/me/casing.html") and pages.get("names/me/reversal.html") is None
    store.publish(make_expert("reversal", seed=3), "me/reversal")
    assert pages.get("names/me/reversal.html") is None  # it has just looked
    monkeypatch.setattr(registry_pages, "LOOK_AGAIN", -1.0)
    assert pages.get("names/me/reversal.html") is not None
    assert pages.get("") == pages.get("index.html") and len(made) == 2  # unchanged: nothing is made anew
    store.remove("me/reversal")
    assert pages.get("names/me/reversal.html") is None and len(made) == 3


def test_experts_in_folders_are_shown_with_the_mixture(make_expert: Make, store: Registry, tmp_path: Path) -> None:
    folder = make_expert("reversal", seed=3)
    experts = [open_expert(folder), open_expert("me/casing", store)]
    path = tmp_path / "mixture.json"
    write_mixture(path, assemble(experts, router="fixed", name="odd name", registry=str(store.folder)))
    pages = RegistryPages(load_mixture(path))
    own = next(p for p in _paths(pages) if p.startswith("names/_/reversal"))
    content = pages.get(own)
    assert content is not None and "adapter_model.safetensors" in content[0].decode()
    assert "registry pull" not in content[0].decode()  # what is in no registry cannot be pulled
    mixture = pages.get(next(p for p in _paths(pages) if p.startswith("names/_/odd-name")))
    assert mixture is not None
    text = mixture[0].decode()
    assert f'href="../../{own}#v1"' in text and 'href="../../names/me/casing.html#v1"' in text and "fixed" in text


def test_a_folder_that_changes_is_read_again(make_expert: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_expert("reversal", seed=3)
    pages = RegistryPages(assemble([open_expert(folder)], router="fixed", name="one"))
    monkeypatch.setattr(registry_pages, "LOOK_AGAIN", -1.0)
    (path,) = [p for p in _paths(pages) if p.startswith("names/_/reversal")]
    (folder / "notes.md").write_text("x")
    os.utime(folder / "notes.md", ns=(1, 1))
    content = pages.get(path)
    assert content is not None and "notes.md" in content[0].decode()


def test_a_registry_that_is_gone_is_told(registered: Mixture, store: Registry) -> None:
    store.folder.rename(store.folder.with_name("elsewhere"))
    answer = TestClient(create_app(Served(registered))).get("/registry/")  # type: ignore[arg-type]
    assert answer.status_code == 404 and "there is no registry" in answer.json()["error"]["message"]


def test_many_readers_make_one_site(registered: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(registry_pages, "Site", lambda found: made.append(found) or site_pages.Site(found))
    pages = RegistryPages(registered)
    found: list[object] = []
    readers = [threading.Thread(target=lambda: found.append(pages.get("heat.html"))) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(made) == 1 and len(found) == 8 and all(page == found[0] for page in found)


def _paths(pages: RegistryPages) -> list[str]:
    return pages._current().paths()
