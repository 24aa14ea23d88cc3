"""AdaptiveEvictor: LRU that learns how much longer to keep what came back."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries
from agnostic_cache.eviction.ghosts import Ghosts

_Queue = OrderedDict[Any, int]
"""Time of last use by key, the oldest first."""


class AdaptiveEvictor(BudgetEvictor):
    """Evict the least recently used, with patience for entries that were evicted once and came back.

    New entries and returned ones are two queues, each in the order of use. The oldest new one leaves, unless the oldest
    returned one has idled `patience` times as long. At a patience of 1 this is LRU, and so it starts. Who comes back
    soon after it was evicted from one queue shows that a slightly longer queue would have kept it: that raises patience
    where it was a returned entry, and lowers it where it was a new one. So it finds out how much of the room to give to
    what is used again and again, at a small capacity most of it, and at a large one little.

    A put of more than a 64th of the maximum teaches nothing: where so few entries fit there is nothing to learn from,
    and LRU it stays.

    Source: ours. The queues are those of 2Q (T. Johnson, D. Shasha, VLDB 1994), the ghosts that teach those of ARC
    (N. Megiddo, D. Modha, FAST 2003); new is that they set a ratio of ages instead of a share of the room, so that one
    end of the scale is LRU itself.
    """

    ghost_share = 2.0  # bytes of either queue's ghosts, of the maximum
    window = 0.2  # what left that recently, of the maximum, left too early
    rate = 100  # how quickly it learns: when as much as the maximum left too early, patience grows by exp(rate)
    largest = 1 / 64  # a put of more than this of the maximum teaches nothing
    patience_max = 100.0

    def reset(self) -> None:
        """Forget every entry, the ghosts, and what was learnt."""
        super().reset()
        self.patience = 1.0
        self._new: _Queue = OrderedDict()
        self._returned: _Queue = OrderedDict()
        self._new_ghosts = Ghosts()
        self._returned_ghosts = Ghosts()
        self._time = 0  # counts uses

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Make the entry the newest of its queue, and of the dict."""
        queue = self._new if key in self._new else self._returned
        if queue is not self._new and key not in queue:
            self._learn(key, cache_dict)
            queue = self._new if key in self._new else self._returned
        queue.move_to_end(key)
        queue[key] = self._time = self._time + 1
        cache_dict.move_to_end(key)

    def _enter(self, key: Any, size: int, cost: float | None) -> None:  # noqa: ARG002
        self._time += 1
        if key in self._new:
            queue = self._new
        elif key in self._returned or self._came_back(key, size):
            queue = self._returned
        else:
            queue = self._new
        queue[key] = self._time
        queue.move_to_end(key)

    def _came_back(self, key: Any, size: int) -> bool:
        """Say whether the key is remembered; learn from it, and forget it."""
        maximum = self.MAX_CACHE_SIZE
        step = 1 + self.rate * size / maximum if size <= self.largest * maximum else 1.0
        missed_new = self._new_ghosts.recall(key)
        if missed_new is not None:
            if missed_new <= self.window * maximum:
                self.patience = max(1.0, self.patience / step)
            return True
        missed_returned = self._returned_ghosts.recall(key)
        if missed_returned is None:
            return False
        if missed_returned <= self.window * maximum:
            self.patience = min(self.patience_max, self.patience * step)
        return True

    def _leave(self, key: Any) -> None:
        if self._new.pop(key, None) is None:
            del self._returned[key]

    def _order(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        time, patience = self._time, self.patience
        new, returned = iter(self._new.items()), iter(self._returned.items())
        a, b = next(new, None), next(returned, None)
        while a is not None and b is not None:
            if time - b[1] <= patience * (time - a[1]):
                yield a[0]
                a = next(new, None)
            else:
                yield b[0]
                b = next(returned, None)
        for rest in chain([a], new) if a is not None else chain([b], returned):
            if rest is not None:
                yield rest[0]

    def _decided(self, leaving: Sequence[Any]) -> None:
        most = self.MAX_CACHE_SIZE * self.ghost_share
        for key in leaving:
            is_new = self._new.pop(key, None) is not None
            if not is_new:
                del self._returned[key]
            (self._new_ghosts if is_new else self._returned_ghosts).add(key, self._sizes[key], most)
