"""The contract of a place for registries. Every place of `places.PLACES` runs through it."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.registry.places.places import PLACES, STORES, Place, Watched, make_version
from tests.registry.places.places import folder_place as folder_place
from tests.registry.places.places import memory_place as memory_place
from tests.registry.places.places import s3_bucket as s3_bucket
from tests.registry.places.places import s3_place as s3_place
from tests.registry.places.places import s3_server as s3_server
from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.progress import Progress
from xpert.registry.blobs import BlobStore, Drafts
from xpert.registry.remotes import _filesystem, _transfer, object_store
from xpert.registry.remotes.object_store import ObjectStore

FILES = {
    "weights.safetensors": [b"a" * 70_000, b"b" * 90_000, b"a" * 70_000],
    "expert.json": [b"{}"],
    "empty.txt": [b""],
}
ONE, REMOVED, STABLE = "acme/sums@1.json", "acme/sums@1.removed.json", "acme/sums@stable.tag.json"


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=STORES)
def store_place(request: pytest.FixtureRequest) -> Place:
    """A place that fsspec reaches, whose calls can be watched."""
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filesystem, "_PAUSE", 0.0)


def empty_store(folder: Path) -> BlobStore:
    return BlobStore(folder / "blobs", Drafts(folder / "drafts"))


def held(store: BlobStore) -> dict[str, bytes]:
    return {sha256: path.read_bytes() for sha256, path in store.all()}


# ── what every place does ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_pushed_comes_back(place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    place.remote().push(record, data, blobs)
    other = place.remote()
    assert set(other.listing()) == {ONE} and other.read(ONE) == data
    store = empty_store(tmp_path / "there")
    other.fetch(record, record.files[1:], store)
    assert len(held(store)) == 2
    other.fetch(record, record.files, store)
    assert held(store) == held(blobs)
    assert list((tmp_path / "there" / "partials").iterdir()) == []
    assert list(other.problems([record])) == []
    with pytest.raises(NotFound):
        other.read("acme/sums@2.json")


def test_a_place_without_a_registry(place: Place, tmp_path: Path) -> None:
    try:
        assert dict(place.remote().listing()) == {}
    except NotFound as error:
        assert "there is no registry" in error.what


def test_a_number_is_given_out_once(place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "a", FILES)
    place.remote().push(record, data, blobs)
    place.remote().push(record, data, blobs)  # the same once more: an answer was lost, say
    other, changed, others = make_version(tmp_path / "b", {"expert.json": [b"other"]})
    with pytest.raises(FileExistsError):
        place.remote().push(other, changed, others)
    assert place.remote().read(ONE) == data


def test_a_removed_version_keeps_its_number(place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "a", FILES)
    remote = place.remote()
    remote.push(record, data, blobs)
    remote.write(REMOVED, b'{"gone": 1}', mark=None)
    assert set(place.remote().listing()) == {REMOVED}
    with pytest.raises(FileExistsError):
        place.remote().push(record, data, blobs)
    assert set(place.remote().listing()) == {REMOVED}
    remote.write(REMOVED, b'{"gone": 1}', mark=None)


def test_documents_are_replaced_under_a_condition(place: Place) -> None:
    first, second = place.remote(), place.remote()
    first.write(STABLE, b'{"version": 1}', mark=None)
    with pytest.raises(FileExistsError):
        second.write(STABLE, b'{"version": 2}', mark=None)
    mark = second.listing()[STABLE]
    assert first.listing()[STABLE] == mark
    second.write(STABLE, b'{"version": 2}', mark=mark)
    assert second.listing()[STABLE] != mark and first.read(STABLE) == b'{"version": 2}'
    with pytest.raises(FileExistsError):
        first.write(STABLE, b'{"version": 3}', mark=mark)
    with pytest.raises(FileExistsError):
        first.write("acme/sums@old.tag.json", b"{}", mark=mark)
    assert place.remote().read(STABLE) == b'{"version": 2}'


def test_damage_is_found_and_refused(place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    remote = place.remote()
    remote.push(record, data, blobs)
    every = [name for name in place.names() if name.startswith(("blobs/", "records/")) and place.read(name)]
    assert len(every) == 5
    for number, name in enumerate(sorted(every)):
        good = place.read(name)
        for bad in (bytes([good[0] ^ 1]) + good[1:], good[:-1], good + b"?", None):
            place.spoil(name, bad)
            assert list(place.remote().problems([record])), (name, bad and bad[:20])
            if name.startswith("blobs/") and "documents" not in name and (bad is None or bad[: len(good)] != good):
                store = empty_store(tmp_path / f"there-{number}")
                with pytest.raises(Corrupt) as caught:
                    place.remote().fetch(record, record.files, store)
                assert caught.value.where is not None and caught.value.where.startswith("acme/sums@1: ")
                assert name.removeprefix("blobs/").replace("/", "") not in held(store)
                assert all(hashlib.sha256(content).hexdigest() == sha256 for sha256, content in held(store).items())
            place.spoil(name, good)
        assert list(place.remote().problems([record])) == []


def test_strangers_and_lost_records_are_found(place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    place.remote().push(record, data, blobs)
    place.spoil("blobs/stray", b"x")
    lost = dataclasses.replace(record, version=dataclasses.replace(record.version, version=2))
    found = [str(problem) for problem in place.remote().problems([record, lost])]
    assert len(found) == 2 and "stray" in found[0] and "acme/sums@2: its record is missing" in found[1]


def test_a_push_mends_a_damaged_content(place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    place.remote().push(record, data, blobs)
    name = max(place.names(), key=lambda name: len(place.read(name)))
    good = place.read(name)
    place.spoil(name, good[:-1])
    place.remote().push(record, data, blobs)
    assert place.read(name) == good and list(place.remote().problems([record])) == []


def test_what_no_version_needs_is_swept(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, data, blobs = make_version(tmp_path / "a", FILES)
    other, changed, others = make_version(tmp_path / "b", {"expert.json": [b"{}"], "x": [b"xyz"]}, number=2)
    remote = place.remote()
    remote.push(record, data, blobs)
    remote.push(other, changed, others)
    remote.write("acme/sums@2.removed.json", b"{}", mark=None)
    needed = {part.sha256 for file in record.files for part in file.blobs}
    needed |= {hashlib.sha256(document).hexdigest() for document in (data, b"{}")}
    assert remote.sweep(needed) == (0, 0)  # all of it is new
    monkeypatch.setattr(object_store, "GRACE", -10.0)
    would = remote.sweep(needed, dry_run=True)
    assert would == remote.sweep(needed) == (2, 3 + len(changed))
    assert remote.sweep(needed) == (0, 0)
    assert list(remote.problems([record])) == []


# ── broken connections ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_push_goes_on(store_place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", {f"f{n}": [bytes([n]) * 1000] for n in range(12)})
    sent: Counter[str] = Counter()
    broken = threading.Event()

    def tell(call: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if call in ("pipe_file", "put_file") and "blobs" in str(given):
            sent[str(given)] += 1
            if sum(sent.values()) > 7 and not broken.is_set():
                raise PermissionError("the connection is gone")

    remote = store_place.remote(tell)
    with pytest.raises(BadInput):
        remote.push(record, data, blobs)
    assert dict(remote.listing()) == {}
    held = sum(name.startswith("blobs/") and "documents" not in name for name in store_place.names())
    assert held == 7 - remote.files.conditional  # the copy of the record goes first; elsewhere it is not counted
    broken.set()
    sent.clear()
    remote.push(record, data, blobs)
    assert sum(sent.values()) == 12 - held + remote.files.conditional
    assert set(remote.listing()) == {ONE} and list(remote.problems([record])) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_fetch_goes_on(
    store_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    monkeypatch.setattr(object_store, "PIECE", 10_000)
    content = hashlib.shake_256(b"x").digest(95_000)
    record, data, blobs = make_version(tmp_path / "here", {"weights": [content]})
    store_place.remote().push(record, data, blobs)
    ranges: list[int] = []

    def tell(call: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if call == "cat_file" and "blobs/" in given[0]:
            if len(ranges) == 4:
                raise PermissionError("the connection is gone")
            ranges.append(named["start"])

    store = empty_store(tmp_path / "there")
    with pytest.raises(BadInput):
        store_place.remote(tell).fetch(record, record.files, store)
    assert held(store) == {} and ranges == [0, 10_000, 20_000, 30_000]
    (partial,) = _transfer.partials_folder(store).iterdir()
    assert partial.stat().st_size == 40_000
    if damaged:
        partial.write_bytes(b"?" + partial.read_bytes()[1:])
    seen: list[int] = []

    def look(call: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if call == "cat_file":
            seen.append(named["start"])

    store_place.remote(look).fetch(record, record.files, store)
    assert seen[:6] == [40_000, 50_000, 60_000, 70_000, 80_000, 90_000]
    assert seen[6:] == ([*range(0, 100_000, 10_000)] if damaged else [])
    assert list(held(store).values()) == [content]


def test_a_passing_trouble_is_no_error(store_place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    calls: Counter[str] = Counter()

    def tell(call: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[f"{call}{given}{named.get('start')}"] += 1
        often = calls[f"{call}{given}{named.get('start')}"]
        if often in (1, 2) and call in ("find", "info", "cat_file", "pipe_file", "put_file"):
            raise ConnectionResetError("reset by peer")

    remote = store_place.remote(tell)
    remote.push(record, data, blobs)
    store = empty_store(tmp_path / "there")
    remote.fetch(record, record.files, store)
    assert held(store) == held(blobs) and max(calls.values()) >= 3


def test_an_answer_that_was_lost(store_place: Place, tmp_path: Path) -> None:
    """The place has written the record, and the writer has not heard of it: its next attempt finds its own record."""
    record, data, blobs = make_version(tmp_path / "here", FILES)
    lost = threading.Event()

    class Deaf(Watched):
        def __getattr__(self, name: str) -> Any:
            found = super().__getattr__(name)

            def called(*given: Any, **named: Any) -> Any:
                answer = found(*given, **named)
                if name in ("pipe_file", "mv") and given[-1 if name == "mv" else 0].endswith(ONE) and not lost.is_set():
                    lost.set()
                    raise ConnectionResetError("reset by peer")
                return answer

            return called if callable(found) else found

    remote = store_place.remote(lambda *_: None)
    filesystem, root = remote.files._open()
    remote.files._given = Deaf(filesystem, lambda *_: None), root
    remote.push(record, data, blobs)
    assert lost.is_set() and store_place.remote().read(ONE) == data


def test_a_content_that_many_want_is_fetched_once(store_place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    store_place.remote().push(record, data, blobs)
    seen: Counter[str] = Counter()

    def tell(call: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if call == "cat_file":
            seen[given[0]] += 1

    store = empty_store(tmp_path / "there")
    remote = store_place.remote(tell)
    threads = [threading.Thread(target=remote.fetch, args=(record, record.files, store)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(store) == held(blobs) and set(seen.values()) == {1}


class Told(Progress):
    """A progress that notes everything."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: dict[str, tuple[float | None, list[float]]] = {}

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, title: str, total: float | None = None) -> Any:
        import contextlib

        steps: list[float] = []
        self.tasks[title] = total, steps

        class Task:
            def advance(self, count: float = 1, note: str = "") -> None:
                steps.append(count)

        return contextlib.nullcontext(Task())


def test_progress_adds_up(store_place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "here", FILES)
    told = Told()
    remote = store_place.remote()
    remote.push(record, data, blobs, told)
    remote.fetch(record, record.files, empty_store(tmp_path / "there"), told)
    list(remote.problems([record], told))
    assert len(told.tasks) == 3
    for title, (total, steps) in told.tasks.items():
        assert total == sum(steps) > 160_000, title
    conditional = remote.files.conditional
    assert conditional or "cannot write under a condition" in told.said[0]
    assert not conditional or told.said == []


# ── object stores ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_large_contents_travel_in_pieces(s3_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filesystem, "PIECE", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    content = hashlib.shake_256(b"large").digest((11 << 20) + 7)
    record, data, blobs = make_version(tmp_path / "here", {"weights": [content]})
    s3_place.remote().push(record, data, blobs)
    store = empty_store(tmp_path / "there")
    s3_place.remote().fetch(record, record.files, store)
    assert list(held(store).values()) == [content]


def test_contents_that_are_there_do_not_travel_again(s3_place: Place, tmp_path: Path) -> None:
    first, data, blobs = make_version(tmp_path / "a", FILES)
    s3_place.remote().push(first, data, blobs)
    second, changed, others = make_version(tmp_path / "b", {**FILES, "more": [b"more"]}, number=2)
    sent: list[str] = []

    def tell(call: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if call in ("pipe_file", "put_file", "cp_file"):
            sent.append(call)

    s3_place.remote(tell).push(second, changed, others)
    assert sent == ["pipe_file"] * 3  # one content, and the record with its copy


def test_old_contents_that_are_used_again_are_made_new(
    s3_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, data, blobs = make_version(tmp_path / "a", {"weights": [b"weights"]})
    s3_place.remote().push(record, data, blobs)
    calls: list[str] = []
    ages = iter([object_store.GRACE * 0.6, object_store.GRACE * 0.4])
    monkeypatch.setattr(object_store, "_age", lambda info, now: next(ages))
    for _ in range(2):
        s3_place.remote(lambda call, given, named: calls.append(call)).push(record, data, blobs)
    assert calls.count("cp_file") == 1


def test_what_arrives_otherwise_than_it_was_sent(s3_place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "a", {"weights": [b"weights"]})
    sha256 = record.files[0].sha256
    blobs.path(sha256).write_bytes(b"weighed")  # the disk rots before it travels
    with pytest.raises(Corrupt, match="damaged"):
        s3_place.remote().push(record, data, blobs)
    assert dict(s3_place.remote().listing()) == {}


def test_registries_that_are_not_ours(store_place: Place, tmp_path: Path) -> None:
    record, data, blobs = make_version(tmp_path / "a", FILES)
    store_place.spoil("holiday.jpg", b"x")
    with pytest.raises(BadInput, match="holds other things"):
        store_place.remote().push(record, data, blobs)
    store_place.spoil("holiday.jpg", None)
    store_place.remote().push(record, data, blobs)
    store_place.spoil("registry.json", b'{"kind": "registry", "schema": 99}')
    for action in (store_place.remote().listing, lambda: store_place.remote().push(record, data, blobs)):
        with pytest.raises(BadInput, match="newer xpert"):
            action()
    store_place.spoil("registry.json", b"[]")
    with pytest.raises(Corrupt, match="not the mark"):
        store_place.remote().listing()


ADDRESSES: dict[str, tuple[str, type[XpertError], str]] = {
    "a key": ("s3://AKIA:hush@bucket/x", BadInput, "credentials"),
    "a key alone": ("s3://AKIAHUSH@bucket/x", BadInput, "credentials"),
    "a password": ("sftp://me:hush@host/x", BadInput, "credentials"),
    "options": ("s3://bucket/x?secret=hush", BadInput, "options"),
    "no bucket": ("s3://", BadInput, "names no bucket"),
    "upwards": ("s3://bucket/../x", BadInput, "'..'"),
    "chained": ("memory://x::s3://bucket", BadInput, "options"),
}


@pytest.mark.parametrize("mistake", ADDRESSES)
def test_addresses_that_mean_no_place(mistake: str) -> None:
    url, kind, said = ADDRESSES[mistake]
    with pytest.raises(kind) as caught:
        ObjectStore(url)
    assert said in str(caught.value) and "hush" not in str(caught.value).lower()


def test_addresses_in_normal_form() -> None:
    for url in ("s3://bucket/x", "S3://bucket//x/", "s3a://bucket/x"):
        assert ObjectStore(url).location == "s3://bucket/x"
    assert ObjectStore("sftp://me@host:22/x/").location == "sftp://me@host:22/x"


def test_errors_of_the_place_are_told_without_secrets(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from botocore.exceptions import ClientError, NoCredentialsError

    with pytest.raises(NotFound, match="no such bucket"):
        ObjectStore("s3://surely-not-here/x").listing()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(Unavailable, match="cannot be reached"):
        ObjectStore("s3://bucket/x").listing()
    s3fs.S3FileSystem.clear_instance_cache()

    class Refusing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def invalidate_cache(self) -> None:
            raise self.error

    denied = PermissionError("hush")
    denied.__cause__ = ClientError({"Error": {"Code": "InvalidAccessKeyId", "Message": "hush"}}, "GetObject")
    for error, kind, said in (
        (denied, BadInput, "(InvalidAccessKeyId)"),
        (NoCredentialsError(), BadInput, "no credentials"),
        (TimeoutError("hush"), Unavailable, "TimeoutError"),
        (OSError(5, "hush"), Unavailable, "EIO"),
        (ImportError("hush", name="s3fs"), Unavailable, "pip install s3fs"),
    ):
        with pytest.raises(kind) as caught:
            ObjectStore("s3://bucket/x", filesystem=Refusing(error), root="bucket/x").listing()
        assert said in str(caught.value) and "hush" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):  # a defect stays one
        ObjectStore("s3://bucket/x", filesystem=Refusing(ZeroDivisionError()), root="bucket/x").listing()


def test_a_filesystem_that_is_not_installed() -> None:
    with pytest.raises(Unavailable, match="gcsfs, which is not installed"):
        ObjectStore("gs://bucket/x").listing()
