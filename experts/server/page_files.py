"""The files of the page at `/`, with the headers under which a browser may run them: whole in memory, read once."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

__all__ = ["PATHS", "POLICY", "get"]

FOLDER = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
SCRIPTS = ("api.js", "chat.js", "composer.js", "dom.js", "experts.js", "load.js", "page.js", "route.js")
_FILES = {"/": "index.html", **{f"/page/{name}": name for name in ("page.css", *SCRIPTS)}}
PATHS = tuple(_FILES)
"""Every path that `get` knows."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""What the page may load and run: its own style and scripts. No text can become markup: the browser refuses it."""


def get(path: str) -> tuple[bytes, dict[str, str]] | None:
    """Content and headers of the file at a path of `PATHS`; None at any other.

    The `etag` is of the content, and browsers are told to ask with it each time, so that a new version of the package
    is never run half old, half new.
    """
    name = _FILES.get(path)
    if name is None:
        return None
    content = _content(name)
    return content, {
        "content-type": MEDIA_TYPES[Path(name).suffix],
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
        "etag": f'"{sha256(content).hexdigest()[:32]}"',
    }


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
