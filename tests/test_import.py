"""Importing the package brings the standard library and nothing else."""

import subprocess
import sys

LOADED = """
import sys
before = set(sys.modules)
{code}
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""
USE = """
from agnostic_cache import StateCache, wrap
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.dtypes import Dtype
cache = StateCache("1KiB")
cache.put("a", {"x": HostArray.empty((8,), Dtype.FLOAT32)})
assert cache.get("a")
"""


def loaded(code: str) -> set[str]:
    """Top-level modules, none of the standard library, that code in a new interpreter imports."""
    command = [sys.executable, "-c", LOADED.format(code=code)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return set(done.stdout.split()) - set(sys.stdlib_module_names)


def test_import() -> None:
    assert loaded("import agnostic_cache") == {"agnostic_cache"}
    assert loaded("from agnostic_cache import *") == {"agnostic_cache"}


def test_states_in_host_memory_need_nothing_else() -> None:
    assert loaded(USE) == {"agnostic_cache"}


def test_every_public_name_is_there() -> None:
    import agnostic_cache  # noqa: PLC0415

    assert all(getattr(agnostic_cache, name).__name__ == name for name in agnostic_cache.__all__)
    assert dir(agnostic_cache) == sorted(agnostic_cache.__all__)
    assert not hasattr(agnostic_cache, "nothing")
