"""`xpert train`: a LoRA expert from a selection and a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.experts.train_options import TrainOptions

__all__ = ["command"]


@click.command("train")
@click.argument("selection", metavar="SELECTION")
@click.option("--base", required=True, metavar="MODEL", help="The base model: a folder, a hub name or a .gguf file.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The expert folder.")
@config_options(TrainOptions)
@common_options
def command(session: Session, selection: str, base: str, out: Path, **options: Any) -> None:
    """Train a LoRA expert on SELECTION: a selection folder, or any source of rows.

    The loss is on the answers alone, in the base model's chat form. The selection's shots are learned too. Stopped at
    any moment (Ctrl-C saves first), the same command goes on from where it was. DIR loads in plain peft.
    """
    from xpert.experts.train import train
    from xpert.registry.card import ExpertCard

    folder = train(
        selection,
        base,
        out,
        take(TrainOptions, options),
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    card = ExpertCard.read(folder)
    figures = card.training["figures"]
    text = (
        f"{folder}: {figures['rows']:,} rows, {figures['steps']:,} steps, loss {figures['first_loss']:.3f} -> "
        f"{figures['final_loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s"
    )
    if "validation_loss" in figures:
        text += f", held-out shots {figures['validation_loss_before']:.3f} -> {figures['validation_loss']:.3f}"
    session.result({"expert": str(folder), **figures}, text)
