"""Names of the registry: `owner/name`, references such as `owner/name@3`, and where a registry lies."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from xpert.errors import BadInput
from xpert.storage import data_folder

__all__ = [
    "LATEST",
    "NAME_PATTERN",
    "TAG_PATTERN",
    "Ref",
    "check_name",
    "check_tag",
    "default_registry",
    "parse_ref",
    "portable",
    "registry_folder",
    "url_scheme",
]

LATEST = "latest"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAME_PATTERN = re.compile(f"{_PART}/{_PART}")
TAG_PATTERN = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Ref:
    """A name with a version or a tag; where neither is given, the tag `latest` is meant."""

    name: str
    version: int | None = None
    tag: str | None = None

    def __str__(self) -> str:
        which = self.tag if self.version is None else self.version
        return self.name if which is None else f"{self.name}@{which}"


def check_name(name: str) -> str:
    """Returns `name`; raises BadInput unless it is `owner/name` of letters, digits, `.`, `_` and `-`."""
    if NAME_PATTERN.fullmatch(name) is None or not all(portable(part) for part in name.split("/")):
        raise BadInput(
            f"{name!r} is not a name",
            hint="write OWNER/NAME, each of 1 to 64 letters, digits, '.', '_' or '-', the first no sign",
        )
    return name


def portable(part: str) -> bool:
    """Whether a file may be called so everywhere: Windows cuts off dots and blanks at the end, and `con`, `nul.json`
    and the like are devices there."""
    return not part.endswith((".", " ")) and _DEVICE.fullmatch(part) is None


def check_tag(tag: str) -> str:
    """Returns `tag`; raises BadInput unless it is a small letter followed by small letters, digits, `_` and `-`."""
    if TAG_PATTERN.fullmatch(tag) is None:
        raise BadInput(f"{tag!r} is not a tag", hint="write up to 32 small letters, digits, '_' or '-', a letter first")
    return tag


def parse_ref(text: str) -> Ref:
    """`owner/name`, `owner/name@3` or `owner/name@stable`; raises BadInput for anything else."""
    name, at, version = text.partition("@")
    check_name(name)
    if not at:
        return Ref(name)
    if _VERSION.fullmatch(version):
        return Ref(name, int(version))
    if TAG_PATTERN.fullmatch(version) is None:
        raise BadInput(f"{version!r} is not a version of {name}", hint=f"write {name}@3, or a tag: {name}@{LATEST}")
    return Ref(name, tag=version)


def default_registry() -> Path:
    """`$XPERT_REGISTRY`, or `registry` in the user's data folder."""
    set_by_user = os.environ.get("XPERT_REGISTRY")
    return registry_folder(set_by_user) if set_by_user else data_folder() / "registry"


def url_scheme(location: str) -> str | None:
    """`s3` of `s3://bucket/x`, in lower case; None of a path."""
    match = _SCHEME.match(location)
    return None if match is None else match[0].removesuffix("://").lower()


def registry_folder(location: str | Path) -> Path:
    """The folder a path or `file://` URL means; raises BadInput for other URLs, which `open_registry` opens."""
    text = str(location)
    if not text:
        raise BadInput("the registry's path is empty", hint="write --registry FOLDER")
    if isinstance(location, Path) or url_scheme(text) is None:
        return Path(text).expanduser()
    parts = urlsplit(text)
    if parts.scheme.lower() != "file":
        raise BadInput(f"{parts.scheme}:// is no folder", hint="open it with `xpert.registry.opening.open_registry`")
    if parts.netloc not in ("", "localhost"):
        raise BadInput("a file URL of another machine", where=text, hint="write file:///PATH")
    return Path(unquote(parts.path))
