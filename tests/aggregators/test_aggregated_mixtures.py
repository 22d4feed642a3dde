"""A mixture with an aggregator: in its file, at the command line, in the runner, in evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import BadInput
from xpert.experts.aggregated import check_aggregator, most_experts, with_aggregator
from xpert.experts.mixture import AggregatorChoice, GateChoice, Mixture
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.protocols import Question, Route, Sampling
from xpert.records import Row

Run = Callable[..., Result]
SHORT = Sampling(max_tokens=5, seed=0)


@pytest.fixture
def mixture(three: Path) -> Mixture:
    return load_mixture(three)


@pytest.fixture
def prompts(columns: Callable[..., Any], write_jsonl: Callable[..., Path]) -> Path:
    rows = columns(5, seed=7, skills=("casing", "arithmetic"))
    return write_jsonl("p.jsonl", [{key: row[key] for key in ("id", "instruction", "input")} for row in rows])


@pytest.fixture
def answered(columns: Callable[..., Any], write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl("rows.jsonl", columns(8, skills=("casing",)))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_aggregator_survives_its_file(mixture: Mixture, tmp_path: Path) -> None:
    chosen = with_aggregator(mixture, AggregatorChoice("b4", {"forms": 2}))
    write_mixture(tmp_path / "m.json", chosen)
    assert json.loads((tmp_path / "m.json").read_text())["schema"] == 3
    assert load_mixture(tmp_path / "m.json").aggregator == AggregatorChoice("b4", {"forms": 2})
    assert with_aggregator(chosen, None) == mixture


def test_a_gate_and_an_aggregator_exclude_each_other(mixture: Mixture) -> None:
    import dataclasses

    gated = dataclasses.replace(mixture, gate=GateChoice("arrow"))
    with pytest.raises(BadInput, match="gate arrow and aggregator majority exclude each other"):
        with_aggregator(gated, AggregatorChoice("majority"))


@pytest.mark.parametrize(
    ("router", "params", "most"),
    [
        ("fixed", {}, 3),
        ("fixed", {"expert": "casing"}, 1),
        ("fixed", {"weights": ("casing:1", "reversal:2")}, 2),
        ("oracle", {}, 1),
        ("centroid", {}, 1),
        ("centroid", {"top": 2}, 2),
        ("random", {"top": 9}, 3),
    ],
)
def test_how_many_experts_a_route_may_name(mixture: Mixture, router: str, params: dict[str, Any], most: int) -> None:
    import dataclasses

    changed = dataclasses.replace(mixture, router=router, router_params=params)
    assert most_experts(changed) == most
    voting = dataclasses.replace(changed, aggregator=AggregatorChoice("majority"))
    sampling = dataclasses.replace(changed, aggregator=AggregatorChoice("complexity"))
    check_aggregator(sampling)
    if most > 1:
        check_aggregator(voting)
    else:
        with pytest.raises(BadInput, match=f"aggregator majority .* router {router} names one expert"):
            check_aggregator(voting)


def test_runs_answer_by_votes_of_experts(xpert: Run, three: Path, prompts: Path, tmp_path: Path) -> None:
    from xpert.data import read_prompts
    from xpert.experts.serving import MixtureRunner

    out = tmp_path / "a.jsonl"
    arguments = ("run", three, "--prompts", prompts, "--max-tokens", 5, "--max-batch", 4, "--quiet")
    told = xpert(*arguments, "-o", out, "--aggregator", "majority", "--aggregator-param", "by=whole")
    assert told.exit_code == 0, told.stderr
    runner = MixtureRunner.open(load_mixture(three), max_batch=1)
    rows = read_prompts(prompts)
    for row, line in zip(rows, lines_of(out), strict=True):
        assert line["id"] == row.id and set(line["timings"]) == {"total"}
        assert line["aggregated"].keys() == {"by", "reason", "replies", "log"}
        assert line["aggregated"]["by"] == "majority" and line["aggregated"]["replies"] == 3
        votes = line["aggregated"]["log"]["votes"]
        requests = [
            runner.engine_request(key, row.messages, ((key, 1.0),), SHORT) for key in sorted(runner.mixture.keys)
        ]
        alone: dict[str, str] = {}
        for piece in runner.engine.generate(requests):
            alone[piece.request_id] = alone.get(piece.request_id, "") + piece.text
        assert {vote["experts"][0]: vote["text"] for vote in votes} == alone
        assert line["output"] in alone.values() and line["completion_tokens"] <= 15
        assert all(alone[one["expert"]] for one in line["experts"])
    runner.close()
    told = xpert(*arguments, "-o", tmp_path / "b.jsonl", "--aggregator", "none")
    assert told.exit_code == 0 and "aggregated" not in lines_of(tmp_path / "b.jsonl")[0]


def test_a_batch_of_the_engine_equals_one_by_one(mixture: Mixture, rows: list[Row]) -> None:
    from xpert.experts.aggregated import open_aggregator
    from xpert.experts.aggregating import aggregate, model_encoding
    from xpert.experts.serving import load_engine

    lm, engine = load_engine(mixture, device="cpu", max_batch=8)
    encoding = model_encoding(lm.tokenizer, engine.context)
    shares = (("arithmetic", 1 / 3), ("casing", 1 / 3), ("reversal", 1 / 3))
    questions = [Question(row.id, row.messages, Route(shares, (), ""), SHORT) for row in rows[:4]]
    for name, params in (("majority", {}), ("b4", {"forms": 1}), ("expert", {}), ("choice-shuffle", {})):
        aggregator = open_aggregator(with_aggregator(mixture, AggregatorChoice(name, params)))
        assert aggregator is not None
        together = [dialogue.verdict for dialogue in aggregate(engine, encoding, aggregator, questions)]
        for question, verdict in zip(questions, together, strict=True):
            alone = aggregate(engine, encoding, aggregator, [question])[0].verdict
            assert alone is not None and verdict is not None
            assert (alone.text, alone.experts, alone.reason) == (verdict.text, verdict.experts, verdict.reason), name
    engine.close()


def test_sampled_answers_do_not_depend_on_the_rows_beside_them(mixture: Mixture, rows: list[Row]) -> None:
    from xpert.experts.serving import MixtureRunner

    sampling = Sampling(max_tokens=4, seed=5)
    chosen = with_aggregator(mixture, AggregatorChoice("complexity", {"samples": 3, "keep": 3}))
    runner = MixtureRunner.open(chosen, max_batch=8)
    whole = runner.answer(rows[:4], sampling)
    again = runner.answer(rows[2:4], sampling, numbers=[2, 3])
    assert [reply.output for reply in again] == [reply.output for reply in whole[2:]]
    assert [reply.aggregated for reply in again] == [reply.aggregated for reply in whole[2:]]
    texts = [vote["text"] for reply in whole for vote in (reply.aggregated or {})["log"]["votes"]]
    assert len(set(texts)) > 4, "samples differ"
    runner.close()


def test_an_interrupted_run_is_not_taken_up_by_another_aggregator_or_with_other_choices(
    mixture: Mixture, rows: list[Row], tmp_path: Path
) -> None:
    from xpert.experts.answering import answer_file
    from xpert.experts.serving import MixtureRunner

    class Stopping(MixtureRunner):
        def answer(self, rows: Any, sampling: Any, *, finished: Any = None, **rest: Any) -> Any:
            def stopped(index: int, reply: Any) -> None:
                finished(index, reply)
                raise KeyboardInterrupt

            return super().answer(rows, sampling, finished=stopped, **rest)

    voting = with_aggregator(mixture, AggregatorChoice("majority"))
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(voting, rows[:3], out, SHORT, open_runner=lambda: Stopping.open(voting))
    assert (tmp_path / ".a.jsonl.partial").read_text().count("\n") == 2
    lines = answer_file(mixture, rows[:3], out, SHORT, open_runner=lambda: MixtureRunner.open(mixture))
    assert not any("aggregated" in line for line in lines)

    out = tmp_path / "b.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(voting, rows[:3], out, SHORT, open_runner=lambda: Stopping.open(voting))
    among = [replace(row, columns={"choices": ["yes", "no"]}) for row in rows[:3]]
    lines = answer_file(voting, among, out, SHORT, open_runner=lambda: MixtureRunner.open(voting))
    assert [line["aggregated"]["log"]["by"] for line in lines] == ["choice"] * 3


def test_evaluations_score_what_the_aggregator_says(mixture: Mixture, rows: list[Row]) -> None:
    from xpert.experts.evaluate import EvalOptions
    from xpert.experts.serving import MixtureRunner
    from xpert.experts.subjects import Entrant, run_entrants
    from xpert.records import SuiteItem

    voting = with_aggregator(mixture, AggregatorChoice("majority"))
    runner = MixtureRunner.open(voting)
    replies = runner.answer(rows[:4], SHORT)
    runner.close()
    items = [
        SuiteItem(row, (reply.output if n else "never said",), "exact", "s")
        for n, (row, reply) in enumerate(zip(rows[:4], replies, strict=True))
    ]
    entrants = [Entrant("voting", mixture.base.ref, voting), Entrant("mixed", mixture.base.ref, mixture)]
    found = run_entrants(entrants, items, EvalOptions(max_tokens=5))
    assert [result.score for result in found.results["voting"]] == [0.0, 1.0, 1.0, 1.0]
    assert [result.output for result in found.results["voting"]] == [reply.output for reply in replies]
    assert found.generated == 4 * 3 + 4
    fingerprints = {expert.key: expert.fingerprint[:12] for expert in mixture.experts}
    for result, reply in zip(found.results["voting"], replies, strict=True):
        assert result.experts == tuple((f"{key}@{fingerprints[key]}", w) for key, w in reply.route.experts)


def test_the_choices_of_a_row_are_the_questions(mixture: Mixture) -> None:
    from xpert.experts.aggregated import choices_of, question_of
    from xpert.records import Message

    def row(choices: Any) -> Row:
        return Row("r", (Message("user", "?"),), "", None, {"choices": choices})

    assert choices_of(row(["a", "b"])) == ("a", "b")
    assert [choices_of(row(value)) for value in (None, "ab", ["a", 1], ["a", " "], [])] == [()] * 5
    asked = question_of(row(["a", "b"]), Route((), (), ""), SHORT)
    assert asked.choices == ("a", "b")
    assert question_of(row(["a", "b"]), Route((), (), ""), SHORT, ["c"]).choices == ("c",)


# mix/run: options -> a part of the one line. {a} {b} are experts' folders.
MISTAKES = {
    "mix --experts {a},{b} --aggregator majority -o {o}": "router centroid names one expert. Give --param top=3",
    "mix --experts {a} --router fixed --aggregator majority -o {o}": "the mixture has one expert",
    "mix --experts {a},{b} --router fixed --aggregator majorty -o {o}": "Did you mean 'majority'",
    "mix --experts {a},{b} --router fixed --aggregator-param by=whole -o {o}": "--aggregator-param needs an aggregator",
    "mix --experts {a},{b} --router fixed --aggregator majority --aggregator-param bu=1 -o {o}": "Did you mean 'by'",
    "mix --experts {a},{b} --router fixed --aggregator majority --aggregator-param by -o {o}": "is not KEY=VALUE",
    "mix --experts {a},{b} --router fixed --aggregator expert --aggregator-param expert=casng -o {o}": "'casing'",
    "mix --experts {a},{b} --router cascade --param threshold=0.5 --aggregator b4 -o {o}": "a second stage and an",
    "mix --experts {a},{b} --router fixed --aggregator b4 --gate arrow -o {o}": "exclude each other",
    "run {three} --prompts {p} -o {o} --aggregator majorty": "Did you mean 'majority'",
    "run {three} --prompts {p} -o {o} --aggregator-param by=whole": "--aggregator-param needs an aggregator",
    "run {three} --prompts {p} -o {o} --aggregator expert --aggregator-param expert=auto": "xpert aggregator choose",
    "run {three} --prompts {p} -o {o} --aggregator none --aggregator-param by=whole": "needs an aggregator",
    "run {a} --prompts {p} -o {o} --aggregator weighted": "the mixture has one expert",
    "distil {voting} --rows {rows} -o {o}": "aggregator majority makes replies of replies",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(
    line: str, xpert: Run, three: Path, mixture: Mixture, prompts: Path, answered: Path, tmp_path: Path
) -> None:
    folders = [expert.folder for expert in mixture.experts]
    voting = tmp_path / "voting.json"
    write_mixture(voting, with_aggregator(mixture, AggregatorChoice("majority")))
    places = {"a": folders[0], "b": folders[1], "three": three, "p": prompts, "o": tmp_path / "out"}
    places |= {"voting": voting, "rows": answered}
    told = xpert(*line.format(**places).split(), "--quiet")
    assert told.exit_code == 2, told.stderr
    assert MISTAKES[line] in told.stderr and told.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_mixing_with_an_aggregator(xpert: Run, mixture: Mixture, tmp_path: Path) -> None:
    folders = ",".join(str(expert.folder) for expert in mixture.experts)
    out = tmp_path / "m.json"
    told = xpert(
        *("mix", "--experts", folders, "--param", "top=2", "--aggregator", "cook"),
        *("--aggregator-param", "top=1", "--aggregator-param", "mode=top-down", "-o", out),
    )
    assert told.exit_code == 0, told.stderr
    assert "behind router centroid, with aggregator cook" in told.stdout
    assert load_mixture(out).aggregator == AggregatorChoice("cook", {"top": 1, "mode": "top-down"})
    later = tmp_path / "later.json"
    told = xpert(
        *("mix", "--experts", folders, "--router", "fixed", "--aggregator", "expert"),
        *("--aggregator-param", "expert=auto", "-o", later),
    )
    assert told.exit_code == 0, "who aggregates may be chosen after the mixture is made"


def test_the_evaluation_command_puts_votes_beside_experts(
    xpert: Run, mixture: Mixture, columns: Callable[..., Any], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = columns(4, skills=("casing", "reversal"))
    items = [{"id": r["id"], "prompt": r["input"], "skill": r["skill"], "answers": [r["output"]]} for r in rows]
    items[0] |= {"metric": "choice", "choices": [rows[0]["output"], "other"]}
    suite, path = write_jsonl("s.jsonl", items), tmp_path / "voting.json"
    write_mixture(path, with_aggregator(mixture, AggregatorChoice("majority")))
    told = xpert(
        *("eval", path, "--suite", suite, "--controls", "--max-tokens", 4),
        *("-o", tmp_path / "r.html", "--json", "--quiet"),
    )
    assert told.exit_code == 0, told.stderr
    scores = json.loads(told.stdout)["scores"]
    assert {"three", "base", "casing", "arithmetic", "reversal", "oracle routing"} < scores.keys()
    assert scores["three"]["skills"]["casing"]["choice"] is None
    assert scores["casing"]["skills"]["casing"]["choice"] is not None
    assert (tmp_path / "r.html").stat().st_size > 1000


def test_one_expert_that_samples_is_not_called_by_the_experts_name(mixture: Mixture, tmp_path: Path) -> None:
    import dataclasses

    from xpert.experts.subjects import open_entrants

    alone = dataclasses.replace(mixture, experts=mixture.experts[:1], name="sampled")
    write_mixture(tmp_path / "alone.json", alone)
    write_mixture(tmp_path / "sampled.json", with_aggregator(alone, AggregatorChoice("complexity")))
    names = [one.name for one in open_entrants([str(tmp_path / "alone.json"), str(tmp_path / "sampled.json")])]
    assert names == ["casing", "sampled"]


def test_training_a_gate_leaves_the_aggregator_out(mixture: Mixture, answered: Path, tmp_path: Path) -> None:
    from xpert.experts.mixture_training import train_mixture
    from xpert.experts.train_options import TrainOptions

    voting = tmp_path / "voting.json"
    write_mixture(voting, with_aggregator(mixture, AggregatorChoice("majority")))
    options = TrainOptions(max_steps=1, batch_size=2)
    out = train_mixture(answered, voting, "softmax-top-k", tmp_path / "out", options, device="cpu")
    found = load_mixture(out)
    assert found.aggregator is None and found.gate is not None
