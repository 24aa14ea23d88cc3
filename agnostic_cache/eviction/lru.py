"""LRU: the least recently used entry leaves first."""

from typing import Any

from agnostic_cache.eviction.fifo import FIFO


class LRU(FIFO):
    """Evict the least recently used first.

    >>> policy = LRU()
    >>> for key in "abc":
    ...     policy.added(key, 100)
    >>> policy.used("a")
    >>> list(policy.order())
    ['b', 'c', 'a']
    """

    def used(self, key: Any) -> None:
        """See `Policy.used`. Makes the key the newest."""
        self._keys.move_to_end(key)
