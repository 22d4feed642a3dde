"""What a chat request may hold. Parameters that would change the answer in a way the engine cannot are refused by
name; their neutral values are let pass, since clients send them by habit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xpert.errors import BadInput, unknown
from xpert.protocols import Sampling
from xpert.records import Message

__all__ = ["ChatRequest", "ParameterError", "RouteBody", "parse"]

DEFAULT_MAX_TOKENS = 256

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


class ParameterError(BadInput):
    """A request's parameter is wrong; `param` names it."""

    def __init__(self, what: str, param: str | None, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.param = param


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ParameterError("the content is not valid Unicode: it holds half a surrogate pair", "messages")
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class RouteBody(_Model):
    """`POST /v1/route`: the prompt whose route is asked for."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None


class ChatRequest(_Model):
    """`POST /v1/chat/completions`. Without a temperature the answer is greedy."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    def sampling(self) -> Sampling:
        """Raises ParameterError for values that contradict each other or cannot be honoured."""
        if self.n not in (None, 1):
            raise ParameterError(f"n={self.n} is not supported", "n", hint="send the request as often as needed")
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options needs stream=true", "stream_options")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ParameterError("max_tokens and max_completion_tokens contradict each other", "max_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stop or len(stop) > 16:
            raise ParameterError("stop takes at most 16 texts, none of them empty", "stop")
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=self.temperature if self.temperature is not None else 0.0,
            top_p=self.top_p if self.top_p is not None else 1.0,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty if self.repetition_penalty is not None else 1.0,
            stop=stop,
            seed=self.seed % 2**63 if self.seed is not None else None,
        )


M = TypeVar("M", bound=_Model)


def parse(model: type[M], value: Any) -> M:
    """Checks a decoded JSON body; raises ParameterError naming the parameter."""
    if not isinstance(value, dict):
        raise ParameterError("the body must be a JSON object", None)
    given = {key: item for key, item in value.items() if item is not None}
    for name, neutral in _NEUTRAL.items():
        if name in given and name not in model.model_fields and given.pop(name) not in neutral:
            raise ParameterError(f"the parameter {name!r} is not supported", name, hint="leave it out")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _explained(error.errors()[0], model.model_fields) from None


def _explained(problem: Any, known: Iterable[str]) -> ParameterError:
    place = [part for part in problem["loc"] if part not in ("str", "list[TextPart]", "list[str]")]
    param = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        plain = unknown("parameter", str(place[-1]), known if len(place) == 1 else ())
        return ParameterError(plain.what, param, hint=plain.hint if len(place) == 1 else None)
    return ParameterError(f"{param}: {problem['msg']}", param)
