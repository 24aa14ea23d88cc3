"""Entry: what a storage writes where bytes leave the process: a blob, its key, and a checksum of both.

An entry is a sealed safetensors file whose one tensor, ``blob``, is what was put; the rest is metadata. So one format,
one parser and one check serve states and storages, and a reader never trusts a length that it has not compared.
"""

from typing import Final, NamedTuple

from agnostic_cache.blob.checksum import best_algorithm
from agnostic_cache.blob.pieces import Blob, pieces_of
from agnostic_cache.blob.producer import PRODUCER
from agnostic_cache.blob.safetensors import RESERVED, Header, Part, Parts, parse_header, verify
from agnostic_cache.errors import BlobError

VERSION: Final = "1"
"""Version of what stands in the metadata; a reader knows exactly the ones it was written for."""

_VERSION, _PRODUCER, _KEY, _CODEC = (f"{RESERVED}{name}" for name in ("entry", "producer", "key", "codec"))
_BLOB = "blob"
_ESCAPES = "surrogatepass"  # any str is a key
_ALGORITHM: Final = best_algorithm()  # now: a child forked while a library is imported would wait for it for ever


class Facts(NamedTuple):
    """What an entry says of itself.

    Attributes:
        key: The key.
        codec: What its bytes were compressed with, or "".
        start: Where they begin in the file.
        stop: Where they end.
        algorithm: Checksum that the file is sealed with.
    """

    key: str
    codec: str
    start: int
    stop: int
    algorithm: str


def seal(key: str, blob: Blob, *, codec: str = "") -> Parts:
    """Lay an entry out. Copies nothing; the blob is read as the parts are."""
    nbytes, pieces = pieces_of(blob)
    said = {_VERSION: VERSION, _PRODUCER: PRODUCER, _KEY: key.encode("utf-8", _ESCAPES).hex()}
    if codec:
        said[_CODEC] = codec
    return Parts([Part(_BLOB, "U8", (nbytes,), nbytes, lambda: pieces)], said, algorithm=_ALGORITHM)


def facts(header: Header) -> Facts:
    """Read what an entry says of itself.

    Raises:
        BlobError: It is no entry, or of an unknown version.
    """
    said = header.metadata
    if said.get(_VERSION) != VERSION:
        msg = f"entry of version {said.get(_VERSION)!r}; this agnostic-cache reads {VERSION!r}"
        raise BlobError(msg)
    try:
        key, blob = bytes.fromhex(said[_KEY]).decode("utf-8", _ESCAPES), header.tensors[_BLOB]
    except (LookupError, ValueError) as error:
        msg = f"an entry without a key, or without a blob ({error})"
        raise BlobError(msg) from error
    if header.algorithm is None:
        msg = "an entry without a checksum"
        raise BlobError(msg)
    return Facts(key, said.get(_CODEC, ""), blob.start, blob.stop, header.algorithm)


def unseal(memory: memoryview, key: str, *, verified: bool = False) -> tuple[memoryview, str]:
    """Return the bytes that were put, as a view, and their codec.

    Args:
        memory: The whole entry.
        key: Its key.
        verified: Whether the caller has compared its checksum already.

    Raises:
        BlobError: It is no whole entry of that key.
        MissingExtraError: The library of its checksum is not installed.
    """
    found = facts(parse_header(memory))
    if found.key != key:
        msg = "the entry is that of another key"
        raise BlobError(msg)
    if not verified:
        verify(memory, found.algorithm)
    return memory[found.start : found.stop].toreadonly(), found.codec
