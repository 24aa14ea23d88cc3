"""byteplanes+zstd: the even and the odd bytes of a blob, each compressed by itself.

In 16-bit floats one of the two planes holds the exponents, which repeat; the other is almost noise. Measured on bf16
keys and values of SmolLM2: ratio 1.47, against 1.28 for zstd alone. Needs the extra ``zstd``.
"""

import struct
import sys

from agnostic_cache.blob.pieces import Blob, pieces_of
from agnostic_cache.errors import BlobError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_HEAD = struct.Struct("<QQ")  # bytes of the blob, compressed bytes of the even plane
_LEVEL = 1


def encode(blob: Blob) -> bytes:
    """Compress a blob."""
    nbytes, pieces = pieces_of(blob)
    whole = b"".join(pieces)
    even = zstd.compress(whole[0::2], _LEVEL)
    return b"".join((_HEAD.pack(nbytes, len(even)), even, zstd.compress(whole[1::2], _LEVEL)))


def decode(memory: memoryview) -> memoryview:
    """Return the blob that was compressed. What it claims to be is not allocated before it is.

    Raises:
        BlobError: `memory` was not made by `encode`.
    """
    if memory.nbytes < _HEAD.size:
        msg = f"{memory.nbytes} bytes are no compressed blob"
        raise BlobError(msg)
    nbytes, split = _HEAD.unpack_from(memory)
    body = memory[_HEAD.size :]
    even = _plane(body[:split], (nbytes + 1) // 2)
    odd = _plane(body[split:], nbytes // 2)
    whole = bytearray(nbytes)
    whole[0::2], whole[1::2] = even, odd
    return memoryview(whole).toreadonly()


def _plane(memory: memoryview, nbytes: int) -> bytes:
    running = zstd.ZstdDecompressor()
    try:
        plane = running.decompress(memory, max_length=min(nbytes + 1, sys.maxsize))
    except (zstd.ZstdError, EOFError) as error:
        msg = f"a compressed blob cannot be read ({error})"
        raise BlobError(msg) from error
    if len(plane) != nbytes or not running.eof or running.unused_data:
        msg = f"a compressed blob of {len(plane)} bytes or more, where {nbytes} are expected"
        raise BlobError(msg)
    return plane
