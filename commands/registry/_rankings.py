"""How rankings look in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from xpert.commands.registry._shared import size_shown, table
from xpert.printable import printable
from xpert.registry.ranking.contests import Contests
from xpert.registry.ranking.leaderboard import UNITS, Leaderboard, Ranking, Standing
from xpert.registry.ranking.pareto import Front
from xpert.registry.versions import base_shown

__all__ = ["contests_shown", "leaderboard_shown"]

COLUMNS = 5
POINTS = {"borda": "POINTS", "kemeny": "AHEAD OF", "mean": "MEAN", "bradley-terry": "STRENGTH"}


def leaderboard_shown(found: Leaderboard) -> str:
    """The order, the scores it was made of, what was asked for besides, and notes."""
    matrix = found.matrix
    what = "scores" if matrix.over == "expert" else "gains over the base"
    count = f"{len(matrix.systems)} expert{'s' if len(matrix.systems) != 1 else ''}"
    tasks = f"{len(matrix.tasks)} task{'s' if len(matrix.tasks) != 1 else ''}"
    base = f"{printable(base_shown(matrix.base.ref))} ({printable(matrix.base.fingerprint[:12])})"
    parts = [f"{count} of {base}, by {what} on {tasks}"]
    several = len(found.rankings) > 1
    parts.append(_side_by_side(found.rankings) if several else _order(found.rankings[0]))
    parts += [said for ranking in found.rankings if (said := _facts(ranking))]
    parts.append(_scores(found))
    if found.front:
        parts.append(_front(found, found.front))
    if found.weighed:
        rows = [(system, f"{value:.3f}") for system, value in found.weighed.values.items()]
        costs = " - ".join(f"{weight:g} {cost}" for cost, weight in found.weighed.weights.items())
        what = f"{UNITS[found.rankings[0].method]} - {costs}"
        title = f"the choice is {found.weighed.choice}: worth = {what} (costs as shares of the highest)"
        parts.append(f"{title}\n{table(('EXPERT', 'WORTH'), rows)}")
    notes = [f"note: {printable(warning)}" for warning in found.warnings]
    notes += [f"left out: {ref}, {reason}" for ref, reason in matrix.left_out.items()]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def contests_shown(contests: Contests, ranking: Ranking) -> str:
    count = int(contests.count.sum())
    met = f"{count} contest{'s' if count != 1 else ''}"
    lines = [f"{len(contests.systems)} systems, {met}, by bradley-terry", _order(ranking)]
    return "\n\n".join([*lines, *(f"note: {printable(warning)}" for warning in ranking.warnings)])


def _order(ranking: Ranking) -> str:
    """One method: places, points, and how sure they are."""
    sure = any(standing.first is not None for standing in ranking.standings)
    errors = any(standing.error is not None for standing in ranking.standings)
    head = ["PLACE", "EXPERT", POINTS[ranking.method]]
    head += ["± SE"] if errors else []
    head += ["PLACES", "FIRST"] if sure else []
    rows = []
    for one in ranking.standings:
        row = [f"{one.place:g}", one.system, _points(one)]
        row += [f"{one.error:.2f}"] if one.error is not None else []
        row += [_places(one) or "-", "-" if one.first is None else f"{one.first:.0%}"] if sure else []
        rows.append(row)
    return table(head, rows)


def _side_by_side(rankings: Sequence[Ranking]) -> str:
    """All methods: a column each, rows as the first one orders them."""
    found = [{standing.system: standing for standing in ranking.standings} for ranking in rankings]
    rows = [
        [system, *(f"{one.place:g} {_brackets(_places(one))} {one.points:.2f}" for one in (f[system] for f in found))]
        for system in found[0]
    ]
    head = ["EXPERT", *(ranking.method.upper() for ranking in rankings)]
    return f"{table(head, rows)}\n(place [places in 95 % of the draws] {'/'.join(p.lower() for p in POINTS.values())})"


def _points(one: Standing) -> str:
    if one.low is None or one.high is None:
        return f"{one.points:.2f}"
    return f"{one.points:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _places(one: Standing) -> str:
    if one.place_low is None or one.place_high is None:
        return ""
    return f"{one.place_low:g}" if one.place_low == one.place_high else f"{one.place_low:g}-{one.place_high:g}"


def _brackets(text: str) -> str:
    return f"[{text}]" if text else ""


def _facts(ranking: Ranking) -> str:
    if ranking.method != "kemeny":
        return ""
    contradicted, bound = ranking.facts["disagreement"], ranking.facts["bound"]
    proof = "no order contradicts fewer" if ranking.facts["certified"] else f"no order contradicts fewer than {bound}"
    return f"kemeny contradicts {contradicted} preferences of a task for one of two; {proof}"


def _scores(found: Leaderboard) -> str:
    """Experts by tasks, or tasks by the best experts where tasks are many; what does not fit is said."""
    matrix = found.matrix
    order = [standing.system for standing in found.rankings[0].standings]
    column = {system: number for number, system in enumerate(matrix.systems)}

    def cell(row: int, system: str) -> str:
        at = row, column[system]
        score, low, high = matrix.scores[at], matrix.low[at], matrix.high[at]
        return f"{score:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(score) else "-"

    if len(matrix.tasks) <= COLUMNS:
        head = ["EXPERT", *(task.label for task in matrix.tasks)]
        return table(head, [[s, *(cell(row, s) for row in range(len(matrix.tasks)))] for s in order])
    shown = order[:COLUMNS]
    rows = [[task.label, task.metric, *(cell(row, s) for s in shown)] for row, task in enumerate(matrix.tasks)]
    left = f"\n(the first {COLUMNS} of {len(order)} experts; --json has all)" if len(order) > COLUMNS else ""
    return table(["TASK", "METRIC", *shown], rows) + left


def _front(found: Leaderboard, front: Front) -> str:
    values = {s.system: {"score": s.share, **found.costs[s.system]} for s in found.rankings[0].standings}
    rows = [[s, *_objectives(values[s], front.objectives), "on the front"] for s in front.front]
    for system, by in front.dominated.items():
        rows.append([system, *_objectives(values[system], front.objectives), f"no better in any than {', '.join(by)}"])
    for system, missing in front.unknown.items():
        rows.append([system, *_objectives(values[system], front.objectives), f"{', '.join(missing)} not known"])
    title = f"score ({UNITS[found.rankings[0].method]}) beside what it costs"
    return f"{title}\n{table(['EXPERT', *(o.upper() for o in front.objectives), ''], rows)}"


def _objectives(values: Mapping[str, float], objectives: Sequence[str]) -> list[str]:
    shown: dict[str, Callable[[float], str]] = {
        "score": "{:.3f}".format,
        "rank": "{:g}".format,
        "size": size_shown,
        "latency": "{:.3g} s".format,
    }
    return [shown[o](values[o]) if o in values else "-" for o in objectives]
