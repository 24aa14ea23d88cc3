"""Blobs in host memory: within the budget, gone from the process when they leave."""

import os
import threading
from pathlib import Path

import pytest

from agnostic_cache import open_storage
from agnostic_cache.errors import UnknownPolicyError
from agnostic_cache.eviction import FIFOEvictor, PutStatus
from agnostic_cache.state.safetensors import Part, Parts
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read

MIB = 1024 * 1024


class TestMemoryStorage(StorageSuite):
    def make(self, place: Path, max_bytes: int | None = None) -> MemoryStorage:  # noqa: ARG002
        return MemoryStorage(max_bytes or "1GiB")


class TestFirstInFirstOut(StorageSuite):
    """Any policy will do, but for what the suite says of the one that is used by default."""

    def make(self, place: Path, max_bytes: int | None = None) -> MemoryStorage:  # noqa: ARG002
        return MemoryStorage(max_bytes or "1GiB", evictor=FIFOEvictor())

    def test_what_was_used_last_stays(self, tmp_path: Path) -> None:
        storage = self.make(tmp_path, 3 * MIB)
        for key in "abc":
            storage.put(key, bytes(MIB))
        storage.get("a")
        storage.put("d", bytes(MIB))
        assert storage.list_keys() == ["b", "c", "d"]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_goes_back_to_the_system() -> None:
    storage, blob = MemoryStorage("1GiB"), b"x" * MIB
    for size in (MIB, 3 * MIB // 2, 16 * 1024):  # blocks of every kind
        before = resident()
        count = 64 * MIB // size
        for i in range(count):
            storage.put(str(i), memoryview(blob * 2)[:size])
        filled = resident()
        assert filled - before > 0.9 * 64 * MIB
        for i in range(count):
            storage.remove(str(i))
        assert filled - resident() >= 0.95 * 64 * MIB


def test_get_copies_nothing_and_eviction_passes_over_what_is_read() -> None:
    storage = MemoryStorage(3 * MIB)
    for key in "abc":
        storage.put(key, key.encode() * MIB)
    held = storage.get("a")
    before = resident()
    views = [storage.get("a") for _ in range(100)]
    assert resident() - before < MIB
    assert storage.put("d", b"d" * MIB) is PutStatus.LEGAL
    assert storage.list_keys() == ["c", "a", "d"]
    assert all(view == held for view in views)
    assert read(storage, "a") == b"a" * MIB


def test_where_all_is_read_nothing_comes_in() -> None:
    storage = MemoryStorage(2 * MIB)
    storage.put("a", bytes(MIB))
    storage.put("b", bytes(MIB))
    held = [storage.get("a"), storage.get("b")]
    assert storage.put("c", bytes(MIB)) is PutStatus.ILLEGAL
    assert sorted(storage.list_keys()) == ["a", "b"]
    held.clear()
    assert storage.put("c", bytes(MIB)) is PutStatus.LEGAL


def test_what_left_and_is_read_counts_until_its_last_reader_lets_go() -> None:
    storage = MemoryStorage(2 * MIB)
    storage.put("a", bytes(MIB))
    held = storage.get("a")
    assert held is not None
    part = held[10:20]
    storage.remove("a")
    assert (storage.stats().current_bytes, storage.stats().deferred_bytes) == (0, MIB)
    assert storage.put("b", bytes(2 * MIB)) is PutStatus.ILLEGAL
    del held
    assert storage.put("b", bytes(2 * MIB)) is PutStatus.ILLEGAL
    del part
    assert storage.stats().deferred_bytes == 0
    assert storage.put("b", bytes(2 * MIB)) is PutStatus.LEGAL


def test_a_put_that_fails_leaves_the_accounts_exact() -> None:
    def pieces() -> list[memoryview]:
        raise KeyboardInterrupt

    storage = MemoryStorage(2 * MIB)
    storage.put("a", bytes(MIB))
    storage.put("b", bytes(MIB))
    with pytest.raises(KeyboardInterrupt):
        storage.put("c", Parts([Part("x", "U8", (MIB // 2,), MIB // 2, pieces)], {}, algorithm=None))
    assert storage.list_keys() == ["b"]
    assert storage.put("c", bytes(MIB)) is PutStatus.LEGAL
    assert storage.list_keys() == ["b", "c"]
    assert storage.stats().current_bytes == 2 * MIB


def test_two_puts_of_one_key_copy_once() -> None:
    copying, go_on = threading.Event(), threading.Event()

    def pieces() -> list[memoryview]:
        copying.set()
        assert go_on.wait(10)
        return [memoryview(b"x" * 100)]

    storage = MemoryStorage(MIB)
    slow = Parts([Part("x", "U8", (100,), 100, pieces)], {}, algorithm=None)
    thread = threading.Thread(target=storage.put, args=("a", slow))
    thread.start()
    assert copying.wait(10)
    assert storage.put("a", b"other") is PutStatus.LEGAL
    assert storage.get("a") is None  # not there yet, and nobody waits
    go_on.set()
    thread.join()
    assert read(storage, "a") == bytes(slow)


def test_a_policy_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnknownPolicyError):
        open_storage("memory://?evictor=nobody")
