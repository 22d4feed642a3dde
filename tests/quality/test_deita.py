"""Deita: ratings equal a plain loop over single questions, and the filter equals the plain filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.chat_form import encode_prompt
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.language_model import load_model, load_tokenizer
from xpert.rated_turns import QUESTIONS, RatedTurns, number_tokens, turns
from xpert.records import Budget, Message, Row
from xpert.selection import choose

CONVERSATION = Row(
    "talk",
    (
        Message("system", "Be kind."),
        Message("user", "What is 2 + {2}?"),
        Message("assistant", "4"),
        Message("user", "And {response}?"),
    ),
    "8",
)


@pytest.fixture
def features(tiny_base: Path) -> Callable[..., Features]:
    def make(rows: Sequence[Row], max_length: int = 128, base: bool = True) -> Features:
        options = FeatureOptions(base=str(tiny_base) if base else None, max_length=max_length)
        return Features(pool_from_rows(rows), options, cache=None, device="cpu")

    return make


def scorer(name: str, features: Features, **params: Any) -> Any:
    plugin = plugins.load("scorer", name)
    made = plugin(plugin.Options.from_mapping(params))
    made.prepare(features, None, np.random.default_rng(0))
    return made


def by_hand(lm: Any, question: str) -> float:
    import torch

    ids = encode_prompt(lm.tokenizer, (Message("user", question),))
    numbers = [lm.tokenizer(str(number), add_special_tokens=False)["input_ids"] for number in range(1, 7)]
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, -1, [token for [token] in numbers]].double()
    return float((logits.softmax(0) * torch.arange(1, 7)).sum())


def test_turns_of_a_conversation() -> None:
    assert turns(CONVERSATION) == [("Be kind.\n\nWhat is 2 + {2}?", "4"), ("And {response}?", "8")]


@pytest.mark.parametrize("rates", ["complexity", "quality"])
def test_ratings_equal_single_questions(
    rates: str, rows: list[Row], tiny_base: Path, features: Callable[..., Features]
) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    pool = [*rows[:3], CONVERSATION]
    made = scorer(f"deita-{rates}", features(pool))
    found, scores = made.turn_ratings(np.arange(4)), made.score(np.arange(4))
    for index, row in enumerate(pool):
        for turn, (prompt, response) in enumerate(turns(row)):
            before, after = QUESTIONS[rates].split("{prompt}")
            question = before + prompt + after.replace("{response}", response)
            assert found[index, turn] == pytest.approx(by_hand(lm, question), abs=1e-4)
        assert np.isnan(found[index, len(turns(row)) :]).all()
        assert scores[index] == pytest.approx(np.nansum(found[index]), rel=1e-5)
    assert "in 2 turns" in made.explain(3)
    assert np.nanmin(found) >= 1
    assert np.nanmax(found) <= 6


def test_long_texts_are_cut_and_the_question_never_is(tiny_base: Path, features: Callable[..., Features]) -> None:
    long = Row("long", (Message("user", "word " * 900),), "answer " * 900)
    half = Row("half", (Message("user", "Why?"),), "answer " * 900)
    made = scorer("deita-quality", features([long, half], max_length=20))
    assert np.isfinite(made.score(np.arange(2))).all()
    assert made.log()[0]["texts cut"] == 2
    tokenizer = load_tokenizer(str(tiny_base))
    from xpert import rated_turns

    asker = rated_turns._Asker(
        load_model(str(tiny_base), device="cpu"), RatedTurns(str(tiny_base), QUESTIONS["quality"])
    )
    for row in (long, half):
        ids, cut = asker.ask(row.prompt, row.response)
        assert cut
        assert len(ids) <= 511
        text = tokenizer.decode(ids)
        assert text.rstrip().endswith("assistant")
        assert "Reply with one number from 1 to 6 and nothing else." in text
    assert "Why?" in text


def test_a_rating_that_is_no_number_is_refused(
    rows: list[Row], features: Callable[..., Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from xpert import linear_capture

    sound = linear_capture.answer_logits

    def broken(model: Any, batch: Any, **more: Any) -> Any:
        logits, targets, index = sound(model, batch, **more)
        return torch.full_like(logits, torch.nan), targets, index

    monkeypatch.setattr(linear_capture, "answer_logits", broken)
    with pytest.raises(BadInput, match=r"the rating is not a number \(rows r00000, r00001\)"):
        scorer("deita-quality", features(rows[:2])).score(np.arange(2))


def test_a_conversation_of_very_many_turns(features: Callable[..., Features]) -> None:
    exchange = (Message("user", "Hi"), Message("assistant", "Ho"))
    made = scorer("deita-complexity", features([Row("long", (*exchange * 20, Message("user", "Hi")), "Ho")]))
    assert np.isfinite(made.turn_ratings(np.array([0]))).all()
    assert made.log()[0]["more than 16 turns"] == 1


def test_a_context_without_room_for_the_question(tiny_base: Path) -> None:
    with pytest.raises(BadInput, match="fills the scorer's context of 511"):
        RatedTurns(str(tiny_base), "{prompt} " + "wordy " * 600).open("cpu")


class Words:
    """A tokenizer that knows whole words."""

    unk_token_id = 0

    def __init__(self, *known: str, mark: bool = False) -> None:
        self.known, self.mark = ["<unk>", *known], mark

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        index = self.known.index(text.strip()) if text.strip() in self.known else 0
        return {"input_ids": [99, index] if self.mark else [index]}


def test_number_tokens() -> None:
    assert number_tokens(Words(*"123456")) == ((), (1, 2, 3, 4, 5, 6))
    assert number_tokens(Words(*"123456", mark=True)) == ((99,), (1, 2, 3, 4, 5, 6))
    for lacking in (Words(*"12345"), Words("none"), Words(*"1234", "5 6")):
        with pytest.raises(BadInput, match="does not write each of the numbers"):
            number_tokens(lacking)


def test_a_model_without_the_numbers_is_refused(
    tmp_path: Path, rows: list[Row], features: Callable[..., Features], make_letters_base: Path
) -> None:
    with pytest.raises(BadInput, match=r"letters.*Take another scorer-model"):
        scorer("deita-quality", features(rows[:2]), scorer_model=str(make_letters_base)).score(np.arange(2))


@pytest.fixture
def make_letters_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that writes every number as the unknown token."""
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "letters"
    shutil.copytree(tiny_base, folder)
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="a").save_pretrained(folder)
    return folder


def test_a_question_of_ones_own_is_given_as_it_stands(
    tmp_path: Path, rows: list[Row], tiny_base: Path, features: Callable[..., Features]
) -> None:
    import torch

    (tmp_path / "q.txt").write_text("Q: {prompt} A: {response} Score:", encoding="utf-8")
    made = scorer("deita-quality", features(rows[:1]), question=str(tmp_path / "q.txt"))
    lm = load_model(str(tiny_base), device="cpu")
    ids = lm.tokenizer(f"Q: {rows[0].prompt} A: {rows[0].response} Score:")["input_ids"]
    numbers = list(number_tokens(lm.tokenizer)[1])
    with torch.no_grad():
        p = lm.model(torch.tensor([ids])).logits[0, -1, numbers].softmax(0)
    assert made.score(np.array([0]))[0] == pytest.approx(float((p * torch.arange(1, 7)).sum()), abs=1e-4)


def test_a_scorer_model_of_its_own_needs_no_base(
    rows: list[Row], tiny_base: Path, features: Callable[..., Features]
) -> None:
    plugin = plugins.load("selector", "deita-complexity")
    selector = plugin(plugin.Options(scorer_model=str(tiny_base)))
    found = choose(selector, features(rows[:5], base=False), None, Budget.parse("2"))
    assert len(found.rows) == 2
    with pytest.raises(BadInput, match="--base MODEL"):
        choose(plugin(plugin.Options()), features(rows[:5], base=False), None, Budget.parse("2"))


# ── the filter ───────────────────────────────────────────────────────────────────────────────────────────────────


class Drawn:
    """Features of random unit rows; the answers' words and the prompts' are the two scores."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        points = random.normal(size=(max(2, count // 3), 4))[random.integers(max(2, count // 3), size=count)]
        points = points + 0.2 * random.normal(size=points.shape)
        self.vectors = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
        self.words = random.integers(0, 9, size=count)
        rows = [Row(f"r{i}", (Message("user", f"p {i}"),), "w " * int(w)) for i, w in enumerate(self.words)]
        self.pool = pool_from_rows(rows)
        self.costs = random.integers(1, 9, size=count).astype(np.int64)

    lengths_unit = "tokens"

    def embeddings(self) -> Any:
        return self.vectors

    def lengths(self) -> Any:
        return self.costs


PARAMS = {"complexity": "complexity", "complexity_params": "measure=length", "quality": "length"}


def plain(features: Drawn, evol: Any, threshold: float, limit: int, costs: Any) -> tuple[list[int], list[int]]:
    taken: list[int] = []
    skipped: list[int] = []
    for row in np.argsort(-evol, kind="stable").tolist():
        cosines = [round(float(features.vectors[row] @ features.vectors[other]), 6) for other in taken]
        if max(cosines, default=-2) > threshold:
            skipped.append(row)
        elif sum(costs[taken]) + costs[row] <= limit:
            taken.append(row)
    back: list[int] = []
    for row in skipped:
        if sum(costs[taken + back]) + costs[row] <= limit:
            back.append(row)
    return taken, back


@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 500),
    threshold=st.floats(-0.5, 0.99),
    part=st.floats(0.05, 1),
    tokens=st.booleans(),
    block=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_the_filter_equals_the_plain_loop(
    count: int, seed: int, threshold: float, part: float, tokens: bool, block: int
) -> None:
    features = Drawn(count, seed)
    evol = features.words * features.costs.astype(np.float32)
    costs = features.costs if tokens else np.ones(count, np.int64)
    limit = max(int(costs.min()), round(part * int(costs.sum())))
    plugin = plugins.load("selector", "deita")
    selector = plugin(plugin.Options(threshold=threshold, **PARAMS))
    selector.block = block
    found = choose(selector, features, None, Budget.parse(f"{limit}{'tok' if tokens else ''}"))
    taken, back = plain(features, evol, threshold, limit, costs)
    assert found.rows.tolist() == taken + back
    assert found.scores.tolist() == evol[found.rows].tolist()
    assert found.log[0]["brought back"] == len(back)


def test_without_refill_repeats_stay_out() -> None:
    features = Drawn(30, 1)
    plugin = plugins.load("selector", "deita")
    found = choose(plugin(plugin.Options(threshold=0.5, refill=False, **PARAMS)), features, None, Budget.parse("100%"))
    cosines = features.vectors[found.rows] @ features.vectors[found.rows].T
    assert len(found.rows) < 30
    assert (cosines - 2 * np.eye(len(found.rows))).max() <= 0.5 + 1e-6


def test_evol_multiplies_turn_by_turn(features: Callable[..., Features], rows: list[Row]) -> None:
    given = features([CONVERSATION, *rows[:2]])
    complexity, quality = (
        scorer(f"deita-{rates}", given).turn_ratings(np.arange(3)) for rates in ("complexity", "quality")
    )
    plugin = plugins.load("selector", "deita")
    found = choose(plugin(plugin.Options()), given, None, Budget.parse("3"))
    expected = [float(np.nansum(complexity[row] * quality[row])) for row in found.rows]
    assert found.scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.reasons[0].startswith("evol ")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"quality": "ifdd"}, "did you mean 'ifd'"),
        ({"quality_params": "scorer=x"}, "unknown parameter 'scorer'"),
        ({"threshold": 1.5}, "the most is 1"),
        ({"complexity_params": "question=/nope.txt"}, "the question cannot be read"),
    ],
)
def test_mistakes(params: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        plugins.load("selector", "deita").Options.from_mapping(params)
    assert said.lower() in str(caught.value).lower()


@pytest.mark.parametrize(("text", "said"), [("Rate it:", "no {prompt}"), ("{prompt}:", "no {response}")])
def test_a_question_without_its_text(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "q.txt").write_text(text, encoding="utf-8")
    plugin = plugins.load("scorer", "deita-quality")
    with pytest.raises(BadInput, match=said):
        plugin(plugin.Options(question=str(tmp_path / "q.txt")))


def test_scores_below_zero_cannot_be_multiplied(features: Callable[..., Features], rows: list[Row]) -> None:
    plugin = plugins.load("selector", "deita")
    selector = plugin(plugin.Options(quality="perplexity", quality_params="order=low"))
    with pytest.raises(BadInput, match=r"scorer perplexity gives -.* for row r0"):
        choose(selector, features(rows[:4]), None, Budget.parse("2"))
