"""The site as a folder that appears whole: written beside its place, and put there in one step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xpert.errors import BadInput, XpertError
from xpert.progress import SILENT, Progress
from xpert.registry.site.data import Catalogue
from xpert.registry.site.pages import Site
from xpert.storage import check_output, draft_folder, read_json, write_json

__all__ = ["MARK", "Written", "write_site"]

MARK = "site.json"
"""The file by which a folder is known as a site of ours, which may be replaced; it lists the others."""
KIND = "registry site"


@dataclass(frozen=True)
class Written:
    """What was written: how many files and bytes, and how many names they show."""

    folder: Path
    files: int
    size: int
    names: int


def write_site(found: Catalogue, target: Path, *, progress: Progress = SILENT) -> Written:
    """Writes all pages into `target`, replacing a site that was written there before.

    Raises BadInput where `target` holds anything else, or a site into which other files have been put.
    """
    replace = _is_own(target)
    check_output(target, replace=replace)
    site = Site(found)
    paths = site.paths()
    size = 0
    with draft_folder(target, replace=replace) as draft, progress.task("pages", total=len(paths)) as task:
        for path in paths:
            content = site.render(path)
            assert content is not None
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_bytes(content)
            size += len(content)
            task.advance()
        write_json(draft / MARK, {"kind": KIND, "schema": 1, "files": sorted(paths)})
    return Written(target, len(paths) + 1, size, len(found.names))


def _is_own(target: Path) -> bool:
    """Whether the folder is a site of ours and nothing besides."""
    if not (target / MARK).is_file():
        return False
    try:
        value = read_json(target / MARK)
    except XpertError:
        return False
    if not isinstance(value, dict) or value.get("kind") != KIND or not isinstance(value.get("files"), list):
        return False
    known = {MARK, *map(str, value["files"])}
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if not (path.is_dir() and not path.is_symlink()) and name not in known:
            raise BadInput(
                f"holds a site and also {name!r}, which would be lost",
                where=str(target),
                hint="move that file away, or choose another -o",
            )
    return True
