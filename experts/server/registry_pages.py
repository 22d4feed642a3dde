"""The pages of a registry, as the server shows them: those of the registry that a mixture's experts come from, with the
mixture itself and such of its experts as lie in folders."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath

from xpert.errors import XpertError
from xpert.experts.mixture import Mixture, MixtureExpert
from xpert.registry.opening import open_registry
from xpert.registry.site.data import Member, MixtureFacts, ShownVersion, catalogue, shown_versions, sound_card
from xpert.registry.site.pages import MEDIA_TYPES, POLICY, Site
from xpert.registry.store import Registry
from xpert.registry.versions import StoredFile, Version
from xpert.storage import hash_file

__all__ = ["RegistryPages"]

LOOK_AGAIN = 5.0
"""Seconds for which pages are shown without asking whether the registry has changed."""


class RegistryPages:
    """One site, made at the first request and again once the registry has changed. May be asked by several threads."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._lock = threading.Lock()
        self._site: Site | None = None
        self._state: Hashable = None
        self._looked = 0.0

    def get(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """Content and headers of the page at a path such as `names/me/dates.html`; None where there is no such page.

        Pages are looked up by their whole path and no file is opened by it, so nothing else can be asked for. Raises
        the errors of the registry: NotFound, Corrupt, Unavailable.
        """
        path = path or "index.html"
        content = self._current().render(path)
        if content is None:
            return None
        return content, {
            "content-type": MEDIA_TYPES[PurePosixPath(path).suffix],
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }

    def _current(self) -> Site:
        with self._lock:
            if self._site is None or time.monotonic() > self._looked + LOOK_AGAIN:
                registry = self._registry()
                state = self._state_of(registry)
                if self._site is None or state != self._state:
                    found = catalogue(self._shown(registry), title=f"Behind {self.mixture.name}")
                    self._site, self._state = Site(found), state
                self._looked = time.monotonic()
            return self._site

    def _registry(self) -> Registry | None:
        if not self._registered():
            return None
        return open_registry(self.mixture.registry)

    def _registered(self) -> list[MixtureExpert]:
        return [expert for expert in self.mixture.experts if not expert.in_folder]

    def _state_of(self, registry: Registry | None) -> Hashable:
        """What differs once something was published, removed, tagged or signed, or a folder was changed."""
        listed: tuple[Hashable, ...] = ()
        if registry is not None:
            records = registry.folder / "records"
            listed = tuple((entry.latest.ref, entry.latest.digest, entry.versions) for entry in registry.list())
            listed += tuple(sorted((path.name, path.stat().st_mtime_ns) for path in (records, *records.glob("*"))))
        folders = [expert.folder for expert in self.mixture.experts if expert.in_folder]
        files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        return listed, tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)

    def _shown(self, registry: Registry | None) -> Iterator[ShownVersion]:
        names = set()
        for entry in shown_versions(registry) if registry else ():
            names.add(entry.version.name)
            yield entry
        for expert in self.mixture.experts:
            if expert.in_folder and expert.key not in names:
                yield _folder_version(expert)
        if self.mixture.name not in names:
            yield self._itself()

    def _itself(self) -> ShownVersion:
        mixture = self.mixture
        refs = tuple(f"{expert.key}@1" if expert.in_folder else expert.ref for expert in mixture.experts)
        members = [Member(expert.key, ref, expert.weight) for expert, ref in zip(mixture.experts, refs, strict=True)]
        gate = mixture.gate
        facts = MixtureFacts(
            tuple(members),
            mixture.router,
            mixture.router_params,
            gate.name if gate else "",
            gate.params if gate else {},
            tuple(mixture.recruited),
        )
        skills = tuple(dict.fromkeys(skill for expert in mixture.experts for skill in expert.card.skills))
        version = Version(
            name=mixture.name,
            version=1,
            kind="mixture",
            digest="",
            created=mixture.created,
            size=0,
            base=mixture.base.ref,
            base_fingerprint=mixture.base.fingerprint,
            skills=skills,
            uses=refs,
        )
        return ShownVersion(version, mixture=facts)


def _folder_version(expert: MixtureExpert) -> ShownVersion:
    card = expert.card
    files = []
    for path in sorted(expert.folder.iterdir()):
        with suppress(XpertError):  # a name that no registry would take, such as that of a hidden file
            if path.is_file():
                files.append(StoredFile(path.name, path.stat().st_size, hash_file(path)))
    version = Version(
        name=expert.key,
        version=1,
        kind="expert",
        digest="",
        created=card.created,
        size=sum(file.size for file in files),
        base=card.base.ref,
        base_fingerprint=card.base.fingerprint,
        description=card.description,
        skills=card.skills,
    )
    try:
        return ShownVersion(version, files=tuple(files), card=sound_card(card))
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"its document is not of the form it should have: {error}"
        return ShownVersion(version, files=tuple(files), problem=problem)
