"""`xpert registry export`."""

from __future__ import annotations

from pathlib import Path

import click

from xpert.commands.options import Session
from xpert.commands.registry._shared import registry_options, size_shown
from xpert.registry.store import Registry

__all__ = ["command"]


@click.command()
@click.argument("ref", metavar="OWNER/NAME[@VERSION]|FOLDER")
@click.option("--to", "form", required=True, metavar="peft|merged|gguf", help="The form to write.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Where to.")
@click.option(
    "--dtype",
    metavar="float32|bfloat16|float16",
    help="Of the weights written.  [default: peft: as they are; else float32]",
)
@click.option("--base", metavar="MODEL", help="Where the base model lies, if not where the expert says.")
@registry_options
def command(
    session: Session, registry: Registry, ref: str, form: str, out: Path, dtype: str | None, base: str | None
) -> None:
    """Write an expert for other programs, which need nothing of xpert.

    peft: the LoRA folder that plain peft loads. merged: a model folder of transformers with the adapter in its weights.
    gguf: a LoRA file for llama.cpp, to be given beside the base with --lora.
    """
    from xpert.experts.exporting.export import export

    made = export(
        ref,
        form,
        out,
        registry=registry,
        base=base,
        dtype=dtype,
        device=session.device,
        progress=session.progress,
    )
    figures = dict(made.figures)
    text = f"{out}: {figures['modules']} modules, {size_shown(figures['bytes'])}, dtype {figures['dtype']}"
    if figures.get("left_out"):
        text += f"\nleft out: {', '.join(figures['left_out'])}"
    session.result({"form": form, "output": str(out), **figures}, text)
