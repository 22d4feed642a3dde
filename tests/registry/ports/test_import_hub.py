"""Adapters of the Hugging Face Hub: what is asked for, what is downloaded, and what an unreachable Hub leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import Result
from huggingface_hub import errors as hub_errors

from tests.registry.places.hub_server import Fault, HubServer
from tests.registry.ports.test_import import CONFIG, WEIGHTS, hub_cache
from xpert.errors import BadInput, NotFound, Unavailable, XpertError
from xpert.experts.adapter_sources import find_adapter
from xpert.experts.importing import import_adapter
from xpert.registry.store import Registry

SHA = "5" * 40


class Hub:
    """A stand-in for the client's two calls; `files` are the repository's, by path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, int] = {}
        self.asked: list[Any] = []
        self.error: Exception | None = None

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool) -> Any:
        self.asked.append(("model_info", name, revision))
        if self.error is not None:
            raise self.error
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        found = [SimpleNamespace(rfilename=n, size=self.sizes.get(n, p.stat().st_size)) for n, p in files.items()]
        return SimpleNamespace(sha=SHA, siblings=found)

    def snapshot_download(self, name: str, **given: Any) -> str:
        self.asked.append(("snapshot_download", name, given))
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, make_adapter: Callable[..., Path], tmp_path: Path) -> Hub:
    folder = tmp_path / "repository"
    shutil.copytree(make_adapter(seed=8), folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nSays dates.\n")
    (folder / "optimizer.pt").write_bytes(b"x")
    made = Hub(folder)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda endpoint: made)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_an_adapter_of_the_hub(hub: Hub, registry: Registry) -> None:
    made = import_adapter("hf:them/dates@v2", "me/dates", registry)
    assert hub.asked[0] == ("model_info", "them/dates", "v2")
    # Three files by name, of the very commit that was looked at: nothing else can come.
    assert hub.asked[1][:2] == ("snapshot_download", "them/dates")
    assert hub.asked[1][2]["revision"] == SHA
    assert hub.asked[1][2]["allow_patterns"] == [CONFIG, WEIGHTS, "README.md"]
    origin = made.card.training["imported"]
    assert (origin["source"], origin["revision"], origin["sha"]) == ("hf:them/dates", "v2", SHA)
    assert origin["licence"] == "mit"
    assert made.left_out == ("optimizer.pt",)


def test_an_adapter_in_a_folder_of_a_repository(hub: Hub, registry: Registry) -> None:
    (hub.folder / "deep").mkdir()
    for name in (CONFIG, WEIGHTS):
        (hub.folder / name).rename(hub.folder / "deep" / name)
    with pytest.raises(BadInput, match="its adapters lie deeper: deep"):
        import_adapter("hf:them/dates", "me/dates", registry)
    made = import_adapter("hf:them/dates/deep", "me/dates", registry)
    assert hub.asked[-1][2]["allow_patterns"] == [f"deep/{CONFIG}", f"deep/{WEIGHTS}", "deep/README.md"]
    assert made.card.training["imported"]["source"] == "hf:them/dates/deep"


def test_pickles_and_giants_are_refused_before_they_come(hub: Hub) -> None:
    hub.sizes[WEIGHTS] = 5 << 30
    with pytest.raises(BadInput, match=r"5.00 GiB; the most is 4"):
        find_adapter("hf:them/dates", max_gib=4)
    (hub.folder / WEIGHTS).rename(hub.folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="the weights are a pickle"):
        find_adapter("hf:them/dates", max_gib=4)
    assert [call[0] for call in hub.asked] == ["model_info", "model_info"]


def _answer(kind: type[Exception]) -> Exception:
    import httpx2

    request = httpx2.Request("GET", "http://hub")
    return kind("no", response=httpx2.Response(404, request=request))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        (hub_errors.GatedRepoError, Unavailable, "its owner asks for consent"),
        (hub_errors.RepositoryNotFoundError, NotFound, "no such model or revision"),
        (hub_errors.RevisionNotFoundError, NotFound, "no such model or revision"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, kind: type[Exception], error: type[XpertError], said: str) -> None:
    hub.error = _answer(kind)
    with pytest.raises(error, match=said):
        find_adapter("hf:them/dates", max_gib=4)


def test_a_defect_is_no_unreachable_hub(hub: Hub) -> None:
    hub.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        find_adapter("hf:them/dates", max_gib=4)


def test_without_a_connection_the_cache_must_do(
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    xpert: Callable[..., Result],
) -> None:
    hub_cache(monkeypatch, tmp_path / "hub", "them/dates", make_adapter(seed=8), sha=SHA)
    place = tmp_path / "registry"
    made = xpert("registry", "import", "hf:them/dates", "--name", "me/dates", "--registry", place)
    assert made.exit_code == 0, made.stderr
    assert "The Hugging Face Hub is not reachable; looking for them/dates in its cache" in made.stderr
    card = Registry(place).show("me/dates").document
    assert card["training"]["imported"]["sha"] == SHA


def test_a_snapshot_of_the_cache_is_a_folder_like_others(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, registry: Registry
) -> None:
    """Its files are links to blobs beside it, which is no way out."""
    snapshot = hub_cache(monkeypatch, tmp_path / "hub", "them/dates", make_adapter(seed=8))
    assert import_adapter(snapshot, "me/dates", registry).version.version == 1


@pytest.fixture
def served(online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The stand-in of the Hub's HTTP interface, which the real client speaks to."""
    with HubServer() as server:
        server.add_account("them", token="hf_them")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", "hf_them")
        yield server


def test_the_real_client_brings_three_files_of_one_commit(
    served: HubServer, make_adapter: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_adapter(seed=8), tmp_path / "upload"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nSays dates.\n")
    (folder / "optimizer.pt").write_bytes(b"x" * 999)
    api = huggingface_hub.HfApi(endpoint=served.url, token="hf_them")
    api.create_repo("them/dates")
    commit = api.upload_folder(repo_id="them/dates", folder_path=folder).oid
    api.upload_file(repo_id="them/dates", path_in_repo="README.md", path_or_fileobj=b"Says nothing.\n")
    served.requests.clear()
    made = import_adapter(f"hf:them/dates@{commit}", "me/dates", registry)
    assert made.card.training["imported"]["sha"] == commit
    assert made.card.description == "Says dates."
    assert "optimizer.pt" in made.left_out
    assert (registry.pull("me/dates") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert not [line for line in served.requests if "optimizer" in line]
    newest = import_adapter("hf:them/dates", "me/dates", registry)
    assert newest.card.description == "Says nothing."
    assert newest.version.version == 2
    with pytest.raises(NotFound, match="no such model or revision"):
        import_adapter("hf:them/absent", "me/dates", registry)
    with pytest.raises(NotFound, match="no such model or revision"):
        import_adapter("hf:them/dates@v9", "me/dates", registry)


def test_a_hub_that_fails_is_said(served: HubServer, registry: Registry) -> None:
    served.faults.append(Fault("GET", status=503))
    with pytest.raises(Unavailable, match="is not reachable, and its cache has no copy"):
        import_adapter("hf:them/dates", "me/dates", registry)
