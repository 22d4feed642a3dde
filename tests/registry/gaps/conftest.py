"""A log with planted tasks: knitting and chess, which no expert fits, and casing, which one serves."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from xpert.experts.mixture import assemble, open_expert
from xpert.experts.mixture_file import write_mixture
from xpert.experts.server.request_log import RequestRecord
from xpert.protocols import Candidate
from xpert.records import Message
from xpert.registry.card import EXEMPLARS_FILE, ExpertCard
from xpert.storage import hash_file

NOON = 1_764_504_000.0

WORDS = {
    "knitting": "yarn needles scarf wool stitches gauge cable sock lace ribbing skein mohair jumper shawl purl crochet",
    "chess": "chess knight bishop rook queen pawn castling checkmate gambit opening endgame fork pin stalemate tempo",
    "casing": "capitals uppercase lowercase letters shout headline acronym initials caps big small alphabet typing",
}
INSTRUCTIONS = {
    "knitting": "Give me the rows to knit this with {0} and {1}, by {2}.",
    "chess": "Which move is strongest here for white: {0}, {1} or the {2}?",
    "casing": "Write every word in big letters - {0} {1} {2}",
}


def prompts(task: str, count: int) -> list[str]:
    """`count` different prompts of a task: its instruction, with words of its own."""
    draw = random.Random(task)
    every = sorted({tuple(draw.sample(WORDS[task].split(), 3)) for _ in range(4 * count)})
    return [INSTRUCTIONS[task].format(*words) for words in draw.sample(every, count)]


def task_of(text: str) -> str:
    found = re.findall("[a-z]+", text.lower())
    return max(WORDS, key=lambda task: sum(word in WORDS[task].split() for word in found))


@pytest.fixture
def planted() -> Callable[..., list[RequestRecord]]:
    """30 knitting and 12 chess prompts that fell back, 40 of casing that an expert served with a high chance."""

    def make(
        *, knitting: int = 30, chess: int = 12, casing: int = 40, seed: int = 0, **given: Any
    ) -> list[RequestRecord]:
        texts = [
            (task, text) for task, count in (("knitting", knitting), ("chess", chess)) for text in prompts(task, count)
        ]
        texts += [("casing", text) for text in prompts("casing", casing)]
        random.Random(seed).shuffle(texts)
        records = []
        for number, (task, text) in enumerate(texts):
            served = task == "casing"
            plain: dict[str, Any] = {
                "id": f"chatcmpl-{number:05d}",
                "time": NOON + 3600 * number,
                "mixture": "three",
                "fingerprint": "one",
                "model": "three",
                "messages": (Message("user", text),),
                "experts": (("casing", 1.0),) if served else (),
                "candidates": (Candidate("casing", 0.9 if served else 0.2), Candidate("reversal", 0.1)),
                "chance": 0.95 if served else None,
                "fell_back": not served,
                "prompt_tokens": 10,
                "completion_tokens": 5,
            }
            records.append(RequestRecord(**(plain | given)))
        return records

    return make


@pytest.fixture
def tasks_of() -> Callable[[Iterable[str]], Counter[str]]:
    """How many of some prompts are of each task."""
    return lambda texts: Counter(map(task_of, texts))


@pytest.fixture
def write_log(tmp_path: Path) -> Callable[..., Path]:
    def write(records: Sequence[RequestRecord], name: str = "requests.jsonl") -> Path:
        folder = tmp_path / "log"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(record.to_dict()) + "\n" for record in records]
        (folder / name).write_text("".join(lines), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def mixture_file(expert: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A mixture of experts for casing and reversal, whose exemplars share little with the log's prompts."""

    def make(name: str = "three") -> Path:
        forms = {"casing": "Write the word {0} in capitals.", "reversal": "Spell the word {0} backwards."}
        members = []
        for seed, (skill, form) in enumerate(forms.items()):
            folder = expert(skill, seed=seed, skills=(skill,))
            words = ("tree", "house", "river", "stone", "cloud", "meadow", "bridge", "lantern")
            lines = [{"prompt": form.format(word), "skill": skill, "kind": "shot"} for word in words]
            (folder / EXEMPLARS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
            card = ExpertCard.read(folder)
            files = {**card.files, EXEMPLARS_FILE: hash_file(folder / EXEMPLARS_FILE)}
            dataclasses.replace(card, files=files).write(folder)
            members.append(open_expert(folder))
        path = tmp_path / f"{name}.json"
        write_mixture(path, assemble(members, router="centroid", name=name))
        return path

    return make
