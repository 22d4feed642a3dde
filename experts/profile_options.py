"""What stands in a profile beside the declared skills, and how it is found."""

from __future__ import annotations

from dataclasses import dataclass

from xpert.config import Config, option
from xpert.errors import BadInput

__all__ = ["ProfileOptions"]


@dataclass(frozen=True)
class ProfileOptions(Config):
    """How the items of a suite are grouped."""

    clusters: str = option(
        "auto",
        "scores per cluster: of the suite's prompts (a number, or auto), of a folder made by `xpert cluster`, or none",
    )
    keywords: str = option(
        "none",
        "scores per keyword: of a language model's naming, of telling terms, or none",
        choices=("model", "terms", "none"),
    )
    keyword_model: str | None = option(
        None, "who names keywords: a folder, hub name, .gguf or http://HOST:PORT/v1#MODEL  [default: the base]"
    )
    keyword_min: int = option(5, "leave out keywords of fewer items", minimum=1)
    probes: str = option(
        "field",
        "which items ask for one thing: those with one `probe` in the suite (field); where it names none, near ones of "
        "a skill (auto)",
        choices=("auto", "field", "none"),
    )
    probe_threshold: float = option(
        0.9, "cosine from which an item is near the first of its probe", minimum=0, maximum=1
    )
    embedder: str = option("lsa", "what finds clusters and near items: lsa, minilm, st:FOLDER or st:NAME, lm")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keyword_model is not None and self.keywords != "model":
            raise BadInput(
                "keyword-model is given, but no model is asked for keywords",
                hint="add --keywords model, or leave it out",
            )
