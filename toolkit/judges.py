"""Judges: language models that are asked a question in words, in this process or at an endpoint.

    judge = open_judge("http://localhost:8000/v1#my-model")      # or open_judge("HuggingFaceTB/SmolLM2-135M-Instruct")
    judge.ask([Question("Which is better, A or B? ...")])        # one reply a question, in their order

Every reply is kept on disk under the judge and the question, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.storage import cache_folder, disk_errors, hash_json

__all__ = ["Answerer", "Judge", "Question", "open_judge"]

_USER_CACHE: Any = object()


@dataclass(frozen=True)
class Question:
    """What a judge is asked. Temperature 0 is greedy; `sample` tells repeated questions apart."""

    text: str
    temperature: float = 0.0
    max_tokens: int = 64
    sample: int = 0


class Answerer(Protocol):
    """What answers: `identity` names the model in the cache's keys."""

    @property
    def identity(self) -> str: ...

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        """(index of the question, reply), each once, in any order, as they are ready."""


def open_judge(
    spec: str,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
    cache: Path | None = _USER_CACHE,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
) -> Judge:
    """`http://HOST:PORT/v1#MODEL`: an OpenAI-compatible endpoint; `local:MODEL` or `MODEL`: a model in this process.

    An endpoint is asked `concurrency` questions at once, each tried `retries` times more where it fails; the key is
    read from OPENAI_API_KEY. `cache`: the folder of the kept replies, None for none. Raises BadInput for a spec that
    cannot be read, Unavailable where the openai package is missing.
    """
    name = spec.strip()
    answerer: Answerer
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        if not model:
            raise BadInput(f"judge {spec!r} names no model", hint="write http://HOST:PORT/v1#MODEL")
        from xpert.endpoint_judge import Endpoint

        answerer = Endpoint(url, model, concurrency=concurrency, timeout=timeout, retries=retries)
    else:
        model = name.removeprefix("local:")
        if not model or "#" in model or "://" in model:
            raise BadInput(f"judge {spec!r} is not understood", hint="write http://HOST:PORT/v1#MODEL, or local:MODEL")
        from xpert.local_judge import LocalJudge

        answerer = LocalJudge(model, device=device, progress=progress)
    return Judge(answerer, cache_folder() / "judgements" if cache is _USER_CACHE else cache, progress)


class Judge:
    """Asks, and keeps what was answered. `asked` counts the questions that were not answered before."""

    def __init__(self, answerer: Answerer, cache: Path | None = None, progress: Progress = SILENT) -> None:
        self.answerer = answerer
        self.progress = progress
        self.asked = 0
        name = f"{hash_json({'judge': answerer.identity, 'form': 1})[:32]}.jsonl"
        self._kept = _Replies(cache / name if cache is not None else None)

    def ask(self, questions: Sequence[Question], title: str = "judgements") -> list[str]:
        """The replies, one per question, in their order; a question asked twice is answered once.

        Raises Unavailable where the judge cannot be reached; what it answered before that is kept.
        """
        keys = [hash_json(asdict(question)) for question in questions]
        new: dict[str, Question] = {}
        for key, question in zip(keys, questions, strict=True):
            if key not in self._kept.found:
                new.setdefault(key, question)
        pending = list(new)
        if pending:
            with self.progress.task(title, len(pending)) as task:
                for index, reply in self.answerer.answers(list(new.values())):
                    self._kept.add(pending[index], reply)
                    self.asked += 1
                    task.advance()
        return [self._kept.found[key] for key in keys]


class _Replies:
    """Replies by key: a file of JSON lines that only grows, read whole. A line cut short by a stop is passed over."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, str] = {}
        self._whole = True
        if path is None or not path.is_file():
            return
        data = path.read_bytes()
        self._whole = data.endswith(b"\n") or not data
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                self.found[str(entry["key"])] = str(entry["reply"])
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: str, reply: str) -> None:
        self.found[key] = reply
        if self.path is None:
            return
        line = json.dumps({"key": key, "reply": reply}, ensure_ascii=True).encode() + b"\n"
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file that is appended to: two processes do not mix their lines.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line if self._whole else b"\n" + line)
            finally:
                os.close(file)
        self._whole = True
