"""A mixture in twenty lines: one engine, and a batch in which every request has its own weighted experts, or a gate.

    python examples/mixture_in_python.py --base MODEL --experts DIR DIR ... --prompt "Which country is Rome in?"

MODEL is a folder, a hub name or a .gguf file, each DIR an expert that `xpert train` made or any LoRA folder of peft.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from xpert import plugins
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import encode_prompt, load_model
from xpert.protocols import EngineRequest, Sampling
from xpert.records import Message


def run(base: str, folders: Sequence[Path], prompt: str, *, max_tokens: int = 64) -> dict[str, str]:
    """The replies of the base, of each expert, of their mean, and of Arrow's choice of two experts at every token."""
    lm = load_model(base)
    engine = TorchEngine(lm)
    for folder in folders:
        engine.add_expert(folder.name, folder)
    arrow = plugins.load("gate", "arrow")
    engine.add_gate("arrow", arrow(arrow.Options(top=2)))

    ids, sampling = encode_prompt(lm.tokenizer, [Message("user", prompt)]), Sampling(max_tokens=max_tokens)
    keys = sorted(engine.experts)
    requests = [EngineRequest("base", ids, (), sampling)]
    requests += [EngineRequest(key, ids, ((key, 1.0),), sampling) for key in keys]
    requests += [EngineRequest("mean", ids, tuple((key, 1 / len(keys)) for key in keys), sampling)]
    requests += [EngineRequest("gated", ids, tuple((key, 1.0) for key in keys), sampling, gate="arrow")]

    replies = {request.id: "" for request in requests}
    for piece in engine.generate(requests):  # one batch; pieces come as they are made
        replies[piece.request_id] += piece.text
    return replies


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--experts", nargs="+", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    for who, reply in run(given.base, given.experts, given.prompt, max_tokens=given.max_tokens).items():
        print(f"{who}: {reply!r}")


if __name__ == "__main__":
    main()
