"""The trainer of a mixture: the answers' loss and the gate's own, and checkpoints of what is trained alone.

Imports torch and trl; imported only once training begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from xpert.experts.answer_trainer import AnswerTrainer, Spent, to_dataset
from xpert.experts.mixture_training_layers import JointModel
from xpert.experts.train import Run, training_settings

__all__ = ["MixtureTrainer", "mixture_trainer"]

KIND = "row_kind"


class MixtureTrainer(AnswerTrainer):
    """AnswerTrainer of a `JointModel`. The log's `loss` is that of the answers; `router_loss` is the gate's."""

    def __init__(self, *args: Any, joint: JointModel, **options: Any) -> None:
        self.joint = joint
        super().__init__(*args, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kinds = inputs.pop(KIND, None)
        mask = inputs["attention_mask"].bool()
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:  # type: ignore[union-attr]
            return found
        self.joint.observe(mask)
        extra = self.joint.loss(mask, kinds)
        if extra is None:
            return found
        self._metrics["train"]["router_loss"].append(float(extra.detach()))
        if num_items_in_batch is not None:  # then the trainer leaves the mean over accumulated batches to the loss
            extra = extra / self.current_gradient_accumulation_steps
        return (found[0] + extra, found[1]) if return_outputs else found + extra

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        extra = self._metrics["train"].get("router_loss")
        if "loss" in logs and extra:
            logs["loss"] -= sum(extra) / len(extra)
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns: Any = self._signature_columns
        if KIND not in columns:
            columns.append(KIND)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.joint.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.joint.load(Path(resume_from_checkpoint))


class _Steps(TrainerCallback):
    """Tells the gate of every optimizer step."""

    def __init__(self, joint: JointModel) -> None:
        self.joint = joint

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.joint.gate.before_step(state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.joint.gate.after_step()


class _WithKinds(DataCollatorForLanguageModeling):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        if KIND in examples[0]:
            batch[KIND] = torch.tensor([example[KIND] for example in examples])
        return batch


def mixture_trainer(run: Run, joint: JointModel, kinds: Sequence[int] | None, *, resumed: bool) -> MixtureTrainer:
    """`kinds`: one per encoded training row, where the gate's loss reads them."""
    train = to_dataset(run.encoded)
    if kinds is not None:
        train = train.add_column(KIND, list(kinds))
    trainer = MixtureTrainer(
        run.lm.model,
        training_settings(run, resumed=resumed),
        train_dataset=train,
        eval_dataset=to_dataset(run.validation) if run.validation.examples else None,
        processing_class=run.lm.tokenizer,
        data_collator=_WithKinds(pad_token_id=run.lm.tokenizer.pad_token_id),
        lengths=run.encoded.lengths,
        row_ids=[run.data.rows[index].id for index in run.encoded.kept],
        spent=Spent(),
        joint=joint,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Steps(joint))
    return trainer
