"""The two verbs of a JAX decoding loop: resume from the longest known prefix, store what was computed.

They keep to fixed buffers, so that nothing is compiled per length, and to the ownership of a loop that donates: what
`resume` is given is used up, what `store` is given stays the caller's.
"""

from typing import Any

from agnostic_cache.errors import LayoutUnknownError
from agnostic_cache.prefix import PrefixCache
from agnostic_cache.state.layout import TOKENS, KVLayout, known_layout
from agnostic_cache.state.tree import Flat, flatten


def resume(
    cache: PrefixCache, tokens: Any, kv: Any, *, layout: KVLayout | None = None, context: bytes = b""
) -> tuple[Any, int]:
    """Fill the longest known prefix of `tokens` into the buffers `kv`.

    Args:
        cache: Where to look.
        tokens: The prompt.
        kv: Empty buffers, of any pytree. Used up, as by donation: use the returned ones, on a miss too.
        layout: Roles and names of the leaves of `kv`; by default the cache's, or what their names tell.
        context: What else the state depends on; see `PrefixCache.match`.

    Returns:
        The buffers, and how many tokens they stand for: fewer than the prompt has, and than the buffers have room for.

    Raises:
        LayoutUnknownError: No layout, and no names that are known.
        StructureMismatchError: The buffers do not fit what is stored.
    """
    flat = flatten(kv)
    layout = _layout(flat, cache, layout)
    room = _room(flat, layout)
    if room is not None and len(tokens) > room:
        tokens = tokens[:room]
    del flat  # would keep the arrays of a tree whose buffers are donated below
    with cache.match(tokens, context=context) as match:
        start = match.length
        return match.load(like=kv, layout=layout), start


def store(
    cache: PrefixCache,
    tokens: Any,
    kv: Any,
    *,
    length: int | None = None,
    layout: KVLayout | None = None,
    context: bytes = b"",
) -> int:
    """Copy in what the cache lacks of the state `kv` of `tokens`; from here on `kv` may be donated.

    Args:
        cache: Where to store.
        tokens: What `kv` was computed from.
        kv: Buffers, of any pytree. Stay the caller's.
        length: How many tokens to store; by default all of `tokens`, which `kv` then stands for.
        layout: As in `resume`.
        context: As in `resume`.

    Returns:
        How many blocks were copied.

    Raises:
        LayoutUnknownError: No layout, and no names that are known.
        LengthMismatchError: The buffers are shorter, or their counters say another length.
    """
    layout = _layout(flatten(kv), cache, layout)
    return cache.insert(tokens, kv, length=length, layout=layout, context=context)


def _layout(flat: Flat, cache: PrefixCache, layout: KVLayout | None) -> KVLayout | None:
    """The layout to use; None where containers say all that one would."""
    found = layout or cache.layout or known_layout(flat.adapter, list(flat.arrays))
    if found is None and len(flat.hints) < len(flat.arrays):
        shown = ", ".join(list(flat.arrays)[:4])
        msg = f"nobody knows which axis of {shown} holds tokens; pass layout=KVLayout.infer(init_kv), or a KVLayout"
        raise LayoutUnknownError(msg)
    return found


def _room(flat: Flat, layout: KVLayout | None) -> int | None:
    """For how many tokens the buffers have rows; None where they are not bounded."""
    rooms = []
    for name, array in flat.arrays.items():
        hint = flat.hints.get(name)
        shape = flat.adapter.describe(array).shape
        if hint is None and layout is not None:
            _, hint = layout.describe(name, len(shape))
        if hint is not None and isinstance(hint.role, TOKENS) and not hint.frozen:
            rooms.append(shape[hint.role.axis] * hint.role.stride)
    return min(rooms, default=None)
