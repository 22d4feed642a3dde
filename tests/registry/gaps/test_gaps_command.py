"""`xpert registry gaps`: what it prints and writes, the user's mistakes, and the way from a log to a selection."""

from __future__ import annotations

import dataclasses
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from xpert.data import read_prompts, read_shots
from xpert.errors import BadInput
from xpert.experts.server.request_log import RequestRecord
from xpert.records import Message
from xpert.registry.store import Registry
from xpert.selection import read_selection

Run = Callable[..., Result]
Planted = Callable[..., list[RequestRecord]]
Write = Callable[..., Path]
TWO = ("--clusters", 2, "--near", 1)


@pytest.fixture
def log(planted: Planted, write_log: Write) -> Path:
    return write_log(planted())


def test_it_names_the_next_expert_and_tells_usage(xpert: Run, log: Path) -> None:
    result = xpert("registry", "gaps", log, *TWO)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "82 requests in 1 file; of 82 routed ones 42 fell back to the base model (51.2%)"
    assert any(line.split() == ["casing", "40", "100.0%", "600", "0.95", "0"] for line in lines)
    assert any(line.split()[:2] == ["DAY", "ROUTED"] for line in lines)
    [told] = [line for line in lines if line.startswith("next expert to build: ")]
    assert "knit" in told
    assert lines[-1].startswith("  xpert select POOL --shots DIR/shots-")


def test_json_says_the_same_as_the_folder(xpert: Run, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "gaps"
    result = xpert("registry", "gaps", log, *TWO, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value.pop("path") == str(out)
    assert value == json.loads((out / "gaps.json").read_text())
    assert [gap["requests"] for gap in value["gaps"]] == [30, 12]
    assert value["next"] == value["gaps"][0]["slug"]
    assert len(value["gaps"][0]["examples"]) == 5
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "gaps" and manifest["config"]["clusters"] == "2"
    assert manifest["figures"]["unserved_prompts"] == 42
    assert {path.name for path in out.iterdir()} == {
        "gaps.json",
        "manifest.json",
        *(f"shots-{gap['slug']}.jsonl" for gap in value["gaps"]),
    }


def test_from_a_log_to_a_selection(xpert: Run, log: Path, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    out = tmp_path / "gaps"
    assert xpert("registry", "gaps", log, *TWO, "-o", out, "--shots", 8).exit_code == 0
    value = json.loads((out / "gaps.json").read_text())
    shots = out / f"shots-{value['next']}.jsonl"
    asked = read_prompts(shots)
    assert len(asked) == 8 and all("rows to knit" in row.prompt and not row.response for row in asked)
    pool = write_jsonl(
        "pool.jsonl",
        [
            {"prompt": text, "completion": "Well.", "skill": skill}
            for skill, form in (
                ("knitting", "Give me the rows to knit a {0} of wool."),
                ("cooking", "Boil {0} eggs for my breakfast, please."),
            )
            for text in (form.format(number) for number in range(20))
        ],
    )
    chosen = xpert("select", pool, "--shots", shots, "--budget", 10, "-o", tmp_path / "selection")
    assert chosen.exit_code == 0, chosen.stderr
    assert "8 of 8 shots have no answer" in chosen.stderr
    found = read_selection(tmp_path / "selection")
    assert {row.skill for row in found.rows} == {"knitting"} and len(found.rows) == 10
    refused = xpert("select", pool, "--shots", shots, "--budget", 10, "-o", tmp_path / "two", "--method", "dsir")
    assert refused.exit_code == 2 and "method 'dsir' reads the shots' answers" in refused.stderr

    # The shots can be picked from, and are shots like any other once their answers are filled in.
    picked = xpert("shots", "pick", shots, "--count", 3, "-o", tmp_path / "label.jsonl")
    assert picked.exit_code == 0, picked.stderr
    with pytest.raises(BadInput):
        read_shots(tmp_path / "label.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "label.jsonl").read_text().splitlines()]
    labelled = write_jsonl("labelled.jsonl", [line | {"completion": "Cast on 40."} for line in lines])
    again = xpert("select", pool, "--shots", labelled, "--budget", 10, "-o", tmp_path / "three", "--method", "dsir")
    assert again.exit_code == 0, again.stderr


def test_conversations_become_shots_with_their_turns(
    xpert: Run, planted: Planted, write_log: Write, tmp_path: Path
) -> None:
    turns = [Message("system", "Be kind."), Message("user", "Hello."), Message("assistant", "Hello!")]
    records = [
        dataclasses.replace(record, messages=(*turns, *record.messages), id=f"x{record.id}")
        for record in planted(knitting=10, chess=0, casing=0)
    ]
    out = tmp_path / "gaps"
    assert xpert("registry", "gaps", write_log(records), "--clusters", 1, "-o", out).exit_code == 0
    [shots] = out.glob("shots-*.jsonl")
    assert [m.role for m in read_prompts(shots)[0].messages] == ["user", "assistant", "user"]  # all had one system turn


def test_experts_of_the_registry_are_named_first(
    xpert: Run, log: Path, tmp_path: Path, expert: Callable[..., Path], registry: Registry
) -> None:
    ref = registry.publish(expert("stitch", skills=("handicraft",)), "ada/stitch").ref
    taxonomy = tmp_path / "skills.yaml"
    taxonomy.write_text("kind: taxonomy\nschema: 1\nskills:\n- {name: handicraft, words: [knit]}\n")
    result = xpert("registry", "gaps", log, *TWO, "--registry", registry.location, "--taxonomy", taxonomy)
    assert f"first try to mix in what the registry has of handicraft: {ref}" in result.stdout


def test_torn_files_are_told_of(xpert: Run, log: Path) -> None:
    (log / "more.jsonl").write_text('{"schema": 1, "id"')
    result = xpert("registry", "gaps", log, *TWO)
    assert result.exit_code == 0
    assert "1 files end in a torn line, which is passed over" in result.stdout


def test_a_log_without_gaps(xpert: Run, planted: Planted, write_log: Write) -> None:
    result = xpert("registry", "gaps", write_log(planted(knitting=0, chess=0)))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "no gap: every routed prompt is served"


def test_too_few_prompts_are_not_told_of(xpert: Run, planted: Planted, write_log: Write) -> None:
    result = xpert("registry", "gaps", write_log(planted(knitting=3, chess=0)), "--near", 1)
    assert "3 unserved requests lie in clusters of fewer than 5 prompts, which are not told of" in result.stdout
    assert "knit" not in result.stdout


# ── with a mixture ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mixture_gives_pilots_that_its_experts_take(
    xpert: Run, planted: Planted, write_log: Write, mixture_file: Callable[..., Path], tmp_path: Path
) -> None:
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.routing import MixtureRouter
    from xpert.protocols import RouteRequest

    mixture = mixture_file()
    others = [dataclasses.replace(record, mixture="four", id=f"four-{record.id}") for record in planted()]
    out = tmp_path / "gaps"
    result = xpert("registry", "gaps", write_log([*planted(), *others]), *TWO, "--mixture", mixture, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "left out: 82 requests to other mixtures" in result.stdout
    assert "pilots (served well, far from the exemplars): casing 20" in result.stdout
    pilots = read_prompts(out / "pilots-casing.jsonl")
    assert len(pilots) == 20 and all("big letters" in row.prompt and row.skill == "casing" for row in pilots)

    before = load_mixture(mixture)
    probe = RouteRequest("q", (Message("user", pilots[0].prompt),))

    def score() -> float:
        [route] = MixtureRouter(load_mixture(mixture)).route([probe])
        return next(candidate.score for candidate in route.candidates if candidate.expert == "casing")

    old = score()
    folder = next(expert.folder for expert in before.experts if expert.key == "casing")
    added = xpert("prototypes", folder, "--pilots", out / "pilots-casing.jsonl", "--embedder", "none")
    assert added.exit_code == 0, added.stderr
    assert added.stdout.strip() == f"{folder}: 20 pilots added"
    assert score() > old  # the mixture is the same one still, and its router finds the expert


def test_uncalibrated_routers_give_no_pilots(
    xpert: Run, planted: Planted, write_log: Write, mixture_file: Callable[..., Path]
) -> None:
    result = xpert("registry", "gaps", write_log(planted(chance=None)), *TWO, "--mixture", mixture_file())
    assert "no pilots: 40 served requests have no chance, which `xpert router calibrate` gives" in result.stdout


# ── the user's mistakes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "LOG"),
        (("nowhere",), "no such file or folder"),
        (("LOG", "--clusters", "x"), "clusters is 'x'"),
        (("LOG", "--clusters", 999), "clusters is 999"),
        (("LOG", "--min-prompts", 0), "min-prompts is 0; the least is 1"),
        (("LOG", "--below", "low"), "low"),
        (("LOG", "--embedder", "lm"), "needs a base model"),
        (("LOG", "-o", "LOG"), "the output exists already"),
        (("LOG", "--mixture", "nowhere.json"), "no such mixture"),
        (("LOG", "--taxonomy", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_mistakes(xpert: Run, log: Path, arguments: tuple[object, ...], message: str) -> None:
    result = xpert("registry", "gaps", *(log if one == "LOG" else one for one in arguments))
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_a_mixture_without_requests(xpert: Run, log: Path, mixture_file: Callable[..., Path]) -> None:
    result = xpert("registry", "gaps", log, "--mixture", mixture_file(name="other"))
    assert result.exit_code == 2
    assert "no request of the log is to the mixture 'other'. There are those to three" in result.stderr
