"""Adaptive: LRU that learns how much longer to keep what came back."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from agnostic_cache.eviction.ghosts import Ghosts
from agnostic_cache.eviction.policy import Policy


class Adaptive(Policy):
    """Evict the least recently used, with patience for entries that were evicted once and came back.

    New entries and returned ones are two queues, each in the order of use. The oldest new one leaves, unless the oldest
    returned one has idled `patience` times as long. At a patience of 1 this is LRU, and so it starts. An entry that
    comes back soon after it was evicted from one queue shows that a slightly longer queue would have kept it: that
    raises patience where it was a returned entry, and lowers it where it was a new one. So the policy finds out how
    much of the budget to give to what is used again and again: at a small budget most of it, and at a large one little.

    An entry of more than a 64th of the budget teaches nothing: where so few entries fit there is nothing to learn from,
    and LRU it stays.

    Source: ours. The queues are those of 2Q (T. Johnson, D. Shasha, VLDB 1994), the ghosts that teach those of ARC (N.
    Megiddo, D. Modha, FAST 2003); new is that they set a ratio of ages instead of a share of the budget, so that one
    end of the scale is LRU itself.
    """

    settings = ("ghost_share", "window", "rate", "largest", "patience_max")
    ghost_share = 2.0  # bytes of either queue's ghosts, of the budget
    window = 0.2  # what was evicted that recently, of the budget, was evicted too early
    rate = 100.0  # how quickly it learns: when as much as the budget was evicted too early, patience grows by exp(rate)
    largest = 1 / 64  # an entry of more than this of the budget teaches nothing
    patience_max = 100.0

    def reset(self) -> None:
        """See `Policy.reset`. Forgets the ghosts and the patience, too."""
        self.patience = 1.0
        self._new: OrderedDict[Any, int] = OrderedDict()  # time of last use by key, the oldest first
        self._returned: OrderedDict[Any, int] = OrderedDict()
        self._nbytes: dict[Any, int] = {}
        self._new_ghosts, self._returned_ghosts = Ghosts(), Ghosts()
        self._time = 0  # counts uses

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:  # noqa: ARG002
        """See `Policy.added`."""
        returned = key in self._returned or (key not in self._new and self._came_back(key, nbytes))
        self._nbytes[key] = nbytes
        self._touch(self._returned if returned else self._new, key)

    def used(self, key: Any) -> None:
        """See `Policy.used`. Makes the key the newest of its queue."""
        queue = self._new if key in self._new else self._returned
        queue[key]  # raises where it is in neither
        self._touch(queue, key)

    def _touch(self, queue: OrderedDict[Any, int], key: Any) -> None:
        queue[key] = self._time = self._time + 1
        queue.move_to_end(key)

    def _came_back(self, key: Any, nbytes: int) -> bool:
        """Say whether the key is a ghost; learn from it, and forget it."""
        budget = self.max_bytes
        step = 1 + self.rate * nbytes / budget if nbytes <= self.largest * budget else 1.0
        evicted_since = self._new_ghosts.recall(key)
        if evicted_since is None:
            evicted_since = self._returned_ghosts.recall(key)
        else:
            step = 1 / step
        if evicted_since is not None and evicted_since <= self.window * budget:
            self.patience = min(self.patience_max, max(1.0, self.patience * step))
        return evicted_since is not None

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`. Where it is evicted, its ghost stays."""
        nbytes = self._nbytes.pop(key, None)
        if nbytes is None:
            return
        is_new = self._new.pop(key, None) is not None
        if not is_new:
            del self._returned[key]
        if evicted:
            ghosts = self._new_ghosts if is_new else self._returned_ghosts
            ghosts.add(key, nbytes, self.max_bytes * self.ghost_share)

    def order(self) -> Iterator[Any]:
        """See `Policy.order`."""
        time, patience = self._time, self.patience
        new, returned = iter(self._new.items()), iter(self._returned.items())
        a, b = next(new, None), next(returned, None)
        while a or b:
            if a and (not b or time - b[1] <= patience * (time - a[1])):
                yield a[0]
                a = next(new, None)
            elif b:
                yield b[0]
                b = next(returned, None)
