"""What every command shares: common options, configuration files, dataclass fields as options, and results.

A command function receives one `Session` besides its own options.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from xpert.config import Config, field_type, read_yaml
from xpert.errors import BadInput, unknown
from xpert.printable import printable
from xpert.progress import SILENT, Progress, StreamProgress

__all__ = ["Session", "aggregator_options", "common_options", "config_options", "engine_options", "pairs", "take"]


@dataclass(frozen=True)
class Session:
    """The common options of one run, and where its results and messages go."""

    seed: int
    device: str
    as_json: bool
    quiet: bool

    @property
    def progress(self) -> Progress:
        return SILENT if self.quiet else StreamProgress(sys.stderr)

    def result(self, value: Mapping[str, Any], text: str | Callable[[], str]) -> None:
        """Prints the result to stdout: `value` as one JSON object with --json, else `text` (or what it makes).

        Names and descriptions may be a stranger's, so nothing in them reaches the terminal that would steer it.
        """
        if self.as_json:
            click.echo(printable(json.dumps(value, ensure_ascii=False, allow_nan=False)))
        else:
            click.echo(printable(text if isinstance(text, str) else text(), keep="\n\t"))


def _check_device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    kind, _, index = value.partition(":")
    if value in ("auto", "cpu") or (kind == "cuda" and (not index or index.isdigit())):
        return value
    raise unknown("device", value, ("auto", "cpu", "cuda", "cuda:0"))


def _apply_config(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """Puts the file's values under the command line's: as click's default map, after checking every key."""
    if value is None:
        return
    values = read_yaml(value)
    known = {p.name: p for p in context.command.params if isinstance(p, click.Option) and p.name and p.expose_value}
    for name, given in values.items():
        if name not in known or name == "config":
            raise unknown("option", name, (k.replace("_", "-") for k in known), where=str(value))
        if isinstance(given, dict):  # `params: {key: value}` is `--param key=value`
            values[name] = [f"{key}={item}" for key, item in given.items()]
        elif known[name].multiple and not isinstance(given, list):
            values[name] = [given]
        if isinstance(values[name], list) and not known[name].multiple:  # an option that is written A,B,...
            values[name] = ",".join(str(item) for item in values[name])
    context.default_map = {**(context.default_map or {}), **values}


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --seed --device --config --json --quiet, and passes them as `session`."""

    @click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of all that is random.")
    @click.option(
        "--device",
        default="auto",
        show_default=True,
        callback=_check_device,
        metavar="auto|cpu|cuda[:n]",
        help="Where models run.",
    )
    @click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_apply_config,
        metavar="FILE.yaml",
        help="Any option by name; the command line wins.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    @click.option("--quiet", is_flag=True, help="No progress.")
    @functools.wraps(command)
    def wrapped(seed: int, device: str, as_json: bool, quiet: bool, **options: Any) -> Any:
        return command(Session(seed, device, as_json, quiet), **options)

    return wrapped


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --engine and --engine-param, as `engine` and `engine_params`."""
    command = click.option(
        "--engine-param",
        "engine_params",
        multiple=True,
        metavar="KEY=VALUE",
        help="A parameter of the engine; may be repeated. See `xpert methods NAME --kind engine`.",
    )(command)
    return click.option(
        "--engine", default="torch-lora", show_default=True, metavar="NAME", help="What runs the batches."
    )(command)


def aggregator_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --aggregator and --aggregator-param, as `aggregator` and `aggregator_params`."""
    command = click.option(
        "--aggregator-param",
        "aggregator_params",
        multiple=True,
        metavar="KEY=VALUE",
        help="A parameter of the aggregator; may be repeated. See `xpert methods NAME --kind aggregator`.",
    )(command)
    return click.option(
        "--aggregator", metavar="NAME", help="Makes one reply of several experts' (`xpert methods --kind aggregator`)."
    )(command)


_CLICK_TYPES: dict[type, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}


def config_options(
    config: type[Config], *, skip: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds one option per field of a configuration dataclass: default, help and limits stand on the field."""
    skipped = set(skip)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed([f for f in dataclasses.fields(config) if f.name not in skipped]):
            kind, _, many = field_type(config, field.name)
            flag = "--" + field.name.replace("_", "-")
            shown = {"default": field.default, "help": field.metadata.get("help"), "show_default": True}
            if kind is bool:
                command = click.option(f"{flag}/--no-{flag[2:]}", **shown)(command)
            elif many:
                shown["default"] = ",".join(str(item) for item in field.default)
                shown["show_default"] = bool(field.default)
                command = click.option(flag, metavar="A,B,...", **shown)(command)
            elif field.metadata.get("choices"):
                command = click.option(flag, metavar="|".join(field.metadata["choices"]), **shown)(command)
            else:
                kind_type = click.Path(path_type=Path) if kind is Path else _CLICK_TYPES[kind]
                command = click.option(flag, type=kind_type, **shown)(command)
        return command

    return decorate


def take(config: type[Config], options: dict[str, Any]) -> Any:
    """The configuration from a command's options; its fields are removed from `options`."""
    names = [field.name for field in dataclasses.fields(config) if field.name in options]
    return config.from_mapping({name: options.pop(name) for name in names})


def pairs(values: Sequence[str], *, option: str) -> dict[str, str]:
    """`("a=1", "b=2")` as a mapping; raises BadInput for an entry without `=`."""
    found = {}
    for value in values:
        key, equals, content = value.partition("=")
        if not equals or not key:
            raise BadInput(f"{option} {value!r} is not KEY=VALUE")
        found[key.strip()] = content.strip()
    return found
