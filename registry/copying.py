"""Copying versions between registries of any kind, under their own numbers and with their own records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.registry.documents import DocumentName
from xpert.registry.names import parse_ref
from xpert.registry.store import Registry

__all__ = ["Copied", "copy_versions"]


@dataclass(frozen=True)
class Copied:
    """What became of one version: `new` where it was not there before; the tags that were moved to it."""

    ref: str
    new: bool
    tags: tuple[str, ...] = ()


def copy_versions(
    source: Registry,
    target: Registry,
    refs: Sequence[str],
    *,
    every: bool = False,
    tags: bool = False,
    allow_secret_like: bool = False,
    progress: Progress = SILENT,
) -> list[Copied]:
    """Copies versions, and the experts of mixtures before them; what is there already stays.

    `every`: all versions of a name that is given without one, not only the one that `latest` means. `tags`: tags that
    point to what is copied, except `latest`, are moved to it there. Signatures go along. Each version is checked when
    it leaves `source`, examined as if it were published when it enters `target`, and checked again by a place on its
    way (see `Remote.push`). Raises BadInput where a number is taken by another content there.
    """
    if source.location == target.location:
        raise BadInput("the registry is copied into itself", where=source.location, hint="give another --to")
    done: dict[str, Copied] = {}
    for ref in _with_experts(source, refs, every):
        record = source.record(ref)
        folder = source.pull(ref, progress=progress)
        new = target.adopt(record, folder, allow_secret_like=allow_secret_like, progress=progress)
        signatures = source.records.read_signatures(record.version.name, record.version.version)
        if signatures.signatures:
            target.take_over(signatures)
        moved = _move_tags(source, target, record.document) if tags else ()
        done[ref] = Copied(ref, new, moved)
    return list(done.values())


def _with_experts(source: Registry, refs: Sequence[str], every: bool) -> Iterable[str]:
    """The versions that are meant, each once, with those that mixtures among them need before them."""
    found: dict[str, None] = {}
    for text in refs:
        wanted = parse_ref(text)
        latest = source.resolve(wanted)
        numbers = source.numbers(wanted.name) if every and "@" not in text else (latest.version,)
        for number in numbers:
            version = source.resolve(f"{wanted.name}@{number}")
            found |= dict.fromkeys((*version.uses, version.ref))
    return found


def _move_tags(source: Registry, target: Registry, record: DocumentName) -> tuple[str, ...]:
    assert record.version is not None
    there = target.tags(record.name)
    moved = []
    for tag, number in source.tags(record.name).items():
        if number == record.version and tag != "latest" and there.get(tag) != number:
            target.tag(f"{record.name}@{number}", tag)
            moved.append(tag)
    return tuple(moved)
