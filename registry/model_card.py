"""The model card of an expert: `README.md` with the metadata that the Hugging Face Hub reads.

Everything a card says is text of strangers: in the page it is escaped, so that it can neither make markup nor break a
table, and in the metadata it is one line. A path of the machine where the expert was made is shown by its last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from xpert.registry.card import ExpertCard, Interval, SkillScore
from xpert.registry.hub_licences import UNKNOWN, hub_licence

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

__all__ = ["model_card", "model_card_data"]

TASK = "text-generation"
_HUB_METRICS = {
    "exact": "exact_match",
    "choice": "accuracy",
    "number": "accuracy",
    "rougeL": "rouge",
    "f1": "f1",
    "chrf": "chrf",
}
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_ON_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def model_card(card: ExpertCard, *, on_hub: bool) -> str:
    """The whole text. `on_hub` tells that the base's reference is a name on the Hub and not a path."""
    base = _base_name(card, on_hub)
    sections = [
        f"# {_text(card.name) or 'expert'}",
        _paragraph(card.description),
        _purpose(card, base),
        _use(card, base),
        f"## Where it came from\n\n{_rows(_provenance(card, base))}",
        _scores(card),
        _licences(card),
        f"## What it cost\n\n{_rows(_cost(card))}",
        f"## Limits\n\n{_list(_limits(card))}",
        "`expert.json` is the card in full; `report.html` shows the course of its training and its answers.",
    ]
    head = model_card_data(card, on_hub=on_hub).to_yaml(line_break="\n")
    return f"---\n{head}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────


def model_card_data(card: ExpertCard, *, on_hub: bool) -> ModelCardData:
    """The metadata block, https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    from huggingface_hub import ModelCardData

    extra: dict[str, Any] = dict(hub_licence(card.licences) or hub_licence({_licence_of_its_own(card): 1}))
    tags = ["lora", "peft", "xpert"]
    if on_hub and _ON_HUB.fullmatch(_base_name(card, on_hub)):  # a path means nothing to the Hub
        extra["base_model"] = _base_name(card, on_hub)
        extra["base_model_relation"] = "adapter"
        tags.insert(0, f"base_model:adapter:{extra['base_model']}")
    languages = [code for code in _mapping(card.selection.get("languages")) if _LANGUAGE.fullmatch(code)]
    listed = card.selection.get("datasets")
    datasets = [name for name in listed or () if isinstance(name, str) and _ON_HUB.fullmatch(name)]
    results = list(_results(card))
    return ModelCardData(
        language=languages or None,
        library_name="peft",
        pipeline_tag=TASK,
        tags=tags,
        datasets=datasets or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=_line(card.name) or "expert" if results else None,
        eval_results=results or None,
        **extra,
    )


def _results(card: ExpertCard) -> Iterator[EvalResult]:
    """Per skill the expert's score and, under a name that says so, the base model's."""
    from huggingface_hub import EvalResult

    if card.profile is None:
        return
    suite = _local_name(card.profile.suite) or "suite"
    for skill, score in card.profile.skills.items():
        kinds = [(_HUB_METRICS.get(score.metric, _line(score.metric)), _line(score.metric), score.expert, score.base)]
        if score.expert_choice and score.base_choice:
            kinds.append(("accuracy", "accuracy by likelihood of choices", score.expert_choice, score.base_choice))
        for metric, told, own, base in kinds:
            for name, interval in ((told, own), (f"{told} of the base model alone", base)):
                yield EvalResult(
                    task_type=TASK,
                    task_name=_line(skill),
                    dataset_type=re.sub(r"[^A-Za-z0-9._-]+", "-", suite).strip("-.") or "suite",
                    dataset_name=f"{suite} ({_line(skill)})",
                    dataset_config=_line(skill),
                    dataset_args={"fingerprint": _line(card.profile.suite_fingerprint)},
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(interval.score, 6),
                    metric_args={
                        "items": interval.n,
                        "interval_95": [round(interval.low, 6), round(interval.high, 6)],
                    },
                )


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _purpose(card: ExpertCard, base: str) -> str:
    skills = ", ".join(_text(skill) for skill in card.skills)
    meant = f"It is meant for {skills}." if skills else "Its makers have not stated what it is meant for."
    return (
        f"## What it is for\n\nA LoRA adapter of {_text(base)}. {meant} For other prompts the base model alone may do "
        "better: use it where its skills are asked for, or behind a router."
    )


def _use(card: ExpertCard, base: str) -> str:
    name = json.dumps(_line(base), ensure_ascii=False)
    return (
        "## How to load it\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        f"model = AutoModelForCausalLM.from_pretrained({name})\n"
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")  # or the name of its repository\n```\n\n'
        + _form(card)
    )


def _form(card: ExpertCard) -> str:
    if _mapping(card.training.get("imported")):
        return "It was made elsewhere: its maker knows in which form prompts are to be put to it."
    return "It has learned answers in the base model's own chat template."


def _licence_of_its_own(card: ExpertCard) -> str:
    """Of an imported adapter, the licence that its maker states; empty for others."""
    stated = _mapping(card.training.get("imported")).get("licence")
    return _line(stated) if isinstance(stated, str) else ""


def _provenance(card: ExpertCard, base: str) -> Iterator[tuple[str, str]]:
    yield "base model", f"{_text(base)} ({_code(card.base.fingerprint[:12])})"
    training, selection = card.training, card.selection
    if isinstance(training.get("method"), str):
        yield "made by", _text(training["method"])
    commit = _mapping(training.get("imported")).get("sha")
    if isinstance(commit, str):
        yield "commit", _code(commit)
    yield from _merged_of(training)
    yield from _selected(selection)
    figures = _mapping(training.get("figures"))
    if _number(figures.get("rows")):
        shots = figures.get("shots")
        yield "rows trained on", _number(figures["rows"]) + (f", of them {_number(shots)} shots" if shots else "")
    if _number(figures.get("steps")):
        yield "steps", _number(figures["steps"])
    if _number(figures.get("first_loss")) and _number(figures.get("final_loss")):
        yield "loss", f"{figures['first_loss']:.3f} at first, {figures['final_loss']:.3f} at last"
    if _number(figures.get("validation_loss")) and _number(figures.get("validation_loss_before")):
        before, after = figures["validation_loss_before"], figures["validation_loss"]
        yield "loss on held-out shots", f"{before:.3f} before, {after:.3f} after"
    adapter = card.adapter
    told = [f"{name} {_number(adapter[name])}" for name in ("rank", "alpha") if _number(adapter.get(name))]
    modules = adapter.get("target_modules")
    if isinstance(modules, list | tuple) and modules:
        # Modules may be named in full, layer by layer: what kind they are is told by the last word.
        kinds = list(dict.fromkeys(_text(name.rpartition(".")[2]) for name in modules if isinstance(name, str)))
        told.append(f"on {', '.join(kinds[:12])}" + (f" and {len(kinds) - 12} more" if len(kinds) > 12 else ""))
    yield "adapter", ", ".join(told) or "see adapter_config.json"
    if card.created:
        yield "made", _text(card.created)


def _merged_of(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    members = training.get("experts")
    if not isinstance(members, list | tuple) or not members:
        return
    told = [
        f"{_text(str(member.get('key')))} ({member['weight']:.4g})"
        for member in members
        if isinstance(member, Mapping) and _number(member.get("weight"))
    ]
    yield "merged of (weight)", ", ".join(told)
    error = _mapping(training.get("error")).get("total")
    yield "relative error against the weighted sum", f"{error:.3g}" if _number(error) else "undefined"


def _selected(selection: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Method, budget, shots and pool, as far as the card knows them."""
    inputs, config = _mapping(selection.get("inputs")), _mapping(selection.get("config"))
    figures = _mapping(selection.get("figures"))
    if isinstance(config.get("method"), str):
        yield "selected by", _text(_local_name(config["method"]))
    if isinstance(config.get("budget"), str):
        yield "budget", _text(config["budget"])
    if isinstance(inputs.get("shots"), str):
        yield "shots", f"{_number(figures.get('shots'))} ({_code(inputs['shots'][:12])})".strip()
    pool = inputs.get("pool") or selection.get("pool")
    if isinstance(pool, str):
        rows = _number(figures.get("pool_rows"))
        yield "pool", f"{rows + ' rows ' if rows else ''}({_code(pool[:12])})"
    if isinstance(selection.get("source"), str):
        yield "source", _text(_local_name(selection["source"]))


def _scores(card: ExpertCard) -> str:
    if card.profile is None:
        return ""
    lines = []
    for skill, score in card.profile.skills.items():
        told = f"| {_text(skill)} | {_text(score.metric)} "
        lines.append(f"{told}| {score.expert.n:,} | {_shown(score.base)} | {_shown(score.expert)} |")
        if score.expert_choice and score.base_choice:
            told = f"| {_text(skill)} | likeliest choice "
            numbers = f"| {score.expert_choice.n:,} | {_shown(score.base_choice)} | {_shown(score.expert_choice)} |"
            lines.append(told + numbers)
    suite = f"{_text(_local_name(card.profile.suite))} ({_code(card.profile.suite_fingerprint[:12])})"
    head = f"## Scores\n\nIn hundredths on suite {suite}, beside the base model alone, with 95 % bootstrap intervals."
    return f"{head}\n\n| skill | metric | items | base | expert |\n|---|---|---|---|---|\n" + "\n".join(lines)


def _licences(card: ExpertCard) -> str:
    if not card.licences:
        own = _licence_of_its_own(card)
        stated = f"Its maker states the licence {_text(own)}. " if own else ""
        return f"## Licences\n\n{stated}The licences of the rows it was trained on are not known."
    lines = [f"| {_text(name)} | {rows:,} |" for name, rows in card.licences.items()]
    told = "The rows it was trained on state these licences; what they ask of the adapter is for you to judge."
    return f"## Licences\n\n{told}\n\n| licence | rows |\n|---|---|\n" + "\n".join(lines)


def _cost(card: ExpertCard) -> Iterator[tuple[str, str]]:
    figures = _mapping(card.training.get("figures"))
    tokens, seconds = card.spent.get("tokens"), card.spent.get("seconds")
    yield "tokens read in all", _number(tokens) or "not known"
    if _number(figures.get("supervised_tokens")):
        yield "tokens of answers in training", _number(figures["supervised_tokens"])
    yield "seconds in all", f"{seconds:,.1f}" if seconds is not None else "not known"
    if _number(figures.get("trainable_parameters")):
        yield "trained parameters", _number(figures["trainable_parameters"])
    device = card.training.get("device")
    if isinstance(device, str):
        yield "device", _text(f"{device}, {card.training.get('dtype') or 'type not known'}")


def _limits(card: ExpertCard) -> Iterator[str]:
    if card.profile is None:
        yield "It has not been scored against its base model yet: `xpert profile` does so."
    else:
        worse = [_text(skill) for skill, score in card.profile.skills.items() if _is_worse(score)]
        if worse:
            yield f"It does worse than the base model alone on {', '.join(worse)}."
        few = [_text(skill) for skill, score in card.profile.skills.items() if score.expert.n < 30]
        if few:
            yield f"Fewer than 30 items were scored of {', '.join(few)}: their intervals are wide and not exact."
        yield "Its scores hold for the suite named above; on other wordings of the same skills they may differ."
    if card.licences.get(UNKNOWN):
        yield f"{card.licences[UNKNOWN]:,} of the rows it was trained on state no licence."
    yield "All else that it says comes from the base model, with that model's errors and biases."


def _is_worse(score: SkillScore) -> bool:
    return score.expert.score < score.base.score


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# Control characters, line and paragraph separators, marks that turn the direction of text, halves of characters.
_UNSEEN = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
_MARKUP = re.compile(r"[\\`*\[\]|#~!$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def _line(text: str) -> str:
    """One line of what can be seen."""
    return _UNSEEN.sub(" ", text).strip()


def _text(text: str) -> str:
    """Text that Markdown and HTML show as it is, in a table too."""
    escaped = "".join(_ENTITIES.get(sign, sign) for sign in _MARKUP.sub(r"\\\g<0>", _line(text)))
    return escaped.replace("://", ":&#47;/")  # an address is not made a link


def _paragraph(text: str) -> str:
    """As `_text`; what would begin a list, a rule or a heading at a line's start does not."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", _text(text))


def _code(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._:/@+-]", "", text)
    return f"`{plain}`" if plain else "not known"


def _local_name(text: str) -> str:
    """The last part of a path; names such as `hf:owner/name` stay as they are."""
    text = _line(text)
    if text.startswith(("/", ".", "~")) or _DRIVE.match(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text


def _base_name(card: ExpertCard, on_hub: bool) -> str:
    if on_hub:
        return _line(card.base.ref.partition("@")[0])
    return re.split(r"[\\/]", _line(card.base.ref).rstrip("\\/"))[-1]


def _shown(interval: Interval) -> str:
    return f"{100 * interval.score:.1f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _number(value: Any) -> str:
    """A number for people, or nothing where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {told} |" for name, told in rows)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
