"""What happens around the steps of training: its log, progress, sealed checkpoints, and stopping on Ctrl-C.

Imports transformers; imported only once training begins.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from xpert.experts.answer_trainer import Spent
from xpert.experts.checkpoints import seal
from xpert.progress import Progress, Task

__all__ = ["LOG_FILE", "SealCheckpoints", "StepLog", "StopGently", "read_log"]

LOG_FILE = "training.jsonl"


def read_log(work: Path, *, until: int | None = None) -> list[dict[str, Any]]:
    """The records of training.jsonl, those of steps after `until` left out (a crash may have come before their
    checkpoint), and a torn last line with them."""
    path = work / LOG_FILE
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if until is None or record["step"] <= until:
            records.append(record)
    return records


class StepLog(TrainerCallback):
    """Writes a line to training.jsonl per step and per validation, and moves the progress."""

    def __init__(self, work: Path, spent: Spent, task: Task) -> None:
        self.path, self.spent, self.task = work / LOG_FILE, spent, task
        self.before = Spent(spent.tokens, spent.supervised, spent.seconds)
        self.start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.spent.seconds = self.before.seconds + time.monotonic() - self.start
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "validation_loss": logs["eval_loss"]})
        elif "loss" in logs:
            self._write(
                {
                    "step": state.global_step,
                    "loss": logs["loss"],
                    "learning_rate": logs["learning_rate"],
                    "gradient_norm": float(logs.get("grad_norm") or 0.0),
                    "tokens": self.spent.tokens,
                    "supervised_tokens": self.spent.supervised,
                    "seconds": round(self.spent.seconds, 3),
                    **({"router_loss": logs["router_loss"]} if "router_loss" in logs else {}),
                }
            )
            rate = (self.spent.tokens - self.before.tokens) / max(self.spent.seconds - self.before.seconds, 1e-9)
            self.task.advance(1, f"loss {logs['loss']:.3f}  {rate:,.0f} tokens/s")

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint once the trainer has written it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class StopGently(TrainerCallback):
    """On the first Ctrl-C the step under way is finished and a checkpoint saved; on the second all stops at once."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes Ctrl-C while the block lasts (in the main thread alone), and raises KeyboardInterrupt at its end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.asked:
            raise KeyboardInterrupt

    def _on_signal(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.progress.say("Stopping after this step, with a checkpoint; Ctrl-C again stops at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
