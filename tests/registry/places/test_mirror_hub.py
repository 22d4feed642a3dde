"""The mirror in front of the Hub's stand-in: what `test_mirror.py` asks of every place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.registry.places.places import Place
from tests.registry.places.test_hub import hub as hub
from tests.registry.places.test_hub import place as place
from tests.registry.places.test_mirror import _no_pauses as _no_pauses
from tests.registry.places.test_mirror import machine as machine
from tests.registry.places.test_mirror import test_numbers_race as test_numbers_race
from tests.registry.places.test_mirror import test_offline_without_the_contents as test_offline_without_the_contents
from tests.registry.places.test_mirror import test_only_what_changed_is_read as test_only_what_changed_is_read
from tests.registry.places.test_mirror import (
    test_publishing_goes_on_after_a_break as test_publishing_goes_on_after_a_break,
)
from tests.registry.places.test_mirror import test_tags_and_removal_travel as test_tags_and_removal_travel
from tests.registry.places.test_mirror import (
    test_what_one_machine_publishes_another_pulls as test_what_one_machine_publishes_another_pulls,
)
from xpert.registry.copying import copy_versions
from xpert.registry.mirror import RemoteRegistry
from xpert.registry.store import Registry


def test_copies_there_and_back(
    place: Place,
    machine: Callable[..., RemoteRegistry],
    expert: Callable[..., Path],
    registry: Registry,
    tmp_path: Path,
) -> None:
    for seed in (1, 2):
        registry.publish(expert(f"e{seed}", seed=seed), "acme/sums")
    registry.tag("acme/sums@1", "stable")
    there, back = machine(place), Registry(tmp_path / "back")
    for source, target in ((registry, there), (there, back)):
        copied = copy_versions(source, target, ["acme/sums"], every=True, tags=True)
        assert [(one.ref, one.new, one.tags) for one in copied] == [
            ("acme/sums@1", True, ("stable",)),
            ("acme/sums@2", True, ()),
        ]
        assert list(target.verify()) == []
    for number in (1, 2):
        assert back.record(f"acme/sums@{number}") == registry.record(f"acme/sums@{number}")
    assert back.tags("acme/sums") == registry.tags("acme/sums")
