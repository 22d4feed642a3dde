"""The one adapter of a weighted set is exact, named by content, and kept within bounds while nobody needs it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput, Unavailable
from xpert.experts.adapters import read_adapter
from xpert.experts.engines._vllm_adapters import (
    Expert,
    concatenate,
    expert_set,
    open_reading_base,
    read_expert,
    write_set,
)
from xpert.experts.engines._vllm_backend import Served
from xpert.experts.engines._vllm_store import AdapterStore
from xpert.experts.engines.vllm_engine import VllmEngine
from xpert.language_model import LanguageModel
from xpert.protocols import EngineRequest


@pytest.fixture(scope="session")
def experts(lm: LanguageModel, folders: dict[str, Path]) -> dict[str, Expert]:
    return {key: read_expert(key, folder, open_reading_base(lm)) for key, folder in folders.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=st.dictionaries(st.sampled_from("abcd"), st.floats(-3, 3, width=32), min_size=1))
def test_the_concatenation_is_the_weighted_sum(
    lm: LanguageModel, folders: dict[str, Path], weights: dict[str, float]
) -> None:
    adapters = [(read_adapter(key, folders[key], lm), weight) for key, weight in weights.items()]
    made = concatenate(adapters)
    assert set(made) == {name for adapter, _ in adapters for name in adapter.modules}
    assert len({a.shape[0] for a, _ in made.values()}) == 1  # one rank for all modules
    for name, (a, b) in made.items():
        parts = [(adapter.modules[name], weight) for adapter, weight in adapters if name in adapter.modules]
        wanted = sum(weight * (part.b.double() @ part.a.double()) for part, weight in parts)
        torch.testing.assert_close((b.double() @ a.double()), wanted, atol=1e-5, rtol=1e-5)


def test_plain_peft_loads_what_is_written(
    lm: LanguageModel, experts: dict[str, Expert], tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chosen = expert_set([(experts["a"], 0.7), (experts["b"], 0.2), (experts["d"], -0.4)], lm.fingerprint)
    write_set(chosen, open_reading_base(lm), tmp_path / chosen.name)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / chosen.name)
    merged = loaded.merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    adapters = [(read_adapter(e.key, e.folder, lm), weight) for e, weight in chosen.members]
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        update = sum(w * (adapter.modules[module].b @ adapter.modules[module].a) for adapter, w in adapters
                     if module in adapter.modules)  # fmt: skip
        torch.testing.assert_close(merged[name], weight + update, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / chosen.name / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == chosen.rank == 4 + 8 + 6  # the pattern of d counts
    assert read_adapter("again", tmp_path / chosen.name, lm).rank == chosen.rank


def test_names_are_of_content_and_weights(lm: LanguageModel, experts: dict[str, Expert], tmp_path: Path) -> None:
    a, b = experts["a"], experts["b"]
    name = expert_set([(a, 0.5), (b, 0.5)], lm.fingerprint).name
    renamed = Expert("other", tmp_path, a.fingerprint, a.ranks)
    assert name == expert_set([(b, 0.5), (a, 0.5)], lm.fingerprint).name
    assert name == expert_set([(b, 0.5), (a, 0.25), (renamed, 0.25)], lm.fingerprint).name
    others = [
        expert_set([(a, 0.5), (b, 0.25)], lm.fingerprint),
        expert_set([(a, 0.5)], lm.fingerprint),
        expert_set([(a, 0.5), (b, 0.5)], "another base"),
        expert_set([(a, 0.5), (experts["c"], 0.5)], lm.fingerprint),
    ]
    assert len({name, *(each.name for each in others)}) == 5
    assert expert_set([(a, 0.5), (renamed, 0.5)], lm.fingerprint).rank == 4


def test_weights_beyond_float32_are_refused(lm: LanguageModel, experts: dict[str, Expert], tmp_path: Path) -> None:
    chosen = expert_set([(experts["a"], 1e39)], lm.fingerprint)
    with pytest.raises(BadInput, match="the weights of a make numbers too large"):
        write_set(chosen, open_reading_base(lm), tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Recorder:
    """A vLLM that only remembers what it was told."""

    def __init__(self) -> None:
        self.loaded: dict[str, Served] = {}
        self.calls: list[tuple[str, str]] = []
        self.fail: Exception | None = None

    context = 512

    def load(self, adapter: Served) -> None:
        if self.fail is not None:
            raise self.fail
        assert adapter.folder.is_dir()
        self.calls.append(("load", adapter.name))
        self.loaded[adapter.name] = adapter

    def unload(self, adapter: Served) -> None:
        assert adapter.folder.is_dir()  # before it is deleted
        self.calls.append(("unload", adapter.name))
        del self.loaded[adapter.name]


def sets(count: int) -> list[Any]:
    """Sets of one made-up expert each."""
    return [expert_set([(Expert("e", Path(), str(n), {"m": 1}), 1.0)], "base") for n in range(count)]


def write(experts: Any, folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(b"x" * 100)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make_store(recorder: Recorder, tmp_path: Path) -> Callable[..., AdapterStore]:
    def make(adapters: int = 3, size: int = 10**6, **changes: Any) -> AdapterStore:
        folder = tmp_path / "made"
        settings: dict[str, Any] = {"max_adapters": adapters, "max_bytes": size, "seen_as": folder} | changes
        return AdapterStore(folder, recorder, write, **settings)

    return make


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_the_least_recently_used_go_first(
    make_store: Callable[..., AdapterStore], recorder: Recorder, tmp_path: Path
) -> None:
    store, chosen = make_store(adapters=3), sets(5)
    for n in (0, 1, 2, 0, 3, 4):
        with store.use(chosen[n]):
            pass
    assert kept(tmp_path / "made") == {chosen[n].name for n in (0, 3, 4)}
    assert set(recorder.loaded) == {f"xpert-{chosen[n].name}" for n in (0, 3, 4)}
    counts = store.counts()
    assert (counts.made, counts.reused, counts.evicted, counts.adapters, counts.bytes) == (5, 1, 2, 3, 300)
    assert len(list((tmp_path / "made").glob("*.lock"))) == 3


def test_bytes_are_bounded_too(make_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    store, chosen = make_store(adapters=100, size=250), sets(4)
    for each in chosen:
        with store.use(each):
            pass
    assert kept(tmp_path / "made") == {chosen[2].name, chosen[3].name}


def test_what_is_in_use_stays(make_store: Callable[..., AdapterStore], recorder: Recorder, tmp_path: Path) -> None:
    store, chosen = make_store(adapters=1), sets(3)
    with store.use(chosen[0]) as first, store.use(chosen[1]):
        with store.use(chosen[2]):
            assert kept(tmp_path / "made") == {each.name for each in chosen}
        assert kept(tmp_path / "made") == {chosen[0].name, chosen[1].name}
        assert first.name in recorder.loaded
    assert kept(tmp_path / "made") == {chosen[0].name} or kept(tmp_path / "made") == {chosen[1].name}


def test_another_process_keeps_what_it_uses(make_store: Callable[..., AdapterStore], tmp_path: Path) -> None:
    one, two, chosen = make_store(adapters=1), make_store(adapters=1), sets(2)
    with one.use(chosen[0]):
        for each in chosen:
            with two.use(each):
                pass
        assert kept(tmp_path / "made") == {each.name for each in chosen}  # two gave it up, one uses it


def test_earlier_folders_are_found_again_and_counted(
    make_store: Callable[..., AdapterStore], recorder: Recorder, tmp_path: Path
) -> None:
    chosen = sets(4)
    first = make_store()
    for each in chosen[:3]:
        with first.use(each):
            pass
    first.close()
    assert not recorder.loaded and len(kept(tmp_path / "made")) == 3
    (tmp_path / "made" / "notes").mkdir()  # not ours
    store = make_store()
    with store.use(chosen[0]):
        pass
    assert store.counts().reused == 1 and store.counts().made == 0
    with store.use(chosen[3]):
        pass
    assert kept(tmp_path / "made") == {"notes", *(chosen[n].name for n in (0, 2, 3))}


def test_ids_are_positive_stable_and_apart(
    make_store: Callable[..., AdapterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.experts.engines import _vllm_store

    names = [each.name for each in sets(50)]
    ids = [make_store()._served(name).id for name in names]  # each alone: no order in it
    store = make_store()
    assert [store._served(name).id for name in names] == ids
    assert len(set(ids)) == 50 and all(0 < id <= 2**31 - 1 for id in ids)
    monkeypatch.setattr(_vllm_store, "_IDS", 60)  # now they meet
    store = make_store()
    crowded = [store._served(name).id for name in names]
    assert len(set(crowded)) == 50 and all(0 < id <= 60 for id in crowded)
    assert [store._served(name).id for name in names] == crowded


def test_an_adapter_that_is_refused_leaves_nothing_pinned(
    make_store: Callable[..., AdapterStore], recorder: Recorder
) -> None:
    store, (chosen,) = make_store(), sets(1)
    recorder.fail = Unavailable("gone")
    with pytest.raises(Unavailable), store.use(chosen):
        pass
    recorder.fail = None
    with store.use(chosen) as served:
        assert served.name in recorder.loaded
    assert store.counts().made == 1


def test_many_threads_never_lose_an_adapter_in_use(
    make_store: Callable[..., AdapterStore], recorder: Recorder, tmp_path: Path
) -> None:
    store, chosen = make_store(adapters=2), sets(6)
    wrong: list[str] = []

    def work(order: list[int]) -> None:
        for n in order:
            with store.use(chosen[n]) as served:
                if served.name not in recorder.loaded or not served.folder.is_dir():
                    wrong.append(served.name)

    orders = [list(order) for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 90)]
    threads = [threading.Thread(target=work, args=(order * 4,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(kept(tmp_path / "made")) == 2 == len(recorder.loaded)


def test_the_server_sees_the_folder_under_its_own_path(
    make_store: Callable[..., AdapterStore], recorder: Recorder, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").symlink_to(tmp_path / "made")
    store, (chosen,) = make_store(seen_as=tmp_path / "elsewhere"), sets(1)
    with store.use(chosen) as served:
        assert served.folder == tmp_path / "elsewhere" / chosen.name


def test_a_set_is_made_and_loaded_once_for_many_requests(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    requests = [ask(str(n), f"{n}", (("a", 0.5), ("b", 0.5)), max_tokens=2) for n in range(8)]
    list(engine.generate(requests))
    assert len(stand_in.bodies("/v1/load_lora_adapter")) == 1
    assert (engine.adapters.made, engine.adapters.reused) == (1, 7)
    engine.close()
    assert stand_in.loaded == {} and engine.adapters.adapters == 1


def test_evicted_adapters_are_unloaded_at_the_server(
    make_engine: Callable[..., VllmEngine], stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    engine = make_engine(adapters=1)
    for key in "abca":
        list(engine.generate([ask(key, "x", ((key, 1.0),), max_tokens=1)]))
    assert len(stand_in.loaded) == 1 and engine.adapters.evicted == 3
    assert len(stand_in.bodies("/v1/unload_lora_adapter")) == 3


def test_a_restarted_server_is_given_its_adapters_again(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest], replies: Callable[..., Any]
) -> None:
    asked = [ask("r", "x", (("a", 1.0),))]
    before = replies(engine, asked)
    scores = engine.continuation_logprobs(asked, [(7, 8)])
    stand_in.forget_all()
    assert replies(engine, asked) == before
    stand_in.forget_all()
    assert engine.continuation_logprobs(asked, [(7, 8)]) == scores
    assert len(stand_in.bodies("/v1/load_lora_adapter")) == 3


def test_an_adapter_already_at_the_server_is_used(
    make_engine: Callable[..., VllmEngine],
    stand_in: Any,
    ask: Callable[..., EngineRequest],
    replies: Callable[..., Any],
) -> None:
    asked = [ask("r", "x", (("a", 1.0),))]
    assert replies(make_engine(), asked) == replies(make_engine(), asked)  # the second is told that it is there
    assert len(stand_in.loaded) == 1


def test_what_the_server_says_of_an_adapter_is_passed_on(
    engine: VllmEngine, stand_in: Any, ask: Callable[..., EngineRequest]
) -> None:
    request = ask("r", "x", (("b", 1.0),))
    stand_in.max_lora_rank = 4
    with pytest.raises(BadInput, match=r"rank 8 is greater than max_lora_rank 4.*--max-lora-rank"):
        list(engine.generate([request]))
    stand_in.runtime_loading = False
    with pytest.raises(Unavailable, match=r"does not load adapters while it runs.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        list(engine.generate([request]))
