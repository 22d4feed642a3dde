"""An expert as the LoRA folder that plain peft loads: weights, configuration and model card, nothing of ours."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.experts.adapters import CONFIG_FILE, WEIGHTS_FILE, read_updates
from xpert.experts.bare_base import on_hub
from xpert.model_files import find_model
from xpert.progress import SILENT, Progress
from xpert.registry.card import CARD_FILE
from xpert.storage import draft_folder, read_json, write_file, write_json

if TYPE_CHECKING:
    from xpert.experts.exporting.source import Source

__all__ = ["write_peft"]

MODEL_CARD = "README.md"


def write_peft(
    source: Source, out: Path, *, base: str | None, dtype: str | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Writes the folder `out`; returns figures. The weights are copied byte for byte unless `dtype` is given.

    The base is written as peft can find it: `base`, else the name on the hub or the folder that the expert knows.
    Raises BadInput for an adapter that xpert does not serve, and for weights beyond what `dtype` holds.
    """
    updates = read_updates(source.folder)
    with draft_folder(out) as draft:
        if dtype is None:
            shutil.copyfile(source.folder / WEIGHTS_FILE, draft / WEIGHTS_FILE)
        else:
            _write_as(dtype, source.folder / WEIGHTS_FILE, draft / WEIGHTS_FILE)
        config = read_json(source.folder / CONFIG_FILE)
        config["base_model_name_or_path"], config["revision"] = _base(source, base, config)
        config["inference_mode"] = True
        write_json(draft / CONFIG_FILE, config)
        card = source.folder / MODEL_CARD
        if card.is_file():
            write_file(draft / MODEL_CARD, _without_ours(card.read_text(encoding="utf-8")))
        size = sum(path.stat().st_size for path in draft.iterdir())
    named = config["base_model_name_or_path"]
    if named is None:
        progress.say(
            "The base is not named, since peft loads none by the name known here; give --base MODEL to name one."
        )
    elif Path(named).exists():
        progress.say(f"The base is named by its path, {named}, which is that of this machine.")
    left = sorted(
        path.name
        for path in source.folder.iterdir()
        if path.name not in (WEIGHTS_FILE, CONFIG_FILE, MODEL_CARD, CARD_FILE)
    )
    return {"bytes": size, "modules": len(updates), "dtype": dtype or "as it is", "base": named, "left_out": left}


def _base(source: Source, given: str | None, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(name or path, revision) of the base for peft, which loads no GGUF file.

    Without a given one: what the adapter itself names if that is on the hub, else what the card says.
    """
    if given is not None:
        files = find_model(given)
        if files.gguf:
            raise BadInput("is a GGUF file, which peft does not load", where=given, hint="give a folder or a hub name")
        name, _, revision = given.partition("@")
        return (name, revision or None) if files.on_hub else (str(files.folder.resolve()), None)
    own = config.get("base_model_name_or_path")
    if on_hub(own):
        return str(own), config.get("revision")
    told, told_revision = source.named_base
    if told and Path(told).is_dir():
        return str(Path(told).resolve()), None
    return (told, told_revision) if on_hub(told) else (None, None)


def _write_as(dtype: str, source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(source).items()}
    lost = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if lost:
        raise BadInput(f"{lost[0]} is beyond what {dtype} holds", where=str(source), hint="leave out --dtype")
    save_file(tensors, target, metadata={"format": "pt"})


def _without_ours(card: str) -> str:
    """The model card without the lines that point at files of xpert, which stay behind."""
    return re.sub(rf"^[^\n]*`{re.escape(CARD_FILE)}`[^\n]*\n", "", card, flags=re.MULTILINE).rstrip() + "\n"
