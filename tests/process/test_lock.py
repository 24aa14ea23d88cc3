"""Lock: refuses its own thread, serves others in turn, and is free again whatever interrupts it."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from agnostic_cache.errors import AgnosticCacheError, BusyError, StorageBusyError
from agnostic_cache.process.lock import Lock

HANG_SECONDS = 30


def run(lock: Lock, do: Callable[[], object]) -> None:
    lock.run(do)


def with_block(lock: Lock, do: Callable[[], object]) -> None:
    with lock:
        do()


ways = pytest.mark.parametrize("hold", [run, with_block])


@ways
def test_it_is_held_while_the_work_is_done(hold: Callable[[Lock, Callable[[], object]], None]) -> None:
    lock, seen = Lock(), []
    hold(lock, lambda: seen.append(lock.is_mine()))
    assert seen == [True]
    assert not lock.is_mine()


def test_run_hands_arguments_and_the_result_through() -> None:
    assert Lock().run(divmod, 7, 2) == (3, 1)


@ways
@pytest.mark.parametrize("inner", [run, with_block])
def test_its_own_thread_is_refused_and_goes_on_holding_it(
    hold: Callable[[Lock, Callable[[], object]], None], inner: Callable[[Lock, Callable[[], object]], None]
) -> None:
    def again() -> None:
        with pytest.raises(BusyError):
            inner(lock, lambda: None)
        assert lock.is_mine()

    lock = Lock()
    hold(lock, again)
    assert not lock.is_mine()


def test_the_error_is_named_and_what_storages_called_it_is_the_same() -> None:
    assert issubclass(BusyError, AgnosticCacheError)
    assert issubclass(BusyError, OSError)
    assert StorageBusyError is BusyError


@ways
def test_an_error_leaves_it_free(hold: Callable[[Lock, Callable[[], object]], None]) -> None:
    lock = Lock()
    with pytest.raises(ZeroDivisionError):
        hold(lock, lambda: 1 // 0)
    assert not lock.is_mine()
    hold(lock, lambda: None)


@ways
def test_threads_exclude_each_other(hold: Callable[[Lock, Callable[[], object]], None]) -> None:
    def work() -> None:
        for _ in range(200):
            hold(lock, add)

    def add() -> None:
        before = counted[0]
        sum(range(50))  # time for another thread to come in between
        counted[0] = before + 1

    lock, counted, interval = Lock(), [0], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
    finally:
        sys.setswitchinterval(interval)
    assert counted == [800]


@ways
@pytest.mark.parametrize("event", ["line", "call"])
def test_an_interrupt_anywhere_leaves_it_free(
    hold: Callable[[Lock, Callable[[], object]], None], event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(at: int) -> bool:
        seen = 0

        def trace(frame: FrameType, what: str, _: Any) -> Any:
            nonlocal seen
            if frame.f_code.co_filename not in files:
                return None
            seen += what == event
            if what == event and seen == at:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            hold(lock, do)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return seen == at

    def do() -> None:
        done.append(lock.is_mine())

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # an interrupt in a finaliser goes nowhere
    files = {__file__, sys.modules[Lock.__module__].__file__}
    done: list[bool] = []
    lock, places = Lock(), 0
    while interrupted(places + 1):
        places += 1
        assert not lock.is_mine(), places
        hold(lock, do)
    assert places > (4 if event == "line" else 2)
    assert all(done)


def test_an_interrupt_while_another_thread_holds_it_leaves_it_to_that_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep() -> None:
        with lock:
            held.set()
            assert leave.wait(HANG_SECONDS)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    lock, held, leave = Lock(), threading.Event(), threading.Event()
    thread = threading.Thread(target=keep)
    thread.start()
    try:
        assert held.wait(HANG_SECONDS)
        monkeypatch.setattr("agnostic_cache.process.lock.sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lock.run(lambda: None)
        assert not lock.is_mine()
    finally:
        leave.set()
        thread.join(HANG_SECONDS)
    lock.run(lambda: None)
