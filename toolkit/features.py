"""What is computed from a pool: lengths, embeddings and clusters. Lazy, and cached by content.

A feature is computed when it is first asked for, and kept in the cache folder under a key that holds the pool's
fingerprint, the embedder's identity and the settings; the same inputs are never computed twice.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xpert import plugins
from xpert.array_cache import ArrayCache, Arrays
from xpert.clustering import Clusters, cluster, cluster_count, telling_terms
from xpert.config import Config, option
from xpert.embedding import FIELDS, EmbeddingPass, FittedEmbedder, ShardedEmbedder, open_embedder
from xpert.errors import BadInput
from xpert.progress import SILENT, Progress, Task
from xpert.protocols import Embedder, Executor, Floats, RowPass
from xpert.records import Row, Shots
from xpert.row_store import RowStore
from xpert.storage import cache_folder, hash_json

if TYPE_CHECKING:
    from xpert.data import Pool

__all__ = ["FIELDS", "FeatureOptions", "Features", "estimate_tokens"]

_TOKENS_PER_WORD = 1.3
_TOLD_ROWS = 100
_USER_CACHE: Any = object()


@dataclass(frozen=True)
class FeatureOptions(Config):
    """How the features of a pool are computed."""

    embedder: str = option("lsa", "what turns texts into vectors: lsa, minilm, st:FOLDER or st:NAME, lm (needs --base)")
    embed_field: str = option("prompt", "what of a row is embedded", choices=tuple(FIELDS))
    clusters: str = option("auto", "how many clusters: a number, or auto: the square root of half the rows")
    base: str | None = option(
        None,
        "base model: its tokenizer counts lengths, its losses and gradients score rows, its states embed with lm "
        "(folder, hub name or .gguf)",
    )
    max_length: int = option(
        1024, "longest row in tokens that the base model reads for a score: longer ones are cut at their end", minimum=8
    )


class Features:
    """The features of a pool, and of the shots beside it.

    `cache` is the folder where they are kept: the user's cache unless given, None for memory alone. `executor` (with
    `workers`) runs what a model computes row by row; it never changes the results. `timings` and `spent` hold the wall
    and CPU seconds of each feature computed or read so far, those of this process alone. Not for use from several
    threads.
    """

    def __init__(
        self,
        pool: Pool,
        options: FeatureOptions | None = None,
        *,
        shots: Shots | None = None,
        device: str = "auto",
        seed: int = 0,
        progress: Progress = SILENT,
        cache: Path | None = _USER_CACHE,
        executor: str = "local",
        workers: int | None = None,
    ) -> None:
        self.pool = pool
        self.options = options or FeatureOptions()
        self.shots = shots
        self.device = device
        self.seed = seed
        self.progress = progress
        folder = cache_folder() / "features" if cache is _USER_CACHE else cache
        self._cache = ArrayCache(folder, progress)
        self._ready = False
        self._executor: Executor = plugins.load("executor", executor)(workers=workers, device=device, progress=progress)
        self._stores: dict[str, RowStore] = {}
        self.timings: dict[str, float] = {}
        self.spent: dict[str, float] = {}

    @property
    def folder(self) -> Path | None:
        """Where what is computed is kept; None where it stays in memory."""
        return self._cache.folder

    # ── embeddings ───────────────────────────────────────────────────────────────────────────────────────────────

    def embeddings(self) -> Floats:
        """float32 [n, d], L2-normalised, read-only; a row without content may be zero."""
        return self._embeddings

    def shot_embeddings(self) -> Floats:
        """float32 [K, d], in the order of the shots. Raises BadInput without shots, and for one without the answer that
        the embedded field holds."""
        return self._shot_embeddings

    def embed(self, rows: Iterable[Row]) -> Floats:
        """float32 [m, d] of any rows, by the embedder as fitted on the pool; not cached."""
        texts = [self._text(row.prompt, row.response) for row in rows]
        return _checked(self._fitted().embed(texts, self.progress), len(texts))

    @cached_property
    def _embeddings(self) -> Floats:
        if not len(self.pool):
            raise BadInput("the pool holds no rows", where=str(getattr(self.pool, "path", "") or "") or None)
        with self._timed("embeddings"):
            return self._cache.get_or_make("embeddings", self._embedding_key, self._embed_pool)["rows"]

    @cached_property
    def _shot_embeddings(self) -> Floats:
        shots = self._some_shots(answers=self.options.embed_field != "prompt")
        key = {**self._embedding_key, "shots": shots.fingerprint}
        with self._timed("shot embeddings"):
            return self._cache.get_or_make("shot-embeddings", key, lambda: {"rows": self.embed(shots)})["rows"]

    @cached_property
    def _embedder(self) -> Embedder:
        options = self.options
        return open_embedder(options.embedder, base=options.base, device=self.device, seed=self.seed)

    @cached_property
    def _embedding_key(self) -> dict[str, Any]:
        return {
            "pool": self.pool.fingerprint,
            "embedder": self._embedder.identity,
            "field": self.options.embed_field,
        }

    def _embed_pool(self) -> Arrays:
        embedder = self._embedder
        if isinstance(embedder, ShardedEmbedder):
            return {"rows": _checked(self._embed_shards(embedder), len(self.pool))}
        texts = self._pool_texts()
        if isinstance(embedder, FittedEmbedder) and not self._restored(embedder):
            rows = self._fit(embedder, texts)
        else:
            rows = self._fitted().embed(texts, self.progress)
        return {"rows": _checked(rows, len(self.pool))}

    def _embed_shards(self, embedder: ShardedEmbedder) -> Floats:
        """The heavy part by the executor, shard by shard; the shards, which the array then holds, are dropped."""
        options = self.options
        row_pass = EmbeddingPass(options.embedder, options.embed_field, options.base, self.seed, embedder)
        rows = embedder.settle(self.compute(row_pass, np.arange(len(self.pool), dtype=np.int64))["rows"])
        if isinstance(embedder, FittedEmbedder):
            self._cache.put("embedder", self._embedding_key, embedder.state())
        self._ready = True
        self._store(row_pass).drop()
        return rows

    def _fitted(self) -> Embedder:
        """The embedder, fitted on the pool or restored as it was fitted."""
        embedder = self._embedder
        if isinstance(embedder, FittedEmbedder):
            if not self._restored(embedder):
                self._fit(embedder, self._pool_texts())
        elif not self._ready:
            embedder.fit(self._pool_texts())
            self._ready = True
        return embedder

    def _restored(self, embedder: FittedEmbedder) -> bool:
        """Whether the embedder knows the pool: it was fitted here before, or its stored state has been read."""
        if not self._ready and (stored := self._cache.find("embedder", self._embedding_key)) is not None:
            embedder.restore(stored)
            self._ready = True
        return self._ready

    def _fit(self, embedder: FittedEmbedder, texts: Sequence[str]) -> Floats:
        self.progress.say(f"fitting {self.options.embedder} on {len(texts):,} rows")
        rows = embedder.fit_embed(texts, self.progress)
        self._cache.put("embedder", self._embedding_key, embedder.state())
        self._ready = True
        return rows

    def _pool_texts(self) -> Sequence[str]:
        if self.options.embed_field == "prompt":
            return list(self.pool.prompts())
        if self.options.embed_field == "response":
            return list(self.pool.responses())
        return [self._text(p, r) for p, r in zip(self.pool.prompts(), self.pool.responses(), strict=True)]

    def _text(self, prompt: str, response: str) -> str:
        return FIELDS[self.options.embed_field](prompt, response)

    # ── lengths ──────────────────────────────────────────────────────────────────────────────────────────────────

    def lengths(self) -> NDArray[np.int64]:
        """int64 [n]: the tokens of each row that training learns from, in `lengths_unit`."""
        return self._lengths

    @property
    def lengths_unit(self) -> str:
        """What `lengths` counts: tokens of the base model's tokenizer, or an estimate of them."""
        if self.options.base is not None:
            return f"tokens of {self.options.base}"
        return f"estimated tokens ({_TOKENS_PER_WORD} a word; give --base to count them)"

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        with self._timed("lengths"):
            base = self.options.base
            if base is None:
                return estimate_tokens(self.pool.responses())
            from xpert.language_model import answer_lengths, load_tokenizer, model_fingerprint

            def count() -> Arrays:
                return {"tokens": answer_lengths(load_tokenizer(base), self.pool.responses())}

            key = {"pool": self.pool.fingerprint, "base": model_fingerprint(base)}
            return self._cache.get_or_make("lengths", key, count)["tokens"]

    # ── clusters ─────────────────────────────────────────────────────────────────────────────────────────────────

    def clusters(self) -> Clusters:
        """Spherical k-means clusters of the embeddings, with telling terms of the prompts."""
        return self._clusters

    @cached_property
    def _clusters(self) -> Clusters:
        embeddings = self.embeddings()
        with self._timed("clusters"):
            count = cluster_count(self.options.clusters, embeddings)
            key = {**self._embedding_key, "clusters": count, "seed": self.seed, "form": 1}
            stored = self._cache.get_or_make("clusters", key, lambda: self._make_clusters(embeddings, count))
            terms = bytes(stored["terms"]).decode().split("\n")
            return Clusters(
                labels=stored["labels"],
                centroids=stored["centroids"],
                terms=[[term for term in line.split("\t") if term] for line in terms],
            )

    def _make_clusters(self, embeddings: Floats, count: int) -> Arrays:
        self.progress.say(f"clustering {len(embeddings):,} rows into {count:,}")
        labels, centroids = cluster(embeddings, count, seed=self.seed)
        terms = telling_terms(self.pool.prompts(), labels, count, seed=self.seed)
        encoded = "\n".join("\t".join(line) for line in terms).encode()
        return {"labels": labels, "centroids": centroids, "terms": np.frombuffer(encoded, np.uint8)}

    # ── what a model computes row by row ─────────────────────────────────────────────────────────────────────────

    def base(self) -> str:
        """The base model's name. Raises BadInput where none is given."""
        if self.options.base is None:
            raise BadInput("the method reads rows with a base model", hint="give it with --base MODEL")
        return self.options.base

    def compute(self, row_pass: RowPass, rows: NDArray[np.int64]) -> Arrays:
        """The arrays of a pass for pool rows [m], in their order; only those not computed before cost anything.

        Finished shards are kept as they come: the same call goes on where it was stopped. Raises ValueError without
        rows.
        """
        store = self._store(row_pass)
        missing = store.missing(rows)
        if len(missing):
            size = row_pass.shard_rows
            parts = [missing[start : start + size] for start in range(0, len(missing), size)]
            shards = [partial(self.pool.rows, part.tolist()) for part in parts]
            with self._timed(row_pass.name), self._task(row_pass.name, len(missing)) as task:
                for index, arrays in self._executor.run(row_pass, shards):
                    store.add(parts[index], arrays)
                    task.advance(len(parts[index]))
        return store.read(rows)

    def compute_shots(self, row_pass: RowPass) -> Arrays:
        """The arrays of a pass for the shots [K]. Raises BadInput without shots, and for one without an answer."""
        shots = self._some_shots(answers=True)
        key = {"pass": row_pass.name, **row_pass.key, "shots": shots.fingerprint}

        def run() -> Arrays:
            [(_, arrays)] = self._executor.run(row_pass, [lambda: tuple(shots)])
            return arrays

        with self._timed(f"{row_pass.name} of shots"):
            return self._cache.get_or_make("shot-pass", key, run)

    def _some_shots(self, *, answers: bool) -> Shots:
        """The shots; raises BadInput where there are none, or where their answers are read and one has none."""
        if self.shots is None or not len(self.shots):
            raise BadInput("there are no shots to compare with", hint="give them with --shots FILE")
        if answers and self.shots.unanswered:
            raise BadInput(
                f"shot {self.shots.unanswered[0].id} has no answer to compare with",
                hint="fill in the shots' answers, or read prompts alone: --embed-field prompt",
            )
        return self.shots

    def computed(self, row_pass: RowPass) -> int:
        """How many of the pool's rows the pass is there for."""
        return len(self._store(row_pass))

    def _store(self, row_pass: RowPass) -> RowStore:
        key = hash_json({"pass": row_pass.name, "pool": self.pool.fingerprint, **row_pass.key})[:32]
        if key not in self._stores:
            folder = self._cache.folder / f"{row_pass.name}-{key}" if self._cache.folder else None
            self._stores[key] = RowStore(folder, len(self.pool), self.progress)
        return self._stores[key]

    @contextmanager
    def _task(self, name: str, total: int) -> Iterator[Task]:
        """Progress of a pass; a bandit's many small calls say nothing."""
        progress = self.progress if total >= _TOLD_ROWS else SILENT
        with progress.task(f"{name}, rows", total) as task:
            yield task

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - wall
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - processor

    def describe(self) -> Mapping[str, Any]:
        """What a manifest says of the features: options, the embedder's identity and the seed."""
        return {**dataclasses.asdict(self.options), "embedder_identity": self._embedder.identity, "seed": self.seed}


def estimate_tokens(texts: Iterable[str]) -> NDArray[np.int64]:
    """1.3 tokens a word, rounded up, and one for the end of the turn: int64 [n]."""
    return np.fromiter((math.ceil(_TOKENS_PER_WORD * len(text.split())) + 1 for text in texts), np.int64)


def _checked(rows: Floats, expected: int) -> Floats:
    """Holds an embedder, which may be anyone's plug-in, to its contract."""
    if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != expected:
        raise ValueError(f"the embedder returned {rows.dtype} {rows.shape} for {expected} texts, not float32 [n, d]")
    if not np.isfinite(rows).all():
        raise ValueError("the embedder returned numbers that are not finite")
    return rows
