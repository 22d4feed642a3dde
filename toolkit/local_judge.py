"""A judge in this process: batches of questions answered by a causal language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput
from xpert.progress import SILENT, Progress
from xpert.records import Message
from xpert.storage import hash_json

if TYPE_CHECKING:
    from xpert.judges import Question
    from xpert.language_model import LanguageModel

__all__ = ["LocalJudge"]

_BATCH_TOKENS = 8192


class LocalJudge:
    """Generates with `model`, loaded at the first question. Batches are padded on the left.

    Drawing (temperature above 0) uses a generator of each question's own, seeded by its content, so that a reply does
    not depend on the batch it was made in, but for rounding.
    """

    def __init__(self, model: str, *, device: str = "auto", progress: Progress = SILENT) -> None:
        self.model, self.device, self.progress = model, device, progress

    @cached_property
    def identity(self) -> str:
        from xpert.language_model import model_fingerprint

        return f"local {model_fingerprint(self.model)}"

    @cached_property
    def _lm(self) -> LanguageModel:
        from xpert.language_model import load_model

        return load_model(self.model, device=self.device, progress=self.progress)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        from xpert.answer_losses import context_limit
        from xpert.language_model import encode_prompt
        from xpert.linear_capture import length_batches

        lm = self._lm
        prompts = [encode_prompt(lm.tokenizer, (Message("user", question.text),)) for question in questions]
        limit = context_limit(lm, 1 << 30)
        lengths = [len(ids) + question.max_tokens for ids, question in zip(prompts, questions, strict=True)]
        longest = max(lengths, default=0)
        if longest > limit:
            raise BadInput(
                f"a question and its reply take {longest:,} tokens, the judge's context holds {limit:,}",
                where=self.model,
                hint="show it shorter texts (excerpt=CHARACTERS)",
            )
        for part in length_batches(lengths, _BATCH_TOKENS):
            batch = [questions[index] for index in part]
            for index, reply in zip(part, self._generate([prompts[index] for index in part], batch), strict=True):
                yield int(index), reply

    def _generate(self, prompts: Sequence[tuple[int, ...]], questions: Sequence[Question]) -> list[str]:
        import torch
        from transformers import GenerationConfig

        from xpert.language_model import quiet_transformers

        lm = self._lm
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), lm.tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask[row, width - len(prompt) :] = 1
        stops = sorted(lm.stop_ids)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(question.max_tokens for question in questions),
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=stops,
            pad_token_id=lm.tokenizer.pad_token_id or stops[0],
        )
        with torch.inference_mode(), quiet_transformers():
            made = lm.model.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=settings,
                logits_processor=[_noise(questions)],
            )
        replies = []
        for tokens, question in zip(made[:, width:].tolist(), questions, strict=True):
            end = next((place for place, token in enumerate(tokens) if token in lm.stop_ids), len(tokens))
            kept = tokens[: min(end, question.max_tokens)]
            replies.append(str(lm.tokenizer.decode(kept, skip_special_tokens=True)).strip())
        return replies


def _noise(questions: Sequence[Question]) -> Any:
    """A logits processor: greedy choice of logits/temperature + Gumbel noise is a draw from the softmax."""
    import torch

    drawn = [row for row, question in enumerate(questions) if question.temperature > 0]
    generators = {}
    for row in drawn:
        seed = int(hash_json([questions[row].text, questions[row].sample])[:15], 16)
        generators[row] = torch.Generator().manual_seed(seed)

    def process(_: Any, scores: Any) -> Any:
        if not drawn:
            return scores
        scores = scores.float().clone()
        for row in drawn:
            waits = torch.empty(scores.shape[1]).exponential_(generator=generators[row])
            scores[row] = scores[row] / questions[row].temperature - waits.log().to(scores.device)
        return scores

    return process
