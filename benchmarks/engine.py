"""What experts cost when serving: xpert's engine and peft's mixed batch against the base model alone.

    python benchmarks/engine.py [--write FILE.md] [--repeats 5]      (DEV=cuda runs it on a GPU, in bfloat16)
    python benchmarks/engine.py --fit                                the constants of the engine's cost model

A random Llama of about 30M parameters, rank-8 LoRA on all linear layers, 64 requests (ROWS=n for fewer) of 64
tokens, 32 tokens generated for each. All variants run in turn within each repeat; figures are medians of CPU seconds
on one thread (wall seconds on a GPU). The base model alone, by transformers' `generate`, is 1.00.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xpert.experts.engines.torch_lora import TorchEngine
from xpert.protocols import EngineRequest, Sampling

ROWS, PROMPT, NEW, RANK, VOCABULARY = int(os.environ.get("ROWS", 64)), 64, 32, 8, 8192
DEVICE = torch.device(os.environ.get("DEV", "cpu"))
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Subject:
    """The random model as a `LanguageModel`; it never ends a reply by itself."""

    model: Any
    tokenizer: Any
    ref: str = "random-30M"
    fingerprint: str = "none"
    device: torch.device = DEVICE
    dtype: torch.dtype = DTYPE
    stop_ids: frozenset[int] = frozenset()


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(DEVICE, DTYPE).eval()


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{index}": index for index in range(VOCABULARY)}
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0")


def make_peft(folder: Path, count: int) -> Any:
    """A peft model with `count` random adapters named e0, e1, ...; each is saved under `folder`."""
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(make_model(), settings, adapter_name="e0")
    for index in range(1, count):
        model.add_adapter(f"e{index}", settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    assert isinstance(model, PeftModel)
    return model.to(DEVICE, DTYPE).eval()


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turn(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; the first repeat warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if repeat:
                seconds[name].append(clock() - start)
            print(f"{repeat} {name}: {clock() - start:.2f} s", file=sys.stderr, flush=True)
    return {name: statistics.median(found) for name, found in seconds.items()}


def variants() -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """(prefill, generation): name -> what to run."""
    prompts = torch.randint(1, VOCABULARY, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    ids = prompts.to(DEVICE)
    mask = torch.ones_like(ids)
    base = make_model()
    folder = Path(tempfile.mkdtemp())
    peft = make_peft(folder, 16)
    engine = TorchEngine(Subject(base, make_tokenizer()), max_batch=ROWS)
    for index in range(16):
        # peft saves the adapter named e0 in a folder of that name, as the others
        engine.add_expert(f"e{index}", folder / f"e{index}")

    def requests(experts: Callable[[int], Any]) -> list[EngineRequest]:
        sampling = Sampling(max_tokens=NEW)
        return [EngineRequest(str(i), tuple(row), experts(i), sampling) for i, row in enumerate(prompts.tolist())]

    sets: dict[str, Callable[[int], Any]] = {
        "xpert, no experts": lambda i: (),
        "xpert, 1 expert": lambda i: (("e0", 1.0),),
        "xpert, 4 experts, one a row": lambda i: ((f"e{i % 4}", 1.0),),
        "xpert, 16 experts, one a row": lambda i: ((f"e{i % 16}", 1.0),),
        "xpert, 16 experts, two weighted a row": lambda i: ((f"e{i % 16}", 0.6), (f"e{(i + 5) % 16}", 0.4)),
    }
    prefill: dict[str, Callable[[], Any]] = {}
    generation: dict[str, Callable[[], Any]] = {}

    @torch.inference_mode()
    def forward(model: Any, **more: Any) -> Any:
        return model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **more)

    @torch.inference_mode()
    def generate(model: Any, **more: Any) -> Any:
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=mask, **settings, **more)

    prefill["base model, transformers"] = lambda: forward(base)
    generation["base model, transformers"] = lambda: generate(base)
    for name, experts in sets.items():
        asked = sorted(requests(experts), key=lambda request: [key for key, _ in sorted(request.experts)])
        rows = [_mixture(engine, request.experts) for request in asked]
        ordered = [request.prompt_ids for request in asked]
        prefill[name] = lambda ordered=ordered, rows=rows: engine._passes.prefill(ordered, rows)
        generation[name] = lambda asked=asked: list(engine.generate(asked))
    names = [f"e{i % 16}" for i in range(ROWS)]
    prefill["peft mixed batch, 16 adapters"] = lambda: forward(peft, adapter_names=names)
    generation["peft mixed batch, 16 adapters"] = lambda: generate(peft, adapter_names=names)
    return prefill, generation


def fit() -> None:
    """Prints launch and flop of `CostModel`, by least squares over segments of many sizes."""
    import numpy as np

    width = 512
    shapes, seconds = [], []
    for rows in (1, 4, 16, 64, 256, 1024):
        for rank in (8, 32, 128):
            x, y = torch.randn(rows, 1, width, device=DEVICE, dtype=DTYPE), torch.zeros(rows, width, device=DEVICE)
            y = y.to(DTYPE)
            a, b = torch.randn(2, rank, width, device=DEVICE, dtype=DTYPE)
            weights = torch.rand(rows, 1, rank, device=DEVICE, dtype=DTYPE)
            found = []
            for _ in range(30):
                start = clock()
                for _ in range(10):
                    h = x @ a.T
                    h *= weights
                    y.addmm_(h.view(-1, rank), b)
                found.append((clock() - start) / 10)
            shapes.append((1.0, rows * rank * 2.0 * width))
            seconds.append(statistics.median(found))
    # Relative errors: the small segments decide where to cut.
    scale = 1 / np.array(seconds)
    (launch, flop), *_ = np.linalg.lstsq(np.array(shapes) * scale[:, None], np.ones(len(seconds)), rcond=None)
    print(f"{DEVICE.type}: CostModel(launch={launch:.1e}, flop={flop:.1e})")


def table(prefill: dict[str, float], generation: dict[str, float]) -> str:
    base = "base model, transformers"
    lines = ["| | prefill s | ratio | generation s | ratio |", "|---|---|---|---|---|"]
    for name in prefill:
        p, g = prefill[name], generation[name]
        lines.append(f"| {name} | {p:.3f} | {p / prefill[base]:.2f} | {g:.3f} | {g / generation[base]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--fit", action="store_true", help="measure the constants of the cost model instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.fit:
        fit()
        return
    prefill, generation = variants()
    found = table(in_turn(prefill, arguments.repeats), in_turn(generation, arguments.repeats))
    print(found)
    if arguments.write:
        machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores, one thread"
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        load = f"load average {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else ""
        command = f"ROWS={ROWS} python benchmarks/engine.py --repeats {arguments.repeats}"
        text = f"`{command}` on {machine}, {load}; {versions}; {DTYPE}.\n"
        about = (__doc__ or "").split("\n\n")[2].strip().replace("\n", " ")
        arguments.write.write_text(f"# Serving with experts\n\n{about}\n\n{text}\n{found}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
