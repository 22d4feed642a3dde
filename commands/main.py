"""The `xpert` command: a table of subcommands that are imported when they are run, and the one place where errors
become a line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import click

import xpert
from xpert.commands.lazy import LazyCommands
from xpert.errors import STOPPED, XpertError, nearest

__all__ = ["cli"]

# name -> (module, help). The help stands here so that `xpert --help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "pool": ("pools", "Build a pool from instruction data, or look into one."),
    "cluster": ("cluster", "Embed and cluster a pool; name the clusters by their telling terms."),
    "select": ("selection", "Select rows for a task from a pool, anchored on its shots."),
    "shots": ("shots", "Pick which rows to label, or order labelled shots as exemplars for a prompt."),
    "methods": ("methods", "List the plug-ins of every seam, or explain one."),
    "influence": ("influence", "Measure how far scores of rows can be trusted on a model."),
    "train": ("train", "Train a LoRA expert on a selection."),
    "gate": ("gate", "Give a finished expert its vectors for a token gate."),
    "prototypes": ("prototypes", "Give a finished expert centroids of its exemplars, for routers."),
    "profile": ("profiling", "Score an expert and its base per skill."),
    "registry": ("registry", "Publish, list, show, pull and verify experts and mixtures."),
    "mix": ("mix", "Assemble a mixture of experts behind a router."),
    "merge": ("merge", "Merge weighted experts into one adapter, and tell its error."),
    "prune": ("prune", "Make a mixture smaller by usage, or by likeness on a task."),
    "distil": ("distil", "Teach one adapter what a mixture, or weighted experts, would answer."),
    "router": ("router", "Observe a mixture's experts; train, measure and calibrate its router."),
    "route": ("route", "Explain where a mixture sends each prompt."),
    "aggregator": ("aggregator", "Choose who of a mixture reads the replies of the others."),
    "run": ("run", "Answer prompts with a mixture, in batches."),
    "eval": ("evaluation", "Score mixtures, experts and models side by side."),
    "serve": ("serve", "Serve a mixture over HTTP, OpenAI-compatible."),
    "keys": ("keys", "Make, list and remove the API keys of a server."),
    "demo": ("demo", "Run the whole chain on real data and a real model."),
    "doctor": ("doctor", "Show what is installed, which devices there are, what is missing for what."),
}


class MainGroup(LazyCommands):
    """The outermost group: translates errors into one line and an exit status."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        with _interrupts() as interrupts:
            try:
                status = super().main(args, *rest, **options)
                sys.stdout.flush()  # here a reader that has gone is understood; at the interpreter's end it is not
            except click.exceptions.Exit as finished:
                sys.exit(finished.exit_code)
            except click.exceptions.NoArgsIsHelpError as asked:
                click.echo(asked.format_message())
                _fail("no command is given: name one of those above", 2)
            except click.UsageError as error:
                _fail(_usage_line(error), 2)
            except click.ClickException as error:
                _fail(error.format_message(), 2)
            except XpertError as error:
                _fail(STOPPED, 130) if interrupts.seen else _fail(str(error), error.exit_code)
            except (KeyboardInterrupt, click.Abort):
                _fail(STOPPED, 130)
            except BrokenPipeError:
                _abandon_stdout()  # its reader has gone (`xpert ... | head`), which is no error
                sys.exit(0)
            except Exception as error:
                # C extensions turn a Ctrl-C during their import into an ImportError of their own, and so on.
                if interrupts.seen:
                    _fail(STOPPED, 130)
                if _full_disk(error):
                    _abandon_stdout()
                    where = getattr(error, "filename", None) or "the output"
                    _fail(f"{where}: the disk is full. Free some space and run it again", 3)
                if isinstance(error, PermissionError) and error.filename is not None:
                    _fail(f"{error.filename}: permission denied. Check who may read and write there", 2)
                raise
        sys.exit(status if isinstance(status, int) else 0)


def _abandon_stdout() -> None:
    """What stdout still holds can go nowhere; without this the interpreter tries once more at its end."""
    with suppress(ValueError, OSError):  # a stdout without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _full_disk(error: Exception) -> bool:
    from xpert.storage import disk_is_full

    return disk_is_full(error)


@dataclass
class _Interrupts:
    seen: bool = False


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Notes that Ctrl-C was pressed, whatever library code makes of the KeyboardInterrupt."""
    found = _Interrupts()
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield found  # a handler of the caller's stays
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        found.seen = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, usual)


def _usage_line(error: click.UsageError) -> str:
    """One line: click's message, where it happened, and the nearest known option or command."""
    message = error.format_message().rstrip(".")
    context = error.ctx
    if context is None:
        return message
    name = getattr(error, "option_name", None)
    if name is None and message.startswith("No such command"):
        group = context.command
        known = group.list_commands(context) if isinstance(group, click.Group) else []
        name = message.split("'")[1]
        close = nearest(name, known)
    elif name is not None:
        flags = [flag for p in context.command.get_params(context) for flag in (*p.opts, *p.secondary_opts)]
        close = nearest(name, flags)
    else:
        close = None
    if close and "Did you mean" not in message:
        message = f"{message}. Did you mean {close}?"
    hint = "" if close or "Did you mean" in message else f". See `{context.command_path} --help`"
    where = context.command_path.removeprefix(context.find_root().command_path).strip()
    return f"{where}: {message}{hint}" if where else f"{message}{hint}"


def _fail(line: str, status: int) -> NoReturn:
    from xpert.printable import printable

    click.echo(f"xpert: {printable(' '.join(line.split()))}", err=True)
    sys.exit(status)


@click.group(
    cls=MainGroup,
    table=COMMANDS,
    package="xpert.commands",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(xpert.__version__, prog_name="xpert")
def cli() -> None:
    """From a handful of examples to a serving expert.

    Select instruction data anchored on K shots, train LoRA experts on it, profile and register them, and answer
    prompts by routing each to the experts that fit.
    """
