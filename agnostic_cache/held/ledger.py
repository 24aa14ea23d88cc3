"""Ledger: how much memory a cache keeps alive, each byte counted once, per device, and how much room is left."""

from collections.abc import Hashable, Iterable, Mapping

from agnostic_cache.arrays.adapter import Storage


class Ledger:
    """Counts the holders of each storage, and the bytes that are about to come and about to go.

    Not thread-safe: its owner holds a lock. Invariant: ``total == sum(size of each storage that has a holder)``, and
    `by_device` splits it.

    Attributes:
        total: Bytes in all.
        by_device: Bytes per device name.
    """

    __slots__ = ("_held", "_limits", "_promised", "by_device", "total")

    def __init__(self, limits: Mapping[str | None, int] | None = None) -> None:
        """Start empty.

        Args:
            limits: Bytes that may be held per device name, or under None on all of them together.
        """
        self._limits = dict(limits or {})
        self._held: dict[Hashable, int] = {}  # storage key -> number of holders
        self._promised: dict[str, int] = {}  # bytes of copies that are being made, and of what is not freed yet
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

    def promise(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Count bytes per device that nobody holds yet, or that nobody holds any more and are not free yet."""
        promised = self._promised
        for device, nbytes in sizes:
            promised[device] = promised.get(device, 0) + nbytes

    def settle(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Take back what `promise` counted."""
        for device, nbytes in sizes:
            self._promised[device] -= nbytes

    def over(self) -> list[str | None]:
        """Return the limits that do not hold, by device name, or None for the one over all of them together."""
        return [device for device in self._limits if self.excess(device) > 0]

    def excess(self, device: str | None) -> int:
        """Return the bytes above the limit of `device`; negative where there is room."""
        if device is None:
            used = self.total + sum(self._promised.values())
        else:
            used = self.by_device.get(device, 0) + self._promised.get(device, 0)
        return used - self._limits[device]
