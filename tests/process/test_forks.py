"""Forks: what starts anew in a child, and what is there where no process forks."""

import os
import subprocess
import sys

from agnostic_cache.process import forks

WITHOUT = """
import os, random
del os.register_at_fork  # as on Windows; random wants it where os.fork is
from agnostic_cache import StateCache
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
cache = StateCache(64)
assert cache.put("a", {"x": HostArray.empty((64,), Dtype.UINT8)}).name == "LEGAL"
"""


class Thing:
    def __init__(self) -> None:
        self.process = os.getpid()
        self.forks = 0

    def after_fork(self) -> None:
        self.forks += 1
        self.process = os.getpid()


def test_what_is_watched_starts_anew_in_each_child_as_long_as_it_lives() -> None:
    thing, gone = Thing(), Thing()
    forks.watch(thing)
    forks.watch(gone)
    del gone
    child = os.fork()
    if child == 0:
        os._exit(0 if (thing.forks, thing.process) == (1, os.getpid()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert thing.forks == 0


def test_where_no_process_forks_everything_else_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
