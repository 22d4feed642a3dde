"""Prototypes of an expert: centroids of its exemplars per skill, in an embedder's space, kept in its folder.

They tell where an expert's tasks lie without its exemplars being embedded again, and can be compared with those of any
expert and with any prompt, as long as the embedder is the same. After the pilot embeddings of RouterRetriever
(arXiv:2409.02685).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xpert.clustering import cluster, different_rows
from xpert.embedding import FittedEmbedder, ShardedEmbedder, open_embedder
from xpert.errors import BadInput, NotFound
from xpert.experts.mixture import open_expert
from xpert.experts.prototype_file import read_prototypes
from xpert.experts.spending import in_all, spent_of
from xpert.progress import SILENT, Progress
from xpert.protocols import Floats
from xpert.registry.card import ExpertCard, Prototypes
from xpert.storage import hash_file, write_file

__all__ = ["PROTOTYPES_FILE", "FixedSpace", "add_prototypes", "centroids_of", "open_space"]

PROTOTYPES_FILE = "prototypes.safetensors"
"""Identity of an embedder -> its tensor [centroids, dimensions] float32."""


@dataclasses.dataclass(frozen=True)
class FixedSpace:
    """An embedder whose vectors do not depend on what else it embeds, and the identity its vectors go by."""

    identity: str
    embedder: ShardedEmbedder

    def embed(self, texts: Sequence[str]) -> Floats:
        """[n] texts -> [n, d], rows of length 1; a text of which nothing is left to embed gives a zero row."""
        return self.embedder.raw(texts)


def open_space(spec: str, *, base: str | None = None, device: str = "auto") -> FixedSpace:
    """The space of an embedder `minilm`, `st:NAME` or `lm` (of `base`).

    Embedder `lm` is taken without the mean that it takes off a pool's states, and its identity says so (`raw`).
    Raises BadInput for an embedder that is fitted on the texts it embeds, as `lsa` is.
    """
    embedder = open_embedder(spec, base=base, device=device)
    if not isinstance(embedder, ShardedEmbedder):
        raise BadInput(
            f"the space of embedder {spec!r} is fitted on the texts it embeds, so that vectors of two experts could "
            "not be compared",
            hint="use minilm, st:NAME or lm",
        )
    fitted = isinstance(embedder, FittedEmbedder)
    return FixedSpace(f"{embedder.identity} raw" if fitted else embedder.identity, embedder)


def add_prototypes(
    folder: Path,
    spec: str,
    *,
    centroids: int = 3,
    base: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Prototypes:
    """Makes the prototypes of the expert in `folder` and writes them into its `prototypes.safetensors` and its card.

    Of every skill up to `centroids` of them, from the exemplars that routers see; those of other embedders stay (once
    pilots were added, make each embedder's again). Made again to the same vectors, nothing is written. `base` is where
    the base model of embedder `lm` lies, if not where the card says. Raises BadInput for an expert without exemplars
    and for what `open_space` refuses. Cost: embedding at most 128 texts.
    """
    card = ExpertCard.read(folder)
    expert = open_expert(folder).routable()
    begin = time.monotonic()
    try:
        space = open_space(spec, base=base or card.base.ref, device=device)
    except NotFound as error:
        if spec == "lm":
            error.hint = "say by --base where the base model lies now"
        raise
    if spec == "lm" and card.base.fingerprint not in space.identity:
        raise BadInput("this base model is not the one the expert belongs to", where=base or card.base.ref)
    labels = expert.exemplar_skills or ("",) * len(expert.exemplars)
    texts = [(text, label) for text, label in zip(expert.exemplars, labels, strict=True) if text.strip()]
    if not texts:
        raise BadInput("the expert has no exemplars to stand for it", where=str(folder), hint="train it with shots")
    progress.say(f"embedding {len(texts)} exemplars by {space.identity}")
    vectors, part = centroids_of(space, *zip(*texts, strict=True), most=centroids, seed=seed)
    tensors = _other_tensors(folder, card, part)
    if part in card.prototypes and np.array_equal(vectors, read_prototypes(folder, part)):
        progress.say(f"{folder} has these prototypes already.")
        return part
    _write(folder, card, part, {**tensors, part.tensor: vectors}, time.monotonic() - begin)
    return part


def centroids_of(
    space: FixedSpace, texts: Sequence[str], labels: Sequence[str], *, most: int = 3, seed: int = 0
) -> tuple[Floats, Prototypes]:
    """Texts and their labels -> unit centroids [k, d], label by label, of a label the largest first; and their entry.

    Spherical k-means in each label, with as many clusters as there are different vectors, at most `most`. Texts whose
    vector is zero are left out; raises BadInput where none is left.
    """
    vectors = space.embed(list(texts))
    lengths = np.linalg.norm(vectors, axis=1)
    found: list[Floats] = []
    names: list[str] = []
    counts: list[int] = []
    for label in sorted(set(labels)):
        own = vectors[[i for i, other in enumerate(labels) if other == label and lengths[i] > 0.5]]
        if not len(own):
            continue
        count = different_rows(own, min(most, len(own)))
        assigned, centres = cluster(own, count, seed=seed)
        sizes = np.bincount(assigned, minlength=count)
        order = np.argsort(-sizes, kind="stable")
        found.append(centres[order])
        names += [label] * count
        counts += sizes[order].tolist()
    if not found:
        raise BadInput(f"nothing of the exemplars can be embedded by {space.identity}", hint="use another embedder")
    stacked: Floats = np.concatenate(found).astype(np.float32)
    entry = Prototypes(
        embedder=space.identity,
        dimensions=int(stacked.shape[1]),
        file=PROTOTYPES_FILE,
        tensor=space.identity,
        labels=tuple(names),
        counts=tuple(counts),
    )
    return stacked, entry


def _other_tensors(folder: Path, card: ExpertCard, part: Prototypes) -> dict[str, Floats]:
    """Those of other embedders that the card names; anything else in the file is dropped."""
    others = [other for other in card.prototypes if other.tensor != part.tensor]
    return {other.tensor: read_prototypes(folder, other) for other in others}


def _write(folder: Path, card: ExpertCard, part: Prototypes, tensors: dict[str, Floats], seconds: float) -> None:
    from safetensors.numpy import save

    write_file(folder / PROTOTYPES_FILE, save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))
    entries = [*(other for other in card.prototypes if other.tensor != part.tensor), part]
    dataclasses.replace(
        card,
        prototypes=tuple(sorted(entries, key=lambda entry: entry.embedder)),
        files={**card.files, PROTOTYPES_FILE: hash_file(folder / PROTOTYPES_FILE)},
        spent=in_all([spent_of(card), {"tokens": 0, "seconds": seconds}]),
    ).write(folder)
