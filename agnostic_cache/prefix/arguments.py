"""What a `PrefixCache` is made of and given, checked."""

from typing import Any

from agnostic_cache.errors import InvalidNamespaceError, InvalidSizeError, LengthMismatchError
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import wrap


def check_settings(namespace: object, salt: object, block_size: object) -> None:
    """Raise where a cache cannot be made of what it was given; see `PrefixCache`."""
    if not isinstance(namespace, str) or not namespace or not isinstance(salt, bytes):
        msg = (
            f"namespace={namespace!r}, salt of type {type(salt).__qualname__}; pass a name of the weights, such as "
            "model_fingerprint(model), and the salt as bytes"
        )
        raise InvalidNamespaceError(msg)
    if not isinstance(block_size, int) or block_size < 1:
        msg = f"block_size={block_size!r} is no number of tokens; pass a positive int, such as 256"
        raise InvalidSizeError(msg)


def take_state(state: Any, count: int, length: int | None, layout: KVLayout | None) -> tuple[KVState, int]:
    """Return a state of `count` tokens, wrapped, and how many tokens of it to keep.

    Raises:
        LengthMismatchError: It stands for another number of tokens; see `PrefixCache.insert`.
        AgnosticCacheError: It is no state; see `wrap`.
    """
    wanted = count if length is None else length
    if isinstance(state, KVState):
        held = state
    else:
        try:
            held = wrap(state, layout=layout, length=wanted)
        except LengthMismatchError:
            if length is None:
                raise
            held = wrap(state, layout=layout)  # it stands for more
    if not 0 <= wanted <= min(count, held.length) or (length is None and held.length != count):
        msg = (
            f"a state of {held.length} tokens for a prompt of {count}, length={length}; pass the tokens that it "
            "was computed from, or length= where only the first ones are to be kept"
        )
        raise LengthMismatchError(msg)
    return held, wanted
