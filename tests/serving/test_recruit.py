"""Recruiting by K shots: ranks, groups, reasons, and an expert made to know the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.experts import recruit as recruiting
from xpert.experts.recruit import Recruitment, RecruitOptions, recruit
from xpert.experts.recruiting.shot_scores import Showing, score_shots, target_of, with_rationale
from xpert.records import Message, Row, Shots

SHOTS = Shots(tuple(Row(f"s{i}", (Message("user", f"question {i}"),), f"answer {i}") for i in range(3)))

Shown = Mapping[str, tuple[float, float]]
"""Key -> (accuracy, perplexity); key "" is the base."""


def recruited(shown: Shown, alike: Mapping[str, float] | None = None, **options: Any) -> Recruitment:
    """Recruits among experts that show themselves so. `alike`: cosines of pairs, by keys as in "a b"; else 0."""

    def likeness(lm: Any, folders: Mapping[str, Path], options: Any, progress: Any) -> Any:
        keys = list(folders)
        found = np.eye(len(keys))
        for pair, cosine in (alike or {}).items():
            one, other = pair.split()
            if one in keys and other in keys:
                i, j = keys.index(one), keys.index(other)
                found[i, j] = found[j, i] = cosine
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            recruiting, "score_shots", lambda *_, **__: {key: Showing(*figures) for key, figures in shown.items()}
        )
        patch.setattr(recruiting, "_likeness", likeness)
        folders = {key: Path(key) for key in shown if key}
        return recruit(None, None, folders, SHOTS, RecruitOptions(**options))  # type: ignore[arg-type]


FIVE = {"": (0.2, 9.0), "sure": (0.9, 2.0), "likely": (0.2, 4.0), "worse": (0.1, 20.0), "right": (0.6, 8.0)}


def test_the_best_group_is_in_and_all_say_why() -> None:
    found = recruited(FIVE, max_experts=2, candidates=2)
    assert [(one.key, one.rank, one.chosen) for one in found.experts] == [
        ("sure", 2.0, True),
        ("likely", 5.0, True),
        ("right", 5.0, False),
        ("worse", 8.0, False),
    ]
    reasons = {one.key: one.reason for one in found.experts}
    assert reasons["likely"] == (
        "ranks 5: accuracy 0.20 against the base's 0.20 (rank 3), perplexity 4.00 against 9.00 (rank 2); mean cosine "
        "to the others 0.000; its group comes to 8 (ranks 7 + diversity 1)"
    )
    assert reasons["right"].startswith("2 candidates rank before it (5): accuracy 0.60 against")
    assert reasons["worse"].startswith("no better than the base: accuracy 0.10 against the base's 0.20 (rank 4)")
    assert found.chosen == ("sure", "likely")
    assert found.summary() == (
        "recruited 2 of 2 candidates out of 4 experts: 8 (ranks 7 + diversity 1), the best of 1 groups (exact search), "
        "mean cosine 0.000 (products); perplexity is that of the answer"
    )


def test_diversity_lets_the_twin_of_a_member_stay_out() -> None:
    """sure + likely would have ranks 7 as sure + right has, but they are nearly the same expert."""
    for search, what in (("exact", "group with it"), ("greedy", "exchange for it")):
        found = recruited(FIVE, {"sure likely": 0.9, "sure right": 0.1}, max_experts=2, search=search)
        assert found.chosen == ("sure", "right")
        out = next(one for one in found.experts if one.key == "likely")
        assert out.similarity == pytest.approx(0.45)
        assert out.reason.endswith(
            f"mean cosine to the group 0.450; the best {what}, sure + likely, comes to 10 (ranks 7 + diversity "
            "3) against 9"
        )


def test_equal_groups_say_that_they_are() -> None:
    found = recruited(FIVE, max_experts=2)
    assert found.chosen == ("sure", "likely")
    assert found.experts[2].reason.endswith("; of equal groups the one whose members rank first is taken")


def test_nobody_better_than_the_base() -> None:
    shown = {"": (0.5, 2.0), "a": (0.5, 2.0), "b": (0.1, 3.0)}
    with pytest.raises(BadInput, match=r"no expert is better than the base model.*--no-beat-base"):
        recruited(shown)
    assert recruited(shown, beat_base=False).chosen == ("a", "b")


def test_more_places_than_experts_and_a_single_expert() -> None:
    assert recruited(FIVE, max_experts=99).chosen == ("sure", "likely", "right")
    alone = recruited({"": (0.2, 9.0), "a": (0.5, 2.0)})
    assert alone.chosen == ("a",) and alone.experts[0].similarity is None


def test_there_are_never_fewer_candidates_than_places() -> None:
    assert len(recruited(FIVE, max_experts=3, candidates=1).chosen) == 3


def test_equal_showings_share_their_ranks() -> None:
    found = recruited({"": (0.0, 9.0), "a": (0.5, 2.000001), "b": (0.5, 2.000002), "c": (0.25, math.inf)})
    assert [(one.key, one.accuracy_rank, one.perplexity_rank) for one in found.experts] == [
        ("a", 1.5, 1.5),
        ("b", 1.5, 1.5),
        ("c", 3.0, 3.0),
    ]
    assert found.lines()[2]["perplexity"] is None and "perplexity inf against 9.00" in found.experts[2].reason


def test_too_many_groups_are_refused_before_any_work() -> None:
    experts = {f"e{index}": Path() for index in range(60)}
    with pytest.raises(BadInput, match="--search greedy"):
        recruit(None, None, experts, SHOTS, RecruitOptions(max_experts=20, candidates=60))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([f"e{index}" for index in range(7)]),
        st.tuples(st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([1.5, 2.0, 4.0])),
        min_size=1,
    ),
    st.dictionaries(st.tuples(st.integers(0, 6), st.integers(0, 6)), st.sampled_from([-0.5, 0.0, 0.25, 1.0])),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.sampled_from(["exact", "greedy"]),
)
def test_the_order_of_experts_does_not_matter(
    experts: dict[str, tuple[float, float]], pairs: Any, r: Any, size: int, search: str
) -> None:
    alike = {f"e{i} e{j}": cosine for (i, j), cosine in pairs.items() if i < j}
    shuffled = list(experts.items())
    r.shuffle(shuffled)
    base = {"": (0.0, 8.0)}
    found = recruited({**base, **experts}, alike, max_experts=size, candidates=5, search=search)
    again = recruited({**base, **dict(shuffled)}, alike, max_experts=size, candidates=5, search=search)
    assert found.lines() == again.lines()


def test_scores_are_those_of_the_model(tiny_base: Path, make_adapter: Callable[..., Path]) -> None:
    """An answer that the expert gives by itself counts as right; its perplexity is that of a plain peft forward."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from xpert import plugins
    from xpert.language_model import encode_example, load_model
    from xpert.protocols import EngineRequest, Sampling

    lm = load_model(str(tiny_base), device="cpu")
    engine = plugins.load("engine", "torch-lora")(lm, max_batch=4)
    folder = make_adapter(seed=3)
    engine.add_expert("x", folder)
    experts = (("x", 1.0),)
    shown = score_shots(lm, engine, {"base": (), "x": experts}, SHOTS)["x"]
    assert shown.accuracy == 0.0
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder).eval()
    expected = []
    requests = []
    encoded = [encode_example(lm.tokenizer, row) for row in SHOTS]
    sampling = Sampling(max_tokens=max(len(ids) - start for ids, start in encoded) + 8)
    for row, (ids, start) in zip(SHOTS, encoded, strict=True):
        with torch.no_grad():
            logprobs = peft(torch.tensor([ids])).logits[0].log_softmax(-1)
        picked = [float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))]
        expected.append(math.exp(-sum(picked) / len(picked)))
        requests.append(EngineRequest(row.id, tuple(ids[:start]), experts, sampling))
    assert shown.perplexity == pytest.approx(sum(expected) / 3, rel=1e-3)
    said = dict.fromkeys((row.id for row in SHOTS), "")
    for piece in engine.generate(requests):
        said[piece.request_id] += piece.text
    own = Shots(tuple(Row(r.id, r.messages, r.response, columns={"answers": ["?", said[r.id]]}) for r in SHOTS))
    assert score_shots(lm, engine, {"x": experts}, own)["x"].accuracy == 1.0


def test_mix_with_shots(
    xpert: Callable[..., Any], make_expert: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Random experts: whoever is in has found the answers likelier than the base or answered more of them."""
    import json

    from xpert.registry.store import Registry

    registry = Registry(tmp_path / "r")
    for seed, skill in enumerate(("casing", "city", "colour"), 1):
        registry.publish(make_expert(skill, seed=seed), f"me/{skill}")
    shots = write_jsonl("shots.jsonl", [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(4)])
    out = tmp_path / "m.json"
    result = xpert("mix", "--registry", tmp_path / "r", "--shots", shots, "--max-experts", 1, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert len(value["experts"]) == 1 and len(value["recruited"]) == 3
    assert json.loads(out.read_text())["recruited"] == value["recruited"]
    assert value["recruited"][0]["perplexity_of"] == "answer"
    assert [one["chosen"] for one in value["recruited"]].count(True) == 1
    assert "in : me/" in result.stderr and "out: me/" in result.stderr


def test_rationales_are_part_of_the_perplexity(tiny_base: Path, make_adapter: Callable[..., Path]) -> None:
    """The answer first, then the explanation; accuracy looks at the answer alone."""
    from xpert import plugins
    from xpert.language_model import load_model

    reasoned = Shots(tuple(replace(row, columns={"rationale": f"since {row.id}"}) for row in SHOTS))
    written = Shots(tuple(replace(row, response=f"{row.response}\nsince {row.id}") for row in SHOTS))
    assert [target_of(row) for row in reasoned] == [row.response for row in written]
    assert (with_rationale(SHOTS), with_rationale(Shots((*reasoned.rows, SHOTS.rows[0])))) == (0, 3)
    lm = load_model(str(tiny_base), device="cpu")
    engine = plugins.load("engine", "torch-lora")(lm, max_batch=4)
    engine.add_expert("x", make_adapter(seed=3))
    sets = {"base": (), "x": (("x", 1.0),)}
    plain, found, expected = (score_shots(lm, engine, sets, shots) for shots in (SHOTS, reasoned, written))
    for key in sets:
        assert found[key].perplexity == pytest.approx(expected[key].perplexity, rel=1e-4)
        assert found[key].perplexity != pytest.approx(plain[key].perplexity, rel=1e-2)
        assert found[key].accuracy == plain[key].accuracy
    with pytest.raises(BadInput, match=r"shot s0: the rationale is 3, not text"):
        target_of(replace(SHOTS.rows[0], columns={"rationale": 3}))


def test_sets_that_share_batches_show_themselves_as_alone(tiny_base: Path, make_adapter: Callable[..., Path]) -> None:
    from xpert import plugins
    from xpert.language_model import load_model

    lm = load_model(str(tiny_base), device="cpu")
    engine = plugins.load("engine", "torch-lora")(lm, max_batch=4)
    for seed in range(3):
        engine.add_expert(f"e{seed}", make_adapter(seed=seed))
    sets = {"": (), "e0": (("e0", 1.0),), "e1": (("e1", 1.0),), "mean": (("e0", 0.5), ("e2", 0.5))}
    together = score_shots(lm, engine, sets, SHOTS)
    for name, experts in sets.items():
        alone = score_shots(lm, engine, {name: experts}, SHOTS)[name]
        assert together[name].accuracy == alone.accuracy
        assert together[name].perplexity == pytest.approx(alone.perplexity, rel=1e-4)


def test_twins_and_strangers_end_to_end(
    xpert: Callable[..., Any], make_expert: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Two copies of one expert are alike (cosine 1); with the third in the group only one of them is."""
    import json
    import shutil

    one, other = make_expert("casing", seed=1), make_expert("city", seed=2)
    twin = Path(shutil.copytree(one, tmp_path / "twin"))
    card = json.loads((twin / "expert.json").read_text())
    (twin / "expert.json").write_text(json.dumps({**card, "name": "twin"}))
    shots = write_jsonl(
        "shots.jsonl", [{"prompt": f"question {i}", "response": f"{i}", "rationale": "as said"} for i in range(3)]
    )
    out = tmp_path / "m.json"
    named = ("--experts", f"{one},{twin},{other}", "--no-beat-base", "--max-experts", 2)
    result = xpert("mix", *named, "--shots", shots, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    lines = {line["expert"]: line for line in json.loads(result.stdout)["recruited"]}
    assert lines["casing"]["perplexity_rank"] == lines["twin"]["perplexity_rank"]
    assert lines["casing"]["chosen"] != lines["twin"]["chosen"] and lines["city"]["chosen"]
    assert lines["city"]["perplexity_of"] == "answer and rationale (3 of 3 shots have one)"
    out_line = next(line for line in lines.values() if not line["chosen"])
    assert out_line["similarity"] > 0.4, "half of it is 1, to its twin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", 3], "--candidates is about recruiting, which needs shots. Give --shots FILE"),
        (["--no-beat-base"], "--beat-base is about recruiting"),
        (["--shots", "SHOTS", "--max-experts", 0], "max-experts is 0; the least is 1"),
        (["--shots", "SHOTS", "--search", "exat"], "unknown search 'exat'. Did you mean 'exact'?"),
        (["--shots", "SHOTS", "--diversity", "cosine"], "unknown diversity 'cosine'"),
    ],
)
def test_mistakes(
    xpert: Callable[..., Any], write_jsonl: Callable[..., Path], tmp_path: Path, arguments: list[Any], message: str
) -> None:
    shots = write_jsonl("shots.jsonl", [{"prompt": "question", "response": "answer"}])
    given_arguments = [shots if argument == "SHOTS" else argument for argument in arguments]
    result = xpert("mix", "--registry", tmp_path / "r", *given_arguments, "-o", tmp_path / "m.json")
    assert result.exit_code == 2 and message in result.stderr
