"""Routers against the oracle, on observed prompts: nothing is generated, since every answer has been observed.

The oracle takes, prompt by prompt, the subject whose answer scored best. Regret is what a router leaves of that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.calibration import Calibration
from xpert.experts.evaluate import bootstrap
from xpert.experts.mixture import Mixture, router_options
from xpert.experts.router_learning.cross_fitting import FOLDS, Routed, learns, routes_of
from xpert.experts.router_learning.measures import (
    Bin,
    Obtained,
    RiskCoverage,
    calibration_error,
    chosen_scores,
    obtained,
    reliability,
    risk_coverage,
)
from xpert.experts.router_learning.observations import Observed
from xpert.experts.subjects import RANDOM_SEEDS
from xpert.progress import SILENT, Progress
from xpert.protocols import Observations, Route
from xpert.registry.card import Interval

__all__ = ["Chances", "RouterChoice", "RouterEvaluation", "RouterFigures", "evaluate_routers"]

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RouterChoice:
    """A router to be evaluated in place of the mixture's own."""

    name: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        told = ",".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}:{told}" if told else self.name

    @classmethod
    def parse(cls, text: str) -> RouterChoice:
        """`NAME` or `NAME:KEY=VALUE,KEY=VALUE`; a piece without `=` goes on with the value before it.

        Raises NotFound or BadInput naming an unknown router or parameter.
        """
        name, _, rest = text.partition(":")
        params: dict[str, str] = {}
        for piece in rest.split(",") if rest else ():
            key, equals, value = piece.partition("=")
            if equals and key.strip():
                params[key.strip()] = value.strip()
            elif params:
                params[next(reversed(params))] += f",{piece}"
            else:
                raise BadInput(f"--router {text!r} is not NAME:KEY=VALUE,...")
        router_options(name.strip(), params)
        return cls(name.strip(), params)


@dataclass(frozen=True)
class Chances:
    """How far a calibrated router's chances are true. `in_sample`: the calibration was made on these very prompts."""

    error: float
    bins: tuple[Bin, ...]
    n: int
    in_sample: bool


@dataclass(frozen=True)
class RouterFigures:
    """One router, or control, on n observed prompts.

    score: what its choices earned; accuracy: share of prompts whose subject scored as the best one, and
    where_it_matters: of those on which not all subjects scored the same (None: there are none). regret: what the oracle
    earned more. to_base, escalated: shares of prompts that the base answered in the end, and that a second
    stage answered. answers: generated a prompt; parameters: of adapters, in millions, that a prompt's answers passed
    through (None where sizes are unknown). milliseconds: of routing, a prompt.
    """

    name: str
    how: str
    n: int
    score: Interval
    accuracy: float
    where_it_matters: float | None
    regret: Interval
    to_base: float
    escalated: float
    answers: float
    parameters: float | None
    milliseconds: float | None = None
    subjects: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chances: Chances | None = None
    risk: RiskCoverage | None = None
    front: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RouterEvaluation:
    """Routers first, in the order asked for, then the controls; all on the same prompts, on `differing` of which not
    all subjects scored the same."""

    mixture: str
    suite: str
    oracle: Interval
    differing: int
    routers: tuple[RouterFigures, ...]
    controls: tuple[RouterFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "mixture": self.mixture,
            "suite": self.suite,
            "items": self.oracle.n,
            "oracle": vars(self.oracle),
            "differing": self.differing,
            "routers": [one.to_dict() for one in self.routers],
            "controls": [one.to_dict() for one in self.controls],
        }


def evaluate_routers(
    mixture: Mixture,
    observed: Observed,
    routers: Sequence[RouterChoice] = (),
    *,
    held_out: Observed | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> RouterEvaluation:
    """The mixture's own router, others in its place, and controls: random (three seeds), each constant choice.

    With `held_out` all are measured on those prompts, and `observed` is what routers are trained on; else routers that
    learn are cross-fitted on `observed`. `observed` and `held_out` are `for_mixture`. Cost: routing, and the training
    of routers that learn, once or once a fold.
    """
    measured = held_out or observed
    bench = _Bench(mixture, measured, seed)
    found: list[RouterFigures] = []
    own = RouterChoice(mixture.router, mixture.router_params)
    untrained = learns(own.name, own.params) and mixture.router_state is None
    variants = [(choice.label, _behind(mixture, choice)) for choice in routers]
    if not untrained or not routers:
        variants.insert(0, (f"{own.label} (as mixed)", mixture))
    for name, variant in variants:
        routed = routes_of(
            variant, observed, held_out=held_out, folds=folds, seed=seed, device=device, progress=progress
        )
        found.append(bench.routed(name, variant, routed))
    differing = int(bench.differ.sum())
    return RouterEvaluation(
        mixture.name, measured.suite, bench.oracle, differing, tuple(found), tuple(bench.controls())
    )


def _behind(mixture: Mixture, choice: RouterChoice) -> Mixture:
    return dataclasses.replace(
        mixture, router=choice.name, router_params=dict(choice.params), router_state=None, calibration=None
    )


class _Bench:
    """The observed prompts, on which all are measured alike."""

    def __init__(self, mixture: Mixture, observed: Observed, seed: int) -> None:
        self.mixture, self.observed, self.seed = mixture, observed, seed
        self.seen: Observations = observed.observations
        self.best: _Floats = self.seen.scores.max(axis=1)
        self.differ = self.best > self.seen.scores.min(axis=1)
        self.oracle = bootstrap(self.best.tolist(), seed)
        sizes = [expert.routable().costs.get("parameters") for expert in mixture.experts]
        self.sizes = None if None in sizes else np.array([*(float(size or 0) for size in sizes), 0.0]) / 1e6

    def routed(self, name: str, mixture: Mixture, routed: Routed) -> RouterFigures:
        calibration = mixture.calibration
        routes = routed.routes if calibration is None else [calibration.applied(route) for route in routed.routes]
        got = obtained(routes, self.seen)
        figures = self._figures(name, routed.how, got, self._parameters(routes, got))
        return dataclasses.replace(
            figures,
            milliseconds=1000 * routed.seconds / len(routes),
            chances=None if calibration is None else self._chances(calibration, routes, routed.routes),
            risk=risk_coverage(chosen_scores(routes), got.scores, self.seen.scores[:, -1]),
            front=_front(routed.router),
        )

    def controls(self) -> list[RouterFigures]:
        """The base alone, the best single expert in hindsight, random routing, and the oracle."""
        base = len(self.seen.subjects) - 1
        means = self.seen.scores[:, :base].mean(axis=0)
        single = int(np.argmax(means))
        found = [
            self._constant("base alone", base),
            self._constant(f"best expert in hindsight: {self.seen.subjects[single]}", single),
            self._random(),
        ]
        oracle = self.seen.scores.argmax(axis=1)
        # Where the base is as good as the best expert, it is the oracle's choice.
        oracle[self.seen.scores[:, base] == self.best] = base
        found.append(self._choices("oracle: best answer of each prompt", oracle))
        return found

    def _constant(self, name: str, subject: int) -> RouterFigures:
        return self._choices(name, np.full(len(self.best), subject))

    def _choices(self, name: str, subjects: NDArray[np.int64]) -> RouterFigures:
        rows = np.arange(len(subjects))
        ones, never = np.ones(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=bool)
        got = Obtained(subjects, self.seen.scores[rows, subjects], ones, never)
        return self._figures(name, "control", got, None if self.sizes is None else float(self.sizes[subjects].mean()))

    def _random(self) -> RouterFigures:
        """Every prompt's mean over three seeds."""
        plugin = plugins.load("router", "random")
        draws = []
        for number in range(RANDOM_SEEDS):
            router = plugin(plugin.Options(), seed=self.seed + number)
            router.prepare([expert.routable() for expert in self.mixture.experts])
            draws.append(obtained(router.route(self.seen.requests), self.seen))
        subjects = np.concatenate([got.subjects for got in draws])
        scores = np.mean([got.scores for got in draws], axis=0)
        single = self._figures("random", "control", draws[0], None)
        right = np.array([got.scores == self.best for got in draws])
        return dataclasses.replace(
            single,
            name=f"random, mean of {RANDOM_SEEDS} seeds",
            score=bootstrap(scores.tolist(), self.seed),
            accuracy=float(right.mean()),
            where_it_matters=float(right[:, self.differ].mean()) if self.differ.any() else None,
            regret=bootstrap((self.best - scores).tolist(), self.seed),
            parameters=None if self.sizes is None else float(self.sizes[subjects].mean()),
            subjects={},
        )

    def _figures(self, name: str, how: str, got: Obtained, parameters: float | None) -> RouterFigures:
        base = len(self.seen.subjects) - 1
        counts = np.bincount(got.subjects, minlength=base + 1).tolist()
        return RouterFigures(
            name=name,
            how=how,
            n=len(self.best),
            score=bootstrap(got.scores.tolist(), self.seed),
            accuracy=float(np.mean(got.scores == self.best)),
            where_it_matters=float(np.mean((got.scores == self.best)[self.differ])) if self.differ.any() else None,
            regret=bootstrap((self.best - got.scores).tolist(), self.seed),
            to_base=float(np.mean(got.subjects == base)),
            escalated=float(np.mean(got.escalated)),
            answers=float(np.mean(got.answers)),
            parameters=parameters,
            subjects=dict(zip(self.seen.subjects, counts, strict=True)),
        )

    def _parameters(self, routes: Sequence[Route], got: Obtained) -> float | None:
        """Of all adapters that a prompt's answers passed through, both stages of a cascade."""
        if self.sizes is None:
            return None
        size = dict(zip(self.seen.subjects, self.sizes.tolist(), strict=True))
        total = 0.0
        for route, escalated in zip(routes, got.escalated.tolist(), strict=True):
            second = route.escalation.experts if escalated and route.escalation is not None else ()
            total += sum(size[key] for key, _ in (*route.experts, *second))
        return total / len(routes)

    def _chances(self, calibration: Calibration, routes: Sequence[Route], raw: Sequence[Route]) -> Chances | None:
        """Of the experts that the router chose, also where the calibration then sent the prompt to the base."""
        chosen = obtained([dataclasses.replace(route, escalation=None) for route in raw], self.seen)
        told = np.array([math.nan if route.chance is None else route.chance for route in routes])
        known = np.isfinite(told)
        if not known.any():
            return None
        chances, scores = told[known], chosen.scores[known]
        made_on = calibration.figures.get("suite_fingerprint")
        return Chances(
            calibration_error(chances, scores),
            tuple(reliability(chances, scores)),
            len(chances),
            in_sample=made_on == self.observed.suite_fingerprint,
        )


def _front(router: object) -> Sequence[Mapping[str, Any]]:
    """What a router tells of its trade of quality for cost, where it does."""
    tell = getattr(router, "pareto", None)
    return [dict(point) for point in tell()] if callable(tell) else ()
