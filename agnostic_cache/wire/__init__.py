"""The lm:// messages and keys, as bytes: pure functions, no sockets.

Source: LMCache 0.5.6, whose names and layout are kept byte for byte. All integers are signed, 32 bits, little-endian.
Where that code trusts what it is sent, this one refuses it with a `WireError`: nothing is allocated, and nothing
evaluated, from a field that was not checked.
"""

from agnostic_cache.wire.keys import MAX_KEY_LENGTH, CacheEngineKey, LayerCacheEngineKey, parse_cache_key
from agnostic_cache.wire.messages import (
    MAX_LENGTH,
    ClientCommand,
    ClientMetaMessage,
    MemoryFormat,
    ServerMetaMessage,
    ServerReturnCode,
    is_removal,
    removal,
)

__all__ = [
    "MAX_KEY_LENGTH",
    "MAX_LENGTH",
    "CacheEngineKey",
    "ClientCommand",
    "ClientMetaMessage",
    "LayerCacheEngineKey",
    "MemoryFormat",
    "ServerMetaMessage",
    "ServerReturnCode",
    "is_removal",
    "parse_cache_key",
    "removal",
]
