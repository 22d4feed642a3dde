"""What a list of exemplars is worth: the fast way equals the plain one, and each list is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.few_shot import few_shot_messages, few_shot_row
from xpert.protocols import ListScore
from xpert.records import Message, Row, Shots

LISTS = [(0, 1, 2), (2, 1, 0), (3,), (4, 0)]


@pytest.fixture(scope="module")
def lm(tiny_base: Path) -> Any:
    from xpert.language_model import load_model

    return load_model(str(tiny_base), device="cpu", dtype="float32")


@pytest.fixture
def made(lm: Any, rows: list[Row]) -> Callable[..., Any]:
    from xpert.exemplar_scores import ExemplarScores

    def make(**options: Any) -> Any:
        return ExemplarScores(lm, Shots(tuple(rows[:6])), options.pop("queries", rows[50:57]), **options)

    return make


def plainly(lm: Any, shots: Sequence[Row], queries: Sequence[Row]) -> ListScore:
    """One query at a time, the whole prompt in one pass, token by token."""
    import torch

    from xpert.chat_form import encode_example

    means, exact = [], []
    for query in queries:
        ids, start = encode_example(lm.tokenizer, few_shot_row(shots, query))
        with torch.inference_mode():
            scores = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = range(start, len(ids))
        means.append(sum(float(scores[place - 1, ids[place]]) for place in answer) / len(answer))
        exact.append(all(int(scores[place - 1].argmax()) == ids[place] for place in answer))
    return ListScore(sum(means) / len(means), sum(exact) / len(exact))


def close(one: ListScore, two: ListScore) -> bool:
    return one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-4) and one.accuracy == two.accuracy


@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_reading_each_prompt_alone(
    share: bool, made: Callable[..., Any], lm: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert import exemplar_scores

    monkeypatch.setattr(exemplar_scores, "_BATCH_TOKENS", 400)  # several batches
    scores = made(share=share)
    found = [scores(order) for order in LISTS]
    for order, one in zip(LISTS, found, strict=True):
        assert close(one, plainly(lm, [rows[row] for row in order], rows[50:57]))
    assert len({round(one.log_likelihood, 6) for one in found}) == len(LISTS)


@pytest.mark.parametrize("share", [True, False])
def test_accuracy_counts_answers_that_greedy_decoding_gives(
    share: bool, made: Callable[..., Any], lm: Any, rows: list[Row]
) -> None:
    import torch

    end = torch.zeros(lm.model.config.vocab_size)
    end[lm.tokenizer.eos_token_id] = 1000  # a model that ends at once is right where the answer is nothing
    queries = [*rows[50:53], Row("silent", rows[53].messages, "")]
    head = lm.model.get_output_embeddings().register_forward_hook(lambda module, given, logits: logits + end)
    try:
        found = made(share=share, queries=queries)((0, 1))
        plain = plainly(lm, rows[:2], queries)
    finally:
        head.remove()
    assert found.accuracy == plain.accuracy == 0.25


def test_the_beginning_is_read_once(made: Callable[..., Any], lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, ...]] = []

    def note(module: Any, given: Any, options: dict[str, Any]) -> None:
        widths.append(tuple(options["input_ids"].shape))

    for share in (True, False):
        scores = made(share=share)
        hook = lm.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            scores((0, 1, 2))
        finally:
            hook.remove()
    (one, beginning), (queries, rest), (all_queries, whole) = widths
    assert (one, queries, all_queries) == (1, 7, 7)
    assert beginning + rest == whole
    assert rest < beginning


def test_each_list_is_read_once_and_goes_on_after_a_stop(made: Callable[..., Any], tmp_path: Path) -> None:
    scores = made(folder=tmp_path)
    first = [scores(order) for order in LISTS]
    assert [scores(order) for order in LISTS] == first
    assert scores.read == len(LISTS)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])  # killed while it wrote the last line
    again = made(folder=tmp_path)
    assert [again(order) for order in LISTS[:3]] == first[:3]
    assert again.read == 0
    assert close(again(LISTS[3]), first[3])
    assert again.read == 1
    assert made(folder=tmp_path)._known.keys() == set(LISTS)


def test_other_shots_queries_or_limits_are_other_scores(
    made: Callable[..., Any], lm: Any, rows: list[Row], tmp_path: Path
) -> None:
    from xpert.exemplar_scores import ExemplarScores

    made(folder=tmp_path)((0, 1))
    for scores in (
        made(folder=tmp_path, queries=rows[51:57]),
        made(folder=tmp_path, max_length=400),
        ExemplarScores(lm, Shots(tuple(rows[1:7])), rows[50:57], folder=tmp_path),
    ):
        scores((0, 1))
        assert scores.read == 1


def test_prompts_longer_than_the_context_are_refused_by_name(made: Callable[..., Any]) -> None:
    scores = made(max_length=100)
    scores.check(1)
    with pytest.raises(BadInput, match=r"5 exemplars with query r000\d\d and its answer take .* but 100 are read"):
        scores.check(5)
    with pytest.raises(BadInput, match="Lower --count"):
        scores((0, 1, 2, 3, 4))


def test_a_score_that_is_no_number_names_its_query(made: Callable[..., Any], lm: Any) -> None:
    head = lm.model.get_output_embeddings().register_forward_hook(lambda module, given, logits: logits * float("nan"))
    try:
        with pytest.raises(BadInput, match="query r00050 is not a number"):
            made()((0, 1))
    finally:
        head.remove()


# ── the prompt ───────────────────────────────────────────────────────────────────────────────────────────────────


def row(name: str, *turns: tuple[str, str], answer: str = "yes") -> Row:
    return Row(name, tuple(Message(role, content) for role, content in turns), answer)


def test_exemplars_are_turns_before_the_question() -> None:
    one = row("one", ("user", "a?"), answer="A")
    two = row("two", ("user", "b?"), ("assistant", "which b?"), ("user", "that b"), answer="B")
    found = few_shot_messages([two, one], row("query", ("user", "c?"), answer="C"))
    assert [(turn.role, turn.content) for turn in found] == [
        ("user", "b?"), ("assistant", "which b?"), ("user", "that b"), ("assistant", "B"),
        ("user", "a?"), ("assistant", "A"), ("user", "c?"),
    ]  # fmt: skip
    assert few_shot_messages([], one) == one.messages
    assert few_shot_row([one], two).response == "B"


def test_one_system_turn_opens_the_prompt() -> None:
    terse, kind = (row(name, ("system", name), ("user", f"{name}?")) for name in ("terse", "kind"))
    plain, ruled = row("q", ("user", "q?")), row("q", ("system", "mine"), ("user", "q?"))

    def systems(*rows: Row) -> list[tuple[int, str]]:
        found = few_shot_messages(rows[:-1], rows[-1])
        return [(place, turn.content) for place, turn in enumerate(found) if turn.role == "system"]

    assert systems(terse, kind, ruled) == [(0, "mine")]
    assert systems(terse, kind, plain) == [(0, "kind")]
    assert systems(terse, plain, plain) == [(0, "terse")]
    assert systems(plain, plain) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), min_size=1, max_size=4))
def test_the_shared_prefix_leaves_a_token_of_every_prompt(ids: list[list[int]]) -> None:
    from xpert.exemplar_scores import shared_prefix

    examples = [(tuple(one), len(one) - 1) for one in ids]
    found = shared_prefix(examples)
    assert 0 <= found <= min(len(one) for one in ids) - 2
    assert len({tuple(one[:found]) for one in ids}) == 1
    longest = min(len(one) for one in ids) - 2
    assert found == longest or len({tuple(one[: found + 1]) for one in ids}) > 1
