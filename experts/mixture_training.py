"""Joint training of a mixture from ready experts: their LoRAs and a router learn together, or the router alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpert import plugins
from xpert.errors import BadInput, XpertError
from xpert.experts.adapters import read_adapter, read_parts
from xpert.experts.checkpoints import other_work, remove_work, work_folder
from xpert.experts.expert_folder import Trained
from xpert.experts.mixture import ExpertStore, Mixture
from xpert.experts.mixture_file import load_mixture
from xpert.experts.mixture_training_folder import KIND, write_trained_mixture
from xpert.experts.train import Run, prepare, processes, quiet_warnings, trained_to_the_end
from xpert.experts.train_options import TrainOptions
from xpert.experts.training_data import TrainingRows, gather_rows
from xpert.language_model import quiet_transformers
from xpert.model_files import find_model
from xpert.progress import SILENT, Progress
from xpert.storage import MANIFEST, check_output, disk_errors, hash_json, read_manifest

if TYPE_CHECKING:
    from xpert.experts.gates._learned import LearnedGate
    from xpert.experts.mixture_training_layers import JointModel

__all__ = ["EXPERTS_OWN", "learned_gate", "train_mixture"]

EXPERTS_OWN = ("rank", "alpha", "target_modules", "rslora", "gate")
"""Options of ordinary training that the experts of a mixture have settled already."""


def train_mixture(
    selection: Path | str,
    mixture: Path | str,
    gate: str,
    out: Path | str,
    options: TrainOptions | None = None,
    *,
    gate_params: Mapping[str, Any] | None = None,
    freeze_experts: bool = False,
    base: str | None = None,
    registry: ExpertStore | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Path:
    """Trains the experts of `mixture` and the router of `gate` on rows, and writes the mixture folder `out`.

    The experts begin with their own weights, ranks and modules, the router untrained; the loss is that of the answers
    and the gate's own. `freeze_experts` trains the router alone. Resumes and recognises finished work as `train` does.
    Raises BadInput for rows, a mixture, a gate or options that cannot be used.
    """
    out, options = Path(out), options or TrainOptions()
    _check(options)
    loaded = load_mixture(mixture, registry)
    made = learned_gate(gate, gate_params or {}, loaded.keys, seed)
    data = gather_rows(selection, use_shots=options.shots, hold_out=options.hold_out_shots, seed=seed)
    _kinds(made, data, range(len(data.rows)))  # refuses rows of one kind before any work
    files = find_model(base or loaded.base.ref)
    config = {
        "gate": gate,
        "gate_params": made.options.to_dict(),
        "freeze_experts": freeze_experts,
        "options": options.shaping(),
    }
    inputs = {
        "rows": data.fingerprint,
        "base": files.fingerprint(),
        "experts": {expert.key: expert.fingerprint for expert in loaded.experts},
    }
    key = hash_json([inputs, list(loaded.keys), config, seed])
    if _is_done(out, key):
        progress.say(f"{out} is trained already, with this configuration and these rows.")
        return out
    check_output(out)
    _tell(loaded, out, key, progress)
    with work_folder(out, key) as work, quiet_transformers(), quiet_warnings(), disk_errors(out):
        run = prepare(work, options, seed, data, str(base or loaded.base.ref), device, progress)
        joint = _join(run, loaded, made, freeze_experts)
        trained = _train(run, joint, key)
        write_trained_mixture(out, loaded, trained, joint, inputs=inputs, config={**config, "key": key})
    remove_work(out, key)
    return out


def learned_gate(name: str, params: Mapping[str, Any], experts: tuple[str, ...], seed: int) -> LearnedGate:
    """An untrained gate of kind "mixture"; raises BadInput for another gate, or parameters it does not have."""
    kind = plugins.load("gate", name)
    if kind.learned != "mixture":
        known = [other for other in plugins.names("gate") if plugins.load("gate", other).learned == "mixture"]
        raise BadInput(
            f"gate {name} has no router that is trained for a mixture", hint=f"those that do: {', '.join(known)}"
        )
    if not hasattr(kind, "begin"):
        raise BadInput(f"gate {name} does not say how it is trained")
    gate: LearnedGate = kind(kind.Options.from_mapping(params, where=f"gate {name}"), experts=experts, seed=seed)
    return gate


def _check(options: TrainOptions) -> None:
    plain = TrainOptions()
    for name in EXPERTS_OWN:
        if getattr(options, name) != getattr(plain, name):
            raise BadInput(
                f"{name.replace('_', '-')} does not go with a mixture: its experts have their own",
                hint="leave the option out",
            )
    if options.activation_checkpointing:
        raise BadInput("activation-checkpointing does not go with a mixture: its routers would be asked twice")
    if processes() > 1:
        raise BadInput(f"a mixture is trained in one process, and this run has {processes()}")


def _tell(mixture: Mixture, out: Path, key: str, progress: Progress) -> None:
    for other in other_work(out, key):
        progress.say(f"Another configuration's unfinished work is kept in {other} until this mixture is done.")
    if mixture.gate is not None:
        progress.say(f"The mixture's gate {mixture.gate.name} is replaced; the new router begins untrained.")
    if mixture.aggregator is not None:
        progress.say(
            f"The mixture's aggregator {mixture.aggregator.name} is left out: it and a gate exclude each other."
        )
    weighted = [expert.key for expert in mixture.experts if expert.weight != 1]
    if weighted:
        progress.say(f"Experts are trained, and then served, at weight 1: {', '.join(weighted)} had others.")


def _join(run: Run, mixture: Mixture, gate: LearnedGate, freeze_experts: bool) -> JointModel:
    import torch

    from xpert.experts.mixture_training_layers import JointModel

    parts = {}
    for expert in mixture.experts:
        read_adapter(expert.key, expert.folder, run.lm)  # refuses what cannot be served
        parts[expert.key] = read_parts(expert.folder)
    return JointModel(
        run.lm.model,
        parts,
        gate,
        dropout=run.options.dropout,
        freeze_experts=freeze_experts,
        generator=torch.Generator().manual_seed(run.seed),
    )


def _train(run: Run, joint: JointModel, key: str) -> Trained:
    from xpert.experts.mixture_training_trainer import mixture_trainer
    from xpert.experts.training_callbacks import read_log

    kinds = _kinds(joint.gate, run.data, run.encoded.kept)
    trained_to_the_end(
        run,
        lambda resumed: mixture_trainer(run, joint, kinds, resumed=resumed),
        lambda _, checkpoint: joint.load(checkpoint),
    )
    return Trained(
        model=run.lm.model,
        lm=run.lm,
        data=run.data,
        encoded=run.encoded,
        options=run.options,
        seed=run.seed,
        key=key,
        log=read_log(run.work),
        validation_rows=len(run.validation.examples),
    )


def _kinds(gate: LearnedGate, data: TrainingRows, kept: Any) -> list[int] | None:
    kinds = gate.row_kinds([data.rows[index].skill for index in kept])
    if kinds is not None and len(set(kinds)) < 2:
        which = "every" if set(kinds) == {0} else "no"
        raise BadInput(
            f"{which} row has a skill among knowledge-skills, and the localised balance needs both kinds",
            hint=f"skills of the rows: {', '.join(sorted({row.skill or 'none' for row in data.rows}))}",
        )
    return kinds


def _is_done(out: Path, key: str) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    try:
        return bool(read_manifest(out, KIND)["config"].get("key") == key)
    except XpertError:
        return False
