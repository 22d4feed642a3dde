"""A base model without its weights: what a process needs of it whose answers come from vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xpert.model_files import find_model
from xpert.progress import SILENT, Progress

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["open_base"]


def open_base(ref: str, *, progress: Progress = SILENT) -> LanguageModel:
    """The base's shapes, tokenizer and fingerprint; its weights lie on no device, so nothing can be computed with it.

    A `.gguf` file is loaded whole, since its shapes are known only then. Errors as in `load_model`.
    """
    from transformers import GenerationConfig

    from xpert.experts.bare_base import bare_model
    from xpert.language_model import LanguageModel, load_model, load_tokenizer

    files = find_model(ref)
    if files.gguf:
        return load_model(ref, device="cpu", progress=progress)
    tokenizer = load_tokenizer(ref)
    model = bare_model(files)
    if (files.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.folder)
    return LanguageModel(
        model,
        tokenizer,
        ref,
        files.fingerprint(),
        torch.device("cpu"),
        torch.float32,
        files.architecture,
        files.folder,
        files.on_hub,
    )
