"""Attacks, as tables: what a hostile folder, file, record, mixture or name may try, and what it meets.

Most are refused by `intake.py` and `content.py` on the way in, by `versions.py` when a record is read, and by
`checkout.py` on the way out.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from xpert.errors import BadInput, Corrupt, XpertError
from xpert.registry import content as content_module
from xpert.registry.content import check_content, open_inside
from xpert.registry.intake import read_document
from xpert.registry.store import Registry
from xpert.registry.strict_json import MOST_NESTED, check_json_text
from xpert.registry.tensor_header import read_tensor_header

ROOT = Path(__file__).resolve().parents[3]
Maker = Callable[..., Path]
Run = Callable[..., Result]


class Evil:
    """Unpickled, it would make a file in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("pwned", "w"))


def torch_zip() -> bytes:
    """As torch.save writes: a zip with a pickle inside."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    return stream.getvalue()


# ── pickles and archives, by content ─────────────────────────────────────────────────────────────────────────────

BODIES: dict[str, bytes] = {
    **{f"pickle of protocol {n}": pickle.dumps(Evil(), protocol=n) for n in range(6)},
    "pickle of plain values": pickle.dumps({"a": [1, 2]}, protocol=0),
    "pickle, and text after it": pickle.dumps(Evil(), protocol=0) + b"\nan innocent text\n",
    "torch archive": torch_zip(),
    "empty zip": b"PK\x05\x06" + bytes(18),
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "zstandard": b"\x28\xb5\x2f\xfd" + bytes(20),
    "tar": bytes(257) + b"ustar" + bytes(250),
    "program": b"\x7fELF" + bytes(60),
}
NAMES = ("notes.md", "state.json", "rows.jsonl", "chat.jinja", "page.html", "more.yaml", "vectors.safetensors", "x.bin")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("body", BODIES)
def test_pickles_and_archives_do_not_enter(
    body: str, name: str, registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = expert()
    (folder / name).write_bytes(BODIES[body])
    with pytest.raises(BadInput, match=r"refused|not a sound safetensors|not UTF-8|not a file of an expert") as caught:
        registry.publish(folder, "acme/a")
    assert name in str(caught.value) and not registry.folder.exists() and not (tmp_path / "pwned").exists()


def both_kinds() -> bytes:
    """Sound safetensors, and a pickle program too: the header's length begins with the opcode of a short text, more
    such opcodes within the header jump from one to the next, and the last one into the tensor, where the program is."""
    first, jump, size = 28, 126, 400
    length = 0x55 | first << 8
    head = struct.pack("<Q", length) + b'{"__metadata__":{"a":"'
    head += b"x" * (2 + first - len(head))
    tail = f'"}},"t":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    while len(head) + 2 + jump < 8 + length:
        head += b"U" + bytes([jump]) + b"x" * jump
    landing = len(head) + 2 + jump
    head += b"U" + bytes([jump])
    head += tail.rjust(8 + length - len(head), b"x") if len(tail) <= 8 + length - len(head) else b""
    assert len(head) == 8 + length
    program = pickle.dumps(Call(), protocol=2)
    return head + (bytes(landing - len(head)) + program).ljust(size, b"\0")


class Call:
    """Unpickled, it is the number of this process: a function was called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.getpid, ())


def test_a_file_that_is_safetensors_and_pickle(registry: Registry, expert: Maker) -> None:
    folder = expert()
    path = folder / "both.safetensors"
    path.write_bytes(both_kinds())
    assert load_file(path)["t"].shape == (400,) and set(read_tensor_header(path)) == {"t"}
    assert pickle.loads(path.read_bytes()) == os.getpid()
    with pytest.raises(BadInput, match="refused: it is a pickle"):
        registry.publish(folder, "acme/a")


def test_no_sound_file_is_taken_for_a_pickle(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    """Headers of every length: 128, 384, 640 ... bytes begin as a binary pickle does."""
    path = tmp_path / "a.safetensors"
    lengths = set()
    for count in range(1, 260):
        path.write_bytes(save({"a." * count: np.ones(2, dtype=np.float32)}))
        lengths.add(int.from_bytes(path.read_bytes()[:8], "little"))
        with path.open("rb") as stream:
            check_content(stream, ".safetensors", where="a")
    assert {128, 384} <= lengths
    folder = expert()
    (folder / "notes.md").write_text(". begins with a dot, as the shortest of pickles does\n")
    assert registry.publish(folder, "acme/a").version == 1


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────


def tensors(header: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start: int, end: int, shape: str | None = None, dtype: str = "U8") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape or f"[{end - start}]"},"data_offsets":[{start},{end}]}}'


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "length is impossible"),
    "length 2^63": (tensors("{}", length=1 << 63), "length is impossible"),
    "length 2^64 - 1": (tensors("{}", length=(1 << 64) - 1), "length is impossible"),
    "longer than the file": (tensors("{}", length=3), "length is impossible"),
    "no object": (tensors("[]"), "not JSON"),
    "blank before it": (tensors(" {}"), "not JSON"),
    "overlapping": (tensors(f'{{"a":{entry(0, 4)},"b":{entry(2, 6)}}}', bytes(6)), "overlap"),
    "one on the other": (tensors(f'{{"a":{entry(0, 4)},"b":{entry(0, 4)}}}', bytes(4)), "overlap"),
    "a gap": (tensors(f'{{"a":{entry(0, 2)},"b":{entry(4, 6)}}}', bytes(6)), "gaps"),
    "beyond the file": (tensors(f'{{"a":{entry(0, 1 << 40)}}}', bytes(4)), "holds 4 bytes"),
    "bytes after it": (tensors(f'{{"a":{entry(0, 4)}}}', bytes(9)), "holds 9 bytes"),
    "backwards": (tensors(f'{{"a":{entry(4, 0, "[4]")}}}', bytes(4)), "as many bytes"),
    "negative": (tensors(f'{{"a":{entry(-4, 0, "[4]")}}}', bytes(4)), "no sound shape"),
    "a name twice": (tensors(f'{{"a":{entry(0, 4)},"a":{entry(0, 4)}}}', bytes(4)), "twice"),
    "a field twice": (tensors('{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "NaN": (tensors('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "no sound shape"),
    "a fraction": (tensors('{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', bytes(4)), "no sound shape"),
    "true": (tensors('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1)), "no sound shape"),
    "a number of 5,000 digits": (tensors(f'{{"a":{entry(0, 0, "[" + "9" * 5000 + "]")}}}'), "not a sound"),
    "a shape that overflows": (tensors(f'{{"a":{entry(0, 0, "[4294967296,4294967296]")}}}'), "as many bytes"),
    "deep nesting": (tensors("{" + '"a":{' * 100_000), "not a sound"),
    "metadata that is no text": (tensors('{"__metadata__":{"a":1}}'), "metadata"),
    "unknown type": (tensors(f'{{"a":{entry(0, 4, dtype="OBJECT")}}}', bytes(4)), "unknown type"),
    "not UTF-8": (tensors(b'{"\xff":{}}'), "not a sound"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, registry: Registry, expert: Maker) -> None:
    folder = expert()
    body, said = HEADERS[case]
    (folder / "more.safetensors").write_bytes(body)
    with pytest.raises(Corrupt, match=said):
        registry.publish(folder, "acme/a")


def test_a_header_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 1 << 40)
    with pytest.raises(Corrupt, match="length is impossible"):
        read_tensor_header(path)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS: dict[str, str] = {
    "NaN": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "a number out of range": '{"a": 1e999}',
    "a number of 5,000 digits": '{"a": ' + "9" * 5_000 + "}",
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "a little too deep": "[" * (MOST_NESTED + 1) + "]" * (MOST_NESTED + 1),
    "a key twice": '{"a": 1, "a": 2}',
    "half of a pair": '{"a": "\\ud800"}',
    "half of a pair as key": '{"\\uDFFF": 1}',
    "raw control character": '{"a": "\x1b[2J"}',
    "two values": "{} {}",
    "a text without end": '"' + '\\"' * 300_000,
}


@pytest.mark.parametrize("where", ["expert.json", "adapter_config.json", "more.json", "rows.jsonl", "mixture"])
@pytest.mark.parametrize("case", TEXTS)
def test_json_of_others(case: str, where: str, registry: Registry, expert: Maker, tmp_path: Path) -> None:
    folder = expert()
    target = tmp_path / "mixture.json" if where == "mixture" else folder / where
    target.write_text(TEXTS[case])
    with pytest.raises(Corrupt, match="not valid JSON"):
        registry.publish(target if where == "mixture" else folder, "acme/a")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(_JSON, st.booleans())
@example("\U0001f600", True)
@example({"[[[": '"]}'}, False)
def test_what_is_json_passes(value: object, ascii_only: bool) -> None:
    assert check_json_text(json.dumps(value, ensure_ascii=ascii_only)) == value


def test_nesting_is_counted_outside_of_texts() -> None:
    brackets = "[{" * 500
    assert check_json_text(json.dumps([brackets, {brackets + '\\"': 1}])) == [brackets, {brackets + '\\"': 1}]
    deep: Any = 1
    for _ in range(MOST_NESTED):
        deep = [deep]
    assert check_json_text(json.dumps(deep)) == deep


# ── links, pipes, sizes ──────────────────────────────────────────────────────────────────────────────────────────

ODD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to a secret": (lambda f: (f / "notes.md").symlink_to("/etc/passwd"), "a symbolic link"),
    "a link to a file beside it": (lambda f: (f / "notes.md").symlink_to("README.md"), "a symbolic link"),
    "a link to nothing": (lambda f: (f / "notes.md").symlink_to("/nowhere"), "a symbolic link"),
    "a link to itself": (lambda f: (f / "notes.md").symlink_to("notes.md"), "a symbolic link"),
    "a link to a folder": (lambda f: (f / "more").symlink_to("/etc"), "a symbolic link"),
    "a link to the folder itself": (lambda f: (f / "more").symlink_to("."), "a symbolic link"),
    "a hidden link": (lambda f: (f / ".more").symlink_to("/etc"), "a symbolic link"),
    "a link for the card": (lambda f: _as_link(f / "expert.json"), "a symbolic link"),
    "a link for the weights": (lambda f: _as_link(f / "adapter_model.safetensors"), "a symbolic link"),
    "a link deep inside": (lambda f: ((f / "a" / "b").mkdir(parents=True), (f / "a/b/c.md").symlink_to("x")), "a symb"),
    "a pipe": (lambda f: os.mkfifo(f / "notes.md"), "not a plain file"),
    "a pipe for the card": (lambda f: ((f / "expert.json").unlink(), os.mkfifo(f / "expert.json")), "expert"),
    "a sparse text": (lambda f: _sparse(f / "notes.md", 1 << 42), "the most is"),
    "a sparse card": (lambda f: _sparse(f / "expert.json", 20 << 20), "more than"),
    "a sparse configuration": (lambda f: _sparse(f / "adapter_config.json", 1 << 42), "the most is"),
    "sparse tensors": (lambda f: _sparse(f / "more.safetensors", 1 << 42), "more than 4 GiB"),
    "very many files": (lambda f: [(f / f"{n}.md").write_text("x") for n in range(1_001)], "more than 1,000 files"),
}


def _as_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize("case", ODD_FILES)
def test_odd_files(case: str, registry: Registry, expert: Maker) -> None:
    folder = expert()
    act, said = ODD_FILES[case]
    act(folder)
    with pytest.raises(BadInput, match=said):
        registry.publish(folder, "acme/a")
    assert not registry.folder.exists()


def test_a_folder_given_through_a_link_and_hard_links_are_fine(registry: Registry, expert: Maker) -> None:
    folder = expert()
    os.link(folder / "README.md", folder / "notes.md")
    (folder.parent / "link").symlink_to(folder)
    assert registry.publish(folder.parent / "link", "acme/a").version == 1


def test_a_socket_and_a_device(registry: Registry, expert: Maker) -> None:
    import socket

    folder = expert("e")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        try:
            listening.bind("notes.md")
        finally:
            os.chdir(here)
        with pytest.raises(BadInput, match="not a plain file"):
            registry.publish(folder, "acme/a")
    with pytest.raises(XpertError):
        registry.publish("/dev/zero", "acme/a")
    with pytest.raises(BadInput, match="not a plain file"):
        read_document(Path("/dev/zero"))


SWAPS: dict[str, Callable[[Path], object]] = {
    "the file": lambda f: ((f / "a" / "n.md").unlink(), (f / "a" / "n.md").symlink_to("/etc/passwd")),
    "its folder": lambda f: ((f / "a").rename(f.parent / "b"), (f / "a").symlink_to(f.parent / "b")),
    "a pipe": lambda f: ((f / "a" / "n.md").unlink(), os.mkfifo(f / "a" / "n.md")),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_link_put_there_after_the_look(
    swap: str, registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was looked through and found sound; then, before its files are read, one changes."""
    folder = expert()
    (folder / "a").mkdir()
    (folder / "a" / "n.md").write_text("harmless")
    from xpert.registry import intake

    def swapped(root: Path, name: str) -> Any:
        if name == "a/n.md":
            SWAPS[swap](folder)
        return open_inside(root, name)

    monkeypatch.setattr(intake, "open_inside", swapped)
    with pytest.raises(BadInput, match=r"a symbolic link|not a plain file"):
        registry.publish(folder, "acme/a")


def test_a_file_exchanged_after_it_was_judged(
    registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was judged is what is hashed, and what is hashed is what is stored: a file put there later is refused."""
    folder = expert()
    (folder / "notes.md").write_text("harmless")
    from xpert.registry import intake

    def judged(stream: Any, suffix: str, *, where: str) -> Any:
        found = check_content(stream, suffix, where=where)
        if where.endswith("notes.md"):
            (folder / "notes.md").unlink()
            (folder / "notes.md").write_bytes(pickle.dumps(Evil(), protocol=0))
        return found

    monkeypatch.setattr(intake, "check_content", judged)
    with pytest.raises(BadInput, match="changed while it was being published"):
        registry.publish(folder, "acme/a")
    assert not list((registry.folder / "records").rglob("*.json"))


def test_a_long_pickle_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of marks is a pickle program of as many steps; they are walked through, not gathered."""
    import tracemalloc

    data = b"(" * 300_000
    tracemalloc.start()
    try:
        assert not content_module._runs_as_pickle(io.BytesIO(data), len(data))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
