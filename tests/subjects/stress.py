"""Many threads at one cache: writers that evict, readers that read what they have borrowed.

`survive` starts a program in a process of its own, where an abort of the framework can be seen; the program calls
`run`. A value of ``key + KEYS * n`` stands in every element of the n-th state under a key, so that whoever reads
anything else has read memory of somebody else, or has read it half-written.
"""

import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from peak import resident_bytes, trim

from agnostic_cache import StateCache

READS, PUTS = 100_000, 3_000
"""How often there is read and written at least."""
KEYS, ENTRIES = 8, 4
"""How many keys there are, and for how many entries there is room."""
ELEMENTS = 2048
"""Of each of the two float32 arrays of a state."""
NBYTES = 2 * ELEMENTS * 4
FLAT_BYTES = 32 * 1024 * 1024
"""How far memory may rise; what is put in a run takes several times as much."""

Read = Callable[[Any], tuple[float, float]]
"""Returns the least and the greatest element of a state."""


def survive(program: str, *arguments: str) -> dict[str, Any]:
    """Run a module of this folder in a process of its own; return what `run` found there."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(make: Callable[[float], Any], reads: Mapping[str, Read], live_bytes: Callable[[], int]) -> None:
    """Read `READS` times in all, each way of reading in a thread of its own, while two threads write; print what is.

    Args:
        make: Returns a state of `NBYTES`, filled with a value.
        reads: Ways to read a borrowed state.
        live_bytes: Says how many bytes of states are alive in this process.
    """
    sys.setswitchinterval(1e-3)
    warnings.simplefilter("ignore", ResourceWarning)  # leases are left open on purpose
    stress = _Stress(make)
    work = [stress.write, stress.write, *(partial(stress.read, read) for read in reads.values())]
    threads = [threading.Thread(target=stress.guard, args=(one, Random(seed))) for seed, one in enumerate(work)]
    for thread in threads:
        thread.start()
    stress.warm.wait()
    before = resident_bytes()
    for thread in threads:
        thread.join()
    trim()
    stats = stress.cache.stats()
    found = {
        "reads": next(stress.numbers) - 1,
        "errors": stress.errors[:4],
        "wrong": stress.wrong[:4],
        "grown_bytes": resident_bytes() - before,
        "puts": stats.puts,
        "evictions": stats.evictions,
        "pinned_bytes": stats.deferred_bytes + stats.borrowed_bytes,
        "unaccounted_bytes": live_bytes() - stats.current_bytes,
    }
    stress.cache.clear()
    found["left_bytes"] = live_bytes()
    print(json.dumps(found))  # noqa: T201 - for the parent


class _Stress:
    """What the threads do.

    Attributes:
        numbers: Counts reads.
        warm: Set when a fifth of them is done, or all is over.
        finished: Set when all are done, or somebody failed.
    """

    def __init__(self, make: Callable[[float], Any]) -> None:
        self.make = make
        self.cache = StateCache(ENTRIES * NBYTES)
        self.numbers, self.puts = count(1), count(1)
        self.warm, self.finished, self.written = threading.Event(), threading.Event(), threading.Event()
        self.errors: list[str] = []
        self.wrong: list[tuple[int, float, float]] = []

    def guard(self, work: Callable[[Random], None], random: Random) -> None:
        """Do it until all is finished."""
        try:
            while not self.finished.is_set():
                work(random)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            self.errors.append(f"{type(error).__name__}: {error}")
        finally:
            self.finished.set()
            self.warm.set()

    def write(self, random: Random) -> None:
        """Put a state, and what else makes entries leave."""
        key, number = random.randrange(KEYS), next(self.puts)
        self.cache.put(key, self.make(key + KEYS * (number % 1000)), move=random.random() < 0.5)
        if number % 100 == 0:
            gc.collect()  # leases in cycles may hold all the room there is: then nothing is made that sets it off
        if number % 50 == 0:
            self.cache.remove(random.randrange(KEYS))
        elif number % 501 == 0:
            self.cache.clear()
        if number >= PUTS:
            self.written.set()

    def read(self, read: Read, random: Random) -> None:
        """Borrow a state and read it, as tidy and untidy users do."""
        key = random.randrange(KEYS)
        if random.random() < 0.001:
            self.forget(key, in_a_cycle=random.random() < 0.1)
        with suppress(LookupError), self.cache.borrow(key, raw=random.random() < 0.5) as lent:
            if lent is None:
                return
            low, high = read(lent if isinstance(lent, dict) else lent.unwrap())
            if low != high or int(low) % KEYS != key:
                self.wrong.append((key, low, high))
            if random.random() < 0.01:
                raise LookupError  # a block that raises
        number = next(self.numbers)
        if number == READS // 5:
            self.warm.set()
        if number >= READS and self.written.is_set():
            self.finished.set()

    def forget(self, key: int, *, in_a_cycle: bool) -> None:
        """Borrow and never close, so that the lease is found by its finaliser, or by the garbage collector."""
        forgotten: list[Any] = [self.cache.borrow(key)]
        forgotten[0].__enter__()
        if in_a_cycle:
            forgotten.append(forgotten)


def check(found: Mapping[str, Any]) -> None:
    """Assert that nothing went wrong, and that there was something to go wrong."""
    assert (found["errors"], found["wrong"]) == ([], [])
    assert found["reads"] >= READS
    assert found["evictions"] > PUTS // 5
    assert found["pinned_bytes"] == found["unaccounted_bytes"] == found["left_bytes"] == 0
    assert found["grown_bytes"] < FLAT_BYTES < found["puts"] * NBYTES
