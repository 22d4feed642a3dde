"""What requests may hold. Parameters that would change the answer in a way the engine cannot are refused by name; their
neutral values are let pass, since clients send them by habit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xpert.errors import BadInput, unknown
from xpert.protocols import Constraint, Sampling
from xpert.records import Message

__all__ = [
    "NEUTRAL",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "ParameterError",
    "RouteBody",
    "Sampled",
    "parse",
]

CHAT_MAX_TOKENS = 256
COMPLETION_MAX_TOKENS = 16  # as OpenAI's
MOST_LOGPROBS = 20
MOST_STOPS = 16

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
}
"""Parameters that are let pass with these values, which mean what the engine does anyway."""


class ParameterError(BadInput):
    """A request's parameter is wrong; `param` names it."""

    def __init__(self, what: str, param: str | None, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.param = param


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    """JSON knows no difference between 4 and 4.0, and some clients write the second."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # after Field, or the description loses the bounds
Text = Annotated[str, Field(min_length=1)]


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        check_text(text, "messages")
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(_Model):
    name: str | None = None
    description: str | None = None
    # `schema` would shadow a method of pydantic's.
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    """`json_object`: any JSON object; `json_schema`: one that the schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Model):
    """Exactly one of them; as vLLM names them."""

    regex: str | None = None
    choice: list[str] | None = None
    json_: dict[str, Any] | None = Field(default=None, alias="json")


class Extras(_Model):
    """xpert's own: `explain` puts the whole route into the answer's `xpert`; `choices` are the answers to choose from,
    for aggregators that read them."""

    explain: bool | None = None
    choices: list[str] | None = None


class RouteBody(_Model):
    """`POST /v1/route`: the prompt whose route is asked for."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None


class Sampled(_Model):
    """What chat and completion requests share. Without a temperature the answer is greedy."""

    model: str
    max_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    xpert: Extras | None = None

    @property
    def replies(self) -> int:
        """Replies to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def explained(self) -> bool:
        return bool(self.xpert and self.xpert.explain)

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.xpert.choices or ()) if self.xpert else ()

    def constraint(self) -> Constraint | None:
        """Raises ParameterError unless exactly one form is given."""
        given = self.structured_outputs
        if given is None:
            return None
        forms = [
            Constraint("regex", given.regex) if given.regex is not None else None,
            Constraint("choice", json.dumps(given.choice)) if given.choice is not None else None,
            Constraint("json_schema", json.dumps(given.json_)) if given.json_ is not None else None,
        ]
        found = [form for form in forms if form is not None]
        if len(found) != 1:
            raise ParameterError("structured_outputs takes one of regex, choice and json", "structured_outputs")
        return found[0]

    def _sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options needs stream=true", "stream_options")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stop:
            check_text(text, "stop")
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature if self.temperature is not None else 0.0,
            top_p=self.top_p if self.top_p is not None else 1.0,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty if self.repetition_penalty is not None else 1.0,
            stop=stop,
            seed=self.seed % 2**63 if self.seed is not None else None,
            logprobs=logprobs,
        )


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    response_format: ResponseFormat | None = None

    def sampling(self) -> Sampling:
        """Raises ParameterError for values that contradict each other or cannot be honoured."""
        if self.max_tokens and self.max_completion_tokens:
            raise ParameterError("max_tokens and max_completion_tokens exclude each other", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs needs logprobs=true", "top_logprobs")
        asked = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(self.max_completion_tokens or self.max_tokens or CHAT_MAX_TOKENS, asked)

    def constraint(self) -> Constraint | None:
        found = super().constraint()
        form = self.response_format
        if form is None or form.type == "text":
            return found
        if found is not None:
            raise ParameterError("response_format and structured_outputs exclude each other", "response_format")
        if form.type == "json_object":
            return Constraint("json")
        if form.json_schema is None:
            raise ParameterError("response_format of type json_schema needs json_schema", "response_format.json_schema")
        return Constraint("json_schema", json.dumps(form.json_schema.schema_))


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31), WHOLE]], Field(min_length=1)]


class CompletionRequest(Sampled):
    """`POST /v1/completions`: goes on with a text, or with token ids, without a chat form."""

    prompt: (
        Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        return _several(self.prompt)

    def sampling(self) -> Sampling:
        """Raises ParameterError for values that contradict each other or cannot be honoured."""
        if self.best_of not in (None, self.replies):
            raise ParameterError(f"best_of={self.best_of} is not supported", "best_of", hint="leave it out, or use n")
        tokens = self.max_tokens if self.max_tokens is not None else COMPLETION_MAX_TOKENS
        if tokens == 0 and not self.echo:
            raise ParameterError("max_tokens=0 needs echo=true: there would be no answer", "max_tokens")
        return self._sampling(max(tokens, 1), self.logprobs)


class EmbeddingRequest(_Model):
    """`POST /v1/embeddings`."""

    model: str
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts or token ids, one or several."""
        return _several(self.input)


def _several(given: Any) -> list[str | list[int]]:
    """One text or one list of token ids, or several of them, as a list."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def check_text(text: str, param: str) -> None:
    """Raises ParameterError for text that cannot be encoded."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ParameterError("the text is not valid Unicode: it holds half a surrogate pair", param)


M = TypeVar("M", bound=_Model)


def parse(model: type[M], value: Any) -> M:
    """Checks a decoded JSON body; raises ParameterError naming the parameter."""
    if not isinstance(value, dict):
        raise ParameterError("the body must be a JSON object", None)
    given = {key: item for key, item in value.items() if item is not None}
    for name, neutral in NEUTRAL.items():
        if name in given and name not in model.model_fields and not _among(given.pop(name), neutral):
            raise ParameterError(f"the parameter {name!r} is not supported", name, hint="leave it out")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _explained(_telling(error.errors()), model.model_fields) from None


def _among(value: Any, allowed: Iterable[Any]) -> bool:
    """`in`, for which False is not 0."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


_UNION = ("str", "function-", "list[", "constrained-", "nullable[")


def _telling(problems: Sequence[Any]) -> Any:
    """Of what is wrong, the first that is more than a form that was not meant: of a list that is too long where a text
    could stand too, that it is no text says nothing."""
    return next((problem for problem in problems if not problem["type"].endswith("_type")), problems[0])


def _explained(problem: Any, known: Iterable[str]) -> ParameterError:
    place = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith(_UNION))]
    param = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        plain = unknown("parameter", str(place[-1]), known if len(place) == 1 else ())
        return ParameterError(plain.what, param, hint=plain.hint if len(place) == 1 else None)
    return ParameterError(f"{param}: {problem['msg']}", param)
