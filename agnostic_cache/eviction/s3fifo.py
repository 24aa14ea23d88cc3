"""S3FIFOEvictor: a small queue for newcomers, a main queue for what came back; quick to drop what is used once."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from agnostic_cache.eviction.budget import BudgetEvictor
from agnostic_cache.eviction.evictor import Entries
from agnostic_cache.eviction.ghosts import Ghosts

_Queue = OrderedDict[Any, int]
"""Sizes by key, the next to leave first."""


class S3FIFOEvictor(BudgetEvictor):
    """Evict from three first-in first-out queues.

    A newcomer enters the small queue, a tenth of the bytes. At its end, who was used twice moves on to the main queue;
    the others leave, and a ghost queue remembers their keys: who comes back while remembered enters the main queue at
    once. At the end of the main queue, each use (up to three) buys another round.

    Source: J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. The threshold and the size of
    the small queue are those of its authors' libCacheSim; the ghosts stand for as many bytes as the cache holds.
    """

    small_share = 0.1
    ghost_share = 1.0
    uses_to_stay = 2

    def reset(self) -> None:
        """Forget every entry, and the ghosts."""
        super().reset()
        self._small: _Queue = OrderedDict()
        self._main: _Queue = OrderedDict()
        self._main_nbytes = 0
        self._ghosts = Ghosts()
        self._uses: dict[Any, int] = {}  # since the entry came into its queue, at most 3
        self._log: list[tuple[_Queue, Any, int, int]] = []  # who was taken from the front of which queue, in a decision

    def update_on_get(self, key: Any, cache_dict: Entries) -> None:
        """Count the use; no queue changes."""
        if key not in self._uses:
            self._learn(key, cache_dict)
        uses = self._uses[key]
        if uses < 3:  # noqa: PLR2004 - two bits, as in the paper
            self._uses[key] = uses + 1

    def _enter(self, key: Any, size: int, cost: float | None) -> None:  # noqa: ARG002
        if key in self._uses:
            if key in self._main:
                self._main_nbytes += size - self._main[key]
                self._main[key] = size
            else:
                self._small[key] = size
            return
        self._uses[key] = 0
        if self._ghosts.recall(key) is not None:
            self._main[key] = size
            self._main_nbytes += size
        else:
            self._small[key] = size

    def _leave(self, key: Any) -> None:
        del self._uses[key]
        if self._small.pop(key, None) is None:
            self._main_nbytes -= self._main.pop(key)

    def _order(self, cache_dict: Entries, leaving: Sequence[Any]) -> Iterator[Any]:  # noqa: ARG002
        small, main, uses, log = self._small, self._main, self._uses, self._log
        main_max = self.MAX_CACHE_SIZE * (1 - self.small_share)
        while small or main:
            queue = main if self._main_nbytes > main_max or not small else small
            key, size = queue.popitem(last=False)
            used = uses[key]
            log.append((queue, key, size, used))
            if queue is main:
                if used:
                    uses[key] = used - 1
                    main[key] = size
                else:
                    self._main_nbytes -= size
                    yield key
            elif used >= self.uses_to_stay:
                uses[key] = 0
                main[key] = size
                self._main_nbytes += size
            else:
                yield key

    def _decided(self, leaving: Sequence[Any]) -> None:
        log, uses, small = self._log, self._uses, self._small
        if not leaving:  # refused: everybody back to where they were
            for queue, key, size, used in reversed(log):
                if key in self._main:
                    self._main_nbytes -= self._main.pop(key)
                self._put_back(queue, key, size)
                uses[key] = used
            log.clear()
            return
        most, remember = self.MAX_CACHE_SIZE * self.ghost_share, self._ghosts.add
        taken = {key: (queue, size) for queue, key, size, _ in log}
        for key in leaving:
            if key not in taken:  # it was not known until now
                self._leave(key)
                continue
            del uses[key]
            queue, size = taken[key]
            if queue is small:
                remember(key, size, most)
        if len(log) > len(leaving):
            for queue, key, size, _ in reversed(log):
                if key in uses and key not in self._main:  # was passed over
                    self._put_back(queue, key, size)
        log.clear()

    def _put_back(self, queue: _Queue, key: Any, size: int) -> None:
        queue[key] = size
        queue.move_to_end(key, last=False)
        if queue is self._main:
            self._main_nbytes += size
