"""A mixture's name -> the application that serves it, ready for any ASGI server."""

from __future__ import annotations

from fastapi import FastAPI

from xpert.experts.mixture import Mixture
from xpert.experts.server.app import create_app
from xpert.experts.server.embeddings import open_server_space
from xpert.experts.server.generations import Generations
from xpert.experts.server.key_file import read_keys
from xpert.experts.server.options import ServeOptions
from xpert.experts.server.watching import Source, Watch
from xpert.experts.serving import EngineChoice, open_engine
from xpert.progress import SILENT, Progress
from xpert.registry.opening import open_registry

__all__ = ["open_app", "source_of"]


def source_of(mixture: str, options: ServeOptions, *, registry: str | None = None, base: str | None = None) -> Source:
    """Where a mixture comes from, and how it is followed."""
    return Source(mixture, open_registry, location=registry, base=base, follow=options.follow)


def open_app(
    mixture: str,
    options: ServeOptions | None = None,
    *,
    registry: str | None = None,
    base: str | None = None,
    engine: EngineChoice | None = None,
    device: str = "auto",
    seed: int = 0,
    loaded: Mixture | None = None,
    progress: Progress = SILENT,
) -> FastAPI:
    """Loads the base model and all experts, and makes the application; it follows the registry while it runs.

    `mixture`, `registry` and `base` are as of `xpert serve`; `loaded` is the mixture where it was loaded already.
    Raises what `load_mixture` and the engine raise.
    """
    options = options or ServeOptions()
    source = source_of(mixture, options, registry=registry, base=base)
    # What is wrong with these is said before the model is waited for.
    if options.api_keys is not None:
        read_keys(options.api_keys)
    space = open_server_space(options.embedder, device=device)
    loaded = loaded or source.load()
    lm, opened = open_engine(
        loaded.base.ref,
        loaded.base.fingerprint,
        device=device,
        max_batch=options.max_batch,
        engine=engine,
        progress=progress,
    )
    progress.say(f"loading {len(loaded.experts)} experts")
    generations = Generations(loaded, lm, opened, seed=seed, device=device)
    watch = Watch(source, generations, seconds=options.watch)
    return create_app(generations, options, device=device, watch=watch, space=space)
