"""What the server costs beside its engine: tokens per second at 16 streams, the time to the first token, and routing.

    python benchmarks/serving.py [--base MODEL] [--streams 16] [--tokens 32] [--repeats 3] [--write FILE.md]

Three ways to answer the same prompts with the same experts, in turn within each repeat:

    engine    the engine driven by itself, in this process, all prompts given at once
    server    `xpert serve` in a process of its own, asked by `--streams` concurrent streams over loopback
    routed    the same, where the router chooses the experts

Prompts are as many as three times the streams, of about 60 tokens; replies have from half of `--tokens` to one and a
half times as many, by the prompt's number, so that they end one by one as real ones do (the experts are random, and
sampling at temperature 1 with a seed seldom ends a reply early; the figures count what came). Figures are tokens per
second of wall time, the medians of the repeats. The time to the first token is measured by the clients: once with
`--streams` of them, and once with four times as many, most of whom wait for a place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.server_load import make_experts, prepare

TEXTS = ("Write the word in capitals.\n\n{} (case {} tite)", "Add the two numbers.\n\n{} + {}")
FILLER = "Here is some more of the story that the question is about, which nobody needs to read. " * 2


def prompts(count: int) -> list[str]:
    """Different ones, in turn of the two experts' kinds."""
    return [f"{TEXTS[number % 2].format(number, number * 7)}\n\n{FILLER}{number}" for number in range(count)]


def length(number: int, tokens: int) -> int:
    """Of a prompt's reply, in tokens."""
    return tokens // 2 + number * 7919 % (tokens + 1)


def by_engine(runner: Any, count: int, tokens: int) -> float:
    """Tokens per second of the engine alone."""
    from xpert.protocols import Sampling
    from xpert.records import Message

    requests = []
    for number, text in enumerate(prompts(count)):
        expert = runner.mixture.keys[number % 2]
        sampling = Sampling(max_tokens=length(number, tokens), temperature=1.0, seed=number)
        row = [Message("user", text)]
        requests.append(runner.engine_request(str(number), row, ((expert, 1.0),), sampling))
    begin = time.perf_counter()
    made = sum(piece.completion_tokens for piece in runner.engine.generate(requests))
    return made / (time.perf_counter() - begin)


async def by_server(
    url: str, model: str, keys: list[str], streams: int, count: int, tokens: int
) -> tuple[float, list[float]]:
    """Tokens per second over `streams` concurrent streams, and each one's seconds to its first token."""
    first: list[float] = []
    made = 0
    waiting = list(enumerate(prompts(count)))

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=500)) as client:

        async def stream() -> None:
            nonlocal made
            while waiting:
                number, text = waiting.pop(0)
                body = {
                    "model": model or keys[number % 2], "messages": [{"role": "user", "content": text}],
                    "temperature": 1.0,
                    "max_tokens": length(number, tokens),
                    "seed": number, "stream": True, "stream_options": {"include_usage": True},
                }  # fmt: skip
                begin, told = time.perf_counter(), False
                async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                    assert reply.status_code == 200, await reply.aread()
                    async for line in reply.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        if not told and '"content": ""' not in line:
                            first.append(time.perf_counter() - begin)
                            told = True
                        if '"usage": {' in line:
                            made += json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]

        begin = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(streams)))
        return made / (time.perf_counter() - begin), first


def main() -> None:
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.serving import MixtureRunner
    from xpert.registry.opening import open_registry

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="default: the packaged SmolLM2-135M")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.base is None:
        from xpert.experts.demo.chain import base_model

        given.base = base_model()
    count = 3 * given.streams
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = open_registry(str(folder / "registry"))
        mixture = prepare(registry, make_experts(given.base, folder, 2), folder)
        runner = MixtureRunner.open(load_mixture(mixture, registry), device="cpu", max_batch=given.streams)
        keys = list(runner.mixture.keys)
        command = [
            sys.executable, "-m", "xpert", "serve", str(mixture), "--registry", registry.location, "--port", "0",
            "--json", "--quiet", "--max-batch", str(given.streams), "--max-queue", str(4 * given.streams),
            "--device", "cpu",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            try:
                speeds, firsts = measure(runner, url, keys, given, count)
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
        runner.close()
    text = table(speeds, firsts, given)
    print(text)
    if given.write:
        given.write.write_text(text, encoding="utf-8")


def measure(
    runner: Any, url: str, keys: list[str], given: argparse.Namespace, count: int
) -> tuple[dict[str, list[float]], dict[int, list[float]]]:
    """Speeds by way, in turn; and the times to the first token by the number of streams."""
    speeds: dict[str, list[float]] = {"engine": [], "server": [], "routed": []}
    firsts: dict[int, list[float]] = {given.streams: [], 4 * given.streams: []}
    for repeat in range(given.repeats + 1):
        found = {"engine": by_engine(runner, count, given.tokens)}
        for way, model in (("server", ""), ("routed", "desk")):
            found[way], first = asyncio.run(by_server(url, model, keys, given.streams, count, given.tokens))
            if repeat and way == "routed":
                firsts[given.streams] += first
        if repeat:  # the first warms up
            for way, speed in found.items():
                speeds[way].append(speed)
    _, firsts[4 * given.streams] = asyncio.run(by_server(url, "desk", keys, 4 * given.streams, 2 * count, given.tokens))
    return speeds, firsts


def table(speeds: dict[str, list[float]], firsts: dict[int, list[float]], given: argparse.Namespace) -> str:
    """The figures as Markdown."""
    middle = {way: statistics.median(found) for way, found in speeds.items()}
    rows = [f"| {way} | {middle[way]:.0f} | {middle[way] / middle['engine']:.2f} |" for way in middle]
    times = []
    for streams, found in firsts.items():
        ranked = sorted(found)
        parts = [ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in (0.5, 0.95, 0.99)]
        times.append(f"| {streams} | {' | '.join(f'{seconds:.2f} s' for seconds in parts)} | {len(ranked)} |")
    lines = [
        "# The server beside its engine",
        "",
        f"`python benchmarks/serving.py --streams {given.streams} --tokens {given.tokens} --repeats {given.repeats}`; "
        f"{Path(given.base).name}, two random experts of rank 8, batches of {given.streams}; "
        "clients and server on the same machine:",
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.",
        "",
        "| | tokens/s | of the engine's own |",
        "|---|---|---|",
        *rows,
        "",
        "Time to the first token, routed, as the client sees it:",
        "",
        "| concurrent streams | p50 | p95 | p99 | of |",
        "|---|---|---|---|---|",
        *times,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
