"""`export`: which adapter is meant, and in which form it leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, NotFound, unknown
from xpert.experts.adapters import CONFIG_FILE
from xpert.experts.bare_base import find_base
from xpert.experts.mixture import MIXTURE_FILE, ExpertStore
from xpert.progress import SILENT, Progress
from xpert.registry.card import CARD_FILE, ExpertCard
from xpert.storage import check_output, read_json

if TYPE_CHECKING:
    from xpert.model_files import ModelFiles

__all__ = ["DTYPES", "FORMS", "Exported", "Source", "export", "open_source"]

FORMS = ("peft", "merged", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """The adapter to export: its folder, what to call it, and its card, which an adapter of peft alone has not."""

    name: str
    folder: Path
    card: ExpertCard | None = None

    def base(self, given: str | None) -> ModelFiles:
        """The base model's files: `given`, or where the card or the adapter says. Errors as in `find_base`."""
        named, revision = self.named_base
        return find_base(given, named, revision=revision, where=str(self.folder))

    @property
    def named_base(self) -> tuple[str | None, str | None]:
        """The base as the card or else the adapter names it, and its revision on the hub."""
        if self.card is not None:
            name, _, revision = self.card.base.ref.partition("@")
            return (self.card.base.ref, None) if Path(self.card.base.ref).exists() else (name, revision or None)
        config = read_json(self.folder / CONFIG_FILE)
        config = config if isinstance(config, dict) else {}
        return config.get("base_model_name_or_path") or None, config.get("revision") or None


@dataclass(frozen=True)
class Exported:
    """What was written, and its figures (`bytes`, `modules`, `dtype`, and what the form tells besides)."""

    form: str
    path: Path
    figures: Mapping[str, Any] = field(default_factory=dict)


def open_source(ref: str | Path, registry: ExpertStore | None = None) -> Source:
    """An expert folder, any LoRA folder of peft, or OWNER/NAME[@VERSION] of the registry.

    Raises BadInput for a mixture, which is no single adapter, and NotFound for what is not there.
    """
    path, text = Path(ref), str(ref)
    if path.is_dir():
        if (path / CARD_FILE).is_file():
            card = ExpertCard.read(path)
            return Source(card.name or path.resolve().name, path, card)
        if (path / MIXTURE_FILE).is_file():
            raise _is_mixture(text)
        if not (path / CONFIG_FILE).is_file():
            raise NotFound(f"not an adapter: it has no {CONFIG_FILE}", where=text, hint="give an expert or a LoRA folder")
        return Source(path.resolve().name, path)
    if path.is_file():
        if path.suffix == ".json":
            raise _is_mixture(text)
        raise BadInput("is a file, not an expert folder", where=text, hint="give the folder, or OWNER/NAME")
    if registry is None or re.match(r"[./~]", text) or "/" not in text:
        raise NotFound("no such expert folder", where=text, hint="give a LoRA folder, or OWNER/NAME of a registry")
    version = registry.resolve(text)
    if version.kind == "mixture":
        raise _is_mixture(version.ref)
    folder = registry.pull(version.ref)
    return Source(version.name.rpartition("/")[2], folder, ExpertCard.read(folder))


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
        from xpert.experts.exporting.peft_folder import write_peft

        return Exported(form, out, write_peft(source, out, base=base, dtype=dtype, progress=progress))
    files = source.base(base)
    if form == "merged":
        from xpert.experts.exporting.merged_folder import write_merged

        return Exported(form, out, write_merged(source, files, out, dtype=dtype or "float32", device=device))
    from xpert.experts.exporting.gguf_lora import write_gguf

    return Exported(form, out, write_gguf(source, files, out, dtype=dtype or "float32"))


def _is_mixture(where: str) -> BadInput:
    return BadInput(
        "is a mixture, and what is exported is one adapter",
        where=where,
        hint="make one of it first, with `xpert merge MIXTURE -o DIR`, and export DIR",
    )
