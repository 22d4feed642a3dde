"""An adapter as one GGUF file, which llama.cpp loads beside its base (`--lora FILE`).

    general.type = "adapter", adapter.type = "lora", general.architecture as in the base's own file
    adapter.lora.alpha                                     y += alpha / rank * B A x, the rank being the tensor's
    blk.N.attn_q.weight.lora_a [rank, in], .lora_b [out, rank]   and so on, by gguf's table of names

Where llama.cpp's converter reorders the rows of the base's Q and K for its own form of rotary embeddings, the rows of
their lora_b are reordered alike. One alpha stands for all modules; where ranks or alphas differ, or with rsLoRA, what a
module's scale differs by is multiplied into its B, in float64, and rounded once.

Source: llama.cpp, convert_lora_to_gguf.py and conversion/llama.py (LlamaModel.permute).
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpert.errors import BadInput
from xpert.storage import disk_errors

if TYPE_CHECKING:
    from xpert.experts.exporting.source import Source
    from xpert.model_files import ModelFiles

__all__ = ["ARCHITECTURES", "Architecture", "GgufLora", "gguf_lora", "write_gguf"]


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp calls it; `reorders` tells whether its converter reorders the rows of Q and K."""

    name: str
    reorders: bool = False


# Those whose tensors llama.cpp's converter takes as they are, or reorders as it does llama's. It cuts, joins or
# transposes those of others (GPT-2, GPT-NeoX, Falcon, all mixtures of experts), which are refused by name.
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", reorders=True),
    "MistralForCausalLM": Architecture("llama", reorders=True),
    "GraniteForCausalLM": Architecture("granite", reorders=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", reorders=True),
    "ArceeForCausalLM": Architecture("arcee", reorders=True),
    "OlmoForCausalLM": Architecture("olmo", reorders=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "Phi3ForCausalLM": Architecture("phi3"),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
}


@dataclass(frozen=True)
class GgufLora:
    """The adapter in llama.cpp's terms: one alpha, and per tensor of its base ("blk.0.attn_q.weight") the pair
    (A [rank, in], B [out, rank]), float32."""

    architecture: str
    alpha: float
    pairs: Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def write_gguf(source: Source, files: ModelFiles, out: Path, *, dtype: str) -> dict[str, Any]:
    """Writes the file `out`, whole or not at all; returns figures. Of the base its configuration alone is read.

    Raises BadInput for an architecture that is not known here, for an adapter that does not fit the base, and for
    weights beyond what `dtype` holds.
    """
    import gguf

    adapter = gguf_lora(source.folder, files)
    kinds = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
    }
    kind = kinds[dtype]
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            draft = Path(folder) / out.name
            writer = gguf.GGUFWriter(draft, adapter.architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_name(source.name)
            if source.card is not None:
                writer.add_description(source.card.description)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
            for name, pair in adapter.pairs.items():
                for side, matrix in zip("ab", pair, strict=True):
                    data = _as_kind(matrix, kind, f"lora_{side} of {name}", str(source.folder))
                    writer.add_tensor(f"{name}.lora_{side}", data, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.rename(out)
    return {
        "bytes": out.stat().st_size,
        "modules": len(adapter.pairs),
        "dtype": dtype,
        "architecture": adapter.architecture,
        "alpha": adapter.alpha,
    }


def gguf_lora(folder: Path, files: ModelFiles) -> GgufLora:
    """The adapter in `folder`, checked against the base and brought into llama.cpp's names, order and scale."""
    import gguf

    from xpert.experts.adapters import read_adapter, read_parts
    from xpert.experts.bare_base import bare_base

    base = bare_base(files)
    architecture = _architecture(base.architecture, files.ref)
    read_adapter("exported", folder, base)  # that it fits, and that every weight is finite
    parts = read_parts(folder)
    scales = {module: scale * a.shape[0] for module, (a, _, scale) in parts.items()}
    alpha = _common(scales.values())
    config = base.model.config
    kind = next(member for member, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    pairs = {}
    for module, (a, b, _) in sorted(parts.items()):
        name = names.get_name(module)
        if name is None or (name == "output" and config.tie_word_embeddings):
            why = "its weights are those of the embeddings" if name else "it has no name there"
            raise BadInput(
                f"llama.cpp cannot adapt {module} of {files.ref}: {why}",
                where=str(folder),
                hint="export it with --to merged, and convert the model",
            )
        rows = b.double().numpy() * (scales[module] / alpha)
        if architecture.reorders and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            rows = _reorder_rows(rows, heads)
        pairs[f"{name}.weight"] = (a.numpy(), _in_float32(rows, module, str(folder)))
    return GgufLora(architecture.name, alpha, pairs)


def _architecture(name: str, ref: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise BadInput(
            f"{name} is not among the architectures whose adapters are written as GGUF",
            where=ref,
            hint=f"export it with --to merged; known are {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[name]


def _common(scales: Any) -> float:
    """The alpha most modules share, as float32 holds it, so that their B stay as they are.

    Never zero: to llama.cpp, an alpha of zero means none, and a scale of one.
    """
    counts = Counter(float(np.float32(scale)) for scale in scales if scale)
    return max(counts, key=lambda alpha: (counts[alpha], alpha)) if counts else 1.0


def _reorder_rows(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """[out, n] -> the same, each head's rows interleaved: row i of its first half, then row i of its second half."""
    width = matrix.shape[0] // heads
    return matrix.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def _in_float32(rows: np.ndarray[Any, Any], module: str, where: str) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(rows, dtype=np.float32)
    if not np.isfinite(rounded).all():
        raise BadInput(f"the scaled weights of {module} are beyond what float32 holds", where=where)
    return rounded


def _as_kind(matrix: np.ndarray[Any, Any], kind: Any, what: str, where: str) -> np.ndarray[Any, Any]:
    import gguf

    with np.errstate(over="ignore"):
        data = np.asarray(gguf.quantize(matrix, kind))
        finite = np.isfinite(gguf.dequantize(data, kind)).all()
    if not finite:
        raise BadInput(f"{what} is beyond what {kind.name} holds", where=where, hint="export it with --dtype float32")
    return data
