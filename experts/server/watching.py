"""Hot publish: what is served follows what was named, without a restart.

A look costs a few reads of names in the registry. Only where something has changed is a new generation made, beside the
requests that run; a new version that cannot be served is logged, and the current one stays.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from xpert.errors import NotFound, XpertError
from xpert.experts.mixture import BASE, ExpertStore, Mixture, MixtureExpert, open_expert
from xpert.experts.mixture_file import MIXTURE_FILE, load_mixture
from xpert.experts.server.generations import Generations
from xpert.registry.card import CARD_FILE

__all__ = ["Source", "Watch"]

log = logging.getLogger("xpert.server")


class Source:
    """Where a served mixture comes from: a file, a folder, or a name in a registry.

    `state` is cheap and changes when `load` would give something else. follow: see `ServeOptions`. `base` is where the
    base model lies, if not where the mixture says.
    """

    def __init__(
        self,
        ref: str,
        open_store: Callable[[str | None], Any],
        *,
        location: str | None = None,
        base: str | None = None,
        follow: str = "name",
    ) -> None:
        self.ref, self.base, self.follow = ref, base, follow
        self._open_store, self._location = open_store, location

    def load(self) -> Mixture:
        """The mixture as it is now. Raises as `load_mixture`."""
        store = self._open_store(self._location) if self._location is not None else None
        gone = _left_out if self.follow in ("experts", "all") else None
        mixture = load_mixture(self.ref, store, gone=gone)
        if self.base is not None:
            mixture = dataclasses.replace(mixture, base=dataclasses.replace(mixture.base, ref=self.base))
        if self.follow in ("experts", "all"):
            mixture = self._with_newest(mixture)
        return mixture

    def state(self, mixture: Mixture) -> Hashable:
        """What differs once something that is followed has changed since `mixture` was loaded."""
        if self.follow == "none":
            return None
        found: list[Hashable] = [self._state_of_name(mixture)]
        if self.follow in ("experts", "all"):
            store = self._store(mixture)
            if self.follow == "all":
                found.append(tuple(sorted((e.latest.ref, e.latest.digest) for e in store.list())))
            else:
                found += [_newest(store, expert.ref) for expert in mixture.experts if _registered(expert.ref)]
        return tuple(found)

    def _state_of_name(self, mixture: Mixture) -> Hashable:
        path = Path(self.ref)
        if path.is_dir():
            files = [file for file in (path / MIXTURE_FILE, path / CARD_FILE) if file.is_file()]
            return tuple(_stamp(file) for file in files)
        if path.is_file():
            return _stamp(path)
        version = self._store(mixture).resolve(self.ref)
        return version.ref, version.digest

    def _store(self, mixture: Mixture) -> Any:
        return self._open_store(self._location if self._location is not None else mixture.registry)

    def _with_newest(self, mixture: Mixture) -> Mixture:
        """The mixture with its registered experts in their newest versions, without those that were removed, and with
        follow `all` also the registry's other experts of the base."""
        store = self._store(mixture)
        members: list[MixtureExpert] = []
        for expert in mixture.experts:
            if not _registered(expert.ref):
                members.append(expert)
                continue
            newest = _newest(store, expert.ref)
            if newest is None:
                log.warning("expert %s is no longer in the registry and is left out", expert.ref)
                continue
            if newest[0] == expert.ref:
                members.append(expert)
            else:
                key = expert.key if expert.key != expert.ref else newest[0]
                members.append(dataclasses.replace(open_expert(newest[0], store, key=key), weight=expert.weight))
        if self.follow == "all":
            members += self._others(mixture, members, store)
        if not members:
            raise NotFound("none of the mixture's experts is left in the registry", where=self.ref)
        return dataclasses.replace(mixture, experts=tuple(members))

    def _others(self, mixture: Mixture, members: list[MixtureExpert], store: ExpertStore) -> list[MixtureExpert]:
        held = {expert.ref.partition("@")[0] for expert in members}
        taken = {expert.key for expert in members} | {mixture.name, BASE}
        found = []
        for entry in store.list():  # type: ignore[attr-defined]  # every registry lists; a mixture needs less of it
            version = entry.latest
            fits = version.kind == "expert" and version.base_fingerprint == mixture.base.fingerprint
            if fits and version.name not in held and version.name not in taken:
                found.append(open_expert(version.ref, store))
        return found


class Watch:
    """A thread that looks at a source every `seconds` and publishes what is new."""

    def __init__(self, source: Source, generations: Generations, *, seconds: float) -> None:
        self._source, self._generations, self._seconds = source, generations, seconds
        self._state = self._look(generations.current.mixture)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xpert-watch", daemon=True)

    def start(self) -> None:
        if self._source.follow != "none":
            self._thread.start()

    def close(self) -> None:
        """Ends the thread; a generation in the making is finished first."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> bool:
        """Publishes what is new, if anything; whether it did. Raises XpertError where the new cannot be served."""
        current = self._generations.current.mixture
        state = self._source.state(current)
        if state == self._state:
            return False
        # Taken before loading: what changes meanwhile is seen by the next look. A state that cannot be served is not
        # tried again until it changes.
        self._state = state
        mixture = self._source.load()
        generation = self._generations.open(mixture)
        if generation.fingerprint == self._generations.current.fingerprint:
            self._generations.drop(generation)
            return False
        self._generations.publish(generation)
        log.info("serving generation %d: %s with %d experts", generation.number, mixture.name, len(mixture.experts))
        return True

    def _look(self, mixture: Mixture) -> Hashable:
        try:
            return self._source.state(mixture)
        except XpertError:
            return None  # gone while the server started: the first look says so

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.look()
            except XpertError as error:
                log.warning("the registry's new state is not served: %s", error)
            except Exception:
                # A defect here must not end the watch, nor what is served.
                log.exception("looking at the registry failed")


def _left_out(key: str, error: NotFound) -> None:
    log.warning("expert %s is left out: %s", key, error)


def _registered(ref: str) -> bool:
    return not ref.startswith(("/", "."))


def _newest(store: Any, ref: str) -> tuple[str, str] | None:
    try:
        version = store.resolve(ref.partition("@")[0])
    except NotFound:
        return None
    return version.ref, version.digest


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
