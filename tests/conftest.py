"""What every test has."""

import gc
from collections.abc import Iterator

import pytest
from host_memory import HostMemory
from hypothesis import HealthCheck, settings

# How long an example takes, and how long it takes to make one, says more of what else a machine does than of the code.
settings.register_profile("no clock", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


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
