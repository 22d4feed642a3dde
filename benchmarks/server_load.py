"""Ten minutes in the life of a server: mixed load, with experts published and removed meanwhile.

    python benchmarks/server_load.py [--seconds 600] [--base MODEL] [--write FILE.md]

Starts `xpert serve --follow all` on a registry of its own, in a process of its own, and for the given time has these
clients at it over loopback, all at once:

    whole, streamed, several (`n`), texts, weighed (`echo` with `logprobs`), JSON by a schema, routes, model lists
    clients that leave in the middle of a stream, or before the first token
    malformed bodies, bodies beyond the limit, unknown models, bodies that stop half way
    clients that read slowly
    a publisher: new versions of an expert, new experts, experts removed, garbage collected

It fails unless every answer has the status it should have (429 counts as an answer, and is asked again), every whole
request gets a whole answer, no status is 5xx, nothing is left running at the end, and the server's memory has grown
by no more than 5 % since it was warm (a fifth of the time, at least 20 s). Kept prefixes of prompts may take 64 MiB,
not 256 as by default, so that they fill within the time: filling up to a limit is no leak.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx

MAX_BODY = 200_000
MESSAGES = [
    [{"role": "user", "content": "Write the word in capitals.\n\nbaba (case 3 tite)"}],
    [{"role": "user", "content": "Add the two numbers.\n\n3 + 4 (case 9 lodi)"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}],
]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
LOST = (httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError, httpx.ConnectError)


@dataclass
class Tally:
    """What the clients saw."""

    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    busy: int = 0


class Load:
    """The clients of a server. Each kind of request is a method that raises AssertionError where it is served wrong."""

    def __init__(self, url: str, *, seed: int = 0, tokens: int = 16) -> None:
        self.url, self.tokens = url, tokens
        self.random = random.Random(seed)
        self.tally = Tally()
        limits = httpx.Limits(max_connections=200)
        self.client = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)

    async def run(self, seconds: float, clients: int, steady: Callable[[], Awaitable[None]] | None = None) -> None:
        """`clients` at once until the time is over; all that was begun is ended."""
        end = time.monotonic() + seconds
        kinds = [
            *[self.whole, self.streamed] * 4, self.several, self.texts, self.weighed, self.in_json, self.route,
            self.models, self.leaves, self.leaves_early, self.malformed, self.oversized, self.unknown, self.half_sent,
            self.slow_reader,
        ]  # fmt: skip

        async def one() -> None:
            while time.monotonic() < end:
                kind = self.random.choice(kinds)
                try:
                    await kind()
                    self.tally.done[kind.__name__] += 1
                except (AssertionError, *LOST) as error:
                    self.tally.wrong.append(f"{kind.__name__}: {error!r}")

        tasks = [asyncio.create_task(one()) for _ in range(clients)]
        if steady is not None:
            tasks.append(asyncio.create_task(self._until(end, steady)))
        await asyncio.gather(*tasks)

    async def _until(self, end: float, steady: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < end:
            await steady()

    def body(self, **change: Any) -> dict[str, Any]:
        model = self.random.choice(["desk", "desk", "me/casing", "base", "desk:router=random,k=2"])
        sampled = {"temperature": 1.0, "seed": self.random.randrange(1000)} if self.random.random() < 0.5 else {}
        messages = self.random.choice(MESSAGES)
        return {"model": model, "messages": messages, "max_tokens": self.tokens, **sampled, **change}

    async def post(self, path: str, **options: Any) -> httpx.Response:
        """The answer, asked for again while the server is full."""
        while True:
            reply = await self.client.post(path, **options)
            self.tally.statuses[reply.status_code] += 1
            if reply.status_code != 429:
                return reply
            self.tally.busy += 1
            assert int(reply.headers["retry-after"]) >= 1
            await asyncio.sleep(self.random.uniform(0.2, 1.0))

    async def whole(self) -> None:
        reply = await self.post("/v1/chat/completions", json=self.body())
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        assert choice["finish_reason"] in ("stop", "length")
        assert reply.headers["x-xpert-experts"] and reply.headers["x-request-id"]

    async def streamed(self, pause: float = 0.0) -> None:
        body = self.body(stream=True, stream_options={"include_usage": True})
        begin = time.perf_counter()
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            self.tally.statuses[reply.status_code] += 1
            if reply.status_code == 429:
                self.tally.busy += 1
                return
            assert reply.status_code == 200, await reply.aread()
            events: list[str] = []
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if len(events) == 1 and not pause:
                    self.tally.first_token.append(time.perf_counter() - begin)
                events.append(line.removeprefix("data: "))
                if pause:
                    await asyncio.sleep(pause)
        assert events[-1] == "[DONE]", events[-1]
        assert json.loads(events[-2])["usage"]["completion_tokens"] >= 1
        assert any(choice["finish_reason"] for event in events[:-1] for choice in json.loads(event)["choices"])

    async def slow_reader(self) -> None:
        await self.streamed(pause=0.1)

    async def several(self) -> None:
        reply = await self.post("/v1/chat/completions", json=self.body(n=3))
        assert reply.status_code == 200, reply.text
        assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2]

    async def texts(self) -> None:
        body = {"model": "desk", "prompt": ["Once", "There was"], "max_tokens": self.tokens}
        reply = await self.post("/v1/completions", json=body)
        assert reply.status_code == 200 and len(reply.json()["choices"]) == 2, reply.text

    async def weighed(self) -> None:
        body = {"model": "base", "prompt": "Once upon a time", "max_tokens": 1, "echo": True, "logprobs": 1}
        reply = await self.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        told = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert told[0] is None and all(logprob <= 0 for logprob in told[1:])

    async def in_json(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
        reply = await self.post("/v1/chat/completions", json=self.body(response_format=form, max_tokens=64))
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"])["n"], int)

    async def route(self) -> None:
        reply = await self.post("/v1/route", json={"messages": self.random.choice(MESSAGES)})
        assert reply.status_code == 200 and reply.json()["reason"], reply.text

    async def models(self) -> None:
        reply = await self.client.get("/v1/models")
        assert reply.status_code == 200 and reply.json()["data"][0]["id"] == "desk"

    async def leaves(self) -> None:
        body = self.body(stream=True, max_tokens=100)
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.status_code in (200, 429)
            lines = reply.aiter_lines()
            for _ in range(6):
                await anext(lines, None)

    async def leaves_early(self) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            wait = self.random.choice([0.005, 0.02, 0.1])
            reply = await self.client.post("/v1/chat/completions", json=self.body(max_tokens=100), timeout=wait)
            assert reply.status_code in (200, 429)

    async def malformed(self) -> None:
        content = self.random.choice([b"{", b"[]", b'{"model": 3}', b"\xff", b'{"model": "desk", "messages": []}', b""])
        reply = await self.post("/v1/chat/completions", content=content)
        assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text

    async def oversized(self) -> None:
        with contextlib.suppress(httpx.WriteError):  # refused before all of it was sent
            reply = await self.post("/v1/chat/completions", content=b"x" * (MAX_BODY + 1))
            assert reply.status_code == 413, reply.text

    async def unknown(self) -> None:
        reply = await self.post("/v1/chat/completions", json=self.body(model="dask"))
        assert reply.status_code == 404 and "Did you mean 'desk'?" in reply.json()["error"]["message"], reply.text

    async def half_sent(self) -> None:
        url = httpx.URL(self.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(self.random.uniform(0, 0.3))
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Publisher:
    """Publishes and removes experts while the server follows the registry."""

    def __init__(self, registry: Any, folders: list[Path], *, pause: float) -> None:
        self.registry, self.folders, self.pause = registry, folders, pause
        self.turns = 0

    async def turn(self) -> None:
        await asyncio.to_thread(self._turn)
        await asyncio.sleep(self.pause)

    def _turn(self) -> None:
        self.turns += 1
        self.registry.publish(self.folders[self.turns % len(self.folders)], "me/casing")
        if self.turns % 2:
            self.registry.publish(self.folders[(self.turns + 1) % len(self.folders)], "me/guest")
        else:
            self.registry.remove("me/guest")
        if self.turns % 5 == 0:
            for entry in self.registry.list():
                if entry.latest.name == "me/casing":
                    for version in range(max(1, entry.latest.version - 6), entry.latest.version - 2):
                        with contextlib.suppress(Exception):  # it has gone already
                            self.registry.remove(f"me/casing@{version}")
            self.registry.gc()


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@dataclass(frozen=True)
class Report:
    """What came of it. memory: resident bytes at the start, when warm, and at the end (each the median of a few)."""

    seconds: float
    tally: Tally
    memory: tuple[int, int, int]
    turns: int
    left: dict[str, Any]
    log: str

    @property
    def growth(self) -> float:
        """Of the memory since the server was warm, as a share."""
        return self.memory[2] / self.memory[1] - 1

    def faults(self) -> list[str]:
        """What should not have been."""
        found = list(self.tally.wrong)
        found += [f"{count} times status {status}" for status, count in self.tally.statuses.items() if status >= 500]
        if (self.left["running"], self.left["waiting"], self.left["generations"]) != (0, 0, 1):
            found.append(f"at the end: {self.left}")
        if "Traceback" in self.log:
            found.append(f"the server's log holds a traceback:\n{self.log[-4000:]}")
        return found


def run(
    command: list[str], registry: Any, folders: list[Path], *, seconds: float, clients: int, pause: float
) -> Report:
    """Serves, loads, and tells. The server must end within its grace when it is told to."""
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read()}")
                url = json.loads(line)["url"]
                report = asyncio.run(_drive(url, process.pid, registry, folders, seconds, clients, pause))
                process.send_signal(signal.SIGINT)
                status = process.wait(60)
            finally:
                process.kill()
        log.seek(0)
        text = log.read()
    if status != 0:
        report.tally.wrong.append(f"the server ended with status {status}")
    return dataclasses.replace(report, log=text)


async def _drive(
    url: str, pid: int, registry: Any, folders: list[Path], seconds: float, clients: int, pause: float
) -> Report:
    load, publisher = Load(url), Publisher(registry, folders, pause=pause)
    begin, begun = time.monotonic(), memory(pid)
    sizes: list[tuple[float, int]] = []

    async def weigh() -> None:
        while True:
            sizes.append((time.monotonic() - begin, memory(pid)))
            await asyncio.sleep(0.5)

    weighing = asyncio.create_task(weigh())
    await load.run(seconds, clients, publisher.turn)
    spent = time.monotonic() - begin
    left: dict[str, Any] = {}
    for _ in range(200):  # a client that left a moment ago is let go a moment later
        left = (await load.client.get("/v1/load")).json()
        if (left["running"], left["waiting"], left["generations"]) == (0, 0, 1):
            break
        await asyncio.sleep(0.05)
    weighing.cancel()
    await load.client.aclose()
    warm = max(20.0, seconds / 5)
    early = [size for when, size in sizes if warm <= when <= warm + max(5.0, seconds / 20)] or [sizes[-1][1]]
    late = [size for when, size in sizes if when >= spent - max(5.0, seconds / 20)]
    grown = (begun, int(statistics.median(early)), int(statistics.median(late or early)))
    return Report(spent, load.tally, grown, publisher.turns, left, "")


# ── as a script ──────────────────────────────────────────────────────────────────────────────────────────────────


def make_experts(base: str, folder: Path, count: int) -> list[Path]:
    """Random adapters of rank 8 on the attention of a model, with cards and exemplars."""
    import torch
    from peft import LoraConfig, get_peft_model

    from xpert.language_model import load_model
    from xpert.registry.card import BaseModel, ExpertCard

    lm = load_model(base, device="cpu", dtype="float32")
    card_base = BaseModel(str(Path(base).resolve()) if Path(base).exists() else base, lm.fingerprint, lm.architecture)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made: Any = get_peft_model(lm.model, settings)
    folders = []
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.02)
        where = folder / f"expert-{number}"
        made.save_pretrained(where)
        text = MESSAGES[number % 2][0]["content"]
        lines = [{"prompt": f"{text} {index}", "skill": f"skill-{number % 2}", "kind": "shot"} for index in range(8)]
        (where / "exemplars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (where / "README.md").unlink(missing_ok=True)
        ExpertCard(base=card_base, adapter={}, name=f"me/e{number}", skills=(f"skill-{number % 2}",)).write(where)
        folders.append(where)
    return folders


def serve_command(mixture: Path, registry: str, *options: str) -> list[str]:
    """The command that serves a mixture on a free port, and says where as JSON."""
    return [
        sys.executable, "-m", "xpert", "serve", str(mixture), "--registry", registry, "--port", "0", "--json",
        "--quiet", "--follow", "all", "--watch", "1", "--max-body", str(MAX_BODY), *options,
    ]  # fmt: skip


def prepare(registry: Any, folders: list[Path], where: Path) -> Path:
    """Two published experts in a mixture named `desk`."""
    from xpert.experts.mixture import assemble, open_expert
    from xpert.experts.mixture_file import write_mixture

    refs = [
        registry.publish(folder, f"me/{name}").ref for folder, name in zip(folders, ("casing", "sums"), strict=False)
    ]
    mixture = assemble(
        [open_expert(ref, registry) for ref in refs], router="centroid", name="desk", registry=registry.location
    )
    write_mixture(where / "desk.json", mixture)
    return where / "desk.json"


def main() -> None:
    from xpert.registry.opening import open_registry

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--base", help="default: the packaged SmolLM2-135M")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.base is None:
        from xpert.experts.demo.chain import base_model

        given.base = base_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = make_experts(given.base, folder, 6)
        registry = open_registry(str(folder / "registry"))
        mixture = prepare(registry, folders, folder)
        command = serve_command(mixture, registry.location, "--engine-param", f"prefix-bytes={64 << 20}")
        report = run(command, registry, folders, seconds=given.seconds, clients=given.clients, pause=2.0)
    text = table(report, given)
    print(text)
    if given.write:
        given.write.write_text(text, encoding="utf-8")
    if report.faults() or report.growth > 0.05:
        sys.exit("\n".join([*report.faults()[:20], f"memory grew by {report.growth:.1%}"]))


def table(report: Report, given: argparse.Namespace) -> str:
    """The report as Markdown."""
    tally = report.tally
    first = sorted(tally.first_token)
    ranks = {name: first[min(len(first) - 1, int(share * len(first)))] for name, share in
             (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))} if first else {}  # fmt: skip
    mebibytes = [size / 2**20 for size in report.memory]
    kinds = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in tally.done.most_common())
    statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(tally.statuses.items()))
    first_tokens = ", ".join(f"{name} {value:.2f} s" for name, value in ranks.items())
    left = ", ".join(f"{report.left.get(name)} {name}" for name in ("running", "waiting", "generations"))
    return f"""# A server under mixed load

`python benchmarks/server_load.py --seconds {given.seconds:g} --clients {given.clients}`: that many clients at once over
loopback, server and clients on the same machine; the script says what they do.

| | |
|---|---|
| time | {report.seconds:.0f} s |
| requests by kind | {kinds} |
| statuses of those that were read to the end | {statuses} |
| answers that were not as they should be | {len(tally.wrong)} |
| turns of publishing and removing experts | {report.turns} |
| time to first token, streams, all clients busy | {first_tokens} |
| memory of the server at the start, when warm, at the end | {", ".join(f"{size:,.0f} MiB" for size in mebibytes)} |
| growth since it was warm | {report.growth:+.1%} |
| left at the end | {left} |
"""


if __name__ == "__main__":
    main()
