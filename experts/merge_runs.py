"""Merges from names to folders: sources, what each method needs of shots and usage, comparison and writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.data import read_shots
from xpert.errors import BadInput, unknown
from xpert.experts.merge_folder import write_merge
from xpert.experts.merge_sources import MergeSources, shots_loss
from xpert.experts.merging import MergeResult, merge, merger_options
from xpert.experts.usage import read_usage
from xpert.progress import SILENT, Progress
from xpert.protocols import MergeTask
from xpert.storage import check_output

__all__ = ["compare", "run_merge"]

_MAX_BATCH = 16


def run_merge(
    sources: MergeSources,
    method: str,
    params: Mapping[str, Any] | None = None,
    *,
    out: Path,
    rank: int | None = None,
    shots: Path | None = None,
    usage: Path | None = None,
    base: str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> list[MergeResult]:
    """Merges and writes: one expert folder, or a pool where the method makes several. Errors as `merging.merge`."""
    merger_options(method, params or {})
    check_output(out)
    _say_gate(sources, progress)
    task = _task(sources, [method], rank, shots, usage, base, seed, device, progress)
    found = merge(task, method, params)
    write_merge(out, found, sources, seed=seed, progress=progress)
    return found


def _say_gate(sources: MergeSources, progress: Progress) -> None:
    if sources.mixture is not None and sources.mixture.gate is not None:
        gate = sources.mixture.gate.name
        progress.say(
            f"Merged are the experts without the mixture's gate {gate}: an adapter adds them alike at every token, and "
            f"errors are against that sum. `xpert distil` learns what they answer behind the gate."
        )


def compare(
    sources: MergeSources,
    methods: Sequence[str],
    params: Mapping[str, Any] | None = None,
    *,
    rank: int | None = None,
    shots: Path | None = None,
    usage: Path | None = None,
    base: str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> tuple[list[MergeResult], dict[str, str]]:
    """Every method's merges, nothing written, and which methods refused and why.

    A parameter goes to the methods that have it; raises BadInput for one that none has, and where all methods refuse.
    """
    if not methods:
        raise BadInput("no method is named", hint="see `xpert methods --kind merger`")
    split = {method: _own(method, params or {}) for method in methods}
    for name in params or {}:
        if not any(name in own for own in split.values()):
            known = [field for method in methods for field in _fields(method)]
            raise unknown("parameter", name, known, where=f"merger {', '.join(methods)}")
    _say_gate(sources, progress)
    task = _task(sources, methods, rank, shots, usage, base, seed, device, progress)
    found: list[MergeResult] = []
    refused: dict[str, str] = {}
    with progress.task("merging", len(methods)) as bar:
        for method, own in split.items():
            merger_options(method, own)
            try:
                found += merge(task, method, own)
            except BadInput as error:
                if len(methods) == 1:
                    raise
                refused[method] = str(error)
            bar.advance(1, method)
    if not found:
        raise BadInput("; ".join(f"{method}: {why}" for method, why in refused.items()))
    return found, refused


def _task(
    sources: MergeSources,
    methods: Sequence[str],
    rank: int | None,
    shots: Path | None,
    usage: Path | None,
    base: str | None,
    seed: int,
    device: str,
    progress: Progress,
) -> MergeTask:
    """The task with what the methods need; what none of them reads is refused, not ignored."""
    needs = {need for method in methods for need in plugins.load("merger", method).needs}
    for given, need, option in ((shots, "loss", "--shots"), (usage, "usage", "--usage"), (base, "loss", "--base")):
        if given is not None and need not in needs:
            raise BadInput(f"{option} is not read by {', '.join(methods)}", hint="leave it out")
    more: dict[str, Any] = {}
    if usage is not None:
        log = read_usage(usage, sources.keys)
        more |= {"usage": log.shares, "routing": log.routing}
    if shots is not None:
        from xpert.experts.serving import open_engine

        examples = read_shots(shots)
        lm, engine = open_engine(
            base or sources.base.ref,
            sources.base.fingerprint,
            device=device,
            max_batch=_MAX_BATCH,
            progress=progress,
        )
        for expert in sources.experts:
            engine.add_expert(expert.key, expert.folder)
        more["loss"] = shots_loss(lm, engine, sources.keys, examples)
    return sources.task(rank=rank, seed=seed, **more)


def _own(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name.replace("-", "_") in _fields(method)}


def _fields(method: str) -> list[str]:
    import dataclasses

    return [field.name for field in dataclasses.fields(plugins.load("merger", method).Options)]
