"""`xpert` and `python -m xpert`: the command line, which answers Ctrl-C with a line from its first import on."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    try:
        from xpert.commands.main import cli

        cli()
    except KeyboardInterrupt:  # before `cli` could take it, or once more while it was answering the first
        from xpert.errors import STOPPED

        print(f"xpert: {STOPPED}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
