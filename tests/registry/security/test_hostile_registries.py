"""Registries that somebody else filled: names, records, documents and contents that no honest publish would write."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import BadInput, Corrupt
from xpert.registry.card import ExpertCard
from xpert.registry.documents import DocumentName, document_bytes
from xpert.registry.intake import read_document
from xpert.registry.names import check_name
from xpert.registry.signing.keys import PublicKey, SigningKey
from xpert.registry.signing.trust import TrustList
from xpert.registry.store import Registry
from xpert.registry.versions import Record, StoredFile, Version, content_digest
from xpert.storage import cache_folder, hash_json, read_json

ROOT = Path(__file__).resolve().parents[3]
Maker = Callable[..., Path]
Run = Callable[..., Result]


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

PATHS = [
    *("", ".", "..", "/", "//", "/etc/passwd", "../x", "a/../x", "a/..", "./x", "a//b", "a/", "a/./b", "~/x", "-rf"),
    *(
        "a\\b",
        "..\\x",
        "C:\\x",
        "C:x",
        "a:b",
        "a\0b",
        "a\nb",
        "a\x1b[2J",
        "a\x7f",
        "a\x85",
        "a\u2028b",
        "\u202etxt.exe",
    ),
    *("a" * 129, "a/" * 8 + "b", "a?", "a*", "a|b", "<a>", '"a"', "$HOME", "`id`", "a;b", "a&b"),
    *("ａ.json", "еxpert.json", "expert\u2024json", "caf\u00e9", "cafe\u0301", "\ud800", "a\u200bb", "..\uff0fx"),
    *(
        "con",
        "CON",
        "nul.json",
        "aux.tar.gz",
        "com1",
        "LPT9.txt",
        "prn",
        "a/con/b",
        "conin$",
        "a.",
        "a ",
        "a./b",
        "a /b",
    ),
    *(".git", ".git/config", "a/.ssh", ".bashrc"),
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_in_records(path: str) -> None:
    with pytest.raises(BadInput, match="may not be the name"):
        StoredFile(path, 1, "0" * 64)


def sealed(registry: Registry, **changes: object) -> dict[str, Any]:
    """A record of the registry with fields changed by someone who knows how to make the checksum."""
    record = registry.records.read("acme/a", 1)
    value = {k: v for k, v in record.to_dict().items() if k != "checksum"} | changes
    files = value["files"]
    if isinstance(files, list) and all(isinstance(file, dict) and "path" in file for file in files):
        value.setdefault("digest", "")
        if "digest" not in changes:
            value["digest"] = hash_json({str(file["path"]): file.get("sha256") for file in files})
    return value | {"checksum": hash_json(value)}


def some_file(path: object, **changes: object) -> dict[str, object]:
    return {"path": path, "size": 1, "sha256": "0" * 64, **changes}


RECORDS: dict[str, dict[str, object]] = {
    **{f"path {path!r}": {"files": [some_file(path)]} for path in ("../x", "/etc/passwd", "a\\b", "con", "")},
    "a path that is a number": {"files": [some_file(5)]},
    "a path twice": {"files": [some_file("a"), some_file("a")]},
    "paths by case": {"files": [some_file("a.json"), some_file("A.json")]},
    "a file that is a folder too": {"files": [some_file("a"), some_file("a/b")]},
    "the same by case": {"files": [some_file("A"), some_file("a/b")]},
    "a negative size": {"files": [some_file("a", size=-1)]},
    "a size that is true": {"files": [some_file("a", size=True)]},
    "a size that is a text": {"files": [some_file("a", size="1")]},
    "a hash that is a path": {"files": [some_file("a", sha256="../" * 20 + "etc/passwd")]},
    "a hash in capitals": {"files": [some_file("a", sha256="A" * 64)]},
    "a hash of another length": {"files": [some_file("a", sha256="0" * 63)]},
    "files that are no list": {"files": {"a": 1}},
    "another digest": {"digest": "0" * 64},
    "another kind": {"kind": "program"},
    "a name outside": {"name": "../a"},
    "a name of a device": {"name": "con/a"},
    "another name": {"name": "acme/b"},
    "another version": {"version": 2},
    "a version that is a text": {"version": "1"},
    "a version of zero": {"version": 0},
    "a description that is a list": {"description": ["a"]},
    "skills that are numbers": {"skills": [1, 2]},
    "skills that are a text": {"skills": "abc"},
    "scores that are texts": {"scores": {"a": "b"}},
    "scores that are a list": {"scores": ["a"]},
    "uses that are no references": {"uses": ["../x"]},
    "a size that is not the sum": {"size": -5},
    "a size beyond any disk": {"size": 10**30},
    "a file beyond any disk": {"files": [some_file("a", size=10**30)]},
    "a score beyond any": {"scores": {"a": 10**400}},
    "a time that is a number": {"created": 5},
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_made_by_hand(case: str, registry: Registry, expert: Maker, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    value = sealed(registry, **RECORDS[case])
    path = registry.records.record_path("acme/a", 1)
    path.unlink()
    path.write_text(json.dumps(value))
    with pytest.raises(Corrupt):
        registry.records.read("acme/a", 1)
    with pytest.raises(Corrupt):
        registry.pull("acme/a", tmp_path / "out")
    assert registry.verify() and not (tmp_path / "out").exists()


NAMES_REFUSED = [
    *(
        "../x",
        "a/..",
        "a/b/c",
        ".git/x",
        "x/.git",
        "con/x",
        "x/NUL",
        "com1.a/x",
        "a./x",
        "x/a.",
        "a/",
        "/a",
        "~/a",
        "-/a",
    ),
    *("a\\b/c", "a:b/c", "a/b\n", "a/\x1b[2J", "a/b@1", "a%2fb/c", "а/b", "a\u200b/b", "a/b c", "a" * 65 + "/b"),
]


@pytest.mark.parametrize("name", NAMES_REFUSED)
def test_names(name: str, registry: Registry, expert: Maker) -> None:
    with pytest.raises(BadInput, match="is not a name"):
        check_name(name)
    with pytest.raises(BadInput):
        registry.publish(expert(), name)
    with pytest.raises(BadInput):
        registry.pull(name)
    assert not registry.folder.exists()


def test_names_that_look_reserved_but_are_not() -> None:
    for name in ("console/x", "a/com", "a/com10", "nullable/aux-1", "a.b/c.d"):
        assert check_name(name) == name


def test_names_by_case_are_one(registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    for name in ("Acme/b", "acme/A"):
        with pytest.raises(BadInput, match="by case only"):
            registry.publish(expert(name.replace("/", "-"), seed=1), name)


# ── the way out ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_pull_never_writes_through_a_link(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "deeper")
    with pytest.raises(BadInput):
        registry.pull("acme/a", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_cached_folder_with_a_link_is_not_used(registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    folder = registry.pull("acme/a")
    content = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.write_bytes(content)
    (folder / "README.md").symlink_to(elsewhere)  # the same bytes now, other bytes tomorrow
    again = registry.pull("acme/a")
    assert not (again / "README.md").is_symlink() and (again / "README.md").read_bytes() == content


# ── contents and mixtures ────────────────────────────────────────────────────────────────────────────────────────


def plant(registry: Registry, honest: Path, files: dict[str, bytes], *, kind: str = "expert") -> None:
    """A version `evil/a@1` as somebody with access to the place would write it, past all that `publish` asks."""
    registry.publish(honest, "acme/a")
    stored = []
    for path, data in files.items():
        stored.append(StoredFile(path, len(data), registry.blobs.put_bytes(data)))
    size = sum(file.size for file in stored)
    version = Version("evil/a", 1, kind, content_digest(tuple(stored)), "2026-01-01T00:00:00Z", size)
    registry.records.add(Record(version, tuple(stored)))


PLANTED: dict[str, tuple[dict[str, bytes], str]] = {
    "a pickle": ({"notes.md": pickle.dumps([1], protocol=0)}, "refused: it is a pickle"),
    "a pickle for weights": ({"adapter_model.safetensors": pickle.dumps([1])}, "refused: it is a pickle"),
    "a program": ({"run.sh": b"#!/bin/sh\nrm -rf ~\n"}, "not a file of an expert"),
    "code": ({"modeling.py": b"import os\n"}, "not a file of an expert"),
    "weights of torch": ({"adapter_model.bin": b"PK\x03\x04"}, "zip archive"),
    "a broken header": ({"adapter_model.safetensors": struct.pack("<Q", 1 << 62)}, "length is impossible"),
    "JSON that is none": ({"expert.json": b'{"a": NaN}'}, "not valid JSON"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_contents_are_judged_on_the_way_out_too(case: str, registry: Registry, expert: Maker, tmp_path: Path) -> None:
    files, said = PLANTED[case]
    plant(registry, expert(), files)
    for out in (tmp_path / "out", None):
        with pytest.raises(BadInput, match=said):
            registry.pull("evil/a", out)
    assert not (tmp_path / "out").exists()
    cached = cache_folder() / "experts"
    assert not cached.exists() or not list(cached.iterdir())


MIXTURES: dict[str, dict[str, object]] = {
    "a path": {"experts": [{"key": "a", "ref": "/etc", "fingerprint": ""}]},
    "a path upwards": {"experts": [{"key": "a", "ref": "../../x", "fingerprint": ""}]},
    "no reference": {"experts": [{"key": "a", "fingerprint": ""}]},
    "no list": {"experts": 5},
    "a gate outside": {"gate": {"name": "softmax-top-k", "file": "../../gate.safetensors"}},
    "a gate at a path": {"gate": {"name": "softmax-top-k", "file": "/tmp/gate.safetensors"}},
    "a gate that is no text": {"gate": {"name": "softmax-top-k", "file": ["x"]}},
}


@pytest.mark.parametrize("case", MIXTURES)
def test_registered_mixtures_stay_in_their_folder(case: str, registry: Registry, expert: Maker) -> None:
    from xpert.experts.mixture_file import load_mixture

    value = {
        "kind": "mixture",
        "schema": 2,
        "name": "m",
        "base": {"ref": "tiny", "fingerprint": "x"},
        "experts": [{"key": "a", "ref": "acme/a@1", "fingerprint": "x"}],
        "router": "fixed",
        **MIXTURES[case],
    }
    plant(registry, expert(), {"mixture.json": json.dumps(value).encode()}, kind="mixture")
    with pytest.raises(Corrupt, match=r"no registered expert|outside of its folder"):
        load_mixture("evil/a", registry)


# ── sizes, before anything is read ───────────────────────────────────────────────────────────────────────────────

GIANT = 1 << 42  # bytes; none of them on disk


def giant(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, GIANT)
    return path


DOCUMENTS = {
    "a record": DocumentName("acme/a", "record", 1),
    "another record": DocumentName("acme/b", "record", 1),
    "a tag": DocumentName("acme/a", "tag", tag="stable"),
    "signatures": DocumentName("acme/a", "signatures", 1),
    "a mark": DocumentName("acme/a", "removed", 7),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_giant_documents(case: str, registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    giant(registry.records.path(DOCUMENTS[case]))
    assert [entry.latest.ref for entry in registry.list()] == ["acme/a@1"]
    found = registry.verify()
    assert any(str(DOCUMENTS[case]).removesuffix(".json") in problem.where for problem in found), found
    if case in ("a record", "signatures"):
        with pytest.raises(Corrupt, match="more than"):
            registry.pull("acme/a")
        with pytest.raises(Corrupt):
            registry.show("acme/a") if case == "a record" else registry.signatures_of(registry.record("acme/a"))


@pytest.mark.parametrize("kind", ["a pipe", "a link"])
def test_documents_that_are_no_files(kind: str, registry: Registry, expert: Maker, tmp_path: Path) -> None:
    """Reading a pipe would wait for ever, and what a link leads to has any size: /dev/zero has no end."""
    registry.publish(expert(), "acme/a")
    giant(tmp_path / "giant")
    places = [registry.records.path(document) for document in list(DOCUMENTS.values())[1:]]
    for place in (*places, registry.records.copies.path("0" * 64)):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place) if kind == "a pipe" else place.symlink_to(tmp_path / "giant")
    assert [entry.latest.ref for entry in registry.list()] == ["acme/a@1"]
    assert registry.verify() and registry.rebuild().problems
    with pytest.raises(Corrupt, match=r"symbolic link|not a plain file"):
        registry.pull("acme/a")  # its signatures


LINKED = ["blobs", "blobs/documents", "records", "drafts", "index.sqlite", "index.lock"]


@pytest.mark.parametrize("part", LINKED)
def test_a_registry_does_not_lead_elsewhere(part: str, registry: Registry, expert: Maker, tmp_path: Path) -> None:
    """`gc` would clean, and every opening write, where somebody else chose."""
    registry.publish(expert("a"), "acme/a")
    path, elsewhere = registry.folder / part, tmp_path / "elsewhere"
    path.rename(elsewhere) if path.exists() else elsewhere.mkdir()
    if elsewhere.is_dir():
        old = elsewhere / "thesis.tex"
        old.write_text("years of work")
        os.utime(old, (0, 0))
    path.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    acts = (registry.gc, registry.list, registry.rebuild, lambda: registry.publish(expert("b", seed=1), "acme/b"))
    for act in acts:
        with pytest.raises(BadInput, match="a symbolic link"):
            act()
    assert sorted(elsewhere.rglob("*")) == before


GIANTS = {
    "a tag": {"kind": "tag", "tag": "evil", "version": 10**30, "through": 1, "revision": 1, "moved": "now"},
    "its revision": {"kind": "tag", "tag": "evil", "version": 1, "through": 1, "revision": 10**30, "moved": "now"},
}


@pytest.mark.parametrize("case", GIANTS)
def test_giant_numbers_stop_nobody(case: str, registry: Registry, expert: Maker) -> None:
    """SQLite has no integer above 2^63: one such document would end every reading of the whole registry."""
    registry.publish(expert(), "acme/a")
    path = registry.records.path(DocumentName("acme/a", "tag", tag="evil"))
    path.write_bytes(document_bytes({"schema": 2, "name": "acme/a", **GIANTS[case]}))
    assert [entry.latest.ref for entry in registry.list()] == ["acme/a@1"]
    assert "acme/a@evil.tag.json" in [problem.where for problem in registry.verify()]


def test_numbers_come_to_an_end(registry: Registry, expert: Maker) -> None:
    registry.publish(expert("a"), "acme/a")
    last = sealed(registry, version=999_999_999)
    registry.records.record_path("acme/a", 999_999_999).write_bytes(document_bytes(last))
    with pytest.raises(BadInput, match="no number left"):
        registry.publish(expert("b", seed=1), "acme/a")


def test_giant_copies_are_passed_over(registry: Registry, expert: Maker) -> None:
    registry.publish(expert(), "acme/a")
    giant(registry.records.copies.path("0" * 64))
    assert registry.rebuild().problems


READERS: dict[str, Callable[[Path], object]] = {
    "a card": lambda folder: ExpertCard.read(giant(folder / "expert.json").parent),
    "the mark": lambda folder: Registry(giant(folder / "registry.json").parent).list(),
    "a trust list": lambda folder: TrustList.read(giant(folder / "trust.json")),
    "a private key": lambda folder: SigningKey.load(giant(folder / "key")),
    "a public key": lambda folder: PublicKey.read(giant(folder / "key.pub")),
    "a document": lambda folder: read_document(giant(folder / "adapter_config.json")),
    "any JSON": lambda folder: read_json(giant(folder / "x.json"), most=1 << 20),
}


@pytest.mark.parametrize("case", READERS)
def test_readers_are_bounded(case: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="more than"):
        READERS[case](tmp_path)


def test_a_giant_mixture(tmp_path: Path) -> None:
    from xpert.experts.mixture_file import load_mixture

    with pytest.raises(BadInput, match="more than"):
        load_mixture(giant(tmp_path / "mixture.json"))


def test_a_blob_larger_than_its_record_says(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    registry.publish(expert(), "acme/a")
    file = next(file for file in registry.record("acme/a").files if file.path == "README.md")
    giant(registry.blobs.path(file.sha256))
    with pytest.raises(Corrupt, match="damaged"):
        registry.pull("acme/a", tmp_path / "out")  # reads a byte more than the record says, not four terabytes
    assert not (tmp_path / "out").exists()
