"""Keywords of a suite's items, named by a language model.

Symbolic-MoE (Chen et al. 2025, arXiv:2503.05641): for each item the model lists two to five core skills, sampled five
times at temperature 0.7; keywords of at most 20 characters that more than one sample names are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xpert.experts.item_groups import ItemGroups, by_names, of_keywords
from xpert.experts.metrics import normalise
from xpert.judges import Judge, Question, open_judge
from xpert.progress import SILENT, Progress
from xpert.storage import cache_folder, hash_json, hash_texts

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = [
    "EngineAnswerer",
    "agreed_keywords",
    "check_keyword_model",
    "keyword_questions",
    "keywords_by_model",
    "keywords_in",
    "open_keyword_judge",
]

SAMPLES = 5
TEMPERATURE = 0.7
MAX_TOKENS = 40
MOST_PER_SAMPLE = 5
LONGEST = 20
EXCERPT = 1500
TEMPLATE = """Here is a task:

{prompt}

Which core knowledge, subjects or skills does one need to solve this task? Name 2 to 5 keywords of one or two words \
each, separated by commas. Do not solve the task. Write the keywords only.
Keywords:"""
_LABEL = re.compile(r"^\s*(?:[*_#]*\s*)?(?:the\s+)?key\s?words?(?:\s+are)?[*_]*\s*:", re.IGNORECASE)
_BORDER = re.compile(r"(?:^|\s)(?:\d{1,2}[.)]|[-*])\s|[,;•|\n]")


def keywords_by_model(prompts: Sequence[str], judge: Judge, least: int) -> ItemGroups:
    """Groups by keyword, each of `least` items or more; the 1,000 of most items.

    Replies are kept on disk by model and question, so that a stopped run goes on and a repeated one costs nothing.
    Cost: five replies of at most 40 tokens an item.
    """
    questions = keyword_questions(prompts)
    replies = judge.ask(questions, "naming keywords")
    own = agreed_keywords(replies)
    how: dict[str, Any] = {
        "by": "language model",
        "model": judge.answerer.identity,
        "samples": SAMPLES,
        "temperature": TEMPERATURE,
        "template": hash_texts([TEMPLATE]),
        "prompts": hash_texts(prompts),
        "least_items": least,
        "items_unnamed": sum(not names for names in own),
    }
    return of_keywords(by_names(own, least), how, items=len(prompts))


def keyword_questions(prompts: Sequence[str]) -> list[Question]:
    """Five questions an item, in their order. A prompt longer than 1,500 characters is shown without its middle."""
    return [
        Question(TEMPLATE.format(prompt=_excerpt(prompt)), TEMPERATURE, MAX_TOKENS, sample)
        for prompt in prompts
        for sample in range(SAMPLES)
    ]


def keywords_in(reply: str) -> list[str]:
    """The keywords a reply names, each once: in small letters, without punctuation at their ends, 2 to 20 characters,
    the first five. Only the reply's first lines up to an empty one count, after `Keywords:` where that stands there."""
    block = _LABEL.sub("", reply.strip()).strip().split("\n\n")[0]
    names = (normalise(part) for part in _BORDER.split(block))
    kept = (name for name in names if 2 <= len(name) <= LONGEST and any(letter.isalpha() for letter in name))
    return list(dict.fromkeys(kept))[:MOST_PER_SAMPLE]


def agreed_keywords(replies: Sequence[str]) -> list[list[str]]:
    """Replies to `keyword_questions` -> of each prompt the keywords of more than one sample, most named first."""
    found = []
    for at in range(0, len(replies), SAMPLES):
        counts = Counter(name for reply in replies[at : at + SAMPLES] for name in keywords_in(reply))
        found.append([name for name, count in counts.most_common() if count > 1])
    return found


def _excerpt(prompt: str) -> str:
    half = EXCERPT // 2
    return prompt if len(prompt) <= EXCERPT else f"{prompt[:half]} ... {prompt[-half:]}"


class EngineAnswerer:
    """The base model of an open engine as the one who is asked: many questions in one batch, without experts.

    Each question draws with a seed of its own content, so that its reply does not depend on the batch.
    """

    def __init__(self, lm: LanguageModel, engine: Any) -> None:
        self._lm, self._engine = lm, engine

    @property
    def identity(self) -> str:
        return f"engine {self._lm.fingerprint}"

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        from xpert.chat_form import encode_prompt
        from xpert.protocols import EngineRequest, Sampling
        from xpert.records import Message

        requests = []
        for number, question in enumerate(questions):
            seed = int(hash_json([question.text, question.sample])[:15], 16)
            sampling = Sampling(max_tokens=question.max_tokens, temperature=question.temperature, seed=seed)
            prompt = encode_prompt(self._lm.tokenizer, (Message("user", question.text),))
            requests.append(EngineRequest(str(number), prompt, (), sampling))
        texts: dict[int, list[str]] = {}
        for piece in self._engine.generate(requests):
            texts.setdefault(int(piece.request_id), []).append(piece.text)
            if piece.finished:
                yield int(piece.request_id), "".join(texts.pop(int(piece.request_id)))


def check_keyword_model(model: str | None) -> str | None:
    """The fingerprint of a model that is to be asked; None for an endpoint, and for the base. Called before the long
    work: raises NotFound or BadInput where there is no such model, Unavailable where a package is missing."""
    if model is None:
        return None
    if _is_endpoint(model):
        open_judge(model, cache=None)
        return None
    from xpert.model_files import model_fingerprint

    return model_fingerprint(model)


def open_keyword_judge(
    model: str | None,
    lm: LanguageModel,
    engine: Any,
    *,
    device: str = "auto",
    max_batch: int = 16,
    progress: Progress = SILENT,
) -> Judge:
    """Who names the keywords: `model` (a folder, hub name, .gguf file, or `http://HOST:PORT/v1#MODEL`), or without it
    the base model that stands open already, as it does where `model` has the same weights."""
    if model is not None and _is_endpoint(model):
        return open_judge(model, progress=progress)
    if model is not None and check_keyword_model(model) != lm.fingerprint:
        from xpert.experts.serving import open_engine

        lm, engine = open_engine(model, device=device, max_batch=max_batch, progress=progress)
    return Judge(EngineAnswerer(lm, engine), cache_folder() / "judgements", progress)


def _is_endpoint(model: str) -> bool:
    return model.startswith(("http://", "https://"))
