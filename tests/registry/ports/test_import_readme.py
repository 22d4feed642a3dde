"""What is read out of a stranger's model card."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.experts.adapter_readme import AdapterReadme, read_readme

CARDS: dict[str, tuple[str, AdapterReadme]] = {
    "empty": ("", AdapterReadme()),
    "prose alone": ("# Title\n\n![badge](x)\n\nIt finds\ndates.\n\nMore.", AdapterReadme("It finds dates.")),
    "front matter": (
        "---\nlicense: apache-2.0\ndescription: Said here.\nskills: [a, b, a]\n---\nSaid there.",
        AdapterReadme("Said here.", "apache-2.0", ("a", "b")),
    ),
    "a licence of its own": ("---\nlicense: other\nlicense_name: gemma\n---\n", AdapterReadme(licence="gemma")),
    "unfilled": (
        "---\nlicense: mit\n---\n# Model\n\n<!-- Provide a quick summary. -->\n\n[More Information Needed]\n\n"
        "Provide a longer summary of what this model is.\n",
        AdapterReadme(licence="mit"),
    ),
    "code and lists": ("```\nprint(1)\n\nprint(2)\n```\n\n- a list\n\n| a | b |\n\nWords.", AdapterReadme("Words.")),
    "not YAML": ("---\na: [b\n---\nWords.", AdapterReadme("Words.")),
    "aliases": ("---\na: &a [x]\nb: [*a, *a]\nlicense: mit\n---\nWords.", AdapterReadme("Words.")),
    "other types": ("---\nlicense: [mit]\ndescription: {a: 1}\nskills: 3\n---\nWords.", AdapterReadme("Words.")),
    "no mapping": ("---\n- a\n---\nWords.", AdapterReadme("Words.")),
    "never closed": ("---\nlicense: mit\n\nWords.", AdapterReadme("Words.")),
}


@pytest.mark.parametrize("case", CARDS)
def test_what_a_card_says(case: str, tmp_path: Path) -> None:
    text, expected = CARDS[case]
    (tmp_path / "README.md").write_text(text)
    assert read_readme(tmp_path / "README.md") == expected


def test_the_template_that_peft_leaves_says_nothing(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    ModelCard.from_template(ModelCardData(license="mit")).save(tmp_path / "README.md")
    assert "Use the code below" in (tmp_path / "README.md").read_text()
    assert read_readme(tmp_path / "README.md") == AdapterReadme(licence="mit")


def test_without_a_card_nothing_is_said() -> None:
    assert read_readme(None) == AdapterReadme()


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a" * ((1 << 20) + 1)])
def test_what_is_no_small_text_is_not_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(data)
    assert read_readme(tmp_path / "README.md") == AdapterReadme()


@settings(max_examples=100, deadline=None)
@given(head=st.text(max_size=80), body=st.text(max_size=700))
def test_any_card_is_read_into_short_lines(tmp_path_factory: pytest.TempPathFactory, head: str, body: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any-card.md"
    path.write_bytes(f"---\n{head}\n---\n{body}".encode(errors="replace"))
    found = read_readme(path)
    for text in (found.description, found.licence, *found.skills):
        assert len(text) <= 500
        assert text == " ".join(text.split())
