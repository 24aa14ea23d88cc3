"""Record: an entry as the server keeps it: 28 bytes that say what it is, then the answer to a GET, header and body.

The last of the 28 is the number of axes, which the wire cannot say: it fills a shape up with zeros.

So an entry is sent from where it lies, and its body, 64 bytes from the start, is where it was received.
"""

from functools import lru_cache
from typing import Final

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import WireError
from agnostic_cache.wire import ClientMetaMessage, MemoryFormat, ServerMetaMessage, ServerReturnCode

_MARK: Final = b"agnostic-cache lm record 1\n"
_AXES: Final = len(_MARK)
_HEADER: Final = _AXES + 1
BODY: Final = _HEADER + ServerMetaMessage.packlength()
"""Where the body begins: a multiple of 64."""


def prepare(record: memoryview, meta: ClientMetaMessage) -> None:
    """Write what stands before the body.

    Raises:
        WireError: The wire has no code for it.
    """
    record[:BODY] = _head(meta.length, meta.fmt, meta.dtype, meta.shape)


@lru_cache(maxsize=1024)  # bodies of one model are alike
def _head(length: int, fmt: MemoryFormat, dtype: Dtype | None, shape: tuple[int, ...]) -> bytes:
    header = ServerMetaMessage(ServerReturnCode.SUCCESS, length, fmt, dtype, shape)
    return b"".join((_MARK, bytes((len(shape),)), header.serialize()))


def meta_of(record: memoryview) -> ServerMetaMessage | None:
    """Return the header of a record, or None where it is no whole record, or one of another version."""
    if record.nbytes < BODY or bytes(record[:_AXES]) != _MARK:
        return None
    try:
        meta = ServerMetaMessage.deserialize(record[_HEADER:BODY])
    except WireError:
        return None
    meta.shape = (*meta.shape, 0, 0, 0, 0)[: record[_AXES]]
    return meta if meta.length == record.nbytes - BODY else None


def is_whole(record: memoryview) -> bool:
    """Say whether it is a record, without reading all of the header."""
    if record.nbytes < BODY or bytes(record[:_AXES]) != _MARK:
        return False
    return int.from_bytes(record[_HEADER + 4 : _HEADER + 8], "little") == record.nbytes - BODY


def response_of(record: memoryview) -> memoryview:
    """Return header and body of a record."""
    return record[_HEADER:]


def body_of(record: memoryview) -> memoryview:
    """Return the body of a record."""
    return record[BODY:]
