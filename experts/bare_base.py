"""A base model without its weights: what is needed of it where nothing is computed, such as its modules' shapes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, NotFound, Unavailable
from xpert.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["bare_base", "bare_model", "find_base", "on_hub"]

HUB_NAME = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?(?<!\.gguf)")


def bare_model(files: ModelFiles) -> Any:
    """The model's modules on no device, from its configuration alone; a GGUF file holds one in its header.

    Raises BadInput where the configuration is of no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from xpert.language_model import quiet_transformers

    source: dict[str, Any] = {"gguf_file": files.gguf.name} if files.gguf else {}
    auto: Any = AutoModelForCausalLM
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True, **source)
            return auto.from_config(config, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"is not a causal language model that transformers knows: {reason}", where=files.ref) from None


def bare_base(files: ModelFiles) -> LanguageModel:
    """The base as `read_adapter` takes it to check an adapter: in float32 on the CPU, without weights and tokenizer.

    Cost: all weight files are hashed, unless their hashes are remembered.
    """
    import torch

    from xpert.language_model import LanguageModel

    model = bare_model(files)
    architecture = str((model.config.architectures or [type(model).__name__])[0])
    return LanguageModel(
        model,
        None,
        files.ref,
        files.fingerprint(),
        torch.device("cpu"),
        torch.float32,
        architecture,
        files.folder,
        files.on_hub,
    )


def find_base(given: str | None, named: str | None, *, revision: str | None = None, where: str) -> ModelFiles:
    """The base model of an adapter: `given` by the user, else the one it names, if that is on this machine.

    A given hub name is downloaded; one that an adapter merely names is only looked for in the hub's cache. Raises
    Unavailable where it is not here, with the way out; errors for a given one as in `find_model`.
    """
    if given is not None:
        return find_model(given)
    hint = "give it with --base MODEL: a folder, a .gguf file, or a hub name, which is downloaded"
    if not named:
        raise Unavailable("the adapter does not say which base model it was made for", where=where, hint=hint)
    if Path(named).exists():
        return find_model(named)
    try:
        return _cached(named, revision)
    except (NotFound, BadInput) as reason:
        why = "" if isinstance(reason, NotFound) else f" (in the hub's cache: {reason.what})"
        raise Unavailable(f"its base model {named} is not on this machine{why}", where=where, hint=hint) from None


def on_hub(name: str | None) -> bool:
    """Whether a base is named as on the Hub (`owner/name`, or `name` alone), and not by a path of some machine."""
    return bool(name) and HUB_NAME.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def _cached(name: str, revision: str | None) -> ModelFiles:
    """A hub model from the hub's local cache, nothing downloaded; raises NotFound where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise NotFound("not in the hub's cache", where=name) from None
    ref = f"{name}@{revision}" if revision else name
    return replace(find_model(folder), ref=ref, on_hub=True)
