"""Weighted experts as one exact LoRA adapter that vLLM (or plain peft) can load.

    sum_e w_e s_e B_e A_e = B A    with  A = [A_1; A_2; ...]  and  B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]

The ranks add up. alpha = rank, so that the loader's own scale is 1; where modules differ in rank, the smaller ones are
filled up with zeros, since an adapter has one rank and patterns of ranks are ignored by older loaders. Nothing is
approximated: in float32 the update differs from the sum by rounding alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xpert.errors import BadInput, Corrupt
from xpert.experts.adapters import Adapter, read_adapter
from xpert.storage import draft_folder, hash_json, write_json

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["Expert", "ExpertSet", "concatenate", "expert_set", "open_reading_base", "read_expert", "write_set"]

FORMAT = 1
"""Part of every name: a change of what is written changes the names."""
SET_FILE = "experts.json"


@dataclass(frozen=True)
class Expert:
    """An adapter folder that was read and checked once. ranks: module -> rank."""

    key: str
    folder: Path
    fingerprint: str
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class ExpertSet:
    """Experts with their weights, in the order of their fingerprints. `name` is the sha256 of content and weights."""

    members: tuple[tuple[Expert, float], ...]
    name: str

    @property
    def rank(self) -> int:
        """The rank of the one adapter: the largest sum of ranks over the modules."""
        ranks: dict[str, int] = {}
        for expert, _ in self.members:
            for module, rank in expert.ranks.items():
                ranks[module] = ranks.get(module, 0) + rank
        return max(ranks.values())

    def __str__(self) -> str:
        return " + ".join(sorted(expert.key for expert, _ in self.members))


def open_reading_base(lm: LanguageModel) -> LanguageModel:
    """The same base, for reading adapters in float32 on the CPU."""
    return dataclasses.replace(lm, device=torch.device("cpu"), dtype=torch.float32)


def read_expert(key: str, folder: Path, base: LanguageModel) -> Expert:
    """Reads and checks an adapter folder; errors as in `read_adapter`."""
    folder = Path(folder).resolve()
    adapter = read_adapter(key, folder, base)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    return Expert(key, folder, adapter.fingerprint, ranks)


def expert_set(members: Sequence[tuple[Expert, float]], base: str) -> ExpertSet:
    """The set of these experts on the base with fingerprint `base`; experts of equal content become one member."""
    merged: dict[str, tuple[Expert, float]] = {}
    for expert, weight in members:
        merged[expert.fingerprint] = (expert, weight + merged.get(expert.fingerprint, (expert, 0.0))[1])
    chosen = tuple((expert, weight) for _, (expert, weight) in sorted(merged.items()) if weight)
    content = [FORMAT, base, [[expert.fingerprint, weight] for expert, weight in chosen]]
    return ExpertSet(chosen, hash_json(content))


def concatenate(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (A [rank, in], B [out, rank]), float32; every module gets the largest rank, filled up with zeros."""
    modules = sorted({name for adapter, _ in adapters for name in adapter.modules})
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in modules:
        there = [(adapter.modules[name], weight) for adapter, weight in adapters if name in adapter.modules]
        a = torch.cat([update.a.float() for update, _ in there])
        b = torch.cat([update.b.float() * weight for update, weight in there], dim=1)
        parts[name] = (a, b)
    rank = max(a.shape[0] for a, _ in parts.values())
    return {name: _filled_up(a, b, rank) for name, (a, b) in parts.items()}


def write_set(experts: ExpertSet, base: LanguageModel, folder: Path) -> None:
    """Writes the set as a peft folder, which appears whole; nothing is done where it is there already.

    `base` is one to read with (`open_reading_base`). Raises Corrupt where an expert's folder has changed since it was
    added.
    """
    if folder.is_dir():
        return
    adapters = []
    for expert, weight in experts.members:
        adapter = read_adapter(expert.key, expert.folder, base)
        if adapter.fingerprint != expert.fingerprint:
            raise Corrupt(
                f"expert {expert.key!r} has changed since it was added", where=str(expert.folder), hint="add it again"
            )
        adapters.append((adapter, weight))
    modules = concatenate(adapters)
    if not all(b.isfinite().all() for _, b in modules.values()):
        raise BadInput(f"the weights of {experts} make numbers too large for float32", hint="lower the weights")
    try:
        with draft_folder(folder) as draft:
            _save(draft, experts, modules, base)
    except BadInput:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise


def _filled_up(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - a.shape[0]
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, missing)).contiguous(), pad(b, (0, missing)).contiguous()


def _save(
    folder: Path, experts: ExpertSet, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: LanguageModel
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", _config(modules, base))
    record = [
        {"key": expert.key, "fingerprint": expert.fingerprint, "weight": weight} for expert, weight in experts.members
    ]
    write_json(folder / SET_FILE, {"base": base.fingerprint, "experts": record})


def _config(modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: LanguageModel) -> dict[str, Any]:
    rank = next(iter(modules.values()))[0].shape[0]
    transposed = any(type(base.model.get_submodule(name)).__name__ == "Conv1D" for name in modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.ref,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "fan_in_fan_out": transposed,
    }
