"""Token gates in the engine: every token gets the weighted sum its gate says, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from xpert.config import Config
from xpert.errors import BadInput, NotFound
from xpert.experts.engines._lora_plan import CostModel, Planner, RowMixture, row_order
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest, GatedExpert, ModuleGate

Ask = Callable[..., EngineRequest]
MixtureOf = Callable[..., RowMixture]
SLICED, MASKED = CostModel(launch=0.0, flop=1.0), CostModel(launch=1e9, flop=0.0)
PROMPTS = ["Add the two numbers.", "x", "Which country is the city in? Paris", "Spell the word backwards."]


class Opening:
    """Weights that follow each token's state and each expert's name; not normalised, so that a mix-up shows."""

    Options: ClassVar[type[Config]] = Config
    learned: ClassVar[str] = "none"
    grain: ClassVar[str] = "expert"
    cost: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __init__(self, block: bool = False) -> None:
        self.block = block

    def site(self, module: str) -> str:
        head, _, last = module.rpartition(".")
        return f"{head}.gate_proj" if self.block and last in ("up_proj", "down_proj") else module

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        shift = torch.tensor([float(ord(expert.key[0]) - ord("a")) for expert in experts])

        def gate(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            logits = hidden[..., :1].float() * 3 - shift + (0 if bias is None else bias)
            return logits.sigmoid() * allowed

        return gate


class RankOpening(Opening):
    grain: ClassVar[str] = "rank"

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        ranks = [expert.modules[module].rank if module in expert.modules else 0 for expert in experts]
        owners = torch.arange(len(experts)).repeat_interleave(torch.tensor(ranks))
        numbers = torch.cat([torch.arange(rank) for rank in ranks]).float()

        def gate(hidden: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return (hidden[..., :1].float() - numbers).sigmoid() * allowed[..., owners]

        return gate


@contextmanager
def plainly(
    model: Any, gate: Opening, row: RowMixture, bias: dict[str, float] | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """One request by hooks on every linear layer, expert after expert and without concatenation."""
    seen: dict[str, torch.Tensor] = {}
    hooks: list[Any] = []
    modules = dict.fromkeys(name for adapter, _ in row.experts for name in adapter.modules)

    def hook(name: str) -> Callable[..., Any]:
        def add(module: Any, given: Any, y: torch.Tensor) -> torch.Tensor:
            seen[name] = x = given[0]
            decides = seen[gate.site(name)]
            for adapter, strength in row.experts:
                part = adapter.modules.get(name)
                if part is None:
                    continue
                shift = torch.tensor([[[(bias or {}).get(adapter.key, 0.0)]]])
                weights = gate.at(gate.site(name), [adapter])(decides, torch.ones(1, 1, 1, dtype=torch.bool), shift)
                y = y + strength * ((x @ part.a.T * weights) @ part.b.T)
            return y

        return add

    try:
        sites = dict.fromkeys((*modules, *(gate.site(name) for name in modules)))
        hooks.extend(model.get_submodule(name).register_forward_hook(hook(name)) for name in sites)
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


GATES = {"own site": Opening(), "one site a block": Opening(block=True), "ranks": RankOpening()}


@pytest.mark.parametrize("costs", [SLICED, MASKED], ids=["sliced", "masked"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_gated_rows_equal_a_plain_loop_over_experts(
    engine: TorchEngine, lm: LanguageModel, mixture_of: MixtureOf, gate: Opening, costs: CostModel
) -> None:
    """Mixed with ungated rows, with unequal expert sets and strengths, modules and ranks."""
    engine.add_gate("g", gate)
    sets: list[tuple[Any, str | None]] = [
        ((("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)), "g"),
        ((("a", 0.5), ("c", 2.0)), "g"),
        ((("b", 1.0),), "g"),
        ((("a", 0.5), ("c", 2.0)), None),
        ((), None),
        ((("c", 1.0),), "g"),
    ]
    rows = sorted((mixture_of(engine, experts, named) for experts, named in sets), key=row_order)
    prompts = [lm.tokenizer(PROMPTS[i % 4])["input_ids"] for i in range(len(rows))]
    engine._passes.planner = Planner(costs)
    logits, _ = engine._passes.prefill(prompts, rows)
    for found, prompt, row in zip(logits, prompts, rows, strict=True):
        with torch.inference_mode(), plainly(lm.model, gate if row.gate else Always(), row):
            expected = lm.model(torch.tensor([prompt])).logits[0, -1]
        assert (found - expected).abs().max() < 1e-4


class Always(Opening):
    """Weight 1: what a row without a gate gets."""

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        return lambda hidden, allowed, bias: allowed.float().expand(-1, hidden.shape[1], -1)


def test_a_decider_that_no_expert_adapts(
    engine: TorchEngine, lm: LanguageModel, make_adapter: Callable[..., Path], mixture_of: MixtureOf
) -> None:
    """The block's gate decides at a layer that the expert leaves alone."""
    engine.add_expert("e", make_adapter(seed=3, r=4, target_modules=["down_proj"]))
    gate = Opening(block=True)
    engine.add_gate("g", gate)
    row = mixture_of(engine, (("e", 1.0),), "g")
    prompt = lm.tokenizer(PROMPTS[0])["input_ids"]
    logits, _ = engine._passes.prefill([prompt], [row])
    with torch.inference_mode(), plainly(lm.model, gate, row):
        expected = lm.model(torch.tensor([prompt])).logits[0, -1]
    assert (logits[0] - expected).abs().max() < 1e-4


def test_a_bias_is_the_requests_own(engine: TorchEngine, lm: LanguageModel) -> None:
    gate = Opening()
    engine.add_gate("g", gate)
    experts = (("a", 1.0), ("b", 1.0))
    given: list[dict[str, float]] = [{"a": 2.0, "b": -3.0}, {}, {"b": 4.0}]
    asked = [engine._asked(experts, "g", tuple(bias.items()), where="test") for bias in given]
    lease = engine._bank.wait(asked[0].handles)
    assert lease is not None
    rows = [one.with_adapters(lease, asked[0].handles) for one in asked]
    prompt = lm.tokenizer(PROMPTS[0])["input_ids"]
    logits, _ = engine._passes.prefill([prompt] * 3, rows)
    for found, row, bias in zip(logits, rows, given, strict=True):
        with torch.inference_mode(), plainly(lm.model, gate, row, bias):
            expected = lm.model(torch.tensor([prompt])).logits[0, -1]
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_batch_composition_makes_no_difference(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, replies: Callable[..., dict[str, str]], max_batch: int
) -> None:
    requests = []
    for i in range(9):
        experts = ((("a", 1.0), ("b", 1.0)), (("a", 1.0), ("d", 0.5)), (("c", 1.0),))[i % 3]
        request = ask(str(i), PROMPTS[i % 4], experts, max_tokens=3 + i % 5, temperature=(i % 2) * 0.8, seed=i)
        requests.append(EngineRequest(**{**vars(request), "gate": "g" if i % 4 else None}))
    engine, alone = TorchEngine(lm, max_batch=max_batch), TorchEngine(lm, max_batch=1)
    for one in (engine, alone):
        one.add_gate("g", Opening())
        for key, folder in folders.items():
            one.add_expert(key, folder)
    together = replies(requests, engine)
    for request in requests:
        assert together[request.id] == replies([request], alone)[request.id]


class Needy(Opening):
    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        for expert in experts:
            if expert.key == "b":
                raise BadInput("expert 'b' has no vectors", hint="make them")
        return super().at(module, experts)


def test_an_expert_that_a_gate_cannot_use_fails_its_request_alone(engine: TorchEngine, ask: Ask) -> None:
    engine.add_gate("g", Needy())
    session = engine.session()
    for key in "abc":
        session.submit(EngineRequest(**{**vars(ask(key, "Add", ((key, 1.0),), max_tokens=3)), "gate": "g"}))
    ended = set()
    while not session.idle:
        ended |= {piece.request_id for piece in session.step() if piece.finished}
    assert ended == {"a", "c"}
    ((failed, error),) = session.failures()
    assert failed == "b" and "expert 'b' has no vectors" in str(error)


def test_an_exchanged_gate_is_for_the_requests_to_come(
    engine: TorchEngine, ask: Ask, replies: Callable[..., dict[str, str]]
) -> None:
    engine.add_gate("g", Opening())
    request = EngineRequest(**{**vars(ask("r", "Add the two", (("a", 3.0), ("b", 3.0)), max_tokens=12)), "gate": "g"})
    before = replies([request])["r"]
    session = engine.session()
    session.submit(request)
    text = "".join(piece.text for piece in session.step())
    engine.add_gate("g", Always())
    while not session.idle:
        text += "".join(piece.text for piece in session.step())
    assert text == before != replies([request])["r"]


def test_what_a_gated_request_may_not_ask(engine: TorchEngine, ask: Ask) -> None:
    engine.add_gate("arrow", Opening())

    def refused(experts: Any, **more: Any) -> Any:
        list(engine.generate([EngineRequest(**{**vars(ask("q", "Add", experts)), **more})]))

    with pytest.raises(NotFound, match=r"unknown gate 'arow'\. Did you mean 'arrow'"):
        refused((("a", 1.0),), gate="arow")
    with pytest.raises(BadInput, match=r"request q: the strength of expert 'a' is -1\.0"):
        refused((("a", -1.0),), gate="arrow")
    with pytest.raises(BadInput, match="request q: a gate bias without a gate"):
        refused((("a", 1.0),), gate_bias=(("a", 1.0),))
    with pytest.raises(NotFound, match="unknown expert 'b'"):
        refused((("a", 1.0),), gate="arrow", gate_bias=(("b", 1.0),))
    with pytest.raises(BadInput, match="the gate bias of expert 'a' is nan"):
        refused((("a", 1.0),), gate="arrow", gate_bias=(("a", float("nan")),))
