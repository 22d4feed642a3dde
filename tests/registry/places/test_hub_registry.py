"""A registry on the Hub as users meet it: through the mirror, copies between places, and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.registry.places.hub_server import HubServer
from tests.registry.places.places import Place
from tests.registry.places.test_copying import filled, records
from tests.registry.places.test_hub import hub, place
from tests.registry.places.test_mirror import (
    _no_pauses,
    files_of,
    machine,
    test_a_damaged_mirror_mends_itself,
    test_numbers_race,
    test_offline,
    test_offline_without_the_contents,
    test_only_what_changed_is_read,
    test_tags_and_removal_travel,
)
from xpert.errors import Corrupt
from xpert.registry.copying import copy_versions
from xpert.registry.mirror import RemoteRegistry
from xpert.registry.opening import open_registry
from xpert.registry.signing.keys import SigningKey
from xpert.registry.store import Registry

__all__ = [
    "_no_pauses",
    "filled",
    "hub",
    "machine",
    "place",
    "test_a_damaged_mirror_mends_itself",
    "test_numbers_race",
    "test_offline",
    "test_offline_without_the_contents",
    "test_only_what_changed_is_read",
    "test_tags_and_removal_travel",
]

Maker = Callable[..., Path]


def test_what_one_machine_publishes_another_pulls(
    place: Place, hub: HubServer, machine: Callable[..., RemoteRegistry], expert: Maker, tmp_path: Path
) -> None:
    a, b = machine(place, "a"), machine(place, "b")
    assert b.list() == []
    folder = expert(scores={"arithmetic": 0.8}, description="adds numbers")
    assert a.publish(folder, "acme/sums", tags=("stable",)).ref == "acme/sums@1"
    assert a.publish(folder, "acme/sums").repeated
    assert a.publish(expert("b", seed=2), "acme/sums").version == 2
    (entry,) = b.list()
    assert (entry.latest.ref, entry.versions, entry.tags) == ("acme/sums@2", (1, 2), {"stable": 1, "latest": 2})
    assert b.show("acme/sums@1").document["description"] == "adds numbers"
    assert files_of(b.pull("acme/sums@stable", tmp_path / "out")) == files_of(folder)
    assert list(b.verify()) == [] and list(a.verify()) == []
    assert set(hub.repository("acme/sums").tags) == {"v1", "v2", "stable"}
    hub.flip("acme/sums", "adapter_config.json", "v2")
    assert [problem.where for problem in b.verify()] == ["acme/sums@2: adapter_config.json"]
    with pytest.raises(Corrupt, match="damaged"):
        b.pull("acme/sums@2", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_copies_go_there_and_back(place: Place, filled: Registry, tmp_path: Path) -> None:
    """Folder, Hub, folder: a mixture, its experts, and versions out of their order."""
    there = open_registry("hf://acme")
    copied = copy_versions(filled, there, ["acme/both", "acme/sums"], every=True, tags=True)
    assert sum(one.new for one in copied) == 4
    back = Registry(tmp_path / "back")
    copy_versions(there, back, ["acme/both", "acme/sums"], every=True, tags=True)
    assert records(back) == records(filled) and list(there.verify()) == []


def test_signatures_go_along(place: Place, filled: Registry, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keys = [SigningKey.generate(tmp_path / f"key{number}") for number in range(2)]
    filled.sign("acme/sums@1", keys[0])
    there = open_registry("hf://acme")
    copy_versions(filled, there, ["acme/sums@1"])
    there.sign("acme/sums@1", keys[1])
    back = Registry(tmp_path / "back")
    copy_versions(there, back, ["acme/sums@1"])
    signed = {made.key for made in back.signatures_of(back.record("acme/sums@1"))}
    assert signed == {key.public.key for key in keys} and list(there.verify()) == []


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("list", ...)`: `xpert registry` as a process of its own, which finds the Hub by its environment."""
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}

    def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "xpert", "registry", *map(str, arguments)]
        return subprocess.run(line, env={**os.environ, **settings, **more}, capture_output=True, text=True)

    return run


def test_commands(
    command: Callable[..., subprocess.CompletedProcess[str]], hub: HubServer, expert: Maker, tmp_path: Path
) -> None:
    folder = expert()
    published = command("publish", folder, "--name", "alice/dates", "--registry", "hf://lab?private=1")
    assert published.returncode == 0 and "published alice/dates@1" in published.stdout
    assert hub.repository("lab/dates").private
    assert command("pull", "alice/dates", "-o", tmp_path / "out", XPERT_REGISTRY="hf://lab").returncode == 0
    assert files_of(tmp_path / "out") == files_of(folder)
    listed = command("list", "--json", "--registry", "hf://lab", HF_TOKEN="hf_bob")
    assert json.loads(listed.stdout)["entries"] == [] and listed.stderr == ""
    refused = command("publish", folder, "--name", "alice/dates", "--registry", "hf://lab", HF_TOKEN="hf_mistyped")
    assert refused.returncode == 2 and "hf auth login" in refused.stderr
    assert "hf_alice" not in published.stderr + refused.stderr and "hf_mistyped" not in refused.stderr
    removed = command("remove", "alice/dates", "--registry", "hf://lab")
    assert removed.stdout == "removed alice/dates@1; the Hub keeps its files in earlier commits\n"
