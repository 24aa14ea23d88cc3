"""open_storage: a storage by its URL. The project's own schemes stand in a table; third parties' are entry points."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from agnostic_cache.entry_points import entry_points
from agnostic_cache.errors import MissingExtraError, StorageURLError
from agnostic_cache.storage.backend import StorageBackend
from agnostic_cache.storage.guard import GuardedStorage
from agnostic_cache.storage.url import StorageURL

GROUP: Final = "agnostic_cache.storage"
"""Entry points: the name is a scheme, the object takes a URL and returns a `StorageBackend`.

A scheme of the table is the project's: no entry point replaces it.
"""

_Opener = Callable[[str], StorageBackend]


def _memory() -> _Opener:
    from agnostic_cache.storage.memory import MemoryStorage  # noqa: PLC0415 - when it is asked for, as those below

    return MemoryStorage.from_url


def _file() -> _Opener:
    from agnostic_cache.storage.file import FileStorage  # noqa: PLC0415

    return FileStorage.from_url


def _lm() -> _Opener:
    from agnostic_cache.storage.lm import LMStorage  # noqa: PLC0415

    return LMStorage.from_url


def _redis() -> _Opener:
    from agnostic_cache.storage.redis import RedisStorage  # noqa: PLC0415

    return RedisStorage.from_url


class _Own(NamedTuple):
    """A scheme of the project: what imports its backend, and the extra that it needs."""

    load: Callable[[], _Opener]
    extra: str | None = None


# Functions, not names of modules: what makes a frozen program finds the modules by their import statements.
_OWN: Mapping[str, _Own] = MappingProxyType({
    "memory": _Own(_memory),
    "file": _Own(_file),
    "lm": _Own(_lm),
    "lm+tls": _Own(_lm),
    "lm+unix": _Own(_lm),
    "redis": _Own(_redis, "redis"),
    "rediss": _Own(_redis, "redis"),
    "redis+cluster": _Own(_redis, "redis"),
    "redis+unix": _Own(_redis, "redis"),
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
    backend = _opener(scheme)(url)
    return backend if strict else GuardedStorage(backend, name=f"the {scheme}:// storage")


def _opener(scheme: str) -> _Opener:
    if scheme not in _OWN:
        return _third_party(scheme)
    own = _OWN[scheme]
    try:
        return own.load()
    except ModuleNotFoundError as error:
        if own.extra is None:
            raise
        msg = f"{scheme}:// needs a library that is not installed ({error}); pip install 'agnostic-cache[{own.extra}]'"
        raise MissingExtraError(msg) from error


def _third_party(scheme: str) -> _Opener:
    points = entry_points(GROUP)
    if scheme in points:
        loaded: _Opener = points[scheme].load()  # a broken package's own error comes through
        return loaded
    known = [f"{name}:// (pip install 'agnostic-cache[{own.extra}]')" if own.extra else f"{name}://"
             for name, own in _OWN.items()]  # fmt: skip
    known += [f"{name}://" for name in sorted(points)]
    msg = f"no storage for {scheme}://; known: {', '.join(known)}"
    raise StorageURLError(msg)
