"""`xpert registry import`: adapters made elsewhere become experts, or are refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import Unavailable
from xpert.experts.adapters import read_adapter
from xpert.experts.importing import Told, import_adapter
from xpert.experts.mixture_file import load_mixture
from xpert.language_model import load_model, model_fingerprint
from xpert.registry.card import ExpertCard
from xpert.registry.store import Registry
from xpert.storage import hash_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CARD = """---
license: cc-by-4.0
base_model: them/tinylm
skills: [dates, courts]
---
# Dates

<!-- Provide a quick summary -->

Finds the date in a
sentence.

More words.
"""


@pytest.fixture(scope="session")
def plain_adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(seed=5, r=4, lora_alpha=8, rank_pattern={"q_proj": 6}, use_rslora=True)


@pytest.fixture
def adapter(plain_adapter: Path, tmp_path: Path) -> Path:
    """A copy to be changed. It names its base by a path that is on this machine."""
    return Path(shutil.copytree(plain_adapter, tmp_path / "adapter"))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def retensor(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def hub_cache(monkeypatch: pytest.MonkeyPatch, root: Path, name: str, files: Path, sha: str = "c" * 40) -> Path:
    """A model in the Hub's cache on this machine, laid out as its client does it: links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    home = root / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(sha)
    for path in files.iterdir():
        blob = home / "blobs" / hash_file(path)
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_an_adapter_becomes_an_expert(adapter: Path, tiny_base: Path, registry: Registry, tmp_path: Path) -> None:
    (adapter / "README.md").write_text(CARD)
    made = import_adapter(adapter, "me/dates", registry)
    assert made.version.ref == "me/dates@1"
    assert made.warnings == ()
    folder = registry.pull("me/dates", tmp_path / "pulled")
    card = ExpertCard.read(folder)
    assert (folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert card.base.fingerprint == model_fingerprint(str(tiny_base))
    assert card.base.architecture == "LlamaForCausalLM"
    assert card.name == "dates"
    assert card.description == "Finds the date in a sentence."
    assert card.skills == ("dates", "courts")
    assert card.adapter["rank"] == 6
    assert card.adapter["rank_pattern"] == {"q_proj": 6}
    assert card.adapter["rslora"] is True
    assert card.adapter["modules"] == 14
    origin = card.training["imported"]
    assert origin["source"] == "adapter"
    assert origin["sha"] is None
    assert origin["licence"] == "cc-by-4.0"
    assert origin["weights"] == hash_file(adapter / WEIGHTS)
    page = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in page
    assert "import of adapter" in page
    assert "chat template" not in page  # nobody has said so
    # It can be served: by the base it was checked against, and alone as a mixture of one.
    assert len(read_adapter("x", folder, load_model(str(tiny_base), device="cpu")).modules) == 14
    assert load_mixture("me/dates", registry).base.fingerprint == card.base.fingerprint


def test_what_the_user_says_counts(
    adapter: Path, registry: Registry, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    (adapter / "README.md").write_text(CARD)
    rows = write_jsonl("prompts.jsonl", [{"prompt": f"When? {n}", "skill": "dates"} for n in range(70)])
    told = Told(description="Dates, found.", skills=("when",), licence="MIT", exemplars=rows)
    made = import_adapter(adapter, "me/dates", registry, told)
    assert (made.card.description, made.card.skills) == ("Dates, found.", ("when",))
    assert made.card.training["imported"]["licence"] == "MIT"
    lines = (registry.pull("me/dates") / "exemplars.jsonl").read_text().splitlines()
    assert len(lines) == 64
    assert json.loads(lines[3]) == {"prompt": "When? 3", "skill": "dates", "kind": "shot"}


def test_the_same_adapter_is_published_once(adapter: Path, registry: Registry) -> None:
    assert not import_adapter(adapter, "me/a", registry).version.repeated
    again = import_adapter(adapter, "me/a", registry)
    assert again.version.repeated
    assert again.version.version == 1
    changed = import_adapter(adapter, "me/a", registry, Told(description="Other words."))
    assert changed.version.version == 2


def test_tags_and_what_looks_like_a_secret(adapter: Path, registry: Registry, xpert: Callable[..., Result]) -> None:
    words = [
        "import",
        adapter,
        "--name",
        "me/a",
        "--description",
        "Reads hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmPoIuYtRe",
        "--tag",
        "stable",
    ]
    refused = xpert("registry", *words, "--registry", registry.folder)
    assert refused.exit_code == 2 and "--allow-secret-like" in refused.stderr and "QwErTy" not in refused.stderr
    made = xpert("registry", *words, "--allow-secret-like", "--registry", registry.folder)
    assert made.exit_code == 0, made.stderr
    assert registry.tags("me/a") == {"latest": 1, "stable": 1}


def test_what_lies_beside_is_never_opened(adapter: Path, registry: Registry, xpert: Callable[..., Result]) -> None:
    os.mkfifo(adapter / "optimizer.pt")  # whoever opens it waits for ever
    (adapter / "training_args.bin").symlink_to("/nowhere")
    (adapter / "checkpoint-5").mkdir()
    made = xpert("registry", "import", adapter, "--name", "me/a", "--registry", registry.folder)
    assert made.exit_code == 0, made.stderr
    assert "left out: README.md" not in made.stdout
    assert "left out: checkpoint-5, optimizer.pt, training_args.bin" in made.stdout
    assert {file.path for file in registry.show("me/a").files} == {
        "README.md",
        CONFIG,
        WEIGHTS,
        "expert.json",
        "report.html",
    }


def test_the_base_is_looked_for_and_never_fetched(
    adapter: Path, tiny_base: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configure(adapter, base_model_name_or_path="them/tinylm", revision=None)
    with pytest.raises(Unavailable, match=r"them/tinylm is not on this machine.*--base MODEL"):
        import_adapter(adapter, "me/a", registry)
    assert not registry.folder.exists()
    given = import_adapter(adapter, "me/a", registry, Told(base=str(tiny_base)))
    assert given.card.base.ref == str(tiny_base)
    assert "says it was made for tinylm" in given.warnings[0]
    # What it names stays in peft's configuration, which others read.
    assert json.loads((registry.pull("me/a") / CONFIG).read_text())["base_model_name_or_path"] == "them/tinylm"
    hub_cache(monkeypatch, tmp_path / "hub", "them/tinylm", tiny_base)
    found = import_adapter(adapter, "me/b", registry)
    assert found.card.base.ref == "them/tinylm"
    assert found.card.base.fingerprint == given.card.base.fingerprint


def test_a_base_in_the_cache_without_weights_is_none(
    adapter: Path, tiny_base: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configure(adapter, base_model_name_or_path="them/tinylm", revision=None)
    snapshot = hub_cache(monkeypatch, tmp_path / "hub", "them/tinylm", tiny_base)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(Unavailable, match=r"in the hub's cache: the model folder has no weights"):
        import_adapter(adapter, "me/a", registry)


def test_a_path_of_another_machine_does_not_travel(adapter: Path, tiny_base: Path, registry: Registry) -> None:
    configure(adapter, base_model_name_or_path="/data/jane/models/tiny", auto_mapping={"parent_library": "evil"})
    made = import_adapter(adapter, "me/a", registry, Told(base=str(tiny_base)))
    folder = registry.pull("me/a")
    assert "jane" not in (folder / CONFIG).read_text() + (folder / "expert.json").read_text()
    assert "evil" not in (folder / CONFIG).read_text()
    assert any("auto_mapping" in warning for warning in made.warnings)


def _zero(side: str) -> Callable[[dict[str, Any]], None]:
    def act(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if side in name:
                tensor.zero_()

    return act


WARNINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no task": (lambda f: configure(f, task_type=None), "states no task"),
    "unknown setting": (lambda f: configure(f, quantum_lora=True, other_new=None), "does not know: quantum_lora"),
    "nothing learned": (lambda f: retensor(f, _zero("lora_B")), "changes nothing"),
    "little learned": (lambda f: retensor(f, _zero("layers.1.mlp.up_proj.lora_A")), "of 1 of its 14 modules are zero"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_accepted_with_a_warning(case: str, adapter: Path, registry: Registry) -> None:
    act, said = WARNINGS[case]
    act(adapter)
    made = import_adapter(adapter, "me/a", registry)
    assert [said in warning for warning in made.warnings] == [True]
    assert made.card.training["imported"]["warnings"] == list(made.warnings)


def test_a_base_named_by_its_own_hash_is_not_doubted(registry: Registry, adapter: Path, tiny_base: Path) -> None:
    """As the experts of a GGUF file name it: by the folder in the cache that it was decoded into."""
    hashed = model_fingerprint(str(tiny_base))[:32]
    for number, (named, doubts) in enumerate(((hashed, 0), ("0" * 32, 1)), 1):
        configure(adapter, base_model_name_or_path=f"/elsewhere/models/{named}")
        made = import_adapter(adapter, f"me/a{number}", registry, Told(base=str(tiny_base)))
        assert len(made.warnings) == doubts


def test_another_base_and_a_quantised_one_are_warned_of(
    adapter: Path, tiny_base: Path, registry: Registry, tmp_path: Path
) -> None:
    configure(adapter, base_model_name_or_path="meta/llama-9b")
    quantised = Path(shutil.copytree(tiny_base, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    made = import_adapter(adapter, "me/a", registry, Told(base=str(quantised)))
    assert "made for llama-9b, and is taken for one of quantised" in made.warnings[0]
    assert "its base is quantised" in made.warnings[1]


def _pickle(folder: Path, name: str) -> None:
    import torch

    torch.save({"a": torch.zeros(2)}, folder / name)


def _swap(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    _pickle(folder, "adapter_model.bin")


def _link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def _deeper(folder: Path) -> None:
    (folder / "first").mkdir()
    (folder / CONFIG).rename(folder / "first" / CONFIG)


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def act(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return act


def _embedding(tensors: dict[str, Any]) -> None:
    import torch

    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(400, 64)


def _nan(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _narrow(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if "up_proj.lora_A" in name)
    tensors[name] = tensors[name][:, 1:].clone()


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


# what is done to the folder -> words of the message; exit status 2 for all
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (lambda f: configure(f, use_dora=True), "the adapter uses DoRA"),
    "saved modules": (lambda f: configure(f, modules_to_save=["lm_head"]), "fully trained modules (modules_to_save)"),
    "biases": (lambda f: configure(f, bias="lora_only"), "trained biases (bias='lora_only')"),
    "bias on B": (lambda f: configure(f, lora_bias=True), "a bias on lora_B"),
    "tokens": (lambda f: configure(f, trainable_token_indices=[1]), "trained tokens"),
    "moved base": (lambda f: configure(f, init_lora_weights="pissa"), "changed the base model itself"),
    "IA3": (lambda f: configure(f, peft_type="IA3"), "IA3 adapters are not served"),
    "task": (lambda f: configure(f, task_type="SEQ_CLS"), "is for the task SEQ_CLS"),
    "configuration": (lambda f: (f / CONFIG).write_text("[]"), "not an adapter configuration"),
    "torn configuration": (lambda f: (f / CONFIG).write_text('{"peft_type": '), "not valid JSON"),
    "odd base name": (lambda f: configure(f, base_model_name_or_path=3), "the name of the base model is not a text"),
    "no base name": (lambda f: configure(f, base_model_name_or_path=None), "does not say which base model"),
    "pickle": (_swap, "the weights are a pickle (adapter_model.bin)"),
    "hidden pickle": (lambda f: _pickle(f, WEIGHTS), "refused: it is a pickle, whatever its name"),
    "bare pickle": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04N."), "refused: it is a pickle, whatever its name"),
    "torn weights": (_cut, "not a sound safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"the adapter has no {WEIGHTS}"),
    "no tensors": (lambda f: retensor(f, lambda t: t.clear()), "holds no tensors"),
    "NaN": (lambda f: retensor(f, _nan), "holds NaN or infinite weights"),
    "rank": (lambda f: configure(f, rank_pattern={}), "has rank 6, but the configuration says 4"),
    "embedding": (lambda f: retensor(f, _embedding), "a weight that is not plain LoRA"),
    "other modules": (lambda f: retensor(f, _rename("q_proj", "c_attn")), "which the base model"),
    "other layers": (lambda f: retensor(f, _rename("layers.1.", "layers.7.")), "does not have as a linear layer"),
    "other shapes": (lambda f: retensor(f, _narrow), "up_proj of the adapter has A"),
    "a link": (_link, "a symbolic link that leaves the folder"),
    "deeper": (_deeper, "its adapters lie deeper: first"),
    "nothing": (lambda f: (f / CONFIG).unlink(), f"not a peft adapter: it has no {CONFIG}"),
    "an expert": (lambda f: (f / "expert.json").write_text("{}"), "is an expert already"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused(case: str, adapter: Path, xpert: Callable[..., Result], tmp_path: Path) -> None:
    act, said = REFUSALS[case]
    act(adapter)
    place = tmp_path / "registry"
    made = xpert("registry", "import", adapter, "--name", "me/a", "--registry", place)
    assert said in made.stderr
    assert "imports" not in made.stderr  # the user's folder is named, not the draft's
    assert made.exit_code == (3 if case == "no base name" else 2)
    assert "Traceback" not in made.stderr
    assert not place.exists()


def test_how_a_pickle_is_converted(adapter: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out that the message names does lead out."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(Exception, match="pickle") as caught:
        import_adapter(adapter, "me/a", registry)
    code = caught.value.hint.partition("its maker: ")[2]
    monkeypatch.chdir(adapter)
    exec(code)
    assert import_adapter(adapter, "me/a", registry).version.version == 1


@pytest.mark.parametrize(
    ("source", "options", "status", "said"),
    [
        ("nowhere", (), 2, "no such folder"),
        ("{base}", (), 2, "is a model, not an adapter"),
        ("{adapter}/adapter_config.json", (), 2, "is a file, not an adapter's folder"),
        ("{adapter}", ("--base", "nowhere.gguf"), 2, "no such GGUF file"),
        ("{adapter}", ("--base", "{adapter}"), 2, "is an adapter, not a base model"),
        ("{adapter}", ("--max-size", "0.000001"), 2, "raise --max-size"),
        ("{adapter}", ("--exemplars", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        ("hf:nameonly", (), 2, "is not hf:OWNER/NAME"),
        ("hf:a/b/../../../etc", (), 2, "is not hf:OWNER/NAME"),
        ("hf:me/absent", (), 3, "its cache has no copy"),
    ],
)
def test_mistakes(
    source: str,
    options: tuple[str, ...],
    status: int,
    said: str,
    adapter: Path,
    tiny_base: Path,
    xpert: Callable[..., Result],
    tmp_path: Path,
) -> None:
    words = [word.format(adapter=adapter, base=tiny_base) for word in (source, *options)]
    made = xpert("registry", "import", *words, "--name", "me/a", "--registry", tmp_path / "registry")
    assert said.casefold() in made.stderr.casefold()
    assert made.exit_code == status
    assert not (tmp_path / "registry").exists()


def test_a_bad_name_is_told_before_any_work(xpert: Callable[..., Result], tmp_path: Path) -> None:
    made = xpert("registry", "import", "hf:me/absent", "--name", "me", "--registry", tmp_path / "registry")
    assert "'me' is not a name" in made.stderr


def test_an_imported_expert_is_profiled_later(
    adapter: Path, registry: Registry, xpert: Callable[..., Result], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """As the documents say: pull, profile, publish the next version."""
    import_adapter(adapter, "me/dates", registry)
    suite = write_jsonl("suite.jsonl", [{"prompt": f"When? {n}", "answers": ["1"], "skill": "dates"} for n in range(4)])
    folder = tmp_path / "dates"
    for words in (
        ("registry", "pull", "me/dates", "-o", folder, "--registry", registry.folder),
        ("profile", folder, "--suite", suite, "--max-tokens", 2, "--device", "cpu"),
        ("registry", "publish", folder, "--name", "me/dates", "--registry", registry.folder),
    ):
        made = xpert(*words)
        assert made.exit_code == 0, made.stderr
    shown = registry.show("me/dates")
    assert shown.version.version == 2
    assert shown.document["profile"]["skills"]["dates"]["expert"]["n"] == 4
    assert shown.document["training"]["imported"]["source"] == "adapter"
