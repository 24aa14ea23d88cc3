"""GuardedStorage: a backend that is down, slow or full is a miss with a warning, never an error in a decoding loop.

A circuit breaker keeps a loop from waiting for the same time-out again and again: after some failures in a row nothing
is asked of the backend for a while, then one call tries it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from agnostic_cache.blob.pieces import Blob
from agnostic_cache.errors import BusyError, StorageError, StorageFullError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.storage.backend import (
    StorageBackend,
    StorageStats,
    SupportsGetInto,
    check_key,
    contains_many,
    get_many,
    hand_over,
    put_many,
)

_logger = logging.getLogger("agnostic_cache.storage")
_FAILURES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0

_T = TypeVar("_T")


class Breaker:
    """Says when to leave something alone that fails. Safe to use from several threads.

    Closed, it lets every call through. After three failures in a row it opens for half a second, then lets one call
    through; where that fails too, for twice as long, and so on up to 30 seconds.

    Args:
        clock: Seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        """Be closed."""
        self._lock = Lock()  # guards everything below
        self._failures = 0
        self._pause = _FIRST_PAUSE
        self._until: float | None = None  # when the next call may try, while open

    @property
    def is_open(self) -> bool:
        """Whether calls are being held back."""
        return self._until is not None

    def allows(self) -> bool:
        """Say whether a call may go ahead now; its outcome is then to be told."""
        if not self.is_open:
            return True
        with self._lock:
            until, now = self._until, self._clock()
            if until is not None and now < until:
                return False
            if until is not None:
                self._until = now + self._pause  # this call tries, the others go on waiting
            return True

    def succeeded(self) -> bool:
        """Note that a call went well; return whether that closed the breaker."""
        if not self._failures:
            return False
        with self._lock:
            was_open, self._until = self._until is not None, None
            self._failures, self._pause = 0, _FIRST_PAUSE
            return was_open

    def failed(self) -> bool:
        """Note that a call failed; return whether that opened the breaker."""
        with self._lock:
            self._failures += 1
            if self._failures < _FAILURES:
                return False
            opened = self._until is None
            if not opened:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._until = self._clock() + self._pause
            return opened


class GuardedStorage(StorageBackend):
    """A backend whose failures are misses.

    Has every capability that does not need the backend's help: a batch is one call of the backend where it has
    batches, else one for each key.

    Attributes:
        backend: The backend itself, whose errors come through.
        breaker: What holds calls back.
    """

    def __init__(self, backend: StorageBackend, *, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Guard a backend.

        Args:
            backend: What is asked, and closed with this.
            name: What warnings call it: no user, password or token of a URL.
            clock: As in `Breaker`.
        """
        self.backend = backend
        self.breaker = Breaker(clock)
        self._name = name
        self._errors = 0
        self._full = False

    def put(self, key: str, blob: Blob) -> PutStatus:
        """See `StorageBackend.put`; ``ILLEGAL`` where the backend failed."""
        check_key(key)
        return self._ask(lambda: self.backend.put(key, blob), PutStatus.ILLEGAL)

    def put_many(self, blobs: Mapping[str, Blob]) -> list[PutStatus]:
        """See `SupportsBatch.put_many`."""
        return self._ask(lambda: put_many(self.backend, blobs), [PutStatus.ILLEGAL] * len(blobs))

    def get(self, key: str) -> memoryview | None:
        """See `StorageBackend.get`; None where the backend failed."""
        check_key(key)
        return self._ask(lambda: self.backend.get(key), None)

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """See `SupportsBatch.get_many`."""
        nothing: list[memoryview | None] = [None] * len(keys)
        return self._ask(lambda: get_many(self.backend, keys), nothing)

    def get_into(self, key: str, buffer: memoryview) -> int | None:
        """See `SupportsGetInto.get_into`.

        Raises:
            ValueError: `buffer` is too small.
        """
        check_key(key)
        backend = self.backend
        if isinstance(backend, SupportsGetInto):
            return self._ask(lambda: backend.get_into(key, buffer), None)
        return hand_over(self.get(key), buffer)

    def contains(self, key: str) -> bool:
        """See `StorageBackend.contains`; False where the backend failed."""
        check_key(key)
        return self._ask(lambda: self.backend.contains(key), False)  # noqa: FBT003 - the answer, not a flag

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """See `SupportsBatch.contains_many`."""
        return self._ask(lambda: contains_many(self.backend, keys), [False] * len(keys))

    def remove(self, key: str) -> bool:
        """See `StorageBackend.remove`; False where the backend failed, and the entry may still be there."""
        check_key(key)
        return self._ask(lambda: self.backend.remove(key), False)  # noqa: FBT003 - the answer, not a flag

    def list_keys(self) -> list[str]:
        """See `StorageBackend.list_keys`; none where the backend failed."""
        return self._ask(self.backend.list_keys, [])

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def stats(self) -> StorageStats:
        """Return what the backend counts, and how many calls failed or were held back."""
        found = self.backend.stats()
        return found._replace(errors=found.errors + self._errors)

    def _ask(self, call: Callable[[], _T], miss: _T) -> _T:
        try:
            if not self.breaker.allows():
                self._errors += 1
                return miss
            answer = call()
        except BusyError:
            self._errors += 1
            return miss
        except StorageFullError as error:
            self._errors += 1
            if not self._full:
                _logger.warning("%s is full, and takes nothing until there is room: %s", self._name, error)
            self._full = True
            return miss
        except StorageError as error:
            self._errors += 1
            if self.breaker.failed():
                _logger.warning("%s failed, and is left alone for a while: %s", self._name, error)
            else:
                _logger.warning("%s failed, which is a miss: %s", self._name, error)
            return miss
        if self.breaker.succeeded():
            _logger.warning("%s is back", self._name)
        return answer
