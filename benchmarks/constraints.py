"""What constrained decoding costs: making a grammar, and a mask a token.

    python benchmarks/constraints.py [--base MODEL] [--write FILE.md] [--repeats 3]

The base's tokenizer decides the cost of a mask, the number of its tokens that of applying it. The first table walks
through each grammar for 600 tokens, drawn evenly among those allowed, which leaves the common paths sooner than a model
does, and tells wall microseconds. Making a new grammar includes the trial in a child process, that of the first of an
engine the sorting of the vocabulary too. The second table drives a batch of 16 rows, of which some are constrained to
a JSON list of strings, and tells CPU milliseconds of the median step on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from xpert.experts.demo.chain import base_model
from xpert.experts.engines import _constraints
from xpert.experts.engines._constraints import Grammars
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel, load_model
from xpert.protocols import Constraint, EngineRequest, Sampling

ROWS, STEPS, WALK = 16, 12, 600
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "rare"]}},
    },
    "required": ["name", "age"],
}
WIDE = {
    "type": "object",
    "properties": {f"field_{n}": {"type": "string", "pattern": "^[a-z]{1,9}$"} for n in range(60)},
}
KINDS = {
    "json": Constraint("json"),
    "json_schema, a person": Constraint("json_schema", json.dumps(PERSON)),
    "json_schema, 60 optional fields with patterns": Constraint("json_schema", json.dumps(WIDE)),
    "regex, dates": Constraint("regex", r"((19|20)\d\d-(0[1-9]|1[0-2])-([0-2]\d|3[01]),? ?)+"),
    "choice of 100": Constraint("choice", json.dumps([f"category {n}" for n in range(100)])),
    "lark, sums": Constraint("lark", 'start: term (" + " term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,9}/'),
}
LIST = Constraint("json_schema", json.dumps({"type": "array", "items": {"type": "string"}, "minItems": 500}))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def walk(grammars: Grammars, constraint: Constraint, ends: frozenset[int]) -> tuple[list[float], list[float]]:
    """Seconds of each mask and of each advance."""
    random = np.random.default_rng(0)
    masks: list[float] = []
    advances: list[float] = []
    guide = grammars.guide(constraint, where="benchmark")
    while len(masks) < WALK:
        seconds, mask = timed(guide.mask)
        masks.append(seconds)
        allowed = [token for token in np.flatnonzero(mask).tolist() if token not in ends]
        if not allowed:
            guide = grammars.guide(constraint, where="benchmark")
            continue
        token = int(random.choice(allowed))
        seconds, over = timed(lambda token=token, guide=guide: guide.advance(token))
        advances.append(seconds)
        if over:
            guide = grammars.guide(constraint, where="benchmark")
    return masks, advances


def grammar_table(lm: LanguageModel) -> str:
    lines = [
        "| constraint | new, ms | of them in the child | kept, µs | mask, µs: median | 99 % | longest | advance, µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    grammars = Grammars(lm.tokenizer, lm.stop_ids, where=lm.ref)
    first, _ = timed(lambda: grammars.guide(Constraint("regex", "x"), where="benchmark"))
    for name, constraint in KINDS.items():
        spent: list[float] = []
        tried = _constraints._tried

        def counted(grammar: str, spent: list[float] = spent, tried: Callable[[str], str] = tried) -> str:
            seconds, found = timed(lambda: tried(grammar))
            spent.append(seconds)
            return str(found)

        _constraints._tried = counted
        new, _ = timed(lambda given=constraint: grammars.guide(given, where="benchmark"))
        _constraints._tried = tried
        kept = [timed(lambda given=constraint: grammars.guide(given, where="benchmark"))[0] for _ in range(50)]
        masks, advances = walk(grammars, constraint, lm.stop_ids)
        lines.append(
            f"| {name} | {new * 1e3:.0f} | {spent[0] * 1e3:.0f} | {statistics.median(kept) * 1e6:.0f} "
            f"| {statistics.median(masks) * 1e6:.0f} | {np.quantile(masks, 0.99) * 1e6:.0f} | {max(masks) * 1e6:.0f} "
            f"| {statistics.median(advances) * 1e6:.0f} |"
        )
    return "\n".join(lines) + f"\n\nThe first constraint of an engine took {first * 1e3:.0f} ms."


def step_table(lm: LanguageModel, repeats: int) -> str:
    engine = TorchEngine(lm, max_batch=ROWS)
    prompt = tuple(lm.tokenizer("Write a long list of towns, rivers and mountains.")["input_ids"])
    seconds: dict[int, list[float]] = {}
    for repeat in range(repeats + 1):
        for count in (0, 8, 16):
            session = engine.session()
            for row in range(ROWS):
                request = EngineRequest(str(row), (*prompt, row + 100), (), Sampling(max_tokens=STEPS))
                session.submit(replace(request, constraint=LIST) if row < count else request)
            while not session.idle:
                start = time.process_time()
                session.step()
                if repeat and len(session.pending) == ROWS:
                    seconds.setdefault(count, []).append(time.process_time() - start)
    base = statistics.median(seconds[0])
    lines = ["| constrained rows of 16 | median step, ms | ratio |", "|---|---|---|"]
    for count, found in seconds.items():
        median = statistics.median(found)
        lines.append(f"| {count} | {median * 1e3:.1f} | {median / base:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="default: the demo's, SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lm = load_model(arguments.base or base_model(), device="cpu")
    found = f"{grammar_table(lm)}\n\n{step_table(lm, arguments.repeats)}"
    print(found)
    if arguments.write:
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        load = f"load average {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else ""
        name = arguments.base or "SmolLM2-135M-Instruct"
        text = (
            f"`python benchmarks/constraints.py --repeats {arguments.repeats}`: {name}, a vocabulary of "
            f"{len(lm.tokenizer):,}, on {os.cpu_count()} CPU cores, one thread, {load}; {versions}.\n"
        )
        about = (__doc__ or "").split("\n\n")[2].strip().replace("\n", " ")
        arguments.write.write_text(f"# Constrained decoding\n\n{about}\n\n{text}\n{found}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
