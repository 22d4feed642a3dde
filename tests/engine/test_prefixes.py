"""Shared prompt prefixes: computed once, for the same experts alone, and without a difference in the replies."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.experts.engines._kv_cache import RowCache
from xpert.experts.engines._prefixes import BLOCK, PrefixStore
from xpert.experts.engines.torch_lora import TorchEngine, TorchOptions
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest

Ask = Callable[..., EngineRequest]
LONG = "Answer as the examples do. dog -> DOG; cat -> CAT; bird -> BIRD; fish -> FISH; cow -> COW; bee -> BEE. "


def make_engine(lm: LanguageModel, folders: dict[str, Path], *, max_batch: int = 16, **options: Any) -> TorchEngine:
    engine = TorchEngine(lm, max_batch=max_batch, options=TorchOptions(**options))
    for key, folder in folders.items():
        engine.add_expert(key, folder)
        engine._bank.release(engine._bank.wait([engine._bank.resolve(key)]))
    return engine


def computed(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every pass from now on, rows times columns."""
    counts: list[int] = []
    forward = engine._passes.forward

    def counted(ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        counts.append(ids.numel())
        return forward(ids, *rest, **more)

    monkeypatch.setattr(engine._passes, "forward", counted)
    return counts


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_replies_are_those_without_a_store(
    lm: LanguageModel,
    folders: dict[str, Path],
    ask: Ask,
    replies: Callable[..., dict[str, str]],
    max_batch: int,
) -> None:
    """Prompts of one beginning and unlike ends and lengths, several expert sets, long prompts and short ones."""
    r = random.Random(max_batch)
    sets: list[Any] = [(), (("a", 1.0),), (("a", 0.5), ("b", 0.5)), (("a", 0.25), ("b", 0.75))]
    requests = [
        ask(str(i), r.choice([LONG, LONG[:60], ""]) + "word " * r.randint(1, 12), sets[i % 4], max_tokens=4)
        for i in range(24)
    ]
    keeping, plain = make_engine(lm, folders, max_batch=max_batch), make_engine(lm, folders, prefix_bytes=0)
    found = replies(requests, keeping)
    assert found == replies(requests, plain)
    assert keeping.counters["prefix_hits"] > 0 and plain.counters["prefix_hits"] == 0
    assert keeping.counters["prefix_bytes"] > 0 and plain.counters["prefix_bytes"] == 0


def test_logits_after_a_kept_prefix(lm: LanguageModel, folders: dict[str, Path], mixture_of: Any) -> None:
    """Heads of unlike lengths, none for one row; every row computes equally many tokens."""
    engine = make_engine(lm, folders)
    texts = [LONG + "horse", LONG + "a mouse and a louse in the house", "short", LONG[:70]]
    prompts = [lm.tokenizer(text)["input_ids"] for text in texts]
    rows = [mixture_of(engine, (("a", 1.0),))] * 4
    expected, whole = engine._passes.prefill(prompts, rows)
    heads: list[RowCache | None] = []
    for row, (prompt, count) in enumerate(zip(prompts, (30, len(prompts[1]) - 1, 0, 9), strict=True)):
        start = whole.width - len(prompt)
        heads.append(whole.part(row, start, start + count) if count else None)
    found, cache = engine._passes.prefill(prompts, rows, heads)
    assert (found - expected).abs().max() < 1e-4
    for row, prompt in enumerate(prompts):
        for layer, other in zip(cache.grown, whole.grown, strict=True):
            for side, same in zip(layer.filled(), other.filled(), strict=True):
                assert (side[row, :, -len(prompt) :] - same[row, :, -len(prompt) :]).abs().max() < 1e-4


def test_a_burst_computes_its_common_beginning_once(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(lm, folders, max_batch=16)
    requests = [ask(str(i), LONG + f"n{i}", (("a", 1.0),), max_tokens=1) for i in range(16)]
    lengths = [len(request.prompt_ids) for request in requests]
    counts = computed(engine, monkeypatch)
    list(engine.generate(requests))
    shared = min(lengths) // BLOCK * BLOCK
    assert len(counts) == 2
    assert shared - BLOCK <= counts[0] <= shared  # once, in one row
    assert counts[1] == 16 * (max(lengths) - counts[0])
    assert engine.counters["prefix_hits"] == 16
    assert engine.counters["prefix_tokens"] == sum(length - (max(lengths) - counts[0]) for length in lengths)


def test_a_prefix_seen_again_later_is_kept(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(lm, folders)
    counts = computed(engine, monkeypatch)
    for turn in range(4):
        list(engine.generate([ask(str(turn), LONG + f"n{turn}", (("a", 1.0),), max_tokens=1)]))
    assert counts[0] == counts[1] and counts[2] == counts[3] < counts[1] / 2


def test_an_exchanged_expert_meets_none_of_the_old_ones_prefixes(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, replies: Callable[..., dict[str, str]]
) -> None:
    """Keyed by the experts' content: the same name, weights and gate do not suffice (vLLM #42125)."""
    engine = make_engine(lm, folders)
    request = ask("r", LONG, (("a", 1.0),))
    for _ in range(3):
        replies([request], engine)
    hits = engine.counters["prefix_hits"]
    assert hits > 0
    engine.add_expert("a", folders["b"])
    found = replies([request], engine)
    assert engine.counters["prefix_hits"] == hits
    assert found == replies([dataclasses.replace(request, experts=(("b", 1.0),))], make_engine(lm, folders))


def test_other_weights_share_nothing(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    engine = make_engine(lm, folders)
    for number in range(6):
        list(engine.generate([ask(str(number), LONG, (("a", 1.0 + number),), max_tokens=1)]))
    assert engine.counters["prefix_hits"] == 0 and engine.counters["prefix_bytes"] == 0


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────


def kept(lm: LanguageModel, tokens: int) -> RowCache:
    cache = RowCache(lm.model.config)
    for layer in cache.grown:
        layer.replace(torch.zeros(1, 2, tokens, 16), torch.zeros(1, 2, tokens, 16))
    return cache


PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=5), min_size=1, max_size=12)


@given(PROMPTS, st.integers(1, 12), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_store_finds_what_a_plain_search_finds(
    lm: LanguageModel, blocks: list[list[int]], room: int, r: random.Random
) -> None:
    """Against a list of kept (identity, tokens); within its limit, the one used longest ago leaves first."""
    block_bytes = kept(lm, BLOCK).bytes
    store = PrefixStore(room * block_bytes)
    held: list[tuple[str, tuple[int, ...]]] = []  # least recently used first
    for numbers in blocks:
        prompt = (*(token for number in numbers for token in [number] * BLOCK), 9)
        identity = r.choice("xy")
        chain = store.chain(identity, prompt)
        assert len(chain) == len(numbers)
        found = store.find(identity, prompt, chain)
        best = max((len(_common(tokens, prompt)) for name, tokens in held if name == identity), default=0)
        assert (found.width if found else 0) == best // BLOCK * BLOCK
        if numbers:
            store.put(identity, prompt, chain, kept(lm, len(prompt) - 1))
        held = [(entry.identity, entry.tokens) for entry in store._entries.values()]  # type: ignore[misc]
        assert store.bytes == sum(len(tokens) for _, tokens in held) // BLOCK * block_bytes <= store.limit
        if numbers and len(numbers) <= room:
            assert held[-1][1] == prompt[:-1] or (identity, prompt[:-1]) in held


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    count = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if count is None else count]


def test_hashes_that_collide_are_no_matches(lm: LanguageModel) -> None:
    store = PrefixStore(1 << 20)
    chain = (7,)  # as if both prompts hashed to it
    store.put("x", [1] * BLOCK + [2], chain, kept(lm, BLOCK))
    assert store.find("x", [1] * BLOCK + [3], chain) is not None
    assert store.find("x", [2] * BLOCK + [3], chain) is None
    assert store.find("y", [1] * BLOCK + [3], chain) is None
