"""Tier: a storage, what waits to be written to it, and how fast it is."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agnostic_cache.errors import StorageError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.storage.backend import StorageBackend, StorageStats, contains_many, get_many
from agnostic_cache.storage.forks import watch

_logger = logging.getLogger("agnostic_cache.storage")
_WEIGHT = 0.25  # of the newest measurement


class TierStats(NamedTuple):
    """What one tier holds and did.

    Attributes:
        storage: What the tier itself counts.
        hits: Blobs that it gave to this tiered storage.
        pending_bytes: Bytes that wait to be written to it.
        skipped: Blobs that it did not get because too much was waiting, or because it refused or failed.
        seconds_per_blob: What a blob from it takes, as measured; None before the first.
    """

    storage: StorageStats
    hits: int
    pending_bytes: int
    skipped: int
    seconds_per_blob: float | None


class Tier:
    """One storage behind a queue, which one thread works off in order. What waits can be read already.

    After a fork what was waiting is the parent's, and so is the thread.

    Attributes:
        storage: The storage itself.
        seconds_per_blob: What a blob from it takes, as measured; None before the first.
    """

    def __init__(
        self, storage: StorageBackend, max_pending_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Put a queue before `storage`, in which no more than `max_pending_bytes` wait."""
        self.storage = storage
        self.seconds_per_blob: float | None = None
        self._limit = max_pending_bytes
        self._clock = clock
        self._hits = self._skipped = 0
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        """Let nothing wait: what did is the parent's, and so is the thread."""
        self._changed = threading.Condition()  # guards everything below; no task runs under it
        self._tasks: deque[tuple[int, Callable[[], object]]] = deque()
        self._pending: dict[str, int] = {}  # tasks that wait, or are being done, by key
        self._unwritten: dict[str, memoryview | None] = {}  # what they will leave there: bytes, or nothing
        self._bytes = 0
        self._running = False  # a task is
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._tasks and not self._running

    # --- in -----------------------------------------------------------------------------------------------------------

    def put(self, key: str, blob: memoryview, *, wait: bool) -> bool:
        """Write a blob, now or in the background; return False where it was refused, or too much waits already."""
        if wait:
            return self.storage.put(key, blob) is PutStatus.LEGAL

        def write() -> None:
            try:
                kept = self.storage.put(key, blob) is PutStatus.LEGAL
            except StorageError:  # of one that was opened with strict=True: nobody is there to be told
                kept = False
            if not kept:
                self._skipped += 1
                self.storage.remove(key)  # what it has under that key is old

        kept = self.submit(write, blob.nbytes, key, blob)
        self._skipped += not kept
        return kept

    def forget(self, key: str) -> None:
        """Remove what is there under a key, in the background."""
        self.submit(lambda: self.storage.remove(key), 0, key, None)

    def bring_up(self, key: str, blob: memoryview, wanted: Callable[[], bool], then: Callable[[], None] | None) -> None:
        """Write in the background what a lower tier gave.

        Args:
            key: Its key.
            blob: Its bytes.
            wanted: Says, when its turn comes, whether they are still those of the key.
            then: Called in the end, whatever came of it.
        """

        def write() -> None:
            try:
                if wanted():
                    self.storage.put(key, blob)
            finally:
                if then is not None:
                    then()

        if not self.submit(write, blob.nbytes, key) and then is not None:
            then()

    # --- out ----------------------------------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """Read blobs, and measure it."""
        with self._changed:
            found = {key: self._unwritten[key] for key in keys if key in self._unwritten}
        asked = [key for key in keys if key not in found]
        if asked:
            start = self._clock()
            blobs = get_many(self.storage, asked)
            count = sum(blob is not None for blob in blobs)
            if count:
                took, before = (self._clock() - start) / count, self.seconds_per_blob
                self.seconds_per_blob = took if before is None else before + _WEIGHT * (took - before)
            found |= zip(asked, blobs, strict=True)
        self._hits += sum(found[key] is not None for key in keys)
        return [found[key] for key in keys]

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """Look blobs up."""
        with self._changed:
            found = {key: self._unwritten[key] is not None for key in keys if key in self._unwritten}
        asked = [key for key in keys if key not in found]
        if asked:
            found |= zip(asked, contains_many(self.storage, asked), strict=True)
        return [found[key] for key in keys]

    def list_keys(self) -> list[str]:
        """Return the keys of what is there, and of what waits."""
        with self._changed:
            unwritten = dict(self._unwritten)
        keys = dict.fromkeys([*self.storage.list_keys(), *unwritten])
        return [key for key in keys if key not in unwritten or unwritten[key] is not None]

    def settle(self, key: str) -> None:
        """Wait until nothing waits to be done under a key."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._pending)

    def remove(self, key: str) -> bool:
        """Remove a blob, behind what is being written under its key."""
        self.settle(key)
        return self.storage.remove(key)

    # --- the queue ----------------------------------------------------------------------------------------------------

    def submit(self, task: Callable[[], object], nbytes: int = 0, key: str = "", *leaves: memoryview | None) -> bool:
        """Have something done in the background, in order.

        Args:
            task: What is to be done.
            nbytes: Bytes of memory that it holds until then.
            key: What it is about.
            leaves: Nothing, or the one thing that will be found under the key afterwards.

        Returns:
            Whether it will be done: too much may wait already.
        """
        with self._changed:
            if self._stopped or (nbytes and self._bytes and self._bytes + nbytes > self._limit):
                return False
            self._bytes += nbytes
            self._pending[key] = self._pending.get(key, 0) + 1
            for blob in leaves:
                self._unwritten[key] = blob
            self._tasks.append((nbytes, lambda: self._do(task, key)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="agnostic-cache tier", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def _do(self, task: Callable[[], object], key: str) -> None:
        try:
            task()
        except StorageError:  # as in `put`
            self._skipped += 1
        except Exception:  # the thread goes on: others wait for what is behind
            _logger.exception("a task of a storage's queue failed")
        finally:
            with self._changed:
                self._pending[key] -= 1
                if not self._pending[key]:
                    del self._pending[key]
                    self._unwritten.pop(key, None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stopped)
                if not self._tasks:
                    return
                nbytes, task = self._tasks.popleft()
                self._running = True
            try:
                task()
            finally:
                del task  # it holds memory of the first tier
                with self._changed:
                    self._running = False
                    self._bytes -= nbytes
                    self._changed.notify_all()

    def flush(self) -> None:
        """Wait until nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_idle)

    def stop(self) -> None:
        """End the thread, once it has done what it was told."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def stats(self) -> TierStats:
        """Return what the tier holds and did."""
        return TierStats(self.storage.stats(), self._hits, self._bytes, self._skipped, self.seconds_per_blob)
