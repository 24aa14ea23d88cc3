"""Clients of redis-py, by the URL of a storage. Needs the extra ``redis``."""

import os
from typing import Any
from urllib.parse import unquote

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry

from agnostic_cache.errors import StorageError, StorageURLError
from agnostic_cache.storage.url import StorageURL

FAILURES = (RedisError, RedisClusterException, OSError)
"""What the library raises where a server does not do what it is asked."""

_USER, _PASSWORD = "AGNOSTIC_CACHE_REDIS_USERNAME", "AGNOSTIC_CACHE_REDIS_PASSWORD"


def make_client(url: StorageURL) -> Any:
    """Make the client of a URL; it connects when it is first used, but for a cluster's.

    Raises:
        StorageURLError: The URL cannot be understood.
        StorageError: No node of a cluster can be reached.
    """
    user, password, places = _places(url)
    timeout = url.seconds("timeout", 0.25)
    settings: dict[str, Any] = {
        "username": user, "password": password, "socket_timeout": timeout, "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0), "protocol": 2,
    }  # fmt: skip
    if url.scheme == "rediss" or (url.scheme == "redis+cluster" and url.switch("tls", default=False)):
        files = {"ssl_ca_certs": url.text("ca"), "ssl_certfile": url.text("cert"), "ssl_keyfile": url.text("key")}
        settings |= {"ssl": True, **{name: path or None for name, path in files.items()}}
    if url.scheme == "redis+cluster":
        nodes = [ClusterNode(host, port) for host, port in places]  # type: ignore[no-untyped-call]
        try:
            return RedisCluster(startup_nodes=nodes, **settings)
        except FAILURES as error:
            msg = f"{without_password(url)} cannot be reached: {error}; see that it runs, and who may use it"
            raise StorageError(msg) from error
    if url.scheme == "redis+unix":
        return redis.Redis(unix_socket_path=url.path, db=_number(url.text("db", "0")), **settings)
    [(host, port)] = places
    return redis.Redis(host=host, port=port, db=_number(url.path.strip("/") or "0"), **settings)


def without_password(url: StorageURL) -> str:
    """Return what errors may call the server of a URL."""
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _places(url: StorageURL) -> tuple[str | None, str | None, list[tuple[str, int]]]:
    """Return user, password, and hosts with their ports."""
    login, _, hosts = url.netloc.rpartition("@")
    user, _, password = login.partition(":")
    places = []
    for place in hosts.split(",") if url.scheme != "redis+unix" else ():
        host, colon, port = place.rpartition(":")
        if not colon or place.endswith("]"):  # an address of IPv6 without a port
            host, port = place, "6379"
        places.append((host.strip("[]"), _number(port)))
    if any(not host for host, _ in places) or (len(places) > 1 and url.scheme != "redis+cluster"):
        msg = f"{url.scheme}:// with the hosts {hosts!r}; write {url.scheme}://host:6379"
        raise StorageURLError(msg)
    return (
        unquote(user) or os.environ.get(_USER),
        unquote(password) or os.environ.get(_PASSWORD),
        places,
    )


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 5:  # noqa: PLR2004 - of a port, or of a database
        msg = f"{text!r} is no port, and no number of a database"
        raise StorageURLError(msg)
    return int(text)
