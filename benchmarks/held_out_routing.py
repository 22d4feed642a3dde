"""Routers against the oracle on held-out prompts: every router trained on one set of observations, measured on another.

    xpert router observe MIXTURE --on train.jsonl -o TRAIN
    xpert router observe MIXTURE --on test.jsonl -o TEST
    python benchmarks/held_out_routing.py MIXTURE TRAIN TEST [NAME:KEY=VALUE,... ...]

Without names, all routers with their defaults. Routers that learn see TRAIN alone; no prompt of TEST may stand in it.
Nothing is generated: answers are those observed. A router that cannot work with these experts says why.
"""

from __future__ import annotations

import argparse

from xpert import plugins
from xpert.errors import XpertError
from xpert.experts.mixture import load_mixture
from xpert.experts.observations import for_mixture, read_observations
from xpert.experts.router_evaluation import RouterChoice, RouterFigures, evaluate_routers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("mixture", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("routers", nargs="*", metavar="NAME:KEY=VALUE,...")
    given = parser.parse_args()
    mixture = load_mixture(given.mixture)
    train, test = (for_mixture(read_observations(path), mixture) for path in (given.train, given.test))
    means = dict(zip(test.observations.subjects, test.observations.scores.mean(axis=0).tolist(), strict=True))
    print(f"{len(train)} prompts to learn from, {len(test)} to measure on. Alone on these:", end=" ")
    print(", ".join(f"{name} {100 * mean:.1f}" for name, mean in means.items()) + ".\n")
    print("| router | score | as good as the best answer | regret | to the base | answers a prompt | ms a prompt |")
    print("|---|---|---|---|---|---|---|")
    refused: list[str] = []
    found = None
    for text in given.routers or plugins.names("router"):
        try:
            found = evaluate_routers(mixture, train, [RouterChoice.parse(text)], held_out=test)
        except XpertError as error:
            refused.append(f"{text}: {error}")
            continue
        print(_line(found.routers[-1]), flush=True)
    for one in found.controls if found is not None else ():
        print(_line(one))
    for line in refused:
        print(f"\nNot measured: {line}")


def _line(one: RouterFigures) -> str:
    spent = f"{one.milliseconds:.2f}" if one.milliseconds is not None else ""
    return (
        f"| {one.name} | {100 * one.score.score:.1f} [{100 * one.score.low:.0f}, {100 * one.score.high:.0f}] "
        f"| {100 * one.accuracy:.1f} % | {100 * one.regret.score:.1f} "
        f"[{100 * one.regret.low:.0f}, {100 * one.regret.high:.0f}] | {100 * one.to_base:.1f} % | {one.answers:.2f} "
        f"| {spent} |"
    )


if __name__ == "__main__":
    main()
