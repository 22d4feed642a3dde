"""How long ranking takes, and how good the orders are that are not proven best; beside corankco and choix.

    python benchmarks/ranking.py [--largest 300] [--draws 1000] [--repeats 3]

Made-up scores: a system has a quality from a normal distribution, a task adds noise of its own, of `noise` times the
spread of the qualities; 10 tasks. CPU seconds, those of a solver's own process included, on one thread; medians of
`--repeats` runs, of what takes beyond 10 s one run. corankco (its local search BioConsert, and its exact programs by
CBC) and choix are run where they are installed. A gap is how far the disagreement can at most be above the least one,
by xpert's own lower bound.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from xpert.registry.ranking import borda, disagreement, kemeny
from xpert.registry.ranking.bootstrap import Noise, again, sureness
from xpert.registry.ranking.contests import Contests
from xpert.registry.ranking.pairwise import bradley_terry
from xpert.registry.ranking.subsets import best_order

TASKS = 10
LONG = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("largest", 300), ("draws", 1000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    exact(given.repeats)
    large([size for size in (16, 30, 100, 300) if size <= given.largest], given.repeats)
    strengths([size for size in (10, 50, 200) if size <= given.largest], given.repeats)
    bootstraps(given.draws, given.repeats)


def exact(repeats: int) -> None:
    """One component of n systems, so that nothing can be solved apart."""
    print(
        "## Kemeny, exact, one component\n\n| systems | xpert | subset by subset in Python | corankco, exact by CBC |"
    )
    print("|---|---|---|---|", flush=True)
    for n in (8, 10, 12, 14, 16):
        scores = whole(n)
        prefer = preferred(scores)
        order, spent = timed(lambda prefer=prefer: best_order(prefer), repeats)
        least, slow = timed(lambda prefer=prefer: plain(prefer.tolist()), 1)
        assert int(np.tril(prefer[np.ix_(order, order)], -1).sum()) == least
        theirs = corankco("ExactAlgorithmPulp", scores, 1)
        beside = "not installed" if theirs is None else f"{theirs[1]:.2f} s{same(theirs[0], least)}"
        print(f"| {n} | {1000 * spent:.1f} ms | {slow:.2f} s | {beside} |", flush=True)


def large(sizes: list[int], repeats: int) -> None:
    print("\n## Kemeny, beyond sixteen systems\n")
    print("| systems | noise | largest component | disagreement | proven | Borda's | xpert | BioConsert | CBC |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for n in sizes:
        for noise in (0.3, 1.0, 3.0):
            scores = made(n, noise)
            found, spent = timed(lambda scores=scores: kemeny(scores), repeats)
            gap = 100 * (found.disagreement / max(1, found.bound) - 1)
            proven = "the least" if found.certified else f"at most {gap:.2f} % above"
            others = [
                told(corankco("BioConsert", scores, 1)),
                told(corankco("ExactAlgorithmPulp", scores, 1) if n <= 30 else None),
            ]
            print(
                f"| {n} | {noise} | {max(map(len, found.components))} | {found.disagreement:,} | {proven} | "
                f"{disagreement(list(borda(scores)), scores):,} | {spent:.3f} s | {' | '.join(others)} |",
                flush=True,
            )


def strengths(sizes: list[int], repeats: int) -> None:
    print("\n## Bradley-Terry, 20 contests a system, no prior\n")
    print(
        "| systems | xpert | choix, opt_pairwise | choix, ilsr_pairwise | strengths differ by |\n|---|---|---|---|---|"
    )
    for n in sizes:
        rng = np.random.default_rng(n)
        quality = rng.normal(size=n)
        pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(20 * n)])
        # One round of a circle, so that a chain of wins leads from everyone to everyone.
        ring = np.stack([np.arange(n), np.roll(np.arange(n), 1)], axis=1)
        wins = rng.random(len(pairs)) < 1 / (1 + np.exp(quality[pairs[:, 1]] - quality[pairs[:, 0]]))
        data = np.concatenate([np.where(wins[:, None], pairs, pairs[:, ::-1]), ring])
        names = tuple(f"s{s:03}" for s in range(n))
        ones = np.ones(len(data))
        contests = Contests(names, data[:, 0], data[:, 1], ones, ones.astype(np.int64))
        found, spent = timed(lambda contests=contests: bradley_terry(contests, prior=0), repeats)
        ours = np.array([found.strengths[name] for name in names])
        print(f"| {n} | {1000 * spent:.1f} ms | {beside_choix(n, data, ours, repeats)} |", flush=True)


def beside_choix(n: int, data: Any, ours: Any, repeats: int) -> str:
    try:
        import choix
    except ImportError:
        return "not installed | not installed | -"
    pairs = [tuple(pair) for pair in data.tolist()]
    cells, differ = [], 0.0
    for solve in (choix.opt_pairwise, choix.ilsr_pairwise):
        found, spent = timed(lambda solve=solve: solve(n, pairs), repeats)
        cells.append(f"{1000 * spent:.1f} ms")
        differ = max(differ, float(np.abs(found - found.mean() - ours).max()))
    return f"{' | '.join(cells)} | {differ:.0e}"


def bootstraps(draws: int, repeats: int) -> None:
    print(f"\n## Bootstrap, {draws:,} draws\n")
    print("| systems | tasks | scores drawn too | borda | mean | bradley-terry | kemeny | borda, draw by draw |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for n, tasks in ((5, 8), (16, 20), (50, 20)):
        array = np.array([list(task.values()) for task in made(n, 1.0, tasks).values()])
        for noise in (None, Noise(np.full(array.shape, 0.1), -9.0, 9.0)):
            cells = []
            for method in ("borda", "mean", "bradley-terry", "kemeny"):
                _, spent = timed(
                    lambda m=method, a=array, z=noise: sureness(again(a, m, draws=draws, noise=z)), repeats
                )
                cells.append(f"{spent:.3f} s")
            slow = "-"
            if noise is None:
                slow = f"{timed(lambda a=array: draw_by_draw(a, draws), 1)[1]:.2f} s"
            print(f"| {n} | {tasks} | {'yes' if noise else 'no'} | {' | '.join(cells)} | {slow} |", flush=True)


def made(n: int, noise: float, tasks: int = TASKS) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(n)
    scores = rng.normal(size=n) + noise * rng.normal(size=(tasks, n))
    return {f"t{t:02}": {f"s{s:03}": float(v) for s, v in enumerate(row)} for t, row in enumerate(scores)}


def whole(n: int) -> dict[str, dict[str, float]]:
    """Scores of one component: each task is the same order, begun elsewhere."""
    order = np.random.default_rng(n).permutation(n)
    starts = np.linspace(0, n, 7, endpoint=False).astype(int)
    return {f"t{t}": {f"s{s:03}": -float((s + start) % n) for s in order.tolist()} for t, start in enumerate(starts)}


def preferred(scores: dict[str, dict[str, float]]) -> Any:
    systems = sorted(next(iter(scores.values())))
    array = np.array([[task[system] for system in systems] for task in scores.values()])
    return (array[:, :, None] > array[:, None, :]).sum(axis=0)


def plain(prefer: list[list[int]]) -> int:
    """The least disagreement by the same recursion over subsets, with sums kept in lists."""
    n = len(prefer)
    against = []
    for a in range(n):
        sums = [0]
        for b in range(n):
            sums += [earlier + prefer[b][a] for earlier in sums]
        against.append(sums)
    least = [0] * (1 << n)
    for left in range(1, 1 << n):
        least[left] = min(against[a][left & ~(1 << a)] + least[left & ~(1 << a)] for a in range(n) if left >> a & 1)
    return least[-1]


def draw_by_draw(array: Any, draws: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(draws):
        rows = rng.integers(len(array), size=len(array))
        borda({f"t{place}": {f"s{s}": float(v) for s, v in enumerate(array[row])} for place, row in enumerate(rows)})


def corankco(algorithm: str, scores: dict[str, dict[str, float]], repeats: int) -> tuple[int, float] | None:
    """(disagreement, CPU seconds) of one of corankco's; None where it is not installed."""
    try:
        from corankco.algorithms.bioconsert.bioconsert import BioConsert
        from corankco.algorithms.exact.exactalgorithmpulp import ExactAlgorithmPulp
        from corankco.dataset import Dataset
        from corankco.scoringscheme import ScoringScheme
    except ImportError:
        return None
    makers = {"BioConsert": BioConsert, "ExactAlgorithmPulp": ExactAlgorithmPulp}
    rankings = [[{s} for s in sorted(task, key=lambda s: -task[s])] for task in scores.values()]
    data, scheme = Dataset.from_raw_list(rankings), ScoringScheme.get_unifying_scoring_scheme()
    run = makers[algorithm]()
    found, spent = timed(lambda: run.compute_consensus_rankings(data, scheme, True), repeats)
    order = [element.value for bucket in found.consensus_rankings[0] for element in bucket]
    return disagreement(order, scores), spent


def told(found: tuple[int, float] | None) -> str:
    return "-" if found is None else f"{found[0]:,} in {found[1]:.3f} s"


def same(found: int, least: int) -> str:
    return "" if found == least else f", {found:,} instead of {least:,}"


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    spent: list[float] = []
    while len(spent) < repeats and not (spent and spent[-1] > LONG):
        before = cpu()
        found = run()
        spent.append(cpu() - before)
    return found, statistics.median(spent)


def cpu() -> float:
    """CPU seconds of this process and of those it started and saw end."""
    solver = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + solver.ru_utime + solver.ru_stime


if __name__ == "__main__":
    main()
