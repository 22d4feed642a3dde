"""`xpert route`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from xpert.commands.options import Session, common_options

__all__ = ["command"]


@click.command("route")
@click.argument("mixture", metavar="MIXTURE")
@click.option(
    "--prompts", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Rows; no answers needed."
)
@click.option(
    "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
)
@common_options
def command(session: Session, mixture: str, prompts: Path, location: str | None) -> None:
    """Explain where a mixture sends each prompt: one JSON line per prompt, with candidates and the reason.

    MIXTURE is a file, OWNER/NAME[@VERSION] of a registry, or an expert folder. The base model is not loaded.
    """
    from xpert.data import read_prompts
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.routing import MixtureRouter, explain, route_request
    from xpert.registry.opening import open_registry

    rows = read_prompts(prompts)
    loaded = load_mixture(mixture, open_registry(location) if location is not None else None)
    router = MixtureRouter(loaded, seed=session.seed, device=session.device)
    routes = router.route([route_request(row) for row in rows])
    lines = [explain(row.id, route) for row, route in zip(rows, routes, strict=True)]
    session.result(
        {"mixture": loaded.name, "routes": lines},
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines),
    )
