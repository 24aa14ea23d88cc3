"""What every test has."""

import gc
from collections.abc import Iterator

import pytest
from host_memory import HostMemory


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> Iterator[None]:
    """Leave what is there already out of what tests find by looking at every object: those are many, and slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory()
