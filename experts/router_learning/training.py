"""Training a mixture's router on observations: a new mixture file, and the router's state beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xpert.errors import BadInput
from xpert.experts.mixture import Mixture, StateFile, router_options
from xpert.experts.mixture_file import write_mixture
from xpert.experts.router_learning.cross_fitting import FOLDS, TRAINED_ON, learn_router, learns
from xpert.experts.router_learning.evaluating import RouterFigures, evaluate_routers
from xpert.experts.router_learning.observations import Observed
from xpert.experts.router_state import ROUTER_FILE, write_router_state
from xpert.progress import SILENT, Progress
from xpert.protocols import RouterState
from xpert.registry.card import Interval
from xpert.storage import check_output, hash_file

__all__ = ["TrainedRouter", "check_trainable", "state_path", "train_router"]


@dataclass(frozen=True)
class TrainedRouter:
    """The mixture that was written, and how its router does on prompts left out of its training."""

    mixture: Mixture
    state_file: Path
    observed: Path
    items: int
    figures: RouterFigures
    oracle: Interval


def check_trainable(router: str, params: Mapping[str, Any], out: Path) -> None:
    """Raises BadInput for a router that learns nothing, NotFound for an unknown one, and for outputs that are taken.

    To be called before anything is observed.
    """
    router_options(router, params)
    if not learns(router, params):
        raise BadInput(
            f"router {router} learns nothing from observations"
            + (" with these parameters" if learns_at_all(router) else ""),
            hint=f"it is ready as it is: xpert mix --router {router}",
        )
    if out.is_dir():
        raise BadInput("is a folder; a mixture is a file", where=str(out), hint="write -o FOLDER/mixture.json")
    for path in (out, state_path(out)):
        check_output(path)


def learns_at_all(router: str) -> bool:
    from xpert import plugins

    return bool(getattr(plugins.load("router", router), "learned", False))


def state_path(mixture: Path) -> Path:
    """Where the router's state of a mixture file lies: beside it. Several mixtures in one folder have one each."""
    return mixture.with_name(ROUTER_FILE if mixture.stem == "mixture" else f"{mixture.stem}.{ROUTER_FILE}")


def train_router(
    mixture: Mixture,
    observed: Observed,
    router: str,
    params: Mapping[str, Any],
    out: Path,
    *,
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> TrainedRouter:
    """Writes the mixture behind `router` to `out`, trained on all of `observed` (which is `for_mixture`).

    Cost: as many trainings as folds, and one. Raises as `check_trainable`.
    """
    check_trainable(router, params, out)
    typed = router_options(router, params).to_dict()
    given = {name: typed[name] for name in (key.replace("-", "_") for key in params)}
    fresh = replace(
        mixture,
        name=out.stem,
        router=router,
        router_params=given,
        router_state=None,
        calibration=None,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    found = evaluate_routers(fresh, observed, folds=folds, seed=seed, device=device, progress=progress)
    _, state = learn_router(fresh, observed, range(len(observed)), seed=seed, device=device)
    file = state_path(out)
    write_router_state(file, _with_origin(state, observed))
    trained = replace(fresh, router_state=StateFile(file, hash_file(file)))
    write_mixture(out, trained)
    return TrainedRouter(trained, file, observed.folder, len(observed), found.routers[0], found.oracle)


def _with_origin(state: RouterState, observed: Observed) -> RouterState:
    """The state says which prompts it was trained on, so that nobody measures it on those by mistake."""
    origin = {
        "suite": observed.suite,
        "suite_fingerprint": observed.suite_fingerprint,
        "items": len(observed),
        "prompts": sorted(set(observed.prompt_hashes)),
    }
    return RouterState(state.tensors, {**state.facts, TRAINED_ON: origin})
