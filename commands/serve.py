"""`xpert serve`."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, engine_options, pairs, take
from xpert.errors import BadInput, Unavailable
from xpert.experts.server.options import ServeOptions

__all__ = ["command"]

SERVED_BY = frozenset({"fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"})
"""What the extra `serve` brings."""
BACKLOG = 2048
"""Connections that wait to be accepted; uvicorn's own number."""


@click.command("serve")
@click.argument("mixture", metavar="MIXTURE")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option(
    "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
)
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the mixture says.")
@config_options(ServeOptions)
@engine_options
@common_options
def command(
    session: Session,
    mixture: str,
    port: int,
    host: str,
    location: str | None,
    base: str | None,
    engine: str,
    engine_params: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve a mixture over HTTP, OpenAI-compatible, with a small web page at /.

    `model` in a request is the mixture's name (the router chooses the experts), the mixture with another router or
    aggregator (`NAME:router=skills,k=3`), an expert's key, or `base`. New versions of what was named are served without
    a restart. Ctrl-C or SIGTERM ends it: running answers get --grace seconds to finish, and the exit status is 0.
    """
    try:
        import uvicorn

        from xpert.experts.server.opening import open_app, source_of
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in SERVED_BY:
            raise
        raise Unavailable(f"`serve` needs {error.name}", hint="pip install 'xpert-toolkit[serve]'") from None
    from xpert.experts.server.draining import DrainingServer
    from xpert.experts.serving import EngineChoice

    serving: ServeOptions = take(ServeOptions, options)
    choice = EngineChoice(engine, pairs(engine_params, option="--engine-param"))
    choice.options()
    _log_to_stderr(logging.WARNING if session.quiet else logging.INFO)
    loaded = source_of(mixture, serving, registry=location, base=base).load()
    with _bound(host, port) as listener:
        app = open_app(
            mixture,
            serving,
            registry=location,
            base=base,
            engine=choice,
            device=session.device,
            seed=session.seed,
            loaded=loaded,
            progress=session.progress,
        )
        address, bound = listener.getsockname()[:2]
        url = f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"
        listener.listen(BACKLOG)  # from here on nobody who read the address is refused, though nobody is answered yet
        session.result({"url": url, "model": loaded.name}, f"serving {loaded.name} at {url}/v1 (page: {url}/)")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, access_log=False)
        server = DrainingServer(config, app.state.service.operation.draining, grace=serving.grace)
        # Uvicorn sends itself the signal again once it has shut down: for SIGTERM that would end the process as killed.
        with suppress(KeyboardInterrupt), _term_as_interrupt():
            server.run(sockets=[listener])
        session.progress.say("stopped serving")


@contextmanager
def _term_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_to_stderr(level: int) -> None:
    """Shows what the server says beside requests: a new generation, keys read anew, what went wrong."""
    log = logging.getLogger("xpert.server")
    log.setLevel(level)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def _bound(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model is loaded so that a port in use is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadInput(
            f"cannot listen on {host}:{port}: {error.strerror or error}", hint="choose another --port or --host"
        ) from None
    return listener
