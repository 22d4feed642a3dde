"""`xpert run`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, aggregator_options, common_options, engine_options, pairs
from xpert.errors import BadInput

__all__ = ["command"]


@click.command("run")
@click.argument("mixture", metavar="MIXTURE")
@click.option(
    "--prompts", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Rows; no answers needed."
)
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="JSON lines."
)
@click.option(
    "--registry", "location", metavar="R", help="Where registered experts are. [default: as the mixture says]"
)
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the mixture says.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Likeliest tokens kept; 0: all.")
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Leave out tokens less likely than this share of the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: tokens of the prompt and the answer become less likely.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends an answer, and is left out of it; may be repeated.")
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Prompts answered at a time.")
@aggregator_options
@engine_options
@common_options
def command(
    session: Session,
    mixture: str,
    prompts: Path,
    out: Path,
    location: str | None,
    base: str | None,
    max_batch: int,
    stop: tuple[str, ...],
    aggregator: str | None,
    aggregator_params: tuple[str, ...],
    engine: str,
    engine_params: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Answer prompts with a mixture, in batches of mixed experts.

    Writes one JSON line per prompt, in their order: id, output, experts, reason, finished (stop or length), token
    counts, and timings in seconds. Behind an aggregator also `aggregated`: by whom, why, and the replies behind it;
    --aggregator takes another than the mixture's (`none`: no aggregator). Where the router names a second stage also
    `stage` and `confidence`. Stopped by Ctrl-C, the same command goes on from the answers it has.
    """
    from xpert.data import read_prompts
    from xpert.experts.aggregated import chosen_aggregator, with_aggregator
    from xpert.experts.answering import answer_file
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.serving import EngineChoice, MixtureRunner
    from xpert.protocols import Sampling
    from xpert.registry.opening import open_registry
    from xpert.storage import check_output

    if out.is_dir():
        raise BadInput("is a folder; the answers are a file", where=str(out), hint="write -o FOLDER/answers.jsonl")
    check_output(out)
    if "" in stop:
        raise BadInput("--stop may not be empty")
    choice = EngineChoice(engine, pairs(engine_params, option="--engine-param"))
    choice.options()
    aggregates = chosen_aggregator(aggregator, pairs(aggregator_params, option="--aggregator-param"))
    rows = read_prompts(prompts)
    loaded = load_mixture(mixture, open_registry(location) if location is not None else None)
    if aggregator is not None:
        loaded = with_aggregator(loaded, aggregates)
    if base is not None:
        loaded = replace(loaded, base=replace(loaded.base, ref=base))
    lines = answer_file(
        loaded,
        rows,
        out,
        Sampling(stop=stop, seed=session.seed, **sampling),
        seed=session.seed,
        engine=choice,
        open_runner=lambda: MixtureRunner.open(
            loaded,
            device=session.device,
            seed=session.seed,
            max_batch=max_batch,
            engine=choice,
            progress=session.progress,
        ),
        progress=session.progress,
    )
    used = Counter(" + ".join(e["expert"] for e in line["experts"]) or "base" for line in lines)
    tokens = sum(line["completion_tokens"] for line in lines)
    counts = ", ".join(f"{key} {count:,}" for key, count in used.most_common())
    session.result(
        {"answers": str(out), "prompts": len(lines), "completion_tokens": tokens, "experts": dict(used)},
        f"{out}: {len(lines):,} answers, {tokens:,} tokens; answered by {counts}",
    )
