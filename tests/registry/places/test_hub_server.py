"""The stand-in of the Hub answers the real client as the Hub does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.registry.places.hub_server import Fault, HubServer

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(online: None) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_account("alice", token="hf_alice", organizations=("lab",))
        server.add_account("bob", token="hf_bob")
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_alice")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- xpert\n- dates\n---\n# Dates\n")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "deep" / "er" / "notes.txt").write_text("notes")
    (folder / "empty.txt").write_bytes(b"")
    return folder


def _snapshot(hub: HubServer, tmp_path: Path, revision: str = "main") -> Path:
    cache = tmp_path / "cache"
    return Path(
        huggingface_hub.snapshot_download(
            "alice/dates", endpoint=hub.url, cache_dir=cache, token="hf_alice", revision=revision
        )
    )


def test_a_folder_goes_up_and_comes_down_the_same(hub: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/dates")
    api.create_repo("alice/dates", exist_ok=True)
    info = api.upload_folder(repo_id="alice/dates", folder_path=folder)
    api.create_tag("alice/dates", tag="v1")
    back = _snapshot(hub, tmp_path, revision="v1")
    assert back.name == info.oid
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert any("/cdn/" in line for line in hub.requests), "weights come from storage"
    assert sum("PUT /lfs/" in line for line in hub.requests) == 1


def test_uploads_in_parts(online: None, folder: Path, tmp_path: Path) -> None:
    with HubServer(part=3000) as hub:
        hub.add_account("alice", token="hf_alice")
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo("alice/dates")
        api.upload_folder(repo_id="alice/dates", folder_path=folder)
        assert sum("PUT /lfs/" in line for line in hub.requests) == 4
        assert (_snapshot(hub, tmp_path) / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_content_that_is_there_is_not_uploaded_again(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo("alice/dates")
    for _ in range(2):
        api.upload_folder(repo_id="alice/dates", folder_path=folder)
    api.upload_file(repo_id="alice/dates", path_in_repo="copy.safetensors", path_or_fileobj=WEIGHTS)
    assert sum("PUT /lfs/" in line for line in hub.requests) == 1
    assert len(api.list_repo_commits("alice/dates")) == 3


def test_trees_tell_sizes_and_hashes(api: HfApi, folder: Path) -> None:
    api.create_repo("alice/dates")
    api.upload_folder(repo_id="alice/dates", folder_path=folder)
    tree = {entry.path: entry for entry in api.list_repo_tree("alice/dates", recursive=True)}
    assert sorted(tree) == [
        ".gitattributes", "README.md", "adapter_model.safetensors", "deep", "deep/er", "deep/er/notes.txt", "empty.txt",
    ]  # fmt: skip
    weights, notes = tree["adapter_model.safetensors"], tree["deep/er/notes.txt"]
    assert isinstance(weights, RepoFile) and isinstance(notes, RepoFile)
    assert weights.lfs is not None and weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert notes.lfs is None and notes.blob_id == hashlib.sha1(b"blob 5\0notes").hexdigest()
    assert [entry.path for entry in api.list_repo_tree("alice/dates", "deep")] == ["deep/er"]
    assert [entry.path for entry in api.list_repo_tree("alice/dates", "deep", recursive=True)] == [
        "deep/er",
        "deep/er/notes.txt",
    ]
    assert [entry.path for entry in api.get_paths_info("alice/dates", ["README.md", "none"])] == ["README.md"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("alice/dates", "nowhere"))
    info = api.model_info("alice/dates", files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings}
    assert sizes["adapter_model.safetensors"] == len(WEIGHTS)
    assert info.card_data.license == "mit" and {"xpert", "license:mit"} <= set(info.tags)


def test_deletes_copies_and_conditions(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo("alice/dates")
    first = api.upload_folder(repo_id="alice/dates", folder_path=folder).oid
    api.create_commit(
        "alice/dates",
        [CommitOperationDelete("adapter_model.safetensors"), CommitOperationDelete("deep/")],
        commit_message="less",
        parent_commit=first,
    )
    assert set(hub.repository("alice/dates").head.tree) == {".gitattributes", "README.md", "empty.txt"}
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("alice/dates", [CommitOperationAdd("x", b"x")], commit_message="late", parent_commit=first)
    assert refused.value.response.status_code == 412
    back = [
        CommitOperationCopy(path, path, src_revision=first)
        for path in ("adapter_model.safetensors", "deep/er/notes.txt")
    ]
    api.create_commit("alice/dates", back, commit_message="back")
    assert hub.content("alice/dates", "adapter_model.safetensors") == WEIGHTS
    assert hub.content("alice/dates", "deep/er/notes.txt") == b"notes"
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit("alice/dates", [CommitOperationDelete("none")], commit_message="none")


def test_tags_and_branches(api: HfApi, folder: Path) -> None:
    api.create_repo("alice/dates")
    first = api.list_repo_commits("alice/dates")[0].commit_id
    second = api.upload_folder(repo_id="alice/dates", folder_path=folder).oid
    api.create_tag("alice/dates", tag="v1", revision=first)
    api.create_tag("alice/dates", tag="v2")
    api.create_branch("alice/dates", branch="old", revision="v1")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_tag("alice/dates", tag="v1")
    assert refused.value.response.status_code == 409
    api.create_tag("alice/dates", tag="v1", exist_ok=True)
    refs = api.list_repo_refs("alice/dates")
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first, "v2": second}
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "old": first}
    assert api.model_info("alice/dates", revision="old").sha == first
    api.delete_tag("alice/dates", tag="v2")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("alice/dates", tag="v2")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/dates", revision="v2")


def test_listings_filter_and_turn_pages(online: None, folder: Path) -> None:
    with HubServer(page=3) as hub:
        hub.add_account("alice", token="hf_alice", organizations=("lab",))
        api = HfApi(endpoint=hub.url, token="hf_alice")
        for number in range(8):
            api.create_repo(f"lab/e{number}", private=number == 7)
        for number in (2, 5, 7):
            api.upload_file(repo_id=f"lab/e{number}", path_in_repo="README.md", path_or_fileobj=folder / "README.md")
        api.create_repo("alice/e9")
        assert [model.id for model in api.list_models(author="lab")] == [f"lab/e{number}" for number in range(8)]
        assert [model.id for model in api.list_models(author="lab", filter="xpert")] == ["lab/e2", "lab/e5", "lab/e7"]
        strangers = HfApi(endpoint=hub.url, token=False)
        assert [model.id for model in strangers.list_models(filter=["xpert", "dates"])] == ["lab/e2", "lab/e5"]
        assert [model.id for model in api.list_models(search="E9")] == ["alice/e9"]
        (shown,) = api.list_models(search="e5", expand=["sha", "siblings"])
        assert shown.sha and [file.rfilename for file in shown.siblings] == [".gitattributes", "README.md"]
        (plain,) = api.list_models(search="e5")
        assert plain.sha is None and plain.tags == ["xpert", "dates", "license:mit"]
        (full,) = api.list_models(search="e5", full=True, cardData=True)
        assert full.sha == shown.sha and full.card_data.license == "mit"


def test_who_may_do_what(hub: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    hub.add_account("alice", token="hf_reader", role="read")
    api.create_repo("alice/dates", private=True)
    api.upload_folder(repo_id="alice/dates", folder_path=folder)
    nobody, bob, wrong, reader = (
        HfApi(endpoint=hub.url, token=token) for token in (False, "hf_bob", "hf_no", "hf_reader")
    )
    for stranger, status in ((nobody, 401), (bob, 404)):
        with pytest.raises(RepositoryNotFoundError) as missing:
            stranger.model_info("alice/dates")
        assert missing.value.response.status_code == status
    assert reader.model_info("alice/dates").private
    refusals: list[tuple[int, Callable[[], object]]] = [
        (401, lambda: wrong.model_info("alice/dates")),
        (401, wrong.whoami),
        (401, lambda: wrong.create_repo("alice/other")),
        (403, lambda: reader.create_repo("alice/other")),
        (403, lambda: reader.upload_file(repo_id="alice/dates", path_in_repo="x", path_or_fileobj=b"x")),
        (403, lambda: bob.create_repo("lab/other")),
    ]
    for status, call in refusals:
        with pytest.raises(HfHubHTTPError) as refused:
            call()
        assert refused.value.response.status_code == status
    hub.repository("alice/dates").private = False
    hub.repository("alice/dates").gated = True
    assert bob.model_info("alice/dates").gated == "manual"
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download("alice/dates", "README.md", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/none")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("alice/dates", "none", cache_dir=tmp_path)


def test_metadata_is_checked_before_anything_is_uploaded(hub: HubServer, api: HfApi) -> None:
    api.create_repo("alice/dates")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id="alice/dates", path_in_repo="README.md", path_or_fileobj=b"---\na: [\n---\n")
    assert not any("/commit/" in line for line in hub.requests)
    with pytest.raises(BadRequestError):
        raise_for = huggingface_hub.utils.hf_raise_for_status
        raise_for(huggingface_hub.get_session().put(f"{hub.url}/lfs/alice/dates/{'0' * 64}", content=b"x"))


def test_faults_strike_as_told(
    hub: HubServer, api: HfApi, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    api.create_repo("alice/dates")
    hub.faults.append(Fault("PUT /lfs/", status=503, times=2))
    api.upload_folder(repo_id="alice/dates", folder_path=folder)
    assert hub.faults[0].struck == 2
    hub.faults[:] = [Fault("GET /cdn/", cut=1000, times=2)]
    assert (_snapshot(hub, tmp_path) / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert sum("GET /cdn/" in line for line in hub.requests) == 3, "the client goes on by ranges"
    hub.faults[:] = [Fault("resolve", status=500, every=2, times=1)]
    url = f"{hub.url}/alice/dates/resolve/main/README.md"
    assert [huggingface_hub.get_session().get(url).status_code for _ in range(4)] == [200, 500, 200, 200]
    hub.faults[:] = [Fault("/commit/", forget=True, times=1)]
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit("alice/dates", [CommitOperationAdd("late", b"x")], commit_message="late")
    assert hub.content("alice/dates", "late") == b"x"
    hub.faults.clear()
    hub.flip("alice/dates", "adapter_model.safetensors")
    again = _snapshot(hub, tmp_path / "other") / "adapter_model.safetensors"
    assert again.stat().st_size == len(WEIGHTS) and again.read_bytes() != WEIGHTS


def test_a_server_that_is_gone(online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer() as hub:
        url = hub.url
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("alice/dates", "README.md", endpoint=url, cache_dir=tmp_path, token=False)
