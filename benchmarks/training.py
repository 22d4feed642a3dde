"""LoRA training: xpert beside trl's SFTTrainer as it comes, on the same rows, steps and settings.

    OMP_NUM_THREADS=1 python benchmarks/training.py --base MODEL --rows SOURCE [--steps 8] [--repeats 3]

Each run is a process of its own, the two in turn; CPU seconds of the steps alone, medians. Tokens are counted without
padding. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, RANK, ALPHA, RATE = 8, 16, 32, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(RUNS[given.one](given.base, given.rows, given.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(given.repeats):
        for name in RUNS:
            command = [sys.executable, __file__, "--one", name, "--base", given.base, "--rows", given.rows]
            command += ["--steps", str(given.steps)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
    print("| | tokens per CPU second | CPU s | tokens |\n|---|---|---|---|")
    for name, runs in found.items():
        rate = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        print(f"| {name} | {rate:.0f} | {seconds:.1f} | {runs[0]['tokens']:.0f} |")


def _clocked() -> tuple[Any, dict[str, float]]:
    """A callback that keeps the CPU seconds from the first step's begin to the last one's end."""
    from transformers import TrainerCallback

    clock: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            clock.setdefault("start", time.process_time())

        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock["end"] = time.process_time()

    return Clock(), clock


def run_xpert(base: str, rows: str, steps: int) -> dict[str, float]:
    from xpert.experts import train as training
    from xpert.experts.train_options import TrainOptions

    options = TrainOptions(
        max_steps=steps, batch_size=BATCH, rank=RANK, alpha=ALPHA, learning_rate=RATE, dropout=0.0, warmup=0.0
    )
    callback, clock = _clocked()
    make = training._trainer

    def clocked(*args: Any, **options: Any) -> Any:
        trainer = make(*args, **options)
        trainer.add_callback(callback)
        return trainer

    training._trainer = clocked
    with tempfile.TemporaryDirectory() as folder:
        out = training.train(rows, base, Path(folder) / "expert", options)
        last = json.loads((out / "training.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"seconds": clock["end"] - clock["start"], "tokens": last["tokens"]}


def run_trl(base: str, rows: str, steps: int) -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from xpert.data import read_rows
    from xpert.language_model import load_model

    lm = load_model(base)
    data = Dataset.from_list(
        [
            {"prompt": row.chat(), "completion": [{"role": "assistant", "content": row.response}]}
            for row in read_rows(rows)
        ]
    )
    callback, clock = _clocked()
    seen: list[int] = []

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            seen.append(int(inputs["attention_mask"].sum()))
            return super().compute_loss(model, inputs, *args, **options)

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            train_sampling_strategy="group_by_length",
            activation_checkpointing=False,
            use_cpu=True,
            bf16=False,  # trl's default would emulate bfloat16 here, many times slower
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        peft = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = Counting(lm.model, settings, train_dataset=data, processing_class=lm.tokenizer, peft_config=peft)
        trainer.add_callback(callback)
        trainer.train()
    return {"seconds": clock["end"] - clock["start"], "tokens": float(sum(seen))}


RUNS = {"xpert": run_xpert, "trl SFTTrainer": run_trl}

if __name__ == "__main__":
    main()
