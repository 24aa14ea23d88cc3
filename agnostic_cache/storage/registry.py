"""open_storage: a storage by its URL. Third parties add schemes by entry point."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Final, NamedTuple

from agnostic_cache.errors import MissingExtraError, StorageURLError
from agnostic_cache.storage.backend import StorageBackend
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.url import StorageURL

GROUP: Final = "agnostic_cache.storage"
"""Entry points: the name is a scheme, the object takes a URL and returns a `StorageBackend`."""


class _Own(NamedTuple):
    """A scheme of the house: where its class is, and the extra that it needs."""

    module: str
    name: str
    extra: str | None = None


_REDIS = _Own("agnostic_cache.storage.redis", "RedisStorage", "redis")
_LM = _Own("agnostic_cache.storage.lm", "LMStorage")
_OWN: Mapping[str, _Own] = MappingProxyType({
    "memory": _Own("agnostic_cache.storage.memory", "MemoryStorage"),
    "file": _Own("agnostic_cache.storage.file", "FileStorage"),
    "lm": _LM,
    "lm+tls": _LM,
    "lm+unix": _LM,
    "redis": _REDIS,
    "rediss": _REDIS,
    "redis+cluster": _REDIS,
    "redis+unix": _REDIS,
})  # fmt: skip


def open_storage(url: str, *, strict: bool = False) -> StorageBackend:
    """Open the storage that a URL names, and see that it works.

    >>> with open_storage("memory://?max_bytes=1MiB") as storage:
    ...     storage.put("a", b"bytes")
    <PutStatus.LEGAL: 1>

    ==================  ======================================================================================
    URL                 options, with what they are by default
    ==================  ======================================================================================
    ``memory://``       ``max_bytes=4GiB evictor=adaptive``
    ``file:///path``    ``max_bytes`` (none) ``evictor=adaptive compress`` (none, or ``byteplanes+zstd``) ``sync=false``
    ``lm://host:port``  ``timeout=1 connections=8``; also ``lm+unix:///path``, and ``lm+tls://`` with ``ca cert key``
    ``redis://``        ``ttl=86400 timeout=0.25``; also ``rediss://``, ``redis+cluster://``, ``redis+unix://``
    ==================  ======================================================================================

    Args:
        url: Such as ``file:///var/cache/kv?max_bytes=100GiB``.
        strict: Let failures of the backend come through as `StorageError`. By default a failure is a miss, told in the
            log, and a backend that keeps failing is left alone for a while; see `GuardedStorage`.

    Raises:
        StorageURLError: The scheme or an option is unknown.
        InvalidSizeError: A size in it is no size.
        UnknownPolicyError: There is no such policy.
        MissingExtraError: Its library is not installed.
        StorageError: The path cannot be written, the server cannot be reached, or it refuses the password. Also
            without `strict`: what does not work at the start never will.
    """
    scheme = StorageURL.parse(url).scheme
    backend = _factory(scheme)(url)
    return backend if strict else GuardedStorage(backend, name=f"the {scheme}:// storage")


def _factory(scheme: str) -> Callable[[str], StorageBackend]:
    from importlib import metadata  # noqa: PLC0415 - half the time of importing this package

    points = metadata.entry_points(group=GROUP)
    if scheme in points.names:
        loaded: Callable[[str], StorageBackend] = points[scheme].load()  # a broken package's own error comes through
        return loaded
    if scheme not in _OWN:
        known = [f"{name}:// (pip install 'agnostic-cache[{own.extra}]')" if own.extra else f"{name}://"
                 for name, own in _OWN.items()]  # fmt: skip
        known += [f"{name}://" for name in sorted(points.names)]
        msg = f"no storage for {scheme}://; known: {', '.join(known)}"
        raise StorageURLError(msg)
    own = _OWN[scheme]
    try:
        module = import_module(own.module)
    except ModuleNotFoundError as error:
        if own.extra is None:
            raise
        msg = f"{scheme}:// needs a library that is not installed ({error}); pip install 'agnostic-cache[{own.extra}]'"
        raise MissingExtraError(msg) from error
    made: Callable[[str], StorageBackend] = getattr(module, own.name).from_url
    return made
