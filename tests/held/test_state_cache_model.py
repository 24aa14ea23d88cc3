"""StateCache against a plain model, in any order of calls: counts are exact, the budget holds, the right ones leave."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from host_memory import Forking, Growing, State, check, fills, found
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agnostic_cache import KVState, StateCache, wrap
from agnostic_cache.errors import BorrowedError
from agnostic_cache.eviction import PutStatus

if TYPE_CHECKING:
    from agnostic_cache.held.lease import Borrow

LIMIT = 512
KEYS = st.sampled_from("abcde")
SIZES = st.lists(st.sampled_from([64, 64, 128, 320]), min_size=1, max_size=3)


class Freeing(Exception):  # noqa: N818 - a fault of the test's own, not an error
    """What a callback raises."""


class Entry:
    """What the model knows of an entry: its blocks by number, how many bytes each has, and what fills them.

    Attributes:
        forks: It is a container that never writes its array, so that `get` shares it.
    """

    def __init__(self, blocks: dict[int, int], fill: list[int], *, raw: bool, forks: bool = False) -> None:
        self.blocks = blocks
        self.fill = fill
        self.raw = raw
        self.forks = forks
        self.pins = 0
        self.leases: list[tuple[Borrow, Any]] = []


def size(entries: Iterable[Entry]) -> int:
    """Bytes of all blocks, each once."""
    return sum({number: nbytes for entry in entries for number, nbytes in entry.blocks.items()}.values())


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Forking()
        self.numbers = count(1)
        self.entries: OrderedDict[str, Entry] = OrderedDict()  # oldest first
        self.deferred: list[Entry] = []
        self.shared: list[tuple[int, Any]] = []  # arrays that the test holds, and moves into several entries
        self.forks: list[tuple[Entry, Any]] = []  # what `get` gave of containers that share, and the test still has
        self.orphans: dict[int, int] = {}  # blocks of entries that left while there were forks of them
        self.left: list[list[int | None]] = []
        self.expected: list[list[int | None]] = []
        self.raising = False
        self.evictions = 0

    @initialize(on_evict=st.booleans(), debug=st.booleans())
    def start(self, *, on_evict: bool, debug: bool) -> None:
        self.on_evict = on_evict
        self.hold(64)
        self.hold(64)
        callback = self.evicted if on_evict else None
        self.cache = StateCache(LIMIT, adapter=self.memory, on_evict=callback, debug=debug)

    def evicted(self, value: Any) -> None:
        self.left.append(self.read(value))
        if self.raising:
            raise Freeing

    # --- what should happen ------------------------------------------------------------------------------------------

    def room(self, key: str, entry: Entry) -> list[Entry] | None:
        """Who leaves the listing for `entry`, the old entry under its key first; None where it is refused."""
        old = self.entries.get(key)
        leaving = [] if old is None else [old]
        for other in [*self.entries.values()]:
            if size([*self.staying(leaving), entry]) <= LIMIT:
                break
            if other is not old and not other.leases and not other.pins:
                leaving.append(other)
        return leaving if size([*self.staying(leaving), entry]) <= LIMIT else None

    def staying(self, leaving: list[Entry]) -> list[Entry]:
        listed = [entry for entry in self.entries.values() if entry not in leaving]
        return [*listed, *self.deferred, *(entry for entry in leaving if entry.leases)]

    def shares(self, entry: Entry) -> bool:
        others = [other for other in [*self.entries.values(), *self.deferred] if other is not entry]
        return any(not entry.blocks.keys().isdisjoint(other.blocks) for other in others)

    def leave(self, leaving: list[Entry]) -> int:
        """Unlist entries; return how many of them are freed at once."""
        for key in [key for key, entry in self.entries.items() if entry in leaving]:
            del self.entries[key]
        self.deferred += [entry for entry in leaving if entry.leases]
        freed = [entry for entry in leaving if not entry.leases]
        if self.on_evict:
            self.expected.extend([*entry.fill] for entry in freed)
        else:
            self.orphans |= self.forked(entry for entry in freed if entry.forks)
        return len(freed)

    def forked(self, entries: Iterable[Entry]) -> dict[int, int]:
        """The blocks of entries that the test has forks of."""
        held = {number for entry, _ in self.forks for number in entry.blocks}
        return {number: size for entry in entries for number, size in entry.blocks.items() if number in held}

    def call(self, do: Callable[[], Any], freed: int, *others: type[BaseException]) -> Any:
        """Do it, which frees as many entries, and raises `others`."""
        errors = [*[Freeing] * (freed * self.raising * self.on_evict), *others]
        result, raised = None, []
        try:
            result = do()
        except BaseException as error:  # noqa: BLE001 - compared below; kept, it would keep memory
            raised = [type(one) for one in (error.exceptions if isinstance(error, BaseExceptionGroup) else (error,))]
        assert raised == errors
        return result

    def read(self, value: Any) -> list[int | None]:
        if isinstance(value, KVState):
            value = {name: leaf.array for name, leaf in value.leaves.items()}
        return fills({"x": value.array} if isinstance(value, Growing) else value)

    def spoil(self, value: Any) -> None:
        """Write what is one's own to write."""
        for array in (value.unwrap() if isinstance(value, KVState) else value).values():
            if not any(array is held for _, held in self.shared):
                array.memory[:] = bytes(array.nbytes)

    # --- in ----------------------------------------------------------------------------------------------------------

    @rule(key=KEYS, sizes=SIZES, move=st.booleans(), raw=st.booleans())
    def put(self, key: str, sizes: list[int], *, move: bool, raw: bool) -> None:
        number = next(self.numbers)
        blocks = {next(self.numbers): nbytes for nbytes in sizes} if move else {number: sum(sizes)}
        entry = Entry(blocks, [number % 256] * len(sizes), raw=raw)
        self.put_state(key, entry, self.memory.state(*sizes, fill=number % 256), move=move)

    @rule(key=KEYS, more=SIZES, of=st.sets(st.integers(0, 3), min_size=1), move=st.booleans())
    def put_shared(self, key: str, more: list[int], of: set[int], *, move: bool) -> None:
        held = [self.shared[i % len(self.shared)] for i in of if self.shared]
        fill = next(self.numbers)
        blocks = {next(self.numbers): nbytes for nbytes in more} | {n: a.nbytes for n, a in held}
        state = self.memory.state(*more, fill=fill % 256) | {f"shared {n}": array for n, array in held}
        values = [fill % 256] * len(more) + [n % 256 for n in dict(held)]
        if not move:
            blocks = {fill: sum(array.nbytes for array in state.values())}
        del held
        self.put_state(key, Entry(blocks, values, raw=False), state, move=move)

    @rule(key=KEYS, nbytes=st.sampled_from([64, 128]), move=st.booleans(), raw=st.booleans())
    def put_growing(self, key: str, nbytes: int, *, move: bool, raw: bool) -> None:
        number = next(self.numbers)
        entry = Entry({number: nbytes}, [number % 256], raw=raw, forks=True)
        self.put_state(key, entry, Growing(self.memory.array(nbytes, number % 256)), move=move)

    def put_state(self, key: str, entry: Entry, state: State | Growing, *, move: bool) -> None:
        value: Any = wrap(state, adapter=self.memory) if entry.raw else state
        leaving = self.room(key, entry)
        if leaving is None:
            assert self.cache.put(key, value, move=move) is PutStatus.ILLEGAL
            assert self.read(value) == entry.fill  # still the caller's
            return
        self.evictions += len(leaving) - (key in self.entries)
        freed = self.leave(leaving)
        self.entries[key] = entry
        assert self.call(lambda: self.cache.put(key, value, move=move), freed) in {PutStatus.LEGAL, None}

    @rule(key=KEYS, sizes=SIZES)
    def put_interrupted(self, key: str, sizes: list[int]) -> None:
        leaving = self.room(key, Entry({0: sum(sizes)}, [], raw=False))
        state = self.memory.state(*sizes)
        if leaving is not None and not (
            self.on_evict and any(map(self.shares, leaving))
        ):  # no copy but that of `state`
            self.evictions += len(leaving) - (key in self.entries)
            self.memory.fails = KeyboardInterrupt()
            try:
                self.call(lambda: self.cache.put(key, state), self.leave(leaving), KeyboardInterrupt)
            finally:
                self.memory.fails = None

    @rule(nbytes=st.sampled_from([64, 128]))
    def hold(self, nbytes: int) -> None:
        if len(self.shared) < 4:
            number = next(self.numbers)
            self.shared.append((number, self.memory.array(nbytes, fill=number % 256)))

    @precondition(lambda self: self.shared)
    @rule()
    def let_go(self) -> None:
        self.shared.pop(0)

    # --- out ---------------------------------------------------------------------------------------------------------

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        value = self.cache.get(key)
        assert (value is None) == (key not in self.entries)
        if value is not None:
            self.entries.move_to_end(key)
            assert self.read(value) == self.entries[key].fill
            assert isinstance(value, KVState) == self.entries[key].raw
            if self.entries[key].forks:
                self.forks.append((self.entries[key], value))
            else:
                self.spoil(value)

    @precondition(lambda self: any(entry.forks for entry in self.entries.values()))
    @rule(data=st.data(), remove=st.booleans())
    def fork(self, data: st.DataObject, *, remove: bool) -> None:
        key = data.draw(st.sampled_from([key for key, entry in self.entries.items() if entry.forks]))
        self.get(key)
        if remove:
            self.remove(key)

    @rule(key=KEYS)
    def get_interrupted(self, key: str) -> None:
        if key in self.entries and not self.entries[key].forks:
            self.entries.move_to_end(key)
            self.memory.fails = KeyboardInterrupt()
            try:
                self.call(lambda: self.cache.get(key), 0, KeyboardInterrupt)
            finally:
                self.memory.fails = None

    @precondition(lambda self: self.forks)
    @rule(which=st.integers(0, 99))
    def drop_a_fork(self, which: int) -> None:
        entry, value = self.forks.pop(which % len(self.forks))
        assert self.read(value) == entry.fill
        del value
        self.orphans = self.forked([Entry(self.orphans, [], raw=False)])

    @rule(key=KEYS, raw=st.booleans())
    def borrow(self, key: str, *, raw: bool) -> None:
        lease = self.cache.borrow(key, raw=raw)
        lent = lease.__enter__()
        assert (lent is None) == (key not in self.entries)
        if lent is not None:
            self.entries.move_to_end(key)
            self.entries[key].leases.append((lease, lent))

    @precondition(lambda self: any(entry.leases for entry in [*self.entries.values(), *self.deferred]))
    @rule(data=st.data(), how=st.sampled_from(["ends", "raises", "forgotten"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        borrowed = [entry for entry in [*self.entries.values(), *self.deferred] if entry.leases]
        entry = data.draw(st.sampled_from(borrowed))
        lease, lent = entry.leases.pop(data.draw(st.integers(0, len(entry.leases) - 1)))
        assert self.read(lent) == entry.fill
        del lent
        freed = 0
        if entry in self.deferred and not entry.leases:
            self.deferred.remove(entry)
            freed = self.leave([entry])
        if how == "forgotten":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del lease
            self.call(self.cache.current_size, freed)
        else:
            why = ZeroDivisionError() if how == "raises" else None
            self.call(lambda: lease.__exit__(type(why) if why else None, why, None), freed)

    @rule(key=KEYS)
    def pop(self, key: str) -> None:
        entry = self.entries.get(key)
        if entry is not None and entry.leases:
            with pytest.raises(BorrowedError):
                self.cache.pop(key)
        elif entry is None:
            assert self.cache.pop(key) is None
        else:
            del self.entries[key]
            value = found(self.cache.pop(key))
            assert self.read(value) == entry.fill
            if not entry.forks:
                self.spoil(value)

    # --- away --------------------------------------------------------------------------------------------------------

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        there = key in self.entries
        freed = self.leave([self.entries[key]] if there else [])
        assert self.call(lambda: self.cache.remove(key), freed) in {there, None}

    @rule()
    def clear(self) -> None:
        self.call(self.cache.clear, self.leave([*self.entries.values()]))

    @rule(key=KEYS)
    def pin(self, key: str) -> None:
        assert self.cache.pin(key) == (key in self.entries)
        if key in self.entries:
            self.entries[key].pins += 1

    @rule(key=KEYS)
    def unpin(self, key: str) -> None:
        assert self.cache.unpin(key) == (key in self.entries)
        if key in self.entries:
            self.entries[key].pins = max(0, self.entries[key].pins - 1)

    @rule(raising=st.booleans())
    def raise_from_now_on(self, *, raising: bool) -> None:
        self.raising = raising

    # --- what holds after each of them -------------------------------------------------------------------------------

    @invariant()
    def the_count_is_exact(self) -> None:
        stats = self.cache.stats()
        listed, held = [*self.entries.values()], [*self.entries.values(), *self.deferred]
        assert stats.current_bytes == self.cache.current_bytes == size(held) <= LIMIT
        assert stats.listed_bytes == size(listed)
        assert stats.deferred_bytes == size(held) - size(listed)
        assert stats.borrowed_bytes == size(entry for entry in held if entry.leases)
        assert stats.entries == self.cache.current_size() == len(listed)
        assert stats.evictions == self.evictions
        assert stats.shared_bytes == sum(self.orphans.values())

    @invariant()
    def the_right_ones_are_there(self) -> None:
        assert [key for key in "abcde" if self.cache.contains(key)] == sorted(self.entries)
        assert self.left == self.expected

    @invariant()
    def what_nobody_holds_is_free(self) -> None:
        held = size([*self.entries.values(), *self.deferred])
        blocks = {number: array.nbytes for number, array in self.shared}
        mine = Entry(blocks | self.forked(entry for entry, _ in self.forks), [], raw=False)
        both = size([*self.entries.values(), *self.deferred, mine])
        check(self.cache, self.memory, elsewhere=both - held)

    def teardown(self) -> None:
        self.raising = False
        for entry in [*self.entries.values(), *self.deferred]:
            while entry.leases:
                entry.leases.pop()[0].__exit__(None, None, None)
        self.shared.clear()
        self.forks.clear()
        self.cache.clear()
        assert self.cache.current_bytes == self.memory.live_bytes() == 0


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40)
