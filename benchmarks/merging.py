"""How far merges are from the exact weighted sum, and what they take: xpert's methods beside peft's combination types.

    OMP_NUM_THREADS=1 python benchmarks/merging.py -o benchmarks/results/merging.md

Random adapters on every linear layer of a small random Llama. The error is that of the changes B A of all modules
together, in the Frobenius norm, by dense float64 matrices for both sides. CPU seconds of the merge alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from xpert.experts.adapters import LowRank, read_updates
from xpert.experts.merging import merge
from xpert.protocols import MergeTask

PEFT = ("cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd")
XPERT: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "concat": ("concat", False, {}),
    "svd": ("svd", True, {}),
    "task-arithmetic": ("task-arithmetic", False, {}),
    "ties": ("ties", True, {"density": 0.5}),
    "dare": ("dare", True, {"density": 0.5}),
    "dare elect=true": ("dare", True, {"density": 0.5, "elect": True}),
}


def base(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=4, **sizes))


def write_adapters(folder: Path, options: argparse.Namespace) -> list[Path]:
    """Random A and B; adapters of one rank, since most of peft's types take no other."""
    paths = []
    for number in range(options.experts):
        config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
        model = get_peft_model(base(options.width, options.layers), config)
        torch.manual_seed(number + 1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        paths.append(folder / f"e{number}")
        model.save_pretrained(paths[-1])
    return paths


def relative(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    apart = math.hypot(*((found[name] - exact[name]).norm().item() for name in exact))
    return apart / math.hypot(*(value.norm().item() for value in exact.values()))


def cosine(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """Between the changes as long vectors: how near a merge is but for its length."""
    product = sum((found[name] * exact[name]).sum().item() for name in exact)
    sizes = [math.hypot(*(value.norm().item() for value in one.values())) for one in (found, exact)]
    return product / (sizes[0] * sizes[1])


def dense(updates: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: update.b.double() @ update.a.double() for name, update in updates.items()}


def timed(act: Callable[..., Any], *given: Any, **more: Any) -> tuple[Any, float]:
    begin = time.process_time()
    return act(*given, **more), time.process_time() - begin


def of_xpert(paths: list[Path], weights: list[float], rank: int) -> dict[str, tuple[Any, float]]:
    experts = tuple(read_updates(path) for path in paths)
    keys = tuple(path.name for path in paths)
    found = {}
    for name, (method, cut, params) in XPERT.items():
        task = MergeTask(keys, experts, tuple(weights), rank=rank if cut else None)
        results, seconds = timed(merge, task, method, params)
        found[name] = (dense(results[0].merged.modules), seconds)
    return found


def of_peft(paths: list[Path], weights: list[float], rank: int, model: Any) -> dict[str, tuple[Any, float]]:
    peft_model: Any = None
    for path in paths:
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, path, adapter_name=path.name)
        else:
            peft_model.load_adapter(path, path.name)
    found = {}
    for kind in PEFT:
        more: dict[str, Any] = {"density": 0.5} if kind not in ("cat", "svd", "linear") else {}
        if kind.endswith("svd"):
            more |= {"svd_rank": rank, "svd_full_matrices": False}
        torch.manual_seed(0)
        names = [path.name for path in paths]
        add = peft_model.add_weighted_adapter
        _, seconds = timed(add, names, weights, kind, combination_type=kind, **more)
        layers = {n: m for n, m in peft_model.named_modules() if kind in getattr(m, "lora_A", {})}
        updates = {
            name.removeprefix("base_model.model."): LowRank(
                m.lora_A[kind].weight.detach(), m.lora_B[kind].weight.detach() * m.scaling[kind]
            )
            for name, m in layers.items()
        }
        found[kind] = (dense(updates), seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    weights = [1.0 / options.experts] * options.experts
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_adapters(Path(scratch), options)
        single = [dense(read_updates(path)) for path in paths]
        exact = {n: sum(w * one[n] for w, one in zip(weights, single, strict=True)) for n in single[0]}
        rows = [("xpert", *item) for item in of_xpert(paths, weights, options.rank).items()]
        model = base(options.width, options.layers)
        rows += [("peft", *item) for item in of_peft(paths, weights, options.rank, model).items()]
    lines = ["| by | method | error | cosine | CPU s |", "|---|---|---|---|---|"]
    lines += [
        f"| {by} | `{name}` | {relative(found, exact):.2g} | {cosine(found, exact):.3f} | {cpu:.2f} |"
        for by, name, (found, cpu) in rows
    ]
    text = "\n".join(
        [
            "# Merging beside peft's add_weighted_adapter",
            "",
            "    OMP_NUM_THREADS=1 python benchmarks/merging.py",
            "",
            f"{options.experts} random adapters of rank {options.rank} on all {len(exact)} linear layers of a random "
            f"Llama of width {options.width}, equal weights of sum one, density 0.5; svd, ties, dare and peft's svd "
            f"types at rank {options.rank}. The error is relative to the exact sum; CPU seconds on one thread.",
            "",
            *lines,
            "",
            "TIES and DARE do not aim at the sum: their error says what they leave of it; the cosine leaves out their",
            "length. With weights of sum one, xpert's `ties` is the paper's mean of the agreeing changes; peft's",
            "multiplies by the weights and then divides by how many agree, which is shorter. `linear`, `ties`,",
            "`dare_linear` and `dare_ties` of peft merge A and B apart.",
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
