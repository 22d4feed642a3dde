"""What a profile writes: pages that hold any answer, and a card that tells the truth about the files beside it."""

from __future__ import annotations

from pathlib import Path

from xpert.experts.evaluate import Evaluation, ItemResult
from xpert.experts.profiles import as_profile, write_profile
from xpert.experts.score_report import write_score_report
from xpert.records import Message, Row, SuiteItem
from xpert.registry.card import BaseModel, ExpertCard
from xpert.storage import hash_file

ITEM = SuiteItem(Row("i", (Message("user", "q"),), "a"), ("a",), "exact", "s")


def evaluation(output: str) -> Evaluation:
    result = ItemResult("i", "s", output, 0.0, None, ())
    return Evaluation([ITEM], {"base": [result], "expert": [result]})


def test_a_page_holds_any_answer_as_text(tmp_path: Path) -> None:
    write_score_report(tmp_path / "page.html", evaluation("x\0\x1b\ud800\ty"), title="t", lead="l")
    page = (tmp_path / "page.html").read_bytes().decode("utf-8")
    assert "x\ufffd\ufffd\ufffd\ty" in page


def test_the_hashes_in_the_card_follow_what_a_profile_writes(tmp_path: Path) -> None:
    figures = dict.fromkeys(("rows", "shots", "steps", "tokens", "supervised_tokens", "first_loss", "final_loss"), 1)
    old = {"README.md": "0" * 64, "adapter_model.safetensors": "1" * 64}
    adapter = {"rank": 4, "alpha": 8}
    ExpertCard(BaseModel("b", "f"), adapter, name="e", training={"figures": figures}, files=old).write(tmp_path)
    found = evaluation("z")
    write_profile(tmp_path, as_profile(found, "expert", "base", suite="s", suite_fingerprint="p"), found, on_hub=False)
    card = ExpertCard.read(tmp_path)
    assert card.profile is not None
    written = {name: hash_file(tmp_path / name) for name in ("README.md", "report.html")}
    assert card.files == {"adapter_model.safetensors": "1" * 64, **written}
