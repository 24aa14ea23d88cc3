"""TieredStorage: fast and small before slow and large, as one storage.

Tiers are inclusive: what comes in goes to all of them, so that what leaves one is in the next already. The first is
written at once; each other one in the background by default, so that nobody who decodes or evicts waits for it. What
waits to be written is a view of the first tier's memory, which stays there until it is written: no copy is made.

A hit is to be no slower than a miss: how fast each tier answers is measured as it runs, and `load` takes from it only
what the caller would take longer to compute.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from agnostic_cache.blob.pieces import Blob, pieces_of
from agnostic_cache.errors import StorageError
from agnostic_cache.eviction.evictor import PutStatus
from agnostic_cache.process.forks import watch
from agnostic_cache.process.lock import Lock
from agnostic_cache.sizes import parse_size
from agnostic_cache.storage.backend import StorageBackend, StorageStats, check_key
from agnostic_cache.storage.tier import Tier, TierStats


class _Calls(threading.local):
    """How many calls of one storage this thread is in: more than one where a finaliser calls in the middle of one."""

    depth = 0


class TieredStorage(StorageBackend):
    """Several storages as one. Safe to use from several threads; after a fork, what was waiting is the parent's.

    >>> from agnostic_cache.storage.memory import MemoryStorage
    >>> with TieredStorage([MemoryStorage("1MiB"), MemoryStorage("16MiB")]) as storage:
    ...     storage.put("a", b"bytes")
    ...     storage.flush()
    ...     [tier.storage.entries for tier in storage.tier_stats()]
    <PutStatus.LEGAL: 1>
    [1, 1]
    """

    def __init__(
        self,
        tiers: Sequence[StorageBackend],
        *,
        write_through: Sequence[int] = (),
        max_pending_bytes: int | str = "256MiB",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Put storages in order, the fastest first; they are closed with this.

        Args:
            tiers: At least one, as `open_storage` gives them: one that fails is a miss.
            write_through: Numbers of the tiers that a put waits for, besides 0.
            max_pending_bytes: What may wait to be written to one tier; beyond it, a blob is not written there.
            clock: Seconds, to measure with.

        Raises:
            InvalidSizeError: `max_pending_bytes` is no size.
            ValueError: There is no tier.
        """
        if not tiers:
            msg = "a tiered storage of no tier; pass at least one storage"
            raise ValueError(msg)
        limit = parse_size(max_pending_bytes)
        self._tiers = [Tier(storage, limit, clock) for storage in tiers]
        self._through = frozenset({0, *write_through})
        self._closed = False
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        """Bring nothing up: what did is the parent's."""
        self._calls = _Calls()
        self._lock = Lock()  # guards what follows; held for dict operations only
        self._arriving: dict[str, int] = {}  # puts under way: what is read of their keys may be older, and stays below
        self._coming: dict[str, object] = {}  # keys that are being brought up, and by whom; a put takes that back

    # --- in -----------------------------------------------------------------------------------------------------------

    def put(self, key: str, blob: Blob) -> PutStatus:
        """See `StorageBackend.put`; ``LEGAL`` where some tier has it, or where it waits to be written to one.

        Where the first tier refused it and the one that it waits for does so later, nobody has it, and `tier_stats`
        counts it as skipped.
        """
        check_key(key)
        with self._call() as nested:
            with self._lock:
                self._arriving[key] = self._arriving.get(key, 0) + 1
            try:
                self._overtake(key, nested=nested)
                return self._put(key, blob)
            finally:
                with self._lock:
                    self._arriving[key] -= 1
                    if not self._arriving[key]:
                        del self._arriving[key]

    def _put(self, key: str, blob: Blob) -> PutStatus:
        first, *others = self._tiers
        status = first.storage.put(key, blob)
        if not others:
            return status
        held = first.storage.get(key) if status is PutStatus.LEGAL else None
        if held is None:  # refused by the first, or gone from it already
            held = memoryview(b"".join(pieces_of(blob)[1]))
        left_out = [first] if status is PutStatus.ILLEGAL else []
        for number, tier in enumerate(others, start=1):
            if not tier.put(key, held, wait=number in self._through):
                left_out.append(tier)
        if len(left_out) == len(self._tiers):
            return PutStatus.ILLEGAL
        for tier in left_out:  # what it has under that key is old
            tier.forget(key)
        return PutStatus.LEGAL

    def put_many(self, blobs: Mapping[str, Blob]) -> list[PutStatus]:
        """See `SupportsBatch.put_many`."""
        return [self.put(key, blob) for key, blob in blobs.items()]

    def prefetch(self, keys: Sequence[str]) -> None:
        """Bring what lies in lower tiers to the first, in the background. Does not wait."""
        self._check_open()
        for number, tier in enumerate(self._tiers[1:], start=1):
            tier.submit(functools.partial(self._bring_up, number, keys))

    def _bring_up(self, number: int, keys: Sequence[str]) -> None:
        self._fetch(number, [key for key in keys if not self._tiers[0].contains_many([key])[0]])

    def _fetch(self, number: int, keys: Sequence[str]) -> dict[str, memoryview]:
        """Read from one tier, and have what it gave written to those above it."""
        tier, bringer = self._tiers[number], object()
        if number:
            with self._lock:
                self._coming.update({key: bringer for key in keys if key not in self._arriving})
        blobs = zip(keys, tier.get_many(keys), strict=True)
        found = {key: blob for key, blob in blobs if blob is not None}
        for key in keys if number else ():
            done = functools.partial(self._forget, key, bringer)
            uppers = self._tiers[:number] if key in found else []
            for upper in uppers:
                wanted = functools.partial(self._is_coming, key, bringer)
                upper.bring_up(key, found[key], wanted, done if upper is uppers[0] else None)
            if not uppers:
                done()
        return found

    def _is_coming(self, key: str, bringer: object) -> bool:
        return self._coming.get(key) is bringer

    def _forget(self, key: str, bringer: object) -> None:
        with self._lock:
            if self._coming.get(key) is bringer:
                del self._coming[key]

    def _overtake(self, key: str, *, nested: bool) -> None:
        """Keep older bytes that are being brought up from coming in behind newer ones."""
        with self._lock:
            self._coming.pop(key, None)
        for number in self._through:
            self._tiers[number].settle(key, nested=nested)

    # --- out ----------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> memoryview | None:
        """See `StorageBackend.get`. A hit in a lower tier comes up to those above."""
        check_key(key)
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[str]) -> list[memoryview | None]:
        """See `SupportsBatch.get_many`. Each tier is asked once, for all that those above lack."""
        found: dict[str, memoryview] = {}
        with self._call():
            for number in range(len(self._tiers)):
                missing = [key for key in dict.fromkeys(keys) if key not in found]
                if not missing:
                    break
                found |= self._fetch(number, missing)
        return [found.get(key) for key in keys]

    def load(self, keys: Sequence[str], *, seconds_per_key: float | None = None) -> list[memoryview]:
        """Return the blobs of the first keys, as far as they are there and worth it.

        Args:
            keys: A run, of which each is of use only with all before it.
            seconds_per_key: What the caller would take to compute one of them; a tier that takes longer is passed over,
                and measured again in the background. None takes what is there.

        Returns:
            A blob for each of the first keys, up to the first that is missing or not worth it.
        """
        where: dict[str, int] = {}
        found: dict[str, memoryview] = {}
        with self._call():
            for number, tier in enumerate(self._tiers):
                missing = [key for key in keys if key not in where]
                if not missing:
                    break
                there = [key for key, is_there in zip(missing, tier.contains_many(missing), strict=True) if is_there]
                if there and not self._is_worth(number, there, seconds_per_key):
                    continue
                where |= dict.fromkeys(there, number)
            reach = next((i for i, key in enumerate(keys) if key not in where), len(keys))
            for number in range(len(self._tiers)):
                # A tier may have evicted since what it had: the one below it is asked.
                wanted = [key for key in keys[:reach] if key not in found and where[key] <= number]
                found |= self._fetch(number, wanted)
        reach = next((i for i, key in enumerate(keys[:reach]) if key not in found), reach)
        return [found[key] for key in keys[:reach]]

    def _is_worth(self, number: int, there: Sequence[str], seconds_per_key: float | None) -> bool:
        """Say whether a tier is faster than computing, as far as is known; else have it measured again."""
        tier = self._tiers[number]
        if seconds_per_key is None or number == 0:
            return True
        if tier.seconds_per_blob is None:  # one blob tells
            self._fetch(number, there[:1])
        if tier.seconds_per_blob is not None and tier.seconds_per_blob <= seconds_per_key:
            return True
        if tier.is_idle:
            self.prefetch(there[:1])
        return False

    def contains(self, key: str) -> bool:
        """See `StorageBackend.contains`."""
        check_key(key)
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """See `SupportsBatch.contains_many`. Each tier is asked once, for all that those above lack."""
        found: set[str] = set()
        with self._call():
            for tier in self._tiers:
                missing = [key for key in dict.fromkeys(keys) if key not in found]
                there = tier.contains_many(missing)
                found |= {key for key, is_there in zip(missing, there, strict=True) if is_there}
        return [key in found for key in keys]

    def remove(self, key: str) -> bool:
        """See `StorageBackend.remove`. Removes it from every tier; waits for what is being written under it."""
        check_key(key)
        with self._call() as nested:
            self._overtake(key, nested=nested)
            return sum(tier.remove(key, nested=nested) for tier in self._tiers) > 0

    def list_keys(self) -> list[str]:
        """See `StorageBackend.list_keys`. The keys of all tiers, each once."""
        with self._call():
            return list(dict.fromkeys(key for tier in self._tiers for key in tier.list_keys()))

    # --- its life -----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until everything that was put is in every tier, but for what `tier_stats` counts as skipped."""
        with self._call() as nested:
            for tier in reversed(self._tiers):  # what comes up from a tier waits for those above
                tier.flush(nested=nested)

    def close(self) -> None:
        """Flush, and close every tier. Idempotent.

        Raises:
            BusyError: A finaliser closes a storage that it has interrupted; it stays open.
        """
        if self._closed:
            return
        self.flush()
        self._closed = True
        for tier in self._tiers:
            tier.stop()
            tier.storage.close()

    def stats(self) -> StorageStats:
        """Return the first tier's counts, with the hits of all tiers."""
        tiers = self.tier_stats()
        found = tiers[0].storage
        return found._replace(hits=sum(tier.hits for tier in tiers), misses=tiers[-1].storage.misses)

    def tier_stats(self) -> list[TierStats]:
        """Return what each tier holds and did, the first one first."""
        self._calls.depth += 1
        try:
            return [tier.stats() for tier in self._tiers]
        finally:
            self._calls.depth -= 1

    @contextmanager
    def _call(self) -> Iterator[bool]:
        """Say whether this is a finaliser's call, in the middle of another one of its thread.

        Who writes in the background may be waiting for a lock that the interrupted call holds.
        """
        self._check_open()
        self._calls.depth += 1
        try:
            yield self._calls.depth > 1
        finally:
            self._calls.depth -= 1

    def _check_open(self) -> None:
        if self._closed:
            msg = "this tiered storage is closed; open another"
            raise StorageError(msg)
