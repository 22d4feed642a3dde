"""Single tokens as clients see them beside their log-probabilities: a text, and its bytes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

__all__ = ["TokenTexts"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """id -> (text, bytes). A token that is no whole character has the text `bytes:\\xe2\\x96`, as OpenAI writes it.

    Knows byte-level BPE and the byte tokens of SentencePiece. May be used from one thread at a time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._of_character = _byte_of_character()
        self.of = lru_cache(maxsize=65_536)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text, text.encode()
        raw = self._raw(token)
        return (text, text.encode()) if raw is None else (_shown(raw), raw)

    def _raw(self, token: int) -> bytes | None:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return None
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        try:
            return bytes(self._of_character[character] for character in piece)
        except KeyError:
            return None


def _shown(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, others for characters from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {chr(byte): byte for byte in plain}
    for number, byte in enumerate(byte for byte in range(256) if byte not in plain):
        found[chr(256 + number)] = byte
    return found
