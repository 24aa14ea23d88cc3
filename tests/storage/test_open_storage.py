"""A storage by its URL, and a storage that fails."""

import logging
from importlib.metadata import EntryPoint, EntryPoints
from itertools import pairwise
from pathlib import Path

import pytest

from agnostic_cache import open_storage
from agnostic_cache.blob.pieces import Blob, pieces_of
from agnostic_cache.errors import InvalidSizeError, StorageError, StorageFullError, StorageURLError
from agnostic_cache.eviction import PutStatus
from agnostic_cache.storage.backend import StorageBackend, StorageStats
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.testing import StorageSuite
from agnostic_cache.testing.storage_suite import read


class TestGuardedStorage(StorageSuite):
    """What a guard does not change."""

    def make(self, place: Path, max_bytes: int | None = None) -> GuardedStorage:  # noqa: ARG002
        return GuardedStorage(MemoryStorage(max_bytes or "1GiB"), name="memory")

    def test_closing(self) -> None:  # type: ignore[override]
        storage = GuardedStorage(MemoryStorage("1MiB"), name="memory")
        storage.put("a", b"1")
        storage.close()
        storage.close()
        assert storage.get("a") is None
        assert storage.stats().errors == 1


class DictStorage(StorageBackend):
    """The six methods that a third party must write, and nothing else; fails on demand."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.fails: type[StorageError] | None = None
        self.calls = 0

    @classmethod
    def from_url(cls, url: str) -> "DictStorage":
        assert url.startswith("dict://")
        return cls()

    def work(self) -> None:
        self.calls += 1
        if self.fails is not None:
            raise self.fails

    def put(self, key: str, blob: Blob) -> PutStatus:
        self.work()
        self.blobs[key] = b"".join(pieces_of(blob)[1])
        return PutStatus.LEGAL

    def get(self, key: str) -> memoryview | None:
        self.work()
        return memoryview(self.blobs[key]) if key in self.blobs else None

    def contains(self, key: str) -> bool:
        self.work()
        return key in self.blobs

    def remove(self, key: str) -> bool:
        self.work()
        return self.blobs.pop(key, None) is not None

    def list_keys(self) -> list[str]:
        self.work()
        return list(self.blobs)

    def close(self) -> None:
        self.work()


class TestSixMethods(StorageSuite):
    bounded = False

    def make(self, place: Path, max_bytes: int | None = None) -> StorageBackend:  # noqa: ARG002
        return GuardedStorage(DictStorage(), name="dict")

    def test_closing(self) -> None:  # type: ignore[override]
        self.make(Path()).close()

    def test_stats_count(self, storage: StorageBackend) -> None:
        assert storage.stats() == StorageStats()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_failure_is_a_miss_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    backend = DictStorage()
    storage = GuardedStorage(backend, name="the dict", clock=Clock())
    storage.put("a", b"1")
    backend.fails = StorageError
    assert storage.get("a") is None
    assert storage.put("b", b"2") is PutStatus.ILLEGAL
    assert caplog.records[-1].levelno == logging.WARNING
    assert "the dict" in caplog.text
    backend.fails = None
    assert read(storage, "a") == b"1"
    assert storage.stats().errors == 2


def test_the_breaker_opens_and_recovers_by_itself() -> None:
    backend, clock = DictStorage(), Clock()
    storage = GuardedStorage(backend, name="the dict", clock=clock)
    storage.put("a", b"1")
    backend.fails = StorageError
    for _ in range(3):
        assert storage.get("a") is None
    opened = storage.breaker.is_open
    backend.calls = 0
    for _ in range(100):
        assert (storage.get("a"), storage.contains("a"), storage.list_keys()) == (None, False, [])
    assert backend.calls == 0  # nobody waits for a time-out again
    pauses = []
    for _ in range(8):  # it tries once in a while, less and less often
        while not backend.calls:
            clock.now += 0.25
            storage.get("a")
        pauses.append(clock.now)
        backend.calls = 0
        assert storage.get("a") is None
        assert backend.calls == 0
    gaps = [later - earlier for earlier, later in pairwise(pauses)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] == 30
    backend.fails = None
    clock.now += 30
    assert read(storage, "a") == b"1"
    assert opened
    assert not storage.breaker.is_open
    assert read(storage, "a") == b"1"


def test_a_full_storage_is_still_read(caplog: pytest.LogCaptureFixture) -> None:
    backend = DictStorage()
    storage = GuardedStorage(backend, name="the dict")
    storage.put("a", b"1")
    for i in range(10):
        backend.fails = StorageFullError
        assert storage.put(f"b {i}", b"2") is PutStatus.ILLEGAL
        backend.fails = None
        assert read(storage, "a") == b"1"
    assert len(caplog.records) == 1


def test_what_is_no_failure_of_a_storage_comes_through() -> None:
    class Wrong(DictStorage):
        def get(self, key: str) -> memoryview | None:
            raise ZeroDivisionError(key)

    with pytest.raises(ZeroDivisionError):
        GuardedStorage(Wrong(), name="wrong").get("a")


def test_strict_lets_errors_through(tmp_path: Path) -> None:
    with open_storage(f"file://{tmp_path}", strict=True) as strict, open_storage(f"file://{tmp_path}") as lenient:
        strict.close()
        lenient.close()
        with pytest.raises(StorageError):
            strict.get("a")
        assert lenient.get("a") is None


def test_an_unknown_scheme_lists_the_known_ones_and_their_extras() -> None:
    with pytest.raises(StorageURLError, match=r"(?s)memory://.*file://.*redis://.*agnostic-cache\[redis\]"):
        open_storage("carrier-pigeon://loft")


def test_a_third_party_adds_a_scheme_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("dict", f"{__name__}:DictStorage.from_url", "agnostic_cache.storage")
    monkeypatch.setattr(EntryPoint, "load", lambda self: DictStorage.from_url)  # noqa: ARG005 - no module of that name
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints([point]) if group else None)
    with open_storage("dict://somewhere") as storage:
        storage.put("a", b"1")
        assert read(storage, "a") == b"1"


@pytest.mark.parametrize(
    "url",
    [
        "", "memory", "/no/scheme", "memory://?max_bytes=1&max_bytes=2", "memory://?nonsense=1", "memory://?max_bytes",
        "file://?max_bytes=1MiB", "file://other-machine:80/tmp", "file://user@machine/tmp", "file:relative", "file:///tmp/%00",
        "file:///tmp/x?sync=perhaps", "file:///tmp/x?compress=rar", "http://[",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_understood(url: str) -> None:
    with pytest.raises(StorageURLError):
        open_storage(url)


def test_a_file_url_of_two_slashes_is_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_storage("file://here/kv", strict=True) as storage:
        storage.put("a", b"1")
    with open_storage(f"file://{tmp_path}/here/kv", strict=True) as storage:
        assert read(storage, "a") == b"1"


def test_a_size_that_is_none() -> None:
    with pytest.raises(InvalidSizeError):
        open_storage("memory://?max_bytes=lots")
