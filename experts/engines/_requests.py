"""A request on its way through the engine: the lanes it takes in the batch, and what it has said so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from xpert.experts.engines._constraints import Guide
from xpert.experts.engines._lora_plan import GateEntry, RowMixture
from xpert.experts.engines._prefixes import Chain
from xpert.experts.engines._reply_text import ReplyText
from xpert.experts.engines._sampling import Chooser
from xpert.protocols import Decoder, EngineRequest, Piece, TokenLogprob

if TYPE_CHECKING:
    from xpert.experts.engines._bank import Handle, Lease

__all__ = ["Asked", "InFlight", "Lane"]


@dataclass(frozen=True)
class Asked:
    """What one lane is to be computed with, before its adapters are on the device. `experts` are sorted by key."""

    experts: tuple[tuple[Handle, float], ...] = ()
    gate: GateEntry | None = None
    bias: tuple[float, ...] = ()

    @property
    def handles(self) -> tuple[Handle, ...]:
        return tuple(handle for handle, _ in self.experts)

    @property
    def identity(self) -> tuple[object, ...]:
        """As `RowMixture.identity`."""
        experts = tuple((h.fingerprint, weight, h.key if self.gate else "") for h, weight in self.experts)
        return (self.gate.number if self.gate else 0, experts, self.bias)

    def with_adapters(self, lease: Lease, handles: Sequence[Handle]) -> RowMixture:
        """The row's mixture, its adapters taken from a lease of `handles`."""
        held = dict(zip(handles, lease.adapters, strict=True))
        return RowMixture(tuple((held[handle], weight) for handle, weight in self.experts), self.gate, self.bias)


@dataclass(eq=False)
class Lane:
    """One row of the batch, of the request `of`: its tokens in the cache are `length`, its prompt's blocks `chain`."""

    of: InFlight
    asked: Asked
    prompt: tuple[int, ...]
    chain: Chain
    mixture: RowMixture = field(default_factory=RowMixture)
    length: int = 0


@dataclass(eq=False)
class InFlight:
    """A request that waits or runs. `token` is the next to be fed, to all its lanes.

    lanes: the one its tokens are chosen in, and with `decoder` the one they are contrasted with. `handles`: all
    adapters it needs, which `lease` holds on the device while it runs. `guide`: what its constraint allows.
    """

    request: EngineRequest
    decoder: Decoder | None
    chooser: Chooser
    text: ReplyText
    guide: Guide | None = None
    lanes: tuple[Lane, ...] = ()
    lease: Lease | None = None
    token: int = 0
    made: int = 0
    finished: str | None = None
    told: list[TokenLogprob] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def handles(self) -> tuple[Handle, ...]:
        return tuple(dict.fromkeys(handle for lane in self.lanes for handle in lane.asked.handles))

    def say(self, token: int, ends: frozenset[int], context: int) -> Piece | None:
        """Takes the next token, and gives the piece of text that it completes, if any.

        Raises BadInput where the constraint became too costly to follow.
        """
        self.token = token
        self.made += 1
        text = self._text(token, ends, context)
        if not text and not self.finished:
            return None
        piece = Piece(self.id, text, tokens=tuple(self.told))
        self.told.clear()
        if self.finished:
            prompt = len(self.request.prompt_ids)
            piece = replace(piece, finished=self.finished, prompt_tokens=prompt, completion_tokens=self.made)
        return piece

    def _text(self, token: int, ends: frozenset[int], context: int) -> str:
        if token in ends:
            self.finished = "stop"
            return self.text.finish()
        text = self.text.add(token)
        whole = self.guide is not None and self.guide.advance(token)
        full = max(lane.length for lane in self.lanes) + 1 >= context
        if not self.text.stopped and (whole or self.made >= self.request.sampling.max_tokens or full):
            text += self.text.finish()
            self.finished = "stop" if whole else "length"
        if self.text.stopped:
            self.finished = "stop"
        return text
