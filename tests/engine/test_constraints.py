"""Constrained replies: they follow what was asked for, and change nothing for the others."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput, NotFound, Unavailable
from xpert.experts.engines import _constraints
from xpert.experts.engines._choosing import constrained
from xpert.experts.engines._constraints import CONSTRAINT_BYTES, Grammars
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import Constraint, Contrast, EngineRequest, Piece, TokenLogprob

Ask = Callable[..., EngineRequest]
Constrain = Callable[..., EngineRequest]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUMBER_OR_WORD = {"anyOf": [{"type": "integer", "minimum": -99, "maximum": 99}, {"enum": ["yes", "no", None]}]}


@pytest.fixture
def constrain(ask: Ask) -> Constrain:
    """A request with a constraint: `constrain("1", "regex", "[0-9]+", temperature=1)`."""

    def make(id: str, kind: str, text: Any = "", *, experts: Any = (), prompt: str = "x", **sampling: Any) -> Any:
        given = text if isinstance(text, str) else json.dumps(text)
        return replace(ask(id, prompt, experts, **{"max_tokens": 200} | sampling), constraint=Constraint(kind, given))

    return make


def whole(engine: TorchEngine, requests: Sequence[EngineRequest]) -> dict[str, tuple[str, str]]:
    """(reply, why it ended) by id."""
    found: dict[str, tuple[str, str]] = {request.id: ("", "") for request in requests}
    for piece in engine.generate(requests):
        found[piece.request_id] = (found[piece.request_id][0] + piece.text, piece.finished or "")
    return found


# ── what comes of each kind ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schema", [PERSON, NUMBER_OR_WORD, {"type": "boolean"}, {"const": {"é": ['"', "\\"]}}])
def test_replies_obey_a_schema(engine: TorchEngine, constrain: Constrain, schema: Any) -> None:
    requests = [
        constrain(str(seed), "json_schema", schema, experts=experts, seed=seed, temperature=seed % 2)
        for seed, experts in enumerate([(), (("a", 1.0),), (("b", 0.7), ("c", 0.4)), ()])
    ]
    for text, finished in whole(engine, requests).values():
        assert finished == "stop"
        jsonschema.validate(json.loads(text), schema)


VALUES = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["x", 1, None]}, {"const": "fix"}])
    | st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 99),
    )
    | st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 2),
        st.integers(0, 3),
    )
    | st.builds(
        lambda p: {"type": "string", "pattern": p}, st.sampled_from(["^[a-c]{1,3}$", "^(no|yes)$", "^\\d\\d-\\d$"])
    ),
    lambda inner: (
        st.builds(
            lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 1},
            inner,
            st.integers(0, 1),
        )
        | st.builds(
            lambda given, count: {
                "type": "object",
                "properties": {f"k{i}": value for i, value in enumerate(given)},
                "required": [f"k{i}" for i in range(min(count, len(given)))],
                "additionalProperties": False,
            },
            st.lists(inner, max_size=3),
            st.integers(0, 2),
        )
        | st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)
    ),
    max_leaves=4,
)


@given(schema=VALUES, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0, 5.0]))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schema_is_obeyed(
    engine: TorchEngine, constrain: Constrain, schema: Any, seed: int, temperature: float
) -> None:
    """By a model that knows nothing of JSON. A reply that max_tokens cuts is the beginning of one that obeys."""
    request = constrain("q", "json_schema", schema, seed=seed, temperature=temperature, max_tokens=250)
    ((text, finished),) = whole(engine, [request]).values()
    assert finished == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_json_is_any_object(engine: TorchEngine, constrain: Constrain) -> None:
    requests = [constrain(str(seed), "json", temperature=1.5, seed=seed, max_tokens=60) for seed in range(8)]
    found = whole(engine, requests)
    ended = [text for text, finished in found.values() if finished == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert all(text.startswith("{") for text, _ in found.values())


@pytest.mark.parametrize(
    "expression",
    ["[0-9]{3}-[a-z]{2}", "(ja|nein)!?", "a*b{2,5}", "[^ab\\n]{4}", "é+😀", "/\"\\\\'{1,2}", "^anchored$", "x\ny"],
)
def test_replies_match_an_expression(engine: TorchEngine, constrain: Constrain, expression: str) -> None:
    requests = [constrain(str(seed), "regex", expression, temperature=2.0, seed=seed) for seed in range(4)]
    for text, finished in whole(engine, [*requests, constrain("greedy", "regex", expression)]).values():
        assert (finished == "stop" and re.fullmatch(expression, text)) or (finished == "length" and len(text) >= 100)


@pytest.mark.parametrize(
    "choices",
    [
        ["yes"],
        ["a", "ab", "abc"],
        ['with "quotes"', "back\\slash", "/slash/", "new\nline"],
        ["é", "😀", "\x7f", "\u2028"],
    ],
)
def test_replies_are_one_of_the_choices(engine: TorchEngine, constrain: Constrain, choices: list[str]) -> None:
    requests = [constrain(str(seed), "choice", choices, temperature=3.0, seed=seed) for seed in range(12)]
    found = set(whole(engine, requests).values())
    assert found <= {(choice, "stop") for choice in choices}
    assert len(found) > 1 or len(choices) == 1


def test_replies_follow_a_grammar(engine: TorchEngine, constrain: Constrain) -> None:
    grammar = 'start: term (" + " term){0,3}\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,2}/'
    requests = [constrain(str(seed), "lark", grammar, temperature=1.0, seed=seed) for seed in range(6)]
    ended = [text for text, finished in whole(engine, requests).values() if finished == "stop"]
    assert ended
    for text in ended:
        assert re.fullmatch(r"[0-9+() ]+", text) and text.count("(") == text.count(")")


def test_the_choice_is_the_likeliest_of_those_allowed(
    engine: TorchEngine, constrain: Constrain, lm: LanguageModel, plain: Callable[..., Any]
) -> None:
    """Greedy, token by token, against plain peft and a mask by hand: choices of one token each."""
    request = constrain("q", "choice", ["a", "b", "c", "d"], experts=(("a", 1.0),), prompt="Which?")
    with torch.inference_mode():
        logits = plain("a")(torch.tensor([request.prompt_ids])).logits[0, -1]
    ids = {lm.tokenizer(choice)["input_ids"][0]: choice for choice in "abcd"}
    best = max(ids, key=lambda token: float(logits[token]))
    assert whole(engine, [request])["q"] == (ids[best], "stop")


# ── beside sampling rules ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rules", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"repetition_penalty": 1.7}])
def test_rules_choose_among_what_is_allowed(engine: TorchEngine, constrain: Constrain, rules: dict[str, Any]) -> None:
    requests = [constrain(str(seed), "json_schema", PERSON, temperature=1.0, seed=seed, **rules) for seed in range(3)]
    for text, finished in whole(engine, requests).values():
        assert finished == "stop"
        jsonschema.validate(json.loads(text), PERSON)


def test_logprobs_are_the_models_own(
    engine: TorchEngine, constrain: Constrain, plain: Callable[..., Any], lm: LanguageModel
) -> None:
    request = constrain("q", "regex", "[0-9]{4}", logprobs=2)
    told = [token for piece in engine.generate([request]) for token in piece.tokens]
    ids = torch.tensor([[*request.prompt_ids, *(token.token for token in told)]])
    with torch.inference_mode():
        expected = plain(None)(ids).logits[0].log_softmax(-1)
    for place, token in enumerate(told, len(request.prompt_ids) - 1):
        assert token.logprob == pytest.approx(float(expected[place, token.token]), abs=1e-4)
        assert [other for other, _ in token.alternatives] == expected[place].topk(2).indices.tolist()
    assert re.fullmatch("[0-9]{4}", lm.tokenizer.decode([token.token for token in told], skip_special_tokens=True))


@pytest.mark.parametrize(
    "decoder", [Contrast("self-contrast", {}, ()), Contrast("context-contrast", {}, prompt_ids=(7, 8))]
)
def test_a_contrast_is_constrained(engine: TorchEngine, constrain: Constrain, decoder: Contrast) -> None:
    """A contrast that rules tokens out may rule out all that the constraint allows."""
    request = replace(constrain("q", "json_schema", PERSON, experts=(("a", 1.0),)), contrast=decoder)
    beside = constrain("r", "regex", "[0-9]{4}")
    found = whole(engine, [request, beside])
    jsonschema.validate(json.loads(found["q"][0]), PERSON)
    assert re.fullmatch("[0-9]{4}", found["r"][0])


def test_what_the_contrast_rules_out_is_decided_by_the_model() -> None:
    class Told:
        def mask(self) -> Any:
            return torch.tensor([False, True, True]).numpy()  # one token fewer than the model has

    request: Any = type("Request", (), {"guide": Told()})()
    free: Any = type("Request", (), {"guide": None})()
    own = torch.tensor([[9.0, 1.0, 2.0, 5.0]] * 2)
    scores = torch.tensor([[9.0, -torch.inf, -torch.inf, 1.0]] * 2)
    found, failed = constrained([request, free], scores, own)
    assert found.tolist() == [[-torch.inf, 1.0, 2.0, -torch.inf], scores[1].tolist()] and not failed


def test_max_tokens_cuts(engine: TorchEngine, constrain: Constrain) -> None:
    text, finished = whole(engine, [constrain("q", "regex", "[a-z]{40,}", max_tokens=5)])["q"]
    assert finished == "length" and re.fullmatch("[a-z]+", text)


def test_the_end_of_the_grammar_costs_no_token(engine: TorchEngine, constrain: Constrain) -> None:
    pieces = list(engine.generate([constrain("q", "regex", "0123", max_tokens=4)]))
    assert (pieces[-1].finished, "".join(piece.text for piece in pieces)) == ("stop", "0123")
    assert pieces[-1].completion_tokens <= 4


def test_a_stop_text_ends_a_constrained_reply(engine: TorchEngine, constrain: Constrain) -> None:
    assert whole(engine, [constrain("q", "regex", "abcdef[0-9]+", stop=("de",))])["q"] == ("abc", "stop")


# ── beside other requests ────────────────────────────────────────────────────────────────────────────────────────


def test_others_are_untouched(engine: TorchEngine, ask: Ask, constrain: Constrain) -> None:
    """Replies and log-probabilities, bit by bit, beside a constrained request and beside the same one without."""

    def told(beside: EngineRequest) -> dict[str, list[tuple[str, tuple[TokenLogprob, ...]]]]:
        others = [
            ask("greedy", "Add the two numbers.", (("a", 1.0),), logprobs=3),
            ask("sampled", "one two", (("b", 1.0),), logprobs=3, temperature=1.0, seed=4, top_p=0.9),
            ask("penalised", "x", repetition_penalty=1.3, logprobs=3),
        ]
        pieces: dict[str, list[Any]] = {request.id: [] for request in others}
        for piece in engine.generate([*others, beside]):
            if piece.request_id != "beside":
                pieces[piece.request_id].append((piece.text, piece.tokens))
        return pieces

    with_it = told(constrain("beside", "regex", "[a-z]{40}", max_tokens=12))
    assert with_it == told(replace(constrain("beside", "regex", "[a-z]{40}", max_tokens=12), constraint=None))


def test_a_constraint_is_prepared_once(
    engine: TorchEngine, constrain: Constrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(_constraints, "_tried", lambda grammar: tried.append(grammar) or "")
    texts = whole(engine, [constrain(str(n), "regex", "[0-9]{5}") for n in range(6)])
    assert len(tried) == 1 and len(set(texts.values())) == 1
    monkeypatch.setattr(_constraints, "KEPT", 2)
    for kind in ("1", "2", "3", "1"):
        whole(engine, [constrain("q", "regex", kind)])
    assert len(tried) == 5  # what was used longest ago has left


def test_a_request_is_cancelled(engine: TorchEngine, constrain: Constrain, ask: Ask) -> None:
    session = engine.session()
    session.submit(constrain("gone", "regex", "[a-z]{150,}"))
    session.submit(ask("stays", "x"))
    said: list[Piece] = session.step()
    session.cancel("gone")
    while not session.idle:
        said += session.step()
    assert "stays" in {piece.request_id for piece in said if piece.finished}
    assert "gone" not in {piece.request_id for piece in said if piece.finished}


def test_a_constraint_that_fails_later_takes_only_its_request(
    engine: TorchEngine, constrain: Constrain, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, token: int) -> bool:
        raise BadInput("the constraint cannot be followed further: too many items", where="request bad")

    session = engine.session()
    session.submit(constrain("bad", "regex", "[a-z]{150,}"))
    session.submit(ask("good", "x"))
    session.step()
    monkeypatch.setattr(_constraints.Guide, "advance", refuse)
    said: list[Piece] = []
    while not session.idle:
        said += session.step()
    assert [(id, str(error)) for id, error in session.failures()] == [
        ("bad", "request bad: the constraint cannot be followed further: too many items")
    ]
    assert [piece.request_id for piece in said if piece.finished] == ["good"]


def test_requests_are_submitted_while_the_batch_runs(engine: TorchEngine, constrain: Constrain) -> None:
    session = engine.session()
    requests = [constrain(f"{n}", "regex", f"[0-9]{{{n % 5 + 1}}}", temperature=1.0, seed=n) for n in range(12)]
    threads = [
        threading.Thread(target=lambda own=own: [session.submit(r) for r in own])
        for own in (requests[:6], requests[6:])
    ]
    for thread in threads:
        thread.start()
    texts: dict[str, str] = {}
    while any(thread.is_alive() for thread in threads) or not session.idle:
        for piece in session.step():
            texts[piece.request_id] = texts.get(piece.request_id, "") + piece.text
    assert all(re.fullmatch(f"[0-9]{{{n % 5 + 1}}}", texts[f"{n}"]) for n in range(12))


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("jsn", "", r"unknown constraint 'jsn'. Did you mean 'json'"),
        ("json", "{}", "json takes no text. Use json_schema"),
        ("json_schema", "{", "the JSON schema is not JSON: "),
        ("json_schema", "[" * 30_000, "the JSON schema is not JSON: "),
        ("json_schema", "[1]", "the JSON schema is neither an object nor true or false"),
        ("json_schema", '{"type": "nope"}', "the JSON schema cannot be used: Invalid type: nope"),
        ("json_schema", '{"type": "object", "properties": []}', "properties must be an object"),
        ("json_schema", '{"uniqueItems": true}', "Unimplemented keys.*uniqueItems"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "does not fetch"),
        ("json_schema", '{"$ref": "#"}', "no text satisfies it"),
        ("json_schema", "false", "no text satisfies it"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum .5. is greater than maximum .3."),
        ("regex", "a(", r"the regular expression cannot be used: .*unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", "no text satisfies it"),
        ("regex", "\ud800", "the constraint's text is not Unicode"),
        ("lark", " \n", "the lark grammar is empty"),
        ("lark", "start: foo", "the lark grammar cannot be used: .*unknown name: .foo."),
        ("lark", 'foo: "a"', "no start rule"),
        ("choice", "", "the choices are not JSON"),
        ("choice", '"yes"', "the choices are not a JSON list of texts"),
        ("choice", "[1, 2]", "the choices are not a JSON list of texts"),
        ("choice", "[]", "there are no choices"),
        ("choice", '["yes", ""]', "a choice is empty"),
        ("choice", '["\\ud800"]', "half a surrogate pair"),
        ("regex", "a" * (CONSTRAINT_BYTES + 1), "the constraint has 65,537 bytes; the most is 65,536"),
    ],
)
def test_constraints_that_cannot_be_used(
    engine: TorchEngine, constrain: Constrain, kind: str, text: str, message: str
) -> None:
    session = engine.session()
    with pytest.raises(BadInput, match=f"request q: .*{message}") as caught:
        session.submit(constrain("q", kind, text))
    assert "\n" not in str(caught.value) and session.idle
    assert isinstance(caught.value, NotFound) == (kind == "jsn")


def test_a_grammar_that_overflows_the_library_is_refused(engine: TorchEngine, constrain: Constrain) -> None:
    chain = "\n".join(["start: a0", *(f"a{n}: a{n + 1}" for n in range(3000)), 'a3000: "x"'])
    with pytest.raises(BadInput, match="request q: the lark grammar cannot be used: it is too complex"):
        engine.session().submit(constrain("q", "lark", chain))


def test_a_schema_that_takes_for_ever_is_refused(
    engine: TorchEngine, constrain: Constrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_constraints, "CONSTRAINT_SECONDS", 1)
    hostile = {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]}
    with pytest.raises(BadInput, match="request q: the JSON schema cannot be used: it is too complex"):
        engine.session().submit(constrain("q", "json_schema", hostile))


def test_without_the_library(engine: TorchEngine, constrain: Constrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Unavailable, match=r"request q: constrained replies need llguidance.*pip install"):
        engine.session().submit(constrain("q", "json"))


def test_a_slow_tokenizer_is_refused() -> None:
    grammars = Grammars(object(), {1}, where="base")
    with pytest.raises(BadInput, match=r"base: replies of this base cannot be constrained: .*fast tokenizers"):
        grammars.guide(Constraint("regex", "a"), where="request q")
