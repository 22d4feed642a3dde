"""What experts cost when serving: xpert's engine and peft's mixed batch against the base model alone.

    python benchmarks/engine.py [--write FILE.md] [--repeats 5]      (DEV=cuda runs it on a GPU, in bfloat16)
    python benchmarks/engine.py --fit                                the constants of the engine's cost model

A random Llama of about 30M parameters (SIZE=large: about 1,100M), 16 experts (EXPERTS=n) of rank 8 on all linear
layers, 64 requests (ROWS=n) of 64 tokens, 32 tokens generated for each. All variants run in turn within each repeat;
figures are the fastest of the repeats, in CPU seconds on one thread (wall seconds on a GPU): the noise of a shared
machine only adds. The base model alone, by transformers' `generate`, is 1.00. The last table drives a full batch step
by step (wall seconds), while another thread adds and removes experts without pause.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
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

from xpert import plugins
from xpert.experts.engines._lora_plan import RowMixture
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.protocols import EngineRequest, Sampling

ROWS, PROMPT, NEW, RANK, VOCABULARY = int(os.environ.get("ROWS", 64)), 64, 32, 8, 8192
EXPERTS = int(os.environ.get("EXPERTS", 16))
SIZE = os.environ.get("SIZE", "small")
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
    large = SIZE == "large"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048 if large else 512,
        intermediate_size=5632 if large else 1408,
        num_hidden_layers=22 if large else 8,
        num_attention_heads=16 if large else 8,
        num_key_value_heads=16 if large else 8,
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
    """Fastest seconds of each variant; the first repeat warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if repeat:
                seconds[name].append(clock() - start)
            print(f"{repeat} {name}: {clock() - start:.2f} s", file=sys.stderr, flush=True)
    return {name: min(found) for name, found in seconds.items()}


def mixture(engine: TorchEngine, experts: Any, gate: str | None = None) -> RowMixture:
    """What the engine computes a row with, its adapters on the device."""
    asked = engine._asked(experts, gate, (), where="benchmark")
    if not asked.handles:
        return RowMixture()
    return asked.with_adapters(engine._bank.wait(asked.handles), asked.handles)


def make_arrow(folders: list[str]) -> Any:
    """peft's own Arrow router over the same adapters, top 2."""
    from peft import ArrowConfig, create_arrow_model

    model: Any = create_arrow_model(
        base_model=make_model(), task_specific_adapter_paths=folders, arrow_config=ArrowConfig(top_k=2)
    )
    return model.to(DEVICE, DTYPE).eval()


def make_engine(base: Any, folder: Path) -> TorchEngine:
    engine = TorchEngine(Subject(base, make_tokenizer()), max_batch=ROWS)
    for index in range(EXPERTS):
        # peft saves the adapter named e0 in a folder of that name, as the others
        engine.add_expert(f"e{index}", folder / f"e{index}", pinned=True)
    arrow = plugins.load("gate", "arrow")
    engine.add_gate("arrow", arrow(arrow.Options(top=2)))
    return engine


Variants = dict[str, Callable[[], Any]]


def variants(base: Any, folder: Path, engine: TorchEngine, peft: Any) -> tuple[Variants, Variants]:
    """(prefill, generation): name -> what to run."""
    prompts = torch.randint(1, VOCABULARY, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    ids = prompts.to(DEVICE)
    mask = torch.ones_like(ids)
    everyone = tuple((f"e{index}", 1.0) for index in range(EXPERTS))

    def requests(experts: Callable[[int], Any], gate: str | None) -> list[EngineRequest]:
        sampling = Sampling(max_tokens=NEW)
        rows = enumerate(prompts.tolist())
        return [EngineRequest(str(i), tuple(row), experts(i), sampling, gate=gate) for i, row in rows]

    count = EXPERTS
    sets: dict[str, tuple[Callable[[int], Any], str | None]] = {
        "xpert, no experts": (lambda i: (), None),
        "xpert, 1 expert": (lambda i: (("e0", 1.0),), None),
        f"xpert, {count} experts, one a row": (lambda i: ((f"e{i % count}", 1.0),), None),
        f"xpert, {count} experts, two weighted a row": (
            lambda i: ((f"e{i % count}", 0.6), (f"e{(i + 5) % count}", 0.4)),
            None,
        ),
        f"xpert, Arrow gate, top 2 of {count} a token": (lambda i: everyone, "arrow"),
    }
    prefill: Variants = {}
    generation: Variants = {}

    @torch.inference_mode()
    def forward(model: Any, **more: Any) -> Any:
        return model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **more)

    @torch.inference_mode()
    def generate(model: Any, **more: Any) -> Any:
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=mask, **settings, **more)

    prefill["base model, transformers"] = lambda: forward(base)
    generation["base model, transformers"] = lambda: generate(base)
    for name, (experts, gate) in sets.items():
        asked = sorted(requests(experts, gate), key=lambda request: [key for key, _ in sorted(request.experts)])
        rows = [mixture(engine, request.experts, gate) for request in asked]
        ordered = [request.prompt_ids for request in asked]
        prefill[name] = lambda ordered=ordered, rows=rows: engine._passes.prefill(ordered, rows)
        generation[name] = lambda asked=asked: list(engine.generate(asked))
    names = [f"e{i % count}" for i in range(ROWS)]
    prefill[f"peft mixed batch, {count} adapters"] = lambda: forward(peft, adapter_names=names)
    generation[f"peft mixed batch, {count} adapters"] = lambda: generate(peft, adapter_names=names)
    arrow = make_arrow([str(folder / f"e{index}") for index in range(count)])
    prefill[f"peft Arrow, top 2 of {count} a token"] = lambda: forward(arrow)
    generation[f"peft Arrow, top 2 of {count} a token"] = lambda: generate(arrow)
    return prefill, generation


def step_times(engine: TorchEngine, folder: Path, *, exchanging: bool) -> tuple[list[float], int]:
    """(wall seconds of each step of a full batch after its prefill; experts added meanwhile)."""
    prompts = torch.randint(1, VOCABULARY, (ROWS, PROMPT), generator=torch.Generator().manual_seed(2)).tolist()
    session = engine.session()
    for i, row in enumerate(prompts):
        session.submit(EngineRequest(str(i), tuple(row), ((f"e{i % EXPERTS}", 1.0),), Sampling(max_tokens=NEW)))
    session.step()
    over = threading.Event()
    added = 0

    def exchange() -> None:
        nonlocal added
        while not over.is_set():
            engine.add_expert("new", folder / f"e{added % EXPERTS}")
            engine.remove_expert("new")
            added += 1

    other = threading.Thread(target=exchange)
    if exchanging:
        other.start()
    seconds = []
    while not session.idle:
        start = time.perf_counter()
        session.step()
        seconds.append(time.perf_counter() - start)
    over.set()
    if exchanging:
        other.join()
    return seconds, added


def exchange_table(engine: TorchEngine, folder: Path) -> str:
    lines = ["| | steps | median step | longest step | experts added and removed |", "|---|---|---|---|---|"]
    step_times(engine, folder, exchanging=False)
    for name, exchanging in (("nothing else", False), ("another thread adds and removes experts", True)):
        seconds, added = step_times(engine, folder, exchanging=exchanging)
        middle, longest = statistics.median(seconds) * 1000, max(seconds) * 1000
        lines.append(f"| {name} | {len(seconds)} | {middle:.0f} ms | {longest:.0f} ms | {added} |")
    return "\n".join(lines)


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
    base = make_model()
    folder = Path(tempfile.mkdtemp())
    peft = make_peft(folder, EXPERTS)
    engine = make_engine(base, folder)
    prefill, generation = variants(base, folder, engine, peft)
    found = table(in_turn(prefill, arguments.repeats), in_turn(generation, arguments.repeats))
    found += "\n\n" + exchange_table(engine, folder)
    print(found)
    if arguments.write:
        machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores, one thread"
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        load = f"load average {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else ""
        command = f"ROWS={ROWS} EXPERTS={EXPERTS} SIZE={SIZE} python benchmarks/engine.py --repeats {arguments.repeats}"
        text = f"`{command}` on {machine}, {load}; {versions}; {DTYPE}.\n"
        about = (__doc__ or "").split("\n\n")[2].strip().replace("\n", " ")
        arguments.write.write_text(f"# Serving with experts\n\n{about}\n\n{text}\n{found}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
