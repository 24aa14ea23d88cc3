"""Blobs in host memory: within the budget, gone from the process when they leave."""

import mmap
import os
import threading
from pathlib import Path

import pytest

from agnostic_cache import open_storage
from agnostic_cache.blob.safetensors import Part, Parts
from agnostic_cache.errors import InvalidKeyError, StorageError, UnknownPolicyError
from agnostic_cache.eviction import FIFOEvictor, PutStatus
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


@pytest.mark.parametrize("budget", ["4MiB", "600KB"], ids=["room for both", "room for one"])
def test_an_entry_is_there_while_it_is_overwritten(budget: str) -> None:
    storage = MemoryStorage(budget)
    blobs = [bytes([i]) * 400_000 for i in range(8)]
    assert storage.put("a", blobs[0]) is PutStatus.LEGAL
    stop, wrong, looked = threading.Event(), list[object](), list[int]()

    def read() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            if not storage.contains("a"):
                wrong.append("it is not there")
            found = storage.get("a")
            if found is None or found.nbytes != 400_000 or found[0] != found[-1]:
                wrong.append(found)
            del found
        looked.append(count)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(1500):
        storage.put("a", blobs[i % 8])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert sum(looked) > 100
    assert storage.stats().misses == 0


def test_who_overwrites_an_entry_does_not_wait_for_himself() -> None:
    seen: list[object] = []

    def pieces() -> list[memoryview]:
        seen.append((storage.get("a"), storage.contains("a")))
        return [memoryview(b"new")]

    storage = MemoryStorage(MIB)
    storage.put("a", b"old")
    storage.put("a", Parts([Part("x", "U8", (3,), 3, pieces)], {}, algorithm=None))
    assert seen == [(None, False)]
    assert b"new" in (read(storage, "a") or b"")


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


class TestReserving:
    """A blob that is received where it will stay."""

    def test_it_is_there_once_it_is_published(self) -> None:
        storage = MemoryStorage("1MiB")
        storage.put("a", b"old")
        room = storage.reserve(5)
        assert room is not None
        room.buffer[:] = b"fresh"
        assert read(storage, "a") == b"old"
        assert room.publish("a") is PutStatus.LEGAL
        assert read(storage, "a") == b"fresh"
        assert storage.stats().current_bytes == mmap.PAGESIZE

    def test_once_only(self) -> None:
        storage = MemoryStorage("1MiB")
        room, other = storage.reserve(5), storage.reserve(5)
        assert room is not None
        assert other is not None
        with pytest.raises(InvalidKeyError):
            room.publish(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        room.publish("a")
        room.drop()
        assert read(storage, "a") == bytes(5)
        other.drop()
        for ended in (room, other):
            with pytest.raises(StorageError):
                ended.publish("b")
        storage.close()
        with pytest.raises(StorageError):
            storage.reserve(1)

    def test_what_never_comes_costs_nobody_his_entry(self) -> None:
        storage = MemoryStorage(4 * MIB)
        for key in "abcd":
            storage.put(key, bytes(MIB))
        for _ in range(3):
            room = storage.reserve(4 * MIB)
            assert room is not None
            room.drop()
        assert storage.list_keys() == ["a", "b", "c", "d"]

    def test_what_comes_lets_the_oldest_go(self) -> None:
        storage = MemoryStorage(4 * MIB)
        for key in "abcd":
            storage.put(key, bytes(MIB))
        rooms = [storage.reserve(MIB) for _ in range(2)]
        assert [room and room.publish(key) for room, key in zip(rooms, "ef", strict=True)] == [PutStatus.LEGAL] * 2
        assert storage.list_keys() == ["c", "d", "e", "f"]
        assert storage.stats().evictions == 2

    def test_the_budget_holds_but_for_a_little(self) -> None:
        storage = MemoryStorage(40 * MIB)
        for i in range(40):
            storage.put(str(i), bytes(MIB))
        held = [storage.reserve(8 * MIB) for _ in range(9)]
        taken = [room for room in held if room is not None]
        assert len(taken) == 7  # 56 MiB: the budget, and 16 more
        assert storage.stats().current_bytes == 0
        for i, room in enumerate(taken):
            room.publish(str(i))
            assert storage.stats().current_bytes <= 40 * MIB
        assert storage.list_keys() == ["2", "3", "4", "5", "6"]
        assert storage.reserve(41 * MIB) is None
        assert len(storage.list_keys()) == 5

    def test_what_is_read_does_not_leave_for_it(self) -> None:
        storage = MemoryStorage(4 * MIB)
        for key in "abcd":
            storage.put(key, bytes(MIB))
        read_now = [storage.get(key) for key in "abcd"]
        room = storage.reserve(MIB)
        assert room is not None
        assert room.publish("e") is PutStatus.ILLEGAL
        assert storage.list_keys() == ["a", "b", "c", "d"]
        del read_now

    def test_threads_that_put_and_receive_one_key(self) -> None:
        def put(i: int) -> None:
            for _ in range(200):
                storage.put("a", bytes([i]) * 20_000)

        def receive(i: int) -> None:
            for _ in range(200):
                room = storage.reserve(20_000)
                assert room is not None
                room.buffer[:] = bytes([i]) * 20_000
                room.publish("a")
                found = storage.get("a")  # not there while somebody overwrites it
                assert found is None or bytes(found) == bytes([found[0]]) * 20_000

        storage = MemoryStorage(10 * MIB)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4) for work in (put, receive)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (storage.stats().entries, storage.stats().current_bytes) == (1, 5 * mmap.PAGESIZE)
