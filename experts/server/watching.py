"""Hot publish: what is served follows what was named, without a restart.

A look costs a few reads of names in the registry. Only where something has changed is a new generation made, beside the
requests that run; a new version that cannot be served is logged, and the current one stays.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.errors import BadInput, NotFound, Unavailable, XpertError
from xpert.experts.mixture import BASE, ExpertStore, Mixture, MixtureExpert, open_expert
from xpert.experts.mixture_file import MIXTURE_FILE, MixtureEntry, load_mixture
from xpert.experts.router_state import read_router_state
from xpert.experts.routing import options_for
from xpert.experts.server.generations import Generations, served_fingerprint
from xpert.registry.card import CARD_FILE
from xpert.registry.versions import Version

__all__ = ["Source", "Watch"]

log = logging.getLogger("xpert.server")

_UNKNOWN = "never looked"
"""Before the first look, which therefore loads again what is followed: while a model was loaded it may have changed."""


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
        self._stores: dict[str | None, Any] = {}
        self._gone: list[MixtureEntry] = []

    def load(self) -> Mixture:
        """The mixture as it is now. Raises as `load_mixture`."""
        store = self._store(self._location) if self._location is not None else None
        self._gone = []
        gone = self._leave_out if self._moves else None
        mixture = load_mixture(self.ref, store, gone=gone)
        if self.base is not None:
            mixture = dataclasses.replace(mixture, base=dataclasses.replace(mixture.base, ref=self.base))
        return self._with_newest(mixture) if self._moves else mixture

    def state(self, mixture: Mixture) -> Hashable:
        """What differs once something that is followed has changed since `mixture` was loaded."""
        if self.follow == "none":
            return None
        found: list[Hashable] = [self._state_of_name(mixture)]
        if self._moves:
            store = self._store_of(mixture)
            if self.follow == "all":
                found.append(tuple(sorted((e.latest.ref, e.latest.digest) for e in store.list())))
            else:
                refs = {expert.ref for expert in mixture.experts if not expert.in_folder}
                names = {_name(ref) for ref in (*refs, *(ref for _, ref, _, _ in self._gone))}
                newest = {name: _newest(store, name) for name in sorted(names)}
                found += [version and (version.ref, version.digest) for version in newest.values()]
        return tuple(found)

    @property
    def _moves(self) -> bool:
        return self.follow in ("experts", "all")

    def _state_of_name(self, mixture: Mixture) -> Hashable:
        path = Path(self.ref)
        if path.is_dir():
            files = [file for file in (path / MIXTURE_FILE, path / CARD_FILE) if file.is_file()]
            return tuple(_stamp(file) for file in files)
        if path.is_file():
            return _stamp(path)
        version = self._store_of(mixture).resolve(self.ref)
        return version.ref, version.digest

    def _store_of(self, mixture: Mixture) -> Any:
        return self._store(self._location if self._location is not None else mixture.registry)

    def _store(self, location: str | None) -> Any:
        """Kept: a remote registry lists its documents for every one that is opened, and for a kept one once a look."""
        if location not in self._stores:
            self._stores[location] = self._open_store(location)
        return self._stores[location]

    def _leave_out(self, entry: MixtureEntry, error: NotFound) -> None:
        self._gone.append(entry)

    def _with_newest(self, mixture: Mixture) -> Mixture:
        """The mixture with its registered experts in their newest versions, without those that were removed, and with
        follow `all` also the registry's other experts of the base that its router can choose."""
        store = self._store_of(mixture)
        members = [self._newest_of(mixture, expert, store) for expert in mixture.experts]
        for key, ref, _, weight in self._gone:  # the version that was mixed is gone, and perhaps not the name
            newest = _newest(store, ref)
            if newest is not None and _fits(newest, mixture):
                members.append(dataclasses.replace(open_expert(newest.ref, store, key=key), weight=weight))
            else:
                log.warning("expert %s is no longer in the registry and is left out", ref)
        if self.follow == "all":
            members += self._others(mixture, members, store)
        return dataclasses.replace(mixture, experts=tuple(members))

    def _newest_of(self, mixture: Mixture, expert: MixtureExpert, store: Any) -> MixtureExpert:
        newest = None if expert.in_folder else _newest(store, expert.ref)
        if newest is None or newest.ref == expert.ref:
            return expert
        if not _fits(newest, mixture):
            log.warning("%s is not of the served base, and %s stays", newest.ref, expert.ref)
            return expert
        key = expert.key if expert.key != expert.ref else newest.ref
        return dataclasses.replace(open_expert(newest.ref, store, key=key), weight=expert.weight)

    def _others(self, mixture: Mixture, members: list[MixtureExpert], store: ExpertStore) -> list[MixtureExpert]:
        held = {_name(expert.ref) for expert in members}
        taken = {expert.key for expert in members} | {mixture.name, BASE}
        found = []
        for entry in store.list():  # type: ignore[attr-defined]  # every registry lists; a mixture needs less of it
            version = entry.latest
            if _fits(version, mixture) and version.name not in held and version.name not in taken:
                try:
                    found.append(open_expert(version.ref, store))
                except BadInput as error:  # one that somebody published damaged holds up no other
                    log.warning("expert %s is left out: %s", version.ref, error)
        useless = _out_of_reach(mixture, found)
        for key, why in useless.items():
            log.warning("expert %s of the registry is not served: %s", key, why)
        return [expert for expert in found if expert.key not in useless]


class Watch:
    """A thread that looks at a source every `seconds` and publishes what is new."""

    def __init__(self, source: Source, generations: Generations, *, seconds: float) -> None:
        self._source, self._generations, self._seconds = source, generations, seconds
        self._state: Hashable = _UNKNOWN
        self._complaint = ""
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
        if state is None or state == self._state:
            return False
        # Taken before loading: what changes meanwhile is seen by the next look.
        before, self._state = self._state, state
        try:
            mixture = self._source.load()
            if served_fingerprint(mixture) == self._generations.current.fingerprint:
                return False
            generation = self._generations.open(mixture)
        except (Unavailable, OSError):
            self._state = before  # it may be reached by the next look; what is wrong in itself waits for a change
            raise
        log.info("serving generation %d: %s with %d experts", generation.number, mixture.name, len(mixture.experts))
        self._generations.publish(generation)
        return True

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.look()
            except XpertError as error:
                self._complain(f"the registry's new state is not served: {error}")
            except Exception:
                # A defect here must not end the watch, nor what is served.
                log.exception("looking at the registry failed")
            else:
                self._complain("")

    def _complain(self, text: str) -> None:
        """Says what is new: a registry that is away for a night is not told of every five seconds."""
        if text and text != self._complaint:
            log.warning("%s", text)
        elif self._complaint and not text:
            log.info("the registry is followed again")
        self._complaint = text


def _name(ref: str) -> str:
    return ref.partition("@")[0]


def _fits(version: Version, mixture: Mixture) -> bool:
    return version.kind == "expert" and version.base_fingerprint == mixture.base.fingerprint


def _out_of_reach(mixture: Mixture, experts: Sequence[MixtureExpert]) -> dict[str, str]:
    """Key -> why the mixture's router could never choose that expert, and would refuse it."""
    router = mixture.router
    found: dict[str, str] = {}
    lacking = getattr(plugins.load("router", router), "lacking", None)
    if lacking is not None:
        told = lacking(options_for(mixture), [expert.routable() for expert in experts])
        found |= {key: f"it has no {what}, which router {router} needs" for key, what in told.items()}
    if mixture.router_state is not None:
        learned = read_router_state(mixture.router_state.file).facts.get("subjects")
        if isinstance(learned, list):
            new = [expert.key for expert in experts if expert.key not in learned]
            found |= dict.fromkeys(new, f"router {router} has not learned it; train the router again")
    return found


def _newest(store: Any, ref: str) -> Version | None:
    try:
        found: Version = store.resolve(_name(ref))
    except NotFound:
        return None
    return found


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
