"""Groups of commands that import a command when it is run, and know each one's line of help before."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["LazyCommands"]


class LazyCommands(click.Group):
    """A group whose `table` maps a command's name to (module in `package`, line of help)."""

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], package: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.table = table
        self.package = package

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.table:
            return None
        command = importlib.import_module(f"{self.package}.{self.table[name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])
