"""A judge behind an OpenAI-compatible endpoint: many questions at once, each answer matched to its own question."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, NotFound, Unavailable, XpertError

if TYPE_CHECKING:
    from xpert.judges import Question

__all__ = ["Endpoint"]


class Endpoint:
    """Asks `model` at `url` over HTTP; see `xpert.judges.open_judge`."""

    def __init__(self, url: str, model: str, *, concurrency: int, timeout: float, retries: int) -> None:
        try:
            import openai
        except ImportError:
            raise Unavailable(
                "a judge at an endpoint needs the openai package", hint="pip install 'xpert-toolkit[judge]'"
            ) from None
        if concurrency < 1:
            raise BadInput(f"concurrency is {concurrency}; the least is 1")
        self.url, self.model, self.concurrency = url, model, concurrency
        # Servers of one's own want no key, the client wants one.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client: Any = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
        self._limit = "max_tokens"

    @property
    def identity(self) -> str:
        return f"{self.url}#{self.model}"

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        """Replies as they come. After a failure what waits is dropped, what runs is awaited, and then it is raised."""
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            # By future, never by the order in which they end.
            index_of: dict[Future[str], int] = {
                pool.submit(self._answer, question): index for index, question in enumerate(questions)
            }
            failure: BaseException | None = None
            for future in as_completed(index_of):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    yield index_of[future], future.result()
                elif failure is None:
                    failure = error
                    for waiting in index_of:
                        waiting.cancel()
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, question: Question) -> str:
        import openai

        try:
            try:
                return self._complete(question)
            except openai.BadRequestError as error:
                # Newer models of OpenAI's own want the limit under another name.
                if "max_completion_tokens" not in str(error) or self._limit == "max_completion_tokens":
                    raise
                self._limit = "max_completion_tokens"
                return self._complete(question)
        except openai.OpenAIError as error:
            raise self._told(error) from None

    def _complete(self, question: Question) -> str:
        reply = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question.text}],
            temperature=question.temperature,
            **{self._limit: question.max_tokens},
        )
        choices = getattr(reply, "choices", None)
        if not choices:
            raise Unavailable("the judge's reply is not a chat completion", where=self.url)
        return choices[0].message.content or ""

    def _told(self, error: Exception) -> XpertError:
        import openai

        where, said = self.identity, " ".join(str(error).split())[:300]
        match error:
            case openai.APITimeoutError():
                return Unavailable("the judge did not answer in time", where=where, hint="raise timeout=SECONDS")
            case openai.APIConnectionError():
                return Unavailable("the judge cannot be reached", where=where, hint="is the server running?")
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return BadInput(f"the judge refuses the key: {said}", where=where, hint="set OPENAI_API_KEY")
            case openai.NotFoundError():
                return NotFound(f"the judge knows no such model or path: {said}", where=where)
            case openai.BadRequestError() | openai.UnprocessableEntityError():
                return BadInput(f"the judge refuses the question: {said}", where=where)
        return Unavailable(f"the judge fails: {said}", where=where, hint="the same command goes on from there")
