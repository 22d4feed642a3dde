"""Training: a selection and a base model in, an expert folder out, with work kept when it is stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, XpertError
from xpert.experts.checkpoints import last_checkpoint, other_work, remove_work, steps_done, work_folder
from xpert.experts.expert_folder import Trained, write_expert
from xpert.experts.gate_options import GateOptions
from xpert.experts.gate_vectors import make_vectors
from xpert.experts.train_options import TrainOptions
from xpert.experts.training_data import Encoded, TrainingRows, encode_rows, gather_rows
from xpert.language_model import LanguageModel, load_model, quiet_transformers
from xpert.model_files import find_model
from xpert.progress import SILENT, Progress
from xpert.registry.card import CARD_FILE, ExpertCard
from xpert.storage import check_output, disk_errors, hash_json, write_file

if TYPE_CHECKING:
    from xpert.experts.answer_trainer import AnswerTrainer

__all__ = [
    "Run",
    "TrainOptions",
    "lora_config",
    "prepare",
    "processes",
    "quiet_warnings",
    "run_steps",
    "train",
    "trained_to_the_end",
    "training_settings",
]


@dataclass(frozen=True)
class Run:
    """One training run: what it is made of and where it works."""

    work: Path
    options: TrainOptions
    seed: int
    data: TrainingRows
    lm: LanguageModel
    encoded: Encoded
    validation: Encoded
    progress: Progress


def train(
    selection: Path | str,
    base: str,
    out: Path | str,
    options: TrainOptions | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Path:
    """Trains a LoRA expert on a selection (or any source of rows) and writes the expert folder `out`.

    Stopped at any moment, the same call goes on from its last checkpoint and ends with the same weights; an expert
    that is there already is recognised. Raises BadInput for a selection or base that cannot be used, for an output
    that is taken, and for a loss that is no longer a number; Unavailable for a device that is not there. Under
    `accelerate launch` every process calls this, and the main one writes.
    """
    out, options = Path(out), options or TrainOptions()
    files = find_model(base)
    data = gather_rows(selection, use_shots=options.shots, hold_out=options.hold_out_shots, seed=seed)
    shaping = {"options": options.shaping(), "seed": seed, "processes": processes()}
    key = hash_json({"data": data.fingerprint, "base": files.fingerprint(), **shaping})
    if _is_done(out, key):
        progress.say(f"{out} is trained already, with this configuration and these rows.")
        return out
    check_output(out)
    if options.gate and processes() > 1:
        raise BadInput(
            f"gate vectors are made in one process, and this run has {processes()}",
            hint=f"train without --gate, then `xpert gate {out} ROWS --name {options.gate}`",
        )
    main = _is_main()
    progress = progress if main else SILENT
    for other in other_work(out, key):
        progress.say(f"Another configuration's unfinished work is kept in {other} until this expert is done.")
    with work_folder(out, key, lock=main) as work, quiet_transformers(), quiet_warnings(), disk_errors(out):
        run = prepare(work, options, seed, data, base, device, progress)
        trained = _train(run, key)
        if main:
            write_expert(out, _with_gate(trained, progress))
    if main:
        remove_work(out, key)
    return out


def lora_config(options: TrainOptions) -> Any:
    """The options as peft's LoraConfig: A is drawn at random, B is zero, so that training starts from the base."""
    from peft import LoraConfig

    named = options.target_modules
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if named == ("all-linear",) else list(named),
        use_rslora=options.rslora,
        task_type="CAUSAL_LM",
    )


def prepare(
    work: Path,
    options: TrainOptions,
    seed: int,
    data: TrainingRows,
    base: str,
    device: str,
    progress: Progress,
) -> Run:
    lm = load_model(base, device=device, dtype=options.dtype, progress=progress)
    encoded = encode_rows(lm.tokenizer, data.rows, options.max_length)
    if not encoded.examples:
        raise BadInput(
            f"all {len(data.rows):,} rows are longer than {options.max_length} tokens before their answer begins",
            hint="raise --max-length",
        )
    if encoded.cut or encoded.dropped:
        progress.say(
            f"Rows longer than {options.max_length} tokens: {encoded.cut:,} are cut at their end, {encoded.dropped:,} "
            f"are dropped since their answer would be gone. --max-length sets the limit."
        )
    validation = encode_rows(lm.tokenizer, data.validation, options.max_length)
    if data.validation and not validation.examples:
        raise BadInput("the held-out shots are all longer than --max-length", hint="raise --max-length")
    return Run(work, options, seed, data, lm, encoded, validation, progress)


def _train(run: Run, key: str) -> Trained:
    from xpert.experts.training_callbacks import read_log

    trainer = trained_to_the_end(run, lambda resumed: _trainer(run, resumed=resumed), _load_adapter)
    return Trained(
        model=trainer.accelerator.unwrap_model(trainer.model),
        lm=run.lm,
        data=run.data,
        encoded=run.encoded,
        options=run.options,
        seed=run.seed,
        key=key,
        log=read_log(run.work),
        validation_rows=len(run.validation.examples),
    )


def _with_gate(trained: Trained, progress: Progress) -> Trained:
    """The trained expert with its vectors for the token gate that was asked for, made while the adapter is frozen."""
    options, lm = trained.options, trained.lm
    if options.gate is None:
        return trained
    from xpert.experts.gate_training import peft_updates

    settings = GateOptions(shots=options.shots, max_length=options.max_length, dtype=options.dtype)
    updates = peft_updates(trained.model, lm.dtype)
    with trained.model.disable_adapter():  # the updates are added by the making of the vectors itself
        model = trained.model.get_base_model().eval()
        made = make_vectors(
            model, updates, trained.data, trained.encoded, options.gate, settings, seed=trained.seed, progress=progress
        )
    return dataclasses.replace(trained, gate=made)


def trained_to_the_end(
    run: Run, make: Callable[[bool], AnswerTrainer], load: Callable[[Any, Path], None]
) -> AnswerTrainer:
    """A trainer that has done all its steps, from wherever an earlier run was stopped.

    `make(resumed)` builds it; `load(model, checkpoint)` is for a run of which only the writing was cut off.
    """
    checkpoint, torn = last_checkpoint(run.work)
    for path in torn:
        run.progress.say(f"{path.name} was not written to its end and is passed over.")
    trainer = make(checkpoint is not None)
    done, planned = steps_done(checkpoint) if checkpoint else (0, 0)
    if checkpoint and done:
        run.progress.say(f"Going on from step {done:,} of {planned:,}.")
    if checkpoint and done >= planned:
        # Only the writing of the expert was cut off. The trainer would run one step too many from here.
        load(trainer.model, checkpoint)
    else:
        run_steps(run, trainer, checkpoint, done)
    return trainer


def run_steps(run: Run, trainer: AnswerTrainer, checkpoint: Path | None, done: int) -> None:
    from xpert.experts.training_callbacks import LOG_FILE, SealCheckpoints, StepLog, StopGently, read_log

    records = read_log(run.work, until=done)
    if _is_main():
        write_file(run.work / LOG_FILE, "".join(json.dumps(record) + "\n" for record in records))
    spent = trainer.spent
    for record in records:
        if "tokens" in record:
            spent.tokens, spent.supervised = record["tokens"], record["supervised_tokens"]
            spent.seconds = record["seconds"]
    stop = StopGently(run.progress)
    with run.progress.task("Training, steps", trainer.planned_steps - done) as task, stop.listening():
        for callback in (StepLog(run.work, spent, task), SealCheckpoints(), stop):
            trainer.add_callback(callback)
        with _memory_errors(run.options):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _trainer(run: Run, *, resumed: bool) -> AnswerTrainer:
    from transformers import PrinterCallback

    from xpert.experts.answer_trainer import AnswerTrainer, Spent, to_dataset

    options, validates = run.options, bool(run.validation.examples)
    settings = training_settings(run, resumed=resumed)
    try:
        trainer = AnswerTrainer(
            run.lm.model,
            settings,
            train_dataset=to_dataset(run.encoded),
            eval_dataset=to_dataset(run.validation) if validates else None,
            processing_class=run.lm.tokenizer,
            peft_config=lora_config(options),
            lengths=run.encoded.lengths,
            row_ids=[run.data.rows[index].id for index in run.encoded.kept],
            spent=Spent(),
        )
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise BadInput(
            f"the base has none of the target modules {', '.join(options.target_modules)}",
            hint=f"it has {', '.join(_linear_names(run.lm.model))}",
        ) from None
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_settings(run: Run, *, resumed: bool) -> Any:
    """The options as trl's SFTConfig."""
    from trl.trainer.sft_config import SFTConfig

    options, cuda = run.options, run.lm.device.type == "cuda"
    validates = bool(run.validation.examples)
    settings = SFTConfig(
        output_dir=str(run.work),
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if options.scheduler == "constant" else options.scheduler,
        warmup_steps=options.warmup,  # below 1 it is a share of all steps
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_gradient_norm,
        max_length=None,  # rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=run.seed,
        bf16=cuda and str(run.lm.dtype) == "torch.bfloat16",
        use_cpu=not cuda,
        activation_checkpointing=options.activation_checkpointing,
        save_strategy="steps",
        save_steps=options.checkpoint_steps,
        save_total_limit=2,  # the one before counts until the newest is sealed
        eval_strategy="steps" if validates else "no",
        eval_steps=0.1 if validates else None,
        eval_on_start=validates and not resumed,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would put an average where the loss is NaN
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        report_to="none",
    )
    _use_one_gpu(settings, run.lm.device)
    return settings


def _use_one_gpu(settings: Any, device: Any) -> None:
    """In one process the trainer would spread over all GPUs it sees; the user named one."""
    if device.type == "cuda" and processes() == 1:
        import torch

        torch.cuda.set_device(device)
        settings._n_gpu = 1


def _linear_names(model: Any) -> list[str]:
    import torch

    head = model.get_output_embeddings()
    linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _load_adapter(model: Any, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """What trl and transformers tell each other of coming versions is not for the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # peft asks for the base's config at every checkpoint, to see whether its vocabulary was changed; ours never is.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


@contextmanager
def _memory_errors(options: TrainOptions) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise BadInput(
            f"the device's memory does not hold {options.batch_size} rows of up to {options.max_length} tokens",
            hint="lower --batch-size and raise --gradient-accumulation, or use --activation-checkpointing",
        ) from None


def _is_done(out: Path, key: str) -> bool:
    if not (out / CARD_FILE).is_file():
        return False
    try:
        return ExpertCard.read(out).training.get("key") == key
    except XpertError:
        return False


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
