"""S3FIFO: a small queue for newcomers, a main queue for what came back; quick to drop what is used once."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from agnostic_cache.eviction.ghosts import Ghosts
from agnostic_cache.eviction.policy import Policy

_USES_MAX = 3  # two bits, as in the paper


class S3FIFO(Policy):
    """Evict from three first-in first-out queues.

    A newcomer enters the small queue, a tenth of the bytes. At its end, an entry that was used twice moves on to the
    main queue; the others leave, and a ghost queue remembers their keys: what comes back while remembered enters the
    main queue at once. At the end of the main queue, each use (up to three) buys another round.

    Source: J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. The threshold and the size of
    the small queue are those of its authors' libCacheSim; the ghosts stand for as many bytes as the cache holds.
    """

    settings = ("small_share", "ghost_share", "uses_to_stay")
    small_share = 0.1
    ghost_share = 1.0
    uses_to_stay = 2

    def reset(self) -> None:
        """See `Policy.reset`. Forgets the ghosts, too."""
        self._small: OrderedDict[Any, int] = OrderedDict()  # bytes by key, the next to leave first
        self._main: OrderedDict[Any, int] = OrderedDict()
        self._main_nbytes = 0  # holds: the sum of _main
        self._uses: dict[Any, int] = {}  # of each key, since it came into its queue
        self._ghosts = Ghosts()

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:  # noqa: ARG002
        """See `Policy.added`. An overwritten entry keeps its place."""
        if key not in self._uses:
            self._uses[key] = 0
            came_back = self._ghosts.recall(key) is not None
        else:
            came_back = key in self._main
        if came_back:
            self._main_nbytes += nbytes - self._main.get(key, 0)
            self._main[key] = nbytes
        else:
            self._small[key] = nbytes

    def used(self, key: Any) -> None:
        """See `Policy.used`. Counts the use; no queue changes."""
        uses = self._uses[key]
        if uses < _USES_MAX:
            self._uses[key] = uses + 1

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`. Where it is evicted, what stood before it in the queues has moved on."""
        if key not in self._uses:
            return
        if evicted:
            self._move_on(key)
        del self._uses[key]
        nbytes = self._small.pop(key, None)
        if nbytes is None:
            self._main_nbytes -= self._main.pop(key)
        elif evicted:
            self._ghosts.add(key, nbytes, self.max_bytes * self.ghost_share)

    def order(self) -> Iterator[Any]:
        """See `Policy.order`."""
        return self._walk([])

    def _move_on(self, victim: Any) -> None:
        """Move to the end of the main queue what has its turn before the victim, and stays."""
        moved: list[tuple[Any, int, int]] = []
        for key in self._walk(moved):
            if key == victim:
                break
        for key, nbytes, uses in moved:
            self._uses[key] = uses
            if self._small.pop(key, None) is None:
                self._main.move_to_end(key)
            else:
                self._main[key] = nbytes
                self._main_nbytes += nbytes

    def _walk(self, moved: list[tuple[Any, int, int]]) -> Iterator[Any]:
        """Yield the victims in order; note in `moved` what moves on before each: key, bytes, and uses left to it."""
        main_nbytes, main_max = self._main_nbytes, self.max_bytes * (1 - self.small_share)
        small, main = iter(self._small.items()), iter(self._main.items())
        newest, oldest = next(small, None), next(main, None)
        again = 0  # index in moved, which stands behind the main queue
        while newest or oldest or again < len(moved):
            if newest and main_nbytes <= main_max:
                (key, nbytes), uses = newest, 0
                newest = next(small, None)
                if self._uses[key] < self.uses_to_stay:
                    yield key
                    continue
                main_nbytes += nbytes
            else:
                if oldest:
                    (key, nbytes), uses = oldest, self._uses[oldest[0]]
                    oldest = next(main, None)
                else:
                    key, nbytes, uses = moved[again]
                    again += 1
                if not uses:
                    main_nbytes -= nbytes
                    yield key
                    continue
                uses -= 1
            moved.append((key, nbytes, uses))
