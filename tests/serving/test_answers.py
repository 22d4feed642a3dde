"""`mix`, `route` and `run`: answers equal plain peft's, runs go on where they stopped, mistakes are one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.experts.answering import answer_file
from xpert.experts.mixture_file import load_mixture
from xpert.experts.serving import MixtureRunner
from xpert.protocols import Sampling
from xpert.records import Message, Row
from xpert.registry.card import BaseModel
from xpert.registry.store import Registry

Run = Callable[..., Result]


def prompts_of(columns: Callable[..., Any], count: int) -> list[dict[str, Any]]:
    rows = columns(count, seed=7, skills=("casing", "arithmetic", "reversal"))
    return [{key: row[key] for key in ("id", "instruction", "input", "skill")} for row in rows]


def peft_greedy(base: Path, adapter: Path | None, messages: Sequence[Message], max_tokens: int) -> str:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )[0, ids.shape[1] :]
    # A character cut in half by the last token is no text; the engine leaves it out.
    return str(tokenizer.decode(out, skip_special_tokens=True)).rstrip("\ufffd")


def test_run_equals_plain_peft(
    xpert: Run,
    mixture_file: Callable[..., Path],
    write_jsonl: Callable[..., Path],
    columns: Callable[..., Any],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    far = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich"
    prompts = [*prompts_of(columns, 9), {"id": "far", "instruction": far, "input": "", "skill": "none"}]
    mixture = mixture_file(threshold=0.1)
    out = tmp_path / "answers.jsonl"
    result = xpert(
        "run", mixture, "--prompts", write_jsonl("p.jsonl", prompts), "-o", out, "--max-tokens", 12, "--max-batch", 4
    )
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in prompts]
    folders = {expert.key: expert.folder for expert in load_mixture(mixture).experts}
    for line, row in zip(lines, prompts, strict=True):
        assert [e["expert"] for e in line["experts"]] == ([] if row["id"] == "far" else [row["skill"]])
        text = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        adapter = folders.get(row["skill"])
        assert line["output"].rstrip("\ufffd") == peft_greedy(tiny_base, adapter, [Message("user", text)], 12)
        assert line["timings"].keys() == {"queued", "first_token", "total"}
        assert line["finished"] in ("stop", "length") and line["prompt_tokens"] > 0
    assert len({line["output"] for line in lines}) > 3


class Stopping(MixtureRunner):
    """Is interrupted after three answers."""

    def answer(self, rows: Any, sampling: Any, *, finished: Any = None, **rest: Any) -> Any:
        count = 0

        def counted(index: int, reply: Any) -> None:
            nonlocal count
            finished(index, reply)
            count += 1
            if count == 3:
                raise KeyboardInterrupt

        return super().answer(rows, sampling, finished=counted, **rest)


def test_an_interrupted_run_goes_on(mixture_file: Callable[..., Path], rows: list[Row], tmp_path: Path) -> None:
    mixture = load_mixture(mixture_file("random"))
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=5)
    options: dict[str, Any] = {"max_batch": 2}
    whole = answer_file(
        mixture, rows[:8], tmp_path / "whole", sampling, open_runner=lambda: MixtureRunner.open(mixture, **options)
    )
    out = tmp_path / "answers"
    with pytest.raises(KeyboardInterrupt):
        answer_file(mixture, rows[:8], out, sampling, open_runner=lambda: Stopping.open(mixture, **options))
    assert not out.exists()
    partial = tmp_path / ".answers.partial"
    partial.write_text(partial.read_text() + '{"index": 7, "rep')  # as a crash would leave it
    answered: list[int] = []

    class Counting(MixtureRunner):
        def answer(self, rows: Any, *arguments: Any, **rest: Any) -> Any:
            answered.append(len(rows))
            return super().answer(rows, *arguments, **rest)

    resumed = answer_file(mixture, rows[:8], out, sampling, open_runner=lambda: Counting.open(mixture, **options))
    assert answered == [5]
    assert [line["output"] for line in resumed] == [line["output"] for line in whole]
    assert not partial.exists() and out.read_text().count("\n") == 8


def test_other_inputs_do_not_take_up_old_answers(
    mixture_file: Callable[..., Path], rows: list[Row], tmp_path: Path
) -> None:
    mixture = load_mixture(mixture_file("random"))
    (tmp_path / ".out.partial").write_text('{"key": "of another run"}\n{"index": 0, "reply": {"output": "old"}}\n')
    lines = answer_file(
        mixture, rows[:2], tmp_path / "out", Sampling(max_tokens=2), open_runner=lambda: MixtureRunner.open(mixture)
    )
    assert "old" not in [line["output"] for line in lines]


def test_a_weighted_set_answers_together(make_expert: Callable[..., Path], tmp_path: Path) -> None:
    from xpert.experts.mixture import MixtureExpert, assemble, open_expert
    from xpert.experts.routing import MixtureRouter, route_request

    experts = [open_expert(make_expert("casing", seed=1)), open_expert(make_expert("city", seed=2))]
    weighted = [
        MixtureExpert(e.key, e.ref, e.fingerprint, e.folder, w) for e, w in zip(experts, (3.0, 1.0), strict=True)
    ]
    router = MixtureRouter(assemble(weighted, router="fixed"))
    (route,) = router.route([route_request(Row("1", (Message("user", "hello"),), ""))])
    assert route.experts == (("casing", 0.75), ("city", 0.25))


def test_mix_and_route(
    xpert: Run,
    make_expert: Callable[..., Path],
    write_jsonl: Callable[..., Path],
    columns: Callable[..., Any],
    tmp_path: Path,
) -> None:
    registry = Registry(tmp_path / "r")
    for seed, skill in enumerate(("casing", "arithmetic", "reversal"), 1):
        registry.publish(make_expert(skill, seed=seed), f"me/{skill}")
    out = tmp_path / "m.json"
    result = xpert("mix", "--registry", tmp_path / "r", "--param", "top=1", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert [e["ref"] for e in value["experts"]] == ["me/arithmetic@1", "me/casing@1", "me/reversal@1"]
    assert value["router"] == "centroid" and value["router_params"] == {"top": 1}
    prompts = prompts_of(columns, 12)
    result = xpert("route", out, "--prompts", write_jsonl("p.jsonl", prompts))
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["candidates"][0]["expert"] for line in lines] == [f"me/{row['skill']}" for row in prompts]
    assert sum(bool(line["experts"]) for line in lines) >= 11  # the threshold may refuse a rare one of its own
    assert all(len(line["candidates"]) == 3 and line["reason"] for line in lines)


def test_two_versions_of_one_expert(xpert: Run, make_expert: Callable[..., Path], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for seed in (1, 2):
        registry.publish(make_expert("casing", seed=seed), "me/casing")
    out = tmp_path / "m.json"
    result = xpert("mix", "--registry", tmp_path / "r", "--experts", "me/casing@1,me/casing@2", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert [e["key"] for e in json.loads(result.stdout)["experts"]] == ["me/casing@1", "me/casing@2"]


@pytest.fixture
def place(
    make_expert: Callable[..., Path],
    mixture_file: Callable[..., Path],
    write_jsonl: Callable[..., Path],
    base_model: BaseModel,
    tmp_path: Path,
) -> Path:
    """A folder in which the mistakes below can be made."""
    registry = Registry(tmp_path / "r")
    registry.publish(make_expert("casing", seed=1), "me/casing")
    registry.publish(make_expert("city", seed=2, base=BaseModel("some/other", "f" * 64)), "me/foreign")
    mixture_file()
    mixture_file("oracle", "oracle")
    write_jsonl("p.jsonl", [{"id": "a", "prompt": "Write the word in capitals.\n\nbaba"}])
    write_jsonl("long.jsonl", [{"id": "long", "prompt": "word " * 2000}])
    write_jsonl("empty.jsonl", [])
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mix --registry {0}/r -o {0}/m.json", "experts of different bases cannot be mixed: 'me/casing' belongs to"),
        ("mix --registry {0}/r --experts me/casign -o {0}/m.json", "me/casing"),
        ("mix --registry {0}/r --experts me/casing@9 -o {0}/m.json", "me/casing"),
        ("mix --registry {0}/r --experts , -o {0}/m.json", "at least one expert"),
        ("mix --registry {0}/r --experts {0}/nothing -o {0}/m.json", "no such expert folder"),
        ("mix --registry {0}/r --experts me/casing --router centriod -o {0}/m.json", "Did you mean 'centroid'"),
        ("mix --registry {0}/r --experts me/casing --param tpo=1 -o {0}/m.json", "Did you mean 'top'"),
        ("mix --registry {0}/r --experts me/casing --param top=0 -o {0}/m.json", "top is 0; the least is 1"),
        ("mix --registry {0}/r --experts me/casing --param top -o {0}/m.json", "is not KEY=VALUE"),
        ("mix --registry {0}/r --experts me/foreign --base {base} -o {0}/m.json", "belongs to base some/other"),
        ("mix --registry {0}/r --experts me/casing -o {0}/taken", "exists already"),
        ("mix --registry {0}/r --experts me/casing -o {0}/folder", "is a folder"),
        ("route {0}/thre.json --prompts {0}/p.jsonl", "three.json'"),
        ("route {0}/folde --prompts {0}/p.jsonl", "Give a mixture file, OWNER/NAME, or an expert folder"),
        ("route {0}/taken --prompts {0}/p.jsonl", "not valid JSON"),
        ("route {0}/three.json --prompts {0}/q.jsonl", "q.jsonl"),
        ("route {0}/three.json --prompts {0}/empty.jsonl", "empty.jsonl"),
        ("route {0}/oracle.json --prompts {0}/p.jsonl", "needs the skill of prompt 'a'"),
        ("run {0}/three.json --prompts {0}/p.jsonl -o {0}/taken", "exists already"),
        ("run {0}/three.json --prompts {0}/p.jsonl -o {0}/folder", "is a folder"),
        ("run {0}/three.json --prompts {0}/p.jsonl -o {0}/o --top-p 0", "--top-p"),
        ("run {0}/three.json --prompts {0}/p.jsonl -o {0}/o --temperature -1", "--temperature"),
        ("run {0}/three.json --prompts {0}/long.jsonl -o {0}/o", "prompt long: the prompt has"),
        ("run {0}/three.json --prompts {0}/p.jsonl -o {0}/o --base {0}/folder", "folder"),
        ("serve {0}/three.json --host 300.1.1.1", "300.1.1.1"),
        ("serve {0}/nothing.json", "no such mixture"),
    ],
)
def test_mistakes(line: str, message: str, xpert: Run, place: Path, base_model: BaseModel) -> None:
    result = xpert(*line.format(place, base=base_model.ref).split(" "))
    assert result.exit_code == 2, (result.exit_code, result.output)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("xpert") and message.lower() in last.lower(), last
    assert "Traceback" not in result.output
    assert not (place / "o").exists() and not (place / "m.json").exists()
