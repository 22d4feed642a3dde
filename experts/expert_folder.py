"""Writing a trained expert: the adapter plain peft loads, its card, exemplars, model card, log and report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.experts.expert_report import LOG_FILE, write_expert_report
from xpert.experts.gate_vectors import MadeGate, write_gate
from xpert.experts.spending import Spending, in_all, spent_on_selection
from xpert.experts.train_options import TrainOptions
from xpert.experts.training_data import Encoded, TrainingRows, languages_of, licences_of, skills_of
from xpert.language_model import LanguageModel
from xpert.records import Row
from xpert.registry.card import EXEMPLARS_FILE, BaseModel, ExpertCard
from xpert.registry.model_card import model_card
from xpert.storage import draft_folder, hash_file, package_versions, read_json, write_file, write_json

__all__ = ["EXEMPLARS", "Trained", "selection_of", "settle_adapter_config", "training_sentence", "write_expert"]

EXEMPLARS = 64


@dataclass(frozen=True)
class Trained:
    """A finished training run: the peft model and all that its card tells. `log` are training.jsonl's records, `gate`
    the vectors for a token gate, where they were asked for."""

    model: Any
    lm: LanguageModel
    data: TrainingRows
    encoded: Encoded
    options: TrainOptions
    seed: int
    key: str
    log: Sequence[Mapping[str, Any]]
    validation_rows: int
    gate: MadeGate | None = None

    @property
    def learned(self) -> list[Row]:
        """The rows that were trained on, shots first."""
        return [self.data.rows[index] for index in self.encoded.kept]

    def figures(self) -> dict[str, Any]:
        """What training took and where it arrived. Tokens are counted without padding, over all epochs."""
        steps = [record for record in self.log if "loss" in record]
        validation = [record["validation_loss"] for record in self.log if "validation_loss" in record]
        last = steps[-1]
        tail = [record["loss"] for record in steps[-max(1, len(steps) // 10) :]]
        found = {
            "rows": len(self.encoded.kept),
            "shots": sum(index < self.data.shots for index in self.encoded.kept),
            "rows_cut": self.encoded.cut,
            "rows_dropped": self.encoded.dropped,
            "held_out_shots": self.validation_rows,
            "steps": last["step"],
            "tokens": last["tokens"],
            "supervised_tokens": last["supervised_tokens"],
            "seconds": last["seconds"],
            "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9), 1),
            "first_loss": steps[0]["loss"],
            "final_loss": sum(tail) / len(tail),
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        if validation:
            found |= {"validation_loss_before": validation[0], "validation_loss": validation[-1]}
        return found

    def spent(self) -> dict[str, float]:
        """Selection, training, and the making of gate vectors together."""
        figures = self.figures()
        parts: list[Spending] = [spent_on_selection(self.data.selection)]
        parts.append({"tokens": figures["tokens"], "seconds": figures["seconds"]})
        if self.gate:
            parts.append(self.gate.spent)
        return in_all(parts)


def write_expert(out: Path, trained: Trained) -> None:
    """Writes the expert folder, whole or not at all."""
    with draft_folder(out) as draft:
        trained.model.save_pretrained(draft, safe_serialization=True, save_embedding_layers=False)
        adapter = settle_adapter_config(draft / "adapter_config.json", trained.lm)
        write_file(draft / LOG_FILE, "".join(json.dumps(record) + "\n" for record in trained.log))
        write_file(draft / EXEMPLARS_FILE, _exemplars(trained.learned, trained.data))
        card = _card(out.name, trained, adapter)
        write_file(draft / "README.md", model_card(card, on_hub=trained.lm.on_hub))
        write_expert_report(draft, card)
        if trained.gate:
            card = dataclasses.replace(card, gates={trained.gate.name: write_gate(draft, trained.gate, card)})
        files = {path.name: hash_file(path) for path in sorted(draft.iterdir())}
        ExpertCard(**{**vars(card), "files": files}).write(draft)


def settle_adapter_config(path: Path, lm: LanguageModel) -> dict[str, Any]:
    """Names the base as plain peft can load it: the hub name, or the folder with its weights; fixes peft's order of
    set-valued entries, which changes from run to run."""
    config: dict[str, Any] = read_json(path)
    name, _, revision = lm.ref.partition("@")
    from_hub = lm.on_hub
    config["base_model_name_or_path"] = name if from_hub else str(lm.folder.resolve())
    config["revision"] = (revision or None) if from_hub else None
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value, key=str)
    write_json(path, config)
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
    return {
        "type": config["peft_type"],
        "target_modules": config["target_modules"],
        **{new: config[old] for old, new in names.items()},
    }


def selection_of(trained: Trained) -> dict[str, Any]:
    """The card's `selection`: the hash of the rows, what is known of how they were selected, and their languages."""
    found = {"fingerprint": trained.data.fingerprint, **trained.data.selection}
    languages = languages_of(trained.learned)
    return found | {"languages": languages} if languages else found


def training_sentence(skills: Sequence[str], rows: int) -> str:
    """A new card's description. Router glider knows it by its form (`_BY_TRAINING`), and that it says little."""
    about = f" for {', '.join(skills[:5])}" if skills else ""
    return f"LoRA expert{about}, trained on {rows:,} rows."


def _card(name: str, trained: Trained, adapter: Mapping[str, Any]) -> ExpertCard:
    lm, data = trained.lm, trained.data
    skills = skills_of(data)
    figures = trained.figures()
    return ExpertCard(
        base=BaseModel(lm.ref, lm.fingerprint, lm.architecture),
        adapter=adapter,
        name=name,
        description=training_sentence(skills, int(figures["rows"])),
        skills=skills,
        selection=selection_of(trained),
        training={
            "key": trained.key,
            "options": trained.options.to_dict(),
            "seed": trained.seed,
            "device": lm.device.type,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "figures": figures,
            "versions": package_versions(),
        },
        licences=licences_of(trained.learned),
        spent=trained.spent(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _exemplars(rows: Sequence[Row], data: TrainingRows) -> str:
    """Prompts the expert was trained for, shots first; held-out and unanswered shots are what it is meant for too."""
    shots = [*(row for row in rows if row in data.rows[: data.shots]), *data.validation, *data.unanswered]
    others = [row for row in rows if row not in data.rows[: data.shots]]
    lines: list[dict[str, Any]] = []
    for kind, group in (("shot", shots), ("row", others)):
        chosen = group[: EXEMPLARS - len(lines)]
        lines += [{"prompt": row.prompt, "skill": row.skill, "kind": kind} for row in chosen]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
