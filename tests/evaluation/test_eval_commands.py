"""`xpert profile` and `xpert eval` on the tiny model, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.registry.card import CARD_FILE, BaseModel, ExpertCard
from xpert.storage import hash_file

Run = Callable[..., Result]


@pytest.fixture
def expert(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An expert folder on the tiny base, as training leaves it."""

    def make(name: str, seed: int) -> Path:
        from xpert.model_files import model_fingerprint

        folder = tmp_path / name
        shutil.copytree(make_adapter(seed=seed), folder)
        (folder / "exemplars.jsonl").write_text(
            json.dumps({"prompt": f"{name} of something", "skill": name, "kind": "shot"}) + "\n", encoding="utf-8"
        )
        figures = {"rows": 1, "shots": 1, "steps": 1, "tokens": 1, "supervised_tokens": 1}
        ExpertCard(
            base=BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "LlamaForCausalLM"),
            adapter={"rank": 4, "alpha": 8},
            name=name,
            skills=(name,),
            training={"figures": {**figures, "first_loss": 1.0, "final_loss": 0.5}},
            files={path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.suffix != ".md"},
        ).write(folder)
        return folder

    return make


@pytest.fixture
def suite(columns: Callable[..., list[dict[str, Any]]], write_jsonl: Callable[..., Path]) -> Path:
    rows = columns(6, skills=("colour", "casing"))
    for row in rows:
        row |= {"answers": [row["output"]], "metric": "exact"}
        if row["skill"] == "colour":
            row["choices"] = ["green", "white", "black", "red"]
    return write_jsonl("suite.jsonl", [*rows, {**rows[0], "id": "x", "metric": "exec"}])


def test_a_profile_is_written_into_the_card(xpert: Run, expert: Callable[..., Path], suite: Path) -> None:
    folder = expert("colour", 1)
    weights = hash_file(folder / "adapter_model.safetensors")
    result = xpert("profile", folder, "--suite", suite, "--skip-metric", "exec", "--max-tokens", 4, "--quiet", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)["profile"]["skills"]
    profile = ExpertCard.read(folder).profile
    assert profile is not None
    assert profile.suite == "suite"
    assert set(profile.skills) == set(shown) == {"casing", "colour"}
    assert profile.skills["colour"].expert_choice is not None
    assert profile.skills["casing"].expert_choice is None
    assert profile.skills["colour"].expert.n == 3
    assert "colour" in (folder / "report.html").read_text(encoding="utf-8")
    assert "| colour | exact | 3 |" in (folder / "README.md").read_text(encoding="utf-8")
    assert hash_file(folder / "adapter_model.safetensors") == weights
    published = xpert("registry", "publish", folder, "--name", "me/colour", "--quiet")
    assert published.exit_code == 0, published.output


def test_a_profile_by_cluster_keyword_and_related_items(
    xpert: Run,
    expert: Callable[..., Path],
    columns: Callable[..., list[dict[str, Any]]],
    write_jsonl: Callable[..., Path],
) -> None:
    folder = expert("colour", 1)
    rows = columns(24, skills=("colour", "casing"))
    for number, row in enumerate(rows):
        row |= {"answers": [row["output"]], "metric": "exact" if number < 20 else "f1", "probe": f"p{number // 4}"}
    suite = write_jsonl("big.jsonl", rows)
    arguments = ("profile", folder, "--suite", suite, "--max-tokens", 3, "--keywords", "terms", "--clusters", 3)
    result = xpert(*arguments)
    assert result.exit_code == 0, result.output
    assert "related items agree" in result.stdout
    assert "left out of it (4 by f1)" in result.stdout
    profile = ExpertCard.read(folder).profile
    assert profile is not None
    assert sum(score.expert.n for score in profile.clusters.values()) == 24
    assert len(profile.clusters) == 3
    assert profile.keywords
    assert profile.how["keywords"]["by"] == "telling-terms"
    assert profile.how["clusters"]["embedder"].startswith("lsa/")
    assert profile.skills["colour"].consistency is not None
    assert profile.figures["items"] == 24
    assert 24 * 2 <= profile.figures["tokens"] <= 24 * 2 * 3
    assert 0 < profile.figures["seconds_per_item"] * 24 < profile.figures["seconds"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("Consistency on related items", "Scores by cluster", "Scores by keyword", "What the scoring took"):
        assert words in page
    published = xpert("registry", "publish", folder, "--name", "me/colour", "--quiet")
    assert published.exit_code == 0, published.output
    # Without groups the sections are not there, and the same answers give the same scores.
    again = xpert(*arguments[:-4], "--clusters", "none", "--probes", "none")
    assert again.exit_code == 0, again.output
    assert "this replaces the expert's earlier profile, on the same suite big" in again.stdout
    plain = ExpertCard.read(folder).profile
    assert plain is not None
    assert (plain.clusters, plain.keywords) == ({}, {})
    assert plain.skills["colour"].expert == profile.skills["colour"].expert
    assert "Scores by" in (folder / "report.html").read_text(encoding="utf-8")
    assert "Scores by cluster" not in (folder / "report.html").read_text(encoding="utf-8")


def test_a_model_names_keywords_and_routers_count_its_votes(
    xpert: Run, expert: Callable[..., Path], suite: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts.model_keywords import EngineAnswerer
    from xpert.experts.routable import keyword_votes

    asked: list[int] = []

    def answers(self: Any, questions: Any) -> Any:
        asked.append(len(questions))
        yield from ((index, "colours, words" if "colour" in q.text else "words") for index, q in enumerate(questions))

    monkeypatch.setattr(EngineAnswerer, "answers", answers)
    folder = expert("colour", 1)
    arguments = ("--keywords", "model", "--keyword-min", 3, "--skip-metric", "exec", "--max-tokens", 3, "--quiet")
    result = xpert("profile", folder, "--suite", suite, *arguments)
    assert result.exit_code == 0, result.output
    profile = ExpertCard.read(folder).profile
    assert profile is not None
    assert {name: score.expert.n for name, score in profile.keywords.items()} == {"words": 6, "colours": 3}
    assert profile.how["keywords"]["model"] == f"engine {ExpertCard.read(folder).base.fingerprint}"
    votes = keyword_votes(profile)
    assert {name: right + wrong for name, (right, wrong) in votes.items()} == {"words": 6, "colours": 3}
    assert asked == [30]
    # The same weights by another way are the same model: nothing is asked twice.
    other = xpert("profile", folder, "--suite", suite, *arguments, "--keyword-model", tiny_base)
    assert other.exit_code == 0, other.output
    assert asked == [30]


def test_a_model_that_names_next_to_nothing_is_told(
    xpert: Run, expert: Callable[..., Path], suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts.model_keywords import EngineAnswerer

    def answers(self: Any, questions: Any) -> Any:
        for index, question in enumerate(questions):
            yield index, "casing" if "(case 1 " in question.text else f"word {index}"

    monkeypatch.setattr(EngineAnswerer, "answers", answers)
    arguments = ("--keywords", "model", "--skip-metric", "exec", "--max-tokens", 2, "--quiet", "--json")
    result = xpert("profile", expert("colour", 1), "--suite", suite, *arguments)
    assert result.exit_code == 0, result.output
    told = " ".join(json.loads(result.stdout)["notes"])
    assert "for 5 of 6 items the model named no keyword twice" in told
    assert "no keyword has 5 items; lower --keyword-min" in told


def test_items_seen_in_training_are_told(
    xpert: Run, expert: Callable[..., Path], write_jsonl: Callable[..., Path]
) -> None:
    folder = expert("colour", 1)
    rows = [{"id": f"q{n}", "prompt": prompt, "answers": ["red"], "skill": "colour"} for n, prompt in
            enumerate(("Something", "  COLOUR of\nsomething. ", "colour of nothing"))]  # fmt: skip
    result = xpert("profile", folder, "--suite", write_jsonl("seen.jsonl", rows), "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "warning: 1 of the suite's 3 items stand among the prompts" in result.stdout
    assert "q1 for one" in result.stdout
    assert "xpert pool build --avoid" in result.stdout
    profile = ExpertCard.read(folder).profile
    assert profile is not None
    assert profile.how["seen_in_training"] == 1
    other = write_jsonl("other.jsonl", rows[:1])
    told = json.loads(xpert("profile", folder, "--suite", other, "--max-tokens", 2, "--quiet", "--json").stdout)
    assert told["notes"] == ["this replaces the expert's earlier profile, on another suite, seen"]
    other = write_jsonl("other.jsonl", rows[1:])  # of the same name, and yet another one
    told = json.loads(xpert("profile", folder, "--suite", other, "--max-tokens", 2, "--quiet", "--json").stdout)
    assert "this replaces the expert's earlier profile, on another suite, other" in told["notes"]
    (folder / "exemplars.jsonl").write_text("{}\n")
    broken = xpert("profile", folder, "--suite", other, "--max-tokens", 2, "--quiet")
    assert broken.exit_code == 2
    assert "exemplars cannot be read" in broken.stderr


def test_models_experts_and_mixtures_side_by_side(
    xpert: Run, expert: Callable[..., Path], suite: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for name, seed in (("colour", 1), ("casing", 2)):
        published = xpert("registry", "publish", expert(name, seed), "--name", f"me/{name}", "--quiet")
        assert published.exit_code == 0, published.output
    mixture = tmp_path / "mixture.json"
    mixed = xpert("mix", "--router", "oracle", "-o", mixture, "--quiet")
    assert mixed.exit_code == 0, mixed.output
    out = tmp_path / "scores.html"
    result = xpert(
        "eval", tiny_base, tmp_path / "colour", "me/casing", mixture, "--controls", "--suite", suite,
        "--skip-metric", "exec", "--max-tokens", 4, "-o", out, "--quiet", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    assert {tiny_base.name, "colour", "me/casing", "mixture", "base", "random routing", "oracle routing"} <= set(scores)
    assert scores["mixture"] == scores["oracle routing"], "this mixture's own router is the oracle"
    assert scores[tiny_base.name] == scores["base"]
    assert out.is_file()


def test_two_mixtures_keep_their_controls_apart(
    xpert: Run, expert: Callable[..., Path], suite: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("colour", "casing", "city"), 1):
        expert(name, seed)
    for name, members in (("m1", ("colour", "casing")), ("m2", ("colour", "city"))):
        paths = ",".join(str(tmp_path / member) for member in members)
        mixed = xpert("mix", "--experts", paths, "--router", "oracle", "-o", tmp_path / f"{name}.json", "--quiet")
        assert mixed.exit_code == 0, mixed.output
    # The base has moved: --base says where to.
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_base, moved)
    result = xpert(
        "eval", tmp_path / "m1.json", tmp_path / "m2.json", "--controls", "--base", moved, "--suite", suite,
        "--skip-metric", "exec", "--max-tokens", 2, "--limit", 1, "--quiet", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    own = {"random routing", "random routing of m2", "oracle routing", "oracle routing of m2"}
    assert set(found["scores"]) == set(found["borda"]) == {"m1", "m2", "base", "colour", "casing", "city"} | own


def test_the_table_ranks_by_borda(
    xpert: Run, expert: Callable[..., Path], suite: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = ("--suite", suite, "--skip-metric", "exec", "--max-tokens", 2, "--quiet")
    both = xpert("eval", tiny_base, expert("colour", 1), *run)
    assert both.exit_code == 0, both.output
    assert both.stdout.splitlines()[0].split()[-1] == "Borda"
    page = tmp_path / "scores.html"
    result = xpert("eval", tiny_base, *run, "-o", page)
    assert result.exit_code == 0, result.output
    head, line = result.stdout.splitlines()[:2]
    assert "Borda" not in head and len(line.split()) == 1 + len(head.split()), (
        "one subject has nobody to be ranked with"
    )
    assert "Borda" not in page.read_text(encoding="utf-8")
    assert line.startswith(tiny_base.name)
    # The suite has items with choices, so that scoring them by likelihood is shown too.
    assert result.stdout.splitlines()[-1].startswith(
        f"By likelihood over choices, where there are some: {tiny_base.name} "
    )


NAMED_BY = ["--skip-metric", "exec", "--keywords", "model", "--keyword-model"]
MISTAKES = [
    (["profile", "nowhere", "--suite", "SUITE"], 2, "no such expert folder"),
    (["profile", "EXPERT", "--suite", "SUITE"], 3, "needs a sandbox"),
    (["profile", "EXPERT", "--suite", "missing.jsonl"], 2, "missing.jsonl"),
    (["profile", "EXPERT", "--suite", "SUITE", "--skip-metric", "exec,exact"], 2, "every item is left out"),
    (["profile", "EXPERT", "--suite", "SUITE", "--max-tokens", "0"], 2, "max-tokens"),
    (["profile", "EXPERT", "--suite", "SUITE", "--keywords", "llm"], 2, "unknown keywords 'llm'"),
    (["profile", "EXPERT", "--suite", "SUITE", "--keyword-model", "m"], 2, "Add --keywords model"),
    (["profile", "EXPERT", "--suite", "SUITE", *NAMED_BY, "x.gguf"], 2, "x.gguf"),
    (["profile", "EXPERT", "--suite", "SUITE", *NAMED_BY, "http://x"], 2, "names no model"),
    (["profile", "EXPERT", "--suite", "SUITE", "--keyword-min", "0"], 2, "keyword-min is 0"),
    (["profile", "EXPERT", "--suite", "SUITE", "--probe-threshold", "2"], 2, "probe-threshold is 2"),
    (["profile", "EXPERT", "--suite", "SUITE", "--skip-metric", "exec", "--clusters", "no"], 2, "not a clusters"),
    (["profile", "EXPERT", "--suite", "SUITE", "--skip-metric", "exec", "--clusters", "7"], 2, "suite has 6 items"),
    (
        ["profile", "EXPERT", "--suite", "SUITE", "--skip-metric", "exec", "--clusters", "2", "--embedder", "x"],
        2,
        "unknown embedder",
    ),
    (["eval", "BASE", "--suite", "SUITE"], 3, "--skip-metric exec"),
    (["eval", "nowhere", "--suite", "SUITE", "--skip-metric", "exec"], 2, "an expert folder, or a model"),
    (["eval", "--suite", "SUITE"], 2, "MIXTURE"),
    (["eval", "BASE", "--suite", "SUITE", "--skip-metric", "exec", "--controls"], 2, "mixtures of several experts"),
    (["eval", "BASE", "--suite", "SUITE", "--skip-metric", "exec", "-o", "SUITE"], 2, "exists already"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), MISTAKES)
def test_mistakes(
    xpert: Run,
    expert: Callable[..., Path],
    suite: Path,
    tiny_base: Path,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    places = {"SUITE": str(suite), "EXPERT": str(expert("e", 1)), "BASE": str(tiny_base)}
    result = xpert(*[places.get(word, word) for word in arguments], "--quiet")
    assert result.exit_code == status, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_expert_of_another_base_is_refused(xpert: Run, expert: Callable[..., Path], suite: Path) -> None:
    folder = expert("e", 1)
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    card["base"]["fingerprint"] = "0" * 64
    (folder / CARD_FILE).write_text(json.dumps(card), encoding="utf-8")
    result = xpert("profile", folder, "--suite", suite, "--skip-metric", "exec", "--quiet")
    assert result.exit_code == 2
    assert "not the one the expert was trained on" in result.stderr
