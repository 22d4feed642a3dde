"""The Hub as a remote registry, through the real client and a stand-in of the Hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.registry.places.hub_server import Fault, HubServer
from tests.registry.places.places import Place
from tests.registry.places.test_remotes import (
    test_a_number_is_given_out_once as test_a_number_is_given_out_once,
)
from tests.registry.places.test_remotes import (
    test_a_place_without_a_registry as test_a_place_without_a_registry,
)
from tests.registry.places.test_remotes import (
    test_a_removed_version_keeps_its_number as test_a_removed_version_keeps_its_number,
)
from tests.registry.places.test_remotes import (
    test_documents_are_replaced_under_a_condition as test_documents_are_replaced_under_a_condition,
)
from tests.registry.places.test_remotes import test_what_is_pushed_comes_back as test_what_is_pushed_comes_back
from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.registry.blobs import BlobStore, Drafts
from xpert.registry.card import BaseModel, ExpertCard
from xpert.registry.documents import Tag, document_bytes, removal
from xpert.registry.model_card import model_card
from xpert.registry.remotes import _hub_client
from xpert.registry.remotes.hub import Hub
from xpert.registry.versions import Part, Record, StoredFile, Version, content_digest

NAME = "alice/dates"
CARD = b"---\ntags:\n- xpert\n---\n# Dates\n"
Contents = dict[str, list[bytes]]


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(_hub_client, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("xpert.registry.remotes._hub_repository.WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("XPERT_CACHE", str(tmp_path / "cache"))
    with HubServer() as server:
        server.add_account("alice", token="hf_alice", organizations=("lab",))
        server.add_account("bob", token="hf_bob")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url)


@pytest.fixture
def place(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Place:
    """For the tests that every place passes."""
    hub.add_account("acme", token="hf_acme")
    monkeypatch.setenv("HF_TOKEN", "hf_acme")
    return Place(lambda: Hub("hf://acme"), set, _no_object, _no_object)


def _no_object(*given: object) -> NoReturn:
    raise AssertionError("the Hub has no objects of this layout")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return _store(tmp_path / "store")


def _store(folder: Path) -> BlobStore:
    return BlobStore(folder / "blobs", Drafts(folder / "drafts"))


def _contents(seed: int = 0, **more: list[bytes]) -> Contents:
    """Weights in three parts, the last two alike in all versions, a configuration and a model card."""
    weights = [bytes([seed]) * 5000, b"shared" * 700, b"end" * 100]
    return {
        "adapter_model.safetensors": weights,
        "adapter_config.json": [b'{"r": %d}' % seed],
        "README.md": [CARD],
        **more,
    }


def _version(
    store: BlobStore, contents: Contents, *, name: str = NAME, number: int = 1, kind: str = "expert"
) -> Record:
    files = []
    for path, parts in contents.items():
        whole = b"".join(parts)
        cut = tuple(Part(hashlib.sha256(part).hexdigest(), len(part)) for part in parts) if len(parts) > 1 else ()
        files.append(StoredFile(path, len(whole), hashlib.sha256(whole).hexdigest(), cut))
        store.put(whole, files[-1])
    held = tuple(files)
    size = sum(file.size for file in held)
    return Record(Version(name, number, kind, content_digest(held), "2026-11-30T00:00:00Z", size), held)


def push(remote: Hub, store: BlobStore, contents: Contents, **settings: object) -> Record:
    record = _version(store, contents, **settings)
    remote.push(record, record.to_bytes(), store)
    return record


def _check(record: Record, store: BlobStore, contents: Contents, folder: Path) -> None:
    folder.mkdir()
    for index, file in enumerate(record.files):
        store.copy(file, folder / str(index), what=file.path)
        assert (folder / str(index)).read_bytes() == b"".join(contents[file.path])


def _tag(version: int | None, *, tag: str = "stable", revision: int = 1) -> bytes:
    return document_bytes(Tag(NAME, tag, version, 3, revision, "2026-11-30T00:00:00Z").to_dict())


def _remove(remote: Hub, number: int) -> None:
    remote.write(f"{NAME}@{number}.removed.json", document_bytes(removal(NAME, number)), mark=None)


# ── what a version is on the Hub ─────────────────────────────────────────────────────────────────────────────────


def test_a_version_travels_there_and_back(hub: HubServer, store: BlobStore, tmp_path: Path) -> None:
    remote, contents = Hub("hf://"), _contents(1, **{"deep/notes.txt": [b"notes"], "empty.txt": [b""]})
    record = push(remote, store, contents)
    others = Hub("hf://")
    assert list(others.listing()) == [f"{NAME}@1.json"]
    assert others.read(f"{NAME}@1.json") == record.to_bytes()
    back = _store(tmp_path / "other")
    others.fetch(record, record.files, back)
    _check(record, back, contents, tmp_path / "out")
    assert list(others.problems([record])) == []
    with pytest.raises(NotFound):
        others.read(f"{NAME}@2.json")


def test_plain_clients_see_a_model(hub: HubServer, store: BlobStore, api: HfApi, tmp_path: Path) -> None:
    """What peft and the Hub's pages read: the expert's files at the top, the newest at `main`, each at its git tag."""
    remote = Hub("hf://")
    for number in (1, 2):
        push(remote, store, _contents(number, **{f"only{number}.txt": [b"x"]}), number=number)
    for revision, number in (("v1", 1), ("v2", 2), ("main", 2)):
        folder = Path(
            huggingface_hub.snapshot_download(NAME, revision=revision, endpoint=hub.url, cache_dir=tmp_path / "hf")
        )
        assert (folder / "adapter_config.json").read_bytes() == b'{"r": %d}' % number
        assert (folder / "adapter_model.safetensors").read_bytes() == b"".join(
            _contents(number)["adapter_model.safetensors"]
        )
        assert [path.name for path in folder.glob("only*")] == [f"only{number}.txt"]
    assert [model.id for model in api.list_models(filter="xpert")] == [NAME]
    assert len(api.list_repo_commits(NAME)) == 3, "one commit a version, after the first of the repository"


def test_a_mixture_gets_a_card(hub: HubServer, store: BlobStore, api: HfApi, tmp_path: Path) -> None:
    contents = {"mixture.json": [b'{"kind": "mixture"}'], "router.safetensors": [b"r" * 50]}
    remote = Hub("hf://lab")
    record = push(remote, store, contents, name="alice/mix", kind="mixture")
    assert {"xpert", "xpert-mixture"} <= set(api.model_info("lab/mix").tags)
    back = _store(tmp_path / "other")
    Hub("hf://lab").fetch(record, record.files, back)
    _check(record, back, contents, tmp_path / "out")
    remote.write("alice/mix@1.removed.json", document_bytes(removal("alice/mix", 1)), mark=None)
    assert set(hub.repository("lab/mix").head.tree) == {".gitattributes", ".xpert/alice/mix@1.removed.json"}


def test_the_model_card_of_an_expert_is_found(hub: HubServer, store: BlobStore, api: HfApi) -> None:
    """The tag by which `hf://` finds experts stands in the card that training writes."""
    card = ExpertCard(base=BaseModel("org/base", "f" * 64), adapter={"rank": 4}, description="a: b", skills=("dates",))
    push(Hub("hf://"), store, _contents(1) | {"README.md": [model_card(card, on_hub=True).encode()]})
    (found,) = api.list_models(filter=["xpert", "base_model:org/base"])
    assert found.id == NAME and vars(found)["library_name"] == "peft"


def test_files_of_others_stay(hub: HubServer, store: BlobStore, api: HfApi) -> None:
    remote = Hub("hf://")
    push(remote, store, _contents(1))
    api.upload_file(repo_id=NAME, path_in_repo="picture.svg", path_or_fileobj=b"<svg/>")
    push(remote, store, _contents(2), number=2)
    assert hub.content(NAME, "picture.svg") == b"<svg/>"


def test_a_namespace_keeps_the_experts_of_many_owners(hub: HubServer, store: BlobStore) -> None:
    remote = Hub("hf://lab")
    push(remote, store, _contents(1))
    push(remote, store, _contents(2), name="bob/sums")
    assert set(Hub("hf://lab").listing()) == {f"{NAME}@1.json", "bob/sums@1.json"}
    assert set(hub.state.repositories) == {"lab/dates", "lab/sums"}
    assert Hub("hf://").listing() == {}, "alice/dates is not in the repository of its name"
    record = _version(store, _contents(3), name="bob/dates")
    with pytest.raises(BadInput, match="keeps the versions of alice/dates"):
        remote.push(record, record.to_bytes(), store)


def test_only_what_is_missing_travels(hub: HubServer, store: BlobStore, tmp_path: Path) -> None:
    remote = Hub("hf://")
    first = push(remote, store, _contents(1))
    second = push(remote, store, _contents(2), number=2)
    back = _store(tmp_path / "other")
    remote.fetch(first, first.files, back)
    hub.requests.clear()
    remote.fetch(first, first.files, back)
    assert hub.requests == []
    remote.fetch(second, second.files, back)
    _check(second, back, _contents(2), tmp_path / "out")
    assert sum("GET /cdn/" in line for line in hub.requests) == 1, "only the first part differs"
    assert not any("README" in line for line in hub.requests)


# ── numbers, races and faults ────────────────────────────────────────────────────────────────────────────────────


def test_a_number_is_given_once(hub: HubServer, store: BlobStore) -> None:
    remote = Hub("hf://")
    first = push(remote, store, _contents(1))
    Hub("hf://").push(first, first.to_bytes(), store)  # the same once more: an answer was lost, say
    other = _version(store, _contents(2))
    with pytest.raises(FileExistsError):
        Hub("hf://").push(other, other.to_bytes(), store)
    assert Hub("hf://").read(f"{NAME}@1.json") == first.to_bytes()
    _remove(remote, 1)
    with pytest.raises(FileExistsError):
        remote.push(first, first.to_bytes(), store)
    assert list(Hub("hf://").listing()) == [f"{NAME}@1.removed.json"]


def test_racing_publishers_get_numbers_of_their_own(hub: HubServer, tmp_path: Path) -> None:
    """Each takes the next number where its own is taken, as the mirror does; nothing is lost or mixed."""
    count, got, failed = 6, dict[int, int](), list[BaseException]()

    def publish(seed: int) -> None:
        store, number = _store(tmp_path / f"store{seed}"), 1
        try:
            while True:
                record = _version(store, _contents(seed), number=number)
                try:
                    Hub("hf://").push(record, record.to_bytes(), store)
                    got[number] = seed
                    return
                except FileExistsError:
                    number += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and sorted(got) == list(range(1, count + 1))
    remote, records = Hub("hf://"), []
    assert sorted(remote.listing()) == [f"{NAME}@{number}.json" for number in range(1, count + 1)]
    for number, seed in got.items():
        records.append(Record.from_bytes(remote.read(f"{NAME}@{number}.json"), where=""))
        assert hub.content(NAME, "adapter_config.json", f"v{number}") == b'{"r": %d}' % seed
    assert list(remote.problems(records)) == []
    assert hub.content(NAME, "adapter_config.json") == b'{"r": %d}' % got[count]


def test_an_older_number_does_not_take_the_top(hub: HubServer, store: BlobStore) -> None:
    """As when versions are copied between places: `main` goes on to show the newest."""
    remote = Hub("hf://")
    third = push(remote, store, _contents(3, extra=[b"3"]), number=3)
    first = push(remote, store, _contents(1, other=[b"1"]), number=1)
    assert hub.content(NAME, "adapter_config.json") == b'{"r": 3}'
    assert "extra" in hub.repository(NAME).head.tree and "other" not in hub.repository(NAME).head.tree
    assert list(remote.problems([first, third])) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET ", status=503, every=3),
        Fault("PUT /lfs/", status=500, times=1),
        Fault("POST .*/commit/", status=503, times=1),
        Fault("POST .*/commit/", forget=True, times=1),
        Fault("POST .*/tag/", status=502, times=1),
        Fault("(GET|POST)", forget=True, every=7),
    ],
    ids=str,
)
def test_what_fails_in_passing_is_tried_again(hub: HubServer, store: BlobStore, tmp_path: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    remote, contents = Hub("hf://"), _contents(1)
    record = push(remote, store, contents)
    assert remote.listing() and remote.read(f"{NAME}@1.json") == record.to_bytes()
    back = _store(tmp_path / "other")
    remote.fetch(record, record.files, back)
    _check(record, back, contents, tmp_path / "out")
    assert fault.struck
    assert hub.repository(NAME).tags == {"v1": hub.repository(NAME).head.oid}
    assert len(hub.repository(NAME).commits) == 2, "published once"


def test_a_publish_that_dies_leaves_nothing_and_goes_on(hub: HubServer, store: BlobStore) -> None:
    remote, record = Hub("hf://"), _version(store, _contents(1))
    hub.faults.append(Fault("POST .*/commit/", status=500))
    with pytest.raises(Unavailable, match="in trouble"):
        remote.push(record, record.to_bytes(), store)
    assert Hub("hf://").listing() == {}
    hub.faults.clear()
    hub.requests.clear()
    remote.push(record, record.to_bytes(), store)
    assert not any("PUT /lfs/" in line for line in hub.requests), "the weights are there already"


@pytest.mark.parametrize("forget", [False, True], ids=["refused", "unanswered"])
def test_a_change_that_ends_anywhere_is_done_or_not_done(
    hub: HubServer, store: BlobStore, monkeypatch: pytest.MonkeyPatch, forget: bool
) -> None:
    """The connection is lost for good after any number of requests: no half of a version is seen, none is lost."""
    monkeypatch.setattr(_hub_client, "WAITS", ())
    monkeypatch.setattr("xpert.registry.remotes._hub_repository.WAITS", (0.0,))
    kept, number, passed = [push(Hub("hf://"), store, _contents(0))], 2, False
    for skip in range(40):
        record = _version(store, _contents(number, **{f"only{number}": [b"x"]}), number=number)
        hub.faults[:] = [Fault("", status=0 if forget else 500, forget=forget, skip=skip)]
        try:
            Hub("hf://").push(record, record.to_bytes(), store)
            passed = True
        except (Unavailable, Corrupt):
            assert not passed, "the more requests are answered, the farther it comes"
        hub.faults.clear()
        if f"{NAME}@{number}.json" in Hub("hf://").listing():
            kept.append(record)
            number += 1
        assert set(Hub("hf://").listing()) == {f"{one.version.ref}.json" for one in kept}
        assert all("git tag" in problem.what for problem in Hub("hf://").problems(kept))
        if passed:
            break
    assert passed and len(kept) > 2
    final = push(Hub("hf://"), store, _contents(99), number=number)
    assert list(Hub("hf://").problems([*kept, final])) == []
    shown = {path for path in hub.repository(NAME).head.tree if not path.startswith((".xpert/", ".git"))}
    assert shown == set(_contents(99))


def test_a_publish_that_dies_before_its_git_tag_is_whole(hub: HubServer, store: BlobStore, tmp_path: Path) -> None:
    remote = Hub("hf://")
    hub.faults.append(Fault("POST .*/tag/", status=500))
    record = _version(store, _contents(1))
    with pytest.raises(Unavailable):
        remote.push(record, record.to_bytes(), store)
    hub.faults.clear()
    others, back = Hub("hf://"), _store(tmp_path / "other")
    others.fetch(record, record.files, back)
    _check(record, back, _contents(1), tmp_path / "out")
    assert [problem.what for problem in others.problems([record])] == [f"the git tag v1 of {NAME} is missing"]
    second = push(others, store, _contents(2), number=2)
    assert set(hub.repository(NAME).tags) == {"v1", "v2"} and list(others.problems([record, second])) == []


def test_a_cut_download_goes_on_where_it_was(
    hub: HubServer, store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xpert.registry.remotes.hub.PIECE", 1 << 16)
    weights = [bytes(range(256)) * 4096, b"z" * 300_000]  # 1 MiB and 300 kB
    contents = _contents(1) | {"adapter_model.safetensors": weights}
    record = push(Hub("hf://"), store, contents)
    back = _store(tmp_path / "other")
    hub.faults.append(Fault("GET /cdn/", cut=400_000))  # as often as it is asked
    monkeypatch.setattr(_hub_client, "WAITS", ())
    with pytest.raises(Unavailable, match="cannot be reached"):
        Hub("hf://").fetch(record, record.files, back)
    hub.faults[:] = [Fault("GET /cdn/", cut=400_000, times=2)]
    monkeypatch.setattr(_hub_client, "WAITS", (0.0,) * 4)
    hub.ranges.clear()
    Hub("hf://").fetch(record, record.files, back)
    _check(record, back, contents, tmp_path / "out")
    starts = [int(text.partition("=")[2].rstrip("-")) for text in hub.ranges if text]
    assert starts and min(starts) >= 6 << 16, "what had arrived does not travel again"


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_is_refused(hub: HubServer, store: BlobStore, tmp_path: Path, path: str) -> None:
    remote = Hub("hf://")
    record = push(remote, store, _contents(1))
    hub.flip(NAME, path, "v1")
    back = _store(tmp_path / "other")
    with pytest.raises(Corrupt) as caught:
        remote.fetch(record, record.files, back)
    assert path in str(caught.value)
    if path.endswith(".json"):  # of large files the Hub's own sha256 is asked, which does not see it
        assert [problem.where for problem in remote.problems([record])] == [f"{NAME}@1: {path}"]


def test_a_moved_git_tag_is_found_out(hub: HubServer, store: BlobStore, api: HfApi, tmp_path: Path) -> None:
    remote = Hub("hf://")
    first = push(remote, store, _contents(1))
    push(remote, store, _contents(2, extra=[b"x"]), number=2)
    repository = hub.repository(NAME)
    repository.tags["v1"] = repository.tags["v2"]
    back = _store(tmp_path / "other")
    remote.fetch(first, first.files, back)
    _check(first, back, _contents(1), tmp_path / "out")
    assert [problem.what for problem in remote.problems([first])] == [f"the git tag v1 of {NAME} is at another commit"]


def test_problems_of_every_kind_are_told(hub: HubServer, store: BlobStore, api: HfApi) -> None:
    remote = Hub("hf://")
    first = push(remote, store, _contents(1))
    second = _version(store, _contents(2), number=2)
    api.upload_file(repo_id=NAME, path_in_repo="adapter_model.safetensors", path_or_fileobj=b"other")
    api.delete_file("adapter_config.json", NAME)
    repository = hub.repository(NAME)
    repository.tags["v1"] = repository.head.oid
    for oid, commit in list(repository.commits.items()):
        if commit.title.startswith("Publish"):
            repository.commits[oid] = type(commit)(**{**vars(commit), "title": "another"})
    assert {str(problem) for problem in remote.problems([first, second])} == {
        f"{NAME}@1: adapter_config.json: missing in {NAME}",
        f"{NAME}@1: adapter_model.safetensors: holds 5 bytes instead of 9,500 in {NAME}",
        f"{NAME}@2: its record is missing in {NAME}",
    }


def test_a_damaged_record_hinders_nothing(hub: HubServer, store: BlobStore) -> None:
    remote = Hub("hf://")
    records = [push(remote, store, _contents(number), number=number) for number in (1, 2)]
    hub.flip(NAME, f".xpert/{NAME}@2.json")
    assert [problem.where for problem in remote.problems(records)] == [f"{NAME}@2"]
    records.append(push(remote, store, _contents(3), number=3))
    _remove(remote, 3)
    _remove(remote, 2)
    assert list(remote.problems(records[:1])) == []
    assert hub.content(NAME, "adapter_config.json") == b'{"r": 1}'


# ── other documents ──────────────────────────────────────────────────────────────────────────────────────────────


def test_tags_move_under_a_condition(hub: HubServer, store: BlobStore) -> None:
    remote, document = Hub("hf://"), f"{NAME}@stable.tag.json"
    for number in (1, 2):
        push(remote, store, _contents(number), number=number)
    tags = hub.repository(NAME).tags
    remote.write(document, _tag(1), mark=None)
    assert tags["stable"] == tags["v1"]
    mark = Hub("hf://").listing()[document]
    with pytest.raises(FileExistsError):
        remote.write(document, _tag(2), mark=None)
    remote.write(document, _tag(2, revision=2), mark=mark)
    assert tags["stable"] == tags["v2"] and Hub("hf://").listing()[document] != mark
    with pytest.raises(FileExistsError):
        remote.write(document, _tag(1, revision=3), mark=mark)
    assert remote.read(document) == _tag(2, revision=2)
    remote.write(document, _tag(None, revision=3), mark=remote.listing()[document])
    assert set(tags) == {"v1", "v2"}


@pytest.mark.parametrize("tag", ["latest", "main", "v2"])
def test_tags_that_git_uses_otherwise_stay_documents(hub: HubServer, store: BlobStore, tag: str) -> None:
    remote = Hub("hf://")
    for number in (1, 2):
        push(remote, store, _contents(number), number=number)
    before = dict(hub.repository(NAME).tags)
    remote.write(f"{NAME}@{tag}.tag.json", _tag(1, tag=tag), mark=None)
    assert hub.repository(NAME).tags == before and f"{NAME}@{tag}.tag.json" in Hub("hf://").listing()


def test_a_lost_answer_to_a_tag_is_no_conflict(hub: HubServer, store: BlobStore) -> None:
    remote = Hub("hf://")
    push(remote, store, _contents(1))
    hub.faults.append(Fault("POST .*/commit/", forget=True, times=1))
    remote.write(f"{NAME}@stable.tag.json", _tag(1), mark=None)
    assert len(hub.repository(NAME).commits) == 3


def test_removing_the_newest_shows_the_one_before(hub: HubServer, store: BlobStore) -> None:
    remote = Hub("hf://")
    records = [
        push(remote, store, _contents(number, **{f"only{number}.txt": [b"x"]}), number=number) for number in (1, 2, 3)
    ]
    remote.write(f"{NAME}@3.signatures.json", b"{}", mark=None)
    _remove(remote, 3)
    repository = hub.repository(NAME)
    assert set(repository.tags) == {"v1", "v2"}
    shown = {path for path in repository.head.tree if not path.startswith((".xpert/", ".git"))}
    assert shown == {"README.md", "adapter_config.json", "adapter_model.safetensors", "only2.txt"}
    assert hub.content(NAME, "adapter_config.json") == b'{"r": 2}'
    assert hub.content(NAME, "adapter_model.safetensors") == b"".join(_contents(2)["adapter_model.safetensors"])
    assert sorted(Hub("hf://").listing()) == [f"{NAME}@1.json", f"{NAME}@2.json", f"{NAME}@3.removed.json"]
    _remove(remote, 1)
    assert hub.content(NAME, "adapter_config.json") == b'{"r": 2}'
    assert list(remote.problems([records[1]])) == [] and list(remote.problems(records)) == []
    fourth = push(remote, store, _contents(4), number=4)
    assert "only2.txt" not in repository.head.tree and list(remote.problems([fourth])) == []
    assert remote.sweep(set()) == (0, 0)


# ── listings ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_listings_turn_pages_and_ask_for_what_changed(hub: HubServer, store: BlobStore) -> None:
    hub.page = 2
    remote = Hub("hf://lab")
    for number in range(5):
        push(remote, store, _contents(number), name=f"alice/e{number}")
    HfApi(endpoint=hub.url).create_repo("lab/other")
    everything = {f"alice/e{number}@1.json" for number in range(5)}
    assert set(Hub("hf://lab").listing()) == everything
    hub.requests.clear()
    assert set(Hub("hf://lab").listing()) == everything
    assert len(hub.requests) == 3, "three pages and nothing else"
    hub.page = 1000
    push(remote, store, _contents(9), name="alice/e3", number=2)
    hub.requests.clear()
    assert set(Hub("hf://lab").listing()) == everything | {"alice/e3@2.json"}
    assert sum("/tree/" in line for line in hub.requests) == 1


def test_a_listing_that_lags_does_not_hide_ones_own_version(
    hub: HubServer, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Hub("hf://lab")
    monkeypatch.setattr(remote.client.api, "list_models", lambda **settings: iter(()))
    push(remote, store, _contents(1))
    assert list(remote.listing()) == [f"{NAME}@1.json"]


def test_the_whole_hub_is_what_is_tagged_and_ones_own(
    hub: HubServer, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(Hub("hf://"), store, _contents(1))
    push(Hub("hf://"), store, _contents(1) | {"README.md": [b"# no metadata\n"]}, name="lab/plain")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    push(Hub("hf://"), store, _contents(2), name="bob/sums")
    push(Hub("hf://"), store, _contents(3), name="bob/closed")
    hub.repository("bob/closed").gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert set(Hub("hf://").listing()) == {f"{NAME}@1.json", "bob/sums@1.json", "lab/plain@1.json"}
    monkeypatch.delenv("HF_TOKEN")
    assert set(Hub("hf://").listing()) == {f"{NAME}@1.json", "bob/sums@1.json"}


def test_strange_files_among_the_documents_are_passed_over(hub: HubServer, store: BlobStore, api: HfApi) -> None:
    push(Hub("hf://"), store, _contents(1))
    for path in (
        ".xpert/notes.txt",
        ".xpert/alice/../x@1.json",
        ".xpert/eve/dates@1.json",
        ".xpert/alice/dates@01.json",
    ):
        hub.repository(NAME).head.tree[f".xpert/{path}"] = hub.repository(NAME).head.tree["README.md"]  # type: ignore[index]
    assert list(Hub("hf://").listing()) == [f"{NAME}@1.json"]


def test_private_repositories(hub: HubServer, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    push(Hub("hf://lab?private=1"), store, _contents(1))
    push(Hub("hf://lab"), store, _contents(1), name="alice/open")
    assert hub.repository("lab/dates").private and not hub.repository("lab/open").private
    assert Hub("hf://lab?private=1").location == Hub("hf://lab").location
    assert set(Hub("hf://lab").listing()) == {f"{NAME}@1.json", "alice/open@1.json"}
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert set(Hub("hf://lab").listing()) == {"alice/open@1.json"}
    with pytest.raises(NotFound):
        Hub("hf://lab").read(f"{NAME}@1.json")


# ── what users get wrong ─────────────────────────────────────────────────────────────────────────────────────────


def test_locations_are_normal_and_without_secrets(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Hub("hf://lab/").location == f"hf://lab?endpoint={hub.url}"
    assert Hub(Hub("hf://lab").location).location == Hub("hf://lab").location
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example/")
    assert Hub("hf://").location == "hf://?endpoint=https://hub.example"
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    assert Hub("hf://lab").location == "hf://lab"
    monkeypatch.delenv("HF_ENDPOINT")
    assert Hub("HF://lab?private=yes").location == "hf://lab"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://lab/dates", "write hf://lab"),
        ("hf://hf_secret@lab", "holds no token"),
        ("hf://-lab", "not a namespace"),
        ("hf://lab?private=perhaps", "write ?private=1"),
        ("hf://lab?token=x", "no option"),
        ("hf://lab?endpoint=http://elsewhere", "set HF_ENDPOINT"),
    ],
)
def test_wrong_addresses(online: None, url: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        Hub(url)
    assert words.lower() in str(caught.value).lower() and "hf_secret" not in str(caught.value)


Act = Callable[[HubServer, BlobStore], object]


def _publish(name: str = NAME) -> Act:
    return lambda hub, store: push(Hub("hf://"), store, _contents(1), name=name)


def _taken(hub: HubServer, store: BlobStore) -> None:
    api = HfApi(endpoint=hub.url)
    api.create_repo(NAME)
    api.upload_file(repo_id=NAME, path_in_repo="model.safetensors", path_or_fileobj=b"x")
    _publish()(hub, store)


def _ignoring(hub: HubServer, store: BlobStore) -> None:
    _publish()(hub, store)
    HfApi(endpoint=hub.url).upload_file(repo_id=NAME, path_in_repo=".gitignore", path_or_fileobj=b"*.json")
    push(Hub("hf://"), store, _contents(2), number=2)


def _bad_card(hub: HubServer, store: BlobStore) -> None:
    push(Hub("hf://"), store, _contents(1) | {"README.md": [b"---\na: [\n---\n"]})


def _gone(hub: HubServer, store: BlobStore) -> None:
    hub.__exit__()
    Hub("hf://lab").listing()


def _busy(hub: HubServer, store: BlobStore) -> None:
    hub.faults.append(Fault("/api/models", status=429))
    Hub("hf://lab").listing()


def _closed(hub: HubServer, store: BlobStore) -> None:
    record = push(Hub("hf://"), store, _contents(1))
    hub.repository(NAME).gated = True
    hub.state.accounts["hf_alice"] = hub.state.accounts["hf_bob"]
    Hub("hf://").read(f"{record.version.ref}.json")


@pytest.mark.parametrize(
    ("act", "token", "kind", "words"),
    [
        (_publish(), None, BadInput, "hf auth login"),
        (_publish(), "hf_mistyped", BadInput, "does not know your token"),
        (_publish("bob/sums"), "hf_alice", BadInput, "your token may not do this"),
        (_publish("alice/a..b"), "hf_alice", BadInput, "allows no repository of that name"),
        (_taken, "hf_alice", BadInput, "holds something else: model.safetensors"),
        (_ignoring, "hf_alice", BadInput, ".gitignore"),
        (_bad_card, "hf_alice", BadInput, "refuses the metadata of README.md"),
        (lambda hub, store: Hub("hf://lab").read("a/b@1.json"), "hf_alice", NotFound, "there is no a/b@1.json"),
        (_closed, "hf_alice", BadInput, "asks for consent"),
        (_gone, "hf_alice", Unavailable, "cannot be reached"),
        (_busy, "hf_alice", Unavailable, "come back later"),
    ],
)  # fmt: skip
def test_mistakes(
    hub: HubServer,
    store: BlobStore,
    monkeypatch: pytest.MonkeyPatch,
    act: Act,
    token: str | None,
    kind: type,
    words: str,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(XpertError) as caught:
        act(hub, store)
    assert type(caught.value) is kind and words in str(caught.value)
    assert "hf_mistyped" not in str(caught.value) and "hf_alice" not in str(caught.value)


def test_offline_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE is set"):
        Hub("hf://lab").listing()


def test_a_document_is_bounded_before_it_is_read(
    hub: HubServer, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(Hub("hf://"), store, _contents(1))
    monkeypatch.setattr("xpert.registry.remotes.hub.MOST_BYTES", 100)
    with pytest.raises(BadInput, match="more than the 100 bytes"):
        Hub("hf://").read(f"{NAME}@1.json")


def test_damage_here_is_not_sent(hub: HubServer, store: BlobStore) -> None:
    record = _version(store, _contents(1))
    config = next(file for file in record.files if file.path == "adapter_config.json")
    path = store.path(config.sha256)
    path.chmod(0o644)
    path.write_bytes(json.dumps({"r": 9}).encode())
    with pytest.raises(Corrupt, match="damaged"):
        Hub("hf://").push(record, record.to_bytes(), store)
    assert hub.state.repositories == {}
