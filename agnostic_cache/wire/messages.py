"""The messages of the wire, as objects and as bytes.

Source: LMCache 0.5.6 (``lmcache.v1.protocol``), names and layout kept byte for byte. A message that deserialises
serialises to bytes that mean the same.
"""

import enum
import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.errors import WireError
from agnostic_cache.wire.keys import MAX_KEY_LENGTH, CacheEngineKey, dtype_of, parse_cache_key

MAX_LENGTH: Final = 2**31 - 1
"""Bytes of a body."""

_REQUEST: Final = struct.Struct(f"<9i{MAX_KEY_LENGTH}s")
_NUMBERS: Final = struct.Struct("<9i")
_DIMENSIONS: Final = 4
_LOCATIONS: Final = (None, "LocalCPUBackend", "LocalDiskBackend")
_DTYPES: Final[dict[int, Dtype | None]] = {
    0: None,
    1: Dtype.FLOAT16,  # read, never written
    **{dtype.lm_code: dtype for dtype in Dtype if dtype.lm_code is not None},
}


class ClientCommand(enum.IntEnum):
    """What a client asks for."""

    PUT = 1
    GET = 2
    EXIST = 3
    LIST = 4
    HEALTH = 5


class ServerReturnCode(enum.IntEnum):
    """What a server answers."""

    SUCCESS = 200
    FAIL = 400


class MemoryFormat(enum.IntEnum):
    """How the axes of a body are ordered: L layers, T tokens, D = heads x dim, 2 for keys and values."""

    UNDEFINED = 0
    KV_2LTD = 1
    KV_T2D = 2
    KV_2TD = 3
    BINARY = 4
    BINARY_BUFFER = 5
    KV_MLA_FMT = 6
    EC_TD = 7
    HS_TD = 8


_Enum = TypeVar("_Enum", bound=enum.IntEnum)
_Body: TypeAlias = tuple[int, MemoryFormat, Dtype | None, tuple[int, ...], str | None]  # what a header says of one
_BINARY: Final = (MemoryFormat.BINARY, MemoryFormat.BINARY_BUFFER)


class _Message:
    """What requests and answers say of a body."""

    length: int
    fmt: MemoryFormat
    dtype: Dtype | None
    shape: tuple[int, ...]
    location: str | None

    def __post_init__(self) -> None:
        """Take torch's dtypes and sizes for their names and tuples."""
        self.dtype = None if self.dtype is None else dtype_of(self.dtype)
        self.shape = tuple(self.shape)

    def _codes(self) -> tuple[int, int, int]:
        """Return the codes of format, dtype and location, the length of the body being checked."""
        code = 0 if self.dtype is None else self.dtype.lm_code
        if code is None or self.location not in _LOCATIONS or not 0 <= self.length <= MAX_LENGTH:
            msg = (
                f"a body of {self.length} bytes of {self.dtype} at {self.location!r} cannot be sent; the wire "
                f"takes up to {MAX_LENGTH} bytes of {', '.join(sorted({str(dtype) for dtype in _DTYPES.values()}))}"
            )
            raise WireError(msg)
        return self.fmt, code, _LOCATIONS.index(self.location)


@dataclass
class ClientMetaMessage(_Message):
    """A request, 186 bytes: what is asked, the shape of a body that may follow, and the key.

    Attributes:
        command: What is asked.
        key: The key.
        length: Bytes of the body that follows a ``PUT``; 0 otherwise.
        fmt: Order of the axes of the body.
        dtype: Its element type, or None.
        shape: Its shape, at most 4 axes; ``(length, 0, 0, 0)`` for the binary formats.
        location: Backend that is asked, or None. Servers ignore it.
    """

    command: ClientCommand
    key: CacheEngineKey
    length: int
    fmt: MemoryFormat
    dtype: Dtype | None
    shape: tuple[int, ...]
    location: str | None = None

    def serialize(self) -> bytes:
        """Return the message as bytes.

        Raises:
            WireError: The key or the body is too long, the shape has more than 4 axes, or the dtype has no code.
        """
        key = self.key.to_string().encode()
        if len(key) > MAX_KEY_LENGTH:
            msg = f"the key takes {len(key)} bytes, and {MAX_KEY_LENGTH} fit; use a shorter model name or fewer tags"
            raise WireError(msg)
        fmt, dtype, location = self._codes()
        shape = _padded(self.shape)
        return _REQUEST.pack(self.command, self.length, fmt, dtype, location, *shape, key.ljust(MAX_KEY_LENGTH))

    @staticmethod
    def deserialize(data: bytes | bytearray | memoryview) -> "ClientMetaMessage":
        """Read 186 bytes.

        Raises:
            WireError: A field means nothing: what follows on that connection cannot be trusted.
        """
        data = _of_size(data, _REQUEST.size)
        command, body = _asked(data[:-MAX_KEY_LENGTH])
        return ClientMetaMessage(command, _key(data[-MAX_KEY_LENGTH:]), *body)

    @staticmethod
    def packlength() -> int:
        """Return the bytes of a request."""
        return _REQUEST.size


@dataclass
class ServerMetaMessage(_Message):
    """A response, 36 bytes. Attributes as those of `ClientMetaMessage`."""

    code: ServerReturnCode
    length: int
    fmt: MemoryFormat
    dtype: Dtype | None
    shape: tuple[int, ...]
    location: str | None = None

    def serialize(self) -> bytes:
        """Return the message as bytes.

        Raises:
            WireError: The body is too long, the shape has more than 4 axes, or the dtype has no code.
        """
        fmt, dtype, location = self._codes()
        return _NUMBERS.pack(self.code, self.length, fmt, dtype, *_padded(self.shape), location)

    @staticmethod
    def deserialize(data: bytes | bytearray | memoryview) -> "ServerMetaMessage":
        """Read 36 bytes.

        Raises:
            WireError: A field means nothing.
        """
        code, length, fmt, dtype, *shape, location = _NUMBERS.unpack(_of_size(data, _NUMBERS.size))
        code = _member(ServerReturnCode, code)
        return ServerMetaMessage(code, *_described(length, fmt, dtype, shape, location))

    @staticmethod
    def packlength() -> int:
        """Return the bytes of a response."""
        return _NUMBERS.size


def removal(key: CacheEngineKey) -> ClientMetaMessage:
    """Return a request that makes our server forget a key: the wire itself has none.

    It is a ``PUT`` of nothing, of no format and no dtype. To LMCache's server that is an empty entry.
    """
    return ClientMetaMessage(ClientCommand.PUT, key, 0, MemoryFormat.UNDEFINED, None, (0,))


def is_removal(message: ClientMetaMessage) -> bool:
    """Say whether a request is what `removal` makes."""
    if message.length or message.command is not ClientCommand.PUT:
        return False
    return message.fmt is MemoryFormat.UNDEFINED and message.dtype is None and not any(message.shape)


def _of_size(data: bytes | bytearray | memoryview, nbytes: int) -> bytes:
    if len(data) != nbytes:
        msg = f"a header of {len(data)} bytes; it has {nbytes}"
        raise WireError(msg)
    return bytes(data)


# Reading a header would take longer than all else that a server does to say whether a key is there. Most headers say of
# their bodies what others said, of keys that were asked for a moment ago.


@functools.lru_cache(maxsize=1024)
def _asked(numbers: bytes) -> tuple[ClientCommand, _Body]:
    """Read what stands before the key of a request."""
    command, length, fmt, dtype, location, *shape = _NUMBERS.unpack(numbers)
    return _member(ClientCommand, command), _described(length, fmt, dtype, shape, location)


@functools.lru_cache(maxsize=4096)
def _key(padded: bytes) -> CacheEngineKey:
    """Read the key of a request."""
    try:
        return parse_cache_key(padded.decode())
    except UnicodeDecodeError as error:
        msg = f"the key is not UTF-8: {error.reason} at byte {error.start}"
        raise WireError(msg) from error


def _member(kind: type[_Enum], value: int) -> _Enum:
    try:
        return kind(value)
    except ValueError as error:
        msg = f"{value} is no {kind.__name__}; known: {', '.join(f'{member} {member.name}' for member in kind)}"
        raise WireError(msg) from error


def _described(length: int, fmt: int, dtype: int, shape: list[int], location: int) -> _Body:
    """What a header says of its body, checked."""
    if length < 0 or dtype not in _DTYPES or location not in range(len(_LOCATIONS)):
        msg = (
            f"a header with length {length}, dtype code {dtype} and location code {location}; one of them means nothing"
        )
        raise WireError(msg)
    order = _member(MemoryFormat, fmt)
    extents = _padded(shape)
    while order not in _BINARY and len(extents) > 1 and not extents[-1]:
        del extents[-1]  # what `_padded` added; a true last extent of 0 is lost on this wire
    return length, order, _DTYPES[dtype], tuple(extents), _LOCATIONS[location]


def _padded(shape: Iterable[int]) -> list[int]:
    padded = [*shape]
    padded += [0] * (_DIMENSIONS - len(padded))
    if len(padded) != _DIMENSIONS or any(not 0 <= extent <= MAX_LENGTH for extent in padded):
        msg = f"shape {tuple(padded)} does not fit on the wire; it takes {_DIMENSIONS} extents up to {MAX_LENGTH}"
        raise WireError(msg)
    return padded
