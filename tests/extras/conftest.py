"""Real servers: redis-server on loopback, alone and as a cluster of three masters."""

from collections.abc import Iterator

import pytest
from redis_server import Cluster, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that all tests share."""
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters that all tests share."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
