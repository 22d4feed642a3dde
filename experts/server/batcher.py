"""Work of single requests done together: what comes while a batch is being worked on makes the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Generic, TypeVar

from xpert.errors import Unavailable, XpertError

__all__ = ["Batcher"]

A = TypeVar("A")
B = TypeVar("B")


class Batcher(Generic[A, B]):
    """`await batcher(item)` -> its result. `work(items)` runs in the executor, with at most `most` items, a batch at a
    time. Where a batch is refused with the user's error, its items are tried one by one, so that each hears its own."""

    def __init__(self, work: Callable[[Sequence[A]], Sequence[B]], executor: Executor, most: int) -> None:
        self._work, self._executor, self._most = work, executor, most
        self._pending: list[tuple[A, asyncio.Future[B]]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: A) -> B:
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._pending:
            batch = [entry for entry in self._pending[: self._most] if not entry[1].done()]
            del self._pending[: self._most]
            try:
                await self._run(batch)
            except XpertError as error:
                for entry in batch:
                    if len(batch) == 1:
                        _fail(entry[1], error)
                    else:
                        with suppress(XpertError):
                            await self._one(entry)
            except asyncio.CancelledError:
                # The executor gave the batch up, as it does at its end; nobody else would tell those who wait.
                for _, future in [*batch, *self._pending]:
                    _fail(future, Unavailable("the server is shutting down"))
                self._pending.clear()
                raise
            except Exception as error:
                # Whatever it is, those who wait must hear of it; they raise it where it is logged.
                for _, future in batch:
                    _fail(future, error)

    async def _one(self, entry: tuple[A, asyncio.Future[B]]) -> None:
        try:
            await self._run([entry])
        except Exception as error:
            # As above: the one who waits raises it.
            _fail(entry[1], error)

    async def _run(self, batch: list[tuple[A, asyncio.Future[B]]]) -> None:
        if not batch:
            return
        items = [item for item, _ in batch]
        results = await asyncio.get_running_loop().run_in_executor(self._executor, self._work, items)
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)


def _fail(future: asyncio.Future[B], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
