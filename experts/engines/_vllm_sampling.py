"""A request in vLLM's words: its sampling parameters, and a refusal by name of what vLLM does not do.

Field by field, the left being xpert's `Sampling` and the right vLLM's `SamplingParams` (or its completions endpoint):

    max_tokens          max_tokens           the same
    temperature         temperature          0 is greedy in both; vLLM takes 0 and 0.01 to 2
    top_p, top_k        top_p, top_k         the same; top_k 0 is all
    min_p               min_p                the same
    repetition_penalty  repetition_penalty   the same: over prompt and reply
    seed                seed                 repeatable in each engine, but not the same text in both
    stop                stop                 the same; the text is cut before it by xpert itself
    logprobs            logprobs             the model's own, before penalties and temperature, in both
    (the base's ends)   stop_token_ids       what ends a reply in the base's chat form
    (the constraint)    structured_outputs   json, regex and choice; grammars of vLLM are of its backend's own kind

Every field is always sent: a server fills those left out from the model's own generation settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xpert.errors import BadInput
from xpert.experts.engines._constraints import check_constraint, choices_of
from xpert.experts.engines._sampling import check_sampling
from xpert.protocols import Constraint, EngineRequest, Sampling

__all__ = ["check_request", "constraint_fields", "sampling_fields", "scoring_fields"]

LEAST_TEMPERATURE = 0.01
"""vLLM raises temperatures between 0 and this one to it, and says so in its log alone."""
MOST_TEMPERATURE = 2.0


def check_request(request: EngineRequest, *, max_logprobs: int, where: str) -> None:
    """Raises BadInput for what makes no sense, and for what vLLM does not do or would silently change."""
    if request.gate is not None or request.gate_bias:
        raise BadInput(
            f"vLLM has one adapter for all tokens of a request, so the token gate {request.gate!r} cannot run on it",
            where=where,
            hint="use the torch-lora engine, or a mixture without a gate",
        )
    if request.contrast is not None:
        raise BadInput(
            f"vLLM chooses tokens from one distribution, so contrast decoding ({request.contrast.decoder}) cannot run "
            "on it",
            where=where,
            hint="use the torch-lora engine",
        )
    if request.constraint is not None:
        check_constraint(request.constraint, where=where)
        if request.constraint.kind == "lark":
            raise BadInput(
                "vLLM's grammars are of a kind that depends on its backend, so a lark grammar cannot run on it",
                where=where,
                hint="use the torch-lora engine, or a JSON schema or regular expression",
            )
    sampling = request.sampling
    check_sampling(sampling, where=where)
    if not (sampling.temperature == 0 or LEAST_TEMPERATURE <= sampling.temperature <= MOST_TEMPERATURE):
        raise BadInput(
            f"temperature is {sampling.temperature}; vLLM takes 0, and {LEAST_TEMPERATURE} to {MOST_TEMPERATURE:g}",
            where=where,
        )
    if sampling.seed is not None and sampling.seed >= 2**63:
        raise BadInput(f"seed is {sampling.seed}; vLLM takes less than 2^63", where=where)
    if sampling.logprobs is not None and sampling.logprobs > max_logprobs:
        raise BadInput(
            f"logprobs is {sampling.logprobs}; this vLLM tells at most {max_logprobs}",
            where=where,
            hint="start vLLM with --max-logprobs, and set max-logprobs here to the same",
        )
    if sampling.top_k < 0:
        raise BadInput(f"top-k is {sampling.top_k}; the least is 0, which is all", where=where)
    if not 0 <= sampling.min_p <= 1:
        raise BadInput(f"min-p is {sampling.min_p}; it must be 0 to 1", where=where)
    if not 0 < sampling.repetition_penalty < float("inf"):
        raise BadInput(f"repetition-penalty is {sampling.repetition_penalty}; it must be above 0", where=where)


def sampling_fields(sampling: Sampling, ends: Iterable[int], *, room: int) -> dict[str, Any]:
    """vLLM's sampling parameters of a checked request; `room` is what the context still holds."""
    fields: dict[str, Any] = {
        "max_tokens": min(sampling.max_tokens, room),
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": float(sampling.min_p),
        "repetition_penalty": float(sampling.repetition_penalty),
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(ends),
    }
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.logprobs is not None:
        fields["logprobs"] = sampling.logprobs
    return fields


def constraint_fields(constraint: Constraint | None) -> dict[str, Any]:
    """vLLM's parameter for a checked constraint; vLLM itself says what it does not take of a schema or expression."""
    if constraint is None:
        return {}
    if constraint.kind == "choice":
        return {"structured_outputs": {"choice": choices_of(constraint.text, where="constraint")}}
    if constraint.kind == "regex":
        return {"structured_outputs": {"regex": constraint.text}}
    return {"structured_outputs": {"json": constraint.text or '{"type": "object"}'}}


def scoring_fields(token: int) -> dict[str, Any]:
    """Parameters under which vLLM tells the log-probability of `token` as the next one.

    Not by `prompt_logprobs`, which would score a continuation in one request: with LoRA these are wrong where an
    adapter changes lm_head (vllm-project/vllm#51594), and end the engine in vLLM 0.32 on CPU.
    """
    neutral = sampling_fields(Sampling(max_tokens=1, logprobs=1), (), room=1)
    return {**neutral, "logprob_token_ids": [token]}
