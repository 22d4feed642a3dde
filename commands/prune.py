"""`xpert prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.errors import BadInput
from xpert.experts.pruning import PruneOptions

__all__ = ["command"]


@click.command("prune")
@click.argument("mixture", metavar="MIXTURE")
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Prompts of the task, to be routed.")
@click.option("--usage", type=click.Path(path_type=Path), metavar="FILE", help="Or what `xpert route` wrote of them.")
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="Score the mixture before and after.")
@click.option(
    "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
)
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A folder.")
@config_options(PruneOptions)
@common_options
def command(
    session: Session,
    mixture: str,
    prompts: Path | None,
    usage: Path | None,
    suite: Path | None,
    location: str | None,
    out: Path,
    **options: Any,
) -> None:
    """Make a mixture smaller: drop the experts that its router rarely takes, or merge those it takes alike.

    Counted are the router's draws; what a token gate then weighs is not.

    Writes DIR/mixture.json, and DIR/pruning.json with what stands for each old expert.
    """
    from xpert.data import read_prompts, read_suite
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.pruning import prune
    from xpert.experts.usage import measure_usage, read_usage
    from xpert.registry.opening import open_registry
    from xpert.storage import check_output

    settings = take(PruneOptions, options)
    if (prompts is None) == (usage is None):
        raise BadInput("pruning needs prompts of the task", hint="give one of --prompts FILE and --usage FILE")
    check_output(out)
    loaded = load_mixture(mixture, open_registry(location) if location is not None else None)
    if usage is not None:
        found = read_usage(usage, loaded.keys)
    else:
        assert prompts is not None
        if loaded.gate is not None:
            session.progress.say(
                f"Counted is who may be used by the router; what gate {loaded.gate.name} then weighs is not."
            )
        found = measure_usage(loaded, read_prompts(prompts), seed=session.seed, device=session.device)
    pruned = prune(
        loaded,
        found,
        settings,
        out=out,
        items=read_suite(suite).items if suite is not None else (),
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    lines = [
        f"  {key}  {100 * share:.1f} % of the draws -> {pruned.fate[key] or 'dropped'}"
        for key, share in zip(found.keys, found.shares, strict=True)
    ]
    if pruned.scores is not None:
        for name in ("before", "after"):
            score = pruned.scores.interval(name)
            lines.append(f"{name}: {100 * score.score:.1f} [{100 * score.low:.0f}-{100 * score.high:.0f}]")
    head = f"{out / 'mixture.json'}: {len(pruned.mixture.experts)} of {len(loaded.experts)} experts are left"
    session.result({"output": str(out), **pruned.to_dict()}, "\n".join([head, *lines]))
