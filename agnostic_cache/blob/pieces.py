"""A blob: bytes in one piece, or in several that are not joined yet."""

from collections.abc import Iterable

from agnostic_cache.blob.safetensors import Parts

Blob = bytes | bytearray | memoryview | Parts
"""What is put: bytes in one piece, or the parts of a file that is not joined yet, as `state_blob.encode` gives them."""


def pieces_of(blob: Blob) -> tuple[int, Iterable[memoryview]]:
    """Return the size of a blob and its bytes in order; each piece is valid until the next is asked for."""
    if isinstance(blob, Parts):
        return blob.nbytes, blob
    whole = memoryview(blob).cast("B")
    return whole.nbytes, (whole,)


def copy_into(buffer: memoryview, pieces: Iterable[memoryview]) -> int:
    """Write pieces to `buffer`, one behind the other, and return how many bytes that was."""
    at, buffer = 0, buffer.cast("B")
    for piece in pieces:
        buffer[at : at + piece.nbytes] = piece
        at += piece.nbytes
    return at
