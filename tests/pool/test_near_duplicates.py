"""Words, boilerplate and near duplicates: the fast forms against their plain definitions, and the rule itself."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.boilerplate import Boilerplate
from xpert.first_seen import FirstSeen
from xpert.near_duplicates import NearDuplicates, bands_for, near_duplicate, sides
from xpert.words import HashSet, grams, hash_words, words

NOTHING = Boilerplate(np.empty(0, np.uint64))
LONG = "while the {} was on its way down the river some forty people from town stood waiting for news of the harvest"


def similar(one: tuple[str, str], two: tuple[str, str], threshold: float = 0.75) -> bool:
    left, right = sides([one, two], NOTHING)
    return near_duplicate(left, right, threshold)


@given(st.lists(st.text(alphabet=st.sampled_from("aB_9 .\n-é世界İß́"), max_size=40), max_size=12))
@settings(deadline=None)  # the first call loads pyarrow.compute
def test_hashed_words_are_the_words(texts: list[str]) -> None:
    hashed = hash_words(pa.array(texts, pa.large_string()))
    expected = [words(text) for text in texts]
    assert np.diff(hashed.offsets).tolist() == [len(spelt) for spelt in expected]
    hashes: dict[str, int] = {}
    for word, value in zip(itertools.chain(*expected), hashed.hashes.tolist(), strict=True):
        assert hashes.setdefault(word, value) == value
    assert len(set(hashes.values())) == len(hashes)


def test_long_words_differ_in_their_last_letter() -> None:
    spelt = [("x" * size) + end for size in range(40) for end in "ab"]
    assert len(set(hash_words(pa.array(spelt, pa.large_string())).hashes.tolist())) == len(spelt)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), max_size=6), st.integers(1, 4))
def test_grams_stay_inside_their_text(texts: list[list[str]], size: int) -> None:
    hashed = hash_words(pa.array([" ".join(text) for text in texts], pa.large_string()))
    values, at = grams(hashed, size)
    flat = list(itertools.chain(*texts))
    expected = [tuple(text[n : n + size]) for text in texts for n in range(len(text) - size + 1)]
    assert [tuple(flat[n : n + size]) for n in at.tolist()] == expected
    known: dict[tuple[str, ...], int] = {}
    assert all(known.setdefault(gram, value) == value for gram, value in zip(expected, values.tolist(), strict=True))


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_hash_set(members: list[int], asked: list[int]) -> None:
    asked += members[:3]
    found = HashSet(np.array(members, np.uint64)).contains(np.array(asked, np.uint64))
    assert found.tolist() == [value in set(members) for value in asked]


@given(st.lists(st.lists(st.integers(0, 20), max_size=15), max_size=15))
def test_first_seen(blocks: list[list[int]]) -> None:
    seen, count = FirstSeen(), 0
    first: dict[int, int] = {}
    for block in blocks:
        expected = []
        for value in block:
            expected.append(first.setdefault(value, count))
            count += 1
        assert seen.add(np.array(block, np.uint64)).tolist() == expected


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (LONG.format("boat"), LONG.format("ship"), True),
        (LONG.format("boat"), LONG.format("boat") + "!", True),
        (LONG.format("boat"), LONG.format("boat").upper(), True),
        (LONG.format("3 boats"), LONG.format("4 boats"), False),
        ("What is 3 + 5?", "What is 3 + 6?", False),
        (f"{LONG} 3 + 5", f"{LONG} 3 - 5", False),
        ("Spell the word backwards: boat", "Spell the word backwards: ship", False),
    ],
)
def test_prompts_that_are_nearly_the_same(one: str, two: str, expected: bool) -> None:
    assert similar((one, "so it is"), (two, "so it is")) == expected
    assert not similar((one, "yes"), (two, "no"))


def test_rows_alike_by_boilerplate_alone_are_kept() -> None:
    told = LONG.format("instruction") + " and then " + LONG.format("answer") + ":"
    rows = [(f"{told} {word}", "noun") for word in ("boat", "ship", "mill", "rain", "hill") * 6]
    batch = pa.record_batch({"prompt": [p for p, _ in rows], "response": [r for _, r in rows]})
    batch = batch.cast(pa.schema([("prompt", pa.large_string()), ("response", pa.large_string())]))
    learnt = Boilerplate.learn([batch], len(rows))
    left, right = sides(rows[:2], learnt)
    assert similar(rows[0], rows[1])
    assert not near_duplicate(left, right, 0.8)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_the_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    bands, width = bands_for(threshold)
    assert bands * width <= 64
    assert 1 - (1 - threshold**width) ** bands >= 0.99


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=2, max_size=20), st.integers(1, 20))
def test_the_search_finds_what_comparing_all_pairs_finds(picks: list[tuple[int, int]], batch: int) -> None:
    """Rows of a few long texts with one word changed, well above the threshold: greedy over all pairs is the truth."""
    base = [[f"w{text}x{n}" for n in range(60)] for text in "abcd"]
    rows = [(" ".join([*base[text][:place], "changed", *base[text][place + 1 :]]), "yes") for text, place in picks]
    near = NearDuplicates(0.7, NOTHING)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        source = hash_words(pa.array([f"{p}\n{r}" for p, r in part], pa.large_string()))
        near.add(source, NOTHING.covers(source))
    found = {pair.later for pair in near.find(lambda numbers: [rows[n] for n in numbers.tolist()])}
    every = sides(rows, NOTHING)
    kept: list[int] = []
    for number in range(len(rows)):
        if not any(near_duplicate(every[number], every[earlier], 0.7) for earlier in kept):
            kept.append(number)
    assert found == set(range(len(rows))) - set(kept)
