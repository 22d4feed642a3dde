"""Experts for the pages, made without a registry; and a headless Chromium.

The browser is driven over a pipe by its DevTools protocol, so that no driver package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xpert.registry.card import BaseModel, ExpertCard, Interval, SkillProfile, SkillScore
from xpert.registry.site.data import Catalogue, Member, MixtureFacts, ShownVersion, catalogue
from xpert.registry.versions import StoredFile, Version

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One page of a headless Chromium. What the page logs, throws or is refused (CSP) gathers in `complaints`."""

    def __init__(self, program: str, profile: Path) -> None:
        to_child, self._commands = os.pipe()
        self._answers, from_child = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&"$READ" 4>&"$WRITE"', "bash", program, *flags, f"--user-data-dir={profile}"],
            env={**os.environ, "READ": str(to_child), "WRITE": str(from_child), "HOME": str(profile)},
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._rest, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        self._loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.size(1280, 900)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer.get("result", {})  # type: ignore[no-any-return]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._answers, 1 << 16)
            assert data, "Chromium ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        return answer

    def open(self, url: str) -> None:
        """Loads the page and waits until its scripts have run."""
        for address in ("about:blank", url):  # from one address to itself with another hash nothing would be loaded
            self.complaints.clear()
            self._loaded = False
            self.ask("Page.navigate", url=address)
            while not self._loaded:
                self._read()

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def key(self, name: str) -> None:
        codes = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Escape": 27, "Enter": 13}
        text = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            press = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
            self.ask("Input.dispatchKeyEvent", type=kind, **press, **(text if kind == "keyDown" else {}))

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def size(self, width: int, height: int) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def shot(self, path: Path, *, whole: bool = False) -> Path:
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(data["data"]))
        return path

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        box = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._commands)
        os.close(self._answers)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for the whole run; the tests that ask for one are skipped where there is no Chromium."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.size(1280, 900)
    chromium.dark(False)
    return chromium


def interval(score: float, n: int = 40, width: float = 0.05) -> Interval:
    return Interval(score, max(0.0, score - width), min(1.0, score + width), n)


def shown(
    name: str,
    number: int = 1,
    *,
    scores: dict[str, float] | None = None,
    description: str = "",
    suite: str = "suite",
    metric: str = "exact",
    base: str = "tiny",
    tags: tuple[str, ...] = (),
    card: dict[str, Any] | None = None,
) -> ShownVersion:
    """An expert's version as the pages take it; every base score is 0.2."""
    made = {skill: SkillScore(metric, interval(score), interval(0.2)) for skill, score in (scores or {}).items()}
    settings: dict[str, Any] = {
        "base": BaseModel(base, f"{base}-fingerprint"),
        "adapter": {"rank": 4, "alpha": 8},
        "name": name,
        "description": description,
        "skills": tuple(made),
        "profile": SkillProfile(suite, f"{suite}-fingerprint", made) if made else None,
        "licences": {"MIT": 3},
    }
    document = ExpertCard(**settings | (card or {}))
    version = Version(
        *(
            name,
            number,
            "expert",
            f"{number:064x}",
            f"2026-01-{number:02d}T00:00:00Z",
            1234,
            base,
            f"{base}-fingerprint",
        ),
        description=description,
        skills=document.skills,
    )
    return ShownVersion(version, tags, (StoredFile("expert.json", 12, "a" * 64),), document)


def mixed(name: str, refs: tuple[str, ...], gate: str = "") -> ShownVersion:
    """A mixture's version as the pages take it."""
    version = Version(name, 1, "mixture", "e" * 64, "2026-02-01T00:00:00Z", 99, "tiny", "tiny-fingerprint", uses=refs)
    members = tuple(Member(ref.partition("@")[0], ref, 1.0) for ref in refs)
    return ShownVersion(version, mixture=MixtureFacts(members, "centroid", {"reject": 0.2}, gate))


@pytest.fixture
def make_shown() -> Callable[..., ShownVersion]:
    return shown


@pytest.fixture
def make_mixed() -> Callable[..., ShownVersion]:
    return mixed


@pytest.fixture
def sample() -> Catalogue:
    """Three experts, one with two versions, one without a profile, and a mixture of two."""
    return catalogue(
        [
            shown("acme/dates", 1, scores={"dates": 0.5, "sums": 0.2}),
            shown("acme/dates", 2, scores={"dates": 0.9, "sums": 0.25}, tags=("latest", "stable")),
            shown("acme/sums", 1, scores={"sums": 0.7}, description="adds numbers"),
            shown("north/new", 1, base="other"),
            mixed("acme/both", ("acme/dates@2", "acme/sums@1"), gate="arrow"),
        ],
        title="Our experts",
    )
