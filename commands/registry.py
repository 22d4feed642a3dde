"""`xpert registry`: publish, pull, list, show, search, verify, remove and gc over one `Registry`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options
from xpert.errors import Corrupt
from xpert.registry.card import Interval
from xpert.registry.store import MAX_GIB, Details, Registry, Version

__all__ = ["command"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Publish, list, show, pull and verify experts and mixtures.

    NAME is OWNER/NAME; a version is asked for as OWNER/NAME@3, and is the latest where none is given.
    """


def _registry_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--registry besides the common options; the function receives the open `registry`."""
    return click.option(
        "--registry",
        callback=lambda context, parameter, value: Registry(value),
        metavar="URL",
        help="A folder or file:// URL.  [default: $XPERT_REGISTRY, or the user's data folder]",
    )(common_options(function))


@command.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="EXPERT|MIXTURE.json")
@click.option("--name", required=True, metavar="OWNER/NAME", help="The name to publish under.")
@click.option(
    "--max-size",
    type=click.FloatRange(0, min_open=True),
    default=MAX_GIB,
    show_default=True,
    metavar="GIB",
    help="Refuse an expert larger than this.",
)
@_registry_options
def publish(session: Session, registry: Registry, source: Path, name: str, max_size: float) -> None:
    """File an expert folder or a mixture as the next version of a name."""
    version = registry.publish(source, name, max_gib=max_size, progress=session.progress)
    value = {"ref": version.ref, "repeated": version.repeated, **version.to_dict(), "registry": str(registry.folder)}
    session.result(value, f"{'already ' if version.repeated else ''}published {version.ref}")


@command.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to; the cache by default.")
@_registry_options
def pull(session: Session, registry: Registry, ref: str, out: Path | None) -> None:
    """Copy a version out, every file checked; prints the folder."""
    version = registry.resolve(ref)
    folder = registry.pull(version.ref, out, progress=session.progress)
    session.result({"ref": version.ref, "digest": version.digest, "path": str(folder)}, str(folder))


@command.command("list")
@_registry_options
def list_names(session: Session, registry: Registry) -> None:
    """List all names with their latest version."""
    entries = registry.list()
    value = [{**entry.latest.to_dict(), "ref": entry.latest.ref, "versions": list(entry.versions)} for entry in entries]
    text = _table(
        ("NAME", "VERSIONS", "KIND", "BASE", "SKILLS", "SIZE", "CREATED"),
        [
            (
                *(entry.latest.name, _numbers(entry.versions), entry.latest.kind, entry.latest.base or "-"),
                *(_skills(entry.latest), _size(entry.latest.size), entry.latest.created),
            )
            for entry in entries
        ],
    )
    empty = f"nothing is published in {registry.folder} yet"
    session.result({"registry": str(registry.folder), "entries": value}, text if entries else empty)


@command.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@_registry_options
def show(session: Session, registry: Registry, ref: str) -> None:
    """Show a version's card, skill profile and files."""
    details = registry.show(ref)
    value = {
        **details.version.to_dict(),
        "ref": details.version.ref,
        "versions": list(details.versions),
        "files": [dataclasses.asdict(file) for file in details.files],
        "card" if details.version.kind == "expert" else "mixture": details.document,
    }
    session.result(value, _shown(details))


@command.command()
@click.argument("text", nargs=-1)
@click.option("--base", metavar="MODEL", help="Only experts of this base model (its reference or fingerprint).")
@click.option("--min-score", type=float, help="Only where a skill asked for, or any if none is, scores this much.")
@_registry_options
def search(
    session: Session, registry: Registry, text: Sequence[str], base: str | None, min_score: float | None
) -> None:
    """Search names, descriptions and skills; the words' beginnings suffice."""
    hits = registry.search(" ".join(text), base=base, min_score=min_score)
    value = [{**hit.version.to_dict(), "ref": hit.version.ref, "skill": hit.skill, "score": hit.score} for hit in hits]
    rows = [
        (
            *(hit.version.ref, hit.version.kind, hit.version.base or "-"),
            *(_skills(hit.version), "-" if hit.score is None else f"{hit.skill} {hit.score:.3f}"),
        )
        for hit in hits
    ]
    table = _table(("VERSION", "KIND", "BASE", "SKILLS", "BEST"), rows)
    session.result({"hits": value}, table if hits else "nothing found")


@command.command()
@_registry_options
def verify(session: Session, registry: Registry) -> None:
    """Read every file and check it; exit status 0 where all is sound."""
    found = registry.verify(session.progress)
    value = {"registry": str(registry.folder), "sound": not found, "problems": [dataclasses.asdict(p) for p in found]}
    session.result(value, "\n".join(str(problem) for problem in found) if found else "all is sound")
    if found:
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise Corrupt(count, where=str(registry.folder), hint="publish damaged experts again from their folders")


@command.command()
@click.argument("ref", metavar="NAME[@VERSION]")
@click.option("--force", is_flag=True, help="Even if a mixture refers to it.")
@_registry_options
def remove(session: Session, registry: Registry, ref: str, force: bool) -> None:
    """Remove a version, or a name with all its versions; their numbers are not given out again."""
    gone = [version.ref for version in registry.remove(ref, force=force)]
    session.result({"removed": gone}, f"removed {', '.join(gone)}; `xpert registry gc` frees the space")


@command.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_registry_options
def gc(session: Session, registry: Registry, dry_run: bool) -> None:
    """Remove files that no version needs."""
    garbage = registry.gc(dry_run=dry_run)
    value = {"files": garbage.files, "size": garbage.size, "dry_run": dry_run}
    verb = "would remove" if dry_run else "removed"
    session.result(value, f"{verb} {garbage.files} files, {_size(garbage.size)}")


def _shown(details: Details) -> str:
    version = details.version
    facts = {
        "kind": version.kind,
        "versions": _numbers(details.versions),
        "description": version.description,
        "base": f"{version.base} ({version.base_fingerprint[:12]})" if version.base else "",
        "skills": ", ".join(version.skills),
        "experts": ", ".join(version.uses),
        "licences": ", ".join(f"{name} ({n})" for name, n in (details.document.get("licences") or {}).items()),
        "digest": version.digest,
        "created": version.created,
    }
    lines = [version.ref, *(f"  {key:<12} {value}" for key, value in facts.items() if value)]
    profile = details.document.get("profile") if version.kind == "expert" else None
    if profile:
        rows = [
            (
                *(skill, score["metric"], _interval(score["expert"]), _interval(score["base"])),
                *(f"{score['expert']['score'] - score['base']['score']:+.3f}", str(score["expert"]["n"])),
            )
            for skill, score in profile["skills"].items()
        ]
        title = f"skill profile on {profile['suite']} (95 % intervals)"
        lines += ["", title, _table(("SKILL", "METRIC", "EXPERT", "BASE", "GAIN", "N"), rows)]
    files = [(file.path, _size(file.size), file.sha256[:16]) for file in details.files]
    return "\n".join([*lines, "", _table(("FILE", "SIZE", "SHA256"), files)])


def _interval(value: dict[str, Any]) -> str:
    interval = Interval(**value)
    return f"{interval.score:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _skills(version: Version) -> str:
    shown = ", ".join(version.skills[:3])
    return f"{shown} +{len(version.skills) - 3}" if len(version.skills) > 3 else shown or "-"


def _numbers(versions: Sequence[int]) -> str:
    """`1-3,5`: runs of versions."""
    runs: list[list[int]] = []
    for version in versions:
        if runs and runs[-1][1] == version - 1:
            runs[-1][1] = version
        else:
            runs.append([version, version])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)
