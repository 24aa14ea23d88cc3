"""FIFO: the oldest entry leaves first, however much it is used."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from agnostic_cache.eviction.policy import Policy


class FIFO(Policy):
    """Evict in the order of insertion; an overwritten entry is a new one.

    Source: the textbook's first-in first-out; the yardstick that another policy must beat.
    """

    def reset(self) -> None:
        """See `Policy.reset`."""
        self._keys: OrderedDict[Any, None] = OrderedDict()

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:  # noqa: ARG002
        """See `Policy.added`."""
        self._keys[key] = None
        self._keys.move_to_end(key)

    def used(self, key: Any) -> None:
        """See `Policy.used`. Changes nothing."""
        self._keys[key]

    def gone(self, key: Any, *, evicted: bool = False) -> None:  # noqa: ARG002
        """See `Policy.gone`."""
        self._keys.pop(key, None)

    def order(self) -> Iterator[Any]:
        """See `Policy.order`."""
        return iter(self._keys)
