"""`xpert registry schema`."""

from __future__ import annotations

import json

import click

from xpert.commands.options import Session, common_options

__all__ = ["command"]


@click.command()
@click.option("--markdown", is_flag=True, help="The fields as tables instead.")
@common_options
def command(session: Session, markdown: bool) -> None:
    """Print the form of an expert's card (expert.json) as a JSON Schema, draft 2020-12."""
    from xpert.registry.card_schema import card_schema, field_tables

    schema = dict(card_schema())
    text = field_tables().rstrip() if markdown else json.dumps(schema, indent=2, ensure_ascii=False)
    session.result({"fields": field_tables()} if markdown else schema, text)
