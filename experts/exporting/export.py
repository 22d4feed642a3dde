"""`export`: one expert in one of the forms that other programs take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, unknown
from xpert.experts.exporting.gguf_lora import write_gguf
from xpert.experts.exporting.merged_folder import write_merged
from xpert.experts.exporting.peft_folder import write_peft
from xpert.experts.exporting.source import open_source
from xpert.experts.mixture import ExpertStore
from xpert.progress import SILENT, Progress
from xpert.storage import check_output

__all__ = ["DTYPES", "FORMS", "Exported", "export"]

FORMS = ("peft", "merged", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Exported:
    """What was written, and its figures (`bytes`, `modules`, `dtype`, and what the form tells besides)."""

    form: str
    path: Path
    figures: Mapping[str, Any] = field(default_factory=dict)


def export(
    ref: str | Path,
    form: str,
    out: Path,
    *,
    registry: ExpertStore | None = None,
    base: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Exported:
    """Writes the expert `ref` to `out` as `peft` (a folder that plain peft loads), `merged` (a model folder with the
    adapter in its weights) or `gguf` (a file that llama.cpp loads beside the base).

    `dtype` is of the weights written: of `peft` as they are unless given, float32 for the others. `base` is where the
    base model lies, if not where the expert says; `peft` needs none. Raises BadInput for what cannot be exported so.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if form == "gguf" and out.suffix != ".gguf":
        raise BadInput("the GGUF form is one file", where=str(out), hint="name it: -o NAME.gguf")
    check_output(out)
    source = open_source(ref, registry)
    if form == "peft":
        return Exported(form, out, write_peft(source, out, base=base, dtype=dtype, progress=progress))
    files = source.base(base)
    if form == "merged":
        return Exported(form, out, write_merged(source, files, out, dtype=dtype or "float32", device=device))
    return Exported(form, out, write_gguf(source, files, out, dtype=dtype or "float32"))
