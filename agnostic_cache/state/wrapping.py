"""The door into a state: a native cache taken as a `KVState` that borrows its arrays."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, WINDOW, Hint, axis_names
from agnostic_cache.errors import LengthMismatchError, StructureMismatchError, UnknownValueError
from agnostic_cache.state.kv_state import KVState, Ownership, check_room, read_length
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.tree import Flat, Node, flatten


def wrap(
    native: object,
    *,
    adapter: Adapter | str | None = None,
    length: int | None = None,
    layout: KVLayout | None = None,
) -> KVState:
    """Take a native cache as a `KVState` that borrows its arrays. Copies nothing.

    Args:
        native: Any nesting of dict, list, tuple, NamedTuple and dataclass around arrays and containers of one
            framework.
        adapter: Adapter, or name of one; by default that of the first array or opaque container.
        length: Tokens that it stands for; by default what its containers, counters or token axes say.
        layout: Roles and names of its leaves; by default those that its structure is known by, else every leaf is
            `SNAPSHOT`.

    Raises:
        UnknownValueError: Something in it is nothing that the adapter knows, or it holds no array.
        MixedFrameworksError: It holds arrays of several frameworks.
        UnsupportedArrayError: A tensor requires grad, or is sparse, meta or conjugated.
        DeletedArrayError: An array was deleted or donated.
        LengthMismatchError: `length` disagrees with its leaves, or they with one another.
    """
    state = adopt(native, adapter=adapter, length=length, layout=layout)
    if state._length is None:
        state._length = read_length(state._leaves, state._adapter, None)
    else:
        read_length(state._leaves, state._adapter, state._length)
    return state


def adopt(
    native: object,
    *,
    adapter: Adapter | str | None = None,
    length: int | None = None,
    layout: KVLayout | None = None,
) -> KVState:
    """Do what `wrap` does, but read counters from the device only when `KVState.length` is first asked for."""
    chosen = adapter_named(adapter) if isinstance(adapter, str) else adapter
    flat = flatten(native, chosen)
    if not flat.arrays:
        msg = f"{type(native).__qualname__} holds no array; store a state that has been computed"
        raise UnknownValueError(msg)
    chosen = flat.adapter
    if layout is None and len(flat.hints) < len(flat.arrays):
        layout = chosen.known_layout(list(flat.arrays))
    known = _read_leaves(flat, layout)
    length = _agreed(known.stated | ({length} if length is not None else set()), type(native).__qualname__)
    leaves = known.leaves
    if length is None and known.windows:
        length = read_length(leaves, chosen, None)
    for name, count in known.windows:  # these are the last rows, or the first where there is room for more
        leaves[name] = leaves[name]._replace(first=max((length or 0) - count, 0))
    if length is not None:
        check_room(known.rows, length)
    elif all(leaf.role is SNAPSHOT for leaf in leaves.values()):
        length = 0
    node = _rename(flat.node, known.names) if layout is not None else flat.node
    return KVState(leaves, node, chosen, length=length, ownership=Ownership.BORROWED, layout=layout)


class _Known(NamedTuple):
    """What containers and layout say of the leaves of a value.

    Attributes:
        leaves: By canonical name.
        names: Canonical name by path, where a layout gave it.
        rows: Name, rows and stride of each `TOKENS` leaf that may have room for more than the state has.
        windows: Name and rows of each `WINDOW` leaf.
        stated: Every length in tokens that something states.
    """

    leaves: dict[str, Leaf]
    names: dict[str, str]
    rows: list[tuple[str, int, int]]
    windows: list[tuple[str, int]]
    stated: set[int]


def _read_leaves(flat: Flat, layout: KVLayout | None) -> _Known:
    known = _Known({}, {}, [], [], set(flat.lengths))
    leaves, names, rows, windows, stated = known
    shapes = flat.adapter.check_all(list(flat.arrays.values()))
    for (path, array), shape in zip(flat.arrays.items(), shapes, strict=True):
        name, hint = path, flat.hints.get(path)
        if hint is None:
            if layout is None:
                leaves[path] = _leaf((array, *_unknown(len(shape)), 0))
                continue
            name, hint = layout.describe(path, len(shape))
            names[path] = name
        role, axes, frozen = hint
        if type(role) is TOKENS:
            axis, stride = role.axis, role.stride
            if frozen and stride == 1:  # exactly the rows that count
                stated.add(shape[axis] * stride)
            else:
                rows.append((name, shape[axis], stride))
        elif type(role) is WINDOW:
            windows.append((name, shape[role.axis]))
        leaves[name] = _leaf((array, role, axes, frozen, 0))
    if len(leaves) < len(flat.arrays):
        again = next(name for path, name in names.items() if list(names.values()).count(name) > 1 or name in flat.hints)
        msg = f"the layout maps two leaves to {again!r}; give each a name of its own"
        raise StructureMismatchError(msg)
    return known


def _agreed(stated: set[int], kind: str) -> int | None:
    if len(stated) > 1:
        msg = f"{kind} states several lengths in tokens: {sorted(stated)}; pass the state whole, and its own length"
        raise LengthMismatchError(msg)
    return next(iter(stated), None)


_leaf = functools.partial(tuple.__new__, Leaf)  # takes all five fields, at a third of the time of Leaf(...)


@functools.cache
def _unknown(ndim: int) -> Hint:
    return Hint(SNAPSHOT, axis_names(ndim))


def _rename(node: Node, names: Mapping[str, str]) -> Node:
    if node.kind == "leaf":
        return node._replace(data=names.get(node.data, node.data))
    return node._replace(children=tuple(_rename(child, names) for child in node.children))
