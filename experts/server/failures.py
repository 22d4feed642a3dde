"""Errors that only a server makes, each with its HTTP status and OpenAI's words for it."""

from __future__ import annotations

import math

from xpert.errors import BadInput, Unavailable, XpertError

__all__ = ["Busy", "Denied", "Forbidden", "Late", "TooLarge", "failure_headers"]


class Denied(BadInput):
    """The request's API key is missing or unknown."""

    http_status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(BadInput):
    """The key may not ask for this model."""

    http_status = 403
    kind = "permission_error"
    code = "model_not_allowed"


class TooLarge(BadInput):
    """The request's body is larger than the server takes."""

    http_status = 413
    code = "request_too_large"


class Busy(XpertError):
    """The queue is full, or the key's limit is reached; `retry_after` says in how many seconds to come again."""

    http_status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, what: str, *, retry_after: float, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.retry_after = retry_after


class Late(XpertError):
    """The request's deadline passed before its answer was whole."""

    http_status = 408
    kind = "timeout_error"
    code = "deadline_exceeded"


def failure_headers(error: XpertError) -> dict[str, str]:
    """What a reply with this error tells the client beside its body.

    `Retry-After` is in whole seconds, rounded up; `retry-after-ms`, which OpenAI's clients read first, is exact. After
    a body that was not read to its end the connection is of no more use, and one that is kept would hold up a stop.
    """
    if isinstance(error, Busy):
        seconds = max(error.retry_after, 0.001)
        return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    if isinstance(error, Denied):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, TooLarge | Late | Unavailable):
        return {"connection": "close"}
    return {}
