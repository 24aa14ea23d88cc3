"""Tier: a storage, what waits to be written to it, and how fast it is."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agnostic_cache.errors import BusyError, StorageError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.storage.backend import StorageBackend, StorageStats, contains_many, get_many

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


class _Writer(threading.Thread):
    """A thread that writes to a tier: it waits for no other."""


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
        self._lock = Lock()  # guards everything below; no task runs under it
        self._gates: list[threading.Lock] = []  # of threads that wait for a change: each opens one
        self._tasks: deque[Callable[[], object]] = deque()
        self._unwritten: dict[str, memoryview | None] = {}  # what keys are to have there: bytes, or nothing
        self._waiting: set[str] = set()  # those of them that a task will see to; the others' is running
        self._coming: dict[str, int] = {}  # blobs of lower tiers on their way, by key
        self._bytes = 0  # that all of these hold
        self._running = False  # a task is
        self._stopped = False
        self._thread: _Writer | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._tasks and not self._running

    # --- in -----------------------------------------------------------------------------------------------------------

    def put(self, key: str, blob: memoryview, *, wait: bool) -> bool:
        """Write a blob, now or in the background; return False where it was refused, or too much waits already."""
        if wait:
            return self.storage.put(key, blob) is PutStatus.LEGAL
        kept = self._leave(key, blob)
        self._skipped += not kept
        return kept

    def forget(self, key: str) -> None:
        """Remove what is there under a key, in the background."""
        self._leave(key, None)

    def _leave(self, key: str, blob: memoryview | None) -> bool:
        """Have a key get a blob, or none, whatever it was to get before; return False where too much waits already."""
        with self._lock:
            old = self._unwritten.get(key) if key in self._waiting else None
            nbytes = (blob.nbytes if blob else 0) - (old.nbytes if old else 0)
            if self._stopped or (blob and self._bytes and self._bytes + nbytes > self._limit):
                return False
            self._bytes += nbytes
            self._unwritten[key] = blob
            if key not in self._waiting:
                self._waiting.add(key)
                self._submit(lambda: self._see_to(key))
        return True

    def _see_to(self, key: str) -> None:
        """Give a key what it is to get; where that is nothing, to all keys that are to get nothing."""
        with self._lock:
            if key not in self._waiting:  # it went with others
                return
            blob = self._unwritten[key]
            keys = [key] if blob is not None else [name for name in self._waiting if self._unwritten[name] is None]
            self._waiting.difference_update(keys)
        try:
            if blob is None:
                self._remove(keys)
            elif not self._write(key, blob):
                self._skipped += 1
                self.storage.remove(key)  # what it has under that key is old
        finally:
            with self._lock:
                self._bytes -= blob.nbytes if blob else 0
                for name in keys:
                    if name not in self._waiting:
                        del self._unwritten[name]

    def _write(self, key: str, blob: memoryview) -> bool:
        try:
            return self.storage.put(key, blob) is PutStatus.LEGAL
        except StorageError:  # of one that was opened with strict=True: nobody is there to be told
            return False

    def _remove(self, keys: Sequence[str]) -> None:
        """Remove what is there of some keys. Most were skipped and never there: one question says which."""
        for key, is_there in zip(keys, contains_many(self.storage, keys), strict=True):
            if is_there:
                self.storage.remove(key)

    def bring_up(self, key: str, blob: memoryview, wanted: Callable[[], bool], then: Callable[[], None] | None) -> None:
        """Write in the background what a lower tier gave, unless too much waits already.

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
                with self._lock:
                    self._bytes -= blob.nbytes
                    self._coming[key] -= 1
                    if not self._coming[key]:
                        del self._coming[key]
                if then is not None:
                    then()

        with self._lock:
            fits = not self._stopped and (not self._bytes or self._bytes + blob.nbytes <= self._limit)
            if fits:
                self._bytes += blob.nbytes
                self._coming[key] = self._coming.get(key, 0) + 1
                self._submit(write)
        if not fits and then is not None:
            then()

    # --- out ----------------------------------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """Read blobs, and measure it."""
        with self._lock:
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
        with self._lock:
            found = {key: self._unwritten[key] is not None for key in keys if key in self._unwritten}
        asked = [key for key in keys if key not in found]
        if asked:
            found |= zip(asked, contains_many(self.storage, asked), strict=True)
        return [found[key] for key in keys]

    def list_keys(self) -> list[str]:
        """Return the keys of what is there, and of what waits."""
        with self._lock:
            unwritten = dict(self._unwritten)
        keys = dict.fromkeys([*self.storage.list_keys(), *unwritten])
        return [key for key in keys if key not in unwritten or unwritten[key] is not None]

    def settle(self, key: str, *, nested: bool) -> None:
        """Wait until nothing waits to be done under a key.

        Args:
            key: The key.
            nested: This thread is in the middle of another call, and may hold what is waited for.

        Raises:
            BusyError: A finaliser asks for it, on a thread that it has interrupted at a bad time.
        """
        self._wait(lambda: key not in self._unwritten and key not in self._coming, nested=nested)

    def remove(self, key: str, *, nested: bool) -> bool:
        """Remove a blob, behind what is being written under its key; see `settle`."""
        self.settle(key, nested=nested)
        return self.storage.remove(key)

    # --- the queue ----------------------------------------------------------------------------------------------------

    def submit(self, task: Callable[[], object]) -> None:
        """Have something done in the background, in order; nothing once the tier is stopped."""
        with self._lock:
            if not self._stopped:
                self._submit(task)

    def _submit(self, task: Callable[[], object]) -> None:
        """Queue a task. The lock is held."""
        self._tasks.append(task)
        if self._thread is None:
            self._thread = _Writer(target=self._work, name="agnostic-cache tier", daemon=True)
            self._thread.start()
        self._tell_changed()

    def _work(self) -> None:
        while True:
            self._wait(lambda: bool(self._tasks) or self._stopped, nested=False, works=True)
            with self._lock:
                if not self._tasks:
                    return
                task = self._tasks.popleft()
                self._running = True
            try:
                task()
            except StorageError:  # as in `_write`
                self._skipped += 1
            except Exception:  # of a third party's storage; the thread goes on, for others wait for what is behind
                _logger.exception("a task of a storage's queue failed")
            finally:
                del task  # it holds memory of the first tier
                with self._lock:
                    self._running = False
                    self._tell_changed()

    def flush(self, *, nested: bool) -> None:
        """Wait until nothing waits; see `settle`."""
        self._wait(lambda: self.is_idle, nested=nested)

    def _wait(self, until: Callable[[], bool], *, nested: bool, works: bool = False) -> None:
        while True:
            gate = threading.Lock()  # not a Condition, which an interrupt may leave held
            gate.acquire()
            with self._lock:
                if until():
                    return
                # A finaliser may come on a thread that writes, between two tasks too: it would wait for itself.
                if nested or (not works and isinstance(threading.current_thread(), _Writer)):
                    msg = "a finaliser called a storage that it had interrupted; have another thread call"
                    raise BusyError(msg)
                self._gates.append(gate)
            gate.acquire()

    def _tell_changed(self) -> None:
        """Have everybody who waits look again. The lock is held."""
        gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    def stop(self) -> None:
        """End the thread, once it has done what it was told."""
        with self._lock:
            self._stopped = True
            self._tell_changed()
        if self._thread is not None:
            self._thread.join()

    def stats(self) -> TierStats:
        """Return what the tier holds and did."""
        return TierStats(self.storage.stats(), self._hits, self._bytes, self._skipped, self.seconds_per_blob)
