"""Ghosts: the keys of victims, remembered for a while, to know which come back."""

from collections import OrderedDict
from typing import Any


class Ghosts:
    """Keys of what was evicted, the oldest forgotten first. A ghost costs its key and some 200 bytes."""

    __slots__ = ("_ghosts", "_left", "_nbytes")

    def __init__(self) -> None:
        """Start with none."""
        self._ghosts: OrderedDict[Any, tuple[int, int]] = OrderedDict()  # (bytes, bytes evicted until then)
        self._nbytes = 0  # of the entries that they stand for
        self._left = 0  # bytes evicted, ever

    def add(self, key: Any, nbytes: int, most: float) -> None:
        """Remember a victim, and no more of them than stand for `most` bytes."""
        self.recall(key)
        ghosts = self._ghosts
        self._left += nbytes
        self._nbytes += nbytes
        ghosts[key] = (nbytes, self._left)
        while self._nbytes > most:
            self._nbytes -= ghosts.popitem(last=False)[1][0]

    def recall(self, key: Any) -> int | None:
        """Forget a key that comes back; return how many bytes were evicted after it, or None where it is no ghost."""
        ghost = self._ghosts.pop(key, None)
        if ghost is None:
            return None
        self._nbytes -= ghost[0]
        return self._left - ghost[1]
