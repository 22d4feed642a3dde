"""Reading a body: its size, its time, and what counts as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from xpert.errors import XpertError
from xpert.experts.server.body import decode_json, read_body, read_json
from xpert.experts.server.failures import Late, TooLarge
from xpert.experts.server.schema import ParameterError

Ask = Callable[..., Any]


def reader(read: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[Any]]:
    """An application that only reads its body, and what came of it."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(await read(Request(scope, receive), **options))

    return app, found


def test_a_body_comes_whole_in_whatever_pieces(ask: Ask) -> None:
    app, found = reader(read_json, most=100)
    assert ask(app, chunks=[b'{"a"', b"", b': "\xc3', b'\xa9"}']).raised is None
    assert found == [{"a": "é"}]


def test_a_body_that_says_it_is_too_large_is_dropped_as_it_comes(ask: Ask) -> None:
    """Who is still sending when the connection closes may never see the answer; who waits to send never begins."""
    read = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def count() -> Any:
            read.append(1)
            return await receive()

        await read_body(Request(scope, count), most=10)

    refused = ask(app, headers=[("content-length", "11")], chunks=[b"x" * 6, b"x" * 5]).raised
    assert isinstance(refused, TooLarge) and refused.http_status == 413 and len(read) == 2
    assert str(refused) == "the body is larger than 10 bytes"
    waiting = [("content-length", "9" * 5000), ("expect", "100-continue")]
    assert isinstance(ask(app, headers=waiting).raised, TooLarge) and len(read) == 2


def test_a_body_that_goes_on_for_ever_is_not_waited_for(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpert.experts.server.body.LINGER_SECONDS", 0.05)
    app, _ = reader(read_body, most=10, seconds=5)
    assert isinstance(ask(app, chunks=[b"x" * 11], ever=True).raised, TooLarge)


@pytest.mark.parametrize("told", [None, "3", "-1", "many", "１２", ""])
def test_a_body_is_counted_whatever_it_says(told: str | None, ask: Ask) -> None:
    app, _ = reader(read_body, most=10, seconds=5)
    headers = [("content-length", told)] if told is not None and told.isascii() else []
    assert isinstance(ask(app, headers=headers, chunks=[b"x" * 6, b"x" * 5], ever=True).raised, TooLarge)


def test_a_body_of_exactly_the_limit_is_taken(ask: Ask) -> None:
    app, found = reader(read_body, most=10)
    assert ask(app, headers=[("content-length", "10")], chunks=[b"x" * 6, b"x" * 4]).raised is None
    assert found == [b"x" * 10]


@pytest.mark.parametrize(("chunks", "pause"), [([b"x"], 0.0), ([b"x"] * 50, 0.02)], ids=["stops", "drips"])
def test_a_body_that_takes_too_long_is_given_up(chunks: list[bytes], pause: float, ask: Ask) -> None:
    app, _ = reader(read_body, most=1000, seconds=0.05)
    late = ask(app, chunks=chunks, pause=pause, ever=True).raised
    assert isinstance(late, Late) and late.http_status == 408
    assert str(late).startswith("the body did not arrive within 0.05 s. ")


def test_a_client_that_leaves_is_no_mistake_of_the_body(ask: Ask) -> None:
    app, _ = reader(read_body, most=1000)
    assert isinstance(ask(app, chunks=[b"x"], ever=True, leave_after=0).raised, ClientDisconnect)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the body is empty"),
        (b" ", "not valid JSON"),
        (b'{"a": 1', "not valid JSON: "),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": 1, "a": 2}', "a key stands twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\n"}', "Invalid control character"),
        (b'{"a": "\xff"}', "the body is not UTF-8: byte 7 is wrong"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "the body is not UTF-8: byte 0 is wrong"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_what_is_no_json_is_said(data: bytes, said: str) -> None:
    with pytest.raises(ParameterError) as refused:
        decode_json(data)
    assert said in str(refused.value) and refused.value.http_status == 400


def test_a_compressed_body_is_refused_by_its_name(ask: Ask) -> None:
    app, _ = reader(read_json, most=100)
    refused = ask(app, headers=[("content-encoding", "gzip")], chunks=[b"\x1f\x8b"]).raised
    assert isinstance(refused, ParameterError) and "compressed" in str(refused)
    assert ask(app, headers=[("content-encoding", "identity")], chunks=[b"{}"]).raised is None


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_every_value_comes_back(value: Any, plain: bool) -> None:
    assert decode_json(json.dumps(value, ensure_ascii=plain).encode()) == value


@given(st.binary())
def test_any_bytes_are_a_value_or_an_error_of_ours(data: bytes) -> None:
    try:
        value = decode_json(data)
    except XpertError:
        return
    json.dumps(value, allow_nan=False).encode()
