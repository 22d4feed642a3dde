"""The errors of the Hub's client in our words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xpert.errors import BadInput, NotFound, Unavailable

__all__ = ["passing", "status_of", "translated"]

_PASSING = (408, 429, 500, 502, 503, 504)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an answer that the client raised as an error."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def passing(error: BaseException) -> bool:
    """Whether the same request may do better in a moment: no connection, or a server in trouble."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):  # how the client tells of a failed upload
        return passing(cause)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if isinstance(error, errors.HfHubHTTPError):
        return status in _PASSING
    # The root of the errors of the library below, whichever of its generations the client uses.
    root: type[Exception] = getattr(errors, "HTTPError")  # noqa: B009
    return isinstance(error, root)


def translated(error: BaseException, where: str) -> Exception | None:
    """One of our errors for one of the client's; None for what is a defect."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return translated(error.__cause__, where) or error
    if isinstance(error, errors.LocalTokenNotFoundError):
        return BadInput("the Hub asks who you are", where=where, hint=_LOG_IN)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unavailable("HF_HUB_OFFLINE is set, so the Hub is not asked", where=where, hint="unset it")
    if isinstance(error, errors.HFValidationError):
        return BadInput("the Hub allows no repository of that name", where=where, hint="choose another name")
    if isinstance(error, errors.GatedRepoError):
        return BadInput("its owner asks for consent", where=where, hint=f"accept its terms on the Hub, and {_LOG_IN}")
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, where)
    if isinstance(error, RuntimeError) or type(error).__module__.startswith("hf_xet"):  # so the uploading library fails
        return Unavailable(f"an upload failed: {_first_line(error)}", where=where, hint="publish it again")
    if isinstance(error, ValueError) and str(error).startswith("LFS batch API"):
        return BadInput(f"the Hub refuses a large file: {str(error).splitlines()[-1]}", where=where)
    if isinstance(error, ValueError) and "metadata" in str(error):
        line = str(error).splitlines()[-1].lstrip("- ")
        return BadInput(f"the Hub refuses the metadata of README.md: {line}", where=where, hint="correct README.md")
    if passing(error):
        return Unavailable(
            f"the Hub cannot be reached ({type(error).__name__})", where=where, hint="check your connection"
        )
    return None


def _refusal(error: Any, where: str) -> Exception:
    from huggingface_hub import errors

    status, said = status_of(error), str(getattr(error, "server_message", None) or "").splitlines()
    if status == 401 and said[:1] == ["Invalid credentials in Authorization header"]:
        return BadInput("the Hub does not know your token", where=where, hint=_LOG_IN)
    if status == 401:
        return BadInput("there is nothing there, or it is private and you are not logged in", where=where, hint=_LOG_IN)
    if status == 403:
        return BadInput(
            f"your token may not do this{_said(said)}",
            where=where,
            hint="use a token with write access to the namespace",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFound("there is no such repository, or your token does not see it", where=where)
    if status == 404:
        return NotFound("there is no such file or revision", where=where)
    if status == 429:
        return Unavailable("the Hub asks to come back later (429)", where=where, hint="wait some minutes")
    if status is not None and status >= 500:
        return Unavailable(f"the Hub is in trouble ({status})", where=where, hint="try again later")
    return BadInput(f"the Hub refuses it ({status}){_said(said)}", where=where)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _said(lines: Sequence[str]) -> str:
    return f": {lines[0][:200]}" if lines else ""
