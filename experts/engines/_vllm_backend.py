"""What xpert's vLLM engine asks of a vLLM, whether it runs in this process or answers over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xpert.protocols import TokenLogprob

__all__ = ["AdapterLost", "Ask", "Backend", "Chunk", "Served", "Stream"]


@dataclass(frozen=True)
class Served:
    """An adapter as vLLM knows it. `name` and `id` are made of its content, so that no cache can mistake it."""

    name: str
    id: int
    folder: Path


@dataclass(frozen=True)
class Ask:
    """One prompt for vLLM: token ids, sampling parameters in vLLM's names, and the adapter (None: the base alone)."""

    id: str
    prompt_ids: tuple[int, ...]
    fields: Mapping[str, Any]
    adapter: Served | None


@dataclass(frozen=True)
class Chunk:
    """Tokens that came together, with log-probabilities where asked for. `finished`: "stop" or "length" at the end."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finished: str | None = None


class AdapterLost(Exception):
    """vLLM does not know an adapter that was loaded before, as after a restart of its server."""


class Stream(Protocol):
    """One reply under way."""

    def __iter__(self) -> Iterator[Chunk]:
        """Ends after the chunk that is `finished`, or when closed. Raises XpertError, or AdapterLost at its start."""

    def close(self) -> None:
        """Tells vLLM to give up the request; any thread may call it, at any time, more than once."""


class Backend(Protocol):
    """A vLLM. Every method may be called from any thread, and waits until it is done."""

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""

    def load(self, adapter: Served) -> None:
        """Makes the adapter known; no error where it is known already. Raises BadInput where vLLM refuses it."""

    def unload(self, adapter: Served) -> None:
        """Makes vLLM forget the adapter; no error where it does not know it."""

    def open(self, ask: Ask) -> Stream: ...

    def score(self, ask: Ask, token: int) -> float:
        """Log-probability of `token` right after the prompt; `ask.fields` are `scoring_fields(token)`."""

    def close(self) -> None: ...
