"""Giving a finished expert the vectors that token gates know it by: made, written beside it, noted in its card."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, NotFound
from xpert.experts.adapters import CONFIG_FILE, GATES_FILE, WEIGHTS_FILE, read_adapter, read_gates_file
from xpert.experts.gate_options import GateOptions, check_gate_name
from xpert.experts.spending import Spending, in_all, spent_of
from xpert.experts.training_data import Encoded, TrainingRows, encode_rows, gather_rows
from xpert.progress import SILENT, Progress
from xpert.registry.card import ExpertCard
from xpert.storage import hash_file, hash_json, package_versions, write_file

if TYPE_CHECKING:
    import torch

    from xpert.protocols import LowRankUpdate

__all__ = ["GATES_FILE", "MadeGate", "add_gate", "make_vectors", "write_gate"]


@dataclass(frozen=True)
class MadeGate:
    """A gate's vectors (float32 [in] by module) and what its card tells of them."""

    name: str
    vectors: Mapping[str, torch.Tensor]
    options: GateOptions
    seed: int
    data: str  # fingerprint of the rows
    device: str
    dtype: str
    figures: Mapping[str, Any]

    @property
    def spent(self) -> Spending:
        """Tokens read and seconds taken."""
        return {key: self.figures.get(key) for key in ("tokens", "seconds")}


def add_gate(
    folder: Path,
    source: Path | str,
    name: str,
    options: GateOptions | None = None,
    *,
    base: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Mapping[str, Any]:
    """Makes the vectors of gate `name` for the finished expert in `folder`, from the rows of `source`.

    `source` is a selection, a pool, or any source of rows: those the expert was trained on. The vectors go into
    `gates.safetensors` (those of other gates there are kept) and into the card, whose entry is returned; vectors made
    of the same rows with the same options are recognised. `base` is where the base model lies, if not where the card
    says. Raises BadInput for rows, options or an expert that cannot be used.
    """
    from xpert.language_model import load_model

    options = options or GateOptions()
    check_gate_name(name)
    options.of(name)
    card = ExpertCard.read(folder)
    data = gather_rows(source, use_shots=options.shots, hold_out="0", seed=seed)
    key = _key(folder, name, options, seed, data.fingerprint, card)
    if _is_there(folder, name, key, card):
        progress.say(f"{folder} has its {name} vectors already, of these rows and with these options.")
        return card.gates[name]
    try:
        lm = load_model(base or card.base.ref, device=device, dtype=options.dtype, progress=progress)
    except NotFound as error:
        error.hint = "say by --base where the base model lies now"
        raise
    updates = read_adapter(card.name or folder.name, folder, lm).modules
    encoded = encode_rows(lm.tokenizer, data.rows, options.max_length)
    made = make_vectors(lm.model, updates, data, encoded, name, options, seed=seed, progress=progress)
    note = write_gate(folder, made, card)
    files = {**card.files, GATES_FILE: hash_file(folder / GATES_FILE)}
    spent = in_all([spent_of(card), made.spent])
    dataclasses.replace(card, gates={**card.gates, name: note}, files=files, spent=spent).write(folder)
    return note


def make_vectors(
    model: Any,
    updates: Mapping[str, LowRankUpdate],
    data: TrainingRows,
    encoded: Encoded,
    name: str,
    options: GateOptions,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> MadeGate:
    """The vectors of gate `name` for an expert's updates on a model, from encoded rows; writes nothing."""
    from xpert.experts.gate_training import average_activations, train_phatgoose

    if not encoded.examples:
        raise BadInput(
            f"all {len(data.rows):,} rows are longer than {options.max_length} tokens before their answer begins",
            hint="raise --max-length",
        )
    rows = [data.rows[index] for index in encoded.kept]
    begin = time.monotonic()
    if name == "phatgoose":
        vectors, figures = train_phatgoose(
            model, updates, encoded.examples, rows, options, seed=seed, progress=progress
        )
    else:
        vectors, figures = average_activations(model, updates, encoded.examples, options.prompts)
    for module, vector in vectors.items():
        if not vector.isfinite().all():
            raise BadInput(f"the {name} vector of {module} is not finite", hint="use a sound base model in float32")
    first = next(iter(updates.values())).a
    figures = {"modules": len(vectors), **figures, "seconds": round(time.monotonic() - begin, 3)}
    dtype = str(first.dtype).removeprefix("torch.")
    return MadeGate(name, vectors, options, seed, data.fingerprint, first.device.type, dtype, figures)


def write_gate(folder: Path, made: MadeGate, card: ExpertCard) -> dict[str, Any]:
    """Writes the vectors into the folder's gates file, in place of older ones of that gate, and gives the card's entry.

    The card itself is left to the caller, who writes it last.
    """
    from safetensors.torch import save

    path = folder / GATES_FILE
    before = read_gates_file(path) if path.is_file() else {}
    kept = {key: tensor for key, tensor in before.items() if not key.startswith(f"{made.name}.")}
    new = {f"{made.name}.{module}": vector.float().cpu().contiguous() for module, vector in made.vectors.items()}
    write_file(path, save({**kept, **new}))
    return {
        "key": _key(folder, made.name, made.options, made.seed, made.data, card),
        "data": made.data,
        "options": made.options.of(made.name),
        "seed": made.seed,
        "device": made.device,
        "dtype": made.dtype,
        "figures": dict(made.figures),
        "versions": package_versions(),
    }


def _key(folder: Path, name: str, options: GateOptions, seed: int, data: str, card: ExpertCard) -> str:
    """A hash of all that shapes the vectors."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise NotFound(f"the expert has no {file}", where=str(folder), hint="`xpert train` writes it")
    expert = [card.base.fingerprint, hash_file(folder / CONFIG_FILE), hash_file(folder / WEIGHTS_FILE)]
    return hash_json({"gate": name, "expert": expert, "data": data, "options": options.of(name), "seed": seed})


def _is_there(folder: Path, name: str, key: str, card: ExpertCard) -> bool:
    path = folder / GATES_FILE
    noted = card.gates.get(name, {}).get("key") == key
    return noted and path.is_file() and hash_file(path) == card.files.get(GATES_FILE)
