"""Writing merges: an expert folder that plain peft loads, and a smaller pool with its mixture."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.adapters import CONFIG_FILE, GATES_FILE, WEIGHTS_FILE
from xpert.experts.expert_folder import EXEMPLARS
from xpert.experts.expert_report import write_expert_report
from xpert.experts.merge_sources import MergeSources
from xpert.experts.merging import MergeResult
from xpert.experts.mixture import GateChoice, Mixture, MixtureExpert, assemble, open_expert
from xpert.experts.mixture_file import MIXTURE_FILE, write_mixture
from xpert.experts.spending import Spending, in_all, spent_of
from xpert.experts.training_data import TrainingRows, licences_of
from xpert.progress import SILENT, Progress
from xpert.protocols import LowRankUpdate
from xpert.records import Row
from xpert.registry.card import EXEMPLARS_FILE, BaseModel, ExpertCard
from xpert.registry.model_card import model_card
from xpert.storage import draft_folder, hash_file, package_versions, read_json, write_file, write_json

__all__ = ["FATE_FILE", "adapter_config", "write_adapter", "write_merge", "write_merged_expert", "write_pool"]

FATE_FILE = "pruning.json"
"""Which expert of a smaller pool stands for each of the old ones."""


def write_merge(
    out: Path, results: Sequence[MergeResult], sources: MergeSources, *, seed: int = 0, progress: Progress = SILENT
) -> None:
    """Writes one merge as the expert folder `out`, or several as a pool in it; whole or not at all."""
    with draft_folder(out) as draft:
        if len(results) == 1:
            write_merged_expert(draft, results[0], sources, name=out.name, seed=seed, progress=progress)
        else:
            write_pool(draft, results, sources, name=out.name, seed=seed, progress=progress)


def write_merged_expert(
    folder: Path,
    result: MergeResult,
    sources: MergeSources,
    *,
    name: str,
    rows: Sequence[Row] = (),
    seed: int = 0,
    progress: Progress = SILENT,
) -> ExpertCard:
    """Adapter, exemplars, model card, report and card of one merge, into an existing folder.

    `rows` are those it learned from, if it was distilled.
    """
    members = [sources.experts[index] for index in result.merged.members]
    adapter = write_adapter(folder, result.merged.modules, like=members[0].folder)
    write_file(folder / EXEMPLARS_FILE, _exemplars([member.folder for member in members]))
    for member in members:
        if (member.folder / GATES_FILE).is_file():
            progress.say(f"The gate vectors of {member.key} are not merged: make those of {name} with `xpert gate`.")
    card = _card(name, result, members, sources.base, adapter, rows, seed)
    return settle_card(folder, card, on_hub=not Path(sources.base.ref).exists())


def settle_card(folder: Path, card: ExpertCard, *, on_hub: bool) -> ExpertCard:
    """Model card, report, and last the card with the hashes of all files."""
    write_file(folder / "README.md", model_card(card, on_hub=on_hub))
    write_expert_report(folder, card)
    settled = dataclasses.replace(card, files={path.name: hash_file(path) for path in sorted(folder.iterdir())})
    settled.write(folder)
    return settled


def write_adapter(folder: Path, modules: Mapping[str, LowRankUpdate], *, like: Path) -> dict[str, Any]:
    """Weights and configuration as peft writes them; `like` is an adapter of the same base. Returns the card's part."""
    from safetensors.torch import save_file

    tensors = {}
    for module, update in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = update.a.float().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = update.b.float().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    ranks = {module: update.rank for module, update in modules.items()}
    config = adapter_config(ranks, read_json(like / CONFIG_FILE))
    write_json(folder / CONFIG_FILE, config)
    return {
        "type": "LORA",
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": 0.0,
        "rslora": False,
    }


def adapter_config(ranks: Mapping[str, int], like: Mapping[str, Any]) -> dict[str, Any]:
    """peft's configuration of updates of these ranks whose scale is in B: alpha = rank, module by module.

    Modules are named in full. peft takes the first pattern that matches a module's end, so longer names come first.
    """
    most = max(ranks.values())
    other = {
        module: rank
        for module, rank in sorted(ranks.items(), key=lambda item: (-len(item[0]), item[0]))
        if rank != most
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": like.get("base_model_name_or_path"),
        "revision": like.get("revision"),
        "fan_in_fan_out": bool(like.get("fan_in_fan_out", False)),
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(ranks),
    }


def write_pool(
    folder: Path,
    results: Sequence[MergeResult],
    sources: MergeSources,
    *,
    name: str,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Mixture:
    """A smaller pool in an existing folder: an expert folder per group of several, `mixture.json` over all groups, and
    `pruning.json`, which says what stands for each old expert (null: nothing). A group of one stays as it is.

    The router is the mixture's own, or `centroid`; a kept expert keeps its weight there, a merged one has 1.
    """
    fate: dict[str, str | None] = dict.fromkeys(sources.keys)
    kept: list[MixtureExpert] = []
    for result in results:
        members = [sources.experts[index] for index in result.merged.members]
        if len(members) == 1:
            kept.append(members[0])
        else:
            weights = result.merged.weights
            leader = members[max(range(len(members)), key=lambda index: (weights[index], -index))]
            key = f"{leader.key.replace('/', '-')}+{len(members) - 1}"
            (folder / key).mkdir()
            write_merged_expert(folder / key, result, sources, name=key, seed=seed, progress=progress)
            kept.append(open_expert(folder / key))
        fate |= {member.key: kept[-1].key for member in members}
    write_json(folder / FATE_FILE, fate)
    old = sources.mixture
    mixture = assemble(
        kept,
        router=old.router if old else "centroid",
        router_params=old.router_params if old else {},
        name=name,
        registry=old.registry if old else None,
        base=sources.base,
        gate=_kept_gate(old),
        aggregator=old.aggregator if old else None,
    )
    write_mixture(folder / MIXTURE_FILE, mixture)
    return mixture


def _kept_gate(mixture: Mixture | None) -> GateChoice | None:
    """A gate made from the adapters serves the merged ones too; one that learned the old experts cannot."""
    if mixture is None or mixture.gate is None:
        return None
    if plugins.load("gate", mixture.gate.name).learned != "none":
        raise BadInput(
            f"gate {mixture.gate.name} has learned the experts as they are, and merged ones are not among them",
            hint="prune by usage, or mix again without that gate first",
        )
    return mixture.gate


def _card(
    name: str,
    result: MergeResult,
    members: Sequence[MixtureExpert],
    base: BaseModel,
    adapter: Mapping[str, Any],
    rows: Sequence[Row],
    seed: int,
) -> ExpertCard:
    licences: Counter[str] = Counter(licences_of(rows))
    for member in members:
        licences.update(member.card.licences)
    weights = result.merged.weights
    return ExpertCard(
        base=base,
        adapter=adapter,
        name=name,
        description=f"Merge of {', '.join(member.key for member in members)} by {result.method}.",
        skills=tuple(dict.fromkeys(skill for member in members for skill in member.card.skills)),
        selection=_learned(rows),
        training={
            "method": f"merge by {result.method}",
            "options": dict(result.params),
            "seed": seed,
            "experts": [
                {"key": member.key, "ref": member.ref, "fingerprint": member.fingerprint, "weight": weight}
                for member, weight in zip(members, weights, strict=True)
            ],
            "error": result.error.to_dict(),
            "log": dict(result.merged.log),
            "merge": {"seconds": round(result.seconds, 3), "parameters": result.parameters},
            "versions": package_versions(),
        },
        licences=dict(licences.most_common()),
        spent=in_all([*(spent_of(member.card) for member in members), _spent(result)]),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _learned(rows: Sequence[Row]) -> dict[str, Any]:
    return {"fingerprint": TrainingRows(tuple(rows), 0, (), {}).fingerprint, "rows": len(rows)} if rows else {}


def _spent(result: MergeResult) -> Spending:
    """What the merge itself took. A merger that asks a model reads tokens, and unless it counts them none can know."""
    asks = result.method in plugins.names("merger") and "loss" in plugins.load("merger", result.method).needs
    return {"tokens": result.merged.log.get("tokens", None if asks else 0), "seconds": result.seconds}


def _exemplars(folders: Sequence[Path]) -> str:
    """The members' exemplars in turn, shots first, without repeats, as many as an expert has."""
    lines = [
        (folder / EXEMPLARS_FILE).read_text(encoding="utf-8").splitlines()
        if (folder / EXEMPLARS_FILE).is_file()
        else []
        for folder in folders
    ]
    longest = max(map(len, lines), default=0)
    turns = [member[place] for place in range(longest) for member in lines if place < len(member)]
    ranked = sorted(dict.fromkeys(turns), key=lambda line: json.loads(line).get("kind") != "shot")
    return "".join(line + "\n" for line in ranked[:EXEMPLARS])
