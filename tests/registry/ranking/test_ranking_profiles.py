"""Profiles of a registry side by side: what may be compared, fronts and weights, and the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput, NotFound
from xpert.registry.card import ExpertCard, Interval, SkillProfile, SkillScore
from xpert.registry.ranking.entrants import experts_to_rank
from xpert.registry.ranking.leaderboard import RankOptions, leaderboard
from xpert.registry.ranking.matrix import profile_matrix
from xpert.registry.ranking.pareto import expert_costs, pareto, weigh
from xpert.registry.store import Details, Registry

Run = Callable[..., Result]
Maker = Callable[..., Path]
Publish = Callable[..., Details]


@pytest.fixture
def publish(registry: Registry, expert: Maker) -> Publish:
    """`publish("a", {"sums": 0.5}, suite="s", rank=8, seconds=0.1, ...)`: an expert `acme/a` with such a card."""
    counted = iter(range(1000))

    def made(
        name: str,
        scores: dict[str, float] | None,
        *,
        suite: str = "s",
        rank: int = 4,
        seconds: float | None = None,
        choices: dict[str, float] | None = None,
        metrics: dict[str, str] | None = None,
        base: str = "tiny",
    ) -> Details:
        number = next(counted)
        folder = expert(f"{name}{number}", seed=number, base=base)

        def interval(score: float) -> Interval:
            return Interval(score, max(0.0, score - 0.1), min(1.0, score + 0.1), 40)

        skills = {
            skill: SkillScore(
                (metrics or {}).get(skill, "exact"),
                interval(score),
                interval(0.2),
                interval(choices[skill]) if choices and skill in choices else None,
                interval(0.25) if choices and skill in choices else None,
            )
            for skill, score in (scores or {}).items()
        }
        figures = {} if seconds is None else {"seconds_per_item": seconds}
        profile = SkillProfile(suite, suite * 64, skills, figures=figures) if scores else None
        card = dataclasses.replace(ExpertCard.read(folder), profile=profile, adapter={"rank": rank})
        card.write(folder)
        return registry.show(registry.publish(folder, f"acme/{name}").ref)

    return made


def test_a_matrix_has_a_row_for_each_skill_and_gaps_where_there_is_no_score(publish: Publish) -> None:
    a, b = publish("a", {"sums": 0.5, "law": 0.75}), publish("b", {"sums": 0.25})
    found = profile_matrix([b, a, publish("c", None)])
    assert found.systems == ("acme/a@1", "acme/b@1") and [task.label for task in found.tasks] == ["law", "sums"]
    assert np.array_equal(found.scores, [[0.75, np.nan], [0.5, 0.25]], equal_nan=True)
    assert found.n.tolist() == [[40, 0], [40, 40]] and found.base.ref == "tiny" and found.over == "expert"
    assert found.low[1].tolist() == pytest.approx([0.4, 0.15]) and found.sd[1, 0] == pytest.approx(0.1 / 1.96, rel=1e-3)
    assert found.left_out == {"acme/c@1": "not profiled"}
    assert found.by_task() == {"law": {"acme/a@1": 0.75}, "sums": {"acme/a@1": 0.5, "acme/b@1": 0.25}}
    assert found.warnings == ("1 of 2 tasks have one expert only and say nothing of ranks: law",)


def test_equal_skills_of_two_suites_are_two_tasks(publish: Publish) -> None:
    found = profile_matrix(
        [publish("a", {"sums": 0.5}), publish("b", {"sums": 0.7}), publish("c", {"sums": 0.9}, suite="t")]
    )
    assert [task.label for task in found.tasks] == ["sums (s ssssssss)", "sums (t tttttttt)"]
    assert np.isnan(found.scores).tolist() == [[False, False, True], [True, True, False]]
    said = " / ".join(found.warnings)
    assert "profiles on 2 suites, s (ssssssss), t (tttttttt)" in said
    assert "2 of 3 pairs of experts share no task, such as acme/a@1 and acme/c@1" in said


def test_unlike_metrics_of_one_skill_are_two_tasks(publish: Publish) -> None:
    found = profile_matrix([publish("a", {"sums": 0.5}), publish("b", {"sums": 0.5}, metrics={"sums": "f1"})])
    assert [task.label for task in found.tasks] == ["sums (exact)", "sums (f1)"]


def test_gains_and_choices(publish: Publish) -> None:
    one = publish("a", {"sums": 0.5, "law": 0.2}, choices={"law": 0.75})
    gains = profile_matrix([one], over="gain")
    assert gains.scores[:, 0].tolist() == pytest.approx([0.0, 0.3])
    assert gains.low[1, 0] == pytest.approx(0.3 - np.hypot(0.1, 0.1))
    choices = profile_matrix([one], choice=True)
    assert choices.metrics == {"law": "choices by likelihood"} and choices.scores.tolist() == [[0.75]]
    assert profile_matrix([one], choice=True, over="gain").scores.tolist() == [[0.5]]
    with pytest.raises(BadInput, match="no item of its profile has choices"):
        profile_matrix([one], choice=True, skills=["sums"])


def test_what_is_not_compared(publish: Publish, registry: Registry) -> None:
    a, b = publish("a", {"sums": 0.5}), publish("b", {"sums": 0.5}, base="larger")
    with pytest.raises(BadInput, match="2 base models are not compared: acme/a@1 of tiny"):
        profile_matrix([a, b])
    with pytest.raises(NotFound, match=r"unknown skill 'sms'. Did you mean 'sums'"):
        profile_matrix([a], skills=["sms"])
    with pytest.raises(BadInput, match=r"nothing to rank: not profiled \(1\)"):
        profile_matrix([publish("c", None)])
    with pytest.raises(BadInput, match="no experts"):
        profile_matrix([])
    mixture = dataclasses.replace(a, version=dataclasses.replace(a.version, kind="mixture"))
    with pytest.raises(BadInput, match="is a mixture"):
        profile_matrix([mixture])


def test_the_latest_of_one_base_are_ranked(publish: Publish, registry: Registry) -> None:
    publish("a", {"sums": 0.5})
    publish("a", {"sums": 0.6})
    publish("b", {"sums": 0.4})
    publish("c", None)

    def refs(*names: str, base: str | None = None) -> list[str]:
        return [one.version.ref for one in experts_to_rank(registry, names, base=base)]

    assert refs() == refs(base="tiny") == refs(base="tiny-fin") == ["acme/a@2", "acme/b@1"]
    assert refs("acme/a@1", "acme/a") == ["acme/a@1", "acme/a@2"]
    publish("d", {"sums": 0.4}, base="larger")
    assert refs(base="larger") == ["acme/d@1"]
    with pytest.raises(BadInput, match=r"of 2 base models: tiny .*: 2, larger"):
        refs()


def test_a_base_may_go_by_several_names(expert: Maker, registry: Registry, xpert: Run) -> None:
    for name, reference in (("a", "lab/tiny"), ("b", "/models/one/tiny.gguf"), ("c", "C:\\models\\tiny.gguf")):
        folder = expert(name, seed=ord(name), scores={"sums": 0.5})
        card = json.loads((folder / "expert.json").read_text())
        card["base"]["ref"] = reference
        (folder / "expert.json").write_text(json.dumps(card))
        registry.publish(folder, f"acme/{name}")

    def refs(base: str | None = None) -> list[str]:
        return [one.version.ref for one in experts_to_rank(registry, base=base)]

    assert refs() == refs("tiny-fingerprint") == ["acme/a@1", "acme/b@1", "acme/c@1"]
    assert refs("tiny.gguf") == ["acme/b@1", "acme/c@1"] and refs("lab/tiny") == ["acme/a@1"]
    assert [hit.version.ref for hit in registry.search("", base="/models/one/tiny.gguf")] == ["acme/b@1"]
    listed = xpert("registry", "list", "--registry", registry.folder).stdout
    assert "/home" not in listed and "models" not in listed and "lab/tiny" in listed


values = st.fixed_dictionaries({}, optional={o: st.integers(0, 3).map(float) for o in ("score", "size", "rank")})


@settings(max_examples=60, deadline=None)
@given(st.lists(values, max_size=7).filter(lambda rows: all(any(o in r for r in rows) for o in ("score", "size"))))
def test_the_front_is_what_nobody_beats(rows: list[dict[str, float]]) -> None:
    systems = {f"s{number}": row for number, row in enumerate(rows)}
    found = pareto(systems, ("score", "size"))
    whole = {s: (row["score"], -row["size"]) for s, row in systems.items() if {"score", "size"} <= row.keys()}

    def beats(one: str, other: str) -> bool:
        return whole[one] != whole[other] and all(a >= b for a, b in zip(whole[one], whole[other], strict=True))

    assert list(found.front) == [s for s in whole if not any(beats(o, s) for o in whole)]
    assert found.dominated == {s: tuple(o for o in found.front if beats(o, s)) for s in whole if s not in found.front}
    assert all(found.dominated.values()), "whoever is off the front is beaten by somebody on it"
    assert set(found.unknown) == set(systems) - set(whole)


def test_costs_come_from_cards_files_and_the_users_measurements(publish: Publish) -> None:
    a, b = publish("a", {"sums": 0.5}, rank=8, seconds=0.25), publish("b", {"sums": 0.5})
    size = next(file.size for file in a.files if file.path == "adapter_model.safetensors")
    assert expert_costs([a, b]) == {
        "acme/a@1": {"size": size, "rank": 8, "latency": 0.25},
        "acme/b@1": {"size": size, "rank": 4},
    }
    measured = expert_costs([a, b], {"acme/b": 0.5, "acme/b@1": 0.75})
    assert "latency" not in measured["acme/a@1"] and measured["acme/b@1"]["latency"] == 0.75


def test_a_weight_is_what_the_costliest_must_be_ahead_by() -> None:
    rows = {"big": {"score": 0.9, "size": 200.0}, "small": {"score": 0.8, "size": 50.0}}
    assert weigh(rows, {"size": 0.1}).values == pytest.approx({"big": 0.8, "small": 0.775})
    assert weigh(rows, {"size": 0.1}).choice == "big" and weigh(rows, {"size": 0.2}).choice == "small"
    assert weigh({"a": {"score": 0.5, "size": 0.0}}, {"size": 1.0}).values == {"a": 0.5}
    for weights, said in (
        ({"siz": 1.0}, "no cost"),
        ({"size": -1.0}, "is -1"),
        ({"latency": 1.0}, "of big is not known"),
    ):
        with pytest.raises(BadInput, match=said):
            weigh(rows, weights)


def test_all_methods_agree_where_there_is_nothing_to_argue_about(publish: Publish) -> None:
    level = {"a": 0.3, "b": 0.9, "c": 0.6}
    details = [publish(name, dict.fromkeys(("sums", "law", "logic"), score)) for name, score in level.items()]
    found = leaderboard(details, RankOptions(method="all", bootstrap=50))
    assert [ranking.method for ranking in found.rankings] == ["borda", "kemeny", "mean", "bradley-terry"]
    for ranking in found.rankings:
        assert [s.system for s in ranking.standings] == ["acme/b@1", "acme/c@1", "acme/a@1"]
        assert [s.place for s in ranking.standings] == [1, 2, 3] and ranking.standings[0].first == 1
        assert [s.place_high for s in ranking.standings] == [1, 2, 3]
        for s in ranking.standings:
            assert s.low is not None and s.high is not None and s.low <= s.points + 1e-9 <= s.high + 2e-9
        assert 1 >= ranking.standings[0].share > ranking.standings[1].share > ranking.standings[2].share >= 0
    assert found.warnings == () and found.rankings[1].facts["certified"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_method_that_cannot_rank_is_told_among_all_and_refused_alone(publish: Publish) -> None:
    details = [publish("a", {"sums": 0.5}), publish("b", {"law": 0.5})]
    found = leaderboard(details, RankOptions(method="all"))
    assert [ranking.method for ranking in found.rankings] == ["borda", "kemeny", "bradley-terry"]
    assert any("no order by mean: no task is common" in warning for warning in found.warnings)
    assert {s.place for s in found.rankings[0].standings} == {1.5}, "nothing compares them"
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(BadInput, match="no task is common"):
        leaderboard(details, RankOptions(method="mean"))


@pytest.fixture
def rank(xpert: Run, registry: Registry, publish: Publish) -> Run:
    """`registry rank` over four experts, of which one has gaps, and one of another base."""
    publish("a", {"sums": 0.5, "law": 0.5, "logic": 0.9}, rank=16, seconds=0.5)
    publish("b", {"sums": 0.6, "law": 0.4, "logic": 0.2}, rank=8, seconds=0.25)
    publish("c", {"sums": 0.4}, rank=8, seconds=0.5)
    publish("plain", None)
    publish("stranger", {"sums": 0.4}, base="larger")
    return lambda *arguments: xpert("registry", "rank", *arguments, "--registry", registry.folder)


def test_the_table(rank: Run) -> None:
    shown = rank("--base", "tiny", "--pareto", "score,rank,latency", "--weigh", "rank=1.5")
    assert shown.exit_code == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[0][:3] == ["3", "experts", "of"] and lines[2] == ["PLACE", "EXPERT", "POINTS", "PLACES", "FIRST"]
    assert [line[1] for line in lines[3:6]] == ["acme/a@1", "acme/b@1", "acme/c@1"]
    (gaps,) = [line for line in lines[6:] if line[:1] == ["acme/c@1"] and line.count("-") == 2]
    assert gaps == ["acme/c@1", "-", "-", "0.40", "[0.30,", "0.50]"]
    assert "no better in any than acme/b@1" in shown.stdout and shown.stdout.count("on the front") == 2
    assert "the choice is acme/b@1: worth = share of the most points - 1.5 rank" in shown.stdout
    whole = rank("acme/a", "acme/b", "--method", "all", "--bootstrap", 0)
    assert whole.stdout.splitlines()[2].split() == ["EXPERT", "BORDA", "KEMENY", "MEAN", "BRADLEY-TERRY"]
    assert "no order contradicts fewer" in whole.stdout
    assert "note: the mean is over" not in whole.stdout
    mean = rank("--base", "tiny", "--method", "mean").stdout
    first, second = mean.splitlines()[-2:]
    assert first == "note: the mean is over the 1 of 3 tasks that all experts have"
    assert second.startswith("note: drawing one task anew says nothing")


def test_no_name_of_a_stranger_feigns_a_line(xpert: Run, registry: Registry, publish: Publish) -> None:
    for number, suite in enumerate("st"):
        publish("ab"[number], {"sums\n1  acme/feigned@1": 0.5, "law\nfeigned": 0.2}, suite=f"{suite}\nF", base="x\ny")
    shown = xpert("registry", "rank", "--registry", registry.folder).stdout
    assert "feigned" in shown and not [
        line for line in shown.splitlines() if line.startswith(("1  acme", "feigned", "F", "y"))
    ]


def test_json_has_everything(rank: Run) -> None:
    result = rank("acme/a", "acme/b", "acme/plain", "--method", "all", "--json", "--pareto", "score,size", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["systems"] == ["acme/a@1", "acme/b@1"] and found["left_out"] == {"acme/plain@1": "not profiled"}
    assert found["scores"]["sums"]["acme/a@1"] == {"score": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    assert set(found["rankings"]) == {"borda", "kemeny", "mean", "bradley-terry"}
    first = found["rankings"]["borda"]["standings"][0]
    assert (first["system"], first["place"], first["points"]) == ("acme/a@1", 1, 2) and 0.5 < first["first"] < 1
    assert found["pareto"]["front"] == ["acme/a@1"] and found["pareto"]["dominated"] == {"acme/b@1": ["acme/a@1"]}
    again = rank("acme/a", "acme/b", "acme/plain", "--method", "all", "--json", "--pareto", "score,size", "--seed", 3)
    assert again.stdout == result.stdout


def test_pairs_are_ranked_without_profiles(rank: Run, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"winner": "x", "loser": "y"}] * 8 + [{"winner": "y", "loser": "x"}] * 2 + [{"winner": "u", "loser": "v"}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = rank("--pairs", pairs)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("4 systems, 11 contests, by bradley-terry\n")
    assert "± SE" in shown.stdout and "note: nobody met anybody across these groups" in shown.stdout
    found = json.loads(rank("--pairs", pairs, "--json", "--bootstrap", 0).stdout)
    assert found["contests"] == 11 and found["components"] == [["u", "v"], ["x", "y"]]
    by_name = {s["system"]: s for s in found["standings"]}
    assert by_name["x"]["points"] == pytest.approx(-by_name["y"]["points"]) and by_name["x"]["error"] > 0


def test_lists_of_a_configuration_file_count(rank: Run, tmp_path: Path) -> None:
    file = tmp_path / "rank.yaml"
    file.write_text("base: tiny\nskills: [sums, law]\npareto: [score, rank]\nweigh: {rank: 0.5, size: 0}\n")
    found = json.loads(rank("--config", file, "--json").stdout)
    assert [task["label"] for task in found["tasks"]] == ["law", "sums"]
    assert found["weighed"]["weights"] == {"rank": 0.5, "size": 0} and "pareto" in found


def test_one_expert_is_shown_and_has_no_rank(rank: Run) -> None:
    shown = rank("acme/a").stdout
    assert shown.startswith("1 expert of tiny") and shown.splitlines()[-1] == "note: one expert alone has no rank"


def test_latencies_of_a_file_count(rank: Run, tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    file.write_text('{"acme/a": 0.1, "acme/b@1": 0.2}')
    found = json.loads(rank("acme/a", "acme/b", "--latency", file, "--pareto", "latency", "--json").stdout)
    assert found["pareto"]["front"] == ["acme/a@1"] and found["costs"]["acme/b@1"]["latency"] == 0.2


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "two bases": ([], 2, "the profiled experts are of 2 base models: tiny (tiny-fingerp): 3, larger"),
    "no such base": (["--base", "huge"], 2, "no profiled expert is of the base 'huge'"),
    "another base": (["acme/a", "--base", "larger"], 2, "acme/a@1 is of the base tiny, not of larger"),
    "named twice": (["acme/a", "acme/a@1"], 2, "acme/a@1 is named twice"),
    "misspelt": (["acme/aa"], 2, "Did you mean 'acme/a'?"),
    "not profiled": (["acme/plain"], 2, "nothing to rank: not profiled (1)"),
    "method": (["acme/a", "--method", "bordas"], 2, "Did you mean 'borda'?"),
    "skill": (["acme/a", "--skills", "sum"], 2, "Did you mean 'sums'?"),
    "choices": (["acme/a", "--choice-scores"], 2, "no item of its profile has choices"),
    "objective": (["acme/a", "--pareto", "score,speed"], 2, "'speed' is no objective"),
    "objective twice": (["acme/a", "--pareto", "size,size"], 2, "name each objective once"),
    "no latency": (["acme/a", "--latency", "{empty}", "--pareto", "score,latency"], 2, "no expert's latency is known"),
    "weight": (["acme/a", "--weigh", "size"], 2, "not KEY=VALUE"),
    "weight of words": (["acme/a", "--weigh", "size=much"], 2, "not a number"),
    "odd weight": (["acme/a", "--weigh", "size=nan"], 2, "the weight of size is nan"),
    "unknown cost": (["acme/a", "--weigh", "speed=1"], 2, "'speed' is no cost"),
    "latency of words": (["acme/a", "--latency", "{words}"], 2, "the latency of acme/a is 'slow'"),
    "latency file": (["acme/a", "--latency", "nowhere.json"], 2, "no such file"),
    "no prior": (["acme/a", "acme/b", "--method", "bradley-terry", "--prior", "0", "--skills", "law"], 2, "chain"),
    "bootstrap": (["acme/a", "--bootstrap", "-1"], 2, "the least is 0"),
    "pairs": (["--pairs", "nowhere.jsonl"], 2, "no such file"),
    "pairs without a row": (["--pairs", "{blank}"], 2, "holds no contest"),
    "pairs by borda": (["--pairs", "x.jsonl", "--method", "borda"], 2, "by bradley-terry alone"),
    "pairs of names": (["acme/a", "--pairs", "x.jsonl"], 2, "a NAME has no meaning beside --pairs"),
    "mean over by borda": (["acme/a", "--mean-over", "own"], 2, "mean-over own is of the method mean"),
    "prior by kemeny": (["acme/a", "--method", "kemeny", "--prior", "2"], 2, "prior 2.0 is of the method"),
    "scores drawn never": (["acme/a", "--draw-scores", "--bootstrap", "0"], 2, "bootstrap is 0"),
    "hardly a prior": (["acme/a", "--method", "bradley-terry", "--prior", "1e-300"], 2, "the prior is 1e-300"),
    "boundless prior": (["acme/a", "--method", "bradley-terry", "--prior", "inf"], 2, "the prior is inf"),
    "pairs and gains": (["--pairs", "x.jsonl", "--over", "gain"], 2, "--over has no meaning"),
    "pairs and choices": (["--pairs", "x.jsonl", "--choice-scores"], 2, "--choice-scores has no meaning"),
    "pairs and drawn scores": (["--pairs", "x.jsonl", "--draw-scores"], 2, "--draw-scores has no meaning"),
    "pairs and the mean": (["--pairs", "x.jsonl", "--mean-over", "own"], 2, "mean-over own is of the method mean"),
    "pairs and costs": (["--pairs", "x.jsonl", "--pareto", "size"], 2, "--pareto has no meaning"),
}


def test_mistakes(rank: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "words.json").write_text('{"acme/a": "slow"}')
    (tmp_path / "blank.jsonl").write_text("\n")
    files = {"blank": tmp_path / "blank.jsonl", "empty": tmp_path / "empty.json", "words": tmp_path / "words.json"}
    for mistake, (arguments, status, said) in MISTAKES.items():
        result = rank(*(argument.format(**files) for argument in arguments))
        assert result.exit_code == status and said in result.stderr, f"{mistake}: {result.output}"
        assert len(result.stderr.splitlines()) == 1 and result.stdout == "", mistake
