"""Which adapter is to be exported: an expert of the registry, an expert folder, or a LoRA folder of peft alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xpert.errors import BadInput, NotFound
from xpert.experts.adapters import CONFIG_FILE
from xpert.experts.bare_base import find_base
from xpert.experts.mixture import ExpertStore
from xpert.experts.mixture_file import MIXTURE_FILE
from xpert.registry.card import CARD_FILE, ExpertCard
from xpert.storage import read_json

if TYPE_CHECKING:
    from xpert.model_files import ModelFiles

__all__ = ["Source", "open_source"]


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
            raise NotFound(
                f"not an adapter: it has no {CONFIG_FILE}", where=text, hint="give an expert or a LoRA folder"
            )
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


def _is_mixture(where: str) -> BadInput:
    return BadInput(
        "is a mixture, and what is exported is one adapter",
        where=where,
        hint="make one of it first, with `xpert merge MIXTURE -o DIR`, and export DIR",
    )
