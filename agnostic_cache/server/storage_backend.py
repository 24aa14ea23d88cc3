"""What the server keeps its entries in: LMCache's storage backend, over the storages of this house.

Source: LMCache 0.5.6 (``lmcache.v1.server.storage_backend``), names and behaviour kept. Mended: there is a budget, and
who leaves is an evictor's word; a body that is not as long as its header says is refused. Dtypes are ours, equal to
their names, and shapes are tuples; torch's are taken.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import anonymous_mapping
from agnostic_cache.errors import StorageURLError, WireError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.server.record import BODY, body_of, is_whole, meta_of, prepare, response_of
from agnostic_cache.storage.backend import Reservation, StorageBackend, StorageStats, SupportsReserve
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.memory import MemoryStorage
from agnostic_cache.storage.registry import open_storage
from agnostic_cache.storage.tiered import TieredStorage
from agnostic_cache.storage.url import StorageURL
from agnostic_cache.wire import CacheEngineKey, ClientMetaMessage, MemoryFormat, parse_cache_key

_CPU: Final = "cpu"

Stats = Callable[[], StorageStats]
"""Says what a storage holds and did."""


@dataclass(slots=True)
class LMSMemoryObj:
    """An entry.

    Attributes:
        data: The body; from our backends a read-only view, which copies nothing and stays as it is.
        length: Bytes of it.
        fmt: Order of its axes.
        dtype: Element type, or None.
        shape: Extents.
    """

    data: bytearray | memoryview
    length: int
    fmt: MemoryFormat
    dtype: Dtype | None
    shape: tuple[int, ...]


class LMSBackendInterface(ABC):
    """Keeps bodies and what their headers said, by key. Safe to use from several threads."""

    @abstractmethod
    def put(self, client_meta: ClientMetaMessage, kv_chunk_bytes: bytearray) -> None:
        """Keep a body under ``client_meta.key``, in place of what is there.

        Args:
            client_meta: The header that it came with.
            kv_chunk_bytes: The body.
        """

    @abstractmethod
    def contains(self, key: CacheEngineKey) -> bool:
        """Say whether `key` is there."""

    @abstractmethod
    def get(self, key: CacheEngineKey) -> LMSMemoryObj | None:
        """Return the entry of `key`, or None."""

    @abstractmethod
    def list_keys(self) -> list[CacheEngineKey]:
        """Return the keys that are there."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held."""


class LMSLocalBackend(LMSBackendInterface):
    """Entries in a storage of this house; by default in memory, 4 GiB, the least recently used leaving first.

    >>> from agnostic_cache.wire import ClientCommand
    >>> backend, key = LMSLocalBackend(), CacheEngineKey("m", 1, 0, 255, Dtype.BFLOAT16)
    >>> meta = ClientMetaMessage(ClientCommand.PUT, key, 4, MemoryFormat.KV_2LTD, Dtype.BFLOAT16, (2, 1, 1, 1))
    >>> backend.put(meta, bytearray(b"body"))
    >>> backend.get(key).data == b"body", backend.get(key).dtype == "bfloat16"
    (True, True)

    Attributes:
        storage: Where the entries are, by the text of their keys.
        tiers: Says what each storage holds and did: one, or those of a `TieredStorage`.
        blocks: Whether a call may wait for a device or a network; a server then makes it from a thread.
    """

    def __init__(self, storage: StorageBackend | None = None) -> None:
        """Keep entries in `storage`, which is closed with this; None for memory."""
        self.storage = MemoryStorage() if storage is None else storage
        self.blocks = not isinstance(self.storage, SupportsReserve)
        self._reserve: Callable[[int], Reservation | None] = partial(_Buffer, self.storage)
        if isinstance(self.storage, SupportsReserve):
            self._reserve = self.storage.reserve
        self.tiers: list[Stats] = [self.storage.stats]
        if isinstance(self.storage, TieredStorage):
            self.tiers = [partial(_tier, self.storage, number) for number in range(len(self.storage.tier_stats()))]
        budgets = [stats().max_bytes for stats in self.tiers]
        self._max_bytes = None if None in budgets else max(filter(None, budgets))

    def put(self, client_meta: ClientMetaMessage, kv_chunk_bytes: bytearray | bytes | memoryview) -> None:
        """Keep a copy of a body. What does not fit the budget is left out, and the old entry stays.

        Raises:
            WireError: The body is not as long as the header says.
        """
        with memoryview(kv_chunk_bytes).cast("B") as body:
            if body.nbytes != client_meta.length:
                msg = f"a body of {body.nbytes} bytes whose header says {client_meta.length}; send the whole body"
                raise WireError(msg)
            room = self.reserve(client_meta)
            if room is not None:
                room.body[:] = body
                room.publish()

    def contains(self, key: CacheEngineKey) -> bool:
        """Say whether `key` is there, without making it newer."""
        return self.storage.contains(key.to_string())

    def get(self, key: CacheEngineKey) -> LMSMemoryObj | None:
        """Return the entry of `key`, which makes it newer, or None."""
        record = self.storage.get(key.to_string())
        meta = None if record is None else meta_of(record)
        if record is None or meta is None:
            return None
        return LMSMemoryObj(body_of(record), meta.length, meta.fmt, meta.dtype, meta.shape)

    def remove(self, key: CacheEngineKey) -> None:
        """Forget `key`.

        Raises:
            KeyError: It is not there.
        """
        if not self.storage.remove(key.to_string()):
            raise KeyError(key)

    def list_keys(self) -> list[CacheEngineKey]:
        """Return the keys that are there; what else a shared storage holds is left out."""
        keys = []
        for text in self.storage.list_keys():
            try:
                keys.append(parse_cache_key(text))
            except WireError:
                continue
        return keys

    def close(self) -> None:
        """Close the storage: memory is let go, files stay."""
        self.storage.close()

    # --- what the server needs beyond that ----------------------------------------------------------------------------

    def reserve(self, client_meta: ClientMetaMessage) -> "Room | None":
        """Return room for the body of a ``PUT``, or None where it does not fit the budget.

        Raises:
            WireError: The header cannot be kept.
        """
        nbytes = BODY + client_meta.length
        if self._max_bytes is not None and nbytes > self._max_bytes:
            return None
        reservation = self._reserve(nbytes)
        return None if reservation is None else Room(reservation, client_meta)

    def response(self, key: CacheEngineKey) -> memoryview | None:
        """Return the whole answer to a ``GET`` that hits, header and body in one view of the entry, or None."""
        record = self.storage.get(key.to_string())
        return None if record is None or not is_whole(record) else response_of(record)


def _tier(storage: TieredStorage, number: int) -> StorageStats:
    return storage.tier_stats()[number].storage


class Room:
    """Room for one body, where it will stay. To be published or dropped.

    Attributes:
        body: Where it is to be written.
    """

    def __init__(self, reservation: Reservation, client_meta: ClientMetaMessage) -> None:
        """Write the header.

        Raises:
            WireError: It cannot be kept.
        """
        self._reservation = reservation
        self._key = client_meta.key.to_string()
        try:
            prepare(reservation.buffer, client_meta)
        except BaseException:
            reservation.drop()
            raise
        self.body = reservation.buffer[BODY:]

    def publish(self) -> PutStatus:
        """Keep the entry, its body being whole."""
        self.body = memoryview(b"")
        return self._reservation.publish(self._key)

    def drop(self) -> None:
        """Let go of the room; nothing was put."""
        self.body = memoryview(b"")
        self._reservation.drop()


class _Buffer:
    """A `Reservation` for a storage that has none: what was written is put."""

    def __init__(self, storage: StorageBackend, nbytes: int) -> None:
        self.buffer = memoryview(anonymous_mapping(nbytes))[:nbytes]
        self._storage = storage

    def publish(self, key: str) -> PutStatus:
        buffer, self.buffer = self.buffer, memoryview(b"")
        return self._storage.put(key, buffer)

    def drop(self) -> None:
        self.buffer = memoryview(b"")


def CreateStorageBackend(device: str) -> LMSLocalBackend:  # noqa: N802 - the original's name
    """Make the backend that a server is asked for.

    Args:
        device: ``"cpu"`` for memory, or a URL of `open_storage`. A storage that fails is a miss.

    Raises:
        ValueError: It is neither.
        StorageError: The storage cannot be opened.
        MissingExtraError: Its library is not installed.
    """
    if device == _CPU:
        return LMSLocalBackend()
    try:
        scheme = StorageURL.parse(device).scheme
        storage = open_storage(device, strict=True)
    except StorageURLError as error:
        msg = f"Unsupported device: {device}"
        raise ValueError(msg) from error
    if not isinstance(storage, SupportsReserve):
        storage = GuardedStorage(storage, name=f"the {scheme}:// storage")
    return LMSLocalBackend(storage)
