"""Bad input while the engine serves: each is refused with its reason or defined, and the others' replies do not change.

A request is in flight before, another comes after; both get what they get without the mistake between them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from xpert.config import Config
from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.protocols import Contrast, EngineRequest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAN, INFINITE = float("nan"), float("inf")
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"

Ask = Callable[..., EngineRequest]
Unharmed = Callable[[], AbstractContextManager[Any]]


@pytest.fixture
def unharmed(engine: TorchEngine, ask: Ask) -> Unharmed:
    """A context with a session in which one request runs; leaving it, another joins, and both replies are checked."""

    def drain(session: Any, texts: dict[str, str]) -> None:
        while not session.idle:
            for piece in session.step():
                texts[piece.request_id] = texts.get(piece.request_id, "") + piece.text
        assert session.failures() == []

    @contextmanager
    def check() -> Iterator[Any]:
        before = ask("before", "Add the two numbers.", (("a", 0.7), ("b", 0.3)))
        after = ask("after", "Spell the word backwards.", (("c", 1.0),), temperature=0.8, seed=3)
        alone: dict[str, str] = {}
        for request in (before, after):
            session = engine.session()
            session.submit(request)
            drain(session, alone)
        known = engine.experts
        texts: dict[str, str] = {}
        session = engine.session()
        session.submit(before)
        for piece in session.step():
            texts[piece.request_id] = texts.get(piece.request_id, "") + piece.text
        yield session
        session.submit(after)
        drain(session, texts)
        assert {key: texts[key] for key in alone} == alone
        assert engine.experts == known

    return check


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def each(side: str, value: Callable[[Any], Any]) -> Callable[[Path], None]:
    name = f"{LAYER}.lora_{side}.weight"
    return weights(lambda held: held.update({name: value(held[name])}))


def move(held: dict[str, Any]) -> None:
    for side in "AB":
        held[f"base_model.model.model.layers.9.self_attn.q_proj.lora_{side}.weight"] = held.pop(
            f"{LAYER}.lora_{side}.weight"
        )


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(folder / "exploded")))

    return change


def other_base(folder: Path) -> None:
    from xpert.registry.card import BaseModel, ExpertCard

    ExpertCard(base=BaseModel("other/model", "feedc0ffee99" * 4), adapter={}).write(folder)


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        pytest.param(other_base, BadInput, r"trained on other/model", id="another base, by its card"),
        pytest.param(weights(move), BadInput, r"changes model.layers.9.*does not have", id="another base's modules"),
        pytest.param(each("A", lambda t: t[:, :32].contiguous()), BadInput, r"it maps 64 to 64", id="shape of A"),
        pytest.param(each("B", lambda t: t[:32].contiguous()), BadInput, r"B \[32, 4\]", id="shape of B"),
        pytest.param(each("A", lambda t: t[:2].contiguous()), BadInput, r"A \[2, 64\] and B \[64, 4\]", id="two ranks"),
        pytest.param(each("A", lambda t: t * float("nan")), Corrupt, "NaN or infinite", id="NaN"),
        pytest.param(each("B", lambda t: t + float("inf")), Corrupt, "NaN or infinite", id="infinite"),
        pytest.param(each("A", lambda t: t[:0].contiguous()), Corrupt, "rank zero", id="rank zero"),
        pytest.param(weights(lambda h: h.pop(f"{LAYER}.lora_B.weight")), Corrupt, "lora_A alone", id="half a module"),
        pytest.param(weights(dict.clear), Corrupt, "no LoRA weights", id="no module at all"),
        pytest.param(pickled("adapter_model.bin"), BadInput, "are a pickle", id="pickle"),
        pytest.param(pickled(WEIGHTS), Corrupt, "the weights are damaged", id="pickle called safetensors"),
        pytest.param(config(use_dora=True), BadInput, "DoRA", id="DoRA"),
        pytest.param(config(modules_to_save=["lm_head"]), BadInput, "modules_to_save", id="saved modules"),
        pytest.param(config(bias="all"), BadInput, "trained biases", id="biases"),
        pytest.param(config(peft_type="LOHA"), BadInput, "LOHA adapters are not served", id="not LoRA"),
        pytest.param(config(lora_alpha=NAN), Corrupt, "alpha", id="alpha NaN"),
        pytest.param(config(lora_alpha="much"), Corrupt, "alpha", id="alpha no number"),
        pytest.param(config(alpha_pattern={"q_proj": None}), Corrupt, "alpha", id="alpha nothing"),
    ],
)
def test_a_spoiled_adapter(
    engine: TorchEngine,
    unharmed: Unharmed,
    copy: Path,
    spoil: Callable[[Path], object],
    kind: type[XpertError],
    message: str,
) -> None:
    spoil(copy)
    with unharmed():
        with pytest.raises(kind, match=message) as caught:
            engine.add_expert("spoiled", copy)
        assert type(caught.value) is kind and str(copy) in str(caught.value)
        with pytest.raises(kind, match=message):
            engine.add_expert("a", copy)  # nor does it take the place of one that is served
    assert not (copy / "exploded").exists(), "a pickle was run"


def test_a_missing_module_is_no_mistake(engine: TorchEngine, unharmed: Unharmed, ask: Ask, copy: Path) -> None:
    """Both halves gone: the expert changes one layer less, as peft would serve it."""

    def drop(held: dict[str, Any]) -> None:
        for side in "AB":
            del held[f"{LAYER}.lora_{side}.weight"]

    weights(drop)(copy)
    with unharmed() as session:
        engine.add_expert("less", copy)
        session.submit(ask("less", "x", (("less", 1.0),)))
        engine.remove_expert("less")


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NOBODY = tuple((f"expert{index}", 1.0) for index in range(10_000))


class Opening:
    """Half of every expert it may use."""

    Options: ClassVar[type[Config]] = Config
    learned: ClassVar[str] = "none"
    grain: ClassVar[str] = "expert"
    cost: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def site(self, module: str) -> str:
        return module

    def at(self, module: str, experts: Any) -> Any:
        return lambda hidden, allowed, bias: (allowed * 0.5).expand(*hidden.shape[:2], -1).to(hidden.dtype)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param({"experts": (("a", NAN),)}, BadInput, "weight of expert 'a' is nan", id="weight NaN"),
        pytest.param({"experts": (("a", INFINITE),)}, BadInput, "weight of expert 'a' is inf", id="weight infinite"),
        pytest.param({"experts": (("a", 1.0), ("e", 1.0))}, NotFound, "unknown expert 'e'", id="unknown expert"),
        pytest.param({"experts": NOBODY}, NotFound, "unknown expert 'expert0'", id="10,000 experts"),
        pytest.param({"prompt_ids": ()}, BadInput, "prompt is empty", id="empty prompt"),
        pytest.param({"prompt_ids": (5,) * 512}, BadInput, "512 tokens.*context", id="beyond the context"),
        pytest.param({"prompt_ids": (5, 10**6)}, BadInput, "token outside", id="unknown token"),
        pytest.param({"prompt_ids": (-1,)}, BadInput, "token outside", id="negative token"),
        pytest.param({"id": "before"}, BadInput, "of this id is in flight", id="id in use"),
        pytest.param({"gate": "arow"}, NotFound, "unknown gate 'arow'", id="unknown gate"),
        pytest.param(
            {"gate": "half", "experts": (("a", -1.0),)},
            BadInput,
            "strength of expert 'a' is -1",
            id="negative strength behind a gate",
        ),
        pytest.param({"gate_bias": (("a", 1.0),)}, BadInput, "bias without a gate", id="bias without gate"),
        pytest.param({"gate": "half", "gate_bias": (("a", NAN),)}, BadInput, "'a' is nan", id="bias NaN"),
        pytest.param(
            {"gate": "half", "gate_bias": (("b", 1.0),)},
            NotFound,
            "unknown expert 'b'",
            id="bias of another expert",
        ),
        pytest.param(
            {"contrast": Contrast("self_contrasd", experts=())},
            NotFound,
            "unknown decoder 'self_contrasd'",
            id="unknown decoder",
        ),
        pytest.param(
            {"contrast": Contrast("self_contrast", {"bet": 1}, experts=())},
            NotFound,
            "unknown parameter 'bet'",
            id="unknown parameter of a decoder",
        ),
        pytest.param(
            {"contrast": Contrast("self_contrast", experts=(("nobody", 1.0),))},
            NotFound,
            "unknown expert 'nobody'",
            id="unknown expert of a contrast",
        ),
        pytest.param(
            {"contrast": Contrast("context_contrast", prompt_ids=())},
            BadInput,
            "prompt is empty",
            id="empty prompt of a contrast",
        ),
    ],
)
def test_a_bad_request(
    engine: TorchEngine,
    unharmed: Unharmed,
    ask: Ask,
    change: dict[str, Any],
    kind: type[XpertError],
    message: str,
) -> None:
    if hasattr(engine, "add_gate"):
        engine.add_gate("half", Opening())
    request = replace(ask("bad", "Name the colour.", (("a", 1.0),)), **change)
    with unharmed() as session:
        with pytest.raises(kind, match=message) as caught:
            session.submit(request)
        assert type(caught.value) is kind
        if change.get("id") is None:
            assert "bad" not in session.pending


def test_an_expert_named_ten_thousand_times_has_the_sum_of_its_weights(
    unharmed: Unharmed, ask: Ask, replies: Callable[..., dict[str, str]]
) -> None:
    with unharmed():
        once = replies([ask("x", "Name the colour.", (("a", 0.5),))])
        assert once == replies([ask("x", "Name the colour.", (("a", 0.5 / 8192),) * 8192)])


def test_negative_weights_are_allowed_without_a_gate(
    unharmed: Unharmed, ask: Ask, replies: Callable[..., dict[str, str]]
) -> None:
    """They subtract an expert; together with its positive weight nothing of it is left."""
    with unharmed():
        nothing = replies([ask("x", "Name the colour.", (("a", 1.0), ("a", -1.0)))])
        assert nothing == replies([ask("x", "Name the colour.")])
        less = replies([ask("x", "Name the colour.", (("a", -1.0),))])
        assert less not in (nothing, replies([ask("x", "Name the colour.", (("a", 1.0),))]))


def test_weights_that_overflow_fail_alone(engine: TorchEngine, ask: Ask) -> None:
    """Finite weights whose sum of updates is not: the request fails with its reason, the others go on."""
    session = engine.session()
    session.submit(ask("fine", "Add the two numbers.", (("b", 1.0),)))
    session.submit(ask("huge", "Add the two numbers.", (("a", 1e38),)))
    texts = {"fine": ""}
    failed = []
    while not session.idle:
        for piece in session.step():
            texts[piece.request_id] += piece.text
        failed += session.failures()
    assert [(id, str(error)) for id, error in failed] == [
        ("huge", "request huge: the model's output is not a number with a. Lower the experts' weights, or use float32")
    ]
    alone = engine.session()
    alone.submit(ask("fine", "Add the two numbers.", (("b", 1.0),)))
    again = ""
    while not alone.idle:
        again += "".join(piece.text for piece in alone.step())
    assert again == texts["fine"]
