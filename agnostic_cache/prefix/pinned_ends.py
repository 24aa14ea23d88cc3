"""PinnedEnds: where pinned prompts end within a block. The rows up to there stay an entry of their own.

A short block is dropped when a longer one has its rows, and the pins of the one are not those of the other. The short
block at the end of a pinned prompt stays, and is cut from a longer one where there is only that: so a pin is a pin of
keys that the prompt alone decides.
"""

from collections.abc import Callable
from math import inf

from agnostic_cache.prefix.chain import Marks

End = tuple[bytes, bytes, Marks]
"""Key, tokens and marks of the last, short block of a prompt."""


class PinnedEnds:
    """Ends of pinned prompts, by the key of the block before. Its owner holds a lock to change it."""

    __slots__ = ("_clock", "_ends")

    def __init__(self, clock: Callable[[], float]) -> None:
        """Know of none."""
        self._clock = clock
        self._ends: dict[bytes, dict[End, tuple[float, ...]]] = {}  # until when, once per pin; replaced, never changed

    def add(self, parent: bytes, end: End, seconds: float | None) -> None:
        """Add one pin of an end, and forget those whose time is over."""
        for known in list(self._ends):
            self._set(known, self.of(known))
        until = (*self.of(parent).get(end, ()), inf if seconds is None else self._clock() + seconds)
        self._set(parent, {**self.of(parent), end: tuple(sorted(until))})

    def take_back(self, parent: bytes, end: End) -> None:
        """Take one pin of an end back, the one that would hold longest."""
        left = self.of(parent)
        left[end] = left.get(end, ())[:-1]
        self._set(parent, {one: until for one, until in left.items() if until})

    def of(self, parent: bytes) -> dict[End, tuple[float, ...]]:
        """Return the ends that hang on a block, or on a root, and until when each is pinned."""
        ends = self._ends.get(parent)
        return {end: until for end, until in ends.items() if until[-1] > self._clock()} if ends else {}

    def holds(self, parent: bytes, key: bytes) -> bool:
        """Say whether the block of that key, behind `parent`, is the end of a pinned prompt."""
        return any(key == known for known, *_ in self.of(parent))

    def _set(self, parent: bytes, ends: dict[End, tuple[float, ...]]) -> None:
        if ends:
            self._ends[parent] = ends
        else:
            self._ends.pop(parent, None)
