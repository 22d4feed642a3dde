"""What a request's body may hold, as JSON Schema: pydantic's own, and the rules between fields that it cannot know.

A rule stands here once more in the words of JSON Schema, beside the check in `schema` that refuses with a message; a
test lets a fuzzer look for bodies on which the two disagree.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from xpert.experts.server.schema import NEUTRAL, ChatRequest, CompletionRequest, Sampled

__all__ = ["body_schema"]

_Schema = dict[str, Any]


def body_schema(model: type[BaseModel], *, most_replies: int) -> tuple[_Schema, dict[str, _Schema]]:
    """The schema of a body, and those it refers to below `#/components/schemas/`.

    most_replies: what this server lets one request ask for.
    """
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, _Schema] = schema.pop("$defs", {})
    properties = schema["properties"]
    if issubclass(model, Sampled):
        properties["n"]["anyOf"][0]["maximum"] = most_replies
        for name, values in NEUTRAL.items():
            properties.setdefault(name, {"enum": [*values, None], "description": "Has no effect here"})
        schema["allOf"] = [_if(_given("stream_options"), _is("stream", True)), *_rules(model)]
    if "StructuredOutputs" in parts:
        names = parts["StructuredOutputs"]["properties"]
        parts["StructuredOutputs"]["oneOf"] = [_given(name) for name in names]
    if "ResponseFormat" in parts:
        parts["ResponseFormat"]["allOf"] = [_if(_is("type", "json_schema"), _given("json_schema"))]
    return schema, parts


def _rules(model: type[Sampled]) -> list[_Schema]:
    if issubclass(model, ChatRequest):
        some = {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]}
        formed = {
            "properties": {"response_format": {"type": "object", "properties": {"type": {"not": {"const": "text"}}}}},
            "required": ["response_format"],
        }
        return [
            _not_both(_given("max_tokens"), _given("max_completion_tokens")),
            _if(some, _is("logprobs", True)),
            _not_both(formed, _given("structured_outputs")),
        ]
    if issubclass(model, CompletionRequest):
        return [
            _if(_is("max_tokens", 0), _is("echo", True)),
            _not_both(_is("stream", True), _is("max_tokens", 0)),
            _not_both(_is("stream", True), {"allOf": [_is("echo", True), _given("logprobs")]}),
            # `best_of` is taken where it changes nothing: where it equals `n`. JSON Schema cannot compare fields.
            _if(_given("best_of"), {"properties": {"best_of": {"const": 1}, "n": {"enum": [1, None]}}}),
        ]
    return []


def _given(name: str) -> _Schema:
    """There, and not null."""
    return {"properties": {name: {"not": {"type": "null"}}}, "required": [name]}


def _is(name: str, value: object) -> _Schema:
    return {"properties": {name: {"const": value}}, "required": [name]}


def _if(condition: _Schema, then: _Schema) -> _Schema:
    return {"if": condition, "then": then}


def _not_both(first: _Schema, second: _Schema) -> _Schema:
    return {"not": {"allOf": [first, second]}}
