"""TTL: another policy, whose entries also leave when they are too old."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, takewhile
from typing import Any

from agnostic_cache.errors import InvalidSizeError
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.eviction.wrapping import WrappingPolicy


class TTL(WrappingPolicy):
    """Let an entry live for a while after it was put, whether it is used or not.

    The container asks `has_expired` before it hands an entry out, and passes `expired` to `choose`: those leave with
    the next put, needed or not, unless they are pinned.

    Args:
        inner: The order of the entries that live.
        ttl_seconds: How long an entry lives.
        clock: Returns seconds, never fewer than before.

    Raises:
        InvalidSizeError: `ttl_seconds` is not a positive number.

    Source: the time to live of HTTP caches, as in cachetools' ``TTLCache``: counted from the put, never renewed by use.
    """

    def __init__(
        self, inner: Policy, *, ttl_seconds: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not (math.isfinite(ttl_seconds) and ttl_seconds > 0):
            msg = f"ttl_seconds={ttl_seconds!r}; give a positive number of seconds"
            raise InvalidSizeError(msg)
        self.ttl_seconds = ttl_seconds
        self._clock = clock
        super().__init__(inner)

    def reset(self) -> None:
        """See `Policy.reset`."""
        super().reset()
        self._put_at: OrderedDict[Any, float] = OrderedDict()  # the oldest first

    def added(self, key: Any, nbytes: int, cost: float | None = None) -> None:
        """See `Policy.added`. An overwritten entry lives anew."""
        super().added(key, nbytes, cost)
        self._put_at[key] = self._clock()
        self._put_at.move_to_end(key)

    def gone(self, key: Any, *, evicted: bool = False) -> None:
        """See `Policy.gone`. To the inner policy, an expired entry was not evicted."""
        super().gone(key, evicted=evicted and not self.has_expired(key))
        self._put_at.pop(key, None)

    def has_expired(self, key: Any) -> bool:
        """See `Policy.has_expired`."""
        put_at = self._put_at.get(key)
        return (put_at is not None and self._is_over(put_at)) or super().has_expired(key)

    def expired(self) -> Iterator[Any]:
        """See `Policy.expired`. The oldest first."""
        over = takewhile(lambda item: self._is_over(item[1]), self._put_at.items())
        return chain((key for key, _ in over), super().expired())

    def _is_over(self, put_at: float) -> bool:
        return self._clock() - put_at >= self.ttl_seconds
