"""How requests are translated, what is refused by name, and what becomes of failures, cancelled and lost requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.experts.engines._vllm_sampling import sampling_fields, scoring_fields
from xpert.experts.engines.vllm_engine import VllmEngine, VllmOptions
from xpert.language_model import LanguageModel
from xpert.protocols import Constraint, Contrast, EngineRequest, Sampling

NEUTRAL = {
    "max_tokens": 256,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "stop_token_ids": [2, 5],
}


@pytest.mark.parametrize(
    ("field", "value", "sent"),
    [
        ("max_tokens", 9, {"max_tokens": 9}),
        ("max_tokens", 5000, {"max_tokens": 1000}),  # what the context holds
        ("temperature", 1, {"temperature": 1.0}),
        ("top_p", 0.25, {"top_p": 0.25}),
        ("top_k", 7, {"top_k": 7}),
        ("min_p", 0.1, {"min_p": 0.1}),
        ("repetition_penalty", 1.2, {"repetition_penalty": 1.2}),
        ("seed", 0, {"seed": 0}),
        ("seed", 2**63 - 1, {"seed": 2**63 - 1}),
        ("stop", ("\n", "END"), {"stop": ["\n", "END"]}),
        ("logprobs", 0, {"logprobs": 0}),
        ("logprobs", 5, {"logprobs": 5}),
    ],
)
def test_each_field_is_sent(field: str, value: Any, sent: dict[str, Any]) -> None:
    sampling = Sampling(**{field: value})
    assert sampling_fields(sampling, frozenset({5, 2}), room=1000) == NEUTRAL | sent


def test_every_field_of_sampling_is_translated() -> None:
    assert set(sampling_fields(Sampling(seed=1, logprobs=1), (), room=9)) - {"stop_token_ids"} == set(
        Sampling.__dataclass_fields__
    )
    assert scoring_fields(17)["logprob_token_ids"] == [17] and scoring_fields(17)["stop_token_ids"] == []


def test_all_sampling_at_once_passes_the_servers_checks(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    given: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1}
    one, same, other = (ask(str(n), "x", (("a", 1.0),), seed=seed, **given) for n, seed in enumerate((3, 3, 4)))
    texts = ["".join(piece.text for piece in engine.generate([request])) for request in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    body = stand_in.bodies("/v1/completions")[0]
    assert {name: body[name] for name in given} == given and body["seed"] == 3
    assert body["prompt"] == list(one.prompt_ids) and body["model"].startswith("xpert-")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gate": "arrow"}, "token gate 'arrow' cannot run on it. Use the torch-lora engine"),
        ({"gate_bias": (("a", 1.0),)}, "token gate"),
        ({"contrast": Contrast("contrast")}, "contrast decoding (contrast) cannot run on it"),
        ({"constraint": Constraint("lark", 'start: "a"')}, "a lark grammar cannot run on it. Use the torch-lora"),
        ({"constraint": Constraint("choice", "[]")}, "there are no choices"),
        ({"constraint": Constraint("xml", "")}, "unknown constraint 'xml'"),
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (10**6,)}, "a token outside"),
        ({"prompt_ids": (5,) * 512}, "the context of vLLM holds 512"),
        ({"experts": (("z", 1.0),)}, "unknown expert 'z'"),
        ({"experts": (("a", float("nan")),)}, "the weight of expert 'a' is nan"),
        ({"sampling": Sampling(temperature=0.001)}, "temperature is 0.001; vLLM takes 0, and 0.01 to 2"),
        ({"sampling": Sampling(temperature=2.5)}, "temperature is 2.5"),
        ({"sampling": Sampling(seed=2**63)}, "less than 2^63"),
        ({"sampling": Sampling(logprobs=21)}, "logprobs is 21; this vLLM tells at most 20"),
        ({"sampling": Sampling(top_k=-1)}, "top-k is -1"),
        ({"sampling": Sampling(min_p=1.5)}, "min-p is 1.5"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "repetition-penalty is 0"),
        ({"sampling": Sampling(stop=("",))}, "a stop string is empty"),
    ],
)
def test_mistakes_are_refused_by_name_and_never_sent(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput) as caught:
        list(engine.generate([replace(ask("r", "x", (("a", 1.0),)), **change)]))
    assert says in str(caught.value)
    assert not stand_in.bodies("/v1/completions")


@pytest.mark.parametrize(
    ("constraint", "sent"),
    [
        (Constraint("json"), {"json": '{"type": "object"}'}),
        (Constraint("json_schema", '{"type": "integer"}'), {"json": '{"type": "integer"}'}),
        (Constraint("regex", "a+"), {"regex": "a+"}),
        (Constraint("choice", '["yes", "no"]'), {"choice": ["yes", "no"]}),
    ],
)
def test_constraints_are_sent(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest], constraint: Constraint, sent: dict[str, Any]
) -> None:
    list(engine.generate([replace(ask("r", "x", max_tokens=2), constraint=constraint), ask("free", "x", max_tokens=1)]))
    bodies = {len(body.get("structured_outputs", ())): body for body in stand_in.bodies("/v1/completions")}
    assert bodies[1]["structured_outputs"] == sent and "structured_outputs" not in bodies[0]


def test_what_vllm_does_not_tell_is_refused_by_name(engine: VllmEngine, ask: Callable[..., EngineRequest]) -> None:
    with pytest.raises(BadInput, match=r"prompts cannot be had of vLLM .* Use the torch-lora engine"):
        engine.prompt_logprobs([ask("r", "x")])
    with pytest.raises(BadInput, match=r"does not embed\. Use the torch-lora engine"):
        engine.embed([(5, 6)])


def test_a_gate_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(BadInput, match="one adapter for all tokens"):
        engine.add_gate("g", object())


def test_ranks_beyond_the_limit_are_refused(
    make_engine: Callable[..., VllmEngine], ask: Callable[..., EngineRequest], make_adapter: Callable[..., Path]
) -> None:
    engine = make_engine(max_lora_rank=8)
    list(engine.generate([ask("fits", "x", (("a", 0.5), ("c", 0.5)), max_tokens=1)]))
    with pytest.raises(BadInput, match=r"b \+ c have together rank 10.*at most 8 .*--max-lora-rank 16") as caught:
        list(engine.generate([ask("r", "x", (("b", 0.5), ("c", 0.5)))]))
    assert "set max-lora-rank here to the same" in str(caught.value)
    with pytest.raises(BadInput, match="big has rank 9, and this vLLM takes at most 8"):
        engine.add_expert("big", make_adapter(seed=1, r=9))
    with pytest.raises(BadInput, match="VLLM takes 1, 8, 16"):
        VllmOptions(max_lora_rank=20)


def test_an_expert_that_changed_on_disk_is_refused(
    engine: VllmEngine, ask: Callable[..., EngineRequest], make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(seed=5)
    engine.add_expert("e", folder)
    other = make_adapter(seed=6) / "adapter_model.safetensors"
    (folder / "adapter_model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(Corrupt, match="expert 'e' has changed since it was added"):
        list(engine.generate([ask("r", "x", (("e", 1.0),))]))


def test_unknown_experts_cannot_be_removed(engine: VllmEngine) -> None:
    engine.remove_expert("a")
    assert set(engine.experts) == {"b", "c", "d"}
    with pytest.raises(NotFound, match="unknown expert 'a'"):
        engine.remove_expert("a")


def said(engine: VllmEngine, requests: list[EngineRequest]) -> tuple[dict[str, str], dict[str, XpertError]]:
    session = engine.session()
    for request in requests:
        session.submit(request)
    texts: dict[str, str] = {}
    failures: dict[str, XpertError] = {}
    while not session.idle:
        for piece in session.step():
            texts[piece.request_id] = texts.get(piece.request_id, "") + piece.text
        failures.update(session.failures())
    return texts, failures


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ((400, {"error": {"message": "no such thing", "code": 400}}), BadInput, "no such thing"),
        ((422, {"object": "error", "message": "older form"}), BadInput, "older form"),
        ((401, {"error": "Unauthorized"}), Unavailable, "set VLLM_API_KEY"),
        ((429, "slow down"), Unavailable, "status 429: slow down"),
        ((500, {"error": {"message": "EngineCore encountered an issue."}}), Unavailable, "EngineCore"),
        ((503, "<html>no"), Unavailable, "status 503"),
    ],
)
def test_one_requests_failure_leaves_the_others_alone(
    engine: VllmEngine,
    stand_in: Any,
    ask: Callable[..., EngineRequest],
    answer: tuple[int, Any],
    kind: type[XpertError],
    says: str,
) -> None:
    requests = [ask("good", "x", (("a", 1.0),)), ask("bad", "y"), ask("also", "z", (("b", 1.0),))]
    wanted, _ = said(engine, [requests[0], requests[2]])
    stand_in.fail = lambda path, body: answer if body.get("prompt") == list(requests[1].prompt_ids) else None
    texts, failures = said(engine, requests)
    assert texts == wanted and set(failures) == {"bad"}
    assert type(failures["bad"]) is kind and says.lower() in str(failures["bad"]).lower()


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("cut_after", 2, "the server ended a reply before its end|connection to vLLM was lost"),
        ("fail_inside", {"error": {"message": "engine died", "code": 500}}, "status 500: engine died"),
        (
            "fail_inside",
            {"choices": [{"index": 0, "token_ids": [], "finish_reason": "abort"}]},
            r"gave .* up \(abort\)",
        ),
        ("fail_inside", {"surprise": 1}, "is not a completion"),
        ("without_ids", True, "sends no token ids. Use vLLM 0.32"),
    ],
)
def test_a_reply_that_breaks_off_is_no_reply(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest], setting: str, value: Any, says: str
) -> None:
    setattr(stand_in, setting, value)
    with pytest.raises(Unavailable, match=says):
        list(engine.generate([ask("r", "x", (("a", 1.0),))]))


def test_no_server_is_unavailable(lm: LanguageModel) -> None:
    with pytest.raises(Unavailable, match=r"no vLLM server answers .*vllm serve BASE --enable-lora"):
        VllmEngine(lm, options=VllmOptions(base_url="http://127.0.0.1:9"))
    with pytest.raises(BadInput, match="Give it as http://HOST:PORT"):
        VllmEngine(lm, options=VllmOptions(base_url="localhost:8000"))


def test_a_server_lost_later_is_unavailable(
    engine: VllmEngine, ask: Callable[..., EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._backend, "_port", 9)
    with pytest.raises(Unavailable, match="no vLLM server answers"):
        list(engine.generate([ask("r", "x", (("a", 1.0),))]))


def test_the_key_is_sent_and_the_model_can_be_named(
    make_engine: Callable[..., VllmEngine], stand_in: Any, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine = make_engine(model="tiny", base_url=stand_in.url + "/v1/")
    list(engine.generate([ask("r", "x", max_tokens=1)]))
    assert stand_in.headers[-1]["Authorization"] == "Bearer secret"
    with pytest.raises(NotFound, match=r"unknown model 'tony'.*Did you mean 'tiny'"):
        make_engine(model="tony")


def test_without_vllm_its_installation_is_named(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(Unavailable, match=r'[Pp]ip install "xpert-toolkit\[vllm\]"'):
        VllmEngine(lm)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_cancelling_closes_the_stream_and_frees_its_place(
    make_engine: Callable[..., VllmEngine], stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    engine = make_engine(max_batch=1)
    stand_in.endless, stand_in.pause = True, 0.01
    session = engine.session()
    first, second = ask("first", "x", (("a", 1.0),), max_tokens=400), ask("second", "y", max_tokens=400)
    session.submit(first)
    session.submit(second)
    while not session.step():
        pass
    assert len(stand_in.bodies("/v1/completions")) == 1
    session.cancel("first")
    wait_for(lambda: stand_in.aborted == [list(first.prompt_ids)])
    found: set[str] = set()
    while not found:
        found = {piece.request_id for piece in session.step()}
    assert found == {"second"}
    session.cancel("second")
    assert session.idle and session.step() == []
    wait_for(lambda: len(stand_in.aborted) == 2)


def test_leaving_generate_gives_up_what_runs(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    stand_in.endless, stand_in.pause = True, 0.01
    request = ask("r", "x", max_tokens=400)
    pieces = engine.generate([request])
    next(pieces)
    pieces.close()
    wait_for(lambda: stand_in.aborted == [list(request.prompt_ids)])


def test_cancelled_is_asked(engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest]) -> None:
    stand_in.endless, stand_in.pause = True, 0.01
    assert not list(engine.generate([ask("r", "x", max_tokens=400)], cancelled=lambda id: id == "r"))


def test_an_id_in_flight_is_refused(engine: VllmEngine, ask: Callable[..., EngineRequest]) -> None:
    session = engine.session()
    session.submit(ask("r", "x"))
    with pytest.raises(BadInput, match="a request of this id is in flight"):
        session.submit(ask("r", "y"))
