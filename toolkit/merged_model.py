"""A base model with an adapter merged into it, as a model folder: so that whatever reads a base reads it trained."""

from __future__ import annotations

from pathlib import Path

from xpert.lora_training import Checkpoint

__all__ = ["write_merged"]


def write_merged(base: str, checkpoint: Checkpoint, folder: Path, *, device: str = "auto", dtype: str = "auto") -> Path:
    """Writes base + adapter to `folder` as safetensors with the tokenizer, in the dtype it is loaded in; returns it.

    Cost: the base is loaded once and written once, all of it. Raises BadInput where the adapter does not fit.
    """
    from xpert.language_model import load_model, quiet_transformers
    from xpert.linear_capture import linear_layers
    from xpert.lora_gradients import merged, place_factors

    lm = load_model(base, device=device, dtype=dtype)
    factors = place_factors(lm.model, checkpoint.load(), lm.device)
    with merged(linear_layers(lm.model, "all"), factors), quiet_transformers():
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return folder
