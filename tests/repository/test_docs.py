"""The documents tell the truth: every command and plug-in stands in them, and their Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert import plugins
from xpert.commands.main import COMMANDS
from xpert.experts.metrics import METRICS
from xpert.row_files import METRICS as SUITE_METRICS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


GROUPS = ("aggregator", "keys", "pool", "registry", "router", "shots")


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    heads = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert not path or (page.parent / path).exists(), target
        assert path or anchor in heads, target


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stands_in_the_readme(command: str) -> None:
    assert f"`xpert {command}" in README


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_plug_in_stands_in_the_readme(kind: str) -> None:
    for name in plugins.names(kind):
        assert re.search(rf"`{re.escape(name)}[`:]", README), f"{kind} {name} is missing from README.md"


def test_every_metric_can_be_named_in_a_suite() -> None:
    assert set(SUITE_METRICS) == {*METRICS, "exec"}


def test_commands_of_the_readme_exist_with_their_options(xpert: Callable[..., Result]) -> None:
    for line in "\n".join(snippets(README, "bash")).splitlines():
        words = line.split("#")[0].split()
        if not words or words[0] != "xpert":
            continue
        command = words[1:3] if words[1] in GROUPS else words[1:2]
        result = xpert(*command, "--help")
        assert result.exit_code == 0, line
        for flag in (word for word in words if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", result.output), f"{line}: {flag}"


def test_the_python_of_the_readme_runs(
    tmp_path: Path, columns: Callable[..., list[dict[str, Any]]], write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl("pool.jsonl", columns(100))
    write_jsonl("shots.jsonl", columns(5, seed=9, skills=("arithmetic",)))
    for code in snippets(README, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "chosen-20" / "report.html").is_file()


def test_the_selector_of_contributing_selects(rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import numpy as np

    from xpert.data import pool_from_rows
    from xpert.features import FeatureOptions, Features
    from xpert.records import Budget

    (tmp_path / "longest.py").write_text(snippets(CONTRIBUTING, "python")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    plugin = importlib.import_module("longest").PLUGIN
    features = Features(pool_from_rows(rows), FeatureOptions())
    found = plugin(plugin.Options()).select(features, None, Budget.parse("10"), np.random.default_rng(0))
    assert len(found.rows) == 10
    assert found.scores.tolist() == sorted(features.lengths().tolist(), reverse=True)[:10]


def test_the_repository_speaks_of_itself_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
        assert not re.search(r"/home/\w+/|pypi\.org|huggingface\.co/api", text), name
