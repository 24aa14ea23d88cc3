"""The one contract of storage: bytes under string keys. A backend of a third party subclasses `StorageBackend`.

What a backend hands out is what was put, byte for byte, or nothing: one whose bytes leave the process checks them (see
`entry.py`, which ours use). A miss is ``None``. A backend that is down or slow raises `StorageError`; `open_storage`
wraps it so that nobody who decodes sees that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, NoReturn, ParamSpec, Protocol, Self, TypeVar, runtime_checkable

from agnostic_cache.blob.pieces import Blob, copy_into
from agnostic_cache.errors import CacheCopyError, InvalidKeyError
from agnostic_cache.eviction.evictor import PutStatus

_P = ParamSpec("_P")
_T = TypeVar("_T")


class StorageStats(NamedTuple):
    """What a storage holds and did, as far as this process knows. Sizes in bytes, the rest counts.

    Attributes:
        entries: Entries that can be found.
        current_bytes: Bytes that they take.
        deferred_bytes: Bytes of entries that left and are still being read.
        max_bytes: The budget, or None where there is none.
        hits: Lookups that found their key.
        misses: Lookups that did not, for whatever reason.
        puts: Blobs taken in.
        refused: Blobs that did not fit, or could not be written.
        evictions: Entries that left to make room.
        corrupt: Entries that were found damaged, and set aside.
        errors: Calls that failed because the storage was down, slow or full.
    """

    entries: int = 0
    current_bytes: int = 0
    deferred_bytes: int = 0
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    puts: int = 0
    refused: int = 0
    evictions: int = 0
    corrupt: int = 0
    errors: int = 0


class StorageBackend(ABC):
    """Keeps blobs. Safe to use from several threads; all methods may block."""

    @abstractmethod
    def put(self, key: str, blob: Blob) -> PutStatus:
        """Keep a copy of `blob` under `key`, in place of what is there.

        Nobody ever sees a part of it. Of two puts of one key at the same time, either may win.

        Returns:
            ``LEGAL``, or ``ILLEGAL`` where it does not fit the budget: then nothing changed.

        Raises:
            InvalidKeyError: `key` is no str.
            StorageError: It could not be kept. What was there before is there still, or is gone.
        """

    @abstractmethod
    def get(self, key: str) -> memoryview | None:
        """Return the bytes that were put, read-only, or None.

        The view stays valid, and its memory alive, as long as somebody holds it, whatever becomes of the entry.

        Raises:
            InvalidKeyError: `key` is no str.
            StorageError: It could not be looked up.
        """

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Say whether `key` is there, without making it newer. `get` may find it damaged, or gone, all the same.

        Raises:
            InvalidKeyError: `key` is no str.
            StorageError: It could not be looked up.
        """

    @abstractmethod
    def remove(self, key: str) -> bool:
        """Forget `key`; return whether it was there.

        Raises:
            InvalidKeyError: `key` is no str.
            StorageError: It could not be removed.
        """

    @abstractmethod
    def list_keys(self) -> list[str]:
        """Return the keys that are there. Linear in their number.

        Raises:
            StorageError: They could not be listed.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of memory, files and connections. Idempotent; any other call afterwards raises `StorageError`.

        What outlives the process stays: a directory keeps its entries, a server too.
        """

    async def get_async(self, key: str) -> memoryview | None:
        """See `SupportsAsync.get_async`. From a thread of asyncio's, unless a backend knows better."""
        return await _in_a_thread(self.get, key)

    async def put_async(self, key: str, blob: Blob) -> PutStatus:
        """See `SupportsAsync.put_async`. As `get_async`."""
        return await _in_a_thread(self.put, key, blob)

    def stats(self) -> StorageStats:
        """Return what the storage holds and did; a backend that does not count answers zeros."""
        return StorageStats()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            CacheCopyError: Always.
        """
        msg = f"a {type(self).__name__} owns memory or connections and cannot be pickled or copied; open its URL again"
        raise CacheCopyError(msg)

    def __enter__(self) -> Self:
        """Close at the end of a ``with`` block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


# --- capabilities that a backend may have ------------------------------------------------------------------------


@runtime_checkable
class SupportsBatch(Protocol):
    """Several keys in about the time of one."""

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """Do `StorageBackend.get` to each."""
        ...

    def put_many(self, blobs: Mapping[str, Blob]) -> list[PutStatus]:
        """Do `StorageBackend.put` to each."""
        ...

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Do `StorageBackend.contains` to each."""
        ...


@runtime_checkable
class SupportsGetInto(Protocol):
    """Reading into memory that the caller brings."""

    def get_into(self, key: str, buffer: memoryview) -> int | None:
        """Write the blob to the start of `buffer`, and return its size, or None where `key` is not there.

        After a miss the contents of `buffer` are undefined.

        Raises:
            ValueError: `buffer` is too small, or cannot be written.
        """
        ...


class EntryFacts(NamedTuple):
    """What is known of an entry without reading it.

    Attributes:
        nbytes: Bytes that it takes in the storage.
        age_seconds: Since it was put, or used last: what its eviction goes by.
    """

    nbytes: int
    age_seconds: float


@runtime_checkable
class SupportsDescribe(Protocol):
    """Telling size and age of an entry without reading it."""

    def describe(self, key: str) -> EntryFacts | None:
        """Return what is known of an entry, or None where `key` is not there.

        Raises:
            StorageError: It could not be looked up.
        """
        ...


@runtime_checkable
class SupportsAsync(Protocol):
    """Not blocking the event loop. Every `StorageBackend` has it."""

    async def get_async(self, key: str) -> memoryview | None:
        """Do `StorageBackend.get`."""
        ...

    async def put_async(self, key: str, blob: Blob) -> PutStatus:
        """Do `StorageBackend.put`."""
        ...


class Reservation(Protocol):
    """Memory for one blob that is yet to come. To be published or dropped, once; used by one thread at a time.

    Attributes:
        buffer: Where the blob is to be written, flat and writable, of the size that was asked for. Not to be written
            after `publish`.
    """

    buffer: memoryview

    def publish(self, key: str) -> PutStatus:
        """Keep what was written under `key`, in place of what is there, as `StorageBackend.put` does."""
        ...

    def drop(self) -> None:
        """Let go of the memory; nothing was put. Nothing happens after `publish`, or a second time."""
        ...


@runtime_checkable
class SupportsReserve(Protocol):
    """Receiving a blob where it will stay. Who has it keeps blobs in memory: no method waits for a device."""

    def reserve(self, nbytes: int) -> Reservation | None:
        """Return memory for a blob, or None where it does not fit the budget.

        What is reserved counts against the budget, but for a little that may exceed it. So a blob that never comes
        costs nobody his entry, unless it was large.

        Raises:
            StorageError: There is no memory.
        """
        ...


async def _in_a_thread(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    from asyncio import to_thread  # noqa: PLC0415 - its import takes longer than all of this package, for a few callers

    return await to_thread(call, *args, **kwargs)


def get_many(backend: StorageBackend, keys: Sequence[str]) -> list[memoryview | None]:
    """Get several keys: at once where the backend can, else one after the other."""
    if isinstance(backend, SupportsBatch):
        return backend.get_many(keys)
    return [backend.get(key) for key in keys]


def put_many(backend: StorageBackend, blobs: Mapping[str, Blob]) -> list[PutStatus]:
    """Put several blobs: at once where the backend can, else one after the other."""
    if isinstance(backend, SupportsBatch):
        return backend.put_many(blobs)
    return [backend.put(key, blob) for key, blob in blobs.items()]


def contains_many(backend: StorageBackend, keys: Sequence[str]) -> list[bool]:
    """Look several keys up: at once where the backend can, else one after the other."""
    if isinstance(backend, SupportsBatch):
        return backend.contains_many(keys)
    return [backend.contains(key) for key in keys]


# --- for those who write a backend ---------------------------------------------------------------------------------


def check_key(key: object) -> None:
    """Refuse what is no key.

    Raises:
        InvalidKeyError: It is no str.
    """
    if not isinstance(key, str):
        msg = f"a storage key of type {type(key).__qualname__} was given; use a str"
        raise InvalidKeyError(msg)


def hand_over(blob: memoryview | None, buffer: memoryview) -> int | None:
    """Do what `SupportsGetInto.get_into` does with what `StorageBackend.get` gave.

    Raises:
        ValueError: `buffer` is too small, or cannot be written.
    """
    if blob is None:
        return None
    if buffer.readonly or buffer.nbytes < blob.nbytes:
        msg = f"a buffer of {buffer.nbytes} bytes, read-only: {buffer.readonly}, for a blob of {blob.nbytes}"
        raise ValueError(msg)
    return copy_into(buffer, (blob,))
