"""What may enter the registry: looks through an expert folder or a mixture file and refuses what is unsound.

Files are judged by content, not by name: weights must be safetensors, everything else text; pickles and archives are
refused wherever they stand. Sizes are bounded before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.registry.blobs import open_plain
from xpert.registry.card import CARD_FILE, ExpertCard, SkillScore
from xpert.registry.card_schema import check_card
from xpert.registry.content import MOST_TEXT, check_content, open_inside
from xpert.registry.credentials import find_credentials
from xpert.registry.cutting import describe_file
from xpert.registry.names import parse_ref
from xpert.registry.strict_json import parse_json
from xpert.registry.tensor_header import read_tensor_header
from xpert.registry.versions import StoredFile

__all__ = [
    "GIB",
    "MIXTURE_FILE",
    "MOST_DOCUMENT",
    "WEIGHTS_FILE",
    "Content",
    "Intake",
    "examine",
    "parse_json",
    "read_document",
]

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILE = "adapter_config.json"
MIXTURE_FILE = "mixture.json"
_TRAINED = {"gate": "gate.safetensors", "router_state": "router.safetensors"}
"""Part of a mixture -> the name under which the file it has learned is stored."""
GIB = 1 << 30

_MOST_FILES = 1_000
MOST_DOCUMENT = 16 << 20  # bytes of a card, an adapter configuration or a mixture
# People edit the model card by hand, and reports are drawn again: for the rest, the card's hashes must hold.
_FREE = frozenset({".md", ".html"})
_LEFT_OUT = re.compile(r"checkpoints?(-.*)?")


Content = Path | bytes
"""Where a file's content is: on disk, or here."""


@dataclass(frozen=True)
class Intake:
    """What was found: the files with where they lie, what the record says of them, and what was left out."""

    kind: str
    files: tuple[tuple[Content, StoredFile], ...]
    base: str
    base_fingerprint: str
    description: str
    skills: tuple[str, ...]
    scores: Mapping[str, float]
    uses: tuple[str, ...] = ()
    use_fingerprints: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[StoredFile, ...]:
        return tuple(file for _, file in self.files)


def examine(
    source: Path,
    *,
    max_bytes: int,
    allow_secret_like: bool = False,
    registered: Callable[[str], str | None] = lambda fingerprint: None,
) -> Intake:
    """Looks through an expert folder or a mixture (its file, or the folder that joint training wrote); raises BadInput
    or Corrupt naming the file that is unsound.

    `registered` says, by the sha256 of their weights, which versions the experts are that a mixture names by folders.
    A text in which something looks like a credential (see `credentials.py`) is unsound unless `allow_secret_like`.
    """
    if source.is_dir() and (source / MIXTURE_FILE).is_file() and not (source / CARD_FILE).exists():
        source = source / MIXTURE_FILE
    if source.is_dir():
        return _examine_expert(source, max_bytes, allow_secret_like)
    if source.is_file():
        return _examine_mixture(source, allow_secret_like, registered)
    raise NotFound("no such expert folder or mixture file", where=str(source))


def _examine_expert(folder: Path, max_bytes: int, allow_secret_like: bool) -> Intake:
    if not (folder / CARD_FILE).is_file():
        raise NotFound(
            f"not an expert folder: it has no {CARD_FILE}", where=str(folder), hint="`xpert train` writes one"
        )
    found, left_out = _gather(folder, max_bytes)
    document = read_document(folder / CARD_FILE)
    check_card(document, str(folder / CARD_FILE))
    card = ExpertCard.from_dict(document, where=str(folder / CARD_FILE))
    files: list[tuple[Content, StoredFile]] = []
    for name, path in found:
        with open_inside(folder, name) as stream:
            judged = check_content(stream, path.suffix, where=str(path))
        if judged.text is not None and not allow_secret_like:
            _check_secrets(path, judged.text)
        files.append((path, _described(path, name, judged.sha256)))
    _check_card(folder, card, {file.path: file.sha256 for _, file in files})
    profile = card.profile.skills if card.profile else {}
    return Intake(
        kind="expert",
        files=tuple(files),
        base=card.base.ref,
        base_fingerprint=card.base.fingerprint,
        description=card.description,
        skills=tuple(dict.fromkeys((*card.skills, *(skill for skill, score in profile.items() if _is_skill(score))))),
        scores={skill: score.expert.score for skill, score in profile.items()},
        left_out=left_out,
    )


def _described(path: Path, name: str, sha256: str | None) -> StoredFile:
    """The file as the record holds it; raises BadInput where it is no longer what was judged."""
    stored = describe_file(path, name)
    if stored.sha256 != sha256:
        raise BadInput("changed while it was being published", where=str(path), hint="publish it again")
    return stored


def _gather(folder: Path, max_bytes: int) -> tuple[list[tuple[str, Path]], tuple[str, ...]]:
    """(name inside the folder, path) of all files that travel, sorted, and the names of what stays behind."""
    found: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    total = 0
    for path in _walk(folder, left_out):
        size = path.stat().st_size
        total += size
        if path.suffix != ".safetensors" and size > MOST_TEXT:
            raise BadInput(f"a text of {size:,} bytes; the most is {MOST_TEXT:,}", where=str(path))
        found.append((path.relative_to(folder).as_posix(), path))
        if len(found) > _MOST_FILES:
            raise BadInput(
                f"more than {_MOST_FILES:,} files", where=str(folder), hint="an expert is a handful of files"
            )
        if total > max_bytes:
            raise BadInput(
                f"more than {max_bytes / GIB:g} GiB", where=str(folder), hint="raise --max-size if that is meant"
            )
    folded: dict[str, str] = {}
    for name, path in found:
        if folded.setdefault(name.casefold(), name) != name:
            raise BadInput(f"the names {folded[name.casefold()]!r} and {name!r} differ by case only", where=str(path))
    return sorted(found), tuple(sorted(os.path.relpath(path, folder) for path in left_out))


def _walk(folder: Path, left_out: list[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise BadInput("a symbolic link", where=str(path), hint="put the file itself there, or remove the link")
        if path.name.startswith(".") or (path.is_dir() and _LEFT_OUT.fullmatch(path.name)):
            left_out.append(path)
        elif path.is_dir():
            yield from _walk(path, left_out)
        elif path.is_file():
            yield path
        else:
            raise BadInput("not a plain file", where=str(path), hint="remove it from the folder")


def _check_secrets(path: Path, text: str) -> None:
    # Neither the error nor a log may hold what was found.
    for found in find_credentials(text):
        raise BadInput(
            f"line {found.line:,} holds what looks like {found.kind}",
            where=str(path),
            hint="take it out and revoke it, or say --allow-secret-like if it is none",
        )


def _is_skill(score: SkillScore) -> bool:
    """Whether a profiled skill is one: better than the base beyond its own interval, or right half of the time."""
    return score.expert.low > score.base.score or score.expert.score >= 0.5


def _check_card(folder: Path, card: ExpertCard, hashes: Mapping[str, str]) -> None:
    """The card must be complete and tell the truth about the files beside it."""
    where = str(folder / CARD_FILE)
    for name in (WEIGHTS_FILE, ADAPTER_FILE):
        if name not in hashes:
            raise NotFound(f"the expert has no {name}", where=str(folder), hint="`xpert train` writes it")
    for name, sha256 in card.files.items():
        if Path(name).suffix in _FREE or name == CARD_FILE:
            continue
        if name not in hashes:
            raise Corrupt(f"the card names {name!r}, which is not there", where=where)
        if hashes[name] != sha256:
            raise Corrupt(
                "changed since its card was written", where=str(folder / name), hint="train again, or restore the file"
            )
    adapter = read_document(folder / ADAPTER_FILE)
    if not isinstance(adapter, dict) or adapter.get("peft_type") != "LORA":
        raise BadInput("not the configuration of a LoRA adapter", where=str(folder / ADAPTER_FILE))
    if not read_tensor_header(folder / WEIGHTS_FILE):
        raise Corrupt("holds no tensors", where=str(folder / WEIGHTS_FILE))
    _check_prototypes(folder, card, hashes)


def _check_prototypes(folder: Path, card: ExpertCard, hashes: Mapping[str, str]) -> None:
    """Each entry must name a tensor that is there and has a row for every label."""
    for part in card.prototypes:
        path = folder / part.file
        if part.file not in hashes or path.suffix != ".safetensors":
            raise Corrupt(f"the card's prototypes are to lie in {part.file!r}, which is not there", where=str(folder))
        entry = read_tensor_header(path).get(part.tensor)
        if entry is None or entry.dtype != "F32" or entry.shape != (len(part.labels), part.dimensions):
            raise Corrupt(
                f"holds no prototypes of {part.embedder!r} as the card describes them",
                where=str(path),
                hint="make them again with `xpert prototypes`",
            )


def _examine_mixture(path: Path, allow_secret_like: bool, registered: Callable[[str], str | None]) -> Intake:
    document = read_document(path)
    if not allow_secret_like:
        with open_plain(path) as stream:
            _check_secrets(path, stream.read(MOST_DOCUMENT + 1).decode("utf-8", "replace"))
    if not isinstance(document, dict) or document.get("kind") != "mixture":
        raise BadInput(
            "not a mixture", where=str(path), hint="`xpert mix` writes one; an expert is given as its folder"
        )
    experts = document.get("experts")
    if not isinstance(experts, list) or not experts or not all(isinstance(entry, dict) for entry in experts):
        raise Corrupt("the mixture lists no experts", where=str(path))
    entries, uses, fingerprints = [], [], []
    for entry in experts:
        text, fingerprint = entry.get("ref"), str(entry.get("fingerprint") or "")
        try:
            ref = parse_ref(text if isinstance(text, str) else "")
        except XpertError:
            known = registered(fingerprint) if fingerprint else None
            if known is None:
                raise BadInput(
                    f"refers to {text!r}, which is no registered expert",
                    where=str(path),
                    hint="publish that expert first",
                ) from None
            ref, entry = parse_ref(known), {**entry, "ref": known}
        if ref.version is None:
            raise BadInput(
                f"refers to {text!r} without a version", where=str(path), hint="a published mixture names OWNER/NAME@3"
            )
        entries.append(entry)
        uses.append(str(ref))
        fingerprints.append(fingerprint)
    base = document.get("base")
    base = base if isinstance(base, dict) else {}
    trained = {part: _trained_file(path, document, part, stored) for part, stored in _TRAINED.items()}
    # Where the experts came from is a path of the publisher's machine; here they come from this registry.
    plain = {key: value for key, value in document.items() if key != "registry"}
    plain["experts"] = entries
    for part, found in trained.items():
        if found is not None:
            plain[part] = {**plain[part], "file": f"./{found[1].path}"}
    content = (json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    stored = StoredFile(MIXTURE_FILE, len(content), hashlib.sha256(content).hexdigest())
    return Intake(
        kind="mixture",
        files=((content, stored), *(found for found in trained.values() if found is not None)),
        base=str(base.get("ref") or ""),
        base_fingerprint=str(base.get("fingerprint") or ""),
        description=str(document.get("description") or ""),
        skills=(),
        scores={},
        uses=tuple(uses),
        use_fingerprints=tuple(fingerprints),
    )


def _trained_file(path: Path, mixture: Mapping[str, Any], part: str, stored_as: str) -> tuple[Path, StoredFile] | None:
    """The file of a trained gate or router, as a part of a mixture names it; checked like an expert's weights."""
    named = mixture.get(part)
    if not isinstance(named, dict) or named.get("file") is None:
        return None
    name = named["file"]
    if not isinstance(name, str):
        raise Corrupt(f"the mixture's {part} names no file", where=str(path))
    file = path.resolve().parent / name
    if not file.is_file():
        raise NotFound("the file of the mixture's router is not there", where=str(file), hint="train the router again")
    if file.suffix != ".safetensors":
        raise BadInput("the file of the mixture's router is not safetensors", where=str(file))
    with open_plain(file) as stream:
        judged = check_content(stream, file.suffix, where=str(file))
    stored = _described(file, stored_as, judged.sha256)
    if named.get("fingerprint") not in (None, stored.sha256):
        raise Corrupt("the file of the router is not the one that was mixed", where=str(file))
    return file, stored


def read_document(path: Path) -> Any:
    """A small JSON file, its size bounded before it is read; raises BadInput or Corrupt."""
    with open_plain(path) as stream:
        data = stream.read(MOST_DOCUMENT + 1)
    if len(data) > MOST_DOCUMENT:
        raise BadInput(f"more than {MOST_DOCUMENT:,} bytes", where=str(path))
    return parse_json(data, where=str(path))
