"""A bandit from the command line: page and `--explain` show pulls, rewards and the share of the pool scored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result


@pytest.mark.parametrize("method", ["quad", "clusterucb"])
def test_pulls_are_shown(
    method: str, xpert: Callable[..., Result], write_jsonl: Callable[..., Path], columns: Any, tmp_path: Path
) -> None:
    pool, shots = write_jsonl("pool.jsonl", columns(200)), write_jsonl("shots.jsonl", columns(5, seed=9)[:3])
    done = xpert(
        "select", pool, "--shots", shots, "--method", method, "--budget", 30, "--clusters", 5, "-o", tmp_path / "out",
        "--param", "reward=similarity", "--param", "evaluate=40", "--explain", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    log = json.loads(done.stdout)["log"]
    assert log[-1]["step"] == "evaluations"
    assert log[-1]["scored"] == 40
    pulled = {entry["arm"]: entry["pulls"] for entry in log if entry["step"] == "arm"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    section = page[page.index("What was pulled") :]
    section = section[: section.index("</section>")]
    assert "40 rows were scored" in section
    assert f"in {sum(pulled.values())} pulls" in section
    rows = re.findall(r"<tr><td>.*?</tr>", section, re.S)
    assert len(rows) == len(pulled)
    shown = [int(re.findall(r'<td class="n">([\d,]+)</td>', row)[2]) for row in rows]
    assert shown == sorted(pulled.values(), reverse=True)
    assert "Just missed" in page


def test_other_methods_have_no_such_part(
    xpert: Callable[..., Result], write_jsonl: Callable[..., Path], columns: Any, tmp_path: Path
) -> None:
    pool = write_jsonl("pool.jsonl", columns(60))
    assert xpert("select", pool, "--method", "random", "--budget", 5, "-o", tmp_path / "out").exit_code == 0
    assert "What was pulled" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
