"""`st:FOLDER` or `st:NAME`: any sentence-transformers model, from a folder or from the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xpert.embedding import normalise
from xpert.errors import BadInput, NotFound, Unavailable
from xpert.progress import SILENT, Progress
from xpert.protocols import EmbedderContext, Floats
from xpert.storage import hash_file, hash_json

__all__ = ["PLUGIN", "SentenceTransformers"]

_CHUNK = 2048
_OTHER_FORMS = ["*.onnx", "onnx/*", "openvino/*", "*.bin", "*.h5", "*.ot", "*.msgpack", "*.tflite"]


class SentenceTransformers:
    """Cost: the model's. Code that comes with a model is never run (`trust_remote_code` is off)."""

    def __init__(self, context: EmbedderContext) -> None:
        if not context.argument:
            raise BadInput("the embedder st needs a model", where="st", hint="write st:FOLDER or st:OWNER/NAME")
        if importlib.util.find_spec("sentence_transformers") is None:
            raise Unavailable(
                "the embedder st needs sentence-transformers", hint="run: pip install 'xpert-toolkit[st]'"
            )
        self._name = context.argument
        self._device = context.device

    @cached_property
    def identity(self) -> str:
        """The content of the model's files: a model that moved keeps its cache, one that changed does not."""
        return f"st/1 {_folder_fingerprint(self._folder)}"

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing to learn: the model comes trained."""

    def raw(self, texts: Sequence[str]) -> Floats:
        return self.embed(texts)

    def settle(self, rows: Floats) -> Floats:
        return rows

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        blocks = []
        with progress.task(f"embedding ({self._name})", total=len(texts)) as task:
            for start in range(0, len(texts), _CHUNK):
                block = list(texts[start : start + _CHUNK])
                blocks.append(self._model.encode(block, convert_to_numpy=True, show_progress_bar=False))
                task.advance(len(block))
        if not blocks:
            return np.zeros((0, self._model.get_sentence_embedding_dimension()), np.float32)
        return normalise(np.concatenate(blocks))

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        from xpert.language_model import resolve_device

        return SentenceTransformer(
            str(self._folder), device=str(resolve_device(self._device)), trust_remote_code=False, local_files_only=True
        )

    @cached_property
    def _folder(self) -> Path:
        """The model's folder, fetched from the hub into its own cache where the argument is a name."""
        local = Path(self._name).expanduser()
        if local.is_dir():
            if not (local / "modules.json").is_file():
                raise BadInput("not a sentence-transformers folder: it has no modules.json", where=str(local))
            return local
        if self._name.startswith((".", "/", "~")) or self._name.count("/") > 1:
            raise NotFound("no such folder", where=f"st:{self._name}")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        # The library's own habit: a bare name is one of its makers' models.
        repository = self._name if "/" in self._name else f"sentence-transformers/{self._name}"
        try:
            return Path(snapshot_download(repository, ignore_patterns=_OTHER_FORMS))
        except (RepositoryNotFoundError, HFValidationError):
            raise NotFound("no such folder, and no such model on the hub", where=f"st:{self._name}") from None
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"the model could not be fetched ({type(error).__name__})",
                where=f"st:{self._name}",
                hint="connect to the network, or give a folder: st:FOLDER",
            ) from error


def _folder_fingerprint(folder: Path) -> str:
    kept = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.suffix in {".safetensors", ".json", ".txt", ".model"}
    )
    if not any(path.suffix == ".safetensors" for path in kept):
        raise BadInput("the model has no safetensors weights", where=str(folder))
    return hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in kept})


PLUGIN = SentenceTransformers
