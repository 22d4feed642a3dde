"""EK-FAC influence beside kronfluence: how near it comes to the exact damped inverse, and examples per CPU second.

    python benchmarks/ekfac.py [fidelity] [speed] [--exact-rows 100] [--rows 256] [--repeats 3] [--peers FOLDER]

Fidelity: a Llama of 12 hidden numbers and 2 layers (2,880 weights in its linear layers) is trained on a small task, so
that the Gauss-Newton matrix of its mean answer loss over `--exact-rows` rows can be formed and inverted whole. The
influence of 200 other rows on each of 20 targets is ranked by each method and by the exact inverse; figures are mean
Spearman correlations. Every method measures its curvature on the same rows, all damp by a tenth of their mean
eigenvalue layer by layer, and draw labels from the model by five seeds; kronfluence is given the same losses.
Speed: a random Llama of 7.4M parameters (hidden 256, 4 layers, 8,192 words), every linear layer, `--rows` rows of
`--tokens` tokens, curvature on all of them, and the score of each against the mean gradient of 16 rows. kronfluence's
fastest fitting settings are taken: targets aggregated, 32 rows a batch. `--peers` is a folder made by
`pip install --target FOLDER --no-deps kronfluence einconv einops opt_einsum`; without it the peer is left out. One
thread; CPU seconds of this process; loading is not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from less_features import make_base, make_rows
from scipy.stats import spearmanr
from torch.nn import functional

from xpert.influence.curvature import damped_targets, group_gradients, measure_curvature
from xpert.influence.ekfac import CurvatureOptions, EkfacScores, ekfac_targets
from xpert.influence.kronecker import DAMP_SHARE, blocks_of
from xpert.language_model import LanguageModel, encode_examples, load_model, quiet_transformers
from xpert.linear_capture import linear_layers, make_batch, row_losses
from xpert.records import Message, Row

LAYERS = ("all",)
WORDS = 40
TARGETS, SCORED, SEEDS = 20, 200, 5
MANY_TARGETS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="fidelity, speed; default: both")
    parser.add_argument("--exact-rows", type=int, default=100)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peers:
        sys.path.insert(0, str(given.peers))
    with tempfile.TemporaryDirectory() as folder:
        if "fidelity" in given.parts or not given.parts:
            report_fidelity(Path(folder), given)
        if "speed" in given.parts or not given.parts:
            report_speed(Path(folder), given)


# ── fidelity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_fidelity(folder: Path, given: argparse.Namespace) -> None:
    lm = trained_model(folder / "small")
    rows = task_rows(given.exact_rows, seed=1)
    targets, scored = task_rows(TARGETS, seed=2), task_rows(SCORED, seed=3)
    layers = linear_layers(lm.model, LAYERS)
    curvature = gauss_newton(lm, rows, list(layers))
    of_targets, of_scored = whole_gradients(lm, targets, list(layers)), whole_gradients(lm, scored, list(layers))
    damp = damping(lm, curvature)
    exact = of_targets @ torch.linalg.solve(curvature + torch.diag(damp), of_scored.T)

    def agreement(scores: torch.Tensor) -> float:
        pairs = zip(exact.numpy(), scores.double().numpy(), strict=True)
        return float(np.mean([spearmanr(want, got).statistic for want, got in pairs]))

    print(f"{len(curvature):,} weights; curvature on {len(rows)} rows, {SCORED} rows scored for {TARGETS} targets\n")
    print("| influence | rank correlation with the exact damped inverse |\n|---|---|")
    print(f"| product of gradients, no curvature | {agreement(of_targets @ of_scored.T):.3f} |")
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "xpert ekfac": lambda seed: our_scores(lm, rows, targets, of_scored, "sampled", seed),
        "xpert ekfac, labels=given": lambda seed: our_scores(lm, rows, targets, of_scored, "given", seed),
    }
    if given.peers:
        ways["kronfluence ekfac"] = lambda seed: peer_scores(lm, rows, targets, scored, seed, folder)
    for name, way in ways.items():
        found = [agreement(way(seed)) for seed in range(1 if "given" in name else SEEDS)]
        spread = f" (seeds: {min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
        print(f"| {name} | {np.mean(found):.3f}{spread} |")
    blocks = block_diagonal(lm, curvature)
    exact_blocks = of_targets @ torch.linalg.solve(blocks + torch.diag(damp), of_scored.T)
    print(f"| the exact matrix without what lies between layers | {agreement(exact_blocks):.3f} |\n")


def our_scores(
    lm: LanguageModel, rows: Sequence[Row], targets: Sequence[Row], scored: torch.Tensor, labels: str, seed: int
) -> torch.Tensor:
    """[targets, scored]"""
    curvature = measure_curvature(lm, rows, layers=LAYERS, labels=labels, seed=seed)
    gradients = group_gradients(lm, targets, range(len(targets)), layers=LAYERS)
    damped = damped_targets(curvature, gradients, None, lm.device)
    blocks = blocks_of(linear_layers(lm.model, LAYERS))
    parts = {}
    for name, members in blocks.items():
        start = 0
        for member in members:
            end = start + lm.model.get_submodule(member).out_features
            parts[member] = damped[name][:, start:end].flatten(1)
            start = end
    return torch.cat([parts[name] for name in linear_layers(lm.model, LAYERS)], dim=1).double() @ scored.T


def gauss_newton(lm: LanguageModel, rows: Sequence[Row], names: Sequence[str]) -> torch.Tensor:
    """float64 [P, P]: the mean over rows of the mean over answer tokens of J^T (diag p - p p^T) J."""
    weights = {f"{name}.weight": lm.model.get_submodule(name).weight.detach() for name in names}
    size = sum(weight.numel() for weight in weights.values())
    found = torch.zeros(size, size, dtype=torch.float64)
    for example in encode_examples(lm.tokenizer, rows):
        batch = make_batch([example], lm.device)

        def logits(given: Any, batch: Any = batch) -> torch.Tensor:
            output = torch.func.functional_call(lm.model, given, (batch.input_ids,))
            return output.logits[batch.supervised]

        values, pull = torch.func.vjp(logits, weights)
        tokens, words = values.shape
        p = torch.softmax(values, dim=-1).detach()
        # root root^T = diag p - p p^T: its columns are pulled back one by one.
        root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
        columns = torch.zeros(tokens, words, tokens, words)
        for token in range(tokens):
            columns[token, :, token] = root[token].T
        pulled = torch.func.vmap(lambda column, pull=pull: pull(column)[0])(columns.view(-1, tokens, words))
        jacobian = torch.cat([pulled[name].detach().flatten(1) for name in weights], dim=1).double()
        found += jacobian.T @ jacobian / tokens
    return found / len(rows)


def whole_gradients(lm: LanguageModel, rows: Sequence[Row], names: Sequence[str]) -> torch.Tensor:
    """float64 [n, P], one backward pass a row."""
    weights = [lm.model.get_submodule(name).weight for name in names]
    found = []
    for example in encode_examples(lm.tokenizer, rows):
        loss = row_losses(lm.model, make_batch([example], lm.device)).sum()
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))
    return torch.stack(found).double()


def places(lm: LanguageModel) -> list[torch.Tensor]:
    """The indices of each block's weights."""
    layers = linear_layers(lm.model, LAYERS)
    ends = np.cumsum([layer.weight.numel() for layer in layers.values()])
    of = {
        name: torch.arange(end - layer.weight.numel(), end)
        for (name, layer), end in zip(layers.items(), ends.tolist(), strict=True)
    }
    return [torch.cat([of[member] for member in members]) for members in blocks_of(layers).values()]


def damping(lm: LanguageModel, curvature: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(len(curvature), dtype=torch.float64)
    for place in places(lm):
        found[place] = DAMP_SHARE * curvature.diagonal()[place].mean()
    return found


def block_diagonal(lm: LanguageModel, curvature: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(curvature)
    for place in places(lm):
        found[place[:, None], place] = curvature[place[:, None], place]
    return found


def task_rows(count: int, seed: int) -> list[Row]:
    """Count on in steps of 2, 3 or 4, as the first word says; one word in seven is a slip."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        step, first, asked, answered = (int(rng.integers(*limits)) for limits in ((2, 5), (0, 32), (2, 5), (2, 6)))
        words = [(first + step * place) % 32 for place in range(asked + answered)]
        words = [int(rng.integers(0, 32)) if rng.random() < 1 / 7 else word for word in words]
        texts = [f"w{word}" for word in words]
        prompt = " ".join([f"w{30 + step}", *texts[:asked]])
        rows.append(Row(f"{seed}-{number}", (Message("user", prompt),), " ".join(texts[asked:])))
    return rows


def trained_model(folder: Path, steps: int = 500) -> LanguageModel:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    listed = ["<end>", "<unknown>", *(f"w{number}" for number in range(WORDS - 2))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unknown>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    examples = encode_examples(tokenizer, task_rows(400, seed=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = make_batch([examples[index] for index in rng.integers(0, len(examples), 32)], torch.device("cpu"))
        row_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    lm = load_model(str(folder), device="cpu")
    lm.model.set_attn_implementation("eager")  # what vmap can batch
    return lm


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_speed(folder: Path, given: argparse.Namespace) -> None:
    base = make_base(folder / "base")
    rows = make_rows(given.rows + MANY_TARGETS, given.tokens)
    rows, targets = rows[: given.rows], rows[given.rows :]
    ours = [our_seconds(base, rows, targets, folder / f"run-{number}") for number in range(given.repeats)]
    lines = {"xpert, float32": tuple(np.median([run[part] for run in ours]) for part in range(2))}
    if given.peers:
        lines["kronfluence, float32"] = peer_seconds(base, rows, targets, folder)
    best = sum(lines["xpert, float32"])
    print(f"{len(rows)} rows of {given.tokens} tokens, scored against the mean gradient of {MANY_TARGETS}\n")
    print("| what | curvature: rows per CPU second | scores: rows per CPU second | both, CPU seconds | times |")
    print("|---|---|---|---|---|")
    for name, (fit, score) in lines.items():
        rates = f"{len(rows) / fit:.1f} | {len(rows) / score:.1f}"
        print(f"| {name} | {rates} | {fit + score:.1f} | {(fit + score) / best:.1f} |")


def our_seconds(base: str, rows: list[Row], targets: list[Row], folder: Path) -> tuple[float, float]:
    """CPU seconds of the curvature with the targets, and of the scores."""
    groups = (0,) * len(targets)
    before = time.process_time()
    stored = ekfac_targets(base, rows, targets, groups, CurvatureOptions(layers=LAYERS), folder, device="cpu")
    fitted = time.process_time()
    worker = EkfacScores(base, stored).open("cpu")
    opened = time.process_time()
    for start in range(0, len(rows), EkfacScores.shard_rows):
        worker(rows[start : start + EkfacScores.shard_rows])
    return fitted - before, time.process_time() - opened


# ── kronfluence ──────────────────────────────────────────────────────────────────────────────────────────────────────


def peer_task(names: Sequence[str]) -> Any:
    """The mean answer loss of each row, summed over the batch; with drawn labels scaled as xpert scales it."""
    from kronfluence.task import Task

    class AnswerLoss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            ids, mask, labels = batch
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            labels, wanted = labels[:, 1:], labels[:, 1:] >= 0
            flat = logits[wanted]
            answers = labels[wanted]
            counts = wanted.sum(1, keepdim=True).expand_as(wanted)[wanted].float()
            if sample:
                with torch.no_grad():
                    answers = torch.multinomial(torch.softmax(flat.detach(), dim=-1), 1).flatten()
                counts = counts.sqrt()
            return (functional.cross_entropy(flat, answers, reduction="none") / counts).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names)

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch[1]

    return AnswerLoss()


def peer_data(tokenizer: Any, rows: Sequence[Row]) -> Any:
    batch = make_batch(encode_examples(tokenizer, rows), torch.device("cpu"))
    return torch.utils.data.TensorDataset(batch.input_ids, batch.attention_mask, batch.labels)


def peer_analyzer(lm: LanguageModel, folder: Path) -> Any:
    from kronfluence.analyzer import Analyzer, prepare_model

    task = peer_task(list(linear_layers(lm.model, LAYERS)))
    model = prepare_model(lm.model, task)
    return Analyzer("peer", model, task, cpu=True, output_dir=str(folder / "peer"), disable_tqdm=True)


def peer_scores(
    lm: LanguageModel, rows: Sequence[Row], targets: Sequence[Row], scored: Sequence[Row], seed: int, folder: Path
) -> torch.Tensor:
    """[targets, scored] by kronfluence on a copy of the model."""
    own = load_model(lm.ref, device="cpu")
    analyzer = peer_analyzer(own, folder)
    torch.manual_seed(seed)
    analyzer.fit_all_factors("small", peer_data(own.tokenizer, rows), 32, overwrite_output_dir=True)
    return peer_pairwise(analyzer, "small", peer_data(own.tokenizer, targets), peer_data(own.tokenizer, scored), False)


def peer_pairwise(analyzer: Any, factors: str, targets: Any, scored: Any, aggregated: bool) -> torch.Tensor:
    from kronfluence.arguments import ScoreArguments

    found = analyzer.compute_pairwise_scores(
        f"{factors}-scores",
        factors,
        targets,
        scored,
        per_device_query_batch_size=16,
        per_device_train_batch_size=32,
        score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=aggregated),
        overwrite_output_dir=True,
    )
    return found["all_modules"] if found else analyzer.load_pairwise_scores(f"{factors}-scores")["all_modules"]


def peer_seconds(base: str, rows: list[Row], targets: list[Row], folder: Path) -> tuple[float, float]:
    lm = load_model(base, device="cpu")
    analyzer = peer_analyzer(lm, folder)
    data, queries = peer_data(lm.tokenizer, rows), peer_data(lm.tokenizer, targets)
    before = time.process_time()
    analyzer.fit_all_factors("large", data, per_device_batch_size=32)
    fitted = time.process_time()
    peer_pairwise(analyzer, "large", queries, data, True)
    return fitted - before, time.process_time() - fitted


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
