"""A pool of actors on a Ray cluster: one that exists, or one started here for the run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from xpert.errors import BadInput, Unavailable, XpertError
from xpert.progress import SILENT, Progress
from xpert.protocols import RowPass, RowWorker
from xpert.records import Row

__all__ = ["PLUGIN"]

_ATTEMPTS = 3
"""How often a shard is begun before a dying worker is taken to be its fault."""


class Actor:
    """Holds the opened pass; one process on one place of the cluster."""

    def __init__(self, row_pass: RowPass, device: str) -> None:
        self.worker: RowWorker = row_pass.open(device)

    def work(self, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
        return self.worker(rows)


class Ray:
    """Runs a pass on `workers` actors, each with the model loaded once; a shard whose worker dies is done by another.

    The cluster is that of RAY_ADDRESS, or one on this machine for as long as this process lives. `workers` is one
    actor per GPU of the cluster unless given, or one per CPU where it has none. With GPUs every actor holds one.
    Every shard gives what it gives in process, on the same kind of device. Starting costs some seconds: for clusters
    and several GPUs, not for a laptop.
    """

    def __init__(self, *, workers: int | None = None, device: str = "auto", progress: Progress = SILENT) -> None:
        if importlib.util.find_spec("ray") is None:
            raise Unavailable("the executor ray needs Ray", hint="run: pip install 'xpert-toolkit[ray]'")
        if workers is not None and workers < 1:
            raise BadInput(f"workers is {workers}; the least is 1")
        self.workers, self.device, self.progress = workers, device, progress

    def run(
        self, row_pass: RowPass, shards: Sequence[Callable[[], Sequence[Row]]]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        ray: Any = importlib.import_module("ray")
        _connect()
        there = ray.cluster_resources()
        gpus = 0 if self.device == "cpu" else int(there.get("GPU", 0))
        places = self.workers or gpus or max(1, int(there.get("CPU", 1)))
        actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Actor)
        place = self.device if not gpus or self.device == "auto" else "cuda"  # Ray shows an actor its own GPU alone

        def start() -> Any:
            return actor.remote(row_pass, place)

        pool = _Pool([start() for _ in range(min(places, len(shards)))], start, self.progress)
        try:
            yield from pool.run(shards)
        finally:
            pool.close()


class _Pool:
    """Actors, and the shard that each is at."""

    def __init__(self, actors: list[Any], start: Callable[[], Any], progress: Progress) -> None:
        self.idle, self.start, self.progress = deque(actors), start, progress
        self.busy: dict[Any, tuple[int, Any]] = {}

    def run(self, shards: Sequence[Callable[[], Sequence[Row]]]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        import ray

        waiting, attempts = deque(range(len(shards))), [0] * len(shards)
        while waiting or self.busy:
            while waiting and self.idle:
                index, actor = waiting.popleft(), self.idle.popleft()
                attempts[index] += 1
                self.busy[actor.work.remote(list(shards[index]()))] = (index, actor)
            [done], _ = ray.wait(list(self.busy), num_returns=1)
            index, actor = self.busy.pop(done)
            try:
                arrays = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise _own(error) from error
            except ray.exceptions.RayActorError as error:
                if attempts[index] == _ATTEMPTS:
                    raise Unavailable(
                        f"a worker died {_ATTEMPTS} times at the same shard: {_first_line(error)}",
                        hint="give the workers more memory, or lower --max-length",
                    ) from None
                self.progress.say("a Ray worker died; its shard is done again by a new one")
                waiting.appendleft(index)
                self.idle.append(self.start())
                continue
            self.idle.append(actor)
            yield index, arrays

    def close(self) -> None:
        import ray

        for actor in [*self.idle, *(actor for _, actor in self.busy.values())]:
            ray.kill(actor)


def _own(error: Any) -> BaseException:
    """The error of ours that a worker raised, else the worker's as it is."""
    cause = error.cause
    return cause if isinstance(cause, XpertError) else error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _connect() -> None:
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "auto":
        _reach(address)
    # Ray's own chatter and its usage report stay off; workers see the same modules and settings as this process.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray lets its workers give way to everything else; here they are what the user waits for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address:
            ray.init(address=address, **settings)
        else:
            # Without an address Ray would join any cluster it finds traces of here, also one that is going down.
            ray.init(address="local", include_dashboard=False, **settings)
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise Unavailable(f"{where} cannot be reached: {_first_line(error)}", hint="see `ray status`") from None


def _reach(address: str) -> None:
    """Raises Unavailable where nobody listens: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host or port, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"the Ray cluster at {address} cannot be reached: {error}", hint="check RAY_ADDRESS, or unset it"
        ) from None


PLUGIN = Ray
