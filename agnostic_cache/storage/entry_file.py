"""Reading and writing an entry in an open file, checked on the way."""

import os

from agnostic_cache.blob.checksum import DIGEST_BYTES, checksum
from agnostic_cache.blob.entry import facts, unseal
from agnostic_cache.blob.safetensors import CHUNK, Parts, check_digest, header_nbytes, parse_header
from agnostic_cache.errors import BlobError
from agnostic_cache.storage.blocks import BlockPool
from agnostic_cache.storage.codec import decode

_HEAD = 4096  # bytes that hold the header of an entry, unless its key is very long
_IDLE = 64 * 1024 * 1024  # bytes of blocks that are kept for the next reads


def write_entry(file: int, entry: Parts) -> None:
    """Write an entry, piece by piece."""
    for piece in entry:
        left = piece
        while left.nbytes:
            left = left[os.write(file, left) :]


def read_key(file: int) -> str:
    """Return the key of an entry, from its header alone.

    Raises:
        BlobError: It is no entry, or the file does not fit its header.
    """
    nbytes = os.fstat(file).st_size
    head = os.pread(file, _HEAD, 0)
    size = header_nbytes(head, nbytes)
    if size > len(head):
        head = os.pread(file, size, 0)
    return facts(parse_header(memoryview(head), nbytes)).key


def read_entry(file: int, key: str, pool: BlockPool) -> tuple[int, memoryview]:
    """Return the size of an entry, and the blob in it, which lies in a block of `pool`.

    Raises:
        BlobError: It is no whole entry of that key.
        MissingExtraError: The library of its checksum, or of its codec, is not installed.
        StorageFullError: There is no memory.
    """
    nbytes = os.fstat(file).st_size
    header_nbytes(os.pread(file, 8, 0), nbytes)  # before anything is allocated
    block = pool.take(nbytes)
    whole = memoryview(block)[:nbytes]
    at = _fill(file, whole, 0, min(nbytes, CHUNK))
    at = _fill(file, whole, at, max(at, header_nbytes(whole[:at], nbytes)))
    algorithm = facts(parse_header(whole[:at], nbytes)).algorithm
    running, end = checksum(algorithm), nbytes - DIGEST_BYTES[algorithm]
    running.update(whole[: min(at, end)])
    while at < nbytes:  # what the kernel has just copied, the checksum then finds in the CPU's cache
        stop = _fill(file, whole, at, min(nbytes, at + CHUNK))
        running.update(whole[at : max(at, min(stop, end))])
        at = stop
    check_digest(running.digest(), whole[end:])
    blob, codec = unseal(whole, key, verified=True)
    if codec:
        blob = decode(blob, codec)
    pool.give((block,), _IDLE)
    return nbytes, blob


def _fill(file: int, whole: memoryview, at: int, stop: int) -> int:
    """Read bytes ``[at, stop)`` of a file to where they belong, and return `stop`.

    Raises:
        BlobError: The file ends before.
    """
    while at < stop:
        count = os.preadv(file, [whole[at:stop]], at)
        if not count:
            msg = f"the file ends at byte {at}; somebody cut it off while it was read"
            raise BlobError(msg)
        at += count
    return stop
