"""Holdings: what a cache holds, and the changes of it, each of which happens as a whole or is made up for.

An interrupt (Ctrl-C) may raise between any two steps, and a policy of a user's own may raise anywhere. So what is true
is kept in few places, each changed by one assignment: `entries`, the pins, and what the operations that are `open` have
lent, freed, or reserved. All else (bytes, open leases, the policy's order) is counted from these. A change sets
`_dirty` first and clears it last; who comes next and finds it set counts anew.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from agnostic_cache.arrays.adapter import Storage
from agnostic_cache.errors import BorrowedError, BusyError
from agnostic_cache.eviction.choose import choose
from agnostic_cache.eviction.policy import Policy
from agnostic_cache.held.entry import Entry, Key, Operation, by_device
from agnostic_cache.held.forked import Forked
from agnostic_cache.held.history import replay
from agnostic_cache.held.ledger import Ledger, LedgerRoom
from agnostic_cache.held.pins import Pins
from agnostic_cache.process.forks import keep, watch
from agnostic_cache.process.lock import Lock

_T = TypeVar("_T")

_POLICY: Final = 1  # the policy may be half changed: it is to learn anew
_COUNTS: Final = 2  # all that is counted may be wrong, too


class Holdings:
    """Entries by key, pins by key, bytes, leases, and the order in which entries leave.

    `run` calls a method with the lock held: ``holdings.run(holdings.lend, operation, keys, True)``. Each method is one
    change. None copies, frees, or calls anything but the policy: what leaves stands in the operation's `leaving`.

    Attributes:
        entries: The entries that can be found, oldest put first. `get` and ``in`` need no lock.
        run: See `Lock.run`.
        lock: The lock. Guards all but `later`.
        later: What finalisers asked for: functions and an argument for each.
        forked: What forks keep alive. Needs no lock.
        pins: Which keys are pinned.
        hits, misses, puts, refused, evictions: As in `StateCacheStats`.
    """

    def __init__(
        self, limits: Mapping[str | None, int], policy: Policy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Hold nothing, within bytes per device name, or under None of all devices; `clock` is for pins that end."""
        self._limits = limits
        self._policy = policy
        # A borrow takes 2 us: a policy that never lets an entry expire is not asked each time.
        self._has_expired = None if type(policy).has_expired is Policy.has_expired else policy.has_expired
        self._clock = clock
        self._start()
        watch(self)

    def after_fork(self) -> None:
        """Hold nothing, with a lock that nobody holds; free nothing: the memory, and its device, are the parent's."""
        keep(self.entries, self.later, [(*each.lent, *each.leaving, each.arriving) for each in self._open.values()])
        self._start()

    def _start(self) -> None:
        self.lock = Lock()
        self.run = self.lock.run
        self.later: SimpleQueue[tuple[Callable[[Any], object], Any]] = SimpleQueue()
        self.entries: dict[Key, Entry] = {}
        self.forked = Forked()
        self.hits = self.misses = self.puts = self.refused = self.evictions = 0
        self.pins = Pins(self._limits, self.entries, self._clock)
        self._open: dict[int, Operation] = {}
        self._tick = 0
        self.version = 0  # of the policy's keys: grows when one goes
        self._policy.reset()
        self._dirty = 0
        self._recount()
        self._dirty = 0

    # --- in ----------------------------------------------------------------------------------------------------------

    def admit(
        self, operation: Operation, key: Key, incoming: Mapping[str, int] | Sequence[Storage], cost: float | None,
        make: Callable[[], Entry] | None = None,
    ) -> bool:  # fmt: skip
        """Make room for a newcomer; list it, or reserve its bytes for a copy. Return False where it is refused.

        Args:
            operation: Whose `leaving` gets what must leave: the entry under `key` first, then the victims.
            key: The key.
            incoming: Bytes per device of a copy that is to be made; or memory that comes in as it is.
            cost: As in `Policy.added`.
            make: Makes the entry, once it is sure to come in; None where it is to be copied: see `arrive`.

        Raises:
            PinLimitError: `key` is pinned, and more than half of the budget would be.
        """
        self._mend()
        storages = () if isinstance(incoming, Mapping) else incoming
        sizes = incoming if isinstance(incoming, Mapping) else {}
        nbytes = sum((sizes or by_device(storages)).values())
        self._end_pins()
        old = self.entries.get(key)
        self.pins.check_newcomer(key, sizes, storages)
        room = LedgerRoom(self._ledger, self.entries, sizes, storages)
        if old is not None and not old.borrows:
            room.leave(old)
        self._dirty = _POLICY
        expired = self._policy.expired()
        victims = choose(self._policy, self.entries, room, newcomer=key, nbytes=nbytes, cost=cost, expired=expired)
        if victims is None:
            self._dirty = 0
            self.refused += 1
            return False
        for victim in victims:
            self._forget(victim, evicted=True)
        self._policy.added(key, nbytes, cost)
        leaving = [self.entries[victim] for victim in victims]
        if old is not None:
            leaving.insert(0, old)
        entry = make() if make is not None else None
        self._dirty = _COUNTS
        if entry is None:
            operation.key, operation.version, operation.reserved = key, self.version, sizes
            self._ledger.reserve(sizes)
        self._apply(operation, leaving, entry)
        self.evictions += len(victims)
        self._dirty = 0
        return True

    def arrive(self, operation: Operation, entry: Entry) -> None:
        """List the copy that `admit` made room for; what another thread put under its key meanwhile leaves."""
        self._mend()
        if operation.version != self.version:  # the policy may have been told that the key is gone
            self._dirty = _POLICY
            self._policy.added(entry.key, entry.nbytes, entry.cost)
        self._dirty = _COUNTS
        self._ledger.reserve(operation.reserved, -1)
        operation.reserved, operation.key = {}, None
        old = self.entries.get(entry.key)
        self._apply(operation, [] if old is None else [old], entry)
        self._dirty = 0

    # --- out ---------------------------------------------------------------------------------------------------------

    def lend(self, operation: Operation, keys: Sequence[Key], use: bool) -> Sequence[Entry]:  # noqa: FBT001
        """Lend to an operation what is under the first keys, up to the first that is not there.

        With `use`, this counts as a use: the last of them becomes newer first.
        """
        if self._dirty:
            self._mend()
        lent, expires = [], self._has_expired
        for key in keys:
            entry = self.entries.get(key)
            if entry is None:
                break
            if expires is not None and expires(key):
                self.remove(operation, [key])
                break
            lent.append(entry)
        self.hits += len(lent)
        self.misses += len(lent) < len(keys)
        if not lent:
            return lent
        self._dirty = _COUNTS
        self._open[id(operation)] = operation
        operation.lent = lent
        for entry in lent:
            entry.borrows += 1
            if entry.may_fork:
                self.forked.entries[entry] = None
        if use:
            used = self._policy.used
            for entry in reversed(lent):
                self._tick = entry.tick = self._tick + 1
                used(entry.key)
        self._dirty = 0
        return lent

    def lend_one(self, operation: Operation, key: Key) -> Entry | None:
        """Do `lend` to one key, in a third of its time: a borrow takes 2 to 3 us in all."""
        if self._dirty:
            self._mend()
        entry = self.entries.get(key)
        if entry is None or self._has_expired is not None:
            return next(iter(self.lend(operation, (key,), True)), None)  # noqa: FBT003
        self._dirty = _COUNTS
        self._open[id(operation)] = operation
        operation.lent = (entry,)
        entry.borrows += 1
        if entry.may_fork:
            self.forked.entries[entry] = None
        self._tick = entry.tick = self._tick + 1
        self._policy.used(key)
        self.hits += 1
        self._dirty = 0
        return entry

    def give_back(self, operation: Operation) -> bool:
        """End the leases of an operation; return whether there is something to free, or to `close`."""
        if self._dirty == _COUNTS:
            self._recount()
        if operation.lent:
            before, self._dirty = self._dirty, _COUNTS
            left, unlisted = [], self._unlisted
            for entry in operation.lent:
                entry.borrows -= 1
                if unlisted and not entry.borrows and entry in unlisted:
                    left.append(entry)
            if left:
                operation.leaving = [*operation.leaving, *left]
            operation.lent = ()
            for entry in left:
                del self._unlisted[entry]
                self._leave(entry, self._ledger, hands_out=operation.hands_out)
            if not (operation.leaving or operation.reserved):
                self._open.pop(id(operation), None)
            self._dirty = before
        return id(operation) in self._open

    def take(self, operation: Operation, key: Key) -> Entry | None:
        """Take an entry out for `pop`, or return None where it is not there.

        Raises:
            BorrowedError: Somebody borrows it.
        """
        self._mend()
        entry = self.entries.get(key)
        if entry is None or (self._has_expired and self._has_expired(key)):
            self.misses += 1
            return None
        if entry.borrows:
            msg = f"pop({key!r}): {entry.borrows} borrow(s) are open; close them first, or use remove()"
            raise BorrowedError(msg)
        self.remove(operation, [key])
        self.hits += 1
        return entry

    def remove(self, operation: Operation, keys: Iterable[Key], pins: bool = False) -> int:  # noqa: FBT001, FBT002
        """Take entries out, with ``pins=True`` every pin too; return how many were there."""
        self._mend()
        leaving = [self.entries[key] for key in keys if key in self.entries]
        for entry in leaving:
            self._dirty = _POLICY
            self._forget(entry.key, evicted=False)
        self._dirty = _COUNTS
        self._apply(operation, leaving, None)
        if pins:
            self.pins.clear()
        self._dirty = 0
        return len(leaving)

    def drop(self, operation: Operation, entry: Entry) -> None:
        """Take an entry out, unless another has taken its place."""
        if self.entries.get(entry.key) is entry:
            self.remove(operation, [entry.key])

    def copied(self, entry: Entry) -> Sequence[Storage]:
        """Count a leaving entry out, once what it shares is copied; return the memory that it alone held."""
        if self._dirty == _COUNTS:
            self._recount()
        if entry.alone is None:
            before, self._dirty = self._dirty, _COUNTS
            self._leave(entry, self._ledger, hands_out=False)
            self._dirty = before
        return entry.alone or ()

    def count_freed(self, operation: Operation) -> None:
        """Count as free what an operation has freed."""
        if self._dirty == _COUNTS:
            self._recount()
        before, self._dirty = self._dirty, _COUNTS
        for entry in operation.leaving:
            if entry.is_freed:
                if entry.alone is None:
                    self._leave(entry, self._ledger, hands_out=False)
                self._ledger.reserve(by_device(entry.alone or ()), -1)
        operation.leaving = [entry for entry in operation.leaving if not entry.is_freed]
        self._dirty = before

    def close(self, operation: Operation) -> None:
        """Count as free what an operation has freed, and what it reserved and did not fill."""
        self.count_freed(operation)
        before, self._dirty = self._dirty, _COUNTS
        self._ledger.reserve(operation.reserved, -1)
        key, operation.key, operation.reserved = operation.key, None, {}
        self._end_if_done(operation)
        self._dirty = before
        if key is not None and key not in self.entries and not before:  # its copy failed
            self._dirty = _POLICY
            self._forget(key, evicted=False)
            self._dirty = 0

    def _end_if_done(self, operation: Operation) -> None:
        if not operation.is_open:
            self._open.pop(id(operation), None)

    # --- pins --------------------------------------------------------------------------------------------------------

    def pin(self, keys: Sequence[Key], ttl_seconds: float | None) -> int:
        """Pin all keys, or none; return how many of them have entries.

        Raises:
            PinLimitError: More than half of the budget would be pinned.
        """
        self._mend()
        self._end_pins()
        self.pins.check_keys(dict.fromkeys(keys))
        self._dirty = _COUNTS
        self.pins.add(keys, ttl_seconds)
        self._dirty = 0
        return sum(key in self.entries for key in keys)

    def unpin(self, keys: Sequence[Key]) -> int:
        """Take back one pin of each key, the one that would end last; return how many of them have entries."""
        self._mend()
        self._end_pins()
        self._dirty = _COUNTS
        self.pins.take_back(keys)
        self._dirty = 0
        return sum(key in self.entries for key in keys)

    def _end_pins(self) -> None:
        if self.pins.have_ended():
            self._dirty = _COUNTS
            self.pins.end()
            self._dirty = 0

    # --- what there is -----------------------------------------------------------------------------------------------

    def look(self, read: Callable[[], _T]) -> _T:
        """Return what `read` says under the lock; to a finaliser, what it says in the middle of a change."""
        try:
            return self.run(self._counted, read)
        except BusyError:
            return read()

    def _counted(self, read: Callable[[], _T]) -> _T:
        if self._dirty == _COUNTS:
            self._recount()
        return read()

    def nbytes(self) -> int:
        """Bytes of all entries that are listed or lent. For `look`."""
        return self._ledger.total

    def deferred_nbytes(self) -> int:
        """Bytes that only entries hold which left and are not given back yet. For `look`. Linear in these entries."""
        return self._ledger.nbytes_of(self._unlisted)

    def lent(self) -> list[Entry]:
        """Return the entries of all open leases. Takes no lock."""
        return [entry for operation in list(self._open.values()) for entry in operation.lent]

    def has_expired(self, key: Key) -> bool:
        """Say whether the entry under a key may no longer be handed out."""
        return self._has_expired is not None and self._has_expired(key)

    # --- changes -----------------------------------------------------------------------------------------------------

    def _apply(self, operation: Operation, leaving: Sequence[Entry], arriving: Entry | None) -> None:
        """List an entry and unlist others. What is lent stays until it is given back."""
        self._open[id(operation)] = operation
        operation.arriving, operation.leaving = arriving, [*operation.leaving, *leaving]  # from here on it will happen
        if arriving is not None:
            self._list(arriving)
            self.puts += 1
            self._ledger.add(arriving.storages)
            self.pins.came(arriving)
        for entry in leaving:
            self._unlist(entry)
            self.pins.left(entry)
            if entry.borrows:
                self._unlisted[entry] = None
            else:
                self._leave(entry, self._ledger, hands_out=operation.hands_out)
        operation.arriving, operation.leaving = None, [entry for entry in operation.leaving if not entry.borrows]
        self._end_if_done(operation)

    def _list(self, entry: Entry) -> None:
        self.entries.pop(entry.key, None)  # so that it becomes the newest
        self.entries[entry.key] = entry
        self._tick = entry.born = entry.tick = self._tick + 1

    def _unlist(self, entry: Entry) -> None:
        if self.entries.get(entry.key) is entry:
            del self.entries[entry.key]

    def _leave(self, entry: Entry, ledger: Ledger, *, hands_out: bool) -> None:
        """Move the bytes that only this entry holds from those that are held to those that are being freed."""
        self.forked.entries.pop(entry, None)
        alone = ledger.drop(entry.storages)
        if hands_out and len(alone) < len(entry.storages):
            ledger.add(entry.storages)  # until what others hold too is copied: see `copied`
            return
        entry.alone = alone
        ledger.reserve(by_device(alone))

    def _forget(self, key: Key, *, evicted: bool) -> None:
        self.version += 1
        self._policy.gone(key, evicted=evicted)

    # --- making up for what was interrupted --------------------------------------------------------------------------

    def _mend(self) -> None:
        """Count anew what a change that was interrupted left half done, and have the policy learn anew."""
        if not self._dirty:
            return
        if self._dirty == _COUNTS:
            self._recount()
        self.version += 1
        replay(self._policy, self.entries.values())
        self._dirty = 0

    def _recount(self) -> None:
        """Finish what operations had begun, and count bytes, leases and pins anew."""
        operations = [operation for operation in self._open.values() if operation.is_open]
        for operation in operations:
            for entry in operation.leaving:
                self._unlist(entry)
            if operation.arriving is not None:
                self._list(operation.arriving)
                operation.arriving = None
        lent = [entry for operation in operations for entry in operation.lent]
        for entry in [*self.entries.values(), *lent, *(entry for each in operations for entry in each.leaving)]:
            entry.borrows = 0
        for entry in lent:
            entry.borrows += 1
        self._unlisted = {entry: None for entry in lent if self.entries.get(entry.key) is not entry}
        for operation in operations:
            operation.leaving = [entry for entry in operation.leaving if not entry.borrows]
        leaving = [(entry, operation.hands_out) for operation in operations for entry in operation.leaving]
        ledger = Ledger(self._limits)
        for entry in [*self.entries.values(), *self._unlisted, *(entry for entry, _ in leaving if entry.alone is None)]:
            ledger.add(entry.storages)
        for entry, hands_out in leaving:
            if entry.alone is None:
                self._leave(entry, ledger, hands_out=hands_out)
            else:
                ledger.reserve(by_device(entry.alone))
        for operation in operations:
            ledger.reserve(operation.reserved)
        self.pins.recount()
        self._ledger, self._open = ledger, {id(operation): operation for operation in operations}
        self._dirty = _POLICY
