"""Ghosts: the keys of victims, remembered for a while, to know who comes back."""

from collections import OrderedDict
from typing import Any


class Ghosts:
    """Keys of what was evicted, the oldest forgotten first. A ghost costs its key and some 200 bytes."""

    __slots__ = ("_ghosts", "_left", "_nbytes")

    def __init__(self) -> None:
        """Start with none."""
        self._ghosts: OrderedDict[Any, tuple[int, int]] = OrderedDict()  # (bytes, bytes that had left when it did)
        self._nbytes = 0  # of the entries that they stand for
        self._left = 0  # bytes, ever

    def add(self, key: Any, nbytes: int, most: float) -> None:
        """Remember a victim, and no more of them than stand for `most` bytes."""
        ghosts = self._ghosts
        if key in ghosts:
            self.recall(key)
        self._left += nbytes
        self._nbytes += nbytes
        ghosts[key] = (nbytes, self._left)
        while self._nbytes > most:
            self._nbytes -= ghosts.popitem(last=False)[1][0]

    def recall(self, key: Any) -> int | None:
        """Forget who comes back; return how many bytes left after it, or None where it is not remembered."""
        ghost = self._ghosts.pop(key, None)
        if ghost is None:
            return None
        self._nbytes -= ghost[0]
        return self._left - ghost[1]
