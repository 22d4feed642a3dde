"""What a merge is made of: experts and mixtures as the user names them, their weights, and the shots' loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.experts.adapters import read_updates
from xpert.experts.mixture import ExpertStore, Mixture, MixtureExpert, assemble
from xpert.experts.mixture_file import load_mixture
from xpert.protocols import EngineRequest, MergeTask
from xpert.records import Shots
from xpert.registry.card import BaseModel

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["MergeSources", "read_sources", "shots_loss"]


@dataclass(frozen=True)
class MergeSources:
    """Experts of one base with their weights, and the mixture they came from if it was one alone."""

    experts: tuple[MixtureExpert, ...]
    weights: tuple[float, ...]
    mixture: Mixture | None = None

    @property
    def base(self) -> BaseModel:
        return self.mixture.base if self.mixture else self.experts[0].card.base

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(expert.key for expert in self.experts)

    def task(self, *, rank: int | None = None, seed: int = 0, **more: Any) -> MergeTask:
        """The experts' updates, read from their folders; no base model is needed."""
        updates = tuple(read_updates(expert.folder) for expert in self.experts)
        return MergeTask(self.keys, updates, self.weights, rank=rank, seed=seed, **more)


def read_sources(refs: Sequence[str], registry: ExpertStore | None = None) -> MergeSources:
    """`EXPERT[=WEIGHT]...`: expert folders, OWNER/NAME[@VERSION], or mixtures, whose experts all go in.

    Weights are taken as they are; a mixture's number multiplies its experts' own weights made to sum one. Where no
    number is given at all, all weights are made to sum one. Raises BadInput where some have a number and some have not,
    for experts of different bases, and for two of the same key.
    """
    if not refs:
        raise BadInput("there is no expert to merge", hint="name expert folders, or a mixture")
    named = [_weighted(ref) for ref in refs]
    bare = [ref for ref, weight in named if weight is None]
    if bare and len(bare) < len(named):
        raise BadInput(f"{bare[0]} has no weight, but others have one", hint="write EXPERT=WEIGHT for all, or for none")
    experts: list[MixtureExpert] = []
    weights: list[float] = []
    mixtures = []
    for ref, weight in named:
        mixture = load_mixture(ref, registry)
        mixtures.append(mixture)
        own = [expert.weight for expert in mixture.experts]
        experts += mixture.experts
        weights += own if weight is None else [weight * share / sum(own) for share in own]
    if bare:
        weights = [weight / sum(weights) for weight in weights]
    assemble(experts, router="fixed")  # of one base, no key twice
    alone = mixtures[0] if len(mixtures) == 1 and len(experts) > 1 else None
    return MergeSources(tuple(experts), tuple(weights), alone)


def _weighted(ref: str) -> tuple[str, float | None]:
    path, equals, number = ref.rpartition("=")
    if not equals or Path(ref).exists():
        return ref, None
    try:
        weight = float(number)
    except ValueError:
        raise BadInput(f"the weight {number!r} of {path} is not a number", hint="write EXPERT=0.5") from None
    if not math.isfinite(weight):
        raise BadInput(f"the weight of expert {path!r} is {weight}", hint="weights are finite numbers")
    return path, weight


def shots_loss(lm: LanguageModel, engine: Any, keys: Sequence[str], shots: Shots) -> Callable[[Sequence[float]], float]:
    """Weights -> mean NLL of an answer token of the shots, in nats, under the engine's weighted set of `keys`.

    No merge is made: a call costs one pass over the shots.
    """
    from xpert.chat_form import encode_examples

    encoded = encode_examples(lm.tokenizer, list(shots))
    answers = [tuple(ids[start:]) for ids, start in encoded]
    tokens = sum(map(len, answers))

    def loss(weights: Sequence[float]) -> float:
        experts = tuple((key, float(weight)) for key, weight in zip(keys, weights, strict=True) if weight)
        requests = [EngineRequest(str(n), tuple(ids[:start]), experts) for n, (ids, start) in enumerate(encoded)]
        logprobs = engine.continuation_logprobs(requests, answers)
        value = -sum(map(sum, logprobs)) / tokens
        if not math.isfinite(value):
            raise BadInput(f"the shots' loss is {value} at the weights {dict(experts)}", hint="lower the weights")
        return value

    return loss
