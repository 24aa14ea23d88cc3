"""Ledger: which pieces of memory a cache keeps alive, each byte counted once, per device."""

from collections.abc import Hashable, Iterable

from agnostic_cache.state.adapter import Storage


class Ledger:
    """Counts the holders of each storage. Not thread-safe: its owner holds a lock.

    Invariant: ``total == sum(size of each storage that has a holder)``, and `by_device` splits it.

    Attributes:
        total: Bytes in all.
        by_device: Bytes per device name.
    """

    __slots__ = ("_held", "by_device", "total")

    def __init__(self) -> None:
        """Start empty."""
        self._held: dict[Hashable, int] = {}  # storage key -> number of holders
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
