"""The lm:// messages and keys, as bytes: pure functions, no sockets.

Source: LMCache 0.5.6 (``lmcache.v1.protocol``, ``lmcache.utils``), whose names and layout are kept byte for byte. All
integers are signed, 32 bits, little-endian. Where that code trusts what it is sent, this one refuses it with a
`WireError`: nothing is allocated, and nothing evaluated, from a field that was not checked.

Requirements: a message that deserialises serialises to bytes that mean the same; two spellings of one key
(``0ff``, ``ff``) are one key.
"""

import enum
import functools
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Self, TypeAlias, TypeVar

from agnostic_cache.errors import UnsupportedDtypeError, WireError
from agnostic_cache.state.dtypes import Dtype

MAX_KEY_LENGTH: Final = 150
"""Bytes of a key on the wire, in UTF-8."""

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
_NAMES: Final = {  # of a dtype in a key
    "half": Dtype.FLOAT16,
    "bfloat16": Dtype.BFLOAT16,
    "float": Dtype.FLOAT32,
    "double": Dtype.FLOAT64,
    "int8": Dtype.INT8,
    "uint8": Dtype.UINT8,
    "int16": Dtype.INT16,
    "int32": Dtype.INT32,
    "int64": Dtype.INT64,
    "bool": Dtype.BOOL,
    "fp8_e4m3fn": Dtype.FLOAT8_E4M3FN,
    "fp8_e4m3fnuz": Dtype.FLOAT8_E4M3FNUZ,
    "fp8_e5m2": Dtype.FLOAT8_E5M2,
    "fp8_e5m2fnuz": Dtype.FLOAT8_E5M2FNUZ,
}
_NAME_OF: Final = {dtype: name for name, dtype in _NAMES.items()}
_TAG: Final = "lmcache.tag."
_INT: Final = re.compile(r"-?[0-9]{1,10}", re.ASCII)
_KEY: Final = re.compile(  # the model comes first and may hold "@" itself: what follows it tells where it ends
    rf"(?P<model>.+?)@(?P<world>-?[0-9]{{1,10}})@(?P<worker>-?[0-9]{{1,10}})@(?P<hash>-?[0-9a-fA-F]+)"
    rf"@(?P<dtype>{'|'.join(_NAMES)})(?:@(?P<layer>[0-9]{{1,10}}))?(?P<tags>(?:@[^@%]*%[^@]*)*)",
    re.ASCII | re.DOTALL,
)


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


@dataclass(frozen=True, slots=True)
class CacheEngineKey:
    """The key of a chunk of tokens: ``model@world_size@worker_id@chunk_hash@dtype[@tag%value...]``.

    >>> CacheEngineKey("meta/llama", 1, 0, 255, "bfloat16").to_string()
    'meta/llama@1@0@ff@bfloat16'

    Attributes:
        model_name: Name of the model. "@" in it is fine here, and drops the connection of LMCache's own server.
        world_size: Number of workers.
        worker_id: Which of them.
        chunk_hash: Hash of the tokens; bytes are taken as a big-endian number. May be negative.
        dtype: Element type; a torch dtype, or anything else whose name is in the table, is taken for its name.
        request_configs: What else came with the request. Entries ``lmcache.tag.<name>`` are part of the key.
        tags: Those, as (name, value) pairs in order, or None where there are none.

    Raises:
        WireError: `dtype` has no name in keys, or a tag holds what separates tags.
    """

    model_name: str
    world_size: int
    worker_id: int
    chunk_hash: int
    dtype: Dtype
    request_configs: Mapping[str, Any] | None = field(default=None, compare=False)
    tags: tuple[tuple[str, str], ...] | None = field(init=False, default=None)
    _text: str = field(init=False, default="", repr=False, compare=False)  # once `to_string` was asked

    def __post_init__(self) -> None:
        """Normalise what callers may give in several forms."""
        dtype = _dtype(self.dtype)
        if dtype not in _NAME_OF:
            msg = f"a key of dtype {self.dtype}; use one of {', '.join(_NAME_OF)}"
            raise WireError(msg)
        given = (self.request_configs or {}).items()
        tags = tuple((name.removeprefix(_TAG), str(value)) for name, value in given if name.startswith(_TAG))
        bad = [f"{name}%{value}" for name, value in tags if "%" in name or "@" in name or "@" in value]
        if bad:
            msg = f"tag {bad[0]!r}: a name must not hold '%', and neither name nor value '@'"
            raise WireError(msg)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "tags", tags or None)
        given_hash: Any = self.chunk_hash
        if isinstance(given_hash, bytes):
            object.__setattr__(self, "chunk_hash", int.from_bytes(given_hash, "big"))

    @property
    def chunk_hash_hex(self) -> str:
        """The hash in lower-case hexadecimal, without a prefix."""
        return f"{self.chunk_hash:x}"

    def to_string(self) -> str:
        """Return the key as text; equal for equal keys."""
        if not self._text:
            numbers = str(self.world_size), str(self.worker_id), self.chunk_hash_hex, _NAME_OF[self.dtype]
            tags = (f"{name}%{value}" for name, value in self.tags or ())
            object.__setattr__(self, "_text", "@".join((self.model_name, *numbers, *self._layer(), *tags)))
        return self._text

    def _layer(self) -> tuple[str, ...]:
        return ()

    @classmethod
    def from_string(cls, text: str) -> Self:
        """Read what `to_string` writes.

        Raises:
            WireError: It is no key, or one of another class; see `parse_cache_key`.
        """
        key = parse_cache_key(text)
        if type(key) is not cls:
            msg = f"{text!r} is a {type(key).__name__}; use parse_cache_key"
            raise WireError(msg)
        return key

    def split_layers(self, num_layers: int) -> list["LayerCacheEngineKey"]:
        """Return the keys of the single layers."""
        return [self._of_layer(layer) for layer in range(num_layers)]

    def get_first_layer(self) -> "LayerCacheEngineKey":
        """Return the key of layer 0."""
        return self._of_layer(0)

    def _of_layer(self, layer_id: int) -> "LayerCacheEngineKey":
        parts = (self.model_name, self.world_size, self.worker_id, self.chunk_hash, self.dtype, self.request_configs)
        return LayerCacheEngineKey(*parts, layer_id=layer_id)

    def with_new_worker_id(self, new_worker_id: int) -> Self:
        """Return the key of another worker."""
        return replace(self, worker_id=new_worker_id)


@dataclass(frozen=True, slots=True)
class LayerCacheEngineKey(CacheEngineKey):
    """The key of one layer of a chunk: ``...@dtype@layer_id[@tag%value...]``.

    Attributes:
        layer_id: Number of the layer, from 0.
    """

    layer_id: int = 0

    def _layer(self) -> tuple[str, ...]:
        return (str(self.layer_id),)


def parse_cache_key(key_str: str) -> CacheEngineKey | LayerCacheEngineKey:
    """Read a key, of a layer or of them all.

    >>> parse_cache_key("a/b@1@0@0FF@half@3@user%x").to_string()
    'a/b@1@0@ff@half@3@user%x'

    Raises:
        WireError: It is no key.
    """
    text = key_str.strip()
    found = _KEY.fullmatch(text)
    if found is None:
        form = "model@world_size@worker_id@hash@dtype[@layer][@tag%value...]"
        msg = f"{text[:MAX_KEY_LENGTH]!r} is no key; it should read {form}"
        raise WireError(msg)
    pairs = (tag.partition("%") for tag in found["tags"].split("@")[1:])
    configs = MappingProxyType({_TAG + name: value for name, _, value in pairs}) or None
    numbers = int(found["world"]), int(found["worker"]), int(found["hash"], 16)
    if found["layer"] is None:
        return CacheEngineKey(found["model"], *numbers, _NAMES[found["dtype"]], configs)
    return LayerCacheEngineKey(found["model"], *numbers, _NAMES[found["dtype"]], configs, layer_id=int(found["layer"]))


class _Message:
    """What requests and answers say of a body."""

    length: int
    fmt: MemoryFormat
    dtype: Dtype | None
    shape: tuple[int, ...]
    location: str | None

    def __post_init__(self) -> None:
        """Take torch's dtypes and sizes for their names and tuples."""
        self.dtype = None if self.dtype is None else _dtype(self.dtype)
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


def _dtype(given: Any) -> Dtype:
    """The dtype of that name; ``torch.float16`` calls itself that."""
    if isinstance(given, Dtype):
        return given
    try:
        return Dtype.of(str(getattr(given, "name", given)).rpartition(".")[2])
    except UnsupportedDtypeError as error:
        raise WireError(str(error)) from error


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
