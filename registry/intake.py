"""What may enter the registry: looks through an expert folder or a mixture file and refuses what is unsound.

Files are judged by content, not by name: weights must be safetensors, everything else text; pickles and archives are
refused wherever they stand. Sizes are bounded before anything is read.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.registry.blobs import open_plain
from xpert.registry.card import CARD_FILE, ExpertCard
from xpert.registry.card_schema import check_card
from xpert.registry.credentials import find_credentials
from xpert.registry.names import parse_ref
from xpert.registry.tensor_header import read_tensor_header
from xpert.registry.versions import StoredFile
from xpert.storage import hash_file

__all__ = ["GIB", "MIXTURE_FILE", "WEIGHTS_FILE", "Intake", "examine", "read_document"]

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILE = "adapter_config.json"
MIXTURE_FILE = "mixture.json"
GIB = 1 << 30

_MOST_FILES = 1_000
_MOST_DOCUMENT = 16 << 20  # bytes of a card, an adapter configuration or a mixture
_MOST_TEXT = 256 << 20  # bytes of any other text
_TEXTS = frozenset({".json", ".jsonl", ".md", ".html", ".txt", ".jinja", ".yaml", ".yml"})
# People edit the model card by hand, and reports are drawn again: for the rest, the card's hashes must hold.
_FREE = frozenset({".md", ".html"})
_LEFT_OUT = re.compile(r"checkpoints?(-.*)?")


@dataclass(frozen=True)
class Intake:
    """What was found: the files with where they lie, what the record says of them, and what was left out."""

    kind: str
    files: tuple[tuple[Path, StoredFile], ...]
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


def examine(source: Path, *, max_bytes: int, allow_secret_like: bool = False) -> Intake:
    """Looks through an expert folder or a mixture file; raises BadInput or Corrupt naming the file that is unsound.

    A text in which something looks like a credential (see `credentials.py`) is unsound unless `allow_secret_like`.
    """
    if source.is_dir():
        return _examine_expert(source, max_bytes, allow_secret_like)
    if source.is_file():
        return _examine_mixture(source, allow_secret_like)
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
    files = []
    for name, path in found:
        text = _check_content(path)
        if text is not None and not allow_secret_like:
            _check_secrets(path, text)
        files.append((path, StoredFile(name, path.stat().st_size, hash_file(path))))
    _check_card(folder, card, {file.path: file.sha256 for _, file in files})
    profile = card.profile.skills if card.profile else {}
    return Intake(
        kind="expert",
        files=tuple(files),
        base=card.base.ref,
        base_fingerprint=card.base.fingerprint,
        description=card.description,
        skills=tuple(dict.fromkeys((*card.skills, *profile))),
        scores={skill: score.expert.score for skill, score in profile.items()},
        left_out=left_out,
    )


def _gather(folder: Path, max_bytes: int) -> tuple[list[tuple[str, Path]], tuple[str, ...]]:
    """(name inside the folder, path) of all files that travel, sorted, and the names of what stays behind."""
    found: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    total = 0
    for path in _walk(folder, left_out):
        size = path.stat().st_size
        total += size
        if path.suffix != ".safetensors" and size > _MOST_TEXT:
            raise BadInput(f"a text of {size:,} bytes; the most is {_MOST_TEXT:,}", where=str(path))
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


def _check_content(path: Path) -> str | None:
    """The text of a file that is one; None for tensors."""
    with open_plain(path) as stream:
        start = stream.read(4096)
        seems = _binary_kind(start)
        if seems is not None:
            raise BadInput(
                f"refused: it is {seems}, whatever its name", where=str(path), hint="remove it from the folder"
            )
        if path.suffix == ".safetensors":
            read_tensor_header(path)
            return None
        if path.suffix not in _TEXTS:
            raise BadInput(
                "not a file of an expert, which are safetensors and text",
                where=str(path),
                hint=f"remove it; taken are .safetensors {' '.join(sorted(_TEXTS))}",
            )
        data = start + stream.read(_MOST_TEXT)
    try:
        text = data.decode()
        if "\0" in text:
            raise ValueError("it holds a NUL character")
    except ValueError as error:
        raise BadInput(f"not UTF-8 text: {error}", where=str(path), hint="remove it from the folder") from None
    if _is_pickle(data):
        raise BadInput("refused: it is a pickle, whatever its name", where=str(path), hint="remove it from the folder")
    _check_json(path, text)
    return text


def _check_secrets(path: Path, text: str) -> None:
    # Neither the error nor a log may hold what was found.
    for found in find_credentials(text):
        raise BadInput(
            f"line {found.line:,} holds what looks like {found.kind}",
            where=str(path),
            hint="take it out and revoke it, or publish with --allow-secret-like if it is none",
        )


def _check_json(path: Path, text: str) -> None:
    lines = text.split("\n") if path.suffix == ".jsonl" else [text] if path.suffix == ".json" else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip() or path.suffix == ".json":
                json.loads(line)
        except (ValueError, RecursionError) as error:
            place = f" in line {number}" if path.suffix == ".jsonl" else ""
            raise Corrupt(f"not valid JSON{place}: {error}", where=str(path)) from None


def _binary_kind(start: bytes) -> str | None:
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return "a pickle"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "a zip archive (as torch.save writes its pickles)"
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[257:262] == b"ustar":
        return "an archive"
    return None


def _is_pickle(data: bytes) -> bool:
    """True where the bytes run through as a pickle program, as those of the old text protocols do."""
    try:
        *_, (last, _, _) = pickletools.genops(data)
    except Exception:  # whatever ails the parser: these bytes are no pickle
        return False
    return len(data) > 1 and last.name == "STOP"


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


def _examine_mixture(path: Path, allow_secret_like: bool) -> Intake:
    document = read_document(path)
    if not allow_secret_like:
        with open_plain(path) as stream:
            _check_secrets(path, stream.read(_MOST_DOCUMENT + 1).decode("utf-8", "replace"))
    if not isinstance(document, dict) or document.get("kind") != "mixture":
        raise BadInput(
            "not a mixture", where=str(path), hint="`xpert mix` writes one; an expert is given as its folder"
        )
    experts = document.get("experts")
    if not isinstance(experts, list) or not experts or not all(isinstance(entry, dict) for entry in experts):
        raise Corrupt("the mixture lists no experts", where=str(path))
    uses, fingerprints = [], []
    for entry in experts:
        text = entry.get("ref")
        try:
            ref = parse_ref(text if isinstance(text, str) else "")
        except XpertError:
            raise BadInput(
                f"refers to {text!r}, which is no registered expert", where=str(path), hint="publish that expert first"
            ) from None
        if ref.version is None:
            raise BadInput(
                f"refers to {text!r} without a version", where=str(path), hint="a published mixture names OWNER/NAME@3"
            )
        uses.append(str(ref))
        fingerprints.append(str(entry.get("fingerprint") or ""))
    base = document.get("base")
    base = base if isinstance(base, dict) else {}
    stored = StoredFile(MIXTURE_FILE, path.stat().st_size, hash_file(path))
    return Intake(
        kind="mixture",
        files=((path, stored),),
        base=str(base.get("ref") or ""),
        base_fingerprint=str(base.get("fingerprint") or ""),
        description=str(document.get("description") or ""),
        skills=(),
        scores={},
        uses=tuple(uses),
        use_fingerprints=tuple(fingerprints),
    )


def read_document(path: Path) -> Any:
    """A small JSON file, its size bounded before it is read; raises BadInput or Corrupt."""
    size = path.stat().st_size
    if size > _MOST_DOCUMENT:
        raise BadInput(f"{size:,} bytes; the most is {_MOST_DOCUMENT:,}", where=str(path))
    try:
        with open_plain(path) as stream:
            return json.loads(stream.read(_MOST_DOCUMENT + 1))
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not valid JSON: {error}", where=str(path)) from None
