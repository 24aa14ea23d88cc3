"""The door into a state: a native cache taken as a `KVState` that borrows its arrays."""

import functools
from collections.abc import Collection, Mapping, Sequence

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.arrays.roles import KEEP, SNAPSHOT, TOKENS, WINDOW, Hint, axis_names
from agnostic_cache.errors import LengthMismatchError, StructureMismatchError, UnknownValueError
from agnostic_cache.state.kv_state import KVState, Ownership
from agnostic_cache.state.layout import KVLayout, known_layout
from agnostic_cache.state.length import check_room, read_length
from agnostic_cache.state.rows import Rows
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
    rows, length = _read(native, adapter, length, layout)
    length = read_length(rows.leaves, rows.adapter, length)
    return KVState(rows._replace(length=length), Ownership.BORROWED)


def adopt(
    native: object,
    *,
    adapter: Adapter | str | None = None,
    length: int | None = None,
    layout: KVLayout | None = None,
) -> KVState:
    """Do what `wrap` does, but read counters from the device only when `KVState.length` is first asked for."""
    rows, length = _read(native, adapter, length, layout)
    return KVState(rows, Ownership.BORROWED, is_read=length is not None)


def _read(
    native: object, adapter: Adapter | str | None, length: int | None, layout: KVLayout | None
) -> tuple[Rows, int | None]:
    """Take a value apart; return its rows, and the length that it states, or None where a counter is to be read."""
    flat = flatten(native, adapter_named(adapter) if isinstance(adapter, str) else adapter)
    if not flat.arrays:
        msg = f"{type(native).__qualname__} holds no array; store a state that has been computed"
        raise UnknownValueError(msg)
    if layout is None and len(flat.hints) < len(flat.arrays):
        layout = known_layout(flat.adapter, list(flat.arrays))
    shapes = flat.adapter.shapes(list(flat.arrays.values()))
    leaves, names = _read_leaves(flat, shapes, layout)
    stated = set(flat.lengths) | ({length} if length is not None else set())
    rows: list[tuple[str, int, int]] = []  # of leaves that may have room for more than the state has
    windows: list[tuple[str, int]] = []
    for (name, (_, role, _, frozen, _)), shape in zip(leaves.items(), shapes, strict=True):
        if isinstance(role, WINDOW):
            windows.append((name, shape[role.axis]))
        elif isinstance(role, TOKENS) and frozen and role.stride == 1:  # exactly the rows that count
            stated.add(shape[role.axis])
        elif isinstance(role, TOKENS):
            rows.append((name, shape[role.axis], role.stride))
    if len(stated) > 1:
        msg = f"{type(native).__qualname__} states lengths {sorted(stated)}; pass the state whole, and its own length"
        raise LengthMismatchError(msg)
    length = next(iter(stated), None)
    if length is None and windows:
        length = read_length(leaves, flat.adapter, None)
    for name, count in windows:  # these are the last rows, or the first where there is room for more
        leaves[name] = leaves[name]._replace(first=max((length or 0) - count, 0))
    if length is not None:
        check_room(rows, length)
    elif all(leaf.role in {SNAPSHOT, KEEP} for leaf in leaves.values()):
        length = 0
    keeps = {name for name, leaf in leaves.items() if leaf.role is KEEP}
    node = flat.node if layout is None and not keeps else _rename(flat.node, names, keeps)
    return Rows(leaves, node, flat.adapter, length or 0, layout=layout), length


def _read_leaves(
    flat: Flat, shapes: Sequence[tuple[int, ...]], layout: KVLayout | None
) -> tuple[dict[str, Leaf], dict[str, str]]:
    """The leaves by canonical name, and that name by path."""
    leaves: dict[str, Leaf] = {}
    names: dict[str, str] = {}
    for (path, array), shape in zip(flat.arrays.items(), shapes, strict=True):
        name, hint = path, flat.hints.get(path)
        if hint is None:
            name, hint = layout.describe(path, len(shape)) if layout is not None else (path, _unknown(len(shape)))
        if name in leaves:
            msg = f"the layout maps two leaves to {name!r}; give each a name of its own"
            raise StructureMismatchError(msg)
        names[path] = name
        leaves[name] = Leaf(array, *hint)
    return leaves, names


@functools.cache
def _unknown(ndim: int) -> Hint:
    return Hint(SNAPSHOT, axis_names(ndim))


def _rename(node: Node, names: Mapping[str, str], keeps: Collection[str]) -> Node:
    if node.kind == "leaf":
        name = names.get(node.data, node.data)  # a container may have room for it only
        return node._replace(kind="keep" if name in keeps else "leaf", data=name)
    return node._replace(children=tuple(_rename(child, names, keeps) for child in node.children))
