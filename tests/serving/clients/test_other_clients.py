"""curl, `llm`, LangChain, LiteLLM and the evaluation harness against a running server, each in a process of its own.

Those that are large (LiteLLM, lm-eval) are not among the packages for tests; where they are installed they are run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from xpert.experts.mixture import Mixture
from xpert.experts.server.key_file import add_key

EXAMPLES = Path(__file__).parents[3] / "examples" / "clients"
SUM = "Add the two numbers.\n\n3 + 4"
MESSAGES = [{"role": "user", "content": SUM}]
RESTART = "<|im_end|>"


@pytest.fixture(scope="module")
def embedding(pair: Mixture, serve: Callable[..., Any]) -> Any:
    return serve(pair, embedder="base")


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(*command: object, cwd: Path, **environment: object) -> str:
    """What the command prints; its own settings and cache lie in `cwd`, and it may not reach the network's models."""
    own = {
        "HOME": cwd,
        "HF_HOME": cwd / "hf",
        "HF_HUB_OFFLINE": 1,
        "LLM_LOAD_PLUGINS": "",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": 1,
    }
    settings = os.environ | {name: str(value) for name, value in (own | environment).items()}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=settings, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


# ── curl ─────────────────────────────────────────────────────────────────────────────────────────────────────────

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_curl_asks_and_streams(embedding: Any, tmp_path: Path) -> None:
    def curl(**change: Any) -> tuple[str, str]:
        body = json.dumps({"model": "pair", "messages": MESSAGES, "max_tokens": 9, **change})
        head = ["curl", "-sS", "-N", "-i", f"{embedding.url}/v1/chat/completions"]
        said = run(*head, "-H", "Content-Type: application/json", "-d", body, cwd=tmp_path)
        headers, _, content = said.partition("\r\n\r\n")
        return headers, content

    headers, content = curl()
    expected = embedding.greedy("pair", SUM, 9)
    assert headers.startswith("HTTP/1.1 200 OK") and "x-xpert-experts: me/sums=1" in headers
    assert json.loads(content)["choices"][0]["message"]["content"] == expected
    headers, content = curl(stream=True)
    assert "content-type: text/event-stream; charset=utf-8" in headers
    events = content.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    headers, content = curl(max_tokens=0)
    assert headers.startswith("HTTP/1.1 400") and json.loads(content)["error"]["param"] == "max_tokens"


@needs_curl
def test_curl_sends_a_large_body_and_a_key(pair: Mixture, serve: Callable[..., Any], tmp_path: Path) -> None:
    """Above 1 MiB curl asks first, with `Expect: 100-continue`; one that is too large is refused unsent."""
    key = add_key(tmp_path / "keys.json", "ada")[1]
    served = serve(pair, api_keys=tmp_path / "keys.json", max_body=2 << 20)
    head = ["curl", "-sS", "-o", tmp_path / "reply", "-w", "%{http_code} %{size_upload}", f"{served.url}/v1/route"]
    json_type = ["-H", "Content-Type: application/json"]
    bearer = ["-H", f"Authorization: Bearer {key}"]

    def ask(size: int, *more: object) -> tuple[int, int]:
        file = tmp_path / "body.json"
        file.write_text(json.dumps({"messages": MESSAGES}) + " " * size)
        status, sent = run(*head, *json_type, "--data-binary", f"@{file}", *more, cwd=tmp_path).split()
        return int(status), int(sent)

    assert ask(0)[0] == 401
    assert ask(0, *bearer)[0] == 200
    status, sent = ask(3 << 19, *bearer, "-H", "Expect: 100-continue")
    assert status == 200 and sent > 3 << 19
    assert ask(3 << 20, *bearer, "-H", "Expect: 100-continue") == (413, 0)


# ── llm ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs("llm", "openai")
def test_llm_prompts_streams_and_asks_for_a_form(embedding: Any, tmp_path: Path) -> None:
    model = {"model_id": "desk", "model_name": "pair", "api_base": f"{embedding.url}/v1", "supports_schema": True}
    text = {"model_id": "desk-text", "model_name": "pair", "api_base": f"{embedding.url}/v1", "completion": True}
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump([model, text]))

    def llm(*arguments: object) -> str:
        command = [sys.executable, "-m", "llm", *arguments, "--key", "none"]
        return run(*command, cwd=tmp_path, LLM_USER_PATH=tmp_path).removesuffix("\n")

    expected = embedding.greedy("pair", SUM, 8)
    options = ["-o", "max_tokens", 8]
    assert llm("-m", "desk", *options, SUM) == llm("-m", "desk", "--no-stream", *options, SUM) == expected
    kinds = {"type": "object", "properties": {"kind": {"enum": ["good", "bad"]}}, "required": ["kind"]}
    formed = llm("-m", "desk", "-o", "max_tokens", 60, "--schema", json.dumps(kinds), SUM)
    assert json.loads(formed)["kind"] in ("good", "bad")
    assert llm("-m", "desk-text", *options, "Add the two")


# ── LangChain, LiteLLM ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("langchain_chat.py", marks=needs("langchain_openai")),
        pytest.param("litellm_calls.py", marks=needs("litellm")),
    ],
)
def test_the_examples_run(script: str, embedding: Any, tmp_path: Path) -> None:
    said = run(sys.executable, EXAMPLES / script, cwd=tmp_path, XPERT_URL=f"{embedding.url}/v1", XPERT_MODEL="pair")
    found = dict(line.split(" ", 1) for line in said.splitlines())
    expected = repr(embedding.greedy("pair", SUM, 16))
    assert found["whole"].startswith(expected) and found["stream"] == found["async"] == expected
    assert re.fullmatch("kind='(good|bad)' sure=(True|False)", found["form"])
    assert found["vectors"] in ("[64, 64]", "2")


# ── lm-eval ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def items(columns: Callable[..., Any]) -> list[dict[str, Any]]:
    """Eight sums, each with the right answer and two wrong ones."""
    rows = columns(8, seed=3, skills=("arithmetic",))
    return [
        {**row, "answers": [row["output"]], "choices": [row["output"], str(7 * i), str(90 - i)], "metric": "choice"}
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def harness(embedding: Any, items: list[dict[str, Any]], tiny_base: Path, tmp_path: Path) -> Callable[..., float]:
    """Runs a task of the examples on the items; its metric's value."""
    shutil.copytree(EXAMPLES / "lm_eval", tmp_path / "tasks")
    template = embedding.runner.lm.tokenizer

    def run_task(task: str, model: str, path: str, batch: int, *, chat: bool, **arguments: Any) -> float:
        with (tmp_path / "choice.jsonl").open("w") as file:
            for item in items:
                question = f"{item['instruction']}\n\n{item['input']}"
                if not chat:
                    message = [{"role": "user", "content": question}]
                    question = template.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                told = {"question": question, "choices": [choice + RESTART for choice in item["choices"]]}
                file.write(json.dumps({**told, "gold": 0, "answer": item["output"]}) + "\n")
        given = {"model": "me/sums", "base_url": f"{embedding.url}{path}", "num_concurrent": 4, **arguments}
        command = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", task, "--include_path", "tasks"]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
        command += ["--batch_size", str(batch), "--output_path", "out", *(["--apply_chat_template"] if chat else [])]
        run(*command, cwd=tmp_path, HF_DATASETS_CACHE=tmp_path / "data")
        (result,) = (tmp_path / "out").rglob("results_*.json")
        found = json.loads(result.read_text())["results"][task]
        result.unlink()
        return float(next(value for name, value in found.items() if name in ("acc,none", "exact_match,none")))

    return run_task


@needs("lm_eval", "tenacity")
@pytest.mark.parametrize(("tokenized", "batch", "chat"), [(True, 4, True), (False, 1, False)])
def test_the_harness_finds_the_accuracy_of_xpert_eval(
    tokenized: bool,
    batch: int,
    chat: bool,
    embedding: Any,
    harness: Callable[..., float],
    items: list[dict[str, Any]],
    tiny_base: Path,
    xpert: Callable[..., Any],
    write_jsonl: Callable[..., Path],
) -> None:
    expert = next(one for one in embedding.generations.current.mixture.experts if one.key == "me/sums")
    suite = write_jsonl("suite.jsonl", items)
    done = xpert("eval", expert.folder, "--suite", suite, "--max-tokens", 1, "--json")
    assert done.exit_code == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]["me/sums"]["skills"]["arithmetic"]
    accuracy = harness(
        "xpert_choice",
        "local-completions",
        "/v1/completions",
        batch,
        chat=chat,
        tokenizer=tiny_base,
        tokenized_requests=tokenized,
        max_length=512,
    )
    assert accuracy == pytest.approx(scores["choice"]["score"])
    assert 0 < accuracy < 1  # the items tell the two apart


@needs("lm_eval", "tenacity")
def test_the_harness_compares_replies(harness: Callable[..., float]) -> None:
    assert harness("xpert_reply", "local-chat-completions", "/v1/chat/completions", 1, chat=True) == 0
