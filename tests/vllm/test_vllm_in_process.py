"""vLLM in this process, on a stand-in for its module: the names that are used, with documented parameters only."""

from __future__ import annotations

import asyncio
import enum
import sys
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput, Unavailable
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.experts.engines.vllm_engine import VllmEngine, VllmOptions
from xpert.language_model import LanguageModel
from xpert.protocols import Constraint, EngineRequest


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1


@dataclass
class StructuredOutputsParams:
    json: str | None = None
    regex: str | None = None
    choice: list[str] | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.json, self.regex, self.choice)) != 1:
            raise ValueError("exactly one constraint must be given")


@dataclass
class SamplingParams:
    """Those of vLLM's fields that the engine may set, with vLLM's defaults."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.logprob_token_ids is not None and self.logprobs != len(self.logprob_token_ids):
            raise ValueError("logprobs must equal len(logprob_token_ids)")


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class AsyncEngineArgs:
    model: str
    enable_lora: bool
    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int
    max_logprobs: int
    max_num_seqs: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    dtype: str
    enforce_eager: bool
    generation_config: str
    max_model_len: int = 512


class AsyncLLM:
    """Answers through the HTTP stand-in's model; `made` are all that were started."""

    made: list[AsyncLLM]
    stand_in: Any

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs) -> AsyncLLM:
        asyncio.get_running_loop()  # it must be made where it runs
        if args.dtype == "float99":
            raise ValueError("unknown dtype")
        engine = cls()
        engine.args = args
        engine.model_config = types.SimpleNamespace(max_model_len=args.max_model_len)
        engine.loras: dict[int, LoRARequest] = {}
        engine.aborted: list[str] = []
        engine.ids: list[str] = []
        engine.constraints: list[StructuredOutputsParams | None] = []
        engine.down = False
        cls.made.append(engine)
        return engine

    async def list_loras(self) -> set[int]:
        return set(self.loras)

    async def add_lora(self, request: LoRARequest) -> bool:
        status, reply = self.stand_in.load(request.lora_name, request.lora_path)
        if status != 200:
            raise ValueError(reply["error"]["message"])
        self.loras[request.lora_int_id] = request
        return True

    async def remove_lora(self, id: int) -> bool:
        self.stand_in.unload(self.loras.pop(id).lora_name)
        return True

    async def generate(
        self, prompt: dict[str, list[int]], params: SamplingParams, request_id: str, *, lora_request: LoRARequest | None
    ) -> AsyncIterator[Any]:
        assert set(prompt) == {"prompt_token_ids"} and request_id not in self.ids
        self.ids.append(request_id)
        self.constraints.append(params.structured_outputs)
        if self.down:
            raise RuntimeError("EngineDeadError")
        body: dict[str, Any] = {
            "model": "tiny" if lora_request is None else lora_request.lora_name,
            "prompt": prompt["prompt_token_ids"],
        }
        body |= {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
        body["seed"] = body["seed"] or 0
        try:
            for token, _, likeliest, reason in self.stand_in.tokens(body):
                await asyncio.sleep(self.stand_in.pause)
                if params.logprob_token_ids:
                    row = self.stand_in.logits(body["model"], body["prompt"])[-1].double().log_softmax(-1)
                    likeliest = {other: float(row[other]) for other in (token, *params.logprob_token_ids)}
                told = [{other: types.SimpleNamespace(logprob=value) for other, value in likeliest.items()}]
                output = types.SimpleNamespace(
                    token_ids=[token], finish_reason=reason, logprobs=None if params.logprobs is None else told
                )
                assert params.output_kind is RequestOutputKind.DELTA or reason
                yield types.SimpleNamespace(outputs=[output], finished=reason is not None)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def shutdown(self) -> None:
        self.down = True


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> Iterator[type[AsyncLLM]]:
    names: dict[str, dict[str, Any]] = {
        "vllm": {"AsyncEngineArgs": AsyncEngineArgs, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.sampling_params": {
            "RequestOutputKind": RequestOutputKind,
            "StructuredOutputsParams": StructuredOutputsParams,
        },
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(AsyncLLM, "made", [], raising=False)
    monkeypatch.setattr(AsyncLLM, "stand_in", stand_in, raising=False)
    yield AsyncLLM


@pytest.fixture
def local(vllm: type[AsyncLLM], lm: LanguageModel, folders: dict[str, Path], tmp_path: Path) -> Iterator[VllmEngine]:
    options = VllmOptions(max_lora_rank=64, adapter_folder=str(tmp_path / "made"), context=512, eager=True)
    engine = VllmEngine(lm, max_batch=4, options=options)
    for key, folder in folders.items():
        engine.add_expert(key, folder)
    yield engine
    engine.close()


def test_it_answers_as_the_torch_engine_does(
    local: VllmEngine, torch_engine: TorchEngine, ask: Callable[..., EngineRequest], replies: Callable[..., Any]
) -> None:
    sets = [(), (("a", 1.0),), (("a", 0.6), ("b", 0.4)), (("d", 1.0), ("c", -0.5))]
    asked = [ask(str(n), "Name the colour of snow", experts, stop=("zz",)) for n, experts in enumerate(sets)]
    assert replies(local, asked) == replies(torch_engine, asked)
    continuations = [(7, 8, 9)] * len(asked)
    wanted = torch_engine.continuation_logprobs(asked, continuations)
    for scores, expected in zip(local.continuation_logprobs(asked, continuations), wanted, strict=True):
        assert scores == pytest.approx(expected, abs=1e-4)


def test_how_it_is_started_and_ended(
    local: VllmEngine, vllm: type[AsyncLLM], ask: Callable[..., EngineRequest]
) -> None:
    (engine,) = vllm.made
    assert engine.args == AsyncEngineArgs(
        str(local.lm.folder), True, 64, 8, 64, 20, 4, 1, 0.9, "auto", True, generation_config="vllm", max_model_len=512
    )
    tokens = [t for piece in local.generate([ask("r", "x", (("a", 1.0),), logprobs=2)]) for t in piece.tokens]
    assert tokens and all(len(token.alternatives) == 2 for token in tokens)
    (request,) = engine.loras.values()
    assert request.lora_name.startswith("xpert-") and Path(request.lora_path).name in request.lora_name
    local.close()
    assert engine.down and not engine.loras


def test_constraints_become_structured_outputs(
    local: VllmEngine, vllm: type[AsyncLLM], ask: Callable[..., EngineRequest]
) -> None:
    given = [None, Constraint("regex", "a+"), Constraint("choice", '["a", "b"]'), Constraint("json")]
    for constraint in given:
        list(local.generate([replace(ask("r", "x"), constraint=constraint)]))
    assert vllm.made[0].constraints == [
        None,
        StructuredOutputsParams(regex="a+"),
        StructuredOutputsParams(choice=["a", "b"]),
        StructuredOutputsParams(json='{"type": "object"}'),
    ]


def test_cancelling_aborts_there(
    local: VllmEngine, vllm: type[AsyncLLM], stand_in: Any, ask: Callable[..., Any]
) -> None:
    stand_in.endless, stand_in.pause = True, 0.005
    session = local.session()
    session.submit(ask("r", "x", max_tokens=400))
    while not session.step():
        pass
    session.cancel("r")
    end = time.monotonic() + 10
    while not vllm.made[0].aborted and time.monotonic() < end:
        time.sleep(0.01)
    assert len(vllm.made[0].ids) == 1 and vllm.made[0].aborted == vllm.made[0].ids


def test_its_errors_become_ours(
    local: VllmEngine, vllm: type[AsyncLLM], lm: LanguageModel, stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    stand_in.max_lora_rank = 4
    with pytest.raises(BadInput, match=r"rank 8 is greater than max_lora_rank 4"):
        list(local.generate([ask("r", "x", (("b", 1.0),))]))
    vllm.made[0].down = True
    with pytest.raises(Unavailable, match="EngineDeadError"):
        list(local.generate([ask("r", "x")]))
    with pytest.raises(Unavailable, match="vLLM does not start: unknown dtype"):
        VllmEngine(lm, options=VllmOptions(dtype="float99"))
