"""Several storages as one: nothing waits for the slow ones, nothing that was put is lost by flushing and closing."""

import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest

from agnostic_cache.blob.pieces import Blob
from agnostic_cache.errors import StorageBusyError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.tiered import TieredStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read

MIB = 1024 * 1024


class TestTwoMemories(StorageSuite):
    bounded = False  # the budgets are the tiers' own

    def make(self, place: Path, max_bytes: int | None = None) -> TieredStorage:  # noqa: ARG002
        return TieredStorage([MemoryStorage("1GiB"), MemoryStorage("1GiB")])


class TestMemoryBeforeFiles(StorageSuite):
    outlives = True
    bounded = False

    def make(self, place: Path, max_bytes: int | None = None) -> TieredStorage:  # noqa: ARG002
        return TieredStorage([MemoryStorage(300_000), FileStorage(place / "kv")])


class TestWrittenThrough(StorageSuite):
    outlives = True
    bounded = False

    def make(self, place: Path, max_bytes: int | None = None) -> TieredStorage:  # noqa: ARG002
        return TieredStorage([MemoryStorage(300_000), FileStorage(place / "kv")], write_through=[1])


class Gated(MemoryStorage):
    """A storage that writes only when it is let, takes time to read by a clock of its own, and notes what is asked."""

    def __init__(self, clock: list[float] | None = None, seconds: float = 0.0) -> None:
        super().__init__("1GiB")
        self.gate = threading.Event()
        self.gate.set()
        self.clock, self.seconds = clock if clock is not None else [0.0], seconds
        self.batches: list[list[str]] = []
        self.questions = self.removals = 0

    def put(self, key: str, blob: Blob) -> PutStatus:
        assert self.gate.wait(20)
        return super().put(key, blob)

    def remove(self, key: str) -> bool:
        self.removals += 1
        return super().remove(key)

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        self.batches.append(list(keys))
        found = [self.get(key) for key in keys]
        self.clock[0] += self.seconds * len(keys)
        return found

    def put_many(self, blobs: dict[str, Blob]) -> list[PutStatus]:
        return [self.put(key, blob) for key, blob in blobs.items()]

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        self.questions += 1
        return [self.contains(key) for key in keys]


def test_a_put_does_not_wait_for_lower_tiers() -> None:
    slow = Gated()
    slow.gate.clear()
    with TieredStorage([MemoryStorage("1GiB"), slow]) as storage:
        for i in range(20):
            assert storage.put(f"key {i}", bytes([i]) * 1000) is PutStatus.LEGAL
            assert read(storage, f"key {i}") == bytes([i]) * 1000
        assert slow.list_keys() == []
        slow.gate.set()
        storage.flush()
        assert sorted(slow.list_keys()) == sorted(f"key {i}" for i in range(20))


def test_what_waits_to_be_written_is_not_evicted_and_closing_loses_nothing(tmp_path: Path) -> None:
    source = random.Random(0)
    blobs = {f"key {i}": source.randbytes(100_000) for i in range(40)}
    with TieredStorage([MemoryStorage(MIB), FileStorage(tmp_path)]) as storage:
        for key, blob in blobs.items():
            assert storage.put(key, blob) is PutStatus.LEGAL
    with FileStorage(tmp_path) as files:
        assert {key: read(files, key) for key in files.list_keys()} == blobs


def test_what_is_too_large_for_the_first_tier_goes_to_the_next(tmp_path: Path) -> None:
    with TieredStorage([MemoryStorage(10_000), FileStorage(tmp_path)]) as storage:
        assert storage.put("a", bytes(50_000)) is PutStatus.LEGAL
        storage.flush()
        assert read(storage, "a") == bytes(50_000)


def test_no_more_waits_than_is_allowed() -> None:
    slow = Gated()
    slow.gate.clear()
    with TieredStorage([MemoryStorage("1GiB"), slow], max_pending_bytes=10_000) as storage:
        for i in range(20):
            assert storage.put(f"key {i}", bytes(1000)) is PutStatus.LEGAL
            assert storage.tier_stats()[1].pending_bytes <= 10_000
        slow.gate.set()
        storage.flush()
        assert (len(slow.list_keys()), storage.tier_stats()[1].skipped) == (10, 10)


def test_what_a_slow_tier_did_not_get_costs_it_one_question_and_not_one_removal_each() -> None:
    slow = Gated()
    with TieredStorage([MemoryStorage("1GiB"), slow], max_pending_bytes=1000) as storage:
        for key in ("key 7", "key 70"):
            storage.put(key, b"old")
        storage.flush()
        slow.gate.clear()
        storage.put("first", bytes(1000))
        for i in range(500):
            assert storage.put(f"key {i}", bytes(1000)) is PutStatus.LEGAL
            storage.put("key 9", bytes(1000))
        assert read(storage, "key 7") == bytes(1000)
        asked = slow.questions
        slow.gate.set()
        storage.flush()
        assert sorted(slow.list_keys()) == ["first"]
        assert (slow.questions - asked, slow.removals) == (1, 2)
        assert storage.put("key 7", b"new") is PutStatus.LEGAL
        storage.flush()
        assert read(slow, "key 7") == b"new"


def test_of_what_waits_under_one_key_the_last_is_written() -> None:
    slow = Gated()
    slow.gate.clear()
    with TieredStorage([MemoryStorage("1GiB"), slow], max_pending_bytes=2500) as storage:
        for i in range(100):
            storage.put("a", bytes([i]) * 1000)
            assert storage.tier_stats()[1].pending_bytes <= 2000  # one that is being written, and one that waits
        slow.gate.set()
        storage.flush()
        assert read(slow, "a") == bytes([99]) * 1000
        assert slow.stats().puts <= 2
        assert storage.tier_stats()[1].skipped == 0


def test_a_finaliser_on_the_thread_that_writes_does_not_wait_for_it() -> None:
    class Session: ...

    class Dropping(MemoryStorage):
        def put(self, key: str, blob: Blob) -> PutStatus:
            weakref.finalize(Session(), remove, key)  # nobody else holds the session: it ends here, on this thread
            return super().put(key, blob)

    def remove(key: str) -> None:
        with pytest.raises(StorageBusyError):
            storage.remove(key)
        refused.append(key)

    refused: list[str] = []
    storage = TieredStorage([MemoryStorage("1GiB"), Dropping("1GiB")])
    storage.put("a", b"1")
    flushing = threading.Thread(target=storage.flush, daemon=True)
    flushing.start()
    flushing.join(20)
    assert not flushing.is_alive()
    assert refused == ["a"]
    storage.close()


def test_a_finaliser_in_the_middle_of_a_call_does_not_wait_for_who_writes() -> None:
    class Interrupted(Gated):
        def get(self, key: str) -> memoryview | None:
            for call in (lambda: storage.remove("a"), storage.flush, storage.close):
                with pytest.raises(StorageBusyError):
                    call()
            interrupted.append(key)
            return super().get(key)

    interrupted: list[str] = []
    slow = Interrupted()
    slow.gate.clear()
    storage = TieredStorage([MemoryStorage("1GiB"), slow])
    storage.put("a", b"1")  # waits to be written
    reading = threading.Thread(target=storage.get, args=("b",), daemon=True)
    reading.start()
    reading.join(20)
    slow.gate.set()
    assert interrupted == ["b"]
    assert storage.remove("a")  # nobody is interrupted
    storage.close()


def test_legal_means_that_a_tier_has_it_or_that_it_waits_for_one() -> None:
    first, second = MemoryStorage("64KiB"), Gated()
    with TieredStorage([first, second], max_pending_bytes=1000) as storage:
        second.gate.clear()
        storage.put("waiting", bytes(1000))
        assert storage.put("in the first", bytes(1000)) is PutStatus.LEGAL
        assert storage.put("in none", bytes(100_000)) is PutStatus.ILLEGAL
        second.gate.set()
        storage.flush()
        assert storage.contains_many(["waiting", "in the first", "in none"]) == [True, True, False]
        assert second.list_keys() == ["waiting"]
        assert storage.put("in the second", bytes(100_000)) is PutStatus.LEGAL
        storage.flush()
        assert second.contains("in the second")


def test_a_hit_comes_up_and_an_evicted_entry_is_in_the_next_tier(tmp_path: Path) -> None:
    top, bottom = MemoryStorage(300_000), FileStorage(tmp_path)
    with TieredStorage([top, bottom]) as storage:
        for i in range(10):
            storage.put(f"key {i}", bytes([i]) * 90_000)
            storage.flush()
        assert not top.contains("key 0")
        assert read(storage, "key 0") == bytes(90_000)
        storage.flush()
        assert top.contains("key 0")
        hits = [tier.hits for tier in storage.tier_stats()]
        assert read(storage, "key 0") == bytes(90_000)
        assert [tier.hits for tier in storage.tier_stats()] == [hits[0] + 1, hits[1]]


def test_each_tier_is_asked_once_for_a_run() -> None:
    middle, bottom = Gated(), Gated()
    for i in range(9):
        (middle if i < 6 else bottom).put(str(i), bytes([i]))
    with TieredStorage([MemoryStorage("1MiB"), middle, bottom]) as storage:
        storage.put("0", b"\x00")
        storage.flush()
        keys = [str(i) for i in range(10)]
        assert [bytes(blob) for blob in storage.load(keys)] == [bytes([i]) for i in range(9)]
        assert (middle.batches, bottom.batches) == ([["1", "2", "3", "4", "5"]], [["6", "7", "8"]])
        assert storage.contains_many(keys) == [True] * 9 + [False]


def test_prefetching_brings_a_run_up() -> None:
    top, bottom = MemoryStorage("1MiB"), Gated()
    for i in range(5):
        bottom.put(str(i), bytes([i]))
    with TieredStorage([top, bottom]) as storage:
        storage.prefetch([str(i) for i in range(7)])
        for _ in range(2):  # reading, and writing
            storage.flush()
        assert sorted(top.list_keys()) == [str(i) for i in range(5)]


def test_only_what_is_worth_it_is_loaded() -> None:
    clock = [0.0]
    top, fast, slow = MemoryStorage("1MiB"), Gated(clock, seconds=0.1), Gated(clock, seconds=2.0)
    for i in range(8):
        (fast if i < 5 else slow).put(str(i), bytes([i]))
    keys = [str(i) for i in range(8)]
    with TieredStorage([top, fast, slow], clock=lambda: clock[0]) as storage:
        assert len(storage.load(keys, seconds_per_key=1.0)) == 5  # one blob told how slow the slow one is
        storage.flush()
        before = clock[0]
        assert len(storage.load(keys, seconds_per_key=1.0)) in {5, 6}  # the first, and the one that was tried
        storage.flush()
        assert len(storage.load(keys, seconds_per_key=5.0)) == 8
        assert before < 8
        asked = len(fast.batches)
        assert storage.load(["missing", *keys], seconds_per_key=1.0) == []
        assert len(fast.batches) == asked  # nothing is read behind a gap


def test_a_tier_that_became_fast_again_is_found_out() -> None:
    clock = [0.0]
    slow = Gated(clock, seconds=2.0)
    for i in range(60):
        slow.put(str(i), b"x")
    with TieredStorage([MemoryStorage("1MiB"), slow], clock=lambda: clock[0]) as storage:
        keys = [str(i) for i in range(60)]
        assert storage.load(keys, seconds_per_key=1.0) == []
        slow.seconds = 0.1
        for _ in range(10):
            loaded = storage.load(keys[20:], seconds_per_key=1.0)
            storage.flush()
        assert len(loaded) == 40


def test_older_bytes_never_come_in_behind_newer_ones() -> None:
    top, bottom = MemoryStorage(40 * MIB), MemoryStorage("1GiB")
    with TieredStorage([top, bottom]) as storage:

        def read_on() -> None:
            while not stop.is_set():
                for i in range(8):
                    storage.get(str(i))

        stop = threading.Event()
        readers = [threading.Thread(target=read_on) for _ in range(3)]
        for reader in readers:
            reader.start()
        for version in range(60):
            for i in range(8):
                while storage.put(str(i), bytes([version]) * 50_000) is not PutStatus.LEGAL:
                    pass
                top.remove(str(i)) if version % 3 else None
        storage.flush()
        stop.set()
        for reader in readers:
            reader.join()
        storage.flush()
        for i in range(8):
            assert read(storage, str(i)) == bytes([59]) * 50_000
            assert read(top, str(i)) in {None, bytes([59]) * 50_000}


def test_a_put_waits_for_older_bytes_that_are_just_being_brought_up() -> None:
    began, overtaken = threading.Event(), threading.Event()

    class Top(MemoryStorage):
        def put(self, key: str, blob: Blob) -> PutStatus:
            if blob == b"old":
                began.set()
                overtaken.wait(0.2)  # long enough for a put that would not wait
            status = super().put(key, blob)
            if blob == b"new":
                overtaken.set()
            return status

    bottom = MemoryStorage("1MiB")
    bottom.put("a", b"old")
    with TieredStorage([Top("1MiB"), bottom]) as storage:
        storage.prefetch(["a"])
        assert began.wait(20)
        storage.put("a", b"new")
        storage.flush()
        assert read(storage, "a") == b"new"


def test_a_forked_child_starts_anew_whatever_its_parent_held(tmp_path: Path) -> None:
    program = """
import os, sys, threading
from agnostic_cache.storage.file import FileStorage
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.tiered import TieredStorage

def work():
    i = 0
    while not stop.is_set():
        storage.put(f"key {i % 20}", bytes(20_000))
        storage.get(f"key {(i + 7) % 20}")
        i += 1

stop = threading.Event()
memory = MemoryStorage("1MiB")
tiers = [memory, FileStorage(sys.argv[1], "1MiB")]
storage = GuardedStorage(TieredStorage(tiers, max_pending_bytes=200_000), name="both")
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for i in range(30):
    child = os.fork()
    if not child:
        good = memory.list_keys() == [] and memory.stats().current_bytes == 0
        storage.put("mine", b"1")
        good = good and bytes(storage.get("mine")) == b"1" and len(memory.list_keys()) == 1
        storage.backend.flush()
        os._exit(0 if good else 1)
    if os.waitpid(child, 0)[1]:
        os._exit(2)
stop.set()
for thread in threads:
    thread.join()
storage.close()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True, timeout=120)


def test_no_tiers_are_refused() -> None:
    with pytest.raises(ValueError):
        TieredStorage([])
