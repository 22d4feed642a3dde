"""`xpert pool build` and `xpert pool inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from xpert.commands.options import Session, common_options, config_options, take
from xpert.pool_build import PoolOptions, build_pool
from xpert.pool_inspect import inspect_source

__all__ = ["command"]


@click.group()
def command() -> None:
    """Build a pool from instruction data, or look into one.

    A SOURCE is a file (.jsonl .json .jsonl.gz .jsonl.zst .csv .parquet), a folder saved by `datasets`, or
    hf:owner/name[:config][:split].
    """


@command.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The pool folder.")
@click.option(
    "--shots", type=click.Path(path_type=Path), metavar="FILE", help="Drop rows that overlap these labelled examples."
)
@click.option(
    "--avoid",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Drop rows that overlap these, such as a test set; may be given again.",
)
@config_options(PoolOptions)
@common_options
def build(
    session: Session, sources: tuple[str, ...], out: Path, shots: Path | None, avoid: tuple[Path, ...], **options: Any
) -> None:
    """Read, normalise, deduplicate and decontaminate rows into a pool folder.

    Every row that is dropped stands in DIR/rejected.jsonl with its reason.
    """
    from xpert.row_files import read_shots
    from xpert.storage import check_output, read_manifest

    config = take(PoolOptions, options)
    check_output(out)
    examples = read_shots(shots) if shots else None
    pool = build_pool(sources, out, config, shots=examples, avoid=avoid, progress=session.progress)
    figures = read_manifest(out, "pool")["figures"]
    value = {"pool": str(out), "fingerprint": pool.fingerprint, **figures}
    dropped = "".join(f"\n  {count:>10,}  {reason}" for reason, count in figures["rejected"].items())
    text = f"read {figures['read']:,} rows, kept {figures['rows']:,}"
    if dropped:
        text += f"; dropped, with reasons in {out / 'rejected.jsonl'}:{dropped}"
    session.result(value, f"{text}\npool: {out}")


@command.command()
@click.argument("source", metavar="SOURCE")
@config_options(PoolOptions, skip=("duplicates", "near_duplicates", "near_threshold"))
@common_options
def inspect(session: Session, source: str, **options: Any) -> None:
    """Count rows, forms, lengths, skills and licences of a pool or any source, and show samples."""
    value = inspect_source(source, take(PoolOptions, options), progress=session.progress)
    session.result(value, _as_text(value))


def _as_text(value: Mapping[str, Any]) -> str:
    parts = [f"{value['rows']:,} usable rows in {value['source']}"]
    if value.get("forms"):
        parts.append("form: " + ", ".join(f"{form} ({count:,})" for form, count in value["forms"].items()))
    parts += [f"  unusable: {count:,} rows: {reason}" for reason, count in value.get("unusable", {}).items()]
    for text in ("prompt", "response"):
        for unit, quantiles in value[text].items():
            parts.append(f"{text} {unit}: " + "  ".join(f"{name} {count:,}" for name, count in quantiles.items()))
    for title in ("skills", "licences"):
        parts.append(f"{title}:")
        parts += [f"  {count:>10,}  {name}" for name, count in value[title].items()]
    for sample in value["samples"]:
        parts.append(f"\n[{sample['id']}]\n{_shortened(sample['prompt'])}\n=> {_shortened(sample['response'])}")
    return "\n".join(parts)


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]} ... ({len(text):,} characters)"
