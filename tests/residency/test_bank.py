"""The bank in its plain use: what is loaded, leased, evicted, replaced, refused."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable, XpertError
from xpert.experts.adapters import Adapter, read_adapter
from xpert.experts.engines._bank import AdapterBank

SIZE = 2 * 4 * 2 * (64 + 96)
"""Bytes of a rank-2 adapter of the stand-in base."""


def test_a_lease_holds_the_adapter_as_the_files_have_it(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path], base: Any
) -> None:
    bank, folder = make_bank(), make_folder("a", 1)
    handle = bank.add("a", folder)
    exact = read_adapter("a", folder, base)
    assert (handle.key, handle.fingerprint, handle.device_bytes) == ("a", exact.fingerprint, SIZE)
    with bank.wait([handle, handle]) as lease:
        first, second = lease.adapters
        assert first is second
        for name, module in exact.modules.items():
            assert torch.equal(first.modules[name].a, module.a) and torch.equal(first.modules[name].b, module.b)
    assert bank.counters.resident == bank.counters.misses == 1


def test_acquire_says_no_at_once_and_has_it_loaded(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    bank = make_bank(stepped=True, host_bytes=0)
    handle = bank.add("a", make_folder("a"))
    assert bank.acquire([handle]) is None and bank.counters.loads == 0
    assert bank.step() and not bank.step()
    lease = bank.acquire([handle])
    assert [adapter.key for adapter in lease.adapters] == ["a"]
    bank.release(lease)
    bank.release(lease)
    assert bank.acquire([]).adapters == ()
    counters = bank.counters
    assert (counters.hits, counters.misses, counters.loads, counters.uploads) == (0, 1, 1, 1)
    bank.acquire([handle])
    assert bank.counters.hits == 1


def test_the_least_recently_used_makes_room(make_bank: Callable[..., Any], many_folders: list[Path]) -> None:
    gone: list[str] = []
    bank = make_bank(stepped=True, device_experts=2, on_evict=lambda adapter: gone.append(adapter.key))
    handles = {key: bank.add(key, folder) for key, folder in zip("abcd", many_folders, strict=False)}

    def use(key: str) -> None:
        lease = bank.acquire([handles[key]])
        if lease is None:
            bank.load_all()
            lease = bank.acquire([handles[key]])
        bank.release(lease)

    for key in "abacbd":
        use(key)
    assert gone == ["b", "a", "c"]
    bank.pin("b")
    use("a")
    use("c")
    assert gone == ["b", "a", "c", "d", "a"]


def test_leased_and_pinned_adapters_stay(make_bank: Callable[..., Any], many_folders: list[Path]) -> None:
    bank = make_bank(stepped=True, device_experts=3)
    a, b, c, d = (bank.add(key, folder) for key, folder in zip("abcd", many_folders, strict=False))
    bank.pin("a")
    bank.load_all()
    assert bank.acquire([b, c]) is None
    bank.load_all()
    lease = bank.acquire([b, c])
    assert bank.acquire([d]) is None and bank.load_all() == 0
    bank.release(lease)
    assert bank.load_all() == 1 and bank.acquire([d]) is not None and bank.acquire([a]) is not None


def test_prefetch_loads_in_order_and_later_wants_never_evict_earlier_ones(
    make_bank: Callable[..., Any], many_folders: list[Path]
) -> None:
    bank = make_bank(stepped=True, device_experts=2, host_bytes=0)
    a, b, c, d = (bank.add(key, folder) for key, folder in zip("abcd", many_folders, strict=False))
    bank.prefetch([a, b, c, d])
    assert bank.load_all() == 2
    bank.prefetch([c, a])  # replaces the earlier list: b is wanted no longer
    assert bank.load_all() == 1
    lease = bank.acquire([c, a])
    assert lease is not None and bank.counters.evictions == 1
    bank.release(lease)
    bank.prefetch([d, c, a])  # ahead of what is there: the last wanted leaves
    bank.load_all()
    assert bank.acquire([a]) is None and bank.acquire([d, c]) is not None


def test_what_finds_no_room_on_the_device_is_loaded_to_host_memory(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    bank = make_bank(stepped=True, device_experts=1, host_bytes=2 * SIZE)
    bank.add("z", make_folder("z", 9))
    bank.add("y", make_folder("y", 8))  # fill host memory while adding
    handles = [bank.add(key, make_folder(key, seed)) for seed, key in enumerate("abcd")]
    assert bank.counters.in_host == 2
    bank.prefetch(handles)
    assert bank.load_all() == 3  # a on the device, b and c in host memory; d finds no room that b and c leave
    counters = bank.counters
    assert (counters.resident, counters.host_bytes, counters.loads) == (1, 2 * SIZE, 5)
    bank.release(bank.acquire(handles[:1]))
    bank.prefetch(handles[1:])
    bank.load_all()
    bank.release(bank.acquire(handles[1:2]))
    assert bank.counters.loads == 6  # b came from host memory; its room there was d's


def test_both_tiers_of_a_cpu_are_the_same_tensors_counted_once(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    bank = make_bank(stepped=True, device_experts=1)
    a, b = bank.add("a", make_folder("a", 1)), bank.add("b", make_folder("b", 2))
    assert (bank.counters.host_bytes, bank.counters.device_bytes) == (2 * SIZE, 0)
    for handle in (a, b):
        bank.acquire([handle])
        bank.load_all()
        first = bank.acquire([handle])
        counters = bank.counters
        assert (counters.host_bytes, counters.device_bytes, counters.bytes_uploaded) == (SIZE, SIZE, 0)
        assert (counters.in_host, counters.resident) == (2, 1)
        bank.release(first)


def test_adding_the_same_again_changes_nothing_and_other_content_replaces_it(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    gone: list[Adapter] = []
    bank = make_bank(on_evict=gone.append)
    old = bank.add("a", make_folder("first", 1), pinned=True)
    lease = bank.wait([old])
    assert bank.add("a", make_folder("again", 1)) == old and bank.counters.experts == 1
    new = bank.add("a", make_folder("second", 2))
    assert new != old and bank.resolve("a") == new and not gone
    assert bank.wait([new]).adapters[0].fingerprint == new.fingerprint
    # A request that was resolved before the exchange still gets what it was resolved to.
    assert bank.wait([old]).adapters[0] is lease.adapters[0]
    bank.release(lease)
    assert not gone  # the second lease


def test_a_replaced_or_removed_version_leaves_with_its_last_lease(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    gone: list[str] = []
    bank = make_bank(on_evict=lambda adapter: gone.append(adapter.key))
    handle = bank.add("a", make_folder("a", 1))
    lease = bank.wait([handle])
    tensor = weakref.ref(lease.adapters[0].modules["up"].a)
    bank.remove("a")
    with pytest.raises(NotFound, match="unknown expert 'a'"):
        bank.resolve("a")
    assert not gone and bank.counters.experts == 0
    bank.release(lease)
    assert gone == ["a"]
    del lease
    gc.collect()
    assert tensor() is None
    counters = bank.counters
    assert (counters.device_bytes, counters.host_bytes, counters.resident, counters.in_host) == (0, 0, 0, 0)


def test_a_request_resolved_before_the_removal_is_still_served(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    bank = make_bank(stepped=True)
    handle = bank.add("a", make_folder("a", 1))
    bank.remove("a")
    assert bank.acquire([handle]) is None
    bank.load_all()
    lease = bank.acquire([handle])
    assert lease is not None
    bank.release(lease)
    assert bank.counters.resident == bank.counters.in_host == 0


@pytest.mark.parametrize("harm", ["replaced", "removed", "damaged", "unreadable"])
def test_a_load_that_fails_fails_alone(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path], harm: str
) -> None:
    bank = make_bank(stepped=True, host_bytes=0)
    folder = make_folder("a", 1)
    a, b = bank.add("alpha", folder), bank.add("beta", make_folder("b", 2))
    weights = folder / "adapter_model.safetensors"
    if harm == "replaced":
        make_folder("a", 3)
    elif harm == "removed":
        shutil.rmtree(folder)
    elif harm == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.unlink()
        weights.mkdir()
    bank.prefetch([a, b])
    bank.load_all()
    kind = {"replaced": Corrupt, "removed": NotFound, "damaged": Corrupt, "unreadable": XpertError}[harm]
    assert bank.acquire([a, b]) is None and bank.failure([b]) is None
    for _ in range(2):  # while a list names it, all who ask hear of it
        failure = bank.failure([b, a])
        assert isinstance(failure, kind) and "alpha" in str(failure) and str(folder) in str(failure)
    assert bank.acquire([b]) is not None
    bank.prefetch([b])
    assert bank.failure([a]) is None
    if harm == "unreadable":
        weights.rmdir()
    make_folder("a", 1)  # mended: a later attempt finds it
    assert bank.acquire([a]) is None
    bank.load_all()
    assert bank.acquire([a]) is not None


def test_a_wait_raises_what_the_load_met(make_bank: Callable[..., Any], make_folder: Callable[..., Path]) -> None:
    bank = make_bank(host_bytes=0)
    handle = bank.add("a", make_folder("a", 1))
    make_folder("a", 2)
    for _ in range(2):
        with pytest.raises(Corrupt, match="'a' have changed since it was added"):
            bank.wait([handle])
    assert bank.wait([bank.add("a", make_folder("a", 2))]).adapters[0].key == "a"


def test_what_can_never_fit_is_refused_by_name(make_bank: Callable[..., Any], make_folder: Callable[..., Path]) -> None:
    bank = make_bank(device_bytes=2 * SIZE, device_experts=5)
    a, b, c = (bank.add(key, make_folder(key, seed)) for seed, key in enumerate(("red", "green", "blue")))
    bank.fits([a, b])
    bank.fits([a, a, b])
    bank.fits([])
    for call in (bank.fits, bank.acquire, bank.wait):
        with pytest.raises(BadInput, match=r"'red', 'green', 'blue' take 7,680 bytes .* holds 5,120 bytes and 5 exp"):
            call([a, b, c])
    bank.pin("blue")
    with pytest.raises(BadInput, match="they never fit beside the pinned 'blue'"):
        bank.wait([a, b])
    bank.pin("red")
    with pytest.raises(BadInput, match="pinned experts 'blue', 'green', 'red' take 7,680 bytes"):
        bank.pin("green")
    with pytest.raises(BadInput, match="pinned experts"):
        bank.add("grey", make_folder("grey", 7), pinned=True)
    assert "grey" not in bank.experts
    bank.unpin("blue")
    bank.fits([a, b])


def test_a_pin_that_leaves_no_room_ends_the_wait_for_it(
    make_bank: Callable[..., Any], many_folders: list[Path]
) -> None:
    bank = make_bank(stepped=True, device_experts=2)
    a, b, _ = (bank.add(key, folder) for key, folder in zip("abc", many_folders, strict=False))
    waiting, errors = threading.Event(), []

    def wait() -> None:
        waiting.set()
        with pytest.raises(BadInput) as raised:
            bank.wait([a, b])
        errors.append(str(raised.value))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    bank.pin("c")
    thread.join()
    assert "never fit beside the pinned 'c'" in errors[0]
    assert bank.load_all() == 1


def test_unknown_keys_name_the_nearest(make_bank: Callable[..., Any], make_folder: Callable[..., Path]) -> None:
    bank = make_bank()
    bank.add("poetry", make_folder("a"))
    for call in (bank.resolve, bank.remove, bank.pin, bank.unpin, bank.storage):
        with pytest.raises(NotFound, match=r"unknown expert 'poetri'\. Did you mean 'poetry'"):
            call("poetri")


def test_add_checks_the_adapter(make_bank: Callable[..., Any], make_folder: Callable[..., Path]) -> None:
    bank = make_bank()
    with pytest.raises(BadInput, match="DoRA"):
        bank.add("a", make_folder("a", use_dora=True))
    with pytest.raises(NotFound, match="no such adapter folder"):
        bank.add("a", Path("nowhere"))
    assert bank.counters.experts == 0


def test_a_wait_that_takes_too_long_ends(make_bank: Callable[..., Any], make_folder: Callable[..., Path]) -> None:
    bank = make_bank(stepped=True)
    handle = bank.add("a", make_folder("a"))
    with pytest.raises(Unavailable, match="'a' did not come to the device within 0 seconds"):
        bank.wait([handle], timeout=0)
    assert bank.load_all() == 0  # nobody wants it any more


def test_closing_ends_waits_and_the_thread(make_bank: Callable[..., Any], many_folders: list[Path]) -> None:
    gone: list[str] = []
    bank = make_bank(device_experts=1, on_evict=lambda adapter: gone.append(adapter.key))
    a, b = (bank.add(key, folder) for key, folder in zip("ab", many_folders, strict=False))
    lease = bank.wait([a])
    waiting, errors = threading.Event(), []

    def wait() -> None:
        waiting.set()
        with pytest.raises(Unavailable, match="closed") as raised:
            bank.wait([b])
        errors.append(raised.value)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    loader = bank._thread
    bank.close()
    bank.close()
    thread.join()
    assert errors and not loader.is_alive() and gone == ["a"] and lease.adapters[0].key == "a"
    bank.release(lease)
    with pytest.raises(Unavailable, match="closed"):
        bank.acquire([a])
    assert bank.counters.device_bytes == bank.counters.host_bytes == 0


def test_a_bank_nobody_holds_ends_its_thread(base: Any, make_folder: Callable[..., Path]) -> None:
    bank = AdapterBank(base)
    bank.release(bank.wait([bank.add("a", make_folder("a"))]))
    thread = bank._thread
    del bank
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_an_exception_of_on_evict_reaches_the_caller_and_kills_nothing(
    make_bank: Callable[..., Any], many_folders: list[Path]
) -> None:
    def refuse(adapter: Adapter) -> None:
        raise ZeroDivisionError(adapter.key)

    bank = make_bank(device_experts=1, on_evict=refuse)
    a, b = (bank.add(key, folder) for key, folder in zip("ab", many_folders, strict=False))
    bank.release(bank.wait([a]))
    with pytest.raises(XpertError, match="'b' could not be loaded: ZeroDivisionError") as raised:
        bank.wait([b])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert bank.wait([b]).adapters[0].key == "b"  # a is gone all the same
    with pytest.raises(ZeroDivisionError):
        bank.close()


def test_overwriting_the_files_leaves_what_is_served_as_it_was(
    make_bank: Callable[..., Any], make_folder: Callable[..., Path]
) -> None:
    bank = make_bank()
    folder = make_folder("a", 1)
    lease = bank.wait([bank.add("a", folder)])
    before = {name: module.a.clone() for name, module in lease.adapters[0].modules.items()}
    content = (folder / "adapter_model.safetensors").read_bytes()
    with open(folder / "adapter_model.safetensors", "r+b") as stream:
        stream.write(content[:400] + bytes(len(content) - 400))
    assert all(torch.equal(lease.adapters[0].modules[name].a, tensor) for name, tensor in before.items())
