"""Strangers' adapters become experts: a LoRA folder of peft or of the Hub, checked against its base and given a card.

Refused, each with a sentence: whatever `adapters.py` does not serve (DoRA, saved modules, biases, ...), adapters of
other tasks than language modelling, pickled weights, and adapters whose modules or shapes the base does not have.
Accepted with a warning: an adapter of no stated task, one made for a base of another name than the given one, one
trained on a quantised base, settings that the installed peft does not know, and an adapter that changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert.errors import BadInput, Corrupt
from xpert.experts.adapter_readme import read_readme
from xpert.experts.adapter_sources import AdapterSource, find_adapter
from xpert.experts.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from xpert.experts.bare_base import bare_base, find_base, on_hub
from xpert.experts.expert_folder import EXEMPLARS
from xpert.experts.merge_folder import settle_card
from xpert.progress import SILENT, Progress
from xpert.registry.card import EXEMPLARS_FILE, BaseModel, ExpertCard
from xpert.registry.intake import read_document
from xpert.registry.names import check_name
from xpert.registry.store import MAX_GIB, Registry
from xpert.storage import cache_folder, disk_errors, hash_file, write_file, write_json

if TYPE_CHECKING:
    from xpert.experts.adapters import Adapter
    from xpert.language_model import LanguageModel
    from xpert.model_files import ModelFiles
    from xpert.registry.versions import Version

__all__ = ["Imported", "Told", "import_adapter", "write_imported"]


@dataclass(frozen=True)
class Told:
    """What the user says of an adapter; None where the adapter itself or its model card must tell."""

    base: str | None = None
    description: str | None = None
    skills: tuple[str, ...] | None = None
    licence: str | None = None
    exemplars: Path | None = None


@dataclass(frozen=True)
class Imported:
    """The published version, its card, what was accepted with a warning, and the files left behind."""

    version: Version
    card: ExpertCard
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]


def import_adapter(
    source: str | Path,
    name: str,
    registry: Registry,
    told: Told | None = None,
    *,
    tags: Sequence[str] = (),
    max_gib: float = MAX_GIB,
    allow_secret_like: bool = False,
    progress: Progress = SILENT,
) -> Imported:
    """Publishes the adapter at `source` (a folder, or `hf:OWNER/NAME[@REVISION]`) as the next version of `name`, and
    moves `tags` to it.

    The weights are copied byte for byte; the same adapter with the same words is published once. Raises BadInput for
    what cannot be served, Unavailable where its base is not on this machine. Cost: base and adapter are hashed, and
    the adapter is read once.
    """
    check_name(name)
    told = told or Told()
    found = find_adapter(source, max_gib=max_gib, progress=progress)
    parent = cache_folder() / "imports"
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(parent), tempfile.TemporaryDirectory(dir=parent) as scratch:
        folder = Path(scratch) / name.rpartition("/")[2]
        folder.mkdir()
        card, warnings = write_imported(folder, found, told, progress=progress)
        version = registry.publish(
            folder, name, tags=tags, max_gib=max_gib, allow_secret_like=allow_secret_like, progress=progress
        )
    return Imported(version, card, warnings, found.beside)


def write_imported(
    folder: Path, found: AdapterSource, told: Told, *, progress: Progress = SILENT
) -> tuple[ExpertCard, tuple[str, ...]]:
    """Fills the empty `folder` as an expert of the folder's name; (card, warnings). Errors as in `import_adapter`."""
    config = read_document(found.config)
    if not isinstance(config, dict):
        raise Corrupt("not an adapter configuration", where=str(found.config))
    _check_task(config, str(found.config))
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str | None) or not isinstance(revision, str | None):
        raise Corrupt("the name of the base model is not a text", where=str(found.config))
    files = find_base(told.base, named, revision=revision, where=found.source)
    settled = _settled(config, named, files)
    shutil.copyfile(found.weights, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, settled)
    base = bare_base(files)
    adapter = _checked(folder, base, found)
    warnings = [*_doubts(config, named, files, told, base), *_idle(adapter)]
    if told.exemplars is not None:
        write_file(folder / EXEMPLARS_FILE, _exemplars(told.exemplars))
    readme = read_readme(found.readme, progress)
    origin = {
        "source": found.source,
        "revision": found.revision,
        "sha": found.sha,
        "weights": hash_file(folder / WEIGHTS_FILE),
        "base_named": named if on_hub(named) else None,  # a path of somebody's machine means nothing here
        "licence": told.licence if told.licence is not None else readme.licence,
        "peft_version": config.get("peft_version") if isinstance(config.get("peft_version"), str) else None,
        "warnings": warnings,
    }
    card = ExpertCard(
        base=BaseModel(_ref(files), base.fingerprint, base.architecture),
        adapter=_facts(settled, adapter),
        name=folder.name,
        description=told.description or readme.description or f"LoRA adapter imported from {found.source}.",
        skills=told.skills if told.skills is not None else readme.skills,
        training={"method": f"import of {found.source}", "imported": origin},
        # Of the weights, not of this import: the same adapter imported again is then the same version.
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.weights.stat().st_mtime)),
    )
    return settle_card(folder, card, on_hub=files.on_hub), tuple(warnings)


def _checked(folder: Path, base: LanguageModel, found: AdapterSource) -> Adapter:
    """The adapter, if it is of a form that is served and fits the base; errors name its source, not the draft."""
    try:
        return read_adapter(folder.name, folder, base)
    except BadInput as error:
        where = found.source if found.sha else str(found.config.parent)
        hint = "give the base model it was made for with --base" if "base model" in error.what else error.hint
        raise type(error)(error.what, where=where, hint=hint) from None


def _check_task(config: Mapping[str, Any], where: str) -> None:
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise BadInput(
            f"the adapter is for the task {task}, and experts are of causal language models",
            where=where,
            hint="import an adapter of task CAUSAL_LM",
        )


def _settled(config: Mapping[str, Any], named: str | None, files: ModelFiles) -> dict[str, Any]:
    """The configuration as it is published: the base named so that peft finds it, and no path of a stranger's machine.

    `auto_mapping` names code to load a model by; peft loads a causal language model without it.
    """
    name, _, revision = files.ref.partition("@")
    settled = {**config, "inference_mode": True, "auto_mapping": None}
    if files.on_hub:
        settled |= {"base_model_name_or_path": name, "revision": revision or None}
    elif not on_hub(named):
        # peft loads no GGUF file: its users name the base themselves.
        settled |= {"base_model_name_or_path": None if files.gguf else _ref(files), "revision": None}
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in settled.items()}


def _ref(files: ModelFiles) -> str:
    return files.ref if files.on_hub else str((files.gguf or files.folder).resolve())


def _facts(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The card's part on the adapter; the rank is the largest there is."""
    alpha, dropout = config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    facts = {
        "type": "LORA",
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
        "modules": len(adapter.modules),
        "rank": adapter.rank,
        "alpha": alpha,
        "dropout": dropout if isinstance(dropout, int | float) else 0.0,
        "rslora": bool(config.get("use_rslora")),
    }
    return facts | {key: config[key] for key in ("rank_pattern", "alpha_pattern") if config.get(key)}


def _doubts(
    config: Mapping[str, Any], named: str | None, files: ModelFiles, told: Told, base: LanguageModel
) -> list[str]:
    """What does not forbid an import, and should be known."""
    from peft import LoraConfig

    found = []
    if config.get("task_type") is None:
        found.append("it states no task; it is taken for one of a causal language model")
    last = str(named or "").rstrip("/").rpartition("/")[2]
    same = last.casefold() in Path(files.ref).name.casefold()
    same |= len(last) >= 32 and base.fingerprint.startswith(last)  # the cache's folder of a decoded GGUF file
    if told.base is not None and last and not same:
        found.append(
            f"it says it was made for {last}, and is taken for one of {Path(files.ref).name}: "
            "modules and shapes fit, which does not prove that the weights are the same"
        )
    if getattr(base.model.config, "quantization_config", None):
        found.append(
            "its base is quantised; to mix it with experts of the full model, import it with --base of that model"
        )
    if config.get("auto_mapping"):
        found.append("its auto_mapping, which names code to load, is left out")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    odd = sorted(key for key, value in config.items() if key not in known and value)
    if odd:
        found.append(f"its configuration has settings that the peft installed here does not know: {', '.join(odd)}")
    return found


def _idle(adapter: Adapter) -> list[str]:
    idle = sum(not (module.a.any() and module.b.any()) for module in adapter.modules.values())
    if not idle:
        return []
    if idle == len(adapter.modules):
        return ["it changes nothing: all its updates are zero"]
    return [f"the updates of {idle} of its {len(adapter.modules)} modules are zero"]


def _exemplars(path: Path) -> str:
    """Prompts that stand for what the expert is for, from any source of rows; at most 64 are kept."""
    from xpert.data import read_prompts

    lines = [
        {"prompt": row.prompt, "skill": row.skill, "kind": "row" if row.columns.get("kind") == "row" else "shot"}
        for row in read_prompts(path)[:EXEMPLARS]
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
