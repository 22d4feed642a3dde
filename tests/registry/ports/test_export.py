"""`xpert registry export`: what other programs load gives what the expert gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from xpert.experts.adapters import read_updates
from xpert.experts.exporting import merged_folder
from xpert.experts.exporting.export import export
from xpert.experts.exporting.gguf_lora import ARCHITECTURES
from xpert.experts.importing import import_adapter
from xpert.registry.store import Registry

IDS = [[5, 17, 300, 42, 9, 81]]
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "rslora": {"r": 8, "use_rslora": True, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 6, "down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3},
    },
    "no scale": {"r": 4, "lora_alpha": 0},
}


@pytest.fixture(scope="session")
def adapters(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {name: make_adapter(seed=20 + n, **settings) for n, (name, settings) in enumerate(SHAPES.items())}


def logits(base: Path, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    """Of plain transformers, and of plain peft with an adapter; float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor(IDS)).logits[0].float().numpy())


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def changes(adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Module -> s B A, float64."""
    return {m: (u.b.double() @ u.a.double()).numpy() for m, u in read_updates(adapter).items()}


# ── peft ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_registered_expert_goes_back_to_plain_peft(
    adapters: Mapping[str, Path], tiny_base: Path, registry: Registry, tmp_path: Path
) -> None:
    import_adapter(adapters["patterns"], "me/a", registry)
    made = export("me/a@1", "peft", tmp_path / "out", registry=registry)
    assert {path.name for path in made.path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert np.array_equal(logits(tiny_base, made.path), logits(tiny_base, adapters["patterns"]))
    assert json.loads((made.path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_base)
    assert "expert.json" not in (made.path / "README.md").read_text()
    assert made.figures["left_out"] == ["report.html"]


def test_the_dtype_of_the_weights_written(adapters: Mapping[str, Path], tmp_path: Path) -> None:
    import torch

    made = export(adapters["plain"], "peft", tmp_path / "out", dtype="bfloat16")
    for name, tensor in weights(made.path).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights(adapters["plain"])[name].bfloat16())


@pytest.mark.parametrize(
    ("own", "given", "named"),
    [
        ("them/llama@x", "{base}", "{base}"),
        ("them/llama", None, "them/llama"),
        ("{base}", None, "{base}"),
        ("/data/jane/llama", None, None),
    ],
)
def test_how_the_base_is_named_for_peft(
    own: str, given: str | None, named: str | None, adapters: Mapping[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["plain"], tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = own.format(base=tiny_base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = export(folder, "peft", tmp_path / "out", base=given and given.format(base=tiny_base))
    written = json.loads((made.path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == (named and named.format(base=tiny_base))


# ── merged ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_model_says_what_base_and_adapter_say(
    shape: str, adapters: Mapping[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    made = export(adapters[shape], "merged", tmp_path / "out")
    with_adapter, base = logits(tiny_base, adapters[shape]), logits(tiny_base)
    assert np.allclose(logits(made.path), with_adapter, atol=2e-4, rtol=1e-4)
    if shape != "no scale":
        assert np.abs(with_adapter - base).max() > 0.1
    names = {path.name for path in made.path.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "README.md", "model.safetensors"}


def test_a_sum_is_rounded_once(adapters: Mapping[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    import torch

    exact = weights(export(adapters["plain"], "merged", tmp_path / "exact").path)
    rounded = weights(export(adapters["plain"], "merged", tmp_path / "rounded", dtype="bfloat16").path)
    base, added = weights(tiny_base), changes(adapters["plain"])
    for name, tensor in exact.items():
        module = name.removesuffix(".weight")
        expected = base[name].double().numpy() + added.get(module, 0.0)
        assert np.allclose(tensor.double().numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        assert torch.equal(rounded[name], tensor.bfloat16())
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_large_model_is_written_in_shards(
    adapters: Mapping[str, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_folder, "MAX_SHARD", "100KB")
    made = export(adapters["plain"], "merged", tmp_path / "out")
    assert made.figures["files"] == len(list(made.path.glob("*.safetensors"))) > 1
    assert (made.path / "model.safetensors.index.json").is_file()
    assert np.allclose(logits(made.path), logits(tiny_base, adapters["plain"]), atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="session")
def tied(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose head is its embeddings, and an adapter of the head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    home = tmp_path_factory.mktemp("tied")
    base = Path(shutil.copytree(tiny_base, home / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(home / "adapter", save_embedding_layers=False)
    return base, home / "adapter"


def test_an_adapted_head_leaves_the_embeddings_alone(tied: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = tied
    made = export(adapter, "merged", tmp_path / "out")
    assert np.allclose(logits(made.path), logits(base, adapter), atol=2e-4, rtol=1e-4)
    embeddings = "model.embed_tokens.weight"
    assert np.array_equal(weights(made.path)[embeddings].numpy(), weights(base)[embeddings].numpy())


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def in_plain_order(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undoes llama.cpp's order of Q's and K's rows, row by row: rotated pairs lie side by side there."""
    width = matrix.shape[0] // heads
    found = np.empty_like(matrix)
    for row in range(matrix.shape[0]):
        head, place = divmod(row, width)
        found[head * width + (place % 2) * (width // 2) + place // 2] = matrix[row]
    return found


def read_lora(path: Path, heads: int, key_heads: int) -> dict[str, np.ndarray[Any, Any]]:
    """Module -> alpha / rank * B A as llama.cpp computes it, float64, rows in transformers' order."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float64) for t in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        change = (b @ a) * (alpha / b.shape[1] if alpha else 1.0)
        _, block, kind, _ = name.split(".")
        if kind in ("attn_q", "attn_k"):
            change = in_plain_order(change, heads if kind == "attn_q" else key_heads)
        found[f"model.layers.{block}.{LLAMA_NAMES[kind]}"] = change
    return found


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gguf_file_holds_the_same_change(
    shape: str, dtype: str, error: float, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    made = export(adapters[shape], "gguf", tmp_path / "a.gguf", dtype=dtype)
    expected, found = changes(adapters[shape]), read_lora(made.path, 4, 2)
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert np.allclose(found[module], change, rtol=0, atol=error * np.abs(change).max()), module


def test_what_a_gguf_file_says_of_itself(adapters: Mapping[str, Path], tmp_path: Path) -> None:
    import gguf

    made = export(adapters["plain"], "gguf", tmp_path / "a.gguf")
    fields = gguf.GGUFReader(made.path).fields
    told = {
        name: fields[name].contents()
        for name in ("general.type", "adapter.type", "general.architecture", "adapter.lora.alpha")
    }
    assert told == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": "llama",
        "adapter.lora.alpha": 8.0,
    }
    # Where one scale stands for all, A and B are those that peft trained, to the bit.
    tensors = {t.name: t.data for t in gguf.GGUFReader(made.path).tensors}
    own = weights(adapters["plain"])["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].numpy()
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], own)


def test_the_alpha_of_most_modules_is_the_file_s(adapters: Mapping[str, Path], tmp_path: Path) -> None:
    """alpha 8 of most modules beside 3 of one; rsLoRA's factor goes into alpha where all ranks are alike."""
    assert export(adapters["patterns"], "gguf", tmp_path / "a.gguf").figures["alpha"] == 8.0
    alpha = export(adapters["rslora"], "gguf", tmp_path / "b.gguf").figures["alpha"]
    assert alpha == pytest.approx(4 * np.sqrt(8), rel=1e-6)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_known_architecture_has_a_name_for_every_layer(architecture: str) -> None:
    import gguf
    import torch
    import transformers

    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class(**SMALL))
    member = next(m for m, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[architecture].name)
    names = gguf.get_tensor_name_map(member, 2)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if model.config.tie_word_embeddings:
        layers.remove("lm_head")
    found = [names.get_name(name) for name in layers]
    assert None not in found
    assert len(set(found)) == len(layers) >= 8


def cut_short(source: str, target: Path, *, blocks: int, tokens: int) -> Path:
    """A real model's GGUF file with its first blocks and tokens alone, still in its own layout and quantisation."""
    import gguf

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    replaced = {f"{arch}.block_count": blocks, f"{arch}.vocab_size": tokens}
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "tokenizer.")) or name == "general.architecture":
            continue
        writer.add_key_value(name, replaced.get(name, field.contents()), field.types[0])
    for tensor in reader.tensors:
        block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(block) < blocks:
            data = tensor.data[:tokens] if tensor.name == "token_embd.weight" else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.real
def test_the_file_of_a_real_model(tmp_path: Path) -> None:
    """The base's own GGUF file, rows put in order, plus the adapter's change is the merged model, module by module."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GgufConfig

    from xpert.errors import Unavailable
    from xpert.experts.demo.chain import base_model

    try:
        base = cut_short(base_model(), tmp_path / "base.gguf", blocks=2, tokens=256)
    except Unavailable as reason:
        pytest.skip(str(reason))
    asked: dict[str, Any] = {"gguf_file": base.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **asked)
    config, tensors = model.config, {}
    torch.manual_seed(0)
    for layer in range(config.num_hidden_layers):
        for part in LLAMA_NAMES.values():
            module = f"model.layers.{layer}.{part}"
            outputs, inputs = model.get_submodule(module).weight.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, 4) / 10
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    export(adapter, "gguf", tmp_path / "a.gguf", base=str(base))
    merged_folder.add_updates(model, read_updates(adapter))
    lora = read_lora(tmp_path / "a.gguf", config.num_attention_heads, config.num_key_value_heads)
    assert len(lora) == 7 * 2
    kinds = {module: kind for kind, module in LLAMA_NAMES.items()}
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    for module, change in lora.items():
        block, _, part = module.removeprefix("model.layers.").partition(".")
        tensor = file[f"blk.{block}.{kinds[part]}.weight"]
        weight = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float64)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = in_plain_order(weight, config.num_attention_heads if "q_" in part else config.num_key_value_heads)
        merged = model.get_parameter(f"{module}.weight").detach().double().numpy()
        assert np.allclose(weight + change, merged, rtol=0, atol=1e-5), module


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _configured(folder: Path, name: str, **changes: Any) -> Path:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))
    return folder


def _huge(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = weights(folder)
    save_file({n: t * 1e6 for n, t in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("ref", "form", "out", "options", "status", "said"),
    [
        ("{adapter}", "onnx", "o", (), 2, "unknown form 'onnx'"),
        ("{adapter}", "peft", "o", ("--dtype", "int8"), 2, "unknown dtype 'int8'"),
        ("{adapter}", "gguf", "o", (), 2, "name it: -o NAME.gguf"),
        ("{adapter}", "peft", "taken", (), 2, "the output exists already"),
        ("{adapter}", "merged", "taken", (), 2, "the output exists already"),
        ("nowhere", "peft", "o", (), 2, "no such expert folder"),
        ("me/nothing", "peft", "o", (), 2, "there is no registry"),
        ("{base}", "peft", "o", (), 2, "not an adapter: it has no adapter_config.json"),
        ("{mixture}", "merged", "o", (), 2, "xpert merge MIXTURE"),
        ("{adapter}", "merged", "o", ("--base", "nowhere.gguf"), 2, "no such GGUF file"),
        ("{elsewhere}", "merged", "o", (), 3, "its base model them/llama is not on this machine"),
        ("{elsewhere}", "gguf", "o.gguf", (), 3, "give it with --base MODEL"),
        ("{adapter}", "gguf", "o.gguf", ("--base", "{falcon}"), 2, "FalconForCausalLM is not among the architectures"),
        ("{head}", "gguf", "o.gguf", (), 2, "cannot adapt lm_head"),
        ("{dora}", "merged", "o", (), 2, "the adapter uses DoRA"),
        ("{dora}", "peft", "o", (), 2, "the adapter uses DoRA"),
        ("{huge}", "peft", "o", ("--dtype", "float16"), 2, "beyond what float16 holds"),
        ("{huge}", "gguf", "o.gguf", ("--dtype", "float16"), 2, "beyond what F16 holds"),
        ("{huge}", "merged", "o", ("--dtype", "float16"), 2, "beyond what float16 holds"),
    ],
)
def test_mistakes(
    ref: str,
    form: str,
    out: str,
    options: tuple[str, ...],
    status: int,
    said: str,
    adapters: Mapping[str, Path],
    tied: tuple[Path, Path],
    tiny_base: Path,
    xpert: Callable[..., Result],
    tmp_path: Path,
) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(adapters["plain"], tmp_path / name))

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "mixture.json").write_text("{}")
    places = {
        "adapter": adapters["plain"],
        "base": tiny_base,
        "head": tied[1],
        "mixture": tmp_path / "mixture.json",
        "elsewhere": _configured(copy("elsewhere"), "adapter_config.json", base_model_name_or_path="them/llama"),
        "dora": _configured(copy("dora"), "adapter_config.json", use_dora=True),
        "huge": copy("huge"),
        "falcon": shutil.copytree(tiny_base, tmp_path / "falcon"),
    }
    _huge(places["huge"])
    _configured(places["falcon"], "config.json", architectures=["FalconForCausalLM"])
    words = [word.format(**places) for word in (ref, *options)]
    made = xpert("registry", "export", *words, "--to", form, "-o", tmp_path / out, "--registry", tmp_path / "registry")
    assert said.casefold() in made.stderr.casefold()
    assert made.exit_code == status
    assert not (tmp_path / out).exists() or out == "taken"
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_a_registered_mixture_is_refused(
    adapters: Mapping[str, Path], registry: Registry, xpert: Callable[..., Result], tmp_path: Path
) -> None:
    place = registry.folder
    import_adapter(adapters["plain"], "me/a", registry)
    import_adapter(adapters["patterns"], "me/b", registry)
    mixed = xpert("mix", "--router", "fixed", "-o", tmp_path / "m.json", "--registry", place)
    assert mixed.exit_code == 0, mixed.stderr
    registry.publish(tmp_path / "m.json", "me/m")
    made = xpert("registry", "export", "me/m", "--to", "peft", "-o", tmp_path / "o", "--registry", place)
    assert made.exit_code == 2
    assert "me/m@1: is a mixture" in made.stderr


def test_an_expert_of_another_base_is_not_merged(
    adapters: Mapping[str, Path], tiny_base: Path, registry: Registry, xpert: Callable[..., Result], tmp_path: Path
) -> None:
    """A card knows its base by content: shapes that fit are not enough."""
    import_adapter(adapters["plain"], "me/a", registry)
    other = shutil.copytree(tiny_base, tmp_path / "other")
    _configured(Path(other), "config.json", rms_norm_eps=0.5)
    for form, out in (("merged", "o"), ("gguf", "o.gguf")):
        words = ("me/a", "--to", form, "-o", tmp_path / out, "--base", other, "--registry", registry.folder)
        made = xpert("registry", "export", *words)
        assert made.exit_code == 2
        assert "the expert was trained on" in made.stderr
