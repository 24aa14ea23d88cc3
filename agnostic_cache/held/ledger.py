"""Ledger: how much memory a cache keeps alive, each byte once, per device; `LedgerRoom`: what a newcomer lacks."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from agnostic_cache.arrays.adapter import Storage
from agnostic_cache.held.entry import Entry


class Ledger:
    """Counts the holders of each storage, and the bytes that are about to be filled or freed.

    Not thread-safe: its owner holds a lock. Invariant: ``total == sum(size of each storage that has a holder)``, and
    `by_device` splits it.

    Attributes:
        total: Bytes in all.
        by_device: Bytes per device name.
        limits: Bytes that may be held per device name, or under None on all of them together.
    """

    __slots__ = ("_held", "_reserved", "by_device", "limits", "total")

    def __init__(self, limits: Mapping[str | None, int]) -> None:
        """Start empty."""
        self.limits = limits
        self._held: dict[Hashable, int] = {}  # storage key -> number of holders
        self._reserved: dict[str, int] = {}  # of copies that are being made, and of what is not freed yet
        self.by_device: dict[str, int] = {}
        self.total = 0

    def add(self, storages: Iterable[Storage]) -> None:
        """Count one more holder of each."""
        held, by_device = self._held, self.by_device
        for key, nbytes, device in storages:
            if key in held:
                held[key] += 1
            else:
                held[key] = 1
                self.total += nbytes
                by_device[device] = by_device.get(device, 0) + nbytes

    def drop(self, storages: Iterable[Storage]) -> list[Storage]:
        """Count one holder less of each, and return those that have none left."""
        gone = []
        held, by_device = self._held, self.by_device
        for storage in storages:
            key, nbytes, device = storage
            if held[key] > 1:
                held[key] -= 1
            else:
                del held[key]
                self.total -= nbytes
                by_device[device] -= nbytes
                gone.append(storage)
        return gone

    def reserve(self, sizes: Mapping[str, int], sign: int = 1) -> None:
        """Count bytes per device that no entry holds and nobody else may use; with ``sign=-1``, no more."""
        for device, nbytes in sizes.items():
            self._reserved[device] = self._reserved.get(device, 0) + sign * nbytes

    def holders(self, key: Hashable) -> int:
        """Return how many hold a storage."""
        return self._held.get(key, 0)

    def nbytes_of(self, entries: Iterable[Entry]) -> int:
        """Return the bytes that only these holders hold."""
        held: dict[Storage, int] = {}
        for entry in entries:
            for storage in entry.storages:
                held[storage] = held.get(storage, 0) + 1
        return sum(storage.nbytes for storage, count in held.items() if count == self.holders(storage.key))

    def excess(self, device: str | None) -> int:
        """Return the bytes above the limit of `device`; negative where there is room."""
        if device is None:
            used = self.total + sum(self._reserved.values())
        else:
            used = self.by_device.get(device, 0) + self._reserved.get(device, 0)
        return used - self.limits[device]

    def excess_with(self, sizes: Mapping[str, int]) -> dict[str | None, int]:
        """Return the bytes above each limit, were bytes per device to come in."""
        return {
            device: self.excess(device) + (sum(sizes.values()) if device is None else sizes.get(device, 0))
            for device in self.limits
        }


class LedgerRoom:
    """The `Room` of a newcomer: limits per device, and memory that entries share. Counts apart, and changes nothing."""

    __slots__ = ("_entries", "_gone", "_ledger", "over")

    def __init__(
        self, ledger: Ledger, entries: Mapping[Any, Entry], sizes: Mapping[str, int], storages: Sequence[Storage]
    ) -> None:
        """Begin without victims.

        Args:
            ledger: What is held.
            entries: Who may leave.
            sizes: Bytes per device of a copy that is to come in.
            storages: Memory that is to come in as it is; some of it may be held already.
        """
        self._ledger, self._entries = ledger, entries
        self._gone: dict[Hashable, int] = {}  # holders that are gone, by storage
        self.over = ledger.excess_with(sizes)
        for storage in storages:
            self._gone[storage.key] = -1  # one holder more
            if not ledger.holders(storage.key):
                self._count(storage, 1)

    def short(self) -> bool:
        """See `Room.short`."""
        return any(nbytes > 0 for nbytes in self.over.values())

    def release(self, key: Any) -> bool:
        """See `Room.release`."""
        entry = self._entries.get(key)
        over = {device for device, nbytes in self.over.items() if nbytes > 0}
        if entry is None or not (None in over or any(storage.device in over for storage in entry.storages)):
            return False
        self.leave(entry)
        return True

    def leave(self, entry: Entry) -> None:
        """Count an entry as gone, whether that helps or not."""
        for storage in entry.storages:
            gone = self._gone[storage.key] = self._gone.get(storage.key, 0) + 1
            if gone == self._ledger.holders(storage.key):
                self._count(storage, -1)

    def _count(self, storage: Storage, sign: int) -> None:
        for device in self.over:
            if device in (None, storage.device):
                self.over[device] += sign * storage.nbytes
