"""What strangers wrote neither steers a terminal, nor scripts a page, nor runs."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from xpert.printable import printable

ROOT = Path(__file__).resolve().parents[3]
Maker = Callable[..., Path]
Run = Callable[..., Result]


# ── terminals ────────────────────────────────────────────────────────────────────────────────────────────────────

NASTY = "nice\x1b[2J\x1b]0;owned\x07\x9b31m\r\nacme/forged  9  expert\u202e\u2028 end"


def steering(text: str) -> set[str]:
    return {c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2028")}


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_steers_the_terminal(as_json: bool, xpert: Run, expert: Maker) -> None:
    folder = expert(description=NASTY, skills=(NASTY,), scores={NASTY: 0.5}, base=NASTY)
    made = xpert("registry", "publish", folder, "--name", "acme/a")
    assert made.exit_code == 0, made.stderr
    for command in (["list"], ["show", "acme/a"], ["search", "nice"], ["search", "--min-score", "0.1"]):
        result = xpert("registry", *command, *(["--json"] if as_json else []))
        assert result.exit_code == 0, result.stderr
        assert "nice" in result.stdout and not steering(result.stdout + result.stderr)
        assert not any(line.startswith("acme/forged") for line in result.stdout.splitlines())
        if as_json:
            assert NASTY in str_values(json.loads(result.stdout))


def str_values(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {found for key, inner in value.items() for found in {key, *str_values(inner)}}
    if isinstance(value, list):
        return {found for inner in value for found in str_values(inner)}
    return {value} if isinstance(value, str) else set()


def test_errors_and_messages_do_not_either(xpert: Run, expert: Maker) -> None:
    folder = expert()
    (folder / ".hidden\x1b[2J").write_text("x")
    made = xpert("registry", "publish", folder, "--name", "acme/a")
    assert made.exit_code == 0 and "left out: .hidden\\u001b[2J" in made.stderr and not steering(made.stderr)
    refused = xpert("registry", "show", "acme/\x1b[2J")
    assert refused.exit_code == 2 and not steering(refused.stderr)
    (folder / "a\x9b2J.md").write_text("x")
    refused = xpert("registry", "publish", folder, "--name", "acme/a")
    assert refused.exit_code == 2 and not steering(refused.stderr)


@given(st.text())
def test_printable(text: str) -> None:
    shown = printable(text)
    assert not steering(shown) and "\n" not in shown
    shown.encode()
    assert printable(shown) == shown
    assert printable(text, keep="\n").count("\n") == text.count("\n")


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`{{7*7}}"


def test_nothing_scripts_the_page(xpert: Run, expert: Maker, tmp_path: Path) -> None:
    """Every text of a card that can be shown: in a page it is text."""
    folder = expert(description=SCRIPT, skills=(SCRIPT,), scores={SCRIPT: 0.5}, base=SCRIPT)
    card = json.loads((folder / "expert.json").read_text())
    card["profile"]["suite"] = SCRIPT
    card |= {"name": SCRIPT, "licences": {SCRIPT: 1}}
    card |= {"selection": {"method": SCRIPT, SCRIPT: SCRIPT}, "training": {"options": {SCRIPT: SCRIPT}, SCRIPT: SCRIPT}}
    (folder / "expert.json").write_text(json.dumps(card))
    published = xpert("registry", "publish", folder, "--name", "acme/a")
    assert published.exit_code == 0, published.stderr
    made = xpert("registry", "site", "-o", tmp_path / "site")
    assert made.exit_code == 0, made.stderr
    written = [path for path in sorted((tmp_path / "site").rglob("*")) if path.suffix in (".html", ".json", ".js")]
    pages = [path.read_text(encoding="utf-8") for path in written]
    assert any("alert(1)" in page for page in pages)  # it is shown
    for page in pages:
        assert "<script>alert" not in page and "<img src=x" not in page


# ── code of others ───────────────────────────────────────────────────────────────────────────────────────────────

FOLDERS = ("toolkit", "commands", "selectors", "experts", "registry", "examples", "benchmarks")


@functools.cache
def nodes() -> list[tuple[Path, ast.Call | ast.Dict]]:
    """All calls and mappings of the code."""
    return [
        (path, node)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Dict)
    ]


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_code_that_comes_with_a_model_is_never_run() -> None:
    """`trust_remote_code` stands nowhere but as False, in calls and in mappings of settings."""
    wrong, seen = [], 0
    for path, node in nodes():
        if isinstance(node, ast.Call):
            given = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        else:
            pairs = zip(node.keys, node.values, strict=True)
            given = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "trust_remote_code"]
        seen += len(given)
        wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for value in given if not is_constant(value, False)]
    assert not wrong and seen >= 4


def test_nothing_unpickles() -> None:
    """No call loads a pickle; torch.load only with weights_only=True, numpy.load never with allow_pickle."""
    wrong = []
    for path, node in nodes():
        if isinstance(node, ast.Dict):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        pickled = keywords.get("allow_pickle")
        safe = is_constant(keywords.get("weights_only"), True)
        if (
            name
            in {"pickle.load", "pickle.loads", "joblib.load", "dill.load", "dill.loads", "eval", "exec", "os.system"}
            or (name == "torch.load" and not safe)
            or (pickled is not None and not is_constant(pickled, False))
            or (name in {"yaml.load", "yaml.unsafe_load"} and not _safe_loaders(path))
        ):
            wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not wrong


def _safe_loaders(path: Path) -> bool:
    """Whether all loaders of YAML that a file names are safe ones."""
    found = set(re.findall(r"\b\w*Loader\b", path.read_text(encoding="utf-8"))) - {"Loader"}
    return bool(found) and all("Safe" in name for name in found)


def test_registry_shells_out_to_nothing() -> None:
    assert not [
        path.name
        for path in sorted((ROOT / "registry").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and "subprocess" in ast.unparse(node)
    ]
