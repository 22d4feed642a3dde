"""The chain in Python instead of commands: select, train, publish, mix, answer.

    python examples/select_train_route.py --pool POOL --shots SHOTS --base MODEL --prompts PROMPTS -o DIR

POOL, SHOTS and PROMPTS are any sources (JSON lines, CSV, ...), MODEL a folder, a hub name or a .gguf file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from xpert.data import read_prompts
from xpert.experts.mixing import mix
from xpert.experts.mixture_file import write_mixture
from xpert.experts.serving import MixtureRunner, Reply
from xpert.experts.train import train
from xpert.experts.train_options import TrainOptions
from xpert.progress import StreamProgress
from xpert.protocols import Sampling
from xpert.registry.store import Registry
from xpert.selection import select


def run(pool: str, shots: str, base: str, prompts: str, out: Path, *, budget: str, steps: int | None) -> list[Reply]:
    """Builds one expert for the shots and answers the prompts that fit it with it, the others with the base."""
    progress = StreamProgress()
    chosen = select(pool, shots=shots, method="kshot", budget=budget, out=out / "selection", progress=progress)
    expert = train(chosen.path, base, out / "expert", TrainOptions(max_steps=steps), progress=progress)

    registry = Registry(out / "registry")
    version = registry.publish(expert, "me/expert")
    mixture = mix(registry, router="centroid", experts=[version.ref])
    write_mixture(out / "mixture.json", mixture)

    runner = MixtureRunner.open(mixture, progress=progress)
    return runner.answer(read_prompts(prompts), Sampling(max_tokens=64), progress=progress)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--pool", "--shots", "--base", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--budget", default="500")
    parser.add_argument("--steps", type=int)
    given = parser.parse_args(arguments)
    replies = run(given.pool, given.shots, given.base, given.prompts, given.out, budget=given.budget, steps=given.steps)
    for reply in replies:
        print(f"{reply.id}: {reply.output!r}  ({reply.route.reason})")


if __name__ == "__main__":
    main()
