"""The end of a server: who is let in, who may finish, and who is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from xpert.errors import Unavailable, XpertError
from xpert.experts.server.draining import Draining, DrainingServer, Ended


def test_a_server_at_rest_ends_at_once() -> None:
    draining = Draining()
    ready = [draining.ready]
    assert asyncio.run(draining.drain(1000)) == Ended(0, 0, 0)
    assert [*ready, draining.ready] == [True, False]
    with pytest.raises(Unavailable, match="the server is stopping"), draining.request(lambda error: None):
        raise AssertionError("let in")


def test_what_ends_in_time_is_not_told() -> None:
    async def run() -> Ended:
        draining, told = Draining(), list[XpertError]()

        async def work(seconds: float) -> None:
            with draining.request(told.append):
                await asyncio.sleep(seconds)

        tasks = [asyncio.ensure_future(work(seconds)) for seconds in (0.01, 0.03)]
        await asyncio.sleep(0)
        assert draining.running == 2
        ended = await draining.drain(1000)
        assert not told and all(task.done() for task in tasks)
        return ended

    assert asyncio.run(run()) == Ended(2, 0, 0)


def test_what_outlasts_the_grace_is_told_once_and_gets_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpert.experts.server.draining.FAREWELL", 0.1)

    async def run() -> tuple[Ended, list[object]]:
        draining, said = Draining(), list[object]()

        async def obedient() -> None:
            heard: asyncio.Queue[XpertError] = asyncio.Queue()
            with draining.request(heard.put_nowait):
                error = await heard.get()
                await asyncio.sleep(0)
                said.append(error.http_status)

        async def deaf() -> None:
            with draining.request(lambda error: said.append("deaf")):
                await asyncio.sleep(1000)

        def broken(error: XpertError) -> None:
            raise RuntimeError

        async def unlucky() -> None:
            with draining.request(broken):
                await asyncio.sleep(1000)

        tasks = [asyncio.ensure_future(work()) for work in (unlucky, obedient, deaf)]
        await asyncio.sleep(0)
        ended = await draining.drain(0)
        for task in tasks:
            task.cancel()
        return ended, said

    ended, said = asyncio.run(run())
    assert ended == Ended(0, 3, 2) and said == ["deaf", 503]


def test_who_is_in_a_hurry_waits_for_nobody() -> None:
    async def run() -> Ended:
        draining, hurry = Draining(), asyncio.Event()
        with draining.request(lambda error: hurry.set()):
            hurry.set()
            return await draining.drain(1000, hurry=hurry.is_set)

    assert asyncio.run(run()) == Ended(0, 1, 1)


# ── with a real server ───────────────────────────────────────────────────────────────────────────────────────────────


class Running:
    def __init__(self, grace: float) -> None:
        self.draining = Draining()
        self.release: asyncio.Event
        self.ended = False
        routes = [Route("/readyz", self.ready), Route("/stream", self.stream), Route("/plain", self.plain)]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes, lifespan=self.life), log_level="error", ws="none", timeout_graceful_shutdown=5
        )
        self.server = DrainingServer(config, self.draining, grace=grace)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @asynccontextmanager
    async def life(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.ended = True

    async def ready(self, request: Request) -> Response:
        return Response(status_code=200 if self.draining.ready else 503)

    async def plain(self, request: Request) -> Response:
        try:
            with self.draining.request(lambda error: None):
                return Response("done")
        except Unavailable as error:
            return JSONResponse({"error": str(error)}, error.http_status)

    async def stream(self, request: Request) -> Response:
        pieces: asyncio.Queue[str | XpertError] = asyncio.Queue()
        self.release = asyncio.Event()
        release = self.release

        async def events() -> AsyncIterator[str]:
            with self.draining.request(pieces.put_nowait):
                yield "data: begun\n\n"
                freed = asyncio.ensure_future(release.wait())
                freed.add_done_callback(lambda task: None if task.cancelled() else pieces.put_nowait("freed"))
                piece = await pieces.get()
                freed.cancel()
                yield f"data: {piece}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    found = Running(grace=request.param)
    yield found
    found.server.should_exit = True
    found.thread.join()
    found.listener.close()


def eventually(client: httpx.Client, path: str, status: int) -> httpx.Response:
    while (reply := client.get(path)).status_code != status:
        time.sleep(0.01)
    return reply


@pytest.mark.parametrize("running", [30.0], indirect=True)
def test_readiness_goes_first_and_a_running_reply_ends_whole(running: Running) -> None:
    with httpx.Client(base_url=running.url) as client, httpx.stream("GET", f"{running.url}/stream") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "data: begun"
        assert client.get("/readyz").status_code == 200 and client.get("/plain").text == "done"
        running.server.should_exit = True
        eventually(client, "/readyz", 503)
        refused = client.get("/plain")
        assert refused.status_code == 503 and "stopping" in refused.text
        assert running.thread.is_alive()
        running.server.servers[0].get_loop().call_soon_threadsafe(running.release.set)
        assert "data: freed" in list(lines)
    running.thread.join(10)
    assert not running.thread.is_alive()


@pytest.mark.parametrize("running", [0.1], indirect=True)
def test_a_reply_that_outlasts_the_grace_ends_with_an_error_event(running: Running) -> None:
    with httpx.stream("GET", f"{running.url}/stream") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "data: begun"
        running.server.should_exit = True
        assert "data: the server is stopping. Send the request again" in list(lines)
    running.thread.join(10)
    assert not running.thread.is_alive()


@pytest.mark.parametrize("running", [30.0], indirect=True)
def test_a_second_interrupt_waits_for_no_reply_and_still_ends_the_application(running: Running) -> None:
    with httpx.stream("GET", f"{running.url}/stream") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "data: begun"
        running.server.handle_exit(signal.SIGINT, None)
        running.server.handle_exit(signal.SIGINT, None)
        list(lines)
    running.thread.join(10)
    assert not running.thread.is_alive() and running.ended
