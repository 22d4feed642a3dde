"""Pilots of an expert: prompts that it has served well, kept with its exemplars, so that routers reach further."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from xpert.errors import BadInput, unknown
from xpert.experts.mixture import open_expert
from xpert.overlap import same_text_key
from xpert.registry.card import EXEMPLARS_FILE, ExpertCard
from xpert.row_files import read_prompts
from xpert.storage import hash_file, write_file

__all__ = ["MOST_PILOTS", "add_pilots"]

MOST_PILOTS = 64
"""As many as an expert has exemplars of its training, at most: routers are not to follow the traffic alone."""


def add_pilots(folder: Path, source: Path) -> int:
    """Appends the prompts of a file to the exemplars of the expert in `folder`, and gives how many were new.

    Each becomes a line of kind "pilot" with its skill; those that stand there already, but for case, spaces and
    punctuation at the ends, are passed over. The card's hash of the file follows. Raises BadInput for an expert without
    exemplars, a skill that the expert has not, and more than 64 pilots in all.
    """
    card = ExpertCard.read(folder)
    expert = open_expert(folder).routable()
    if not expert.exemplars:
        raise BadInput(
            "the expert has no exemplars that pilots could go with", where=str(folder), hint="train it first"
        )
    path = folder / EXEMPLARS_FILE
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    known = {same_text_key(line["prompt"]) for line in lines}
    new = []
    for row in read_prompts(source):
        if row.skill is not None and expert.skills and row.skill not in expert.skills:
            raise unknown(f"skill of pilot {row.id},", row.skill, expert.skills, where=str(source))
        key = same_text_key(row.prompt)
        if key and key not in known:
            known.add(key)
            new.append({"prompt": row.prompt, "skill": row.skill, "kind": "pilot"})
    there = sum(line.get("kind") == "pilot" for line in lines)
    if there + len(new) > MOST_PILOTS:
        also = f" beside the {there} it has" if there else ""
        raise BadInput(
            f"{len(new)} pilots{also} are more than the {MOST_PILOTS} that an expert may have",
            where=str(source),
            hint="keep the best of them",
        )
    if new:
        added = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
        write_file(path, text + ("" if text.endswith("\n") else "\n") + added)
        dataclasses.replace(card, files={**card.files, EXEMPLARS_FILE: hash_file(path)}).write(folder)
    return len(new)
