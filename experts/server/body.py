"""The body of a request: no larger, no slower and no odder than the server wants it.

A body that says it is too large is refused before a byte of it is read; one that does not say is counted as it comes.
One limit covers the whole time that a body takes, so that a client which sends a byte now and then cannot hold a
connection. What is decoded is JSON as the standard has it: no NaN, no key twice, no half of a surrogate pair, and no
nesting deeper than 64, since each of these breaks something later on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from starlette.requests import Request

from xpert.experts.server.failures import Late, TooLarge
from xpert.experts.server.schema import ParameterError
from xpert.registry.strict_json import check_json_text

__all__ = ["BODY_SECONDS", "decode_json", "read_body", "read_json"]

BODY_SECONDS = 60.0
"""Seconds that a body may take: 8 MiB at 1.1 Mbit/s."""

LINGER_SECONDS = 2.0
"""Seconds for which the rest of a body that is too large is still read, and dropped."""


async def read_json(request: Request, *, most: int, seconds: float = BODY_SECONDS) -> Any:
    """The decoded body. Raises as `read_body` and `decode_json` do."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ParameterError("the body is compressed, which is not supported", None, hint="send it as it is")
    return decode_json(await read_body(request, most=most, seconds=seconds))


async def read_body(request: Request, *, most: int, seconds: float = BODY_SECONDS) -> bytes:
    """At most `most` bytes. Raises TooLarge, Late after `seconds`, and Starlette's ClientDisconnect.

    After TooLarge and Late the connection is of no more use, since part of the body may still be on its way.
    """
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told[:20]) > most:
        await _let_pass(request)
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(seconds) as limit:
            async for chunk in request.stream():
                if len(data) > most:
                    continue  # what is still on its way is dropped: see `_let_pass`
                data += chunk
                if len(data) > most:
                    limit.reschedule(asyncio.get_running_loop().time() + LINGER_SECONDS)
    except TimeoutError:
        if len(data) <= most:
            raise Late(f"the body did not arrive within {seconds:g} s", hint=f"{len(data):,} bytes of it did") from None
    if len(data) > most:
        raise _too_large(most)
    return bytes(data)


async def _let_pass(request: Request) -> None:
    """Drops what is still on its way, for a moment: a client that is sending when the connection closes may never see
    the answer. One that goes on for longer sees a broken connection; one that waits to be told to send is not."""
    if request.headers.get("expect", "").lower() == "100-continue":
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await request.receive()).get("more_body", False):
                pass


def decode_json(data: bytes) -> Any:
    """Raises ParameterError saying where the body is no JSON. Cost: two passes over the text."""
    if not data:
        raise ParameterError("the body is empty", None, hint="send a JSON object")
    try:
        return check_json_text(data.decode())
    except UnicodeDecodeError as error:
        raise ParameterError(f"the body is not UTF-8: byte {error.start:,} is wrong", None) from None
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"the body is not valid JSON: {error}", None) from None


def _too_large(most: int) -> TooLarge:
    shown = f"{most >> 20} MiB" if most >= 1 << 20 and most % (1 << 20) == 0 else f"{most:,} bytes"
    return TooLarge(f"the body is larger than {shown}")
