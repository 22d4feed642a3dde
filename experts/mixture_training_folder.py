"""Writing a mixture that was trained jointly: its experts as plain peft folders, its router, the mixture file."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xpert.experts.adapters import CONFIG_FILE, WEIGHTS_FILE
from xpert.experts.expert_folder import Trained, selection_of, settle_adapter_config
from xpert.experts.expert_report import LOG_FILE, write_expert_report
from xpert.experts.mixture import GateChoice, Mixture, MixtureExpert
from xpert.experts.mixture_file import MIXTURE_FILE
from xpert.experts.spending import in_all, spent_of
from xpert.experts.training_data import licences_of
from xpert.registry.card import EXEMPLARS_FILE, ExpertCard
from xpert.registry.model_card import model_card
from xpert.storage import draft_folder, hash_file, package_versions, write_file, write_json, write_manifest

__all__ = ["GATE_FILE", "KIND", "write_trained_mixture"]

KIND = "joint-training"
GATE_FILE = "gate.safetensors"


def write_trained_mixture(
    out: Path, mixture: Mixture, trained: Trained, joint: Any, *, inputs: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Writes the folder `out`, whole or not at all: `mixture.json`, the router's `gate.safetensors`, and the experts
    in `experts/`, loadable by plain peft. What other token gates knew of the experts is not kept: they have changed.

    joint: the `JointModel`; config: name and parameters of the gate, and how it was trained, for the manifest.
    """
    from safetensors.torch import save_file

    gate = joint.gate
    with draft_folder(out) as draft:
        log = "".join(json.dumps(record) + "\n" for record in trained.log)
        members = []
        for place, (source, expert) in enumerate(zip(mixture.experts, joint.experts, strict=True)):
            folder = draft / "experts" / _folder_name(place, mixture.keys)
            _write_expert(folder, source, expert, trained, mixture, config, log)
            final = out.resolve() / "experts" / folder.name
            members.append(MixtureExpert(source.key, str(final), hash_file(folder / WEIGHTS_FILE), final))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in gate.tensors.items()}
        save_file(tensors, draft / GATE_FILE, metadata={"experts": json.dumps(list(gate.experts))})
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        choice = GateChoice(gate.name, gate.options.to_dict(), out.resolve() / GATE_FILE, hash_file(draft / GATE_FILE))
        written = replace(mixture, experts=tuple(members), registry=None, created=created, gate=choice, aggregator=None)
        write_json(draft / MIXTURE_FILE, written.to_dict(anchor=out.resolve()))
        write_file(draft / LOG_FILE, log)
        write_manifest(draft, KIND, inputs=inputs, config=config, seed=trained.seed, figures=trained.figures())


def _folder_name(place: int, keys: Sequence[str]) -> str:
    """The expert's key as a folder's name; with its number where that would be ambiguous."""
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-") for key in keys]
    name = plain[place]
    return name if name and [n.lower() for n in plain].count(name.lower()) == 1 else f"{place}-{name}".rstrip("-")


def _write_expert(
    folder: Path,
    source: MixtureExpert,
    expert: Any,
    trained: Trained,
    mixture: Mixture,
    config: Mapping[str, Any],
    log: str,
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weights = {}
    for module, update in expert.modules.items():
        for side, tensor in (("A", update.a), ("B", update.b)):
            weights[f"base_model.model.{module}.lora_{side}.weight"] = tensor.detach().cpu().contiguous()
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copyfile(source.folder / CONFIG_FILE, folder / CONFIG_FILE)
    adapter = settle_adapter_config(folder / CONFIG_FILE, trained.lm)
    if (source.folder / EXEMPLARS_FILE).is_file():  # what it is meant for has not changed
        shutil.copyfile(source.folder / EXEMPLARS_FILE, folder / EXEMPLARS_FILE)
    write_file(folder / LOG_FILE, log)
    card = _card(source, adapter, trained, mixture, config)
    write_file(folder / "README.md", model_card(card, on_hub=trained.lm.on_hub))
    write_expert_report(folder, card)
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    replace(card, files=files).write(folder)


def _card(
    source: MixtureExpert,
    adapter: Mapping[str, Any],
    trained: Trained,
    mixture: Mixture,
    config: Mapping[str, Any],
) -> ExpertCard:
    others = [key for key in mixture.keys if key != source.key]
    how = "kept as it was while the router was trained" if config["freeze_experts"] else "trained jointly"
    beside = f" with {', '.join(others)}" if others else ""
    lm = trained.lm
    return replace(
        source.card,
        name=source.key,
        adapter=adapter,
        description=f"LoRA expert, {how}{beside} behind gate {config['gate']} in mixture {mixture.name}.",
        selection=selection_of(trained),
        training={
            "key": trained.key,
            "jointly": {
                "mixture": mixture.name,
                "experts": list(mixture.keys),
                "began_as": {"ref": source.ref, "fingerprint": source.fingerprint},
                **config,
            },
            "options": trained.options.to_dict(),
            "seed": trained.seed,
            "device": lm.device.type,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "figures": trained.figures(),
            "versions": package_versions(),
        },
        licences=dict(Counter(source.card.licences) + Counter(licences_of(trained.learned))),
        profile=None,  # that of the expert it was
        gates={},  # the vectors stay behind as well
        prototypes=(),
        # All were trained by the one run, so each took the whole of it.
        spent=in_all([spent_of(source.card), trained.spent()]),
        files={},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
