"""The cache interface, and a cache bounded by a count of entries.

Source: ``mellea.backends.cache``, whose names, signatures and behaviour are kept. Where
`SimpleLRUCache` differs: an entry survives an ``on_evict`` that raises, an overwritten
value can be released (``on_replace``), and any number of threads may share a cache.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

__all__ = ["Cache", "SimpleLRUCache"]

# Looked up once: CPython 3.11 does not specialise the lookup on an OrderedDict, so that a
# hit takes 1.14 times as long as lru-dict's, against 1.05. No gain from 3.12 on.
_move_to_end = OrderedDict[Any, Any].move_to_end


class Cache(ABC):
    """Store model state (a KV cache, say) under keys.

    Every cache takes keys that are ``str`` or ``int``; a subclass may take more, and
    its `put` may answer something.
    """

    @abstractmethod
    def put(self, key: str | int, value: Any) -> object:
        """Store `value` under `key`; other entries may be evicted for it.

        Args:
            key: The name of the entry; an entry of that name is overwritten.
            value: The state to store.

        Returns:
            Nothing that a caller must look at, unless the subclass says so.
        """

    @abstractmethod
    def get(self, key: str | int) -> Any | None:
        """Return the value stored under `key`; may change what is evicted next.

        Args:
            key: The name of the entry.

        Returns:
            The value, or None where there is no such entry.
        """

    @abstractmethod
    def current_size(self) -> int:
        """Return the number of entries, whatever their size in bytes."""


class SimpleLRUCache(Cache):
    """Keep at most `capacity` entries; evict the least recently used first.

    Values are stored and returned as they are, never copied: a value that one thread
    uses may be evicted by another, and released by its `on_evict`. Where that matters,
    borrow from a `StateCache`.

    Safe under threads. `put` takes a lock, `get` does not. Callbacks run in the thread
    that called `put`, after the lock is given back, so they may use the cache.

    Args:
        capacity: The most entries to hold. At zero or below `put` does nothing.
        on_evict: Called with each evicted value, once, oldest first; releases device
            memory, say. A value stored under two keys is two entries.
        on_replace: Called with a value that `put` overwrote by another object.

    Attributes:
        cache: The entries, oldest first. Whoever writes to it, or assigns another
            ``OrderedDict``, keeps other threads away meanwhile.
        capacity: May be changed; the next `put` evicts what is too much.
        on_evict: May be changed; the next `put` calls it.
        on_replace: May be changed; the next `put` calls it.

    Example:
        >>> cache = SimpleLRUCache(2, on_evict=print)
        >>> cache.put("a", "state of a")
        >>> cache.put("b", "state of b")
        >>> cache.get("a")
        'state of a'
        >>> cache.put("c", "state of c")
        state of b
    """

    def __init__(
        self,
        capacity: int,
        on_evict: Callable[[Any], object] | None = None,
        *,
        on_replace: Callable[[Any], object] | None = None,
    ) -> None:
        self.capacity = capacity
        self.cache: OrderedDict[Hashable, Any] = OrderedDict()
        self.on_evict = on_evict
        self.on_replace = on_replace
        # Guards writes to `cache`. Reentrant, since the garbage collector may run a
        # finaliser that calls put in the middle of put.
        self._lock = threading.RLock()

    def get(self, key: Hashable) -> Any | None:
        """Return the value stored under `key`, and make it the most recently used.

        Neither copies nor blocks. An entry that another thread removes at the same time
        may still be returned.

        Args:
            key: The name of the entry; any hashable.

        Returns:
            The value, or None where there is no such entry (or None is its value).
        """
        # No lock: under the GIL each call on the OrderedDict is atomic, and with a lock
        # a hit takes three times as long. Asking first, with `in` or `.get`, makes a hit
        # 20 to 40 % slower; a miss is slower this way (0.4 us), but a prefill follows.
        cache = self.cache
        try:
            value = cache[key]
        except KeyError:
            return None
        try:
            _move_to_end(cache, key)
        except KeyError:
            return value  # removed by another thread after it was read
        return value

    def put(self, key: Hashable, value: Any) -> None:
        """Store `value` under `key` as the most recently used, evicting as needed.

        Does not copy. Overwriting an entry evicts nothing as long as `capacity` stands.
        When a callback raises, the value is stored, the callbacks still due are called,
        and then the error is raised.

        Args:
            key: The name of the entry; any hashable.
            value: The state to store.

        Raises:
            BaseExceptionGroup: More than one callback raised (an ``ExceptionGroup``
                where each error is an ``Exception``). One error is raised as it is.
        """
        capacity = self.capacity
        if capacity <= 0:
            return
        # What has left, with whom to tell. Kept until the lock is given back, so that no
        # callback and no finaliser of a value runs under it.
        left: list[tuple[Callable[[Any], object] | None, Any]] = []
        with self._lock:
            cache = self.cache
            is_new = key not in cache
            if not is_new:
                old = cache[key]
                left.append((self.on_replace if old is not value else None, old))
                cache[key] = value
                cache.move_to_end(key)
            while len(cache) + is_new > capacity:
                left.append((self.on_evict, cache.popitem(last=False)[1]))
            if is_new:
                # After eviction, not before: a get that promotes the other entries
                # meanwhile cannot make this one the oldest, hence the victim.
                cache[key] = value
        _hand_over(left)

    def current_size(self) -> int:
        """Return the number of entries, whatever their size in bytes."""
        return len(self.cache)


def _hand_over(left: Iterable[tuple[Callable[[Any], object] | None, Any]]) -> None:
    """Call each callback with its value; only then raise what they raised."""
    errors: list[BaseException] = []
    for callback, value in left:
        if callback is None:
            continue
        try:
            callback(value)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
    if not errors:
        return
    try:
        if len(errors) == 1:
            raise errors[0]
        message = f"{len(errors)} callbacks of a cache raised; the value is stored"
        raise BaseExceptionGroup(message, errors)
    finally:
        # Their tracebacks hold this frame. Would it hold them too, the values that have
        # left would live until the garbage collector comes by.
        del errors
