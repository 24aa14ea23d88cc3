"""Codecs: what a blob may be compressed with on its way to a disk, by name. Lossless; "" is none."""

from types import ModuleType
from typing import Final

from agnostic_cache.blob.pieces import Blob
from agnostic_cache.errors import BlobError, MissingExtraError, StorageURLError

CODECS: Final = ("byteplanes+zstd",)
"""Names of the codecs, each behind the extra ``zstd``."""


def encode(blob: Blob, codec: str) -> Blob:
    """Return `blob` compressed, or itself where `codec` is "".

    Raises:
        StorageURLError: There is no such codec.
        MissingExtraError: Its library is not installed.
    """
    if not codec:
        return blob
    if codec not in CODECS:
        msg = f"compress={codec!r} is unknown; known: {', '.join(CODECS)}"
        raise StorageURLError(msg)
    compressed: bytes = _byteplanes().encode(blob)
    return compressed


def decode(memory: memoryview, codec: str) -> memoryview:
    """Return what `encode` was given.

    Raises:
        BlobError: There is no such codec, or `memory` was not made by it.
        MissingExtraError: Its library is not installed.
    """
    if codec not in CODECS:
        msg = f"compressed with {codec!r}, which is unknown; known: {', '.join(CODECS)}"
        raise BlobError(msg)
    whole: memoryview = _byteplanes().decode(memory)
    return whole


def _byteplanes() -> ModuleType:
    try:
        from agnostic_cache.storage import byteplanes  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        msg = f"compress='byteplanes+zstd' needs a library ({error}); pip install 'agnostic-cache[zstd]'"
        raise MissingExtraError(msg) from error
    return byteplanes
