"""Making a calibration: a rising curve from a router's score to what its choice earns, and a bound under which the
base answers.

The curve is isotonic regression (pool adjacent violators, Barlow et al. 1972) of the chosen expert's observed score
on the router's score, as Zadrozny & Elkan 2002 (doi:10.1145/775047.775151) turn scores into probabilities. Its steps
are merged into few blocks, and each block is one knot: its mean score and mean chance.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.calibration import Calibration
from xpert.experts.mixture import Mixture
from xpert.experts.mixture_file import write_mixture
from xpert.experts.router_learning.cross_fitting import FOLDS, learns, routes_of
from xpert.experts.router_learning.measures import calibration_error, chosen_scores, obtained
from xpert.experts.router_learning.observations import Observed
from xpert.experts.routers._learning import untrained
from xpert.progress import SILENT, Progress
from xpert.storage import check_output

__all__ = ["CalibrateOptions", "best_bound", "bound_at_chance", "bound_at_share", "calibrate", "fit_curve"]

_FEWEST = 10
"""Routed prompts under which nothing can be said."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CalibrateOptions(Config):
    """Where the base answers; at most one of the three. Without any, no prompt is sent to it."""

    base_share: float | None = option(
        None, "send this share of all prompts to the base, those of the lowest scores", minimum=0, maximum=1
    )
    best: bool = option(False, "send to the base what raises the mean score, or nothing where that does not hold up")
    min_chance: float | None = option(None, "send to the base what has a lower chance than this", minimum=0, maximum=1)
    knots: int = option(12, "most knots of the curve", minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.base_share is not None) + self.best + (self.min_chance is not None) > 1:
            raise BadInput("give one of --base-share, --best and --min-chance, since each sets the same bound")


def calibrate(
    mixture: Mixture,
    observed: Observed,
    out: Path,
    options: CalibrateOptions | None = None,
    *,
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Mixture:
    """Writes the mixture with its calibration to `out`, and returns it; `observed` is `for_mixture`.

    A router that learned from these prompts is calibrated on what it says of those left out of its training. Raises
    BadInput where too few prompts are routed to an expert. Cost: routing (and training once a fold), O(n log n).
    """
    check_output(out)
    options = options or CalibrateOptions()
    if mixture.router_state is None and learns(mixture.router, mixture.router_params):
        raise untrained(mixture.router)  # which leaves a calibration out: it would be one of other scores
    routed = routes_of(mixture, observed, folds=folds, seed=seed, device=device, progress=progress)
    # A chance is of the first choice: a cascade's second stage has no score of its own. A bound leaves out both.
    first = obtained([dataclasses.replace(route, escalation=None) for route in routed.routes], observed.observations)
    whole = obtained(routed.routes, observed.observations)
    every = chosen_scores(routed.routes)
    known = np.isfinite(every)
    scores, earned = every[known], first.scores[known]
    base = observed.observations.scores[known, -1]
    if len(scores) < _FEWEST or len(np.unique(scores)) < 2:
        raise BadInput(
            f"router {mixture.router} gave {len(scores)} of {len(every)} prompts to an expert, with "
            f"{len(np.unique(scores))} different scores; a calibration needs {_FEWEST} prompts and two scores",
            where=str(observed.folder),
            hint="let another than the base be the weak"
            if any(route.escalation for route in routed.routes) and not len(scores)
            else "observe a larger suite, or take another router",
        )
    curve = fit_curve(scores, earned, knots=options.knots)
    held_out = _left_out_chances(scores, earned, options.knots, folds, seed)
    at_base = np.array([not route.experts for route in routed.routes])
    below, gain = _bound(options, curve, scores, whole.scores[known], base, len(every), int(at_base.sum()), folds, seed)
    sent = at_base.copy()
    if below is not None:
        sent |= every < below  # what has no score is not below it
    alone = observed.observations.scores[:, -1]
    figures: dict[str, Any] = {
        "router": mixture.router,
        "suite": observed.suite,
        "suite_fingerprint": observed.suite_fingerprint,
        "items": len(every),
        "n": len(scores),
        "routes": routed.how,
        "ece_before": calibration_error(np.clip(scores, 0, 1), earned),
        "ece_after": calibration_error(held_out, earned),
        "brier_after": float(np.mean((held_out - earned) ** 2)),
        "folds": folds,
        "base_share_before": float(np.mean(at_base)),
        "base_share": float(np.mean(sent)),
        "score_before": float(np.mean(whole.scores)),
        "score": float(np.mean(np.where(sent & ~at_base, alone, whole.scores))),
        **({"gain_left_out": gain} if gain is not None else {}),
    }
    made = dataclasses.replace(
        mixture,
        name=out.stem,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        calibration=dataclasses.replace(curve, reject_below=below, figures=figures),
    )
    write_mixture(out, made)
    return made


def fit_curve(scores: _Floats, earned: _Floats, *, knots: int = 12) -> Calibration:
    """The rising curve of earned [n], in [0, 1], on scores [n].

    Blocks of isotonic regression are merged, always the two neighbours whose union costs the least squared error,
    until each holds at least a fiftieth of the points and at most `knots` are left. Time O(n log n + b^2) for b blocks.
    """
    from sklearn.isotonic import IsotonicRegression

    order = np.argsort(scores, kind="stable")
    x, y = scores[order], earned[order]
    level = IsotonicRegression(y_min=0.0, y_max=1.0).fit(x, y).predict(x)
    starts = np.flatnonzero(np.diff(level, prepend=-np.inf) > 0)
    ends = np.append(starts[1:], len(x))
    blocks = [
        (end - start, float(x[start:end].sum()), float(y[start:end].sum()))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    fewest = max(2, math.ceil(len(x) / 50))
    while len(blocks) > 1:
        small = [place for place, (n, _, _) in enumerate(blocks) if n < fewest or not _rises(blocks, place)]
        if not small and len(blocks) <= knots:
            break
        pairs = {place for one in small for place in (one - 1, one) if 0 <= place < len(blocks) - 1}
        place = min(pairs or range(len(blocks) - 1), key=lambda left: (_cost(blocks[left], blocks[left + 1]), left))
        blocks[place : place + 2] = [_joined(blocks[place], blocks[place + 1])]
    chances = np.clip(np.maximum.accumulate([total / n for n, _, total in blocks]), 0.0, 1.0)
    return Calibration(tuple(total / n for n, total, _ in blocks), tuple(chances.tolist()))


def bound_at_share(scores: _Floats, count: int) -> float | None:
    """The bound under which `count` of the prompts with these scores [n] lie; None where that is none.

    Exact where scores differ; of equal scores all or none are sent, whichever is nearer.
    """
    if count <= 0 or not len(scores):
        return None
    # How many are sent by each bound that tells scores apart: those below a value, or all.
    values, firsts = np.unique(scores[np.argsort(scores)], return_index=True)
    counts = np.append(firsts, len(scores))
    place = int(np.argmin(np.abs(counts - count)))
    return _above(values, place) if place else None


def best_bound(scores: _Floats, earned: _Floats, base: _Floats) -> float | None:
    """The bound that most raises the mean score when the base answers below it; None where none raises it.

    Of equally good ones the lowest. Time O(n log n).
    """
    values, inverse = np.unique(scores, return_inverse=True)
    gain = np.concatenate([[0.0], np.cumsum(np.bincount(inverse, weights=base - earned))])
    place = int(np.argmax(np.round(gain, 9)))
    return _above(values, place) if place else None


def bound_at_chance(curve: Calibration, chance: float) -> float | None:
    """The least score at which the curve has reached `chance`; None where it lies there from its beginning on.

    Raises BadInput where it never does.
    """
    if curve.chances[0] >= chance:
        return None
    if curve.chances[-1] < chance:
        raise BadInput(
            f"no score reaches the chance {chance:g}; the highest is {curve.chances[-1]:.3f}",
            hint="lower --min-chance",
        )
    right = next(place for place, value in enumerate(curve.chances) if value >= chance)
    low, high = curve.chances[right - 1], curve.chances[right]
    part = (chance - low) / (high - low)
    return curve.scores[right - 1] + part * (curve.scores[right] - curve.scores[right - 1])


def _bound(
    options: CalibrateOptions,
    curve: Calibration,
    scores: _Floats,
    earned: _Floats,
    base: _Floats,
    prompts: int,
    at_base: int,
    folds: int,
    seed: int,
) -> tuple[float | None, float | None]:
    """The bound that was asked for, and with `best` what it gained a prompt on the folds left out. The router itself
    sends `at_base` of the prompts to the base."""
    if options.base_share is not None:
        return bound_at_share(scores, round(options.base_share * prompts) - at_base), None
    if options.min_chance is not None:
        return bound_at_chance(curve, options.min_chance), None
    if not options.best:
        return None, None
    gain = 0.0
    for part in _parts(len(scores), folds, seed):
        rest = np.setdiff1d(np.arange(len(scores)), part)
        below = best_bound(scores[rest], earned[rest], base[rest])
        if below is not None:
            sent = scores[part] < below
            gain += float(np.sum((base[part] - earned[part])[sent]))
    return (best_bound(scores, earned, base) if gain > 0 else None), gain / prompts


def _left_out_chances(scores: _Floats, earned: _Floats, knots: int, folds: int, seed: int) -> _Floats:
    """[n] what curves fitted without each prompt say of it."""
    chances = np.empty(len(scores))
    for part in _parts(len(scores), folds, seed):
        rest = np.setdiff1d(np.arange(len(scores)), part)
        curve = fit_curve(scores[rest], earned[rest], knots=knots)
        chances[part] = [curve.chance(score) for score in scores[part].tolist()]
    return chances


def _parts(count: int, folds: int, seed: int) -> list[NDArray[np.int64]]:
    drawn = np.random.default_rng(seed).permutation(count)
    return [np.sort(drawn[number::folds]) for number in range(folds)]


_Block = tuple[int, float, float]
"""How many points, the sum of their scores, the sum of what they earned."""


def _rises(blocks: Sequence[_Block], place: int) -> bool:
    """Whether a block's mean score is above that of the one before, as it is but for rounding."""
    return place == 0 or blocks[place][1] / blocks[place][0] > blocks[place - 1][1] / blocks[place - 1][0]


def _joined(left: _Block, right: _Block) -> _Block:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


def _cost(left: _Block, right: _Block) -> float:
    """How much the squared error grows when both get one level."""
    return left[0] * right[0] / (left[0] + right[0]) * (left[2] / left[0] - right[2] / right[0]) ** 2


def _above(values: Sequence[float] | _Floats, place: int) -> float:
    """A bound that keeps values[place:] and sends those before: between the two, so that it is on neither."""
    if place == 0:
        return float(values[0])
    last = float(values[place - 1])
    if place == len(values):
        return math.nextafter(last, math.inf)
    middle = (last + float(values[place])) / 2
    return middle if middle > last else float(values[place])
