"""What a request may ask for, said before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xpert.errors import BadInput, NotFound
from xpert.experts.server.failures import Forbidden
from xpert.experts.server.generations import Generation
from xpert.experts.server.key_file import KeyHolder
from xpert.experts.server.schema import ParameterError

__all__ = ["about_the_model", "check_allowed", "check_length", "check_many"]


def check_length(characters: int, context: int, longest: int, param: str) -> None:
    """Raises ParameterError for a text that `context` tokens, the longest of them of `longest` characters, cannot make:
    to count its tokens would take the time of all who wait to be routed."""
    if characters > context * longest:
        raise ParameterError(
            f"{param} has {characters:,} characters, and the base model's context holds {context:,} tokens",
            param,
            hint="shorten it",
        )


def check_allowed(holder: KeyHolder | None, model: str, generation: Generation) -> None:
    """Raises Forbidden for a model that is not among the key's. A way of the mixture is the mixture."""
    mixture = generation.mixture
    plain = mixture.name if model.startswith(f"{mixture.name}:") and model not in mixture.keys else model
    if holder is not None and not holder.allows(plain):
        allowed = ", ".join(holder.models or ())
        raise Forbidden(f"this key may not ask for {model!r}", hint=f"it may ask for {allowed}")


@contextmanager
def about_the_model() -> Iterator[None]:
    """Says of what is wrong inside that the parameter `model` is."""
    try:
        yield
    except BadInput as error:
        error.param = "model"
        if isinstance(error, NotFound):
            error.code = "model_not_found"
        raise


def check_many(count: int, most: int, param: str) -> None:
    """Raises ParameterError where one request asks for more replies than the server gives to one."""
    if count > most:
        raise ParameterError(f"{count} replies are asked for at once; the most is {most}", param)
