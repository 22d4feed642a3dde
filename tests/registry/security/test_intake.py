from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xpert.errors import BadInput, Corrupt, XpertError
from xpert.registry.store import Registry
from xpert.registry.tensor_header import read_tensor_header

Maker = Callable[..., Path]


def _card(folder: Path, **changes: object) -> None:
    path = folder / "expert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "notes.md", "w") as archive:
        archive.writestr("data.pkl", b"x")


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no card": (lambda f: (f / "expert.json").unlink(), "not an expert folder"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "card is no JSON": (lambda f: (f / "expert.json").write_text("{"), "not valid JSON"),
    "card without base": (lambda f: _card(f, base={"ref": "x", "fingerprint": ""}), "base.fingerprint is empty"),
    "card of another kind": (lambda f: _card(f, kind="mixture"), "not an expert card"),
    "a newer card": (lambda f: _card(f, schema=99), "newer xpert"),
    "card nested without end": (lambda f: (f / "expert.json").write_text("[" * 200_000), "not valid JSON"),
    "card names a missing file": (lambda f: _card(f, files={"gone.txt": "0" * 64}), "is not there"),
    "weights changed": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(save({"a": np.ones(2)})),
        "changed since",
    ),
    "weights are a pickle": (lambda f: (f / "adapter_model.safetensors").write_bytes(pickle.dumps([1])), "a pickle"),
    "weights cut short": (lambda f: os.truncate(f / "adapter_model.safetensors", 200), "not a sound safetensors"),
    "text pickle": (lambda f: (f / "notes.md").write_bytes(pickle.dumps({"a": 1}, protocol=0)), "a pickle"),
    "pickle as JSON": (lambda f: (f / "state.json").write_bytes(pickle.dumps([1], protocol=4)), "a pickle"),
    "torch archive": (_zip, "zip archive"),
    "other file": (lambda f: (f / "optimizer.pt").write_text("harmless"), "not a file of an expert"),
    "binary text": (lambda f: (f / "notes.txt").write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
    "broken line": (lambda f: (f / "training.jsonl").write_text('{"a": 1}\n{"b"\n'), "line 2"),
    "symbolic link": (lambda f: (f / "notes.md").symlink_to("/etc/passwd"), "a symbolic link"),
    "linked folder": (lambda f: (f / "more").symlink_to("/etc"), "a symbolic link"),
    "pipe": (lambda f: os.mkfifo(f / "notes.md"), "not a plain file"),
    "odd name": (lambda f: (f / "a\nb.md").write_text("x"), "may not be the name"),
    "names by case": (lambda f: (f / "readme.md").write_text("x"), "case only"),
    "no LoRA": (lambda f: [(f / "adapter_config.json").write_text("{}"), _card(f, files={})], "not the configuration"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_may_not_enter(spoil: str, registry: Registry, expert: Maker) -> None:
    folder = expert()
    act, said = SPOILS[spoil]
    act(folder)
    with pytest.raises(BadInput, match=said):
        registry.publish(folder, "acme/a")
    assert not registry.folder.exists()


def test_sizes_are_bounded(registry: Registry, expert: Maker) -> None:
    with pytest.raises(BadInput, match="more than"):
        registry.publish(expert(), "acme/a", max_gib=1e-7)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "../b", "a/..", "/a", "a/", "a b/c", "a/b\n", "é/b", "a/" + "b" * 65, ""]
)
def test_names(name: str, registry: Registry, expert: Maker) -> None:
    with pytest.raises(BadInput, match="not a name"):
        registry.publish(expert(), name)


def test_a_model_card_may_be_edited(registry: Registry, expert: Maker) -> None:
    folder = expert()
    (folder / "README.md").write_text("# Better words, with a line separator: \u2028\n")
    (folder / "exemplars.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    _card(folder, files={"README.md": "0" * 64})
    assert registry.publish(folder, "acme/a").version == 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_header_we_accept_the_library_accepts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of the header changed at random: never may a file pass here that safetensors refuses."""
    raw = bytearray(save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, dtype=np.int8)}))
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(st.sampled_from(b'0123456789{}[],:"ab \x00\xff'))
    raw = raw[: len(raw) - data.draw(st.sampled_from([0, 0, 1]))]
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(raw)
    try:
        ours: set[str] | None = set(read_tensor_header(path))
    except XpertError as error:
        assert isinstance(error, Corrupt)
        ours = None
    if ours is not None:
        try:
            theirs = set(load(bytes(raw)))
        except SafetensorError as error:
            pytest.fail(f"the library refuses it: {error}")
        assert ours == theirs
