"""One request's or expert's trouble stays its own: the others in the batch are answered as if it were not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from xpert.config import Config
from xpert.errors import BadInput, Corrupt
from xpert.experts.engines import _lora_layers, torch_lora
from xpert.experts.engines._lora_plan import CostModel, Planner
from xpert.experts.engines.torch_lora import TorchEngine, TorchOptions
from xpert.language_model import LanguageModel
from xpert.protocols import Contrast, EngineRequest, GatedExpert, ModuleGate

Ask = Callable[..., EngineRequest]
Replies = Callable[..., dict[str, str]]
WEIGHTS = "adapter_model.safetensors"


def drain(session: Any) -> dict[str, str]:
    texts: dict[str, str] = {}
    while not session.idle:
        for piece in session.step():
            texts[piece.request_id] = texts.get(piece.request_id, "") + piece.text
    return texts


@pytest.mark.parametrize("weights", [(("a", 1e39),), (("a", 3e38), ("a", 3e38)), (("a", float("nan")),)])
def test_weights_beyond_the_dtype_are_refused(engine: TorchEngine, ask: Ask, weights: Any) -> None:
    session = engine.session()
    session.submit(ask("fine", "Add", (("b", 1.0),), max_tokens=3))
    with pytest.raises(BadInput, match="the weight of expert 'a' is"):
        session.submit(ask("bad", "Add", weights))
    assert set(drain(session)) == {"fine"}


def test_too_many_experts_are_refused(engine: TorchEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_lora, "MOST_EXPERTS", 3)
    with pytest.raises(BadInput, match="request q: 4 experts are named; the most is 3"):
        list(engine.generate([ask("q", "x", tuple((key, 1.0) for key in "abcd"))]))
    assert list(engine.generate([ask("q", "x", (("a", 1.0),) * 9, max_tokens=1)]))


def spoiled(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_scaled_weights_that_overflow_are_refused(engine: TorchEngine, copy: Path) -> None:
    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = torch.full_like(tensors[name], 3e38)

    with pytest.raises(Corrupt, match=r"beyond what torch\.float32 holds"):
        engine.add_expert("big", spoiled(copy, blow_up))


def test_another_rows_overflow_is_not_this_rows(engine: TorchEngine, copy: Path, ask: Ask, replies: Replies) -> None:
    """All rows in one segment: the neighbour's expert overflows on this row's states too, where nobody asked for it."""

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_A" in name:
                tensors[name] = torch.full_like(tensors[name], 1e38).sign() * 1e38

    requests = [ask("base", "Add"), ask("a", "Add", (("a", 1.0),)), ask("b", "Add", (("b", 0.5), ("c", 0.5)))]
    expected = replies(requests)
    engine.add_expert("big", spoiled(copy, blow_up))
    engine._passes.planner = Planner(CostModel(launch=1e9, flop=0.0))
    session = engine.session()
    for request in (*requests, ask("big", "Add", (("big", 1.0),))):
        session.submit(request)
    assert {key: text for key, text in drain(session).items() if key != "big"} == expected
    assert [key for key, _ in session.failures()] == ["big"]


def test_pins_that_take_the_room_fail_the_request_alone(lm: LanguageModel, folders: dict[str, Path], ask: Ask) -> None:
    engine = TorchEngine(lm, max_batch=4, options=TorchOptions(device_experts=2))
    for key, folder in folders.items():
        engine.add_expert(key, folder)
    session = engine.session()
    session.submit(ask("pair", "Add", (("b", 1.0), ("c", 1.0)), max_tokens=3))
    session.submit(ask("one", "Add", (("a", 1.0),), max_tokens=3))
    engine.pin_expert("d")
    assert set(drain(session)) == {"one"}
    ((failed, error),) = session.failures()
    assert failed == "pair" and "they never fit" in str(error)
    assert all(version.leases == 0 for version in engine._bank._versions.values())


def test_a_layer_that_cannot_be_told_apart_fails_its_requests_alone(
    engine: TorchEngine, ask: Ask, replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if layer 1's o_proj mixed the rows: only the experts that adapt it cannot be served."""
    fine = [ask("base", "Add"), ask("c", "Add", (("c", 1.0),))]  # c adapts q_proj and v_proj alone
    expected = replies(fine)
    made = _lora_layers._with_updates

    def refusing(name: str, *rest: Any) -> Any:
        updated = made(name, *rest)

        def refuse(x: torch.Tensor) -> torch.Tensor:
            if name.endswith("1.self_attn.o_proj"):
                raise _lora_layers.Unservable(name, f"{name} mixes the rows")
            return updated(x)

        return refuse

    monkeypatch.setattr(_lora_layers, "_with_updates", refusing)
    session = engine.session()
    for request in (fine[0], ask("a", "Add", (("a", 1.0),)), fine[1]):
        session.submit(request)
    assert drain(session) == expected
    assert [key for key, _ in session.failures()] == ["a"]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_changed_the_base_are_refused(engine: TorchEngine, copy: Path, start: str) -> None:
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(BadInput, match="changed the base model itself"):
        engine.add_expert("x", copy)


def test_ranks_that_the_configuration_contradicts(engine: TorchEngine, copy: Path) -> None:
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(Corrupt, match="has rank 4, but the configuration says 8"):
        engine.add_expert("x", copy)


def test_one_matrix_under_two_names(engine: TorchEngine, copy: Path) -> None:
    def double(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name.removeprefix("base_model.model.")] = tensors[name].clone()

    with pytest.raises(Corrupt, match="has two lora_A"):
        engine.add_expert("x", spoiled(copy, double))


class ByName:
    """A gate that has learned experts by their names."""

    Options: ClassVar[type[Config]] = Config
    learned: ClassVar[str] = "mixture"
    grain: ClassVar[str] = "expert"
    cost: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def site(self, module: str) -> str:
        return module

    def at(self, module: str, experts: Sequence[GatedExpert]) -> ModuleGate:
        weights = torch.tensor([4.0 if expert.key == "p" else -4.0 for expert in experts])
        return lambda hidden, allowed, bias: allowed * weights.expand(hidden.shape[0], hidden.shape[1], -1)


def test_one_content_under_two_names_shares_no_prefix_behind_a_gate(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask, replies: Replies
) -> None:
    def make(prefix_bytes: int) -> TorchEngine:
        engine = TorchEngine(lm, options=TorchOptions(prefix_bytes=prefix_bytes))
        for key in "pq":
            engine.add_expert(key, folders["a"])
        engine.add_gate("g", ByName())
        return engine

    keeping = make(1 << 24)
    for number in range(3):
        replies([replace(ask(str(number), "word " * 30, (("p", 1.0),)), gate="g")], keeping)
    wanted = [replace(ask("q", "word " * 30, (("q", 1.0),)), gate="g")]
    assert replies(wanted, keeping) == replies(wanted, make(0))


def test_a_late_cancellation_does_not_meet_the_next_of_its_name(engine: TorchEngine, ask: Ask) -> None:
    session = engine.session()
    session.submit(ask("x", "Add", max_tokens=1))
    drain(session)
    session.cancel("x")
    session.submit(ask("x", "Add", max_tokens=3))
    session.cancel("y")
    assert set(drain(session)) == {"x"}
    session.submit(ask("z", "Add", max_tokens=3))
    session.cancel("z")
    session.close()
    session.submit(ask("z", "Add", max_tokens=3))
    assert set(drain(session)) == {"z"}


def test_places_are_not_kept_for_one_that_cannot_use_them(
    lm: LanguageModel, folders: dict[str, Path], ask: Ask
) -> None:
    """One place is free; the oldest needs two and an adapter that cannot come yet."""
    engine = TorchEngine(lm, max_batch=2, options=TorchOptions(device_experts=1))
    for key in "ab":
        engine.add_expert(key, folders[key])
    engine._bank.release(engine._bank.wait([engine._bank.resolve("a")]))
    session = engine.session()
    session.submit(ask("long", "Add", (("a", 1.0),), max_tokens=30, stop=("never",)))
    session.step()
    session.submit(replace(ask("pair", "Add", (("b", 1.0),), max_tokens=2), contrast=Contrast("self-contrast", {}, ())))
    session.submit(ask("base", "Add", max_tokens=2))
    ended: list[str] = []
    while not session.idle:
        ended += [piece.request_id for piece in session.step() if piece.finished]
    assert ended == ["base", "long", "pair"]
