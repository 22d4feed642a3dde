"""What can be scored: models, experts and mixtures named on the command line, and the controls beside a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.experts.aggregated import open_aggregator
from xpert.experts.evaluate import EvalOptions, Evaluation, ItemResult, Subject, evaluate
from xpert.experts.mixture import BASE, ExpertStore, Mixture, MixtureExpert
from xpert.experts.mixture_file import load_mixture
from xpert.experts.routing import MixtureRouter
from xpert.experts.serving import gate_cosines, open_engine, open_gate
from xpert.experts.staged_subjects import aggregated_subject, requests_of, staged_subject
from xpert.progress import SILENT, Progress
from xpert.protocols import RouteRequest, WeightedExperts
from xpert.records import SuiteItem
from xpert.registry.card import CARD_FILE

__all__ = [
    "RANDOM_SEEDS",
    "Entrant",
    "average",
    "control_subjects",
    "open_entrants",
    "routed_subject",
    "run_entrants",
    "score_subjects",
]

RANDOM_SEEDS = 3


@dataclass(frozen=True)
class Entrant:
    """One thing to score: a mixture (an expert is a mixture of one), or a model alone."""

    name: str
    base: str
    mixture: Mixture | None = None


def open_entrants(
    refs: Sequence[str], registry: ExpertStore | None = None, *, base: str | None = None
) -> list[Entrant]:
    """Mixture files, expert folders, registered names, model folders, hub names and `.gguf` files, in order.

    A name OWNER/NAME is looked up in the registry first, and is a hub model where the registry has none such. `base`
    is where the base model of experts and mixtures lies, if not where they say.
    """
    entrants: list[Entrant] = []
    for ref in dict.fromkeys(refs):
        found = _entrant(ref, registry)
        if base is not None and found.mixture is not None:
            moved = replace(found.mixture, base=replace(found.mixture.base, ref=base))
            found = Entrant(found.name, base, moved)
        names = [entrant.name for entrant in entrants]
        entrants.append(Entrant(ref, found.base, found.mixture) if found.name in names else found)
    return entrants


def _entrant(ref: str, registry: ExpertStore | None) -> Entrant:
    path = Path(ref)
    if path.suffix == ".gguf" or ((path / "config.json").is_file() and not (path / CARD_FILE).is_file()):
        return Entrant(path.name or ref, ref)
    if not path.exists() and ref.count("/") == 1 and not ref.startswith((".", "/")):
        from xpert.registry.opening import open_registry

        store = registry or open_registry()
        try:
            store.resolve(ref)
        except NotFound:
            return Entrant(ref, ref)
        registry = store
    try:
        mixture = load_mixture(ref, registry)
    except NotFound as error:
        if not path.exists() and error.hint and error.hint.startswith("give a mixture"):
            error.hint = "give a mixture file, OWNER/NAME, an expert folder, or a model"
        raise
    # A single expert is called by its own key, not by the name of the mixture of one around it.
    name = mixture.keys[0] if _is_one_expert(mixture) else mixture.name
    return Entrant(name, mixture.base.ref, mixture)


def run_entrants(
    entrants: Sequence[Entrant],
    items: Sequence[SuiteItem],
    options: EvalOptions,
    *,
    controls: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Evaluation:
    """Scores all entrants on the items; those of one base share its engine and their answers.

    `controls` puts the base, every expert, random routing (three seeds, averaged) and oracle routing beside each
    mixture of several experts; a name that means something else already gets `of MIXTURE` added.
    """
    named = {entrant.name: (entrant.base, _sole(entrant)) for entrant in entrants}
    results: dict[str, Sequence[ItemResult]] = {}
    generated = 0
    for base in dict.fromkeys(_located(entrant.base) for entrant in entrants):
        group = [entrant for entrant in entrants if _located(entrant.base) == base]
        prints = {e.mixture.base.fingerprint for e in group if e.mixture}
        if len(prints) > 1:
            raise BadInput(f"experts trained on different weights of {base} cannot be scored together")
        lm, engine = open_engine(
            base, next(iter(prints), None), device=device, max_batch=options.max_batch, progress=progress
        )
        subjects: list[Subject] = []
        averaged: dict[str, list[str]] = {}
        for entrant in group:
            if entrant.mixture is None:
                subjects.append(Subject.fixed(entrant.name, ()))
                continue
            keys = _add_experts(engine, entrant.mixture)
            router = MixtureRouter(entrant.mixture, seed=seed, device=device)
            subject = _behind_gate(routed_subject(entrant.name, router, keys), entrant.mixture, lm, engine, keys)
            aggregator = open_aggregator(entrant.mixture, seed=seed, device=device)
            if aggregator is not None:
                subject = aggregated_subject(subject, router, aggregator, lm, engine, keys, progress=progress)
            elif any(route.escalation for route in router.route(requests_of(items))):
                anew = Subject(entrant.name, _assign_second(router, keys))
                anew = _behind_gate(anew, entrant.mixture, lm, engine, keys)
                subject = staged_subject(subject, anew, router, lm, engine)
            subjects.append(subject)
            if controls and len(entrant.mixture.experts) > 1:
                found, groups = _controls(entrant, entrant.mixture, keys, named, seed=seed)
                subjects += found
                averaged |= groups
        scored = score_subjects(lm, engine, subjects, items, options, seed=seed, progress=progress)
        generated += scored.generated
        parts = dict(scored.results)
        for name, members in averaged.items():
            parts[name] = average([parts.pop(member) for member in members])
        results |= parts
    return Evaluation(items, results, seed=seed, generated=generated)


def _located(base: str) -> str:
    """One name for a base, by whatever path it was given."""
    return str(Path(base).resolve()) if Path(base).exists() else base


_Named = dict[str, tuple[str, WeightedExperts | None]]
"""subject -> its base, and the experts that answer all its items (None: a router decides)."""


def _sole(entrant: Entrant) -> WeightedExperts | None:
    if entrant.mixture is None:
        return ()
    return ((_engine_key(entrant.mixture.experts[0]), 1.0),) if _is_one_expert(entrant.mixture) else None


def _is_one_expert(mixture: Mixture) -> bool:
    """Whether a mixture answers as its only expert does."""
    return len(mixture.keys) == 1 and mixture.router == "fixed" and mixture.aggregator is None


def _controls(
    entrant: Entrant, mixture: Mixture, keys: Mapping[str, str], named: _Named, *, seed: int
) -> tuple[list[Subject], dict[str, list[str]]]:
    """The controls of one mixture, less those that are scored already; adds what is new to `named`."""
    found, groups = control_subjects(mixture, keys, seed=seed)
    sole: dict[str, WeightedExperts] = {BASE: (), **{key: ((keys[key], 1.0),) for key in mixture.keys}}
    subjects, renamed = [], {}
    for subject in found:
        same = (entrant.base, sole.get(subject.name))
        if subject.name in sole and named.get(subject.name) == same:
            continue
        name = f"{subject.name} of {entrant.name}" if subject.name in named else subject.name
        named[name], renamed[subject.name] = same, name
        subjects.append(Subject(name, subject.assign))
    averaged = {}
    for name, members in groups.items():
        shown = f"{name} of {entrant.name}" if name in named else name
        named[shown] = (entrant.base, None)
        averaged[shown] = [renamed[member] for member in members]
    return subjects, averaged


def score_subjects(
    lm: Any,
    engine: Any,
    subjects: Sequence[Subject],
    items: Sequence[SuiteItem],
    options: EvalOptions,
    *,
    known: Evaluation | None = None,
    confidences: bool = False,
    weigh_choices: bool = True,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Evaluation:
    """`evaluate` with the prompts and answers in the base's chat form."""
    from xpert.chat_form import answer_ids, encode_prompt

    return evaluate(
        engine,
        lambda item: encode_prompt(lm.tokenizer, item.row.messages),
        lambda answer: answer_ids(lm.tokenizer, [answer])[0],
        items,
        subjects,
        options,
        known=known,
        confidences=confidences,
        weigh_choices=weigh_choices,
        seed=seed,
        progress=progress,
    )


def control_subjects(
    mixture: Mixture, keys: Mapping[str, str], *, seed: int = 0
) -> tuple[list[Subject], dict[str, list[str]]]:
    """What a routed mixture is compared with, and which subjects are averaged under which name.

    The oracle knows each item's skill and takes the expert made for it; it is the best that routing by skill can do.
    """
    subjects = [Subject.fixed(BASE, ())]
    subjects += [Subject.fixed(expert.key, ((keys[expert.key], 1.0),)) for expert in mixture.experts]
    seeds = [f"random routing #{number + 1}" for number in range(RANDOM_SEEDS)]
    subjects += [_by_router(name, mixture, "random", keys, seed=seed + n) for n, name in enumerate(seeds)]
    subjects.append(_by_router("oracle routing", mixture, "oracle", keys, seed=seed))
    return subjects, {"random routing": seeds}


def average(several: Sequence[Sequence[ItemResult]]) -> list[ItemResult]:
    """Item by item, the mean score of several results; outputs and experts are those of the first."""
    return [
        ItemResult(
            group[0].id,
            group[0].skill,
            group[0].output,
            sum(result.score for result in group) / len(group),
            None,
            group[0].experts,
        )
        for group in zip(*several, strict=True)
    ]


def _behind_gate(subject: Subject, mixture: Mixture, lm: Any, engine: Any, keys: Mapping[str, str]) -> Subject:
    """The subject with its mixture's gate, if it has one; the router then says who may be used."""
    if mixture.gate is None:
        return subject
    gate = f"gate of {subject.name}"
    engine.add_gate(gate, open_gate(mixture.gate, lm.device, keys))
    strength = {keys[expert.key]: expert.weight for expert in mixture.experts}

    def assign(items: Sequence[SuiteItem]) -> list[WeightedExperts]:
        return [tuple((key, strength[key]) for key, _ in experts) for experts in subject.assign(items)]

    cosines = gate_cosines(mixture, device=str(lm.device))
    if cosines is None:
        return Subject(subject.name, assign, gate)

    def biases(items: Sequence[SuiteItem]) -> list[WeightedExperts]:
        prompts = [RouteRequest(item.row.id, item.row.messages).prompt for item in items]
        found = zip(cosines.gate_bias(prompts), subject.assign(items), strict=True)
        return [
            tuple((keys[key], cosine) for key, cosine in bias if keys[key] in dict(experts)) for bias, experts in found
        ]

    return Subject(subject.name, assign, gate, biases)


def _add_experts(engine: Any, mixture: Mixture) -> dict[str, str]:
    """Adds a mixture's experts under keys that no other mixture's can bear; mixture key -> engine key."""
    keys = {}
    for expert in mixture.experts:
        keys[expert.key] = _engine_key(expert)
        engine.add_expert(keys[expert.key], expert.folder)
    return keys


def _engine_key(expert: MixtureExpert) -> str:
    return f"{expert.key}@{expert.fingerprint[:12]}"


def routed_subject(name: str, router: MixtureRouter, keys: Mapping[str, str]) -> Subject:
    """A mixture's own routing; `keys` maps the mixture's keys to the engine's."""
    return Subject(name, _assign(router, keys))


def _by_router(name: str, mixture: Mixture, router: str, keys: Mapping[str, str], *, seed: int) -> Subject:
    plugin = plugins.load("router", router)
    made = plugin(plugin.Options(), seed=seed)
    made.prepare([expert.routable() for expert in mixture.experts])
    return Subject(name, _assign(made, keys))


def _assign(router: Any, keys: Mapping[str, str]) -> Callable[[Sequence[SuiteItem]], list[WeightedExperts]]:
    def assign(items: Sequence[SuiteItem]) -> list[WeightedExperts]:
        routes = router.route(requests_of(items))
        return [tuple((keys[key], weight) for key, weight in route.experts) for route in routes]

    return assign


def _assign_second(router: Any, keys: Mapping[str, str]) -> Callable[[Sequence[SuiteItem]], list[WeightedExperts]]:
    """Who answers in the second stage; the base, where an item's route has none."""

    def assign(items: Sequence[SuiteItem]) -> list[WeightedExperts]:
        seconds = [route.escalation.experts if route.escalation else () for route in router.route(requests_of(items))]
        return [tuple((keys[key], weight) for key, weight in experts) for experts in seconds]

    return assign
