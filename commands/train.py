"""`xpert train`: a LoRA expert from a selection and a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, pairs, take
from xpert.errors import BadInput
from xpert.experts.mixture_options import MixtureOptions
from xpert.experts.train_options import TrainOptions

__all__ = ["command"]


@click.command("train")
@click.argument("selection", metavar="SELECTION")
@click.option(
    "--base",
    metavar="MODEL",
    help="The base model: a folder, a hub name or a .gguf file.  [required, but that of a mixture is known]",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The expert folder.")
@click.option(
    "--mixture", metavar="MIXTURE", help="Train this mixture's experts together with the router of --gate NAME."
)
@click.option(
    "--gate-param", multiple=True, metavar="KEY=VALUE", help="With --mixture: a parameter of the gate; repeatable."
)
@click.option("--registry", metavar="FOLDER", help="With --mixture: where its registered experts are looked up.")
@config_options(MixtureOptions)
@config_options(TrainOptions)
@common_options
@click.pass_context
def command(
    context: click.Context,
    /,
    session: Session,
    selection: str,
    base: str | None,
    out: Path,
    mixture: str | None,
    **options: Any,
) -> None:
    """Train a LoRA expert on SELECTION: a selection folder, or any source of rows.

    The loss is on the answers alone, in the base model's chat form. The selection's shots are learned too. Stopped at
    any moment (Ctrl-C saves first), the same command goes on from where it was. DIR loads in plain peft.

    With --mixture and --gate NAME, the experts of a mixture and a token gate's router are trained together, beginning
    from the experts as they are (with --freeze-experts the router alone); DIR is then a mixture with its experts.
    """
    from xpert.experts.train import train
    from xpert.registry.card import ExpertCard

    if mixture is not None:
        train_together(session, selection, mixture, base, out, _given(context), options)
        return
    for name in ("gate_param", "registry", "freeze_experts"):
        if options.pop(name):
            raise BadInput(f"--{name.replace('_', '-')} needs --mixture")
    if base is None:
        raise BadInput("--base is missing", hint="name the model to train on")
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


def train_together(
    session: Session,
    selection: str,
    mixture: str,
    base: str | None,
    out: Path,
    given: set[str],
    options: dict[str, Any],
) -> None:
    """`xpert train --mixture`: `given` are the options that the user wrote."""
    from xpert.experts.mixture_training import EXPERTS_OWN, train_mixture
    from xpert.registry.opening import open_registry
    from xpert.storage import read_json

    gate, registry = options.pop("gate"), options.pop("registry")
    if gate is None:
        raise BadInput("--mixture needs --gate", hint="`xpert methods --kind gate` lists them")
    for name in EXPERTS_OWN:
        if name in given and name != "gate":
            raise BadInput(f"--{name.replace('_', '-')} does not go with --mixture: its experts have their own")
    folder = train_mixture(
        selection,
        mixture,
        gate,
        out,
        take(TrainOptions, options),
        gate_params=pairs(options.pop("gate_param"), option="--gate-param"),
        freeze_experts=take(MixtureOptions, options).freeze_experts,
        base=base,
        registry=open_registry(registry) if registry else None,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    figures = read_json(folder / "manifest.json")["figures"]
    text = (
        f"{folder}: {figures['rows']:,} rows, {figures['steps']:,} steps, loss {figures['first_loss']:.3f} -> "
        f"{figures['final_loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s"
    )
    if "validation_loss" in figures:
        text += f", held-out shots {figures['validation_loss_before']:.3f} -> {figures['validation_loss']:.3f}"
    session.result({"mixture": str(folder), **figures}, text)


def _given(context: click.Context) -> set[str]:
    """The options that the user wrote, on the command line or in --config."""
    default = click.core.ParameterSource.DEFAULT
    return {name for name in context.params if context.get_parameter_source(name) is not default}
