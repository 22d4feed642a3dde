"""`xpert gate`: the vectors that token gates know a finished expert by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.experts.gate_options import KEPT_GATES, GateOptions

__all__ = ["command"]


@click.command("gate")
@click.argument("expert", type=click.Path(path_type=Path), metavar="EXPERT")
@click.argument("rows", metavar="ROWS")
@click.option("--name", required=True, metavar="|".join(KEPT_GATES), help="The gate.")
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the expert says.")
@config_options(GateOptions)
@common_options
def command(session: Session, expert: Path, rows: str, name: str, base: str | None, **options: Any) -> None:
    """Give the finished expert in folder EXPERT its vectors for a token gate, made from ROWS.

    ROWS is the selection it was trained on, or any source of rows. phatgoose trains a vector per module, base and
    expert frozen; average-activation takes the mean state of a few prompts. They go into gates.safetensors beside
    the adapter, where the vectors of other gates stay.
    """
    from xpert.experts.gate_vectors import GATES_FILE, add_gate

    note = add_gate(
        expert,
        rows,
        name,
        take(GateOptions, options),
        base=base,
        device=session.device,
        seed=session.seed,
        progress=session.progress,
    )
    figures = note["figures"]
    told = (
        f"{figures['rows']:,} rows, {figures['steps']:,} steps, "
        f"loss {figures['first_loss']:.3f} -> {figures['final_loss']:.3f}"
        if "steps" in figures
        else f"{figures['prompts']:,} prompts"
    )
    text = f"{expert / GATES_FILE}: {name} vectors of {figures['modules']:,} modules, {told}"
    session.result({"expert": str(expert), "gate": name, **figures}, text)
