"""Observing: every subject answers every item once; what is stored is what a plain run gives, whole or resumed."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.metrics import score
from xpert.experts.mixture import Mixture
from xpert.experts.mixture_file import load_mixture
from xpert.experts.router_learning import observing
from xpert.experts.router_learning.observations import ROWS_FILE, for_mixture, read_observations
from xpert.experts.router_learning.observe_options import ObserveOptions
from xpert.experts.router_learning.observing import observe, observed_on
from xpert.protocols import EngineRequest, Sampling
from xpert.row_files import read_suite

OPTIONS = ObserveOptions(max_tokens=6, max_batch=4)
Write = Callable[..., Path]


@pytest.fixture
def suite(write_jsonl: Write, columns: Callable[..., list[dict[str, Any]]]) -> Path:
    """Seven items; two of them offer choices."""
    rows = columns(7, seed=3, skills=("casing", "arithmetic", "reversal"))
    for row in rows:
        row["metric"] = "chrf"
    for row in rows[:2]:
        row |= {"choices": [row["output"], "something else"], "metric": "choice"}
    return write_jsonl("suite.jsonl", rows)


MADE: list[Mixture] = []


@pytest.fixture
def mixture(mixture_file: Callable[..., Path]) -> Mixture:
    """Three experts, made once."""
    if not MADE:
        MADE.append(load_mixture(mixture_file("fixed")))
    return MADE[0]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS_FILE).read_text().splitlines()]


def test_each_number_is_that_of_a_plain_run(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    """One request at a time, without batches or saves."""
    from xpert.chat_form import answer_ids, encode_prompt
    from xpert.experts.serving import load_engine

    seen = observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu").observations
    items = read_suite(suite).items
    assert seen.subjects == ("casing", "arithmetic", "reversal", "base")
    assert [r.id for r in seen.requests] == [item.row.id for item in items]
    assert [r.skill for r in seen.requests] == [item.skill for item in items]
    assert seen.confidences is not None
    lm, engine = load_engine(mixture, device="cpu", max_batch=1)
    outputs = [line["outputs"] for line in lines_of(tmp_path / "seen")]
    for row, item in enumerate(items):
        prompt = encode_prompt(lm.tokenizer, item.row.messages)
        reference = answer_ids(lm.tokenizer, [item.row.response])[0]
        for column, subject in enumerate(seen.subjects):
            experts = () if subject == "base" else ((subject, 1.0),)
            request = EngineRequest("one", prompt, experts, Sampling(max_tokens=6, logprobs=0))
            pieces = list(engine.generate([request]))
            text = "".join(piece.text for piece in pieces)
            told = [token.logprob for piece in pieces for token in piece.tokens]
            assert outputs[row][column] == text
            assert seen.scores[row, column] == score(item.metric, text, item.answers, item.choices)
            assert seen.confidences[row, column] == pytest.approx(math.exp(np.mean(told)), rel=1e-3)
            alone = -np.mean(engine.continuation_logprobs([request], [reference])[0])
            assert seen.losses[row, column] == pytest.approx(alone, rel=1e-4)
    assert len(np.unique(seen.losses.round(6))) > len(items)  # the experts differ


def test_what_is_read_is_what_was_written(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    made = observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")
    again = read_observations(tmp_path / "seen")
    assert again.observations.requests == made.observations.requests
    for name in ("scores", "losses", "confidences"):
        np.testing.assert_array_equal(getattr(again.observations, name), getattr(made.observations, name))
    figures = json.loads((tmp_path / "seen" / "manifest.json").read_text())["figures"]
    assert figures["items"] == 7
    assert figures["scores"]["base"] == pytest.approx(made.observations.scores[:, -1].mean())
    assert figures["best_per_item"] == pytest.approx(made.observations.scores.max(axis=1).mean())


def test_by_likelihood_the_likeliest_choice_is_scored(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    """Of items with choices; the others are scored by what is generated."""
    by_choice = observe(mixture, suite, tmp_path / "a", replace(OPTIONS, metric="likelihood"), device="cpu")
    generated = observe(mixture, suite, tmp_path / "b", OPTIONS, device="cpu")
    assert by_choice.metrics[:2] == ("likeliest choice",) * 2
    assert by_choice.metrics[2:] == generated.metrics[2:] == ("chrf",) * 5
    assert set(by_choice.observations.scores[:2].ravel()) <= {0.0, 1.0}
    np.testing.assert_array_equal(by_choice.observations.scores[2:], generated.observations.scores[2:])

    from xpert.chat_form import answer_ids, encode_prompt
    from xpert.experts.serving import load_engine

    lm, engine = load_engine(mixture, device="cpu", max_batch=1)
    item = read_suite(suite).items[0]
    request = EngineRequest("one", encode_prompt(lm.tokenizer, item.row.messages), (("casing", 1.0),))
    sums = [
        sum(engine.continuation_logprobs([request], [answer_ids(lm.tokenizer, [choice])[0]])[0])
        for choice in item.choices or ()
    ]
    assert by_choice.observations.scores[0, 0] == float(np.argmax(sums) == 0)


def test_a_stopped_run_goes_on_and_ends_the_same(
    mixture: Mixture, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts import subjects

    monkeypatch.setattr(observing, "_STEP", 2)
    whole = observe(mixture, suite, tmp_path / "whole", OPTIONS, device="cpu")
    asked: list[list[str]] = []
    usual = subjects.score_subjects

    def counted(lm: Any, engine: Any, some: Any, items: Any, *rest: Any, **options: Any) -> Any:
        asked.append([item.row.id for item in items])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return usual(lm, engine, some, items, *rest, **options)

    monkeypatch.setattr(subjects, "score_subjects", counted)
    with pytest.raises(KeyboardInterrupt):
        observe(mixture, suite, tmp_path / "parts", OPTIONS, device="cpu")
    assert not (tmp_path / "parts").exists()
    found = observe(mixture, suite, tmp_path / "parts", OPTIONS, device="cpu")
    ids = [item.row.id for item in read_suite(suite).items]
    assert asked == [ids[:2], ids[2:4], ids[4:6], ids[4:6], ids[6:]]
    assert found.outputs == whole.outputs
    np.testing.assert_allclose(found.observations.losses, whole.observations.losses, rtol=1e-5)
    assert not list(tmp_path.glob(".parts*"))


def test_another_configuration_does_not_meet_what_a_stopped_run_left(
    mixture: Mixture, suite: Path, tmp_path: Path
) -> None:
    (tmp_path / ".seen.partial").write_text('{"key": "of another run"}\n{"index": 0, "row": {}}\n')
    assert len(observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")) == 7


def test_two_processes_do_not_observe_into_one_folder(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    with open(tmp_path / ".seen.partial", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another process is observing into it"):
            observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")


def test_a_suite_is_observed_once(
    mixture: Mixture, suite: Path, monkeypatch: pytest.MonkeyPatch, mixture_file: Callable[..., Path]
) -> None:
    """Found again whatever the router, the batch, and the order of the experts."""
    first = observed_on(mixture, suite, OPTIONS, device="cpu")
    monkeypatch.setattr(observing, "_rows", None)
    again = observed_on(replace(mixture, router="random"), suite, replace(OPTIONS, max_batch=2), device="cpu")
    assert again.folder == first.folder
    turned = observed_on(replace(mixture, experts=mixture.experts[::-1]), suite, OPTIONS, device="cpu")
    assert turned.observations.subjects == ("reversal", "arithmetic", "casing", "base")
    np.testing.assert_array_equal(turned.observations.scores, first.observations.scores[:, [2, 1, 0, 3]])
    assert turned.outputs[0] == tuple(first.outputs[0][place] for place in (2, 1, 0, 3))


def test_observations_of_more_experts_serve_a_smaller_mixture(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    made = observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")
    fewer = for_mixture(made, replace(mixture, experts=mixture.experts[1:]))
    assert fewer.observations.subjects == ("arithmetic", "reversal", "base")
    np.testing.assert_array_equal(fewer.observations.losses, made.observations.losses[:, 1:])


def test_observations_of_other_experts_are_refused(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    made = observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")
    first, *rest = mixture.experts
    with pytest.raises(BadInput, match="'casing' was observed with other weights"):
        for_mixture(made, replace(mixture, experts=(replace(first, fingerprint="0" * 64), *rest)))
    with pytest.raises(BadInput, match="'rhyme' was not observed"):
        for_mixture(made, replace(mixture, experts=(replace(first, key="rhyme"), *rest)))
    with pytest.raises(BadInput, match="observed on another base"):
        for_mixture(made, replace(mixture, base=replace(mixture.base, fingerprint="1" * 64)))
    with pytest.raises(BadInput, match="takes no options of observing"):
        observed_on(mixture, tmp_path / "seen", OPTIONS)


def test_damaged_observations(mixture: Mixture, suite: Path, tmp_path: Path) -> None:
    observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")
    rows = tmp_path / "seen" / ROWS_FILE
    rows.write_text(rows.read_text().replace('"casing"', '"Casing"'))
    with pytest.raises(Corrupt, match="has changed since it was written"):
        read_observations(tmp_path / "seen")
    rows.unlink()
    with pytest.raises(Corrupt, match=r"it has no observations\.jsonl"):
        read_observations(tmp_path / "seen")
    with pytest.raises(NotFound, match="it has no manifest"):
        read_observations(tmp_path)


def test_items_that_an_expert_was_trained_on_are_told(
    mixture: Mixture, columns: Callable[..., list[dict[str, Any]]], write_jsonl: Write, tmp_path: Path
) -> None:
    """The exemplars of these experts are rows of 200."""
    shown = [row for row in columns(200) if row["skill"] == "casing"][:2]
    suite = write_jsonl("shown.jsonl", [*shown, *columns(1, seed=9)])
    found = observe(mixture, suite, tmp_path / "seen", OPTIONS, device="cpu")
    assert found.figures["seen_in_training"] == {"casing": 2}


def test_through_the_command(
    xpert: Callable[..., Result], mixture_file: Callable[..., Path], suite: Path, tmp_path: Path
) -> None:
    found = xpert(
        "router",
        "observe",
        mixture_file("fixed"),
        "--on",
        suite,
        "-o",
        tmp_path / "seen",
        "--limit",
        1,
        "--max-tokens",
        3,
        "--device",
        "cpu",
        "--json",
    )
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert value["items"] == 3
    assert value["subjects"] == ["casing", "arithmetic", "reversal", "base"]
    taken = xpert("router", "observe", mixture_file("fixed", name="b"), "--on", suite, "-o", tmp_path / "seen")
    assert (taken.exit_code, "the output exists already" in taken.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "gone.jsonl", "-o", "seen"), "gone.jsonl"),
        (("--on", "suite.jsonl", "-o", "suite.jsonl"), "the output exists already"),
        (("--on", "suite.jsonl", "-o", "seen", "--metric", "likelyhood"), "Did you mean 'likelihood'?"),
        (("--on", "suite.jsonl", "-o", "seen", "--limit", "0"), "limit is 0; the least is 1"),
        (("--on", "suite.jsonl", "-o", "seen", "--skip-metric", "chrf,choice"), "every item is left out"),
        (("--on", "suite.jsonl"), "Missing option '-o'"),
    ],
)
def test_mistakes(
    xpert: Callable[..., Result],
    mixture_file: Callable[..., Path],
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = xpert("router", "observe", mixture_file("fixed"), *arguments, "--device", "cpu")
    assert (found.exit_code, found.stdout) == (2, "")
    assert message in found.stderr.splitlines()[-1]
    assert not (tmp_path / "seen").exists()
