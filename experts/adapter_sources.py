"""Where an adapter to import lies: a folder, or a repository of the Hugging Face Hub.

    hf:OWNER/NAME[/FOLDER][@REVISION]

Taken are three files: `adapter_config.json`, `adapter_model.safetensors` and `README.md`. Whatever lies beside them
(optimizer states, pickled arguments, tokenizers, checkpoints) is never opened, and is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable
from xpert.experts.adapters import CONFIG_FILE, WEIGHTS_FILE
from xpert.progress import SILENT, Progress
from xpert.registry.card import CARD_FILE
from xpert.registry.tensor_header import read_tensor_header

__all__ = ["MODEL_CARD", "AdapterSource", "find_adapter"]

MODEL_CARD = "README.md"
PICKLED = "adapter_model.bin"
_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?P<folder>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?")
_CONVERT = (
    "convert it where you trust its maker: "
    "import torch; from safetensors.torch import save_file; "
    "save_file({k: v.contiguous() for k, v in torch.load('adapter_model.bin', weights_only=True).items()}, "
    "'adapter_model.safetensors')"
)
_GIB = 1 << 30


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's files and where they come from.

    `source` is what the card will say: `hf:OWNER/NAME`, or a folder's name without its path. `sha` is the commit on the
    Hub, None for a folder. `beside` are the names of what is left out.
    """

    config: Path
    weights: Path
    readme: Path | None
    source: str
    revision: str | None = None
    sha: str | None = None
    beside: tuple[str, ...] = ()


def find_adapter(source: str | Path, *, max_gib: float, progress: Progress = SILENT) -> AdapterSource:
    """The adapter in a folder or on the Hub; its weights are known to be sound safetensors of bounded size.

    Raises NotFound where there is no adapter, BadInput for pickled or too large weights and for links out of the
    folder, Corrupt for damaged weights, Unavailable where the Hub cannot be reached and its cache has no copy.
    """
    text = str(source)
    found = _on_hub(text, max_gib, progress) if text.startswith("hf:") else _in_folder(Path(source).expanduser())
    size = found.weights.stat().st_size
    if size > max_gib * _GIB:
        raise _too_large(size, max_gib, text)
    with found.weights.open("rb") as stream:
        start = stream.read(4)
    if start[:1] == b"\x80" or start == b"PK\x03\x04":
        raise BadInput("refused: it is a pickle, whatever its name", where=str(found.weights), hint=_CONVERT)
    if not read_tensor_header(found.weights):
        raise Corrupt("holds no tensors", where=str(found.weights))
    return found


def _in_folder(folder: Path) -> AdapterSource:
    where = str(folder)
    if folder.is_file():
        raise BadInput("is a file, not an adapter's folder", where=where, hint=f"give {folder.parent}")
    if not folder.is_dir():
        raise NotFound("no such folder", where=where, hint="give a LoRA folder of peft, or hf:OWNER/NAME")
    if (folder / CARD_FILE).is_file():
        raise BadInput("is an expert already", where=where, hint="file it with `xpert registry publish`")
    names = sorted(path.name for path in folder.iterdir())
    _check_names(names, [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))], where)
    return AdapterSource(
        config=_inside(folder, CONFIG_FILE),
        weights=_inside(folder, WEIGHTS_FILE),
        readme=_inside(folder, MODEL_CARD) if (folder / MODEL_CARD).is_file() else None,
        source=folder.resolve().name,
        beside=_beside(names),
    )


def _inside(folder: Path, name: str) -> Path:
    """The file; a link must stay in the folder, or be one that the Hub's cache makes to its own blobs."""
    path = folder / name
    real = path.resolve()
    home = folder.resolve()
    if path.is_symlink() and not (real.is_relative_to(home) or real.parent == home.parent.parent / "blobs"):
        raise BadInput("a symbolic link that leaves the folder", where=str(path), hint="put the file itself there")
    if not real.is_file():
        raise BadInput("not a plain file", where=str(path))
    return real


def _check_names(names: Sequence[str], inner: Sequence[str], where: str) -> None:
    """Refuses, by the names of its files, a place that holds no adapter that can be read."""
    if CONFIG_FILE not in names:
        if inner:
            raise BadInput(f"its adapters lie deeper: {', '.join(inner)}", where=where, hint="name one of them")
        if "config.json" in names:
            raise BadInput("is a model, not an adapter", where=where, hint=f"an adapter has an {CONFIG_FILE}")
        raise NotFound(f"not a peft adapter: it has no {CONFIG_FILE}", where=where)
    if WEIGHTS_FILE not in names:
        if PICKLED in names:
            raise BadInput(
                f"the weights are a pickle ({PICKLED}), which can run code and is not read", where=where, hint=_CONVERT
            )
        raise NotFound(f"the adapter has no {WEIGHTS_FILE}", where=where)


def _beside(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in (CONFIG_FILE, WEIGHTS_FILE, MODEL_CARD))


def _too_large(size: int, max_gib: float, where: str) -> BadInput:
    return BadInput(
        f"its weights are of {size / _GIB:.2f} GiB; the most is {max_gib:g}",
        where=where,
        hint="raise --max-size if that is meant",
    )


def _on_hub(spec: str, max_gib: float, progress: Progress) -> AdapterSource:
    match = _HUB.fullmatch(spec)
    if match is None or {".", ".."} & set(match["folder"].split("/")):
        raise BadInput(f"{spec!r} is not hf:OWNER/NAME[/FOLDER][@REVISION]", hint="write for example hf:owner/adapter")
    name, inner, revision = match["name"], match["folder"].strip("/"), match["revision"]
    sizes, commit = _listing(name, revision, spec, progress)
    if sizes is not None:
        top = PurePosixPath(inner)
        here = [path for path in map(PurePosixPath, sizes) if path.is_relative_to(top)]
        deeper = sorted(str(path.parent) for path in here if path.name == CONFIG_FILE and path.parent != top)
        names = sorted({path.relative_to(top).parts[0] for path in here})
        _check_names(names, deeper, spec)
        size = sizes.get(str(top / WEIGHTS_FILE)) or 0
        if size > max_gib * _GIB:
            raise _too_large(size, max_gib, spec)
    snapshot = _snapshot(name, commit or revision, inner, spec, offline=commit is None)
    folder = snapshot / inner
    if sizes is None:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        _check_names(names, [], spec)
    readme = folder / MODEL_CARD
    return AdapterSource(
        config=(folder / CONFIG_FILE).resolve(),
        weights=(folder / WEIGHTS_FILE).resolve(),
        readme=readme.resolve() if readme.is_file() else None,
        source=f"hf:{name}" + (f"/{inner}" if inner else ""),
        revision=revision,
        sha=commit or snapshot.name,
        beside=_beside(names),
    )


def _listing(
    name: str, revision: str | None, spec: str, progress: Progress
) -> tuple[dict[str, int | None] | None, str | None]:
    """(path -> size of all files, commit), or (None, None) where the Hub is out of reach and its cache must do."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        info = HfApi(endpoint=_endpoint()).model_info(name, revision=revision, files_metadata=True)
    except hub.GatedRepoError:
        raise Unavailable(
            "its owner asks for consent", where=spec, hint="accept its terms on the hub, then `hf auth login`"
        ) from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        raise NotFound(
            "the hub has no such model or revision",
            where=spec,
            hint="check the name; a private one needs `hf auth login`",
        ) from None
    except Exception as error:  # the errors of httpx, requests and sockets have no base of their own
        if not _unreachable(error):
            raise
        progress.say(f"The Hugging Face Hub is not reachable; looking for {name} in its cache on this machine.")
        return None, None
    return {file.rfilename: file.size for file in info.siblings or ()}, info.sha


def _endpoint() -> str | None:
    """Another Hub than the public one, if the user has set one; read now, where the client reads it once."""
    return os.environ.get("HF_ENDPOINT") or None


def _unreachable(error: Exception) -> bool:
    """The Hub's client lets through whatever its HTTP package raises: those errors are told by their names."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"HTTPError", "OfflineModeIsEnabled", "HfHubHTTPError"})


def _snapshot(name: str, revision: str | None, inner: str, spec: str, *, offline: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    lead = f"{inner}/" if inner else ""
    wanted = [f"{lead}{file}" for file in (CONFIG_FILE, WEIGHTS_FILE, MODEL_CARD)]
    given: dict[str, Any] = {
        "endpoint": _endpoint(),
        "revision": revision,
        "allow_patterns": wanted,
        "local_files_only": offline,
    }
    try:
        return Path(snapshot_download(name, **given))
    except Exception as error:  # as above; what is none of them is raised again
        if not (_unreachable(error) or isinstance(error, hub.LocalEntryNotFoundError)):
            raise
        raise Unavailable(
            "the Hugging Face Hub is not reachable" + (", and its cache has no copy" if offline else ""),
            where=spec,
            hint="connect, unset HF_HUB_OFFLINE, or download the adapter and name its folder",
        ) from None
