"""Leases on the entries of a `StateCache`: `Borrow` on one, `Borrows` on several."""

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

from agnostic_cache.errors import BorrowViolationError, BusyError, LeaseUsedError
from agnostic_cache.held.entry import Entry, Key, Operation, check_key
from agnostic_cache.held.exits import Exits, raise_all
from agnostic_cache.state.kv_state import KVState

_ENDED = "borrowed, and its borrow has ended"


class Borrow:
    """A lease on one entry, from `StateCache.borrow`: a context manager."""

    __slots__ = ("_debug", "_exits", "_key", "_lent", "_marks", "_operation", "_raw")

    def __init__(self, exits: Exits, key: Key, raw: bool, debug: bool) -> None:  # noqa: FBT001 - keywords cost 0.1 us
        """Lease nothing yet: that is done on entering."""
        self._exits = exits
        self._key = key
        self._raw = raw
        self._debug = debug
        self._operation: Operation | None = None
        self._lent: KVState | None = None

    def __enter__(self) -> Any | None:
        """Lend the state, or None where the key is not there.

        Raises:
            LeaseUsedError: This borrow is open already; it stays open.
            InvalidKeyError: The key is no key.
        """
        if self._operation is not None:
            msg = f"this borrow of {self._key!r} is open already; call borrow() once for each with block"
            raise LeaseUsedError(msg)
        key, exits = self._key, self._exits
        if type(key) is not str:
            check_key(key)
        holdings = exits.holdings
        if not holdings.later.empty():
            raise_all(exits.drain())
        self._operation = operation = exits.operation()
        try:
            entry = holdings.run(holdings.lend_one, operation, key)
            if entry is None or entry.state is None:
                self._end(operation)
                return None
            if self._debug:
                self._marks = entry.state.checksums()
            self._lent = lent = entry.state.lend()
            return lent if self._raw or entry.as_state else lent.unwrap()
        except BusyError:  # a finaliser, in the middle of another call
            self._operation = None
            return None
        except BaseException:
            self._end(operation)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """End the lease.

        Raises:
            BorrowViolationError: ``debug=True``, and the borrower wrote, donated or deleted; the entry is dropped.
        """
        operation = self._operation
        if operation is not None:
            try:
                if self._debug and operation.lent:
                    self._check(operation, operation.lent[0])
            finally:
                self._end(operation)
        return False

    def _end(self, operation: Operation) -> None:
        if self._lent is not None:
            self._lent.end(_ENDED)
        try:
            self._exits.finish(operation)
        except BaseException:
            self._exits.leave(operation)
            raise
        finally:
            self._operation = self._lent = None
        if operation.errors:
            errors, operation.errors = [*operation.errors], ()
            raise_all(errors)

    def _check(self, operation: Operation, entry: Entry) -> None:
        found = {} if entry.state is None else entry.state.checksums()
        changed = sorted(name for name, mark in self._marks.items() if found[name] != mark)
        if changed:
            holdings = self._exits.holdings
            holdings.run(holdings.drop, operation, entry)
            what = "deleted or donated" if any(found[name] is None for name in changed) else "wrote"
            msg = (
                f"the borrower of {self._key!r} {what} {changed[:4]}; use get() for a state to change. The entry is "
                "dropped"
            )
            raise BorrowViolationError(msg)

    def __del__(self) -> None:
        """Give back what was never closed, and say so."""
        operation = getattr(self, "_operation", None)
        if operation is not None:
            if self._lent is not None:
                self._lent.end(_ENDED)
            self._exits.leave(operation)
            warnings.warn(
                f"a borrow of {self._key!r} was never closed; use a with block", ResourceWarning, stacklevel=1
            )


class Borrows:
    """A lease on several entries at once, from `StateCache.borrow_all`: closed once, by whoever is done with it."""

    __slots__ = ("_exits", "_lent", "_operation")

    def __init__(self, exits: Exits, keys: Sequence[Key], use: bool) -> None:  # noqa: FBT001
        """Lease what is under the first keys. A finaliser in the middle of another call gets nothing."""
        self._exits = exits
        self._lent: list[KVState] = []
        self._operation = operation = exits.operation()
        try:
            exits.holdings.run(exits.holdings.lend, operation, keys, use)
        except BusyError:
            return

    def __len__(self) -> int:
        """How many entries are lent."""
        return len(self._operation.lent)

    def states(self) -> list[KVState]:
        """Return the state under each key, raising `ReleasedError` once the lease is closed. Copies nothing."""
        if not self._lent:
            self._lent = [entry.state.lend() for entry in self._operation.lent if entry.state is not None]
        return self._lent

    def close(self) -> None:
        """End the lease. Idempotent."""
        for lent in self._lent:
            lent.end(_ENDED)
        self._lent = []
        operation = self._operation
        self._exits.finish(operation)
        if operation.errors:
            errors, operation.errors = [*operation.errors], ()
            raise_all(errors)

    def __del__(self) -> None:
        """Give back what was never closed."""
        operation = getattr(self, "_operation", None)
        if operation is not None and operation.lent:
            for lent in self._lent:
                lent.end(_ENDED)
            self._exits.leave(operation)
