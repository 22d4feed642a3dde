"""The taxonomy: names however spelt, the tree, what a request means, means of children, and files that are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import BadInput, NotFound
from xpert.registry.card import Interval, SkillScore
from xpert.registry.skills.taxonomy import BUILTIN as BUILTIN_FILE
from xpert.registry.skills.taxonomy import Skill, Taxonomy, skill_words
from xpert.registry.store import Registry

Run = Callable[..., Result]
BUILTIN = Taxonomy.builtin()


def score(expert: float, n: int, metric: str = "exact", base: float = 0.0) -> SkillScore:
    return SkillScore(metric, Interval(expert, 0, 1, n), Interval(base, 0, 1, n))


def tree(**parents: str) -> Taxonomy:
    return Taxonomy.of(Skill(name, parents=tuple(above.split())) for name, above in parents.items())


# ── the built-in one ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_built_in_taxonomy_is_whole() -> None:
    assert len(BUILTIN) > 100
    assert [skill.name for skill in BUILTIN if not skill.about] == []
    assert all(BUILTIN.path(skill.name)[0] in BUILTIN.roots for skill in BUILTIN)
    assert Taxonomy.read(BUILTIN_FILE).fingerprint == BUILTIN.fingerprint


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("french-translation", "french-translation"),
        ("French translation", "french-translation"),
        ("translation_fr", "french-translation"),
        ("TRANSLATION-FRENCH", "french-translation"),
        ("Summarisation", "summarization"),
        ("word_problems", "math-word-problem"),
        ("nested nonsense", None),
        ("", None),
        ("--", None),
    ],
)
def test_a_skill_is_found_however_it_is_spelt(spelt: str, name: str | None) -> None:
    found = BUILTIN.find(spelt)
    assert (found and found.name) == name


def test_every_name_and_alias_finds_its_skill() -> None:
    for skill in BUILTIN:
        for name in (skill.name, *skill.aliases, skill.name.replace("-", "_").upper()):
            found = BUILTIN.find(name)
            assert found is skill, name


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("french translation", "french-translation"),
        ("translate this into French", "french-translation"),
        ("write a haiku", "poetry"),
        ("is this review positive or negative", "sentiment"),
        ("text to SQL code", "sql"),
    ],
)
def test_a_request_means_a_skill(query: str, first: str) -> None:
    assert BUILTIN.expand(query)[0] == first


def test_a_parent_means_all_below_it_and_nothing_means_nothing() -> None:
    assert BUILTIN.expand("translation") == ("translation", *BUILTIN.descendants("translation"))
    assert "german-translation" not in BUILTIN.expand("translate into French")
    assert BUILTIN.expand("xyzzy") == BUILTIN.expand("") == BUILTIN.expand([]) == ()


@given(st.lists(st.sampled_from([word for skill in BUILTIN for word in skill.words] + ["the", "of", "zebra"])))
def test_an_expansion_is_of_skills_each_once_with_all_below_them(query: list[str]) -> None:
    found = BUILTIN.expand(query)
    assert len(found) == len(set(found))
    assert {below for name in found for below in BUILTIN.descendants(name)} <= set(found)


# ── the tree ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_up_and_down_a_tree_with_two_ways() -> None:
    made = tree(a="", b="a", c="a", d="b c", e="d")
    assert made.children("a") == ("b", "c")
    assert made.descendants("a") == ("b", "c", "d", "e")
    assert made.ancestors("e") == ("d", "b", "c", "a")
    assert made.path("e") == ("a", "b", "d", "e")
    assert made.roots == ("a",)


def test_the_fingerprint_follows_content_and_not_order() -> None:
    one, other = tree(a="", b="a", c="a"), tree(a="", c="a", b="a")
    assert one.fingerprint == other.fingerprint != tree(a="", b="a", c="b").fingerprint


@given(st.data())
def test_descendants_and_ancestors_are_each_others_mirror(data: st.DataObject) -> None:
    names = [f"s{n}" for n in range(data.draw(st.integers(1, 9)))]
    above = {name: data.draw(st.lists(st.sampled_from(names[:at]), max_size=2)) if at else [] for at, name in
             enumerate(names)}  # fmt: skip
    made = Taxonomy.of(Skill(name, parents=tuple(dict.fromkeys(above[name]))) for name in names)
    for a in names:
        for b in names:
            assert (a in made.ancestors(b)) == (b in made.descendants(a)) == (a != b and reaches(above, b, a))


def reaches(above: dict[str, list[str]], start: str, goal: str) -> bool:
    """The plain version: does a way up lead from one to the other?"""
    return start == goal or any(reaches(above, parent, goal) for parent in above[start])


# ── scores of parents ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_request_is_read_run_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    find = Taxonomy.find
    monkeypatch.setattr(Taxonomy, "find", lambda self, name: asked.append(name) or find(self, name))  # type: ignore[func-returns-value]
    words = [f"word{number}" for number in range(300)]
    assert "french-translation" in BUILTIN.expand(" ".join([*words, "translate into French", *words]))
    longest = max(len(skill_words(name)) for skill in BUILTIN for name in (skill.name, *skill.aliases))
    assert len(asked) <= 603 * longest + 1, "time grows with the square of the words"


@pytest.mark.parametrize("names", [("translation_fr", "french-translation"), ("french-translation", "translation_fr")])
def test_a_skill_scored_under_two_of_its_names_counts_with_both(names: tuple[str, str]) -> None:
    one, other = names
    found = BUILTIN.roll_up({one: score(1.0, 30), other: score(0.0, 10), "german-translation": score(0.5, 20)})
    assert found["translation"].n == 60 and found["translation"].expert == pytest.approx(40 / 60)
    assert set(found["translation"].of) == {*names, "german-translation"}
    assert "french-translation" not in found


def test_a_parent_is_the_mean_of_its_children_weighted_by_items() -> None:
    found = BUILTIN.roll_up({"translation_fr": score(1.0, 30, base=0.5), "german-translation": score(0.2, 10)})
    parent = found["translation"]
    assert parent.expert == pytest.approx((30 + 2) / 40)
    assert parent.base == pytest.approx(15 / 40)
    assert (parent.metric, parent.n, parent.of) == ("exact", 40, ("french-translation", "german-translation"))
    assert "french-translation, german-translation" in parent.why
    assert set(found) == {"translation", "language"}, "and only what stands above a scored skill"


def test_different_metrics_have_no_mean() -> None:
    for metrics in (("exact", "chrf"), ("exact+f1", "exact+f1")):
        pair = zip(("french-translation", "german-translation"), metrics, strict=True)
        found = BUILTIN.roll_up({name: score(0.5, 10, metric) for name, metric in pair})["translation"]
        assert (found.expert, found.base, found.metric) == (None, None, None)
        assert "no number" in found.why
        assert all(part in found.why for metric in metrics for part in metric.split("+"))


def test_a_scored_skill_is_not_touched_and_stands_for_those_below_it() -> None:
    scores = {"translation": score(0.1, 10), "french-translation": score(1.0, 90), "arithmetic": score(0.5, 1)}
    found = BUILTIN.roll_up(scores)
    assert "translation" not in found
    assert found["language"].expert == pytest.approx(0.1)
    assert found["language"].of == ("translation",)
    assert BUILTIN.roll_up({"unheard of": score(1, 1)}) == {}


def test_a_skill_reached_by_two_ways_counts_once() -> None:
    made = tree(top="", left="top", right="top", leaf="left right", other="right")
    found = made.roll_up({"leaf": score(1.0, 10), "other": score(0.0, 10)})
    assert (found["top"].expert, found["top"].n) == (0.5, 20)


# ── files of the user's ──────────────────────────────────────────────────────────────────────────────────────────


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    value = {"kind": "taxonomy", "schema": 1, "skills": [{"name": "a"}, {"name": "b", "parent": "a", "aliases": ["x"]}]}
    (tmp_path / "t.json").write_text(json.dumps(value))
    (tmp_path / "t.yaml").write_text(
        "kind: taxonomy\nschema: 1\nskills:\n- name: a\n- {name: b, parents: [a], aliases: [x]}\n"
    )
    one, other = Taxonomy.read(tmp_path / "t.json"), Taxonomy.read(tmp_path / "t.yaml")
    assert one.fingerprint == other.fingerprint
    assert one.lookup("X").name == "b"


HEAD = "kind: taxonomy\nschema: 1\nskills:\n"
MISTAKES = [
    ("kind: pool\n", "not a taxonomy"),
    ("- a\n- b\n", "not a taxonomy"),
    ("kind: taxonomy\nschema: 2\nskills: []\n", "schema is 2"),
    ("kind: taxonomy\nschema: 1\n", "has no skills"),
    ("kind: [taxonomy\n", "neither YAML nor JSON"),
    (HEAD + "- about: nameless\n", "skill 1 has no name"),
    (HEAD + "- name: two words\n", "no name of a skill"),
    (HEAD + "- {name: a, parnet: b}\n", "Did you mean 'parent'"),
    (HEAD + "- {name: a, about: [x]}\n", "about of a is no text"),
    (HEAD + "- {name: a, aliases: [1]}\n", "aliases of a are not texts"),
    (HEAD + "- {name: a, aliases: ['!']}\n", "without a word"),
    (HEAD + "- {name: a, parent: [b]}\n", "parent of a are not texts"),
    (HEAD + "- {name: a, parent: translatoin}\n- name: translation\n", "Did you mean 'translation'"),
    (HEAD + "- name: a\n- name: a\n", "a stands twice"),
    (HEAD + "- {name: a, aliases: [Same Thing]}\n- {name: b, aliases: [same_things]}\n", "names both a and b"),
    (HEAD + "- name: a\n- {name: b, aliases: [A]}\n", "names both a and b"),
    (HEAD + "- {name: a, parent: c}\n- {name: b, parent: a}\n- {name: c, parent: b}\n", "a < c < b < a"),
    (HEAD + "- {name: a, parent: a}\n", "a < a"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_files_that_are_no_taxonomy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        Taxonomy.read(path)
    assert str(path) in str(caught.value)


def test_a_yaml_file_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(HEAD + "- !!python/object/apply:os.getcwd []\n")
    with pytest.raises(BadInput, match="neither YAML nor JSON"):
        Taxonomy.read(path)


@given(st.text(alphabet="abisenrgtzABIS01-_ éüßñш中"))
def test_words_fold_once_and_for_all(name: str) -> None:
    folded = skill_words(name)
    assert skill_words("-".join(folded)) == folded
    assert skill_words(name.upper()) == folded


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_shows_the_tree_and_a_skill_with_its_experts(
    xpert: Run, registry: Registry, expert: Callable[..., Path]
) -> None:
    sources: dict[str, dict[str, Any]] = {
        "french": {"skills": ("translation_fr",), "scores": {"translation_fr": 0.8}},
        "german": {"skills": ("translation-de",), "scores": {"translation-de": 0.3, "french translation": 0.5}},
        "unscored": {"skills": ("French",)},
        "declared": {"skills": ("machine translation",)},
        "sums": {"skills": ("arithmetic",), "scores": {"arithmetic": 0.9}},
    }
    for seed, (name, settings) in enumerate(sources.items()):
        registry.publish(expert(name, seed=seed, **settings), f"me/{name}")
    tree = xpert("registry", "skills", "--registry", registry.folder)
    assert tree.exit_code == 0, tree.output
    assert "\n    french-translation " in tree.output
    found = xpert("registry", "skills", "Translation", "--registry", registry.folder, "--json")
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert value["path"] == ["language", "translation"]
    lines = {(line["ref"], line["skill"]): line for line in value["experts"]}
    assert set(lines) == {
        ("me/french@1", "translation_fr"),
        ("me/german@1", "translation-de"),
        ("me/german@1", "french translation"),
        ("me/german@1", "translation"),
        ("me/declared@1", "machine translation"),
    }
    assert lines["me/german@1", "translation"]["expert"] == pytest.approx(0.4)
    assert lines["me/declared@1", "machine translation"]["expert"] is None
    assert value["experts"][0]["ref"] == "me/french@1", "the greatest gain first"
    shown = xpert("registry", "skills", "french-translation", "--registry", registry.folder)
    assert "me/french@1" in shown.stdout
    assert "me/declared" not in shown.stdout, "an expert for translation is not yet one for French"


def test_a_taxonomy_of_ones_own(xpert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(HEAD + "- {name: tulips, about: Bulbs.}\n")
    assert "tulips" in xpert("registry", "skills", "--taxonomy", path).stdout
    monkeypatch.setenv("XPERT_TAXONOMY", str(path))
    assert "Bulbs" in xpert("registry", "skills", "TULIP").stdout
    for arguments, message in (
        (("translation",), "unknown skill 'translation'"),
        (("--taxonomy", tmp_path / "none.yaml"), "no such taxonomy"),
        (("--taxonomy", tmp_path), "a folder"),
    ):
        result = xpert("registry", "skills", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("french", "Did you mean 'french-translation'?"),  # what the word means, before what it looks like
        ("arithmetik", "Did you mean 'arithmetic'?"),
        ("frobnicate", "`xpert registry skills` shows them all"),
    ],
)
def test_an_unknown_skill_is_answered_by_what_its_words_mean(asked: str, hint: str) -> None:
    with pytest.raises(NotFound) as refused:
        Taxonomy.builtin().lookup(asked)
    assert str(refused.value).endswith(f"unknown skill {asked!r}. {hint}")
