"""What lies on the Hub is what plain peft loads: no xpert needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.registry.places.hub_server import HubServer
from tests.registry.places.test_hub import NAME, hub, push, store
from xpert.registry.blobs import BlobStore
from xpert.registry.remotes.hub import Hub

__all__ = ["hub", "store"]


@pytest.fixture
def everywhere(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the stand-in the Hub of libraries that were imported before HF_ENDPOINT was set."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


def test_peft_loads_a_version_by_its_git_tag(
    everywhere: None,
    hub: HubServer,
    store: BlobStore,
    tiny_base: Path,
    make_adapter: Callable[..., Path],
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folders = {number: make_adapter(seed=number) for number in (1, 2)}
    for number, folder in folders.items():
        contents = {path.name: [path.read_bytes()] for path in sorted(folder.iterdir()) if path.is_file()}
        push(Hub("hf://"), store, contents, number=number)
    for revision, number in (("v1", 1), ("main", 2)):
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        loaded = PeftModel.from_pretrained(base, NAME, revision=revision).state_dict()
        wanted = load_file(folders[number] / "adapter_model.safetensors")
        assert wanted
        for name, tensor in wanted.items():
            stem, _, rest = name.rpartition(".")
            assert loaded[f"{stem}.default.{rest}"].equal(tensor)
    assert sum("adapter_model.safetensors" in line for line in hub.requests)
