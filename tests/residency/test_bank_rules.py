"""The bank's rules under random operations, against a plain account of them; many threads; a thousand experts."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput, XpertError
from xpert.experts.adapters import Adapter
from xpert.experts.engines._bank import AdapterBank, Lease


def adapter_bytes(rank: int) -> int:
    """What an adapter of the stand-in base takes in float32."""
    return 2 * 4 * rank * (64 + 96)


def check(bank: AdapterBank, leases: dict[int, Lease], present: dict[int, Adapter]) -> None:
    """Everything that must hold at any time; `present` is the account of who came and who went."""
    counters, options = bank.counters, bank.options
    resident = {version.device for version in bank._tiers.device if version.device is not None}
    assert counters.device_bytes == sum(adapter.bytes for adapter in resident)
    assert counters.resident == len(resident) == counters.uploads - counters.evictions
    assert counters.in_host == counters.loads - counters.host_evictions
    assert options.device_bytes is None or counters.device_bytes <= options.device_bytes
    assert options.device_experts is None or counters.resident <= options.device_experts
    assert options.host_bytes is None or counters.host_bytes <= options.host_bytes
    on_host = [version for version in bank._tiers.host if version.device is None or options.storage != "native"]
    assert counters.host_bytes == sum(version.host.nbytes for version in on_host)
    for lease in leases.values():
        assert resident.issuperset(lease.adapters), "a leased adapter was evicted"
    assert not resident & set(present.values()), "an evicted adapter is still there"


@st.composite
def limits(draw: Any) -> dict[str, Any]:
    return {
        "device_experts": draw(st.sampled_from([None, 3, 4])),
        "device_bytes": draw(st.sampled_from([None, adapter_bytes(9), adapter_bytes(7)])),
        "host_bytes": draw(st.sampled_from([None, 0, adapter_bytes(2), adapter_bytes(5)])),
        "storage": draw(st.sampled_from(["native", "native", "int8"])),
        "patience": draw(st.sampled_from([1, 3, 64])),
    }


@settings(max_examples=60, deadline=None)
@given(limits(), st.integers(0, 2**32 - 1))
def test_the_rules_hold_whatever_is_asked(
    base: Any, stepped: Callable[..., Any], many_folders: list[Path], limits: dict[str, Any], seed: int
) -> None:
    r = random.Random(seed)
    gone: dict[int, Adapter] = {}
    bank = stepped(**limits, on_evict=lambda adapter: gone.update({id(adapter): adapter}))
    handles = [bank.add(f"e{index}", folder) for index, folder in enumerate(many_folders)]
    leases: dict[int, Lease] = {}
    pins: set[str] = set()
    for turn in range(60):
        what = r.choice(["acquire"] * 4 + ["release"] * 3 + ["step"] * 4 + ["prefetch", "pin", "unpin", "replace"])
        some = r.sample(handles, r.randint(1, 3))
        key = f"e{r.randrange(12)}"
        try:
            if what == "acquire" and (lease := bank.acquire(some)) is not None:
                assert [adapter.fingerprint for adapter in lease.adapters] == [handle.fingerprint for handle in some]
                leases[turn] = lease
            elif what == "release" and leases:
                bank.release(leases.pop(r.choice(list(leases))))
            elif what == "step":
                bank.step()
            elif what == "prefetch":
                bank.prefetch(r.sample(handles, r.randint(0, 6)), owner=r.choice([None, bank, base]))
            elif what == "pin" and len(pins) < 1:
                bank.pin(key)
                pins.add(key)
            elif what == "unpin":
                bank.unpin(key)
                pins.discard(key)
            elif what == "replace":
                index = r.randrange(12)
                handles[index] = bank.add(f"e{index}", r.choice(many_folders))
        except BadInput as error:
            assert "fit" in str(error) or "pinned" in str(error)
        check(bank, leases, gone)
    for lease in leases.values():
        bank.release(lease)
    bank.prefetch([])
    bank.prefetch([], owner=bank)
    bank.prefetch([], owner=base)
    # With nothing held, every set that can fit comes in a bounded number of steps.
    for handle in handles:
        bank.load_all()
        for _ in range(40):
            lease = bank.acquire([handle])
            if lease is not None:
                bank.release(lease)
                break
            bank.step()
        else:
            raise AssertionError(f"{handle.key} never came")
    bank.close()
    assert bank.counters.device_bytes == bank.counters.host_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 7))
def test_what_stays_is_what_a_plain_lru_keeps(
    stepped: Callable[..., Any], many_folders: list[Path], uses: list[int], room: int, pinned: int
) -> None:
    bank = stepped(device_experts=room + 1)
    handles = [bank.add(f"e{index}", folder) for index, folder in enumerate(many_folders[:8])]
    bank.pin(f"e{pinned}")
    bank.load_all()
    kept: list[int] = []
    misses = 0
    for use in uses:
        lease = bank.acquire([handles[use]])
        if lease is None:
            bank.load_all()
            lease = bank.acquire([handles[use]])
        bank.release(lease)
        if use != pinned:
            misses += use not in kept
            kept = [*(each for each in kept if each != use), use][-room:]
        resident = {version.handle.key for version in bank._tiers.device}
        assert resident == {f"e{index}" for index in {*kept, pinned}}
    assert bank.counters.misses == misses and bank.counters.hits == len(uses) - misses
    bank.close()


def test_an_expert_that_waits_for_room_gets_it_though_others_never_stop(
    make_bank: Callable[..., Any], many_folders: list[Path]
) -> None:
    """Two requests take turns on the only place, so that it is never free; a third gets it all the same."""
    bank = make_bank(stepped=True, device_experts=1, patience=5)
    a, b = (bank.add(key, folder) for key, folder in zip("ab", many_folders, strict=False))
    bank.acquire([a])
    bank.load_all()
    held = [bank.acquire([a])]
    taken = 0
    while bank.acquire([b]) is None:
        bank.load_all()
        lease = bank.acquire([a])
        if lease is not None:
            held.append(lease)
            taken += 1
        bank.release(held.pop(0))
        if not held:
            bank.load_all()
        assert taken <= 5
    assert taken == 5
    bank.close()


def test_two_sessions_that_poll_for_one_place_both_get_it(
    make_bank: Callable[..., Any], many_folders: list[Path]
) -> None:
    class Session:
        pass

    bank = make_bank(stepped=True, device_experts=2)
    pairs = [[bank.add(f"{name}{i}", many_folders[2 * n + i]) for i in range(2)] for n, name in enumerate("ab")]
    sessions, served = [Session(), Session()], [0, 0]
    for turn in range(40):
        which = turn % 2
        bank.prefetch(pairs[which], owner=sessions[which])
        lease = bank.acquire(pairs[which])
        if lease is not None:
            served[which] += 1
            bank.prefetch([], owner=sessions[which])
            bank.release(lease)
        bank.step()
    assert min(served) >= 5
    bank.close()


def test_those_who_wait_get_their_turn(make_bank: Callable[..., Any], many_folders: list[Path]) -> None:
    bank = make_bank(device_experts=2)
    handles = [bank.add(f"e{index}", folder) for index, folder in enumerate(many_folders)]
    first = bank.wait(handles[:2])
    served: list[int] = []
    lock = threading.Lock()

    def wait(index: int) -> None:
        with bank.wait(handles[index : index + 2]) as lease, lock:
            served.append(index)
            assert [adapter.key for adapter in lease.adapters] == [f"e{index}", f"e{index + 1}"]

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(0, 10, 2)]
    for thread in threads:
        thread.start()
    bank.release(first)
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(served) == [0, 2, 4, 6, 8]


def test_threads_that_lease_replace_remove_and_fail(
    make_bank: Callable[..., Any], many_folders: list[Path], make_folder: Callable[..., Path]
) -> None:
    bank = make_bank(device_experts=4, host_bytes=adapter_bytes(4))
    names = [f"e{index}" for index in range(8)]
    for name, folder in zip(names, many_folders, strict=False):
        bank.add(name, folder)
    broken = bank.add("broken", make_folder("broken", 50, rank=6))
    make_folder("broken", 51)
    wrong: list[str] = []

    def work(seed: int) -> None:
        r = random.Random(seed)
        try:
            for turn in range(40):
                handles = [bank.resolve(name) for name in r.sample(names, r.randint(1, 3))]
                with bank.wait(handles, timeout=60) as lease:
                    found = [(adapter.key, adapter.fingerprint) for adapter in lease.adapters]
                    if found != [(handle.key, handle.fingerprint) for handle in handles]:
                        wrong.append("mixed")
                if turn % 10 == seed % 10:
                    bank.add(r.choice(names), r.choice(many_folders))
                    bank.prefetch([bank.resolve(r.choice(names))], owner=threading.current_thread())
                    try:
                        bank.wait([broken])
                    except XpertError as error:
                        if "broken" not in str(error):
                            wrong.append(str(error))
                    bank.prefetch([], owner=threading.current_thread())
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    for name in names:
        bank.remove(name)
    bank.remove("broken")
    counters = bank.counters
    assert counters.hits + counters.misses >= 4 * 40
    assert counters.experts == counters.device_bytes == counters.host_bytes == 0


@pytest.mark.parametrize("storage", ["native", "int8"])
def test_a_thousand_experts_on_a_device_that_holds_eight(
    make_bank: Callable[..., Any], many_folders: list[Path], storage: str
) -> None:
    bank = make_bank(device_experts=8, host_bytes=adapter_bytes(20), storage=storage)
    handles = [bank.add(f"e{index:04}", many_folders[index % 12]) for index in range(1000)]
    most = 0
    for start in range(0, 1000, 8):
        with bank.wait(handles[start : start + 8]) as lease:
            assert [adapter.key for adapter in lease.adapters] == [f"e{index:04}" for index in range(start, start + 8)]
            counters = bank.counters
            most = max(most, counters.device_bytes)
            assert counters.resident <= 8 and counters.host_bytes <= adapter_bytes(20)
    counters = bank.counters
    assert most <= adapter_bytes(24) and (counters.experts, counters.uploads, counters.misses) == (1000, 1000, 1000)
