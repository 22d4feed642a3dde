"""Registries behind a place: the same as in a folder, for many machines at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.registry.places.places import Place
from tests.registry.places.places import memory_place as memory_place
from tests.registry.places.places import s3_bucket as s3_bucket
from tests.registry.places.places import s3_place as s3_place
from tests.registry.places.places import s3_server as s3_server
from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.registry import mirror
from xpert.registry.mirror import RemoteRegistry
from xpert.registry.opening import open_registry
from xpert.registry.remotes import _filesystem, object_store
from xpert.registry.store import Registry, Version
from xpert.storage import cache_folder, hash_file

Maker = Callable[..., Path]


# Without conditional writes there is nothing that `test_remotes.py` does not see; every test runs on two places.
@pytest.fixture(params=("memory_place", "s3_place"))
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_filesystem, "_PAUSE", 0.0)
    monkeypatch.setattr(mirror, "FRESH_SECONDS", 0.0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RemoteRegistry]:
    """`machine(place, "a")`: the registry as the machine of that name sees it, with a cache of its own."""

    def opened(place: Place, name: str = "a", **settings: object) -> RemoteRegistry:
        monkeypatch.setenv("XPERT_CACHE", str(tmp_path / "machines" / name))
        return RemoteRegistry(place.remote(**settings))

    return opened


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def test_what_one_machine_publishes_another_pulls(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, tmp_path: Path
) -> None:
    a, b = machine(place, "a"), machine(place, "b")
    folder = expert(scores={"arithmetic": 0.8}, description="adds numbers")
    try:
        assert b.list() == []  # as the Hub answers, where there always is something
    except NotFound as error:
        assert "no registry" in error.what
    version = a.publish(folder, "acme/sums", tags=("stable",))
    assert (version.ref, version.repeated) == ("acme/sums@1", False)
    assert a.publish(folder, "acme/sums").repeated
    assert a.publish(expert("b", seed=2), "acme/sums").version == 2
    (entry,) = b.list()
    assert (entry.latest.ref, entry.versions) == ("acme/sums@2", (1, 2))
    assert entry.tags == {"stable": 1, "latest": 2}
    assert b.location == a.location and str(b.folder) not in b.location
    details = b.show("acme/sums@1")
    assert details.document["description"] == "adds numbers" and not b.blobs.holds(details.files[0])
    assert [hit.version.ref for hit in b.search("arith")] == ["acme/sums@2"]
    assert files_of(b.pull("acme/sums@stable", tmp_path / "out")) == files_of(folder)
    cached = b.pull("acme/sums@1")
    assert files_of(cached) == files_of(folder) and cached.is_relative_to(cache_folder())
    assert list(b.verify()) == [] and list(a.verify()) == []


def test_a_place_is_a_registry_folder(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, tmp_path: Path
) -> None:
    """Copied to a disk file by file, it is one that a local registry reads."""
    a = machine(place)
    a.publish(expert("a"), "acme/sums", tags=("stable",))
    a.publish(expert("b", seed=2), "acme/sums")
    a.remove("acme/sums@2")
    for name in place.names():
        target = tmp_path / "copy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(place.read(name))
    local = Registry(tmp_path / "copy")
    assert local.list() == a.list() and local.tags("acme/sums") == a.tags("acme/sums")
    assert list(local.verify()) == []
    assert local.publish(expert("c", seed=3), "acme/sums").version == 3


def test_tags_and_removal_travel(place: Place, machine: Callable[..., RemoteRegistry], expert: Maker) -> None:
    a, b = machine(place, "a"), machine(place, "b")
    for seed in (1, 2, 3):
        a.publish(expert(f"e{seed}", seed=seed), "acme/sums", latest=seed < 3)
    assert b.resolve("acme/sums").version == 2  # the third left `latest` where it was
    b.tag("acme/sums@1", "stable")
    assert a.resolve("acme/sums@stable").version == 1
    a.tag("acme/sums@2", "stable")
    b.tag("acme/sums@3", "stable")  # moved by others since b looked
    assert dict(a.tags("acme/sums")) == {"stable": 3, "latest": 2}
    a.untag("acme/sums", "stable")
    with pytest.raises(NotFound, match="no tag"):
        b.resolve("acme/sums@stable")
    b.remove("acme/sums@3")
    assert [entry.versions for entry in a.list()] == [(1, 2)]
    assert a.publish(expert("e4", seed=4), "acme/sums").version == 4
    b.remove("acme/sums")
    assert a.list() == [] and list(a.verify()) == []


def test_numbers_race(place: Place, machine: Callable[..., RemoteRegistry], expert: Maker) -> None:
    """Somebody publishes between another's looking and writing: the second takes the next number."""
    a, b = machine(place, "a"), machine(place, "b")
    a.publish(expert("first", seed=9), "acme/sums")
    push = b.remote.push
    raced: list[Version] = []

    def late(record, *given, **named):  # type: ignore[no-untyped-def]
        if not raced:
            raced.append(a.publish(expert("a", seed=1), "acme/sums"))
        return push(record, *given, **named)

    b.remote.push = late  # type: ignore[method-assign]
    assert b.publish(expert("b", seed=2), "acme/sums", tags=("mine",)).ref == "acme/sums@3"
    assert raced[0].ref == "acme/sums@2"
    assert dict(a.tags("acme/sums")) == {"mine": 3, "latest": 3} and list(a.verify()) == []


PUBLISHER = """
import sys
from pathlib import Path
from xpert.registry.opening import open_registry
registry = open_registry(sys.argv[1])
for folder in sorted(Path(sys.argv[2]).iterdir()):
    print(registry.publish(folder, "acme/sums").ref, flush=True)
"""


def test_publishers_on_many_machines(
    s3_place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, tmp_path: Path
) -> None:
    runs, seed = [], 0
    here = machine(s3_place, "here")
    for number in range(3):
        for name in range(3):
            expert(f"{number}/{name}", seed=seed)
            seed += 1
        command = [sys.executable, "-c", PUBLISHER, here.location, str(tmp_path / "experts" / str(number))]
        environment = {**_environment(), "XPERT_CACHE": str(tmp_path / f"cache{number % 2}")}  # two share a mirror
        pipe = subprocess.PIPE
        runs.append(subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe))
    outcomes = [run.communicate(timeout=120) for run in runs]
    told = [ref for out, _ in outcomes for ref in out.split()]
    assert all(run.returncode == 0 for run in runs), outcomes
    assert sorted(told) == sorted(f"acme/sums@{number}" for number in range(1, 10))
    assert here.list()[0].versions == tuple(range(1, 10)) and list(here.verify()) == []


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_only_what_changed_is_read(place: Place, machine: Callable[..., RemoteRegistry], expert: Maker) -> None:
    a = machine(place, "a")
    for seed in range(3):
        a.publish(expert(f"e{seed}", seed=seed), f"acme/e{seed}")
    b = machine(place, "b")
    seen: list[str] = []
    read = b.remote.read
    b.remote.read = lambda document: seen.append(document) or read(document)  # type: ignore[method-assign]
    assert len(b.list()) == 3 and len(seen) == 3
    assert len(b.list()) == 3 and len(seen) == 3
    a.tag("acme/e1@1", "stable")
    a.remove("acme/e2")
    assert [entry.latest.name for entry in b.list()] == ["acme/e0", "acme/e1"]
    assert sorted(seen[3:]) == ["acme/e1@stable.tag.json", "acme/e2@1.removed.json"]
    assert {str(d) for d in b.records.documents()} == {
        *("acme/e0@1.json", "acme/e1@1.json", "acme/e1@stable.tag.json", "acme/e2@1.removed.json")
    }


def test_what_vanishes_from_the_place_vanishes(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker
) -> None:
    a = machine(place)
    a.publish(expert("a"), "acme/a", tags=("stable",))
    a.publish(expert("b", seed=2), "acme/b")
    place.spoil("records/acme/a@1.json", None)
    place.spoil("records/acme/a@stable.tag.json", None)
    assert [entry.latest.ref for entry in a.list()] == ["acme/b@1"]
    with pytest.raises(NotFound):
        a.resolve("acme/a")


def test_damage_there_is_found_and_refused(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, tmp_path: Path
) -> None:
    a, b = machine(place, "a"), machine(place, "b")
    folder = expert()
    a.publish(folder, "acme/a")
    a.publish(expert("other", seed=2), "acme/b")
    weights = next(file for file in a.record("acme/a").files if file.path.endswith("safetensors"))
    name = f"blobs/{weights.blobs[0].sha256[:2]}/{weights.blobs[0].sha256[2:]}"
    good = place.read(name)
    place.spoil(name, good[:-1] + b"?")
    with pytest.raises(Corrupt) as caught:
        b.pull("acme/a", tmp_path / "out")
    assert caught.value.where == "acme/a@1: adapter_model.safetensors" and not (tmp_path / "out").exists()
    assert [problem.where for problem in b.verify()] == ["acme/a@1: adapter_model.safetensors"]
    assert a.pull("acme/b", tmp_path / "fine").is_dir()
    place.spoil(name, good)
    record = place.read("records/acme/a@1.json")
    for bad in (record.replace(b"tiny", b"tinx"), b"{}", b"no json"):
        place.spoil("records/acme/a@1.json", bad)
        c = machine(place, f"c{len(bad)}")
        assert [entry.latest.ref for entry in c.list()] == ["acme/b@1"]
        with pytest.raises(Corrupt, match="damaged"):
            c.pull("acme/a")
        assert [problem.where for problem in c.verify()] == ["acme/a@1.json"]
        with pytest.raises(Corrupt, match="what it needs is unknown"):
            c.gc()
    place.spoil("records/acme/a@1.json", record)
    assert list(c.verify()) == []


def test_a_damaged_mirror_mends_itself(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, tmp_path: Path
) -> None:
    a = machine(place)
    folder = expert()
    a.publish(folder, "acme/a")
    for _, path in list(a.blobs.all()):
        path.chmod(0o644)
        path.write_bytes(b"?" + path.read_bytes()[1:])
    assert a.show("acme/a").document["adapter"] == {"rank": 4}
    assert files_of(a.pull("acme/a", tmp_path / "out")) == files_of(folder)
    for path in a.folder.glob("index.sqlite*"):
        path.unlink()
    (a.folder / "index.sqlite").write_bytes(b"no database" * 100)
    rebuilt = a.rebuild()
    assert (rebuilt.versions, rebuilt.removed, rebuilt.problems) == (1, 0, ())
    assert [entry.latest.ref for entry in a.list()] == ["acme/a@1"]


def test_gc_there(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = machine(place)
    a.publish(expert("a", seed=1), "acme/a")
    a.publish(expert("b", seed=2), "acme/b")
    a.remove("acme/b")
    assert a.gc().files == 0  # what is new may belong to a version under way
    monkeypatch.setattr(object_store, "GRACE", -10.0)
    would = a.gc(dry_run=True)
    assert would.files == 5 and would == a.gc()  # four files, and the copy of the record; one file is shared
    assert a.gc().files == 0 and list(a.verify()) == []


def test_a_survey_is_that_of_a_folder(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, registry: Registry
) -> None:
    a = machine(place, "a")
    for seed in range(3):
        for one in (a, registry):
            one.publish(expert(f"{id(one)}-{seed}", seed=seed, scores={"arithmetic": 0.1 * seed}), f"acme/e{seed}")
    b = machine(place, "b")
    card = next(file for file in b.record("acme/e1").files if file.path == "expert.json")
    place.spoil(f"blobs/{card.sha256[:2]}/{card.sha256[2:]}", b"rot")
    there, here = [details for _, details in b.survey()], [details for _, details in registry.survey()]
    assert [version.ref for version, _ in b.survey()] == ["acme/e0@1", "acme/e1@1", "acme/e2@1"]
    assert isinstance(there[1], Corrupt) and there[1].where == "acme/e1@1: expert.json"
    for far, near in ((there[0], here[0]), (there[2], here[2])):
        assert not isinstance(far, XpertError) and not isinstance(near, XpertError)
        assert far.document == near.document and far.tags == near.tags


def test_offline(place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    a, b = machine(place, "a"), machine(place, "b")
    a.publish(expert("a"), "acme/a")
    monkeypatch.setenv("XPERT_OFFLINE", "1")
    with pytest.raises(Unavailable, match="nothing of this registry was fetched"):
        b.list()
    assert a.notice is not None and a.location in a.notice and b.notice is None
    b.remote.listing = a.remote.listing = None  # type: ignore[assignment,method-assign]
    assert [entry.latest.ref for entry in a.list()] == ["acme/a@1"]
    assert a.pull("acme/a", tmp_path / "out").is_dir()
    for action in (
        lambda: a.publish(expert("b", seed=3), "acme/a"),
        lambda: a.remove("acme/a"),
        lambda: a.tag("acme/a", "stable"),
        lambda: a.gc(),
        lambda: a.verify(),
        lambda: a.rebuild(),
    ):
        with pytest.raises(Unavailable, match="XPERT_OFFLINE is set"):
            action()
    assert [entry.latest.ref for entry in a.list()] == ["acme/a@1"]


def test_offline_without_the_contents(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(place, "a").publish(expert("a"), "acme/a")
    b = machine(place, "b")
    b.list()
    monkeypatch.setenv("XPERT_OFFLINE", "1")
    with pytest.raises(Unavailable, match="was not fetched before"):
        b.pull("acme/a")


def test_an_unreachable_place(machine: Callable[..., RemoteRegistry], memory_place: Place, expert: Maker) -> None:
    a = machine(memory_place)
    a.publish(expert("a"), "acme/a")

    def gone(call: str, given: object, named: object) -> None:
        raise ConnectionRefusedError("gone")

    lost = RemoteRegistry(memory_place.remote(gone))
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        lost.list()
    assert caught.value.hint is not None and "XPERT_OFFLINE=1" in caught.value.hint


def test_addresses_are_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = open_registry("S3://bucket/x/")
    assert isinstance(opened, RemoteRegistry) and opened.location == "s3://bucket/x"
    monkeypatch.setenv("XPERT_REGISTRY", "memory://bucket/y")
    assert open_registry().location == "memory://bucket/y"
    assert type(open_registry(tmp_path)) is Registry and type(open_registry(f"file://{tmp_path}")) is Registry
    with pytest.raises(BadInput, match="no registries are known") as caught:
        open_registry("gopher://x/y")
    assert caught.value.hint is not None and "s3" in caught.value.hint


def test_mixtures_name_their_place(memory_place: Place, machine: Callable[..., RemoteRegistry], expert: Maker) -> None:
    from xpert.experts.mixing import mix
    from xpert.experts.mixture_file import load_mixture, write_mixture

    a = machine(memory_place, "a")
    for seed in (1, 2):
        a.publish(expert(f"e{seed}", seed=seed), f"acme/e{seed}")
    made = a.folder.parent / "mixture.json"
    write_mixture(made, mix(a, router="centroid", name="mine"))
    assert json.loads(made.read_text())["registry"] == a.location
    b = machine(memory_place, "b")
    loaded = load_mixture(made)  # a place in memory is there for this process, by its address
    assert loaded.keys == ("acme/e1", "acme/e2") and loaded.registry == a.location
    assert all(member.folder.is_relative_to(cache_folder()) for member in loaded.experts)
    b.publish(made, "acme/both")
    assert load_mixture("acme/both", b).keys == loaded.keys


def test_publishing_goes_on_after_a_break(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = machine(place)
    folder = expert()
    push = a.remote.push
    broken: list[object] = []

    def breaks(record, data, blobs, progress):  # type: ignore[no-untyped-def]
        if not broken:
            broken.append(record)
            raise Unavailable("the line is dead")
        return push(record, data, blobs, progress)

    a.remote.push = breaks  # type: ignore[assignment,method-assign]
    with pytest.raises(Unavailable):
        a.publish(folder, "acme/a")
    assert a.publish(folder, "acme/a").ref == "acme/a@1" and list(a.verify()) == []


def test_a_sweep_by_a_machine_whose_clock_is_ahead(
    place: Place, machine: Callable[..., RemoteRegistry], expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes nothing of what another is just sending: ages are told by the place's clock."""
    a, b = machine(place), machine(place)
    a.publish(expert("a", seed=1), "acme/a")
    assert isinstance(b.remote, object_store.ObjectStore)
    create = b.remote.files.create
    swept: list[int] = []
    ahead = SimpleNamespace(time=lambda: time.time() + 7200, monotonic=time.monotonic)

    def after_sweep(name: str, data: bytes) -> None:
        if name.startswith("records/"):
            with monkeypatch.context() as patch:
                patch.setattr(object_store, "time", ahead)
                swept.append(a.gc().files)
        create(name, data)

    monkeypatch.setattr(b.remote.files, "create", after_sweep)
    b.publish(expert("b", seed=2), "acme/b")
    assert swept == [0] and list(machine(place).verify()) == []
