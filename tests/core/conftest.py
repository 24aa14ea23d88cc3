"""What tests of the core share."""

import pytest
from host_memory import HostMemory


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory()
