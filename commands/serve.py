"""`xpert serve`."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import replace

import click

from xpert.commands.options import Session, common_options, engine_options, pairs
from xpert.errors import BadInput, Unavailable

__all__ = ["command"]

GRACE = 30  # seconds that running answers get after Ctrl-C


@click.command("serve")
@click.argument("mixture", metavar="MIXTURE")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option(
    "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
)
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the mixture says.")
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Prompts answered at a time.")
@engine_options
@common_options
def command(
    session: Session,
    mixture: str,
    port: int,
    host: str,
    location: str | None,
    base: str | None,
    max_batch: int,
    engine: str,
    engine_params: tuple[str, ...],
) -> None:
    """Serve a mixture over HTTP, OpenAI-compatible, with a small web page at /.

    `model` in a request is the mixture's name (the router chooses the experts), an expert's key, or `base`. Ctrl-C
    ends it: running answers get 30 s to finish, and the exit status is 0.
    """
    try:
        import uvicorn

        from xpert.experts.server.app import create_app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise Unavailable(f"`serve` needs {error.name}", hint="pip install 'xpert-toolkit[serve]'") from None
    from xpert.experts.mixture import load_mixture
    from xpert.experts.serving import EngineChoice, MixtureRunner
    from xpert.registry.opening import open_registry

    choice = EngineChoice(engine, pairs(engine_params, option="--engine-param"))
    choice.options()
    loaded = load_mixture(mixture, open_registry(location) if location is not None else None)
    if base is not None:
        loaded = replace(loaded, base=replace(loaded.base, ref=base))
    with _bound(host, port) as listener:
        runner = MixtureRunner.open(
            loaded,
            device=session.device,
            seed=session.seed,
            max_batch=max_batch,
            engine=choice,
            progress=session.progress,
        )
        address, bound = listener.getsockname()[:2]
        url = f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"
        session.result({"url": url, "model": loaded.name}, f"serving {loaded.name} at {url}/v1 (page: {url}/)")
        config = uvicorn.Config(
            create_app(runner), log_level="warning", timeout_graceful_shutdown=GRACE, access_log=False
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
            uvicorn.Server(config).run(sockets=[listener])
        session.progress.say("stopped serving")


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
