"""From tokens to the keys of their blocks: a chain of blake2b, equal in every process and on every machine.

The key of a block is the hash of the key before it and of its own tokens as little-endian uint32, so that a key stands
for everything from the first token on. The chain starts at the hash of what else the state depends on.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NoReturn

from agnostic_cache.arrays.registry import adapter_for
from agnostic_cache.errors import InvalidNamespaceError, InvalidTokensError, UnknownValueError

FORMAT = b"agnostic-cache/1"
KEY_BYTES = 32
TOKEN_BYTES = 4

_SIGNED, _UNSIGNED = "bhilqn", "BHILQN"


def root_key(namespace: str, salt: bytes = b"", context: object = b"") -> bytes:
    """Return what the first block hangs on: the hash of everything but tokens that the state depends on.

    Each field goes in behind its length, so that no two ways to split the same bytes give one key.

    Raises:
        InvalidNamespaceError: `context` is no bytes.
    """
    if not isinstance(context, bytes):
        msg = f"context of type {type(context).__qualname__}; pass bytes, of several parts fields(...)"
        raise InvalidNamespaceError(msg)
    return blake2b(fields(FORMAT, namespace.encode(), salt, context), digest_size=KEY_BYTES).digest()


def fields(*parts: bytes) -> bytes:
    """Join byte strings so that only the same strings in the same order give the same bytes.

    >>> fields(b"org_1", b"2345") == fields(b"org_12345", b"")
    False
    """
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def next_key(parent: bytes, tokens: bytes) -> bytes:
    """Return the key of a block: `parent` is the key before it, `tokens` its own, encoded."""
    return blake2b(parent + tokens, digest_size=KEY_BYTES).digest()


def cut(data: bytes, parent: bytes, block_size: int) -> Iterator[tuple[bytes, bytes]]:
    """Cut encoded tokens into blocks, the last one maybe shorter; yield the key and the tokens of each.

    Args:
        data: Tokens, encoded.
        parent: The key before the first of them.
        block_size: Tokens per block.
    """
    size = block_size * TOKEN_BYTES
    for begin in range(0, len(data), size):
        tokens = data[begin : begin + size]
        parent = next_key(parent, tokens)
        yield parent, tokens


def encode(tokens: Any) -> bytes:
    """Return tokens as little-endian uint32, whatever kind of integer sequence they come in.

    >>> encode([1, 2]).hex()
    '0100000002000000'

    Args:
        tokens: A list or tuple of ints; a one-dimensional array of any integer type with a buffer (NumPy,
            ``array.array``, bytes) or of a framework that has an adapter (PyTorch, JAX). Read, never kept.

    Raises:
        InvalidTokensError: They are not integers, not one-dimensional, or outside ``[0, 2**32)``.
    """
    if isinstance(tokens, list | tuple | range):
        return _encode_sequence(tokens)
    try:
        view = memoryview(tokens)
    except TypeError:
        return _encode_array(tokens)
    except ValueError:  # an element type that buffers do not know (bfloat16)
        _refuse(f"an array of {getattr(tokens, 'dtype', 'unknown elements')}")
    order = sys.byteorder == "big"
    kind = view.format
    if kind[:1] in {"<", ">", "!", "=", "@"}:
        order, kind = {"<": False, ">": True, "!": True}.get(kind[0], order), kind[1:]
    if view.ndim != 1:
        _refuse(f"an array of shape {view.shape}")
    if kind not in _SIGNED and kind not in _UNSIGNED:
        _refuse(f"an array of {getattr(tokens, 'dtype', view.format)}")
    if view.itemsize > TOKEN_BYTES and hasattr(tokens, "astype"):
        # NumPy does this in a tenth of our time. Seen as unsigned, a negative token is a large one.
        if view and tokens.view(">u8" if order else "<u8").max() >> 32:
            _deny_range("a negative token, or one of 33 bits or more,")
        return bytes(tokens.astype("<u4").tobytes())
    return _narrow(view.tobytes(), view.itemsize, big=order, signed=kind in _SIGNED)


def _encode_sequence(tokens: Sequence[Any]) -> bytes:
    packed = array("I")
    try:
        if isinstance(tokens, list):
            packed.fromlist(tokens)  # in half the time of array("I", tokens)
        else:
            packed.extend(tokens)
    except OverflowError:
        wrong = next(token for token in tokens if not 0 <= token < 2**32)
        _deny_range(f"token {wrong}")
    except TypeError:
        wrong = next(type(token).__qualname__ for token in tokens if not hasattr(token, "__index__"))
        _refuse(f"a token of type {wrong}")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _encode_array(tokens: Any) -> bytes:
    """Encode an array of a framework, through its adapter."""
    try:
        adapter = adapter_for(tokens)
    except UnknownValueError:
        _refuse(f"a {type(tokens).__qualname__}")
    if not adapter.is_array(tokens):
        _refuse(f"a {type(tokens).__qualname__}")
    host = adapter.to_host(tokens)
    if len(host.shape) != 1:
        _refuse(f"an array of shape {host.shape}")
    if not host.dtype.is_integer:
        _refuse(f"an array of {host.dtype}")
    signed = not host.dtype.value.startswith("u")
    return _narrow(bytes(host.memory), host.dtype.itemsize, big=sys.byteorder == "big", signed=signed)


def _narrow(raw: bytes, itemsize: int, *, big: bool, signed: bool) -> bytes:
    """Make 4-byte little-endian integers of integers of another size.

    Byte by byte: one slice with a step per byte of an integer takes a tenth of the time of a loop over integers.
    """
    lanes = [raw[i::itemsize] for i in range(itemsize)]
    if big:
        lanes.reverse()
    if signed and not lanes[-1].isascii():
        _deny_range("a negative token")
    if any(lane.count(0) < len(lane) for lane in lanes[TOKEN_BYTES:]):
        _deny_range("a token of 33 bits or more")
    if itemsize == TOKEN_BYTES and not big:
        return raw
    packed = bytearray(len(lanes[0]) * TOKEN_BYTES)
    for i, lane in enumerate(lanes[:TOKEN_BYTES]):
        packed[i::TOKEN_BYTES] = lane
    return bytes(packed)


def _refuse(found: str) -> NoReturn:
    msg = f"tokens are a sequence of integers with one axis, and {found} was given; pass one prompt's token ids"
    raise InvalidTokensError(msg) from None


def _deny_range(found: str) -> NoReturn:
    msg = f"{found} was given; token ids lie in [0, 2**32)"
    raise InvalidTokensError(msg) from None
