"""A batch of mixed experts gives each row what it would get alone (invariants P9 and P13)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.experts.engines._lora_layers import applied
from xpert.experts.engines._lora_plan import CostModel, Planner, RowMixture, row_order
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest

PROMPTS = [
    "Add the two numbers.",
    "Write the word in capitals. dog (case 3 fala)",
    "x",
    "Which country is the city in?\n\nParis and Rome and Oslo and Cairo, all of them one after another please",
    "Spell the word backwards.",
]
SLICED, MASKED = CostModel(launch=0.0, flop=1.0), CostModel(launch=1e9, flop=0.0)


def test_greedy_replies_equal_plain_peft_prompt_by_prompt(
    engine: TorchEngine, ask: Callable[..., EngineRequest], plain_reply: Callable[..., tuple[int, ...]]
) -> None:
    keys = [None, "a", "b", "c", "d"]
    cases = [(key, prompt) for prompt in PROMPTS for key in keys]
    random.Random(0).shuffle(cases)
    requests = [
        ask(f"{index}", prompt, ((key, 1.0),) if key else (), max_tokens=5 + index % 9)
        for index, (key, prompt) in enumerate(cases)
    ]
    made: dict[str, list[Any]] = {}
    for piece in engine.generate(requests):
        made.setdefault(piece.request_id, []).append(piece)
    for request, (key, _) in zip(requests, cases, strict=True):
        expected = plain_reply(key, request.prompt_ids, request.sampling.max_tokens)
        ended = expected[-1] in engine.lm.stop_ids
        text = engine.lm.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pieces = made[request.id]
        assert "".join(piece.text for piece in pieces) == text.rstrip("\ufffd")
        assert [piece.finished for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finished == ("stop" if ended else "length")
        assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (len(request.prompt_ids), len(expected))


@pytest.mark.parametrize("costs", [SLICED, MASKED], ids=["sliced", "masked"])
def test_logits_equal_plain_peft(
    engine: TorchEngine,
    plain: Callable[..., Any],
    ask: Callable[..., EngineRequest],
    mixture_of: Callable[..., RowMixture],
    costs: CostModel,
) -> None:
    import torch

    engine._passes.planner = Planner(costs)
    keys = [None, "a", "a", "b", "c", "d"]
    requests = [ask(str(i), PROMPTS[i % 5], ((key, 1.0),) if key else ()) for i, key in enumerate(keys)]
    experts = [mixture_of(engine, request.experts) for request in requests]
    logits, _ = engine._passes.prefill([request.prompt_ids for request in requests], experts)
    for row, (key, request) in enumerate(zip(keys, requests, strict=True)):
        expected = plain(key)(torch.tensor([request.prompt_ids])).logits[0, -1]
        assert (logits[row] - expected).abs().max() < 1e-4


def exact_sum(model: Any, experts: Any) -> list[tuple[Any, Any]]:
    """Adds sum_e w_e B_e A_e to the weights, in float64; returns what to put back."""
    import torch

    kept = []
    for adapter, weight in experts.experts:
        for name, part in adapter.modules.items():
            layer = model.get_submodule(name)
            kept.append((layer, layer.weight.data.clone()))
            layer.weight.data = (layer.weight.double() + weight * (part.b.double() @ part.a.double())).to(torch.float32)
    return kept


@given(
    st.lists(st.dictionaries(st.sampled_from("abcd"), st.floats(-1.5, 1.5), max_size=4), min_size=1, max_size=5),
    st.sampled_from([SLICED, MASKED, CostModel(1.0, 1e-4)]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weighted_sums_equal_the_merged_weights(
    engine: TorchEngine,
    lm: LanguageModel,
    mixture_of: Callable[..., RowMixture],
    sets: list[dict[str, float]],
    costs: CostModel,
) -> None:
    """Rank concatenation (I6): any sets, any weights, any partition of the rows."""
    import torch

    rows = sorted((mixture_of(engine, tuple(weights.items())) for weights in sets), key=row_order)
    prompts = [lm.tokenizer(PROMPTS[index])["input_ids"] for index in range(len(rows))]
    engine._passes.planner = Planner(costs)
    logits, _ = engine._passes.prefill(prompts, rows)
    for row, (prompt, experts) in enumerate(zip(prompts, rows, strict=True)):
        kept = exact_sum(lm.model, experts)
        try:
            with torch.inference_mode():
                expected = lm.model(torch.tensor([prompt])).logits[0, -1]
        finally:
            for layer, weight in reversed(kept):
                layer.weight.data = weight
        # Of the logits' own size: four experts of weight 1.5 make some of 5, and rounding grows with them.
        assert (logits[row] - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def test_one_layer_is_exact_to_1e_5(
    engine: TorchEngine, lm: LanguageModel, mixture_of: Callable[..., RowMixture]
) -> None:
    import torch

    name = "model.layers.0.self_attn.q_proj"
    rows = [mixture_of(engine, e) for e in ((), (("a", 0.25), ("b", 0.75)), (("a", 0.5), ("c", 2.0)))]
    x = torch.randn(3, 7, 64)
    layer = lm.model.get_submodule(name)
    with applied(lm.model, engine._passes.planner.make_plan(rows, 7)), torch.inference_mode():
        found = layer(x)
    for row, experts in enumerate(rows):
        expected = x[row] @ layer.weight.T
        for adapter, weight in experts.experts:
            expected = expected + weight * (x[row] @ adapter.modules[name].a.T @ adapter.modules[name].b.T)
        assert torch.allclose(found[row], expected, atol=1e-5, rtol=1e-5)


def test_no_experts_and_weight_zero_are_the_base(
    ask: Callable[..., EngineRequest], replies: Callable[..., dict[str, str]]
) -> None:
    made = replies(
        [ask("none", PROMPTS[0]), ask("zero", PROMPTS[0], (("a", 0.0),)), ask("a", PROMPTS[0], (("a", 1.0),))]
    )
    assert made["none"] == made["zero"] != made["a"]


def test_a_repeated_key_adds_up(ask: Callable[..., EngineRequest], replies: Callable[..., dict[str, str]]) -> None:
    made = replies(
        [
            ask("twice", PROMPTS[1], (("a", 0.5), ("b", 0.5), ("a", 0.25))),
            ask("once", PROMPTS[1], (("b", 0.5), ("a", 0.75))),
        ]
    )
    assert made["twice"] == made["once"]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 16])
def test_batch_size_makes_no_difference(
    lm: LanguageModel,
    folders: dict[str, Any],
    ask: Callable[..., EngineRequest],
    replies: Callable[..., dict[str, str]],
    max_batch: int,
) -> None:
    """Mixed sets, greedy and seeded sampling, continuous joins: against one engine that answers one at a time."""
    sets: list[Any] = [(), (("a", 1.0),), (("a", 0.3), ("b", 0.7)), (("c", 1.0), ("d", -0.5)), (("d", 1.0),)]
    requests = [
        ask(
            str(i),
            PROMPTS[i % 5],
            sets[i % 4],
            max_tokens=2 + (7 * i) % 11,
            temperature=(i % 3) * 0.7,
            seed=i,
            top_p=0.9,
        )
        for i in range(14)
    ]
    engine = TorchEngine(lm, max_batch=max_batch)
    alone = TorchEngine(lm, max_batch=1)
    for key, folder in folders.items():
        engine.add_expert(key, folder)
        alone.add_expert(key, folder)
    together = replies(requests, engine)
    for request in requests:
        assert together[request.id] == replies([request], alone)[request.id]


def test_the_requests_own_seed_alone_decides(
    ask: Callable[..., EngineRequest], replies: Callable[..., dict[str, str]]
) -> None:
    hot = ask("hot", PROMPTS[0], (("a", 1.0),), temperature=1.5, seed=7)
    first = replies([hot])["hot"]
    crowd = [ask(str(i), PROMPTS[i % 5], (("b", 1.0),), temperature=1.0, seed=i) for i in range(6)]
    assert replies([*crowd[:3], hot, *crowd[3:]])["hot"] == first
    other = replace(hot, sampling=replace(hot.sampling, seed=8))
    assert replies([other])["hot"] != first


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_stays_near(
    tiny_base: Any,
    folders: dict[str, Any],
    lm: LanguageModel,
    mixture_of: Callable[..., RowMixture],
    attention: str,
) -> None:
    """bf16 keeps 8 bits: logits within 3 % of their range of the float32 engine's, on this two-layer model."""
    import torch

    from xpert.language_model import load_model

    half = load_model(str(tiny_base), device="cpu", dtype="bfloat16")
    half.model.set_attn_implementation(attention)
    logits = []
    for model in (lm, half):
        engine = TorchEngine(model)
        for key in "ab":
            engine.add_expert(key, folders[key])
        rows = [mixture_of(engine, e) for e in ((), (("a", 1.0),), (("a", 0.5), ("b", 0.5)))]
        prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
        logits.append(engine._passes.prefill(prompts, rows)[0])
    assert logits[1].dtype == torch.bfloat16
    assert (logits[0] - logits[1].float()).abs().max() < 0.03 * (logits[0].max() - logits[0].min())
