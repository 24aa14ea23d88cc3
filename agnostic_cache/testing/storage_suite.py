"""StorageSuite: the contract of a storage backend.

A test class of one's own inherits it and says how to open a storage:

    class TestMyStorage(StorageSuite):
        outlives = True

        def make(self, place, max_bytes=None):
            return MyStorage(place / "data", max_bytes)
"""

import asyncio
import copy
import gc
import pickle
import random
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agnostic_cache.blob.safetensors import Part, Parts
from agnostic_cache.errors import CacheCopyError, InvalidKeyError, StorageError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.storage.backend import (
    StorageBackend,
    SupportsAsync,
    SupportsBatch,
    SupportsDescribe,
    SupportsGetInto,
    contains_many,
    get_many,
)

KEYS = [
    "a",
    "",
    " ",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b\\c",
    "nul\x00nul",
    "*?[]{}:%",
    "é",
    "\ud800",
    "k" * 5000,
]
SIZES = [0, 1, 63, 64, 65, 4096, 1_000_003]


def read(storage: StorageBackend, key: str) -> bytes | None:
    """Return a copy of what is stored under a key."""
    blob = storage.get(key)
    return None if blob is None else bytes(blob)


class StorageSuite(ABC):
    """What every storage keeps.

    Attributes:
        outlives: Whether entries are there again when the same place is opened once more.
        bounded: Whether it keeps to a budget of bytes. Where it says no, tests of the budget are skipped; so are those
            of a capability (`SupportsDescribe`, `SupportsGetInto`) that it lacks.
    """

    outlives: ClassVar[bool] = False
    bounded: ClassVar[bool] = True

    @abstractmethod
    def make(self, place: Path, max_bytes: int | None = None) -> StorageBackend:
        """Open a storage; `place` is a folder of the test's own, empty at first."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[StorageBackend]:
        """Open a storage for one test."""
        with self.make(tmp_path) as storage:
            yield storage

    def _needs_a_budget(self) -> None:
        if not self.bounded:
            pytest.skip("keeps to no budget: bounded = False")

    # --- one entry ---------------------------------------------------------------------------------------------------

    def test_nothing_is_there_at_first(self, storage: StorageBackend) -> None:
        assert storage.get("a") is None
        assert not storage.contains("a")
        assert not storage.remove("a")
        assert storage.list_keys() == []

    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_put_comes_back(self, storage: StorageBackend, size: int) -> None:
        data = random.Random(size).randbytes(size)
        parts = Parts([Part("x", "U8", (size,), size, lambda: (memoryview(data),))], {}, algorithm="crc32")
        forms: dict[str, Any] = {
            "bytes": data, "bytearray": bytearray(data), "view": memoryview(data), "parts": parts,
            "words": memoryview(data[: size // 4 * 4]).cast("I"),
        }  # fmt: skip
        for name, blob in forms.items():
            assert storage.put(name, blob) is PutStatus.LEGAL
        for name, blob in forms.items():
            found = storage.get(name)
            assert isinstance(found, memoryview)
            assert found == bytes(blob), name
            assert (found.readonly, found.format, found.ndim) == (True, "B", 1)

    def test_a_copy_is_kept(self, storage: StorageBackend) -> None:
        data = bytearray(b"before")
        storage.put("a", data)
        data[:] = b"after!"
        assert read(storage, "a") == b"before"

    def test_the_last_put_counts(self, storage: StorageBackend) -> None:
        for data in (b"short", b"longer than that", b"", b"x"):
            assert storage.put("a", data) is PutStatus.LEGAL
            assert read(storage, "a") == data
        assert storage.list_keys() == ["a"]

    def test_what_was_handed_out_stays_as_it_was(self, storage: StorageBackend) -> None:
        held = []
        for i in range(4):  # overwritten, and its memory perhaps used again
            storage.put("a", bytes([i]) * 100_000)
            held.append(storage.get("a"))
        storage.remove("a")
        for i in range(4):
            storage.put(f"other {i}", bytes([77]) * 100_000)
        storage.close()
        assert [bytes(view or b"") for view in held] == [bytes([i]) * 100_000 for i in range(4)]

    def test_what_is_removed_is_gone(self, storage: StorageBackend) -> None:
        storage.put("a", b"1")
        storage.put("b", b"2")
        assert storage.remove("a")
        assert not storage.remove("a")
        assert storage.get("a") is None
        assert not storage.contains("a")
        assert storage.list_keys() == ["b"]

    def test_every_str_is_a_key_of_its_own(self, storage: StorageBackend) -> None:
        for i, key in enumerate(KEYS):
            assert storage.put(key, bytes([i])) is PutStatus.LEGAL
        assert sorted(storage.list_keys()) == sorted(KEYS)
        for i, key in enumerate(KEYS):
            assert storage.contains(key)
            assert read(storage, key) == bytes([i])

    @pytest.mark.parametrize("key", [None, 1, b"a", ("a",)], ids=str)
    def test_what_is_no_str_is_no_key(self, storage: StorageBackend, key: Any) -> None:
        for call in (storage.get, storage.contains, storage.remove, lambda key: storage.put(key, b"")):
            with pytest.raises(InvalidKeyError):
                call(key)
        assert storage.list_keys() == []

    # --- many --------------------------------------------------------------------------------------------------------

    def test_a_batch_is_as_one_after_the_other(self, storage: StorageBackend) -> None:
        blobs = {f"key {i}": random.Random(i).randbytes(i * 5000) for i in range(8)}
        if isinstance(storage, SupportsBatch):
            assert storage.put_many(blobs) == [PutStatus.LEGAL] * 8
        for key, blob in blobs.items():
            storage.put(key, blob)
        keys = ["missing", *blobs, "key 3"]
        assert contains_many(storage, keys) == [False, *[True] * 9]
        assert get_many(storage, keys) == [None, *blobs.values(), blobs["key 3"]]
        assert not get_many(storage, [])
        assert not contains_many(storage, [])

    def test_describing(self, storage: StorageBackend) -> None:
        if not isinstance(storage, SupportsDescribe):
            pytest.skip("cannot describe an entry: no SupportsDescribe")
        storage.put("a", random.Random(0).randbytes(100_000))
        found = storage.describe("a")
        assert found is not None
        assert 100_000 <= found.nbytes < 110_000
        assert 0 <= found.age_seconds < 600
        assert storage.describe("missing") is None

    def test_reading_into_a_buffer(self, storage: StorageBackend) -> None:
        if not isinstance(storage, SupportsGetInto):
            pytest.skip("cannot read into a buffer: no SupportsGetInto")
        data, buffer = bytes(range(200)), bytearray(300)
        storage.put("a", data)
        assert storage.get_into("a", memoryview(buffer)) == 200
        assert buffer == data + bytes(100)
        assert storage.get_into("missing", memoryview(buffer)) is None
        for wrong in (memoryview(bytearray(199)), memoryview(bytes(300))):
            with pytest.raises(ValueError):
                storage.get_into("a", wrong)

    def test_awaiting_does_not_block_the_loop(self, storage: StorageBackend) -> None:
        assert isinstance(storage, SupportsAsync)
        going_on = threading.Event()

        def pieces() -> list[memoryview]:
            assert going_on.wait(60)
            return [memoryview(b"bytes")]

        async def work() -> tuple[memoryview | None, memoryview | None]:
            slow = Parts([Part("x", "U8", (5,), 5, pieces)], {}, algorithm=None)
            putting = asyncio.create_task(storage.put_async("a", slow))
            await asyncio.sleep(0)
            going_on.set()
            assert await putting is PutStatus.LEGAL
            return await asyncio.gather(storage.get_async("a"), storage.get_async("b"))

        found, missing = asyncio.run(work())
        assert found is not None
        assert b"bytes" in bytes(found)
        assert missing is None

    def test_it_does_what_a_dict_does(self, storage: StorageBackend) -> None:
        source, model = random.Random(0), dict[str, bytes]()
        for _ in range(300):
            key = source.choice("abcdefgh")
            match source.randrange(5):
                case 0 | 1:
                    model[key] = source.randbytes(source.randrange(5000))
                    assert storage.put(key, model[key]) is PutStatus.LEGAL
                case 2:
                    assert storage.remove(key) == (model.pop(key, None) is not None)
                case 3:
                    assert storage.contains(key) == (key in model)
                case _:
                    assert read(storage, key) == model.get(key)
        assert sorted(storage.list_keys()) == sorted(model)

    def test_threads_never_see_a_part(self, storage: StorageBackend) -> None:
        def work(seed: int) -> None:
            source = random.Random(seed)
            for i in range(60):
                key = source.choice("abc")
                if i % 3:
                    found = storage.get(key)
                    if found is not None:
                        seen.append(found.nbytes >= 10_000 and found == bytes([found[0]]) * found.nbytes)
                elif i % 7:
                    storage.put(key, bytes([seed]) * source.randrange(10_000, 300_000))
                else:
                    storage.remove(key)

        seen: list[bool] = []
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen
        assert all(seen)

    # --- the budget --------------------------------------------------------------------------------------------------

    def test_an_entry_is_there_while_it_is_overwritten(self, storage: StorageBackend) -> None:
        """Who reads it gets the old bytes or the new ones."""
        assert storage.put("a", bytes(100_000)) is PutStatus.LEGAL
        stop, found = threading.Event(), list[bool]()

        def work() -> None:
            while not stop.is_set():
                blob = read(storage, "a")
                found.append(blob is not None and blob == blob[:1] * 100_000 and storage.contains("a"))

        readers = [threading.Thread(target=work) for _ in range(2)]
        for reader in readers:
            reader.start()
        for i in range(100):
            storage.put("a", bytes([i]) * 100_000)
        stop.set()
        for reader in readers:
            reader.join()
        assert found
        assert all(found)

    def test_a_finaliser_may_call_in_the_middle_of_a_call(self, storage: StorageBackend) -> None:
        """The garbage collector runs one on the thread that it interrupts: nobody may wait for anybody then."""

        class Session:
            def __init__(self) -> None:
                self.itself = self  # for the collector alone

        def finaliser(key: str) -> None:
            with suppress(StorageError):  # it may be refused
                storage.get(key)
                storage.remove(key)
                storage.put("from a finaliser", b"1")
                storage.list_keys()

        def work() -> None:
            for i in range(200):
                assert storage.put(f"key {i}", bytes(1000)) is PutStatus.LEGAL
                weakref.finalize(Session(), finaliser, f"key {i}").atexit = False
                read(storage, f"key {i - 1}")
                storage.contains(f"key {i}")
                storage.stats()
            done.set()

        done = threading.Event()
        thresholds = gc.get_threshold()
        gc.set_threshold(17, 2, 2)
        try:
            threading.Thread(target=work, daemon=True).start()
            assert done.wait(60)
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        keys = storage.list_keys()
        assert contains_many(storage, keys) == [True] * len(keys)
        storage.put("a", b"1")
        assert read(storage, "a") == b"1"

    def test_the_budget_holds(self, tmp_path: Path) -> None:
        self._needs_a_budget()
        with self.make(tmp_path, 1_000_000) as storage:
            for i in range(40):
                assert storage.put(f"key {i}", bytes([i]) * 90_000) is PutStatus.LEGAL
                assert storage.stats().current_bytes <= 1_000_000
            assert 8 <= len(storage.list_keys()) <= 11
            assert read(storage, "key 39") == bytes([39]) * 90_000
            assert storage.get("key 0") is None

    def test_what_was_used_last_stays(self, tmp_path: Path) -> None:
        self._needs_a_budget()
        with self.make(tmp_path, 1_000_000) as storage:
            storage.put("used", bytes(90_000))
            for i in range(40):
                storage.put(f"key {i}", bytes(90_000))
                assert read(storage, "used") == bytes(90_000)

    def test_what_is_too_large_is_refused(self, tmp_path: Path) -> None:
        self._needs_a_budget()
        with self.make(tmp_path, 1_000_000) as storage:
            storage.put("a", b"old")
            storage.put("b", b"other")
            assert storage.put("a", bytes(1_000_001)) is PutStatus.ILLEGAL
            assert (read(storage, "a"), read(storage, "b")) == (b"old", b"other")
            assert storage.stats().refused == 1

    def test_overwriting_counts_once(self, tmp_path: Path) -> None:
        self._needs_a_budget()
        with self.make(tmp_path, 1_000_000) as storage:
            storage.put("kept", b"here")
            for i in range(20):
                assert storage.put("a", bytes([i]) * 900_000) is PutStatus.LEGAL
            assert (read(storage, "kept"), read(storage, "a")) == (b"here", bytes([19]) * 900_000)
            assert storage.stats().entries == 2

    # --- its life ----------------------------------------------------------------------------------------------------

    def test_closing(self, storage: StorageBackend) -> None:
        storage.put("a", b"1")
        storage.close()
        storage.close()
        for call in (storage.get, storage.contains, storage.remove, lambda key: storage.put(key, b"")):
            with pytest.raises(StorageError):
                call("a")
        with pytest.raises(StorageError):
            storage.list_keys()

    def test_opening_again(self, tmp_path: Path) -> None:
        blobs = {key: key.encode("utf-8", "surrogatepass") for key in KEYS}
        with self.make(tmp_path) as storage:
            for key, blob in blobs.items():
                storage.put(key, blob)
        with self.make(tmp_path) as storage:
            assert sorted(storage.list_keys()) == (sorted(KEYS) if self.outlives else [])
            assert [read(storage, key) for key in KEYS] == (
                list(blobs.values()) if self.outlives else [None] * len(KEYS)
            )

    def test_it_cannot_be_copied(self, storage: StorageBackend) -> None:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(CacheCopyError):
                call(storage)

    def test_stats_count(self, storage: StorageBackend) -> None:
        storage.put("a", b"1")
        storage.get("a")
        storage.get("b")
        found = storage.stats()
        assert (found.puts, found.hits, found.misses, found.refused, found.corrupt) == (1, 1, 1, 0, 0)
