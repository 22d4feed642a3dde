"""LESS features (a gradient per row, shortened to 8,192 numbers), in examples per CPU second, beside other packages.

    python benchmarks/less_features.py [--rows 256] [--tokens 128] [--repeats 3] [--peers FOLDER] [--dims 8192]

A random Llama of 7.4M parameters (hidden 256, 4 layers, 8,192 words), an adapter of rank 8 on every linear layer
(156,160 numbers) after a short warm-up, rows of `--tokens` tokens, two thirds of them answer, of 16 kinds.
LESS as released is written out here as its code is: one backward pass a row through peft, Adam's form, and traker's
BasicProjector (dense Rademacher, which the release takes where no CUDA is) on 16 rows a call; its projection is
timed on 32 rows. `--peers` is a folder made by `pip install --target FOLDER --no-deps traker`; without it the peers
are left out. One thread; CPU seconds of this process, medians of `--repeats` for xpert, one run for the peers;
loading is not counted. bfloat16 is measured where the CPU multiplies in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xpert.gradients import SHARD_ROWS, ExactScores, GradientOptions, GradientPass, gradient_dtype
from xpert.language_model import encode_examples, load_model, quiet_transformers
from xpert.lora_training import Checkpoint, LoraOptions, warm_up
from xpert.records import Message, Row
from xpert.sketches import Sketch

WORDS = 8192
KINDS = 16
LESS_ROWS, LESS_CALL = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dims", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        rows = make_rows(given.rows, given.tokens)
        options = LoraOptions(layers=("all",), epochs=1, batch_size=16)
        [checkpoint] = warm_up(base, rows[:32], options, Path(folder), device="cpu")
        lm = load_model(base, device="cpu")
        lengths = {len(ids) for ids, _ in encode_examples(lm.tokenizer, rows)}
        numbers = sum(value.numel() for value in checkpoint.load().weights.values())
        print(f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}; ", end="")
        print(f"{len(rows)} rows of {lengths} tokens, {numbers:,} adapter numbers, {given.dims:,} kept\n")
        report(base, checkpoint, rows, given)


def report(base: str, checkpoint: Checkpoint, rows: list[Row], given: argparse.Namespace) -> None:
    ours = measure_ours(base, checkpoint, rows, given)
    before = time.process_time()
    pairs = list(loop_gradients(base, checkpoint, rows))
    spent = (time.process_time() - before) / len(rows)
    gradients = torch.stack([shaped for _, shaped in pairs])
    exact = cosines(gradients.numpy())
    report_sketches({"plain": torch.stack([plain for plain, _ in pairs]), "adam": gradients}, given.dims)
    best = ours["xpert: fold, float32"][0]
    print("| what | examples per CPU second | xpert's fold in float32, times | cosines: correlation with exact |")
    print("|---|---|---|---|")

    def line(name: str, rate: float, correlation: float | None = None) -> None:
        shown = "" if correlation is None else f"{correlation:.4f}"
        print(f"| {name} | {rate:.2f} | {best / rate:.1f} | {shown} |", flush=True)

    line("batch-1 loop through peft, gradients alone", 1 / spent)
    for name, (rate, kept) in ours.items():
        line(name, rate, agreement(kept, exact))
    if given.peers:
        sys.path.insert(0, str(given.peers))
        projecting, _ = project(gradients[:LESS_ROWS], LESS_CALL, given.dims)
        line(f"LESS as released: {LESS_CALL} rows a call", 1 / (spent + projecting))
        projecting, kept = project(gradients, len(rows), given.dims)
        line(f"LESS: {len(rows)} rows a call", 1 / (spent + projecting), agreement(kept, exact))
        line("traker: 64 rows a batch", traker(base, checkpoint, rows[:64], given.dims))


def report_sketches(gradients: dict[str, torch.Tensor], dims: int) -> None:
    """How sketches of the loop's own gradients keep the cosines; the noise of any sketch is about 1 / sqrt(dims)."""
    print("| gradients | mean cosine | standard deviation | fold: correlation | countsketch: correlation |")
    print("|---|---|---|---|---|")
    for form, vectors in gradients.items():
        exact = cosines(vectors.numpy())
        found = []
        for kind in ("fold", "countsketch"):
            sketch = Sketch({"all": vectors.shape[1]}, dims, kind=kind)
            kept = sketch.empty(len(vectors))
            sketch.add(kept, "all", vectors)
            found.append(agreement(kept.numpy(), exact))
        print(f"| {form} | {exact.mean():.3f} | {exact.std():.3f} | {found[0]:.4f} | {found[1]:.4f} |")
    print()


def measure_ours(
    base: str, checkpoint: Checkpoint, rows: list[Row], given: argparse.Namespace
) -> dict[str, tuple[float, np.ndarray | None]]:
    """Name -> (examples per CPU second, kept unit rows); the ways take turns."""
    dtypes = ["float32"] + (["bfloat16"] if gradient_dtype("auto", "cpu") == "bfloat16" else [])
    workers: dict[str, Callable[[Any], dict[str, Any]]] = {}
    for dtype in dtypes:
        for sketch in ("fold", "countsketch"):
            settings = GradientOptions(given.dims, sketch, dtype=dtype)
            workers[f"xpert: {sketch}, {dtype}"] = GradientPass(base, (checkpoint,), settings, "adam").open("cpu")
        targets = tuple(rows[:8])
        exact = ExactScores(base, (checkpoint,), targets, tuple(range(8)), "adam", dtype=dtype)
        workers[f"xpert: exact scores for 8 targets, {dtype}"] = exact.open("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    kept: dict[str, Any] = {}
    for _ in range(given.repeats):
        for name, worker in workers.items():
            before = time.process_time()
            found = [worker(rows[start : start + SHARD_ROWS]) for start in range(0, len(rows), SHARD_ROWS)]
            seconds[name].append(time.process_time() - before)
            kept[name] = np.concatenate([part["gradient"][:, 0] for part in found]) if "gradient" in found[0] else None
    return {name: (len(rows) / float(np.median(times)), kept[name]) for name, times in seconds.items()}


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Of all pairs of rows."""
    unit = vectors.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def agreement(kept: np.ndarray | None, exact: np.ndarray) -> float | None:
    """Correlation with the exact cosines."""
    return None if kept is None else float(np.corrcoef(cosines(kept), exact)[0, 1])


# ── LESS as its code is ──────────────────────────────────────────────────────────────────────────────────────────────


def peft_model(base: str, checkpoint: Checkpoint) -> tuple[Any, Any]:
    from peft import PeftModel

    lm = load_model(base, device="cpu")
    return PeftModel.from_pretrained(lm.model, checkpoint.folder, is_trainable=True).eval(), lm.tokenizer


def loop_gradients(base: str, checkpoint: Checkpoint, rows: list[Row]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Row after row: forward, loss by the model itself, backward; the gradient as a vector, and Adam's form of it."""
    model, tokenizer = peft_model(base, checkpoint)
    state = checkpoint.load()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = [name.removeprefix("base_model.model.").removesuffix(".default.weight") for name, _ in named]
    first = torch.cat([state.first[name].flatten() for name in names])
    second = torch.cat([state.second[name].flatten() for name in names])
    for ids, start in encode_examples(tokenizer, rows):
        labels = torch.tensor([[-100] * start + list(ids[start:])])
        batch = torch.tensor([ids])
        model(input_ids=batch, labels=labels, attention_mask=torch.ones_like(batch)).loss.backward()
        gradient = torch.cat([p.grad.view(-1) for _, p in named])
        m, v = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        model.zero_grad()
        yield gradient, m / torch.sqrt(v + 1e-8)


def project(gradients: torch.Tensor, interval: int, dims: int) -> tuple[float, np.ndarray]:
    """CPU seconds a row, and the unit rows that are kept."""
    from trak.projectors import BasicProjector, ProjectionType

    device = torch.device("cpu")
    projector = BasicProjector(gradients.shape[1], dims, 0, ProjectionType.rademacher, device, block_size=128)
    before = time.process_time()
    kept = [projector.project(part, model_id=0) for part in gradients.split(interval)]
    found = torch.nn.functional.normalize(torch.cat(kept), dim=1)
    return (time.process_time() - before) / len(gradients), found.numpy()


# ── traker ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def traker(base: str, checkpoint: Checkpoint, rows: list[Row], dims: int) -> float:
    """Examples per CPU second of `TRAKer.featurize`, its gradients taken for the adapter alone."""
    from trak import TRAKer
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    model, tokenizer = peft_model(base, checkpoint)
    model.get_base_model().set_attn_implementation("eager")  # vmap takes the fused attention row by row

    class MeanLoss(AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, ids: Any, labels: Any) -> Any:
            inputs = {"input_ids": ids[None], "use_cache": False}
            logits = torch.func.functional_call(model, (weights, buffers), kwargs=inputs).logits[0, :-1]
            wanted = labels[1:]
            losses = torch.nn.functional.cross_entropy(logits, wanted.clamp(min=0), reduction="none")
            return (losses * (wanted >= 0)).sum() / (wanted >= 0).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Any:
            return torch.ones(len(batch[0]), 1)

    class AdapterGradients(FunctionalGradientComputer):
        def load_model_params(self, model: Any) -> None:
            self.func_weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
            frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
            self.func_buffers = {**frozen, **dict(model.named_buffers())}

    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoded = encode_examples(tokenizer, rows)
    ids = torch.tensor([ids for ids, _ in encoded])
    labels = torch.tensor([[-100] * start + list(ids[start:]) for ids, start in encoded])
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        tracer = TRAKer(
            model,
            MeanLoss(),
            train_set_size=len(rows),
            save_dir=folder,
            device=device,
            gradient_computer=AdapterGradients,
            projector=BasicProjector(size, dims, 0, ProjectionType.rademacher, device),
            proj_dim=dims,
            use_half_precision=False,
            logging_level=40,
        )
        tracer.load_checkpoint(model.state_dict(), model_id=0)
        before = time.process_time()
        for start in range(0, len(rows), 64):
            part = slice(start, start + 64)
            tracer.featurize(batch=[ids[part], labels[part]], num_samples=len(ids[part]))
        return len(rows) / (time.process_time() - before)


# ── what is measured on ──────────────────────────────────────────────────────────────────────────────────────────────


def make_base(folder: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<end>", "<unknown>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(WORDS - 2))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unknown>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def make_rows(count: int, tokens: int) -> list[Row]:
    """Rows whose words come from one of 16 vocabularies, the common words of each many times more often."""
    rng = np.random.default_rng(0)
    vocabularies = [rng.permutation(WORDS - 2)[:100] for _ in range(KINDS)]
    odds = 1 / np.arange(1, 101)
    rows = []
    for number in range(count):
        # The form adds `User:`, `Assistant:` and the end of the answer.
        drawn = rng.choice(vocabularies[number % KINDS], tokens - 3, p=odds / odds.sum())
        texts = [f"w{word}" for word in drawn]
        cut = tokens // 3
        rows.append(Row(f"r{number}", (Message("user", " ".join(texts[:cut])),), " ".join(texts[cut:])))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
