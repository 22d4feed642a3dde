"""Reading a LoRA folder written by peft: per module the two thin matrices, checked against the base model.

Served are plain LoRA and rsLoRA on linear layers, with any ranks and target modules (`rank_pattern` and
`alpha_pattern` included). Everything else that peft can write (DoRA, biases, saved modules, ...) changes the answer in
ways the engine does not compute, so it is refused by name; nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.registry.card import CARD_FILE, ExpertCard
from xpert.storage import hash_json, read_json

if TYPE_CHECKING:
    import torch

    from xpert.language_model import LanguageModel

__all__ = [
    "CONFIG_FILE",
    "GATES_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "LowRank",
    "read_adapter",
    "read_gates_file",
    "read_parts",
    "read_updates",
]

GATES_FILE = "gates.safetensors"
"""What token gates keep of an expert in its folder: "GATE.MODULE" -> tensor."""
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B (lora_bias)",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "Arrow routing inside the adapter (arrow_config)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that move a part of the base's weights into the adapter; peft saves another value once converted."""
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LowRank:
    """One module's update: y += (x a^T) b^T.

    a [rank, in], b [out, rank]; b carries the adapter's scale (alpha / rank, or alpha / sqrt(rank) for rsLoRA).
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter on one device. `fingerprint` hashes weights and settings: the same key with other
    content is another adapter. `gate_tensors` ("GATE.MODULE" -> tensor, float32) is what token gates know it by."""

    key: str
    fingerprint: str
    modules: Mapping[str, LowRank]
    gate_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(module.rank for module in self.modules.values())

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for module in self.modules.values() for part in (module.a, module.b))


def read_adapter(key: str, folder: Path, base: LanguageModel, *, device: torch.device | None = None) -> Adapter:
    """Loads the adapter in `folder` for `base`, in the base's dtype, on `device` (the base's unless given).

    Each file is read once, and the fingerprint is of the bytes read: files that change later change nothing here.
    Raises NotFound where files are missing, Corrupt where they are damaged, and BadInput where the adapter belongs to
    another base or is of a form that cannot be served; the message names which.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_base(folder, config, base)
    place = base.device if device is None else device
    weights = folder / WEIGHTS_FILE
    tensors, digest = _read_weights(folder)
    pairs = _pair(tensors, where=str(weights))
    modules = {
        name: _module(name, pair["A"], pair["B"], config, base, place, where=str(folder))
        for name, pair in sorted(pairs.items())
    }
    if not modules:
        raise Corrupt("the adapter has no LoRA weights", where=str(weights))
    gates, digests = _read_gates(folder, place)
    return Adapter(key, hash_json([config, digest, *digests]), modules, gates)


def read_parts(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module -> (A, B, scale) of an adapter that `read_adapter` takes: as peft trains them, float32 on the CPU."""
    config = _read_config(folder)
    weights = folder / WEIGHTS_FILE
    pairs = _pair(_read_weights(folder)[0], where=str(weights))
    return {
        name: (
            pair["A"].float(),
            pair["B"].float(),
            _scale(name, pair["A"].shape[0], config, where=str(folder / CONFIG_FILE)),
        )
        for name, pair in pairs.items()
    }


def read_updates(folder: Path) -> dict[str, LowRank]:
    """The adapter's updates by module, in float32 on the CPU, for work that needs no base model; errors as above.

    Whether they fit a base is not known here: that is told by the expert's card.
    """
    folder = Path(folder)
    config = _read_config(folder)
    where = str(folder / WEIGHTS_FILE)
    updates = {}
    for name, pair in sorted(_pair(_read_weights(folder)[0], where=where).items()):
        a, b = pair["A"].float(), pair["B"].float()
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise Corrupt(f"{name} has A {list(a.shape)} and B {list(b.shape)}, which do not fit together", where=where)
        if a.shape[0] == 0:
            raise Corrupt(f"{name} has rank zero", where=where)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise Corrupt(f"{name} holds NaN or infinite weights", where=where)
        updates[name] = LowRank(a, b * _scale(name, a.shape[0], config, where=str(folder)))
    if not updates:
        raise Corrupt("the adapter has no LoRA weights", where=where)
    return updates


def read_gates_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a gates file as they lie there; raises Corrupt where it is damaged."""
    return _load(path)[0]


def _read_gates(folder: Path, device: torch.device) -> tuple[dict[str, torch.Tensor], list[str]]:
    path = folder / GATES_FILE
    if not path.is_file():
        return {}, []
    tensors, digest = _load(path)
    gates = {name: tensor.to(device).float() for name, tensor in tensors.items()}
    for name, tensor in gates.items():
        if not tensor.isfinite().all():
            raise Corrupt(f"{name} holds NaN or infinite numbers", where=str(path))
    return gates, [digest]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise NotFound("no such adapter folder", where=str(folder))
    if not (folder / CONFIG_FILE).is_file():
        raise NotFound(f"not a peft adapter: it has no {CONFIG_FILE}", where=str(folder))
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise Corrupt("not an adapter configuration", where=str(folder / CONFIG_FILE))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"{kind} adapters are not served", where=str(folder), hint="use a plain LoRA adapter")
    refused = [name for field, name in _REFUSED.items() if config.get(field)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        refused.append(f"a start that changed the base model itself (init_lora_weights={start!r})")
    if config.get("bias", "none") != "none":
        refused.append(f"trained biases (bias={config['bias']!r})")
    if refused:
        raise BadInput(
            f"the adapter uses {' and '.join(refused)}, which the engine does not serve",
            where=str(folder),
            hint="merge it into the base, or train a plain LoRA adapter",
        )
    return config


def _check_base(folder: Path, config: Mapping[str, Any], base: LanguageModel) -> None:
    if not (folder / CARD_FILE).is_file():
        return  # written by peft alone: module names and shapes must tell
    made_for = ExpertCard.read(folder).base
    if made_for.fingerprint != base.fingerprint:
        raise BadInput(
            f"the expert was trained on {made_for.ref} ({made_for.fingerprint[:12]}), "
            f"but the base model is {base.ref} ({base.fingerprint[:12]})",
            where=str(folder),
            hint="load the base model it was trained on",
        )


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise BadInput(
                "the weights are a pickle (adapter_model.bin), which can run code and is not read",
                where=str(folder),
                hint="save the adapter as safetensors",
            )
        raise NotFound(f"the adapter has no {WEIGHTS_FILE}", where=str(folder))
    return _load(path)


def _load(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a file, and sha256 of the very bytes they come from.

    `load_file` would map the file into memory: overwriting it would change an adapter that is being served.
    """
    import safetensors
    import safetensors.torch

    content = path.read_bytes()
    try:
        return safetensors.torch.load(content), hashlib.sha256(content).hexdigest()
    except safetensors.SafetensorError as error:
        raise Corrupt(f"the weights are damaged: {error}", where=str(path)) from None


def _pair(weights: Mapping[str, torch.Tensor], *, where: str) -> dict[str, dict[str, torch.Tensor]]:
    """Module name -> {"A": ..., "B": ...}; every tensor must find its place."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    # Embeddings first: peft saves them whole beside their LoRA, and the LoRA is what the user asked for.
    for key, tensor in sorted(weights.items(), key=lambda item: "lora_embedding" not in item[0]):
        match = _KEY.fullmatch(key)
        if match is None:
            kind = "LoRA on an embedding" if "lora_embedding" in key else "a weight that is not plain LoRA"
            raise BadInput(
                f"{key} is {kind}, which the engine does not serve",
                where=where,
                hint="train with linear target modules and without saved embeddings",
            )
        sides = pairs.setdefault(match["module"], {})
        if match["side"] in sides:
            raise Corrupt(f"{match['module']} has two lora_{match['side']}", where=where)
        if not tensor.is_floating_point():
            raise Corrupt(f"{key} holds {tensor.dtype}, which is no weight", where=where)
        sides[match["side"]] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise Corrupt(f"{module} has lora_{min(pair)} alone", where=where)
    return pairs


def _module(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    config: Mapping[str, Any],
    base: LanguageModel,
    device: torch.device,
    *,
    where: str,
) -> LowRank:
    try:
        shape = linear_shape(base.model.get_submodule(name))
    except AttributeError:
        shape = None
    if shape is None:
        raise BadInput(
            f"the adapter changes {name}, which the base model {base.ref} does not have as a linear layer "
            f"(it was made for {config.get('base_model_name_or_path') or 'an unnamed base'})",
            where=where,
            hint="load the base model it was trained on",
        )
    inputs, outputs = shape
    rank = a.shape[0] if a.ndim == 2 else 0
    if rank == 0:
        raise Corrupt(f"{name} has rank zero", where=where)
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise BadInput(
            f"{name} of the adapter has A {list(a.shape)} and B {list(b.shape)}, but in the base model {base.ref} it "
            f"maps {inputs} to {outputs} (the adapter was made for "
            f"{config.get('base_model_name_or_path') or 'an unnamed base'})",
            where=where,
            hint="load the base model it was trained on",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise Corrupt(f"{name} holds NaN or infinite weights", where=where)
    scaled = b.float() * _scale(name, rank, config, where=where)
    if not (a.to(base.dtype).isfinite().all() and scaled.to(base.dtype).isfinite().all()):
        raise Corrupt(f"the scaled weights of {name} are beyond what {base.dtype} holds", where=where)
    return LowRank(a.to(device, base.dtype), scaled.to(device, base.dtype))


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, or None for any other module."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2 stores its linear layers transposed
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def _scale(module: str, rank: int, config: Mapping[str, Any], *, where: str) -> float:
    """alpha / rank, as peft computes it: the first pattern that matches the end of the module's name decides."""
    alpha = _by_pattern(module, config.get("alpha_pattern") or {}, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise Corrupt(f"the alpha of {module} is {alpha!r}, which is no number", where=where)
    configured = _by_pattern(module, config.get("rank_pattern") or {}, config.get("r", rank))
    if configured != rank:
        raise Corrupt(f"{module} has rank {rank}, but the configuration says {configured!r}", where=where)
    # peft divides by the configured rank, which the tensors must agree with.
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
