"""Exits: ends operations on holdings: gives back what was lent, frees what leaves or hands it to `on_evict`."""

from collections.abc import Callable
from queue import Empty
from typing import Any, TypeVar, cast

from agnostic_cache.errors import BusyError, ReleasedError
from agnostic_cache.held.entry import Entry, Operation, total
from agnostic_cache.held.holdings import Holdings
from agnostic_cache.trace import Trace

_T = TypeVar("_T")


class Exits:
    """Works without the lock. What an interrupt keeps it from doing is done by the next call of the cache, in `drain`.

    Attributes:
        holdings: What the operations are on.
    """

    def __init__(self, holdings: Holdings, on_evict: Callable[[Any], object] | None, trace: Trace | None) -> None:
        """Free through the adapter of each state, or hand native values to `on_evict`."""
        self.holdings = holdings
        self._on_evict = on_evict
        self._trace = trace

    def operation(self) -> Operation:
        """Return an operation by which nothing has happened yet."""
        operation = Operation()
        if self._on_evict is not None:
            operation.hands_out = True
        return operation

    def do(self, what: Callable[[Operation], _T]) -> _T:
        """Return what ``what(operation)`` returns. The operation is ended, whatever it raises.

        Raises:
            BaseExceptionGroup: Several errors: of what was left to do, of callbacks, and of `what`, in this order.
        """
        operation, done, raised = self.operation(), None, []
        try:
            errors = self.drain()
            try:
                done = what(operation)
            except BaseException as error:  # noqa: BLE001 - raised below
                raised.append(error)
            self.finish(operation)
            errors += [*operation.errors, *raised]
            operation.errors = ()
            raised.clear()
            raise_all(errors)
        except BaseException:
            if operation.is_open:
                self.leave(operation)
            raise
        return cast("_T", done)

    def finish(self, operation: Operation) -> None:
        """End an operation. Idempotent. Adds what callbacks raise to its `errors`; to a finaliser it happens later."""
        try:
            for entry in operation.lent:
                if entry.queued and entry.state is not None:
                    self._attempt(operation, entry.state.mark_read)
            run = self.holdings.run
            if not run(self.holdings.give_back, operation):
                return
            self.free(operation)
            run(self.holdings.close, operation)
            if operation.leaving:  # an interrupt came before something was freed
                self.leave(operation)
        except BusyError:
            self.leave(operation)
        except BaseException:
            self.leave(operation)
            raise

    def leave(self, operation: Operation) -> None:
        """Have the next call finish an operation. Takes no lock."""
        self.holdings.later.put((self._finish, operation))

    def _finish(self, operation: Operation) -> None:
        self.finish(operation)
        errors, operation.errors = [*operation.errors], ()
        raise_all(errors)

    def drain(self) -> list[BaseException]:
        """Do what finalisers and interrupted calls left to do; return what was raised at that."""
        errors: list[BaseException] = []
        later = self.holdings.later
        if later.empty() or self.holdings.lock.is_mine():
            return errors
        for _ in range(later.qsize()):  # what is left again is for the next call
            item: tuple[Callable[[Any], object], Any] | None = None
            try:
                item = later.get_nowait()
                item[0](item[1])
            except Empty:  # another thread was faster
                break
            except BaseException as error:  # noqa: BLE001 - raised when the call is done
                errors.append(error)
                if item is not None and not isinstance(error, Exception):  # doing it twice does no harm
                    later.put(item)
        return errors

    # --- freeing -----------------------------------------------------------------------------------------------------

    def evict(self, operation: Operation, key: object) -> None:
        """Free what left to make room for a newcomer under `key`, so that its bytes may be used."""
        for entry in operation.leaving:
            if entry.key != key:
                self._tell("evict", entry)
        self.free(operation)
        if operation.leaving:
            self.holdings.run(self.holdings.count_freed, operation)

    def free(self, operation: Operation) -> None:
        """Free what leaves by an operation, each entry once. One that raises keeps no other in memory."""
        release = self._release if self._on_evict is None else self._hand_over
        for entry in [entry for entry in operation.leaving if not entry.is_freed]:
            self._attempt(operation, release, entry)
            if entry.is_freed:
                self._tell("release", entry)

    def _attempt(self, operation: Operation, do: Callable[..., object], *args: object) -> None:
        try:
            do(*args)
        except BaseException as error:  # noqa: BLE001 - raised when the operation is done
            operation.errors = [*operation.errors, error]

    def _hand_over(self, entry: Entry) -> None:
        self.unwrap(entry)
        if self._on_evict is not None and entry.handed:
            self._on_evict(entry.handed.pop())

    def unwrap(self, entry: Entry) -> None:
        """Put the native value of a leaving entry into its `handed`, or free it where that raises.

        The value is for somebody who will use it up: arrays that other entries hold too are copied.
        """
        if entry.handed is None and entry.state is not None:
            try:
                if entry.alone is None:
                    entry.original, entry.state = entry.state, entry.state.fork()
                    alone = self.holdings.run(self.holdings.copied, entry)
                    entry.original.release_alone(frozenset(storage.key for storage in alone))
                    entry.original = None
                entry.handed = [entry.state if entry.as_state else entry.state.unwrap()]
            except BaseException:
                self._release(entry)
                raise
        if entry.state is not None and not entry.as_state:
            entry.state.end("handed out")
        entry.state = None

    def _release(self, entry: Entry) -> None:
        """Free what no other entry holds of a leaving one."""
        alone = entry.alone if entry.alone is not None else self.holdings.run(self.holdings.copied, entry)
        keys = None if len(alone) == len(entry.storages) else frozenset(storage.key for storage in alone)
        state = entry.original or entry.state
        try:
            outliving = [] if state is None else state.release_alone(keys)
        except ReleasedError:  # an interrupt came when it was free already
            outliving = []
        if outliving:
            self.holdings.run(self.holdings.orphans.extend, outliving)
        entry.state = entry.original = None
        if entry.handed:  # an interrupt came before the caller of `pop` had it
            entry.handed.clear()

    def _tell(self, event: str, entry: Entry) -> None:
        if self._trace is not None:
            nbytes = total(entry.storages if entry.alone is None else entry.alone)
            self._trace(f"state_cache.{event}", {"key": entry.key, "nbytes": nbytes})


def raise_all(errors: list[BaseException]) -> None:
    """Raise what is in a list, several as a group, and empty it."""
    if not errors:
        return
    try:
        if len(errors) == 1:
            raise errors[0]
        msg = f"{len(errors)} calls of on_evict, or of what else a cache is given, raised"
        raise BaseExceptionGroup(msg, errors)
    finally:
        # Their tracebacks hold frames that hold this list. Would it hold them too, what those frames refer to would
        # live until the garbage collector comes by.
        errors.clear()
