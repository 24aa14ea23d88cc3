"""Checksums of bytes that leave the process, by the name under which a file carries them."""

import functools
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from agnostic_cache.errors import BlobError, MissingExtraError

DIGEST_BYTES: Final[Mapping[str, int]] = MappingProxyType({"xxh3-128": 16, "crc32": 4})
"""Size of the digest of each algorithm. Neither is cryptographic: they find accidents, not forgeries."""


class Checksum(Protocol):
    """A running checksum."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""
        ...

    def digest(self) -> bytes:
        """Return the digest of all bytes so far."""
        ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "little")


def checksum(algorithm: str) -> Checksum:
    """Start a checksum.

    Raises:
        BlobError: The algorithm is unknown.
        MissingExtraError: It is ``"xxh3-128"``, and its library is not installed.
    """
    if algorithm == "crc32":
        return _Crc32()
    if algorithm == "xxh3-128":
        return _xxh3()()
    msg = f"checksum {algorithm!r} is unknown (known: {', '.join(DIGEST_BYTES)}); read it with a newer agnostic-cache"
    raise BlobError(msg)


@functools.cache
def best_algorithm() -> str:
    """Return ``"xxh3-128"`` where its library is installed, else ``"crc32"``, which takes three times as long."""
    try:
        _xxh3()
    except MissingExtraError:
        return "crc32"
    return "xxh3-128"


def _xxh3() -> Callable[[], Checksum]:
    try:
        from xxhash import xxh3_128  # noqa: PLC0415 - behind an extra
    except ModuleNotFoundError as error:
        msg = "checksum 'xxh3-128' needs xxhash; pip install 'agnostic-cache[xxhash]'"
        raise MissingExtraError(msg) from error
    return xxh3_128
