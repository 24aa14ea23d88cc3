"""LMPool: the connections of a cache server's client."""

import socket
from collections.abc import Iterator

import pytest

from agnostic_cache.errors import StorageError
from agnostic_cache.storage.lm_connection import Address, LMPool


@pytest.fixture
def address() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Address("127.0.0.1", listener.getsockname()[1], 0.05)


def test_who_wants_a_connection_too_many_is_told_so(address: Address) -> None:
    pool = LMPool(address, 1)
    with pytest.raises(StorageError):
        pool.use(lambda _: pool.use(lambda _: None))
    assert pool.use(lambda _: "free again") == "free again"
    pool.close()


def test_a_child_does_not_wait_for_connections_that_its_parent_uses(address: Address) -> None:
    def fork(_: object) -> str:
        pool.after_fork()
        return pool.use(lambda _: "the child's")

    pool = LMPool(address, 1)
    assert pool.use(fork) == "the child's"
    pool.close()
