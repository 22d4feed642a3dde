"""The seams: each is a small Protocol, and each member of one is one file (see `plugins.py`).

Arrays: n pool rows, d embedding dimensions, k clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config
from xpert.progress import SILENT, Progress
from xpert.records import Budget, Message, Row, Shots

if TYPE_CHECKING:
    import torch

    from xpert.features import Features

__all__ = [
    "Aggregator",
    "Answer",
    "Ask",
    "Candidate",
    "Constraint",
    "Contrast",
    "Decoder",
    "Embedder",
    "EmbedderContext",
    "Engine",
    "EngineRequest",
    "Escalation",
    "Executor",
    "ExemplarOrderer",
    "ExemplarTask",
    "Exemplars",
    "Gate",
    "GatedExpert",
    "LearnedRouter",
    "ListScore",
    "LowRankUpdate",
    "MergeTask",
    "Merged",
    "Merger",
    "ModuleGate",
    "Observations",
    "Piece",
    "Question",
    "RoutableExpert",
    "Route",
    "RouteRequest",
    "Router",
    "RouterState",
    "RowPass",
    "RowWorker",
    "Sampling",
    "Scorer",
    "Selection",
    "Selector",
    "TokenLogprob",
    "Verdict",
    "Weigh",
    "Weighed",
    "WeightedExperts",
]

Floats = NDArray[np.float32]


# ── embedders ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EmbedderContext:
    """What an embedder may need besides texts. `argument` is the part of `st:FOLDER` after the colon."""

    argument: str | None = None
    base: str | None = None
    device: str = "auto"
    seed: int = 0


class Embedder(Protocol):
    """Texts -> float32 [n, d], L2-normalised rows (a text without content may give a zero row)."""

    identity: str
    """Names the model and its version; part of every cache key."""

    def __init__(self, context: EmbedderContext) -> None: ...

    def fit(self, texts: Sequence[str]) -> None:
        """Learns from the corpus; embedders that come trained do nothing here."""

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats: ...


# ── selectors ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Selection:
    """What a selector chose. All sequences follow `rows`, best first.

    rows [m] int64 pool indices without repeats; scores [m] float32, higher is better; reasons [m], a few words each;
    log: one mapping per round or step, for `--explain`; pool_scores [n] float32 where the selector scored the whole
    pool (NaN for rows it never scored), which the report uses to show the rows just missed.
    """

    rows: NDArray[np.int64]
    scores: Floats
    reasons: Sequence[str]
    log: Sequence[Mapping[str, Any]] = field(default_factory=list)
    pool_scores: Floats | None = None


class Selector(Protocol):
    """Pool features + shots + budget -> ordered rows with scores and reasons.

    Class attributes describe the method to `xpert methods`; `Options` are its parameters. `needs` names the features
    it reads, of {"shots", "answers", "embeddings", "clusters", "lengths", "base", "judge"}; a token budget always needs
    lengths. "answers" are those of the shots: a method without that need takes shots that are prompts alone. Where
    options change what is read, an instance has `needs` of its own.
    """

    Options: ClassVar[type[Config]]
    needs: ClassVar[frozenset[str]]
    cost: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    def select(
        self, features: Features, shots: Shots | None, budget: Budget, rng: np.random.Generator
    ) -> Selection: ...


# ── scorers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Scorer(Protocol):
    """A number per row, higher is better: what selectors rank by, draw by, or take as a bandit's reward.

    Lazy: `score` costs only the rows it is asked for. Every scorer is a method of `xpert select` as well, which takes
    the best rows. Class attributes as of a Selector. A scorer may also have `log() -> Sequence[Mapping[str, Any]]`,
    read after scoring: what it learned or counted, for `--explain`.
    """

    Options: ClassVar[type[Config]]
    needs: ClassVar[frozenset[str]]
    cost: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    def prepare(self, features: Features, shots: Shots | None, rng: np.random.Generator) -> None:
        """Once, before `score`: targets, warm-up training, counts."""

    def score(self, rows: NDArray[np.int64]) -> Floats:
        """float32 [m] for pool rows [m]; NaN where a row cannot be scored by rule, which `explain` states.

        Raises BadInput, naming the row, where a model gives something that is no number.
        """

    def explain(self, row: int) -> str:
        """A few words on the score of a row that was scored before."""


# ── exemplars ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ListScore:
    """How the base model does on rows with known answers when a list of exemplars stands in its prompt.

    log_likelihood <= 0: mean over the rows of the mean log-probability of an answer token, in nats; accuracy in
    [0, 1]: the share of rows that greedy decoding answers with exactly the known tokens.
    """

    log_likelihood: float
    accuracy: float


@dataclass(frozen=True)
class ExemplarTask:
    """What exemplars are ordered for: row i of the features' pool is shot i.

    `queries` are the prompts to be answered; where `score` is there they carry answers, and `score(rows)` tells how
    well the base model answers them with the shots `rows`, in that order, in its prompt.
    """

    shots: Shots
    features: Features
    queries: tuple[Row, ...] = ()
    score: Callable[[Sequence[int]], ListScore] | None = None


@dataclass(frozen=True)
class Exemplars:
    """An ordered list of shots for a prompt, the last one next to the question.

    rows [k] int64 shot indices without repeats; reasons [k], a few words each; score: the method's own value of the
    list, higher is better; log: one mapping per round. `query` is the one the list is for, None where it is for all.
    """

    rows: NDArray[np.int64]
    reasons: Sequence[str]
    score: float
    query: int | None = None
    log: Sequence[Mapping[str, Any]] = field(default_factory=list)


class ExemplarOrderer(Protocol):
    """Which shots stand in a prompt, and in what order.

    Class attributes as of a Selector; `needs` names what is read, of {"embeddings", "base", "queries", "score"}.
    """

    Options: ClassVar[type[Config]]
    needs: ClassVar[frozenset[str]]
    cost: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    def order(self, task: ExemplarTask, count: int, rng: np.random.Generator) -> list[Exemplars]:
        """Lists of `count` shots: one for all queries, or one per query in their order."""


# ── passes of a model over rows ──────────────────────────────────────────────────────────────────────────────────

RowWorker = Callable[[Sequence[Row]], dict[str, NDArray[Any]]]
"""Rows -> named arrays with one entry per row."""


class RowPass(Protocol):
    """What a model computes row by row (embeddings, losses, gradients), described so that it can be sent elsewhere.

    Picklable and small; `key` is plain JSON that determines the results, `shard_rows` how many rows are computed and
    kept at once.
    """

    @property
    def name(self) -> str: ...

    @property
    def shard_rows(self) -> int: ...

    @property
    def key(self) -> Mapping[str, Any]: ...

    def open(self, device: str) -> RowWorker:
        """Loads what is needed, where the work is done. A worker's results do not depend on what it did before."""


class Executor(Protocol):
    """Runs a pass over shards of rows: in process, or elsewhere."""

    def __init__(self, *, workers: int | None = None, device: str = "auto", progress: Progress = SILENT) -> None: ...

    def run(
        self, row_pass: RowPass, shards: Sequence[Callable[[], Sequence[Row]]]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """(index of the shard, its arrays) as they are finished, in any order, each once."""


# ── routers ──────────────────────────────────────────────────────────────────────────────────────────────────────

WeightedExperts = tuple[tuple[str, float], ...]
"""(expert key, weight) pairs, heaviest first; empty means the base model alone."""


@dataclass(frozen=True)
class Candidate:
    """One expert a router looked at. `score` is comparable within one router only."""

    expert: str
    score: float


@dataclass(frozen=True)
class Escalation:
    """A route's second stage: `experts` answer anew where the first answer's confidence is under `below`.

    Confidence is the geometric mean of the probabilities that the model gave the tokens of its answer, in [0, 1].
    """

    experts: WeightedExperts
    below: float


@dataclass(frozen=True)
class Route:
    """Where one prompt goes, and why. Weights are >= 0 and sum to 1, or there are none (the base model answers).

    chance: what a calibrated router expects of the first expert's answer, in [0, 1]; None where it is not calibrated.
    """

    experts: WeightedExperts
    candidates: tuple[Candidate, ...]
    reason: str
    escalation: Escalation | None = None
    chance: float | None = None


@dataclass(frozen=True)
class RouteRequest:
    """A prompt to be routed; `skill` is known in evaluations alone and read by the oracle only."""

    id: str
    messages: tuple[Message, ...]
    skill: str | None = None

    @property
    def prompt(self) -> str:
        return "\n\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class RoutableExpert:
    """What a router may know of an expert.

    `key` names it inside the mixture; `exemplars` are prompts it was trained for (its shots first), then its pilots:
    prompts it has served well. `skill_scores`: its profile (skill -> score, as far as it is profiled).
    `exemplar_skills` follow `exemplars` where they are known, else they are empty. `keyword_votes`: keyword -> (right,
    wrong) of its profile by keywords. `prototypes`: identity of an embedder -> (label of each centroid, centroids
    float32 [c, d] of length 1), as `xpert prototypes` made them.
    `costs`: "parameters" and "bytes" of its adapter, "seconds" per item of its profile, where known. pilots: how many
    of the exemplars, the last ones, are pilots.
    """

    key: str
    exemplars: tuple[str, ...]
    skills: tuple[str, ...] = ()
    skill_scores: Mapping[str, float] = field(default_factory=dict)
    exemplar_skills: tuple[str, ...] = ()
    description: str = ""
    keyword_votes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prototypes: Mapping[str, tuple[tuple[str, ...], Floats]] = field(default_factory=dict, compare=False)
    costs: Mapping[str, float] = field(default_factory=dict)
    pilots: int = 0


@dataclass(frozen=True)
class Observations:
    """What each expert and the base made of some prompts: what routers learn from and are measured by.

    subjects: the experts' keys in the mixture's order, then "base". scores [n, m]: what each answer earned, in [0, 1].
    losses [n, m]: mean nats per token of the reference answer under each subject. A request's `skill` is its category.
    confidences [n, m]: of each subject's own answer, in [0, 1] as in `Escalation`, NaN where it has no tokens; None
    where they were not observed.
    """

    requests: tuple[RouteRequest, ...]
    subjects: tuple[str, ...]
    scores: NDArray[np.float64]
    losses: NDArray[np.float64]
    confidences: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class RouterState:
    """What a router has learned: arrays by name, and what is no array as plain JSON."""

    tensors: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Router(Protocol):
    """(requests, experts) -> a route per request, in order.

    A class whose router could never choose some experts says so by a static `lacking(options, experts, *, device)`:
    key -> what that expert lacks, in words that follow "has no"; and by `remedy`, a hint. `xpert mix` leaves them out.
    """

    Options: ClassVar[type[Config]]

    def __init__(self, options: Any, *, seed: int = 0, device: str = "auto") -> None: ...

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Learns the experts; called once before `route`, and again when the set of experts changes."""

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]: ...


class LearnedRouter(Router, Protocol):
    """A router that is trained for a mixture by `xpert router train`. Its class binds `learned = True`.

    Made with a `state`, it is ready after `prepare`, which raises BadInput for an expert that the state does not know.
    Where some options make training needless, the class binds a static method `untrained(options) -> bool`.
    """

    learned: ClassVar[bool]

    def __init__(
        self, options: Any, *, state: RouterState | None = None, seed: int = 0, device: str = "auto"
    ) -> None: ...

    def learn(self, experts: Sequence[RoutableExpert], seen: Observations) -> RouterState:
        """Trains on what was observed; the same input and seed give the same state. The router is ready after."""


# ── requests and replies ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sampling(Config):
    """How the next token is chosen. Temperature 0 is greedy and ignores the seed.

    In this order: `repetition_penalty` divides the positive and multiplies the negative logits of tokens that the
    prompt or the reply holds; `temperature` divides all; then stay the `top_k` likeliest (0: all), of these the
    smallest set whose probability reaches `top_p`, and of these the tokens at least `min_p` times as likely as the
    likeliest. `logprobs`: how many alternatives are told per token, with the model's own log-probabilities (before
    all of that); 0 tells the chosen token's alone, None nothing.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Contrast:
    """A second next-token distribution that a reply's tokens are chosen against, step by step.

    decoder: a name of the seam `decoder`, with its `params`. The second distribution is the same model's under other
    `experts` (None: those of the request; (): the base model alone), or after another prompt (`prompt_ids`; None:
    the request's own).
    """

    decoder: str
    params: Mapping[str, Any] = field(default_factory=dict)
    experts: WeightedExperts | None = None
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Constraint:
    """What a reply must be, token by token. kind: "json" (any JSON object), "json_schema", "regex", "lark" or "choice"
    (one of several texts, as a JSON list); `text` is the schema, expression, grammar or list."""

    kind: str
    text: str = ""


@dataclass(frozen=True)
class EngineRequest:
    """A prompt as token ids, the weighted experts that answer it, and how to sample.

    Without `gate`, each expert's update is added with its weight at every token. With one (a key that the engine was
    given by `add_gate`), the gate weighs the experts named here at every token, and their weights here are strengths
    that multiply what it says. `gate_bias` is what the request knows of its experts, added to the gate's logits.
    """

    id: str
    prompt_ids: tuple[int, ...]
    experts: WeightedExperts = ()
    sampling: Sampling = Sampling()
    gate: str | None = None
    gate_bias: WeightedExperts = ()
    contrast: Contrast | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, and the likeliest alternatives (token, log-probability), best first."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of a reply. The last piece of a request has `finished` set ("stop" or "length") and the totals.

    `tokens`: those chosen since the last piece, where the request asked for log-probabilities.
    """

    request_id: str
    text: str
    finished: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: tuple[TokenLogprob, ...] = ()


# ── aggregators ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ask:
    """One reply that an aggregator wants: by `experts` ((): the base alone), to `messages`."""

    messages: tuple[Message, ...]
    experts: WeightedExperts
    sampling: Sampling


@dataclass(frozen=True)
class Weigh:
    """How likely `experts` find each of some continuations of the prompt `messages`."""

    messages: tuple[Message, ...]
    experts: WeightedExperts
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came of an `Ask`. `tokens` only where its sampling asks for log-probabilities."""

    text: str
    finished: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Weighed:
    """What came of a `Weigh`: per continuation the log-probabilities of its tokens, without an end of turn.

    An empty continuation has none. One that does not fit behind its prompt is cut to what the context holds.
    """

    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Question:
    """A routed prompt that an aggregator answers. `choices`: the texts among which the answer is, where it has any."""

    id: str
    messages: tuple[Message, ...]
    route: Route
    sampling: Sampling
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The one reply. `experts`: whose it is, heaviest first; `log`: the replies and votes behind it, as plain JSON."""

    text: str
    experts: WeightedExperts
    reason: str
    finished: str = "stop"
    log: Mapping[str, Any] = field(default_factory=dict)


class Aggregator(Protocol):
    """Several replies -> one. Asks in steps, so that a step of many questions can share its batches.

    several: whether it makes something of several experts' replies alone, so that a router which always names one
    expert makes no sense before it. Verdicts depend on the order of neither `experts` nor a route's.
    """

    Options: ClassVar[type[Config]]
    several: ClassVar[bool]
    cost: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, options: Any, *, seed: int = 0, device: str = "auto") -> None: ...

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Learns the mixture's experts; raises BadInput where it cannot work with them."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        """Yields steps; each is sent back what came of it, in its order. Keeps nothing between questions.

        Where a prompt leaves no room for a reply in the model's context, BadInput is thrown into the generator at that
        step, which may yield another in its stead.
        """


# ── gates ────────────────────────────────────────────────────────────────────────────────────────────────────────


class LowRankUpdate(Protocol):
    """One module's update y += (x a^T) b^T: a [rank, in], b [out, rank], the adapter's scale in b."""

    @property
    def a(self) -> torch.Tensor: ...

    @property
    def b(self) -> torch.Tensor: ...

    @property
    def rank(self) -> int: ...


class GatedExpert(Protocol):
    """What a gate may know of an expert: its updates by module name, and the gate vectors its folder holds.

    gate_tensors: "GATE.MODULE" -> tensor, such as "phatgoose.model.layers.0.self_attn.q_proj" -> [in].
    """

    @property
    def key(self) -> str: ...

    @property
    def modules(self) -> Mapping[str, LowRankUpdate]: ...

    @property
    def gate_tensors(self) -> Mapping[str, torch.Tensor]: ...


ModuleGate = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "torch.Tensor"]
"""(hidden [rows, tokens, in], allowed bool [rows, 1, e], bias [rows, 1, e] or None) -> weights [rows, tokens, e].

Weights are >= 0, and 0 wherever `allowed` is False. e counts the experts, or their ranks one after another where the
gate's grain is "rank" (`allowed` and `bias` stay per expert). A row without any allowed expert gets zeros. Each token
is decided by its own hidden state and its row's `allowed` and `bias` alone. Works under autograd too.
"""


class Gate(Protocol):
    """Token-level choice: inside a module, each token's hidden state -> the weights of the experts there.

    learned: "none" (made from the adapters), "expert" (vectors trained or measured once per expert, kept in its
    folder), "mixture" (one router trained for a fixed set of experts). grain: "expert" or "rank".
    """

    Options: ClassVar[type[Config]]
    learned: ClassVar[str]
    grain: ClassVar[str]
    cost: ClassVar[str]
    source: ClassVar[str]

    def __init__(
        self,
        options: Any,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        experts: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """`tensors` and `experts`: of a gate learned for a mixture, its router and the keys in the router's order."""

    def site(self, module: str) -> str:
        """The module whose input decides for `module`: itself, or one that the model computes before it."""

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        """The gate of one module over these experts, in this order.

        An expert without that module gets weight 0 there. Raises BadInput naming an expert that lacks what the gate
        needs.
        """


# ── mergers ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MergeTask:
    """Experts to be merged: `experts[i]` are the updates by module of the expert `keys[i]`, which weighs `weights[i]`.

    All are of one base, so that a module has one shape; ranks and modules may differ, and weights may be negative.
    rank: the largest that a merged module may have (None: the method's own choice). loss: weights -> mean loss of an
    answer token of the shots, in nats, under the experts so weighed. usage: each expert's share of the draws, and
    routing [prompts, experts]: how much each prompt asked for each expert; both where prompts were routed.
    """

    keys: tuple[str, ...]
    experts: tuple[Mapping[str, LowRankUpdate], ...]
    weights: tuple[float, ...]
    rank: int | None = None
    seed: int = 0
    loss: Callable[[Sequence[float]], float] | None = None
    usage: tuple[float, ...] | None = None
    routing: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Merged:
    """One adapter made of the experts `members` (their indices).

    weights: those of the exact sum of the members that `modules` stand for; the merge's error is measured against it.
    log: what the method found on its way, as plain JSON.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]
    modules: Mapping[str, LowRankUpdate]
    log: Mapping[str, Any] = field(default_factory=dict)


class Merger(Protocol):
    """Several weighted LoRA adapters -> one, or fewer.

    needs: what it reads of a task beside experts and weights, of {"loss", "usage"}. A result depends on neither the
    experts' order nor on those of weight zero.
    """

    Options: ClassVar[type[Config]]
    needs: ClassVar[frozenset[str]]
    cost: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    def merge(self, task: MergeTask) -> list[Merged]: ...


# ── decoders ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Decoder(Protocol):
    """Two next-token distributions -> the logits a token is chosen by."""

    Options: ClassVar[type[Config]]
    against: ClassVar[str]
    """What the second distribution differs in: "experts" or "prompt"."""
    source: ClassVar[str]

    def __init__(self, options: Any) -> None: ...

    def combine(self, main: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of both -> logits to choose by; -inf where a token is ruled out."""


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Engine(Protocol):
    """Runs batches in which every request has its own weighted experts."""

    def add_expert(self, key: str, folder: Path) -> None:
        """Loads an adapter; raises BadInput where it does not fit the base model or cannot be served."""

    def generate(
        self, requests: Iterable[EngineRequest], *, cancelled: Callable[[str], bool] | None = None
    ) -> Iterator[Piece]:
        """Pieces of all replies as they come. Raises NotFound for an expert key that was not added."""

    def continuation_logprobs(
        self, requests: Sequence[EngineRequest], continuations: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        """Log-probability of each token of one continuation per request, given its prompt and experts."""

    def prompt_logprobs(self, requests: Sequence[EngineRequest], alternatives: int = 0) -> list[list[TokenLogprob]]:
        """Of each request's prompt, every token but the first with its log-probability given those before it."""

    def embed(self, prompts: Sequence[tuple[int, ...]]) -> Floats:
        """float32 [n, d], rows of length 1: the base model's own view of each prompt, without experts."""
