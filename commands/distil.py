"""`xpert distil`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.experts.distil_options import DistilOptions

__all__ = ["command"]


@click.command("distil")
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT[=WEIGHT]...|MIXTURE")
@click.option("--rows", type=click.Path(path_type=Path), required=True, metavar="ROWS", help="Rows to teach on.")
@click.option("--registry", "location", metavar="R", help="Where registered names are looked up.")
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the experts say.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="An expert.")
@config_options(DistilOptions)
@common_options
def command(
    session: Session,
    experts: tuple[str, ...],
    rows: Path,
    location: str | None,
    base: str | None,
    out: Path,
    **options: Any,
) -> None:
    """Teach one adapter what a mixture, or experts with weights, would answer on the rows.

    A mixture's router decides who teaches each row. Tells the KL divergence from the teachers before and after, on rows
    held out.
    """
    from xpert.data import read_rows
    from xpert.experts.distilling import distil
    from xpert.experts.merge_sources import read_sources
    from xpert.registry.opening import open_registry

    settings = take(DistilOptions, options)
    sources = read_sources(experts, open_registry(location) if location is not None else None)
    found = distil(
        sources,
        read_rows(rows),
        out,
        settings,
        base=base,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    log = dict(found.merged.log)
    session.result(
        {"output": str(out), **found.summary(), **log},
        f"{out}: KL from the teachers {log['kl_before']:.3g} before, {log['kl']:.3g} after, nats a token on "
        f"{log['measured_rows']} {log['measured_on'].removeprefix('the ')}; {log['steps']} steps, rank {found.rank}",
    )
