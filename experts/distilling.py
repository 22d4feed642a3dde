"""Distilling: one LoRA student learns, token by token, what a weighted or routed set of experts would say.

Loss on the answers' tokens: T^2 KL(teacher || student) at temperature T, plus `ce` times the cross-entropy of the
answer. The teacher is the engine's weighted set of each row, computed anew in each pass and never stored. After
Meta-DMoE (arXiv:2210.03885), which distils a mixture of domain experts into one student.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xpert.chat_form import encode_examples
from xpert.errors import BadInput
from xpert.experts.adapters import Adapter, LowRank, read_adapter
from xpert.experts.distil_options import DistilOptions
from xpert.experts.engines._lora_layers import applied
from xpert.experts.engines._lora_plan import COSTS, GateEntry, Planner, RowMixture, row_order
from xpert.experts.merge_folder import adapter_config, write_merged_expert
from xpert.experts.merge_sources import MergeSources
from xpert.experts.merging import MergeResult, measure, merge
from xpert.experts.mixture import Mixture
from xpert.experts.routing import MixtureRouter, route_request
from xpert.experts.serving import gate_cosines, open_gate
from xpert.experts.train import quiet_warnings
from xpert.language_model import LanguageModel, load_model
from xpert.progress import SILENT, Progress
from xpert.protocols import Merged
from xpert.records import Row
from xpert.storage import check_output, draft_folder

__all__ = ["DistilOptions", "distil"]


@dataclass(frozen=True)
class _Lesson:
    """One row: its tokens, where its answer begins, and who teaches it."""

    ids: tuple[int, ...]
    start: int
    teachers: RowMixture


def distil(
    sources: MergeSources,
    rows: Sequence[Row],
    out: Path,
    options: DistilOptions | None = None,
    *,
    base: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> MergeResult:
    """Trains the student and writes it as an expert folder; its log tells the KL to the teacher before and after.

    A mixture teaches each row with the experts its router gives it (none: the base model), behind its gate if it has
    one; experts named one by one teach all rows with their weights. The error against the weighted sum is that of the
    mean weights. Raises BadInput for rows without an answer within max_length, for a loss that is no number, and for a
    mixture with an aggregator.
    """
    options = options or DistilOptions()
    check_output(out)
    if sources.mixture is not None and sources.mixture.aggregator is not None:
        raise BadInput(
            f"aggregator {sources.mixture.aggregator.name} makes replies of replies, and has no probabilities to teach",
            hint="distil the mixture without it, or train on what `xpert run` answers",
        )
    lm = load_model(base or sources.base.ref, device=device, progress=progress)
    if lm.fingerprint != sources.base.fingerprint:
        raise BadInput("this base model is not the one the experts were trained on", where=lm.ref)
    begin = time.process_time()
    lessons = _lessons(lm, sources, rows, options, seed=seed, device=device)
    mean = _mean_weights(sources, [lesson.teachers for lesson in lessons])
    task = sources.task(rank=options.rank, seed=seed)
    keep = max(1, round(options.hold_out * len(lessons))) if options.hold_out and len(lessons) > 1 else 0
    order = torch.randperm(len(lessons), generator=torch.Generator().manual_seed(seed)).tolist()
    measured, learned = [lessons[i] for i in order[:keep]], [lessons[i] for i in order[keep:]]
    (start,) = merge(dataclasses.replace(task, weights=mean), "svd")
    student = _Student(lm, start.merged, options, seed)
    watched = measured or learned
    before = student.divergence(watched)
    steps = _teach(student, learned, options, seed, progress)
    # Seen by the student in training, without padding; measuring is not training.
    tokens = options.epochs * sum(len(lesson.ids) for lesson in learned)
    log = {
        "measured_on": "held-out rows" if measured else "the rows themselves",
        "measured_rows": len(watched),
        "kl_before": before,
        "kl": student.divergence(watched),
        "steps": steps,
        "tokens": tokens,
    }
    merged = Merged(tuple(range(len(task.keys))), mean, student.updates(), log)
    error = measure(merged, task.experts)
    result = MergeResult("distil", options.to_dict(), task.keys, merged, error, time.process_time() - begin)
    with draft_folder(out) as draft:
        write_merged_expert(draft, result, sources, name=out.name, rows=rows, seed=seed, progress=progress)
    return result


def _lessons(
    lm: LanguageModel, sources: MergeSources, rows: Sequence[Row], options: DistilOptions, *, seed: int, device: str
) -> list[_Lesson]:
    adapters = {expert.key: read_adapter(expert.key, expert.folder, lm) for expert in sources.experts}
    if sources.mixture is not None:
        teachers = _routed(lm, sources.mixture, adapters, rows, seed=seed, device=device)
    else:
        teachers = [RowMixture(_held(adapters, zip(sources.keys, sources.weights, strict=True)))] * len(rows)
    encoded = encode_examples(lm.tokenizer, rows, options.max_length)
    lessons = [
        _Lesson(tuple(ids), start, own) for (ids, start), own in zip(encoded, teachers, strict=True) if start < len(ids)
    ]
    if not lessons:
        raise BadInput("no row has an answer within max-length", hint="raise --max-length, or give other rows")
    return lessons


def _routed(
    lm: LanguageModel, mixture: Mixture, adapters: dict[str, Adapter], rows: Sequence[Row], *, seed: int, device: str
) -> list[RowMixture]:
    """Each row's experts as the mixture serves them, behind its gate if it has one."""
    requests = [route_request(row) for row in rows]
    routes = MixtureRouter(mixture, seed=seed, device=device).route(requests)
    if mixture.gate is None:
        return [RowMixture(_held(adapters, route.experts)) for route in routes]
    entry = GateEntry(mixture.gate.name, 1, open_gate(mixture.gate, lm.device))
    strength = {expert.key: expert.weight for expert in mixture.experts}
    cosines = gate_cosines(mixture, device=device, seed=seed)
    biases = cosines.gate_bias([request.prompt for request in requests]) if cosines else [()] * len(requests)
    teachers = []
    for route, bias in zip(routes, biases, strict=True):
        held = _held(adapters, ((key, strength[key]) for key, _ in route.experts))
        known = dict(bias)
        biased = tuple(known[adapter.key] for adapter, _ in held) if known else ()
        teachers.append(RowMixture(held, entry if held else None, biased))
    return teachers


def _held(adapters: dict[str, Adapter], experts: Any) -> tuple[tuple[Adapter, float], ...]:
    return tuple((adapters[key], weight) for key, weight in sorted(experts) if weight)


def _mean_weights(sources: MergeSources, teachers: Sequence[RowMixture]) -> tuple[float, ...]:
    """What each expert weighs on average; behind a gate, as if it weighed a row's experts alike."""
    total = dict.fromkeys(sources.keys, 0.0)
    for row in teachers:
        share = len(row.experts) if row.gate else 1
        for adapter, weight in row.experts:
            total[adapter.key] += weight / share / len(teachers)
    if not any(total.values()):
        raise BadInput("the mixture leaves every row to the base model", hint="give rows of the experts' tasks")
    return tuple(total.values())


class _Student:
    """A peft adapter on the base, and the teachers on the same base with that adapter switched off."""

    def __init__(self, lm: LanguageModel, start: Merged, options: DistilOptions, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.options = options
        self.base, self.device = lm.model, lm.device
        self.planner = Planner(COSTS.get(self.device.type, COSTS["cuda"]))
        config = adapter_config({name: update.rank for name, update in start.modules.items()}, {})
        torch.manual_seed(seed)
        with quiet_warnings():
            self.model = get_peft_model(lm.model, LoraConfig(**{**config, "inference_mode": False}))
        self.layers = {name: lm.model.get_submodule(name) for name in start.modules}
        for name, layer in self.layers.items():
            if options.start == "merged":
                layer.lora_A["default"].weight.data.copy_(start.modules[name].a)
                layer.lora_B["default"].weight.data.copy_(start.modules[name].b)
        self.model.eval()

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def updates(self) -> dict[str, LowRank]:
        return {
            name: LowRank(
                layer.lora_A["default"].weight.detach().float().clone(),
                layer.lora_B["default"].weight.detach().float().clone() * layer.scaling["default"],
            )
            for name, layer in self.layers.items()
        }

    def loss(self, batch: Sequence[_Lesson]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(summed KL at the temperature in nats, summed cross-entropy, answer tokens)."""
        batch = sorted(batch, key=lambda lesson: row_order(lesson.teachers))
        width = max(len(lesson.ids) for lesson in batch)
        pads = [[0] * (width - len(lesson.ids)) for lesson in batch]
        ids = torch.tensor([[*lesson.ids, *pad] for lesson, pad in zip(batch, pads, strict=True)], device=self.device)
        place = torch.arange(width, device=self.device)[None]
        ends = torch.tensor([len(lesson.ids) for lesson in batch], device=self.device)[:, None]
        starts = torch.tensor([lesson.start for lesson in batch], device=self.device)[:, None]
        answers = ((place >= starts) & (place < ends))[:, 1:]
        mask = (place < ends).long()
        plan = self.planner.make_plan([lesson.teachers for lesson in batch], width)
        with torch.no_grad(), self.model.disable_adapter(), applied(self.base, plan):
            teacher = self.base(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][answers].float()
        own = self.base(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][answers].float()
        soft, wanted = (own / self.options.temperature).log_softmax(-1), teacher / self.options.temperature
        wanted = wanted.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - soft)).sum()
        entropy = torch.nn.functional.cross_entropy(own, ids[:, 1:][answers], reduction="sum")
        return divergence, entropy, int(answers.sum())

    @torch.no_grad()
    def divergence(self, lessons: Sequence[_Lesson]) -> float:
        """Mean KL(teacher || student) per answer token at the temperature, in nats."""
        total, tokens = 0.0, 0
        for batch in _batches(lessons, self.options.batch_size):
            found, _, count = self.loss(batch)
            total, tokens = total + float(found), tokens + count
        return total / tokens


def _teach(student: _Student, lessons: Sequence[_Lesson], options: DistilOptions, seed: int, progress: Progress) -> int:
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    chance = torch.Generator().manual_seed(seed + 1)
    steps = 0
    with progress.task("distilling", options.epochs * -(-len(lessons) // options.batch_size)) as task:
        for _ in range(options.epochs):
            order = torch.randperm(len(lessons), generator=chance).tolist()
            for batch in _batches([lessons[index] for index in order], options.batch_size):
                divergence, entropy, tokens = student.loss(batch)
                loss = (options.temperature**2 * divergence + options.ce * entropy) / tokens
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise BadInput(f"the loss is {value} at step {steps + 1}", hint="lower --learning-rate")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
                optimizer.step()
                steps += 1
                task.advance(1, f"loss {value:.4f}")
    return steps


def _batches(lessons: Sequence[_Lesson], size: int) -> Iterator[Sequence[_Lesson]]:
    for start in range(0, len(lessons), size):
        yield lessons[start : start + size]
