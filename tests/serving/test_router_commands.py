"""`xpert router` from end to end, on observations made by hand and with a small router that learns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import Result

from xpert import plugins
from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.calibration import Calibration
from xpert.experts.mixture import Mixture
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.experts.router_learning.observations import Observed, write_observations
from xpert.experts.routing import MixtureRouter, route_request
from xpert.protocols import (
    Candidate,
    Escalation,
    Observations,
    RoutableExpert,
    Route,
    RouteRequest,
    RouterState,
)
from xpert.records import Message, Row

SKILLS = ("casing", "arithmetic", "reversal")
SUBJECTS = (*SKILLS, "base")


@dataclass(frozen=True)
class ByTaskOptions(Config):
    second: float | None = option(None, "confidence under which the base answers anew")
    ready: bool = option(False, "route to the first expert, trained or not")


class ByTask:
    """Learns which subject does best behind each first line of a prompt. Kept as [tasks, subjects] mean scores."""

    Options = ByTaskOptions
    learned: ClassVar[bool] = True
    lessons: ClassVar[list[int]] = []

    @staticmethod
    def untrained(options: ByTaskOptions) -> bool:
        return options.ready

    def __init__(
        self, options: ByTaskOptions, *, state: RouterState | None = None, seed: int = 0, device: str = "auto"
    ) -> None:
        self.options, self.state, self.keys = options, state, [""]

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        self.keys = [expert.key for expert in experts]
        known = self.state.facts["subjects"][:-1] if self.state is not None else self.keys
        for key in self.keys:
            if key not in known:
                raise BadInput(f"router by-task was not trained with expert {key!r}")

    def learn(self, experts: Sequence[RoutableExpert], seen: Observations) -> RouterState:
        self.lessons.append(len(seen.requests))
        tasks = sorted({self._task(request) for request in seen.requests})
        places = np.array([tasks.index(self._task(request)) for request in seen.requests])
        means = np.stack([seen.scores[places == place].mean(axis=0) for place in range(len(tasks))])
        self.state = RouterState({"means": means}, {"tasks": tasks, "subjects": list(seen.subjects)})
        self.prepare(experts)
        return self.state

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        return [self._route(request) for request in requests]

    def _route(self, request: RouteRequest) -> Route:
        second = Escalation((), self.options.second) if self.options.second is not None else None
        if self.state is None:
            return Route(((self.keys[0], 1.0),), (), "untrained", second)
        tasks = self.state.facts["tasks"]
        if self._task(request) not in tasks:
            return Route((), (), "an unknown task; the base answers")
        row = self.state.tensors["means"][tasks.index(self._task(request))].tolist()
        means = dict(zip(self.state.facts["subjects"], row, strict=True))
        ranked = sorted(self.keys, key=lambda key: (-means[key], key))
        candidates = tuple(Candidate(key, means[key]) for key in ranked)
        if means["base"] >= means[ranked[0]]:
            return Route((), candidates, "the base is as good")
        return Route(((ranked[0], 1.0),), candidates, f"best at it: {ranked[0]}", second)

    def pareto(self) -> list[dict[str, float]]:
        return [{"weight": 0.0, "score": 0.5}]

    def _task(self, request: RouteRequest) -> str:
        return request.prompt.split("\n")[0]


@pytest.fixture(autouse=True)
def _by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = plugins.load
    ByTask.lessons.clear()
    monkeypatch.setattr(
        plugins, "load", lambda kind, name: ByTask if (kind, name) == ("router", "by-task") else usual(kind, name)
    )


def observed_rows(rows: Sequence[Row], *, seed: int = 0) -> list[dict[str, Any]]:
    """Each expert is right on most prompts of its skill and few others; the base on half of the rest."""
    rng = np.random.default_rng(seed)
    lines = []
    for row in rows:
        chances = [0.9 if skill == row.skill else 0.1 for skill in SKILLS]
        chances.append(0.2 if row.skill in SKILLS else 0.6)
        scores = (rng.random(4) < chances).astype(float).tolist()
        lines.append(
            {
                "id": row.id,
                "messages": row.chat(),
                "skill": row.skill,
                "answers": [row.response],
                "metric": "exact",
                "outputs": [row.response if right else "no" for right in scores],
                "scores": scores,
                "losses": [0.1 if right else 2.0 for right in scores],
                "confidences": [0.9 if right else 0.3 for right in scores],
            }
        )
    return lines


MADE: list[str] = []


@pytest.fixture
def mixture(mixture_file: Callable[..., Path], tmp_path: Path) -> Path:
    """three.json in a folder of its own; its experts, which take longest to make, are made once."""
    if not MADE:
        MADE.append(mixture_file("centroid").read_text())
    (tmp_path / "three.json").write_text(MADE[0])
    return tmp_path / "three.json"


def write_seen(folder: Path, mixture: Path, lines: Sequence[dict[str, Any]], suite: str = "suite") -> Observed:
    return write_observations(
        folder, lines, load_mixture(mixture), suite=suite, suite_fingerprint=suite, config={}, seconds=0.0
    )


@pytest.fixture
def seen(mixture: Path, rows: list[Row], tmp_path: Path) -> Path:
    write_seen(tmp_path / "seen", mixture, observed_rows(rows))
    return tmp_path / "seen"


def ok(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.output, result.exception)
    value: dict[str, Any] = json.loads(result.stdout)
    return value


Run = Callable[..., Result]


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trained_router_is_a_mixture_that_routes(
    xpert: Run, mixture: Path, seen: Path, rows: list[Row], tmp_path: Path
) -> None:
    out = tmp_path / "trained.json"
    value = ok(xpert("router", "train", mixture, "--on", seen, "--router", "by-task", "-o", out, "--json"))
    trained = load_mixture(out)
    assert (trained.router, trained.name) == ("by-task", "trained")
    assert value["router_state"] == str(tmp_path / "trained.router.safetensors")
    assert json.loads(out.read_text())["router_state"]["file"] == "./trained.router.safetensors"
    routes = MixtureRouter(trained).route([route_request(row) for row in rows])
    for row, route in zip(rows, routes, strict=True):
        assert [key for key, _ in route.experts] == ([row.skill] if row.skill in SKILLS else [])
    # Five trainings on four fifths, and one on all.
    assert ByTask.lessons == [160] * 5 + [200]
    assert value["how"] == "in 5 folds"
    assert value["score"]["score"] == pytest.approx(0.8, abs=0.1)


def test_the_same_training_gives_the_same_bytes(xpert: Run, mixture: Path, seen: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ok(
            xpert(
                "router",
                "train",
                mixture,
                "--on",
                seen,
                "--router",
                "by-task",
                "-o",
                tmp_path / f"{name}.json",
                "--json",
            )
        )
    one, other = (tmp_path / f"{name}.router.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_a_mixture_of_that_name_keeps_the_name_of_its_file(
    xpert: Run, mixture: Path, seen: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "mixture.json"
    value = ok(xpert("router", "train", mixture, "--on", seen, "--router", "by-task", "-o", out, "--json"))
    assert value["router_state"] == str(tmp_path / "new" / "router.safetensors")


def test_training_leaves_out_the_calibration_of_another_router(
    xpert: Run, mixture: Path, seen: Path, tmp_path: Path
) -> None:
    ok(xpert("router", "calibrate", mixture, "--on", seen, "-o", tmp_path / "c.json", "--json"))
    ok(
        xpert(
            "router",
            "train",
            tmp_path / "c.json",
            "--on",
            seen,
            "--router",
            "by-task",
            "-o",
            tmp_path / "t.json",
            "--json",
        )
    )
    assert load_mixture(tmp_path / "t.json").calibration is None


def test_a_suite_is_observed_first(
    xpert: Run, mixture: Path, columns: Callable[..., Any], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    suite = write_jsonl("suite.jsonl", columns(6, seed=5, skills=SKILLS))
    out = tmp_path / "t.json"
    command = ("router", "train", mixture, "--on", suite, "--router", "by-task", "--folds", 2, "--max-tokens", 2)
    value = ok(xpert(*command, "-o", out, "--device", "cpu", "--json"))
    assert (Path(value["observations"]) / "observations.jsonl").is_file()
    again = xpert(*command, "-o", tmp_path / "u.json", "--device", "cpu")
    assert again.exit_code == 0
    assert f"observed before: {value['observations']}" in again.stderr
    assert value["observations"] in again.stdout


# ── eval ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def figures(value: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in [*value["routers"], *value["controls"]] if one["name"].startswith(name))
    return found


def test_figures_are_those_of_a_plain_count(xpert: Run, mixture: Path, seen: Path, rows: list[Row]) -> None:
    value = ok(xpert("router", "eval", mixture, "--on", seen, "--json"))
    scores = np.array([line["scores"] for line in observed_rows(rows)])
    best = scores.max(axis=1)
    assert value["oracle"]["score"] == pytest.approx(best.mean())
    routes = MixtureRouter(load_mixture(mixture)).route([route_request(row) for row in rows])
    chosen = [SUBJECTS.index(route.experts[0][0] if route.experts else "base") for route in routes]
    got = scores[np.arange(200), chosen]
    own = figures(value, "centroid (as mixed)")
    assert own["score"]["score"] == pytest.approx(got.mean())
    assert own["regret"]["score"] == pytest.approx((best - got).mean())
    assert own["accuracy"] == pytest.approx((got == best).mean())
    differ = best > scores.min(axis=1)
    assert value["differing"] == differ.sum() < 200
    assert own["where_it_matters"] == pytest.approx((got == best)[differ].mean())
    assert own["to_base"] == pytest.approx(np.mean(np.array(chosen) == 3))
    assert sum(own["subjects"].values()) == 200
    assert figures(value, "base alone")["score"]["score"] == pytest.approx(scores[:, 3].mean())
    single = scores[:, :3].mean(axis=0)
    assert figures(value, f"best expert in hindsight: {SKILLS[int(single.argmax())]}")["score"]["score"] == single.max()
    oracle = figures(value, "oracle")
    assert (oracle["accuracy"], oracle["regret"]["score"]) == (1.0, 0.0)
    assert oracle["to_base"] == pytest.approx(np.mean(scores[:, 3] == best))
    draws = []
    for seed in range(3):
        plugin = plugins.load("router", "random")
        router = plugin(plugin.Options(), seed=seed)
        router.prepare([expert.routable() for expert in load_mixture(mixture).experts])
        names = [route.experts[0][0] for route in router.route([route_request(row) for row in rows])]
        draws.append(scores[np.arange(200), [SUBJECTS.index(name) for name in names]].mean())
    assert figures(value, "random")["score"]["score"] == pytest.approx(np.mean(draws))


def test_a_router_that_learns_is_measured_on_prompts_left_out(xpert: Run, mixture: Path, seen: Path) -> None:
    value = ok(xpert("router", "eval", mixture, "--on", seen, "--router", "by-task", "--folds", 4, "--json"))
    assert [(one["name"], one["how"]) for one in value["routers"]] == [
        ("centroid (as mixed)", "as it is"),
        ("by-task", "in 4 folds"),
    ]
    assert ByTask.lessons == [150] * 4


def test_a_router_that_learned_prompts_by_heart_gains_nothing_by_it(
    xpert: Run, mixture: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every prompt a task of its own, what is learned serves no prompt that was left out."""
    monkeypatch.setattr(ByTask, "_task", lambda self, request: request.prompt)
    write_seen(tmp_path / "seen", mixture, observed_rows(rows))
    value = ok(xpert("router", "eval", mixture, "--on", tmp_path / "seen", "--router", "by-task", "--json"))
    assert figures(value, "by-task")["to_base"] == 1.0


def test_a_trained_mixture_is_cross_fitted_on_what_it_was_trained_on_alone(
    xpert: Run, mixture: Path, seen: Path, rows: list[Row], tmp_path: Path
) -> None:
    out = tmp_path / "t.json"
    ok(xpert("router", "train", mixture, "--on", seen, "--router", "by-task", "-o", out, "--json"))
    value = ok(xpert("router", "eval", out, "--on", seen, "--json"))
    assert figures(value, "by-task (as mixed)")["how"] == "in 5 folds"
    others = [replace(row, messages=(replace(row.messages[0], content=row.prompt + "!"),)) for row in rows[:50]]
    write_seen(tmp_path / "others", mixture, observed_rows(others, seed=1), suite="others")
    value = ok(xpert("router", "eval", out, "--on", tmp_path / "others", "--json"))
    assert figures(value, "by-task (as mixed)")["how"] == "as it is"
    value = ok(
        xpert(
            "router", "eval", mixture, "--on", seen, "--held-out", tmp_path / "others", "--router", "by-task", "--json"
        )
    )
    assert (figures(value, "by-task")["how"], value["items"]) == ("trained on the others", 50)


def test_equal_prompts_lie_in_one_fold(mixture: Path, rows: list[Row], tmp_path: Path) -> None:
    from xpert.experts.router_learning.cross_fitting import folds_of

    found = write_seen(tmp_path / "seen", mixture, observed_rows([*rows[:40], *rows[:40]]))
    parts = folds_of(found, 4, 0)
    assert sorted(place for part in parts for place in part) == list(range(80))
    for part in parts:
        assert {place % 40 for place in part if place < 40} == {place % 40 for place in part if place >= 40}
        skills = [found.observations.requests[place].skill for place in part]
        assert all(skills.count(skill) == 4 for skill in set(skills))


def test_a_second_stage_answers_where_the_first_is_not_sure(
    xpert: Run, mixture: Path, seen: Path, rows: list[Row]
) -> None:
    """Here wrong answers are unsure ones, so that the base is asked exactly where the expert was wrong."""
    value = ok(xpert("router", "eval", mixture, "--on", seen, "--router", "by-task:second=0.5", "--json"))
    plain = ok(xpert("router", "eval", mixture, "--on", seen, "--router", "by-task", "--json"))
    cascade, one = figures(value, "by-task:second=0.5"), figures(plain, "by-task")
    scores = np.array([line["scores"] for line in observed_rows(rows)])
    own = [SUBJECTS.index(row.skill) if row.skill in SKILLS else 3 for row in rows]
    first = scores[np.arange(200), own]
    wrong = (first == 0) & (np.array(own) != 3)
    assert cascade["escalated"] == pytest.approx(wrong.mean())
    assert cascade["answers"] == pytest.approx(1 + wrong.mean())
    assert cascade["score"]["score"] == pytest.approx(np.where(wrong, scores[:, 3], first).mean())
    assert cascade["score"]["score"] > one["score"]["score"]
    assert cascade["parameters"] == pytest.approx(one["parameters"])  # the base has no adapter


def test_confidences_that_were_not_observed(mixture: Path, rows: list[Row], tmp_path: Path) -> None:
    from xpert.experts.router_learning.measures import obtained

    found = write_seen(tmp_path / "seen", mixture, observed_rows(rows[:3])).observations
    cascade = Route((("casing", 1.0),), (), "", Escalation((), 0.5))
    with pytest.raises(BadInput, match="hold no confidences"):
        obtained([cascade] * 3, replace(found, confidences=None))


def test_several_experts_count_by_the_heaviest(xpert: Run, mixture: Path, seen: Path) -> None:
    value = ok(
        xpert(
            "router",
            "eval",
            mixture,
            "--on",
            seen,
            "--router",
            "centroid:top=2,threshold=-1",
            "--router",
            "centroid:threshold=-1",
            "--json",
        )
    )
    two, one = figures(value, "centroid:top=2,threshold=-1"), figures(value, "centroid:threshold=-1")
    assert two["score"] == one["score"]
    assert two["answers"] == 2.0
    assert two["parameters"] == pytest.approx(2 * one["parameters"])


def test_what_is_printed_and_the_page(xpert: Run, mixture: Path, seen: Path, tmp_path: Path) -> None:
    """Of several routers a table, of one its curves too; the page has all."""
    ok(xpert("router", "calibrate", mixture, "--on", seen, "-o", tmp_path / "c.json", "--json"))
    page = tmp_path / "report.html"
    found = xpert("router", "eval", tmp_path / "c.json", "--on", seen, "--router", "by-task", "-o", page)
    assert found.exit_code == 0, found.output
    for words in ("as oracle", "random, mean of 3 seeds", "in 5 folds", "chances are off by", "the very ones"):
        assert words in found.stdout
    text = page.read_text()
    assert text.count("<svg") == 3  # a reliability diagram and two curves of a reject option
    assert "centroid (as mixed)" in text
    assert "quality against cost" in text
    one = xpert("router", "eval", tmp_path / "c.json", "--on", seen).stdout
    assert "mean chance" in one
    assert "accepting its surest routes only" in one
    assert "mean chance" not in found.stdout


# ── calibrate ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_calibration_sends_the_share_that_was_asked_for(xpert: Run, mixture: Path, seen: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    value = ok(xpert("router", "calibrate", mixture, "--on", seen, "--base-share", 0.5, "-o", out, "--json"))
    assert value["figures"]["base_share"] == pytest.approx(0.5, abs=0.005)
    found = ok(xpert("router", "eval", out, "--on", seen, "--json"))
    assert figures(found, "centroid (as mixed)")["to_base"] == pytest.approx(value["figures"]["base_share"])
    assert figures(found, "centroid (as mixed)")["score"]["score"] == pytest.approx(value["figures"]["score"])


def test_calibration_makes_the_chances_truer(xpert: Run, mixture: Path, seen: Path, tmp_path: Path) -> None:
    value = ok(xpert("router", "calibrate", mixture, "--on", seen, "-o", tmp_path / "c.json", "--json"))
    assert value["figures"]["ece_after"] < value["figures"]["ece_before"]
    assert value["reject_below"] is None
    assert value["figures"]["suite_fingerprint"] == "suite"


def test_a_learned_router_is_calibrated_on_prompts_left_out(
    xpert: Run, mixture: Path, seen: Path, tmp_path: Path
) -> None:
    ok(xpert("router", "train", mixture, "--on", seen, "--router", "by-task", "-o", tmp_path / "t.json", "--json"))
    value = ok(xpert("router", "calibrate", tmp_path / "t.json", "--on", seen, "-o", tmp_path / "c.json", "--json"))
    assert value["figures"]["routes"] == "in 5 folds"
    calibrated = load_mixture(tmp_path / "c.json")
    assert calibrated.router_state is not None
    assert calibrated.router_state.file == (tmp_path / "t.router.safetensors")


def test_the_chance_is_that_of_the_expert_that_answers_first(mixture_file: Callable[..., Path]) -> None:
    """Which the experts' weights in the mixture may make another than the router's first."""
    plain = load_mixture(mixture_file("centroid", top=2, threshold=-1.0, temperature=10.0))
    weighed = replace(
        plain,
        experts=tuple(replace(e, weight=1.0 if e.key == "casing" else 5.0) for e in plain.experts),
        calibration=Calibration((-1.0, 1.0), (0.0, 1.0)),
    )
    request = RouteRequest("one", (Message("user", "Write the word in capitals.\n\ntomato"),))
    (before,), (after,) = (MixtureRouter(one).route([request]) for one in (plain, weighed))
    assert before.experts[0][0] == "casing"
    first = after.experts[0][0]
    assert first != "casing"
    score = next(candidate.score for candidate in after.candidates if candidate.expert == first)
    assert after.chance == pytest.approx((score + 1) / 2)


def test_a_published_mixture_routes_as_before(
    xpert: Run, mixture: Path, seen: Path, rows: list[Row], tmp_path: Path
) -> None:
    """Experts, the router's state and the calibration travel through a registry."""
    for expert in load_mixture(mixture).experts:
        ok(xpert("registry", "publish", expert.folder, "--name", f"me/{expert.key}", "--json"))
    trained, calibrated = tmp_path / "t.json", tmp_path / "c.json"
    ok(xpert("router", "train", mixture, "--on", seen, "--router", "by-task", "-o", trained, "--json"))
    ok(xpert("router", "calibrate", trained, "--on", seen, "--base-share", 0.6, "-o", calibrated, "--json"))
    ok(xpert("registry", "publish", calibrated, "--name", "me/all", "--json"))
    ok(xpert("registry", "pull", "me/all", "-o", tmp_path / "pulled", "--json"))
    assert (tmp_path / "pulled" / "router.safetensors").is_file()
    trained.unlink()
    (tmp_path / "t.router.safetensors").rename(tmp_path / "elsewhere")

    from xpert.registry.opening import open_registry

    pulled = load_mixture("me/all")
    requests = [route_request(row) for row in rows]
    (tmp_path / "elsewhere").rename(tmp_path / "t.router.safetensors")
    before = MixtureRouter(load_mixture(calibrated)).route(requests)
    after = MixtureRouter(pulled).route(requests)
    assert after == before
    assert any(route.chance is not None for route in after)
    assert len({bool(route.experts) for route in after}) == 2
    from_file = load_mixture(tmp_path / "pulled" / "mixture.json", open_registry(None))
    assert MixtureRouter(from_file).route(requests) == before


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ("--router", "centroid", "-o", "t.json"), "router centroid learns nothing from observations. It is"),
        ("train", ("--router", "by-task", "--param", "ready=yes", "-o", "t.json"), "nothing from observations with th"),
        ("train", ("--router", "by-tusk", "-o", "t.json"), "unknown router 'by-tusk'"),
        ("train", ("--router", "by-task", "--param", "tries=3", "-o", "t.json"), "unknown parameter 'tries'"),
        ("train", ("--router", "by-task", "--param", "tries", "-o", "t.json"), "--param 'tries' is not KEY=VALUE"),
        ("train", ("--router", "by-task", "-o", "."), "is a folder; a mixture is a file"),
        ("train", ("--router", "by-task", "-o", "three.json"), "the output exists already"),
        ("train", ("--router", "by-task", "-o", "taken.json"), "taken.router.safetensors: the output exists already"),
        ("train", ("--router", "by-task", "-o", "t.json", "--folds", "300"), "200 distinct prompts are too few for"),
        ("train", ("--router", "by-task", "-o", "t.json", "--folds", "1"), "1 is not in the range x>=2"),
        ("train", ("--router", "by-task", "-o", "t.json", "--limit", "3"), "takes no options of observing"),
        ("eval", ("--router", "centroid:tops=2"), "router centroid: unknown parameter 'tops'"),
        ("eval", ("--router", "centroid:top"), "--router 'centroid:top' is not NAME:KEY=VALUE"),
        ("eval", ("--router", "by-tusk"), "unknown router 'by-tusk'"),
        ("eval", ("--held-out", "seen", "--router", "by-task"), "200 of the held-out prompts are among those"),
        ("eval", ("--held-out", "gone"), "gone"),
        ("eval", ("-o", "three.json"), "the output exists already"),
        ("calibrate", ("-o", "c.json", "--base-share", "1.5"), "base-share is 1.5; the most is 1"),
        ("calibrate", ("-o", "c.json", "--base-share", "0.5", "--best"), "give one of --base-share, --best and --min"),
        ("calibrate", ("-o", "c.json", "--knots", "1"), "knots is 1; the least is 2"),
        ("calibrate", ("-o", "three.json"), "the output exists already"),
    ],
)  # fmt: skip
def test_mistakes(
    xpert: Run,
    mixture: Path,
    seen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.router.safetensors").write_text("another's")
    found = xpert("router", command, mixture, "--on", seen, *arguments)
    assert (found.exit_code, found.stdout) == (2, "")
    assert message in found.stderr.splitlines()[-1]
    assert not (tmp_path / "t.json").exists()
    assert not (tmp_path / "c.json").exists()


def test_a_router_that_sends_all_to_the_base_cannot_be_calibrated(
    xpert: Run, mixture_file: Callable[..., Path], rows: list[Row], tmp_path: Path
) -> None:
    mixture = mixture_file("centroid", threshold=1.0)
    write_seen(tmp_path / "seen", mixture, observed_rows(rows))
    found = xpert("router", "calibrate", mixture, "--on", tmp_path / "seen", "-o", tmp_path / "c.json")
    assert found.exit_code == 2
    assert "of 200 prompts to an expert" in found.stderr


def test_an_untrained_mixture_cannot_route(mixture: Path, seen: Path, xpert: Run, tmp_path: Path) -> None:
    """But it can be measured, in folds: those train it."""
    loaded: Mixture = replace(load_mixture(mixture), router="by-task", router_params={})
    write_mixture(tmp_path / "u.json", loaded)
    with pytest.raises(BadInput, match="has to be trained for this mixture first"):
        MixtureRouter(loaded)
    value = ok(xpert("router", "eval", tmp_path / "u.json", "--on", seen, "--json"))
    assert figures(value, "by-task")["how"] == "in 5 folds"
    found = xpert("router", "calibrate", tmp_path / "u.json", "--on", seen, "-o", tmp_path / "c.json")
    assert found.exit_code == 2 and not (tmp_path / "c.json").exists()
    assert found.stderr.endswith("Run: xpert router train MIXTURE --on SUITE --router by-task -o FILE\n")


def test_a_calibrated_cascade_keeps_what_its_second_stage_brings(
    xpert: Run, mixture: Path, seen: Path, tmp_path: Path
) -> None:
    """What the bound leaves to it is answered as before, and the figures are those of the mixture as it answers."""
    cascade = replace(load_mixture(mixture), router="cascade", router_params={"weak": "casing", "threshold": 0.65})
    write_mixture(tmp_path / "u.json", cascade)
    before = ok(xpert("router", "eval", tmp_path / "u.json", "--on", seen, "--json"))
    share = ("--base-share", 0.3, "-o", tmp_path / "c.json", "--json")
    value = ok(xpert("router", "calibrate", tmp_path / "u.json", "--on", seen, *share))
    after = ok(xpert("router", "eval", tmp_path / "c.json", "--on", seen, "--json"))
    assert figures(before, "cascade")["escalated"] > 0.2
    for found, name in ((before, "score_before"), (after, "score")):
        told = figures(found, "cascade")["score"]["score"]
        assert value["figures"][name] == pytest.approx(told)
