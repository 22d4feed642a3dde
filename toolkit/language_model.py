"""Loading a base model: its files, device and dtype policy, tokenizer, and chat form.

`load_model` is the only place where xpert makes a language model. Code from the hub and pickled weights never run.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.chat_form import answer_ids, answer_lengths, encode_example, encode_examples, encode_prompt, end_of_turn
from xpert.errors import BadInput, Corrupt, Unavailable, unknown
from xpert.model_files import ModelFiles, find_model, model_fingerprint
from xpert.progress import SILENT, Progress
from xpert.storage import cache_folder, draft_folder

if TYPE_CHECKING:
    import torch

__all__ = [
    "LanguageModel",
    "answer_ids",
    "answer_lengths",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "end_of_turn",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "quiet_transformers",
    "resolve_device",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode with its tokenizer; `folder` holds its safetensors.

    `on_hub` tells that `ref` is a name on the hub and not a path.
    """

    model: Any
    tokenizer: Any
    ref: str
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    architecture: str
    folder: Path
    on_hub: bool = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which an answer ends: the tokenizer's, the generation settings', and the template's end of turn."""
        settings = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = settings if isinstance(settings, list) else [settings]
        found = {*listed, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)[-1]}
        return frozenset(token for token in found if token is not None)


def load_model(ref: str, *, device: str = "auto", dtype: str = "auto", progress: Progress = SILENT) -> LanguageModel:
    """Loads a model folder, hub name or `.gguf` file.

    device: auto (CUDA where there is one), cpu, cuda or cuda:n. dtype: auto (bfloat16 on CUDA, float32 on CPU),
    float32, bfloat16 or float16. Raises BadInput or Corrupt for a folder that cannot be loaded, Unavailable for a
    device or a hub that is not there.
    """
    import torch

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    place = resolve_device(device)
    files = find_model(ref)
    fingerprint = files.fingerprint()
    chosen = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    folder = _dequantised(files, progress) if files.gguf else files.folder
    model = _load_weights(ref, folder, getattr(torch, chosen)).to(place).eval()
    return LanguageModel(
        model,
        _load_tokenizer(ref, folder),
        ref,
        fingerprint,
        place,
        getattr(torch, chosen),
        find_model(str(folder)).architecture,
        folder,
        files.on_hub,
    )


def load_tokenizer(ref: str, *, progress: Progress = SILENT) -> Any:
    """The tokenizer alone. For a `.gguf` file not seen before, the model is converted first. Errors as `load_model`."""
    files = find_model(ref)
    return _load_tokenizer(ref, _dequantised(files, progress) if files.gguf else files.folder)


def resolve_device(device: str) -> torch.device:
    """auto|cpu|cuda[:n] as a device that is there; raises Unavailable where CUDA is asked for and absent."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise unknown("device", device, ("auto", "cpu", "cuda", "cuda:0"))
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise Unavailable("no CUDA device is here", hint="use --device cpu, or install a torch build with CUDA")
    if int(index or 0) >= count:
        raise Unavailable(f"there is no {device}: {count} CUDA device(s) are here", hint=f"use cuda:{count - 1}")
    return torch.device("cuda", int(index or 0))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and chatter off stderr; errors still come through."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_weights(ref: str, folder: Path, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise Corrupt(f"the weights are damaged: {error}", where=ref, hint="download the model again") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise BadInput("the model needs code of its own, which xpert never runs", where=ref) from None
        raise BadInput(f"cannot be loaded as a causal language model: {error}", where=ref) from None
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise Corrupt(
            f"{len(lacking)} weights are missing, such as {lacking[0]}", where=ref, hint="download the model again"
        )
    return model


def _load_tokenizer(ref: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"its tokenizer cannot be loaded: {error}", where=ref) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dequantised(files: ModelFiles, progress: Progress) -> Path:
    """A folder in the user's cache with the GGUF file's weights as float32 safetensors, made once per content."""
    target = cache_folder() / "models" / files.fingerprint()[:32]
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    assert files.gguf is not None
    progress.say(f"Dequantising {files.gguf.name} once, into {target}")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": files.folder,
        "gguf_file": files.gguf.name,
        "trust_remote_code": False,
    }
    try:
        # The converter's bar cannot be switched off otherwise.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            # Without dequantize=True the weights stay in GGUF blocks and can be neither trained nor saved.
            model = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
    except ImportError as error:
        raise Unavailable(f"reading GGUF needs more: {error}", hint="pip install gguf") from None
    except (OSError, ValueError, KeyError, RuntimeError, IndexError) as error:
        raise BadInput(f"cannot be read as a GGUF language model: {error}", where=str(files.gguf)) from None
    try:
        with draft_folder(target) as draft, quiet_transformers():
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    except BadInput:
        if not (target / "config.json").is_file():  # else another process was faster, with the same content
            raise
    return target
