"""`xpert shots`: rows picked to be labelled, exemplars in order, and what a user may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from xpert import plugins
from xpert.data import pool_from_rows, read_prompts, read_shots
from xpert.errors import BadInput
from xpert.exemplars.confusing import conditions_and_question
from xpert.features import FeatureOptions
from xpert.protocols import Exemplars
from xpert.records import Message, Row, Shots
from xpert.shot_ordering import choose_exemplars, order_shots
from xpert.shot_picking import open_unlabelled, pick_rows

Run = Callable[..., Result]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(name: str, prompt: str, answer: str = "yes") -> Row:
    return Row(name, (Message("user", prompt),), answer)


@pytest.fixture
def unlabelled(columns: Callable[..., Any], write_jsonl: Callable[..., Path]) -> Path:
    rows = [{k: v for k, v in one.items() if k != "output"} for one in columns(60)]
    return write_jsonl("unlabelled.jsonl", [*rows, {**rows[3], "id": "again"}])


@pytest.fixture
def shots(columns: Callable[..., Any], write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl("shots.jsonl", columns(12, seed=1))


@pytest.fixture
def queries(columns: Callable[..., Any], write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl("queries.jsonl", columns(5, seed=2))


# ── pick ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# Those that a pool without answers, shots or a model allows.
PICKERS = [
    name
    for name in plugins.names("selector")
    if not plugins.load("selector", name).needs & {"shots", "base", "judge"} and name not in plugins.names("scorer")
]


@pytest.mark.parametrize("method", PICKERS)
def test_what_is_picked_is_labelled_and_read_as_shots(
    method: str, xpert: Run, unlabelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "picked.jsonl"
    done = xpert("shots", "pick", unlabelled, "--method", method, "--count", 6, "-o", out, "--clusters", 4, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    lines = lines_of(out)
    assert [line["id"] for line in lines] == value["ids"]
    assert len({line["id"] for line in lines}) == 6 == value["rows"]
    assert value["pool_rows"] == 60
    assert value["repeats_left_out"] == 1
    assert all(line["completion"] == "" and line["_xpert"]["reason"] for line in lines)
    source = {row.id: row for row in read_prompts(unlabelled)}
    assert all(line["prompt"] == source[line["id"]].prompt for line in lines)
    manifest = json.loads((tmp_path / "picked.manifest.json").read_text())
    assert manifest["config"]["method"] == method
    assert manifest["kind"] == "shots to label"

    with pytest.raises(BadInput, match="line 1 has no answer"):
        read_shots(out)
    for line in lines:
        line["completion"] = f"label of {line['id']}"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    labelled = read_shots(out)
    assert [row.response for row in labelled] == [f"label of {line['id']}" for line in lines]
    assert [row.id for row in labelled] == [line["id"] for line in lines]
    assert [row.skill for row in labelled] == [source[line["id"]].skill for line in lines]


def test_picking_again_gives_the_same_file(xpert: Run, unlabelled: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        xpert(
            "shots",
            "pick",
            unlabelled,
            "--method",
            "random",
            "--count",
            9,
            "--seed",
            3,
            "-o",
            tmp_path / f"{name}.jsonl",
        )
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_turns_and_answers_of_a_labelled_pool(tmp_path: Path) -> None:
    turns = (Message("system", "Be brief."), Message("user", "a?"), Message("assistant", "A"), Message("user", "b?"))
    rows = [Row("t", turns, "kept from the labeller"), asked("u", "c?", ""), asked("v", " C?\n", "")]
    found = pick_rows(pool_from_rows(rows), count=2, method="random", out=tmp_path / "out.jsonl")
    assert found.figures["repeats_left_out"] == 1
    by_id = {line["id"]: line for line in lines_of(tmp_path / "out.jsonl")}
    assert by_id["t"]["prompt"] == [{"role": turn.role, "content": turn.content} for turn in turns]
    assert "kept from" not in (tmp_path / "out.jsonl").read_text()
    by_id["t"]["completion"] = "B"
    (tmp_path / "out.jsonl").write_text(json.dumps(by_id["t"]))
    [row] = read_shots(tmp_path / "out.jsonl")
    assert row.messages == turns
    assert row.response == "B"


def test_a_pool_folder_is_read_as_it_is(xpert: Run, columns: Any, write_jsonl: Any, tmp_path: Path) -> None:
    xpert("pool", "build", write_jsonl("pool.jsonl", columns(30)), "-o", tmp_path / "pool")
    whole, repeats = open_unlabelled(tmp_path / "pool")
    assert (len(whole), repeats) == (30, 0)
    done = xpert("shots", "pick", tmp_path / "pool", "--count", 3, "-o", tmp_path / "p.jsonl", "--map", "prompt=ask")
    assert "takes no options" in done.stderr
    done = xpert("shots", "pick", tmp_path / "pool", "--method", "length", "--count", 3, "-o", tmp_path / "p.jsonl")
    assert done.exit_code == 0  # its rows have answers


def test_columns_of_other_names(write_jsonl: Any, xpert: Run, tmp_path: Path) -> None:
    pool = write_jsonl("ask.jsonl", [{"ask": f"how many {word}?"} for word in ("eggs", "hens", "cows")])
    out = tmp_path / "o.jsonl"
    done = xpert("shots", "pick", pool, "--map", "prompt=ask", "--method", "random", "--count", 2, "-o", out)
    assert done.exit_code == 0, done.output
    assert {line["prompt"] for line in lines_of(out)} < {"how many eggs?", "how many hens?", "how many cows?"}


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("confusing", ["-p", "by=loss"]),
        ("confusing", ["-p", "by=entropy"]),
        ("search", ["-p", "rounds=4"]),
        ("search", ["-p", "rounds=4", "-p", "reward=accuracy"]),
        ("ease", ["-p", "rounds=4", "-p", "first=2", "-p", "candidates=20", "-p", "kept=5", "-p", "steps=5"]),
    ],
)
def test_exemplars_are_shots_in_an_order(
    method: str, extra: list[str], xpert: Run, shots: Path, queries: Path, tiny_base: Path, tmp_path: Path
) -> None:
    scored = ["--queries", queries] if method in ("search", "ease") else []
    outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for out in outs:
        done = xpert(
            "shots", "order", shots, "--method", method, "--count", 3, "--base", tiny_base, *extra, *scored, "-o", out,
            "--json",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    source = {row.id: row for row in read_shots(shots)}
    found = read_shots(outs[0])
    assert [row.id for row in found] == value["exemplars"]
    assert len({row.id for row in found}) == 3
    assert all((row.prompt, row.response) == (source[row.id].prompt, source[row.id].response) for row in found)
    assert [line["_xpert"]["rank"] for line in lines_of(outs[0])] == [1, 2, 3]
    assert lines_of(outs[0]) == lines_of(outs[1])
    one, two = (json.loads(out.with_suffix(".manifest.json").read_text())["figures"] for out in outs)
    assert one["score"] == value["score"]
    if scored:
        assert (one["lists_scored"], one["lists_read_by_the_model"], two["lists_read_by_the_model"]) == (4, 4, 0)
        assert one["log"] == two["log"]
        best = max(one["log"], key=lambda step: step["accuracy" if "reward=accuracy" in extra else "log_likelihood"])
        assert best["shots"] == value["exemplars"]


def test_nearest_writes_a_prompt_per_query(xpert: Run, shots: Path, queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    done = xpert(
        "shots", "order", shots, "--method", "nearest", "--queries", queries, "--count", 3, "-o", out, "--json"
    )
    assert done.exit_code == 0, done.output
    asked_rows, source = read_prompts(queries), {row.id: row for row in read_shots(shots)}
    prompts = read_prompts(out)
    assert [row.id for row in prompts] == [row.id for row in asked_rows]
    for prompt, query, line in zip(prompts, asked_rows, lines_of(out), strict=True):
        chosen = line["_xpert"]["exemplars"]
        assert [turn.role for turn in prompt.messages] == ["user", "assistant"] * 3 + ["user"]
        assert [turn.content for turn in prompt.messages[:-1:2]] == [source[key].prompt for key in chosen]
        assert [turn.content for turn in prompt.messages[1::2]] == [source[key].response for key in chosen]
        assert prompt.messages[-1].content == query.prompt
        assert prompt.response == ""
        # The nearest, which are of the query's own skill, stand last.
        assert source[chosen[-1]].skill == query.skill
    assert json.loads(done.stdout)["exemplars"][asked_rows[0].id] == lines_of(out)[0]["_xpert"]["exemplars"]


@pytest.mark.parametrize("last", ["nearest", "farthest"])
def test_nearest_equals_sorting_by_cosine(last: str, rows: list[Row]) -> None:
    from xpert.features import Features

    shots, queries = Shots(tuple(rows[:30])), rows[90:95]
    found = order_shots(shots, count=4, method="nearest", queries=queries, params={"last": last})
    features = Features(pool_from_rows(rows[:30]), FeatureOptions())
    cosines = features.embed(queries) @ features.embeddings().T
    for index, one in enumerate(found.lists):
        plain = sorted(range(30), key=lambda row: (-round(float(cosines[index, row]), 6), row))[:4]
        assert one.query == index
        assert one.rows.tolist() == (plain[::-1] if last == "nearest" else plain)
        assert one.score == pytest.approx(float(cosines[index, plain].mean()), abs=1e-5)


def test_a_query_never_sees_its_own_answer(rows: list[Row]) -> None:
    shots = Shots(tuple(rows[:5]))
    found = order_shots(shots, count=4, method="nearest", queries=shots.rows)
    assert [index in one.rows.tolist() for index, one in enumerate(found.lists)] == [False] * 5
    with pytest.raises(BadInput, match="only 4 shots ask something else than query r00000"):
        order_shots(shots, count=5, method="nearest", queries=shots.rows)


STORY = "Solve it. {} How many eggs are in the basket?"


def test_the_most_confusing_come_first_and_those_without_conditions_last(
    xpert: Run, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = {
        "plain": "How many eggs are in the basket?",
        "near": STORY.format("There were 3 eggs in the basket, and 4 more eggs are put into the basket."),
        "far": STORY.format("Tom paid 5 dollars, which his uncle lent. Rain fell on Friday."),
        "half": STORY.format("There were 9 eggs in the basket. Rain fell on the village."),
    }
    shots = write_jsonl("s.jsonl", [{"id": key, "question": text, "answer": "7"} for key, text in prompts.items()])
    out = tmp_path / "o.jsonl"
    done = xpert("shots", "order", shots, "--count", 4, "--method", "confusing", "-o", out)
    assert done.exit_code == 0, done.output
    found = lines_of(out)
    assert [line["id"] for line in found] == ["far", "half", "near", "plain"]
    # "Solve it." stands in three shots: the task's wording, and no condition.
    assert [line["_xpert"]["reason"].split(" have")[0] for line in found[:3]] == ["its 2 conditions"] * 3
    assert found[3]["_xpert"]["reason"] == "not scored: no conditions before its question"
    with pytest.raises(BadInput, match="no shot has a sentence of its own before its question"):
        order_shots(Shots(read_shots(shots).rows[:1]), count=1, method="confusing")


def test_conditions_and_question() -> None:
    assert conditions_and_question("Ann has 3 pens, and Bo has 4. It rains. How many?") == (
        ["Ann has 3 pens", "and Bo has 4.", "It rains."],
        "How many?",
    )
    assert conditions_and_question("In May, June and July it rained 3.5 mm.\nWhy?") == (
        ["In May, June and July it rained 3.5 mm."],
        "Why?",
    )
    assert conditions_and_question("Why?") == ([], "Why?")
    assert conditions_and_question("...") == ([], "...")


def test_confusing_by_loss_equals_the_losses(rows: list[Row], tiny_base: Path) -> None:
    from xpert.answer_losses import AnswerLosses

    options = FeatureOptions(base=str(tiny_base))
    for by, field in (("loss", "nll"), ("entropy", "entropy")):
        found = order_shots(
            Shots(tuple(rows[:10])), count=10, method="confusing", params={"by": by}, features=options, device="cpu"
        )
        values = AnswerLosses(str(tiny_base)).open("cpu")(rows[:10])[field]
        assert found.lists[0].rows.tolist() == np.argsort(-values, kind="stable").tolist()
        assert found.lists[0].score == pytest.approx(float(values.mean()), abs=1e-4)


def test_shots_read_by_a_map_or_made_in_python_are_written_to_be_read(tmp_path: Path) -> None:
    long = asked("one", "Rain falls. How many?", "3")
    mapped = Row("two", (Message("user", "Snow falls. How many?"),), "4", "count", {"ask": "Snow?", "reply": "4"})
    order_shots(Shots((long, mapped)), count=2, method="confusing", out=tmp_path / "o.jsonl")
    found = {row.id: row for row in read_shots(tmp_path / "o.jsonl")}
    for row in (long, mapped):
        assert (found[row.id].messages, found[row.id].response) == (row.messages, row.response)
    assert found["two"].skill == "count"


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [Exemplars(np.array([0, 0]), ["a", "b"], 1.0)],
        [Exemplars(np.array([0, 9]), ["a", "b"], 1.0)],
        [Exemplars(np.array([0]), ["a"], 1.0)],
        [Exemplars(np.array([0, 1]), ["a"], 1.0)],
        [Exemplars(np.array([0, 1]), ["a", "b"], float("nan"))],
        [Exemplars(np.array([0, 1]), ["a", "b"], 1.0, query=1)],
    ],
)
def test_an_orderer_that_breaks_its_contract_is_a_defect(bad: list[Exemplars], rows: list[Row]) -> None:
    from xpert.features import Features
    from xpert.protocols import ExemplarTask

    class Wrong:
        def order(self, *_: Any) -> list[Exemplars]:
            return bad

    task = ExemplarTask(Shots(tuple(rows[:3])), Features(pool_from_rows(rows[:3])), tuple(rows[5:7]))
    with pytest.raises(ValueError, match="Wrong gave"):
        choose_exemplars(Wrong(), task, 2)


@pytest.mark.parametrize("name", plugins.names("orderer"))
def test_what_an_orderer_says_of_itself(name: str, xpert: Run) -> None:
    plugin = plugins.load("orderer", name)
    assert plugin.needs <= {"embeddings", "base", "queries", "score"}
    assert plugin.cost
    assert plugin.source
    shown = xpert("methods", name, "--kind", "orderer")
    assert shown.exit_code == 0
    assert plugin.source in shown.stdout


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────

MISTAKES = {
    "pick {u} --count 61 -o {d}/o.jsonl": "61 rows are asked for, but the pool holds 60 (and 1 that repeat one). Lower",
    "pick {u} --count 0 -o {d}/o.jsonl": "Invalid value for '--count'",
    "pick {u} --count 5 --method kshot -o {d}/o.jsonl": "method 'kshot' needs shots, and here they are still to be",
    "pick {u} --count 5 --method length -o {d}/o.jsonl": "method 'length' scores answers, and the rows have none",
    "pick {u} --count 5 --method perplexity --base {base} -o {d}/o.jsonl": "'perplexity' scores answers, and the rows",
    "pick {u} --count 5 --embed-field both -o {d}/o.jsonl": "--embed-field both has nothing to embed",
    "pick {u} --count 5 --method kcentre -o {d}/o.jsonl": "Did you mean 'kcenter'?",
    "pick {u} --count 5 -p strat=medoid -o {d}/o.jsonl": "Did you mean 'start'?",
    "pick {d}/nope.jsonl --count 5 -o {d}/o.jsonl": "nope.jsonl: no such file",
    "pick {u} --count 5 -o {d}/o.json": "the output is a file of JSON lines. Give it a name that ends in .jsonl",
    "pick {u} --count 5 -o {d}": "is a folder; the shots are a file",
    "pick {u} --count 5 -o {s}": "shots.jsonl: the output exists already",
    "order {s} --count 13 --method confusing -o {d}/o.jsonl": "13 exemplars are asked for, but the shots are 12",
    "order {u} --count 3 --method confusing -o {d}/o.jsonl": "unlabelled.jsonl: line 1 has no known form",
    "order {s} --count 3 --method nearset -o {d}/o.jsonl": "unknown orderer 'nearset'. Did you mean 'nearest'?",
    "order {s} --count 3 --method nearest -o {d}/o.jsonl": "needs queries: the prompts to be answered. Give them with",
    "order {s} --count 3 --method confusing --queries {q} -o {d}/o.jsonl": "one list whatever is asked. Leave",
    "order {s} --count 3 --method confusing -p by=loss -o {d}/o.jsonl": "Give it with --base MODEL",
    "order {s} --count 3 --method search -o {d}/o.jsonl": "needs queries: rows with answers, on which lists are scored",
    "order {s} --count 3 --method search --queries {q} -o {d}/o.jsonl": "a base model. Give it with --base MODEL",
    "order {s} --count 3 --method ease --queries {u} --base {base} -o {d}/o.jsonl": "query r00000 has no answer",
    "order {s} --count 3 --method ease --queries {s} --base {base} -o {d}/o.jsonl": "would stand in its own prompt",
    "order {s} --count 3 --method ease --queries {q} --base {base} -p embedder=lsa -o {d}/o.jsonl": "its reverse the",
    "order {s} --count 3 --method ease --queries {q} --base {base} -p frist=2 -o {d}/o.jsonl": "Did you mean 'first'?",
    "order {s} --count 9 --method search --queries {q} --base {base} --max-length 300 -o {d}/o.jsonl": "but 300 are",
    "order {s} --count 3 --method search --queries {q} --base {d}/nope -o {d}/o.jsonl": "nope: no such model folder",
    "order {one} --count 2 --method nearest --queries {q} -o {d}/o.jsonl": "but the shots are 1. Lower --count",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line_with_a_way_out(
    line: str,
    xpert: Run,
    unlabelled: Path,
    shots: Path,
    queries: Path,
    tiny_base: Path,
    write_jsonl: Callable[..., Path],
    columns: Callable[..., Any],
    tmp_path: Path,
) -> None:
    one = write_jsonl("one.jsonl", columns(1))
    before = set(tmp_path.iterdir())
    places = {"u": unlabelled, "s": shots, "q": queries, "base": tiny_base, "d": tmp_path, "one": one}
    done = xpert("shots", *line.format(**places).split(), "--quiet")
    assert done.exit_code == 2, done.output
    assert MISTAKES[line] in done.stderr
    assert done.stderr.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_skill_with_one_row_and_one_shot_alone(
    xpert: Run, queries: Path, columns: Any, write_jsonl: Any, tiny_base: Path, tmp_path: Path
) -> None:
    one = write_jsonl("one.jsonl", columns(1, seed=4))
    for method in ("nearest", "search"):
        out = tmp_path / f"{method}.jsonl"
        done = xpert(
            "shots",
            "order",
            one,
            "--method",
            method,
            "--queries",
            queries,
            "--count",
            1,
            "--base",
            tiny_base,
            "-o",
            out,
        )
        assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "search.manifest.json").read_text())
    assert manifest["figures"]["lists_scored"] == 1  # there is but one list of one shot
