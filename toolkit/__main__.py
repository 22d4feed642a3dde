"""`python -m xpert`: the command line."""

from xpert.commands.main import cli

cli()
