"""`xpert demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xpert.commands.options import Session, common_options

if TYPE_CHECKING:
    from xpert.experts.demo.chain import DemoResult

__all__ = ["command"]


@click.command("demo")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("xpert-demo"), show_default=True, help="Folder."
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most N held-out items a skill.")
@common_options
def command(session: Session, out: Path, limit: int | None) -> None:
    """Run the whole chain on real data and a real model: select, train, profile, publish, mix, route, answer.

    Three skills, eight examples each, SmolLM2-135M-Instruct on the CPU; model and data come from installed Python
    packages. Stopped, the same command goes on where it was.
    """
    from xpert.experts.demo.chain import run_demo

    result = run_demo(out, limit=limit, device=session.device, seed=session.seed, progress=session.progress)
    session.result(result.to_dict(), _summary(result))


def _summary(result: DemoResult) -> str:
    from xpert.commands.evaluation import choice_line, score_table
    from xpert.progress import duration

    lines = ["", "Selected rows by their skill (the selector has not seen it):"]
    for skill, counts in result.selected.items():
        total = sum(counts.values())
        lines.append(f"  {skill:<18} {counts.get(skill, 0)} of {total} rows carry the shots' skill")
    lines += ["", "Some answers, routed and answered in one batch:"]
    lines += [line for answer in result.answers for line in _answer(answer)]
    items = len(result.scores.items)
    lines += ["", f"Scores on {items} held-out questions, exact match in hundredths with 95 % intervals:", ""]
    lines += [score_table(result.scores), ""]
    lines += [choice_line(result.scores), ""]
    spent = ", ".join(f"{step} {duration(seconds)}" for step, seconds in result.seconds.items())
    lines += [f"Times: {spent}; in all {duration(sum(result.seconds.values()))}.", "Reports:"]
    lines += [f"  {path}" for path in result.reports]
    mixture = result.folder / "mixture.json"
    return "\n".join([*lines, f"Serve it: xpert serve {mixture} --port 8000"])


def _answer(answer: dict[str, Any]) -> list[str]:
    prompt = " / ".join(answer["prompt"].split("\n\n"))
    who = ", ".join(expert["expert"] for expert in answer["experts"]) or "the base model"
    return [
        f"  {prompt if len(prompt) <= 100 else prompt[:99] + '…'}",
        f"    {who}: {answer['output']}   (right: {answer['wanted']})",
        f"    because {answer['reason']}",
    ]
