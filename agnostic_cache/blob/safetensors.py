"""The safetensors format, without a framework: data on 64-byte boundaries, a checksum at the end.

What is written here, the safetensors library reads, and the reverse. Two things are added within the format:

- every tensor starts on a 64-byte boundary: the header is padded with spaces, and a gap is a tensor of its own, because
  the format allows no holes;
- a *sealed* file ends in a tensor that is the checksum of all bytes before it, so that writing is one pass and no part
  is held back. Its algorithm is named in the metadata.

Names that begin with ``agnostic_cache.`` are ours. Source: the format of https://github.com/huggingface/safetensors.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from agnostic_cache.arrays.host import aligned
from agnostic_cache.blob.checksum import DIGEST_BYTES, checksum
from agnostic_cache.errors import BlobError

RESERVED: Final = "agnostic_cache."
"""Prefix of the tensors and the metadata that are not the user's."""
CHUNK: Final = 256 * 1024
"""Bytes that are summed and handed on at a time: what the checksum read, the copy then finds in the CPU's cache."""

_CHECKSUM, _GAP = f"{RESERVED}checksum", f"{RESERVED}padding."
_PREFIX = 8
_MAX_HEADER = 100_000_000  # as in the safetensors library
_MAX_AXES = 64
_INT, _STR = frozenset({int}), frozenset({str})
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class Part(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        dtype: Name of its element type in the format.
        shape: Extents.
        nbytes: Its size.
        read: Gives its bytes, in one piece or several, when their turn comes.
    """

    name: str
    dtype: str
    shape: Sequence[int]
    nbytes: int
    read: Callable[[], Iterable[memoryview]]


class Parts:
    """A file that is not joined: iterating gives its bytes in order, in pieces, and copies none.

    Each iteration reads the sources again. A piece is valid until the next one is asked for.

    Attributes:
        nbytes: Size of the whole.
    """

    def __init__(self, parts: Sequence[Part], metadata: Mapping[str, str], *, algorithm: str | None) -> None:
        """Lay a file out.

        Args:
            parts: Its tensors, in order.
            metadata: Text by name.
            algorithm: Checksum to seal it with, or None.
        """
        tensors: dict[str, Any] = {}
        pieces: list[tuple[int, Callable[[], Iterable[memoryview]]]] = []  # size of the gap behind, bytes
        at = 0
        for part in parts:
            stop = at + part.nbytes
            tensors[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [at, stop]}
            at = aligned(stop)
            pieces.append((at - stop, part.read))
            if at > stop:
                gap = {"dtype": "U8", "shape": [at - stop], "data_offsets": [stop, at]}
                tensors[f"{_GAP}{len(pieces)}"] = gap
        if algorithm is not None:
            metadata = {**metadata, _CHECKSUM: algorithm}
            stop = at + DIGEST_BYTES[algorithm]
            tensors[_CHECKSUM] = {"dtype": "U8", "shape": [stop - at], "data_offsets": [at, stop]}
            at = stop
        header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":"), ensure_ascii=False).encode()
        header = header.ljust(aligned(_PREFIX + len(header)) - _PREFIX)
        self._header = len(header).to_bytes(_PREFIX, "little") + header
        self._pieces = pieces
        self._algorithm = algorithm
        self.nbytes = len(self._header) + at

    def __iter__(self) -> Iterator[memoryview]:
        """Give the bytes in order; the checksum is made on the way and comes last."""
        if self._algorithm is None:
            yield from self._body()
            return
        running = checksum(self._algorithm)
        for piece in self._body():
            running.update(piece)
            yield piece
        yield memoryview(running.digest())

    def _body(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for gap, read in self._pieces:
            for memory in read():
                for at in range(0, memory.nbytes, CHUNK):
                    yield memory[at : at + CHUNK]
            if gap:
                yield memoryview(bytes(gap))

    def write_into(self, buffer: memoryview) -> None:
        """Write the whole to the start of `buffer`, a flat writable view of at least `nbytes` bytes."""
        at = 0
        for piece in self:
            buffer[at : at + piece.nbytes] = piece
            at += piece.nbytes

    def __bytes__(self) -> bytes:
        """Return the whole, joined."""
        return b"".join(self)


class Tensor(NamedTuple):
    """A tensor in a file: element type, extents, and where its bytes begin and end in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        metadata: Text by name.
        tensors: The tensors by name, gaps and checksum left out.
        nbytes: Size of the header, which is where data begins.
        algorithm: Checksum that the file is sealed with, or None.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    nbytes: int
    algorithm: str | None


def header_nbytes(start: bytes | memoryview, file_nbytes: int) -> int:
    """Return the size of a file's header from its first eight bytes.

    Raises:
        BlobError: The file is too short for it.
    """
    claimed = int.from_bytes(start[:_PREFIX], "little")
    limit = min(file_nbytes - _PREFIX, _MAX_HEADER)
    if len(start) < _PREFIX or not len(b"{}") <= claimed <= limit:
        msg = f"a header of {claimed} bytes in a file of {file_nbytes}: it is cut off, or no safetensors file"
        raise BlobError(msg)
    return _PREFIX + claimed


def parse_header(memory: memoryview, file_nbytes: int | None = None) -> Header:
    """Read the header. Nothing is allocated by what it claims.

    Args:
        memory: A flat view that begins with the whole header, and may end there.
        file_nbytes: Size of the file, where `memory` is only its beginning.

    Raises:
        BlobError: It is cut off, no safetensors file, or its claims do not fit the file.
    """
    total = memory.nbytes if file_nbytes is None else file_nbytes
    nbytes = header_nbytes(memory, total)
    try:
        plain = json.loads(str(memory[_PREFIX:nbytes], "utf-8"))
        return _checked(plain, nbytes, total)
    except BlobError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        msg = f"the header of {nbytes} bytes is not one of a safetensors file ({type(error).__name__}: {error})"
        raise BlobError(msg) from error


def _checked(plain: Any, nbytes: int, total: int) -> Header:
    metadata = plain.pop("__metadata__", {})
    if not _STR.issuperset(map(type, (*metadata, *metadata.values()))):
        msg = "metadata that is not text"
        raise TypeError(msg)
    tensors: dict[str, Tensor] = {}
    at = nbytes
    for name, entry in sorted(plain.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        counts = (*shape, first, last)
        sound = len(shape) <= _MAX_AXES and _INT.issuperset(map(type, counts)) and min(counts) >= 0
        start, stop = nbytes + first, nbytes + last
        if not sound or start != at or stop < start or math.prod(shape) * _BITS[dtype] != (stop - start) * 8:
            msg = f"tensor {name!r}: {dtype} {shape} at bytes [{start}, {stop}), behind byte {at}"
            raise BlobError(msg)
        tensors[name] = Tensor(dtype, shape, start, stop)
        at = stop
    if at != total:
        msg = f"tensors up to byte {at} in a file of {total} bytes: it is cut off, or another was put behind it"
        raise BlobError(msg)
    algorithm = metadata.get(_CHECKSUM)
    seal = tensors.pop(_CHECKSUM, None)
    size = None if seal is None or seal.stop != total else seal.stop - seal.start
    if algorithm is not None and (size is None or size != DIGEST_BYTES.get(algorithm, size)):
        msg = f"a checksum {algorithm!r} is named, and the file does not end in one"
        raise BlobError(msg)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_GAP)}
    return Header(metadata, tensors, nbytes, algorithm)


def verify(memory: memoryview, algorithm: str | None) -> None:
    """Compare a sealed file, whole in `memory`, with the checksum at its end. Reads every byte.

    Raises:
        BlobError: They differ, or it has no checksum.
        MissingExtraError: The library of its algorithm is not installed.
    """
    if algorithm is None:
        msg = "the file carries no checksum; it was not written by agnostic-cache, or not to be verified"
        raise BlobError(msg)
    running = checksum(algorithm)
    seal = memory.nbytes - DIGEST_BYTES[algorithm]
    running.update(memory[:seal])
    check_digest(running.digest(), memory[seal:])


def check_digest(found: bytes, expected: memoryview) -> None:
    """Raise where a checksum is not the one that the file ends in.

    Raises:
        BlobError: It is not.
    """
    if found != expected:
        msg = f"the checksum is {found.hex()}, the file says {expected.hex()}: a bit changed on its way; fetch it again"
        raise BlobError(msg)
