"""Base and adapter as one plain model folder of transformers: W + s B A in every adapted module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.experts.adapters import linear_shape, read_adapter, read_updates
from xpert.experts.bare_base import bare_base
from xpert.storage import draft_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xpert.experts.adapters import LowRank
    from xpert.experts.exporting.source import Source
    from xpert.model_files import ModelFiles

__all__ = ["MAX_SHARD", "add_updates", "write_merged"]

MAX_SHARD = "5GB"


def write_merged(source: Source, files: ModelFiles, out: Path, *, dtype: str, device: str = "auto") -> dict[str, Any]:
    """Writes the model folder `out`: weights, configuration, generation settings, tokenizer, a short model card.

    Summed in float32 and rounded once to `dtype`, so that float32 is exact up to the rounding of a float32 sum. Cost:
    the base in memory in float32, read once and written once. Raises BadInput for an adapter that does not fit the
    base, and for sums beyond what `dtype` holds.
    """
    import torch

    from xpert.language_model import load_model, quiet_transformers

    read_adapter("exported", source.folder, bare_base(files))  # before gigabytes are read: does it fit?
    lm = load_model(str(files.gguf or files.folder), device=device, dtype="float32")
    updates = read_updates(source.folder)
    add_updates(lm.model, updates)
    model = lm.model.to(getattr(torch, dtype))
    _check_finite(model, updates, dtype)
    with draft_folder(out) as draft, quiet_transformers():
        model.save_pretrained(draft, max_shard_size=MAX_SHARD)
        lm.tokenizer.save_pretrained(draft)
        write_file(draft / "README.md", _model_card(source, files, dtype))
        size = sum(path.stat().st_size for path in draft.iterdir())
        shards = len(list(draft.glob("*.safetensors")))
    return {"bytes": size, "modules": len(updates), "dtype": dtype, "files": shards, "architecture": lm.architecture}


def add_updates(model: Any, updates: Mapping[str, LowRank]) -> None:
    """Adds B A to the weight of every module, in place and in the model's dtype.

    An adapted head whose weight is that of the embeddings gets a weight of its own first: the adapter changes what the
    model says, not what it reads.
    """
    import torch

    with torch.no_grad():
        for name, update in updates.items():
            module = model.get_submodule(name)
            change = (update.b.to(module.weight.device) @ update.a.to(module.weight.device)).to(module.weight.dtype)
            if _is_shared(model, module):
                module.weight = torch.nn.Parameter(module.weight.clone(), requires_grad=False)
                model.config.tie_word_embeddings = False
            # GPT-2 stores its linear layers transposed.
            module.weight += change if isinstance(module, torch.nn.Linear) else change.T


def _is_shared(model: Any, module: Any) -> bool:
    embeddings = model.get_input_embeddings()
    return embeddings is not None and embeddings is not module and embeddings.weight is module.weight


def _check_finite(model: Any, updates: Mapping[str, LowRank], dtype: str) -> None:
    for name in updates:
        module = model.get_submodule(name)
        assert linear_shape(module) is not None
        if not module.weight.isfinite().all():
            raise BadInput(f"the sum in {name} is beyond what {dtype} holds", hint="export it with --dtype float32")


def _model_card(source: Source, files: ModelFiles, dtype: str) -> str:
    import yaml

    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["xpert"]}
    if files.on_hub:  # a path means nothing to the Hub
        head["base_model"] = files.ref.partition("@")[0]
        head["base_model_relation"] = "finetune"
    base = files.ref if files.on_hub else Path(files.ref).name
    about = f"{source.card.description}\n\n" if source.card and source.card.description else ""
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {source.name}\n\n{about}"
        f"The base model {base} (`{files.fingerprint()[:12]}`) with this expert's LoRA adapter added to its weights, "
        f"in {dtype}. It needs nothing but transformers.\n"
    )
