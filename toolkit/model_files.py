"""Where a base model's files lie, whether they are all there, and the hash of their content. No torch in here.

A model is named by a folder (config.json and safetensors), a `.gguf` file, or a hub name (`owner/name`, optionally
`@revision`) that is downloaded once by huggingface_hub.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable
from xpert.storage import cache_folder, hash_file, hash_json, read_json, write_json

__all__ = ["ModelFiles", "find_model", "model_fingerprint"]

INDEX = "model.safetensors.index.json"
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]
# Keys of config.json that say how it was written, not what the model computes.
_INCIDENTAL = {"_name_or_path", "_model_name_or_path", "transformers_version", "use_cache", "_commit_hash"}


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model: `gguf` for a GGUF file, else a folder with its configuration and weight files.

    `on_hub` tells that `ref` is a name on the hub and not a path.
    """

    ref: str
    folder: Path
    weights: tuple[Path, ...]
    gguf: Path | None = None
    on_hub: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json; empty for a GGUF file, whose configuration is inside it."""
        if self.gguf:
            return {}
        loaded = read_json(self.folder / "config.json")
        if not isinstance(loaded, dict):
            raise Corrupt("not a model configuration", where=str(self.folder / "config.json"))
        return loaded

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.config.get("model_type", "")])[0])

    def fingerprint(self) -> str:
        """sha256 over the weight files and what matters of the configuration; file hashes are remembered by path, size
        and time of change."""
        config = {key: value for key, value in self.config.items() if key not in _INCIDENTAL}
        return hash_json({"weights": {path.name: _remembered_hash(path) for path in self.weights}, "config": config})


def find_model(ref: str) -> ModelFiles:
    """The files behind a model reference; a hub name is downloaded, or taken from the hub's local cache.

    Raises BadInput where files are missing or pickled, NotFound for no such file, Unavailable where the hub cannot be
    reached.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return _model_folder(ref, path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise NotFound("no such GGUF file", where=ref)
        return ModelFiles(ref, path.parent, (path,), gguf=path)
    if path.is_file():
        raise BadInput("is not a model", where=ref, hint="give a model folder, a .gguf file or a hub name")
    match = _HUB_NAME.fullmatch(ref)
    if match is None or ref.startswith("."):
        raise NotFound("no such model folder", where=ref, hint="give a model folder, a .gguf file or a hub name")
    return replace(_model_folder(ref, _from_hub(match["name"], match["revision"])), on_hub=True)


def model_fingerprint(ref: str) -> str:
    """The content hash of a model's weights and configuration, hex. Errors as in `find_model`."""
    return find_model(ref).fingerprint()


def _model_folder(ref: str, folder: Path) -> ModelFiles:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise BadInput("is an adapter, not a base model", where=ref, hint="give the model it was trained on")
        raise BadInput("the model folder has no config.json", where=ref, hint="give a folder saved by transformers")
    single = folder / "model.safetensors"
    if single.is_file():
        return ModelFiles(ref, folder, (single,))
    if (folder / INDEX).is_file():
        return ModelFiles(ref, folder, _shards(ref, folder))
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise BadInput(
            "the model folder holds pickled weights only, which xpert does not load",
            where=ref,
            hint="save the model again with save_pretrained, which writes model.safetensors",
        )
    raise BadInput(
        "the model folder has no weights: model.safetensors is missing",
        where=ref,
        hint="download all of the model, or save it with save_pretrained",
    )


def _shards(ref: str, folder: Path) -> tuple[Path, ...]:
    index = read_json(folder / INDEX)
    try:
        names = sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise Corrupt("the index of the weight files is damaged", where=str(folder / INDEX)) from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(
            f"{len(missing)} of {len(names)} weight files are missing: {missing[0]}",
            where=ref,
            hint="download the model again",
        )
    return tuple(folder / name for name in names)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    lead = "no such folder, and as a hub name:"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise Unavailable(
            f"{lead} its owner asks for consent", where=name, hint="accept its terms on the hub, then `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise NotFound(f"{lead} the hub has no such model or revision", where=name) from None
    except HFValidationError:
        raise NotFound("no such model folder, and not a hub name", where=name) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        raise Unavailable(
            f"{lead} the hub is not reachable and no copy is here",
            where=name,
            hint="give a model folder or a .gguf file, or connect to the internet",
        ) from None


def _remembered_hash(path: Path) -> str:
    """sha256 of a file, remembered in the user's cache until its size or time of change differs."""
    real = path.resolve()
    state = real.stat()
    stamp = [state.st_size, state.st_mtime_ns]
    note = cache_folder() / "fingerprints" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    if note.is_file():
        try:
            known = read_json(note)
        except Corrupt:
            known = {}
        if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
    digest = hash_file(real)
    write_json(note, {"path": str(real), "stamp": stamp, "sha256": digest})
    return digest
