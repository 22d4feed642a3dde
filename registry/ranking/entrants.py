"""Which experts of a registry are ranked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xpert.errors import BadInput, NotFound

if TYPE_CHECKING:
    from xpert.registry.store import Details, Registry

__all__ = ["experts_to_rank"]


def experts_to_rank(registry: Registry, names: Sequence[str] = (), *, base: str | None = None) -> list[Details]:
    """The named versions; without names the latest version of every expert of one base that has a profile.

    `base` is what `Version.is_of` takes. Raises BadInput where experts of several bases are meant and none is chosen,
    or an expert is named twice; NotFound where there are none.
    """
    if names:
        found = [registry.show(name) for name in names]
        twice = [ref for ref, count in Counter(one.version.ref for one in found).items() if count > 1]
        if twice:
            raise BadInput(f"{twice[0]} is named twice", hint="name each version once")
        strangers = [one.version for one in found if base is not None and not one.version.is_of(base)]
        if strangers:
            raise BadInput(f"{strangers[0].ref} is of the base {strangers[0].base}, not of {base}")
        return found
    latest = [entry.latest for entry in registry.list() if entry.latest.kind == "expert" and entry.latest.scores]
    if not latest:
        raise NotFound(
            "no profiled expert is published", hint="`xpert profile` scores an expert; publish it again after that"
        )
    chosen = latest if base is None else [version for version in latest if version.is_of(base)]
    bases = Counter(version.base_fingerprint for version in chosen or latest)  # one base may go by several names
    shown = {version.base_fingerprint: version.base_shown for version in latest}
    told = ", ".join(f"{shown[one]} ({one[:12]}): {count}" for one, count in bases.most_common(6))
    if not chosen:
        raise NotFound(f"no profiled expert is of the base {base!r}", hint=f"there are those of {told}")
    if len(bases) > 1:
        raise BadInput(
            f"the profiled experts are of {len(bases)} base models: {told}",
            hint="choose one by --base, by its name or the beginning of its fingerprint",
        )
    return [registry.show(version.ref) for version in chosen]
