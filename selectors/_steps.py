"""The steps of a pipeline as written: each a mapping with one key, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput, unknown
from xpert.protocols import Selector
from xpert.selectors._scoring import open_scorer, scorer_settings

__all__ = ["AllocateStep", "FilterStep", "PickStep", "ScoreStep", "Step", "parse_steps", "read_steps"]


@dataclass(frozen=True)
class _FilterKeys(Config):
    by: str | None = option(None, "a scorer, or the name of a score step")
    above: float | None = option(None, "least score that stays")
    below: float | None = option(None, "greatest score that stays")
    above_quantile: float | None = option(None, "least score, as a quantile of the candidates'", minimum=0, maximum=1)
    below_quantile: float | None = option(None, "greatest score, as a quantile", minimum=0, maximum=1)
    duplicates: float | None = option(
        None, "drop rows at this cosine or more to a candidate before them", minimum=-1, maximum=1
    )
    column: str | None = option(None, "a column of the rows")
    among: tuple[str, ...] = option((), "the column's values that stay")


@dataclass(frozen=True)
class FilterStep:
    keys: _FilterKeys
    params: Mapping[str, Any]
    needs: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.keys, name)

    def words(self) -> str:
        keys = {key: value for key, value in self.keys.to_dict().items() if value not in (None, [])}
        return " ".join(f"{key.replace('_', '-')} {value}" for key, value in keys.items())

    def written(self) -> dict[str, Any]:
        return {"filter": {**self.keys.to_dict(), "params": _settings(self.by, self.params)}}


@dataclass(frozen=True)
class _ScoreKeys(Config):
    name: str = option("", "what later steps call it")
    scale: str = option(
        "z",
        "before they are added: standard deviations (z), ranks from 0 to 1 (rank), or as they are (none)",
        choices=("z", "rank", "none"),
    )


@dataclass(frozen=True)
class ScoreStep:
    keys: _ScoreKeys
    of: Mapping[str, float]
    params: Mapping[str, Mapping[str, Any]]
    needs: frozenset[str]

    @property
    def name(self) -> str:
        return self.keys.name

    @property
    def scale(self) -> str:
        return self.keys.scale

    def written(self) -> dict[str, Any]:
        params = {name: _settings(name, self.params.get(name, {})) for name in self.of}
        return {"score": {**self.keys.to_dict(), "of": dict(self.of), "params": params}}


@dataclass(frozen=True)
class _AllocateKeys(Config):
    by: str = option("cluster", "the groups that later picks share among: cluster, or `column NAME`")
    weights: str = option("size", "a group's share: by its candidates, or alike", choices=("size", "equal"))


@dataclass(frozen=True)
class AllocateStep:
    keys: _AllocateKeys
    needs: frozenset[str]

    @property
    def by(self) -> str:
        return self.keys.by

    @property
    def weights(self) -> str:
        return self.keys.weights

    def written(self) -> dict[str, Any]:
        return {"allocate": self.keys.to_dict()}


@dataclass(frozen=True)
class _PickKeys(Config):
    method: str | None = option(None, "a method of `xpert select`")
    best: str | None = option(None, "the best rows by a scorer, or by a score step")
    share: str | None = option(None, "of the whole budget, such as 40%; what is left where it is not given")


@dataclass(frozen=True)
class PickStep:
    keys: _PickKeys
    params: Mapping[str, Any]
    share: float | None
    needs: frozenset[str]

    @property
    def best(self) -> str | None:
        return self.keys.best

    @property
    def label(self) -> str:
        return self.keys.method or f"best {self.keys.best}"

    def words(self) -> str:
        return f"{self.label} {self.keys.share or 'the rest'}"

    def open(self) -> Selector:
        """The step's selector, new."""
        assert self.keys.method is not None
        return _open_selector(self.keys.method, self.params)

    def written(self) -> dict[str, Any]:
        if self.keys.method is None:
            return {"pick": {**self.keys.to_dict(), "params": _settings(self.best, self.params)}}
        options = plugins.load("selector", self.keys.method).Options.from_mapping(self.params)
        return {"pick": {**self.keys.to_dict(), "params": options.to_dict()}}


Step = FilterStep | ScoreStep | AllocateStep | PickStep


@dataclass
class _Known:
    """What the steps before have named."""

    scores: set[str] = field(default_factory=set)


def read_steps(path: Path) -> list[Step]:
    """The steps of a file: a YAML list, or a mapping that holds it under `steps`."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("no such pipeline file", where=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if isinstance(loaded, Mapping) and set(loaded) == {"steps"}:
        loaded = loaded["steps"]
    try:
        return parse_steps(loaded)
    except BadInput as error:
        error.where = f"{path}, {error.where}" if error.where else str(path)
        raise


def parse_steps(written: Any) -> list[Step]:
    """Plain values as steps. Raises BadInput naming the step for what cannot be run."""
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        raise BadInput("a pipeline is a list of steps", hint="write `- filter: {...}`, `- pick: {method: ...}`")
    known = _Known()
    steps: list[Step] = []
    for number, entry in enumerate(written, start=1):
        where = f"step {number}"
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise BadInput(f"a step is a mapping with one key, of {', '.join(_PARSERS)}", where=where)
        [(kind, keys)] = entry.items()
        if kind not in _PARSERS:
            raise unknown("step", str(kind), _PARSERS, where=where)
        if not isinstance(keys, Mapping):
            raise BadInput(f"{kind} holds `key: value` pairs, not {keys!r}", where=where)
        where = f"{where} ({kind})"
        try:
            steps.append(_PARSERS[kind]({str(key).replace("-", "_"): value for key, value in keys.items()}, known))
        except BadInput as error:
            error.where = f"{where}, {error.where}" if error.where else where
            raise
    _check_shares(steps)
    return steps


def _check_shares(steps: Sequence[Step]) -> None:
    picks = [step for step in steps if isinstance(step, PickStep)]
    if not picks or not isinstance(steps[-1], PickStep):
        raise BadInput("a pipeline ends with a pick", hint="write `- pick: {method: ...}` last")
    if any(step.share is None for step in picks[:-1]):
        raise BadInput("a pick without a share takes all that is left, so only the last may be one")
    given = sum(step.share or 0 for step in picks)
    if picks[-1].share is None and given >= 1 - 1e-9:
        raise BadInput("the shares leave nothing for the last pick", hint="lower them")
    if picks[-1].share is not None and abs(given - 1) > 1e-9:
        raise BadInput(f"the picks' shares sum to {given:.4g}, not to 1", hint="leave out the last one's share")


def _filter(keys: dict[str, Any], known: _Known) -> FilterStep:
    params = _mapping(keys.pop("params", {}), "params")
    step = _FilterKeys.from_mapping(keys)
    if sum(value is not None for value in (step.by, step.duplicates, step.column)) != 1:
        raise BadInput("a filter has one of by, duplicates and column")
    bounds = (step.above, step.below, step.above_quantile, step.below_quantile)
    bounded = any(bound is not None for bound in bounds)
    if (step.by is not None) != bounded:
        raise BadInput(
            "a filter by a score has a bound" if step.by else "bounds belong to a filter by a score",
            hint="write above, below, above-quantile or below-quantile",
        )
    if bool(step.among) != (step.column is not None):
        raise BadInput("column and among go together")
    needs: frozenset[str] = frozenset({"embeddings"} if step.duplicates is not None else ())
    if step.by is not None:
        needs = _score_needs(step.by, params, known)
    elif params:
        raise BadInput("params belong to a filter by a scorer")
    return FilterStep(step, params, needs)


def _score(keys: dict[str, Any], known: _Known) -> ScoreStep:
    params = {name: _mapping(value, name) for name, value in _mapping(keys.pop("params", {}), "params").items()}
    of = _mapping(keys.pop("of", {}), "of")
    step = _ScoreKeys.from_mapping(keys)
    if not step.name or not of:
        raise BadInput("a score step has a name, and `of: {scorer: weight}`")
    for name, weight in of.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise BadInput(f"the weight of {name} must be a number, not {weight!r}")
    stray = set(params) - set(of)
    if stray:
        raise unknown("scorer in params", min(stray), of)
    if step.name in plugins.names("scorer"):
        raise BadInput(f"{step.name!r} is the name of a scorer", hint="name the score otherwise")
    needs = frozenset(need for name in of for need in _score_needs(name, params.get(name, {}), known))
    known.scores.add(step.name)
    return ScoreStep(step, {name: float(weight) for name, weight in of.items()}, params, needs)


def _allocate(keys: dict[str, Any], known: _Known) -> AllocateStep:
    step = _AllocateKeys.from_mapping(keys)
    if step.by != "cluster" and not step.by.startswith("column "):
        raise BadInput(f"allocate by {step.by!r} is not understood", hint="write by: cluster, or by: column NAME")
    return AllocateStep(step, frozenset({"clusters"} if step.by == "cluster" else ()))


def _pick(keys: dict[str, Any], known: _Known) -> PickStep:
    params = _mapping(keys.pop("params", {}), "params")
    step = _PickKeys.from_mapping(keys)
    if (step.method is None) == (step.best is None):
        raise BadInput("a pick has one of method and best")
    if step.method is not None:
        needs = _open_selector(step.method, params).needs
    else:
        assert step.best is not None
        needs = _score_needs(step.best, params, known)
    return PickStep(step, params, _share(step.share), needs)


def _open_selector(name: str, params: Mapping[str, Any]) -> Selector:
    selector_class = plugins.load("selector", name)
    selector: Selector = selector_class(selector_class.Options.from_mapping(params, where=f"method {name}"))
    return selector


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise BadInput(f"share {text!r} is not understood", hint="write a share such as 40% or 0.4")
    return value


def _score_needs(name: str, params: Mapping[str, Any], known: _Known) -> frozenset[str]:
    if name in known.scores:
        if params:
            raise BadInput(f"params belong to the score step that is named {name!r}")
        return frozenset()
    if name not in plugins.names("scorer"):
        raise unknown("scorer or score step", name, [*plugins.names("scorer"), *known.scores])
    return open_scorer(name, params).needs


def _settings(name: str | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's options in full, as a manifest holds them; a score step, written before, has none."""
    return scorer_settings(name, params) if name in plugins.names("scorer") else {}


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{what} holds `key: value` pairs, not {value!r}")
    return {str(key): item for key, item in value.items()}


_PARSERS: dict[str, Any] = {"filter": _filter, "score": _score, "allocate": _allocate, "pick": _pick}
