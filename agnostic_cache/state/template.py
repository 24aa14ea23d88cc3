"""Writing a state into a template that the caller gave up: fixed buffers, a fresh cache, another framework's tree.

Leaves are paired by canonical name and axes by axis name, never by position. A stacked template leaf ``layers.*.key``
takes its layers from ``layers.0.key`` on, and the reverse. The state may come in adjacent parts, which then need not be
joined first: each part's rows go where they belong.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.state.adapter import Adapter, Array, Fill
from agnostic_cache.state.leaf import Leaf
from agnostic_cache.state.registry import adapter_for
from agnostic_cache.state.roles import LENGTH, SNAPSHOT, TOKENS, WINDOW, Hint, Role
from agnostic_cache.state.tree import Flat, Node, build, flatten

if TYPE_CHECKING:
    from agnostic_cache.state.kv_state import KVState
    from agnostic_cache.state.layout import KVLayout

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class _Slot(NamedTuple):
    """One leaf of the template: where it stands, and what is known of it."""

    path: str
    array: Array | None
    hint: Hint | None


class _Piece(NamedTuple):
    """What one part of a state has for one slot.

    Attributes:
        name: Name of the leaf in the part.
        leaf: The leaf.
        target_layer: Layer of a stacked slot, or None.
        source_layer: Layer of a stacked leaf, or None.
        begin: Token of the state that the part begins with.
        length: Tokens of the part.
        owner: The part.
    """

    name: str
    leaf: Leaf
    target_layer: int | None
    source_layer: int | None
    begin: int
    length: int
    owner: "KVState"


def fill_template(parts: Sequence["KVState"], like: object, layout: "KVLayout | None") -> Any:
    """Write the adjacent `parts` of a state into `like`; see `KVState.unwrap`."""
    adapter = adapter_for(like)
    parts = [part if part.framework == adapter.framework else part.to(adapter.framework) for part in parts]
    last, length = parts[-1], sum(part.length for part in parts)
    like = adapter.prepare_like(like, length, _layers(last))
    flat = flatten(like, adapter)
    if layout is None and len(flat.hints) < len(flat.arrays):
        layout = adapter.known_layout(list(flat.arrays)) or last.layout
    for part in parts:
        if layout is not None and layout.rotary and part.rotary and layout.rotary != part.rotary:
            msg = (
                f"the state's keys are rotated {part.rotary!r}, the template expects {layout.rotary!r}; recompute them"
            )
            raise StructureMismatchError(msg)
    slots = _slots(flat, layout, adapter)
    given_up = {id(slot.array) for slot in slots.values()}
    arrays: dict[str, Array] = {}
    fills: list[tuple[str, Fill]] = []
    counters: dict[str, Array] = {}
    taken: set[str] = set()
    vacant = _vacant(last._node) - last.leaves.keys() - last.missing
    for name, slot in slots.items():
        if slot.hint is not None and slot.hint.role is LENGTH:
            if slot.array is not None:
                counters[slot.path] = slot.array
            continue
        if slot.array is None and name in vacant:
            continue
        pieces = _pieces(name, slot, parts, adapter)
        taken.update(piece.name for piece in pieces)
        if slot.array is None:
            arrays[slot.path] = _given(pieces, slot, adapter, length)
            continue
        for fill in _fills(name, slot, pieces, adapter, length):
            if id(fill.source) in given_up:  # it would be written, or deleted, before it is read
                fill = fill._replace(source=adapter.copy_all([fill.source])[0])  # noqa: PLW2901
            fills.append((slot.path, fill))
    left = {name for part in parts for name, leaf in part.leaves.items() if leaf.role is not LENGTH} - taken
    if left:
        msg = f"the template has no leaf for {sorted(left)[:4]} of the state; pass a layout whose names= map it"
        raise StructureMismatchError(msg)
    # Several fills of one buffer (stacked layers, parts) follow one another; the last handle counts.
    done = adapter.fill_all([fill for _, fill in fills])
    arrays.update({path: array for (path, _), array in zip(fills, done, strict=True)})
    arrays.update({path: adapter.set_counter(counter, length) for path, counter in counters.items()})
    return build(flat.node, arrays, length, adapter)


def _vacant(node: Node) -> set[str]:
    """Names of all leaves of a structure, also of those that are not filled yet."""
    return {node.data} if node.kind == "leaf" else set().union(*map(_vacant, node.children))


def _layers(state: "KVState") -> int:
    """How many layers a state has, by name or stacked."""
    named = {int(found[1]) for name in state.leaves if (found := _LAYER.search(name))}
    stacked = [
        state.adapter.describe(leaf.array).shape[leaf.axes.index("layers")]
        for leaf in state.leaves.values()
        if "layers" in leaf.axes
    ]
    return max([len(named), *stacked])


def _slots(flat: Flat, layout: "KVLayout | None", adapter: Adapter) -> dict[str, _Slot]:
    # A frozen array is not a buffer: others may share it, and its container takes a new one.
    vacant = [*flat.vacant, *(path for path, hint in flat.hints.items() if hint.frozen and path in flat.arrays)]
    slots: dict[str, _Slot] = {path: _Slot(path, None, flat.hints[path]) for path in vacant}
    seen: set[int] = set()
    for path, array in flat.arrays.items():
        if path in slots:
            continue
        if id(array) in seen:  # one buffer cannot hold two leaves
            array = adapter.copy_all([array])[0]  # noqa: PLW2901
        seen.add(id(array))
        hint = flat.hints.get(path)
        name = path
        if hint is None and layout is not None:
            name, hint = layout.describe(path, len(adapter.describe(array).shape))
        if name in slots:
            msg = f"the layout maps two leaves of the template to {name!r}; give each a name of its own"
            raise StructureMismatchError(msg)
        slots[name] = _Slot(path, array, hint)
    return slots


def _pieces(name: str, slot: _Slot, parts: Sequence["KVState"], adapter: Adapter) -> list[_Piece]:
    """What each part has for a slot; of a snapshot, only what the last part has."""
    found: list[_Piece] = []
    begin = 0
    for part in parts:
        if not (part is not parts[-1] and part.missing and name in part.missing):
            found += [
                _Piece(*source, begin, part.length, part) for source in _sources(name, slot, part.leaves, adapter)
            ]
        begin += part.length
    return [piece for piece in found if piece.owner is parts[-1] or piece.leaf.role is not SNAPSHOT]


def _sources(
    name: str, slot: _Slot, leaves: Mapping[str, Leaf], adapter: Adapter
) -> list[tuple[str, Leaf, int | None, int | None]]:
    """The state's leaves for one slot: ``(name, leaf, layer of the target, layer of the source)``."""
    if name in leaves:
        return [(name, leaves[name], None, None)]
    if slot.array is not None and slot.hint is not None and "layers" in slot.hint.axes:
        count = adapter.describe(slot.array).shape[slot.hint.axes.index("layers")]
        names = [name.replace("*", str(i)) for i in range(count)]
        absent = [wanted for wanted in names if wanted not in leaves]
        if not absent:
            return [(wanted, leaves[wanted], i, None) for i, wanted in enumerate(names)]
    stacked = re.sub(r"(^|\.)layers\.\d+\.", r"\1layers.*.", name)
    found = _LAYER.search(name)
    if found and stacked in leaves and "layers" in leaves[stacked].axes:
        return [(stacked, leaves[stacked], None, int(found[1]))]
    msg = (
        f"the state has no leaf for {name!r} of the template (it has {sorted(leaves)[:4]} ...); pass a layout whose "
        "names= map it"
    )
    raise StructureMismatchError(msg)


def _fills(name: str, slot: _Slot, pieces: Sequence[_Piece], adapter: Adapter, length: int) -> list[Fill]:
    """The writes that bring all pieces into the buffer of a slot."""
    fills = []
    for layer in {piece.target_layer: None for piece in pieces}:  # in order
        of_layer = [piece for piece in pieces if piece.target_layer == layer]
        shapes = [_checked(name, piece, slot, adapter) for piece in of_layer]
        spans = _spans(name, of_layer, slot, [rows for _, rows, _ in shapes], shapes[0][2], length)
        for piece, (axes, _, _), span in zip(of_layer, shapes, spans, strict=True):
            if span is not None:
                fills.append(_fill(piece, slot.array, axes, span))
    return fills


def _checked(name: str, piece: _Piece, slot: _Slot, adapter: Adapter) -> tuple[tuple[str, ...], int, int]:
    """Axes of the slot, and the rows that the piece has and the slot has room for; raises where they do not fit."""
    leaf = piece.leaf
    spec, held = adapter.describe(slot.array), adapter.describe(leaf.array)
    axes = slot.hint.axes if slot.hint is not None and len(slot.hint.axes) == len(spec.shape) else leaf.axes
    if slot.hint is not None and slot.hint.role is SNAPSHOT and leaf.role is not SNAPSHOT:
        axes = leaf.axes  # a layout that says nothing of this leaf
    left = [axis for axis in axes if piece.target_layer is None or axis != "layers"]
    right = [axis for axis in leaf.axes if piece.source_layer is None or axis != "layers"]
    if spec.dtype != held.dtype or sorted(left) != sorted(right) or len(axes) != len(spec.shape):
        msg = (
            f"leaf {name!r} is {held.dtype} {dict(zip(leaf.axes, held.shape, strict=True))} in the state and "
            f"{spec.dtype} {spec.shape} with axes {axes} in the template; "
            "make the template with the state's dtype and axes"
        )
        raise StructureMismatchError(msg)
    tokens = _token_axis(leaf)
    rows = room = 0
    for axis in left:
        has, gets = held.shape[leaf.axes.index(axis)], spec.shape[axes.index(axis)]
        if axis == tokens:
            rows, room = has, gets
        elif gets != has:
            msg = (
                f"leaf {name!r} has {axis}={has} in the state and {gets} in the template; make a template of the "
                "state's shape"
            )
            raise StructureMismatchError(msg)
    return axes, rows, room


def _fill(piece: _Piece, target: Array, axes: tuple[str, ...], span: tuple[slice, slice]) -> Fill:
    leaf = piece.leaf
    index: list[int | slice] = [slice(None)] * len(axes)
    source_index: list[int | slice] = [slice(None)] * len(leaf.axes)
    if piece.target_layer is not None:
        index[axes.index("layers")] = piece.target_layer
    if piece.source_layer is not None:
        source_index[leaf.axes.index("layers")] = piece.source_layer
    tokens = _token_axis(leaf)
    if tokens is not None:
        source_index[leaf.axes.index(tokens)], index[axes.index(tokens)] = span
    right = [axis for axis in leaf.axes if piece.source_layer is None or axis != "layers"]
    order = tuple(right.index(axis) for axis in axes if piece.target_layer is None or axis != "layers")
    return Fill(target, tuple(index), leaf.array, tuple(source_index), order)


def _token_axis(leaf: Leaf) -> str | None:
    return leaf.axes[leaf.role.axis] if isinstance(leaf.role, TOKENS | WINDOW) else None


def _spans(
    name: str, pieces: Sequence[_Piece], slot: _Slot, rows: Sequence[int], room: int | None, length: int
) -> list[tuple[slice, slice] | None]:
    """Which rows of each piece go to which rows of a slot, which has room for any number where `room` is None.

    Where a slot is a window, its rows stand for the last tokens, or for the first where it has room for all of them.

    Raises:
        StructureMismatchError: The slot needs rows that the pieces have no more, has no room for them, or its rows
            stand for another number of tokens.
    """
    leaf = pieces[-1].leaf
    if _token_axis(leaf) is None:
        return [(slice(None), slice(None)) for _ in pieces]
    role = slot.hint.role if slot.hint is not None and isinstance(slot.hint.role, TOKENS | WINDOW) else leaf.role
    stride = leaf.role.stride if isinstance(leaf.role, TOKENS) else 1
    held = [
        (piece.begin, piece.length, None if type(piece.leaf.role) is TOKENS else piece.leaf.first, count)
        for piece, count in zip(pieces, rows, strict=True)
    ]
    spans, start, reach = _placed(tuple(held), role, stride, room, length)
    if spans is None:
        msg = (
            f"leaf {name!r} is {leaf.role} with rows [{start}, {reach}) in the state, and {role} with room for "
            f"{'any' if room is None else room} in the template; make a template of the same role and longer "
            "buffers, or cut the state"
        )
        raise StructureMismatchError(msg)
    return spans


@functools.lru_cache(maxsize=64)  # the layers of a model ask the same, one after another
def _placed(
    held: tuple[tuple[int, int, int | None, int], ...], role: Role, stride: int, room: int | None, length: int
) -> tuple[list[tuple[slice, slice] | None] | None, int, int]:
    """Return a span per piece, or None where they do not fit, and which rows are there without a gap.

    A piece is given by the token that it begins with, its tokens, for a window its first row, and its rows.
    """
    end = length // stride
    if isinstance(role, WINDOW):
        needed = max(0, end - role.width)
        begin = needed if room is None else max(0, end - room)
        fits = stride == 1
    else:
        needed = begin = 0
        fits = isinstance(role, TOKENS) and role.stride == stride and (room is None or room >= end)
    spans: list[tuple[slice, slice] | None] = []
    start = reach = 0  # holds: rows [start, reach) are there without a gap
    for i, (token, tokens, window, count) in enumerate(held):
        first = token // stride if window is None else token + window
        stop = first + tokens // stride if window is None else min(first + count, token + tokens)
        if first > reach:
            start = first
        reach = max(first, stop)
        low = max(first, begin)
        if low < stop:
            spans.append((slice(low - first, stop - first), slice(low - begin, stop - begin)))
        elif i == len(held) - 1 and not any(spans):  # a state of no tokens still uses its buffers up
            spans.append((slice(0, 0), slice(0, 0)))
        else:
            spans.append(None)
    return (spans if fits and max(start, begin) <= needed and reach >= end else None), start, reach


def _given(pieces: Sequence[_Piece], slot: _Slot, adapter: Adapter, length: int) -> Array:
    """An array for a container that has room for one: shared where it never writes in place, else a copy."""
    arrays = [piece.leaf.array for piece in pieces]
    shapes = adapter.check_all(arrays)
    rows = [
        shape[piece.leaf.role.axis] if isinstance(piece.leaf.role, TOKENS | WINDOW) else 0
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
    frozen = slot.hint is not None and slot.hint.frozen
    views: list[Array] = []
    axis: int | None = None
    spans = _spans(slot.path, pieces, slot, rows, None, length)
    for piece, array, count, span in zip(pieces, arrays, rows, spans, strict=True):
        if span is None:
            continue
        leaf, layer = piece.leaf, piece.source_layer
        held = leaf.axes if layer is None else tuple(axis for axis in leaf.axes if axis != "layers")
        # A snapshot is taken as it is: a container that has none yet cannot say of what shape it will be.
        axes = slot.hint.axes if slot.hint is not None and slot.hint.axes else held
        if axes != held and sorted(axes) != sorted(held):
            msg = (
                f"leaf {slot.path!r} has axes {leaf.axes} in the state, its container wants {axes}; name the axes in "
                "the layout"
            )
            raise StructureMismatchError(msg)
        frozen = frozen and piece.owner.shareable(leaf)
        token_axis = leaf.role.axis if isinstance(leaf.role, TOKENS | WINDOW) else None
        if token_axis is not None:
            axis = axes.index(leaf.axes[token_axis])
        if axes == leaf.axes and (token_axis is None or span[0] == slice(0, count)):
            views.append(array)  # as it is
            continue
        index: list[int | slice] = [slice(None)] * len(leaf.axes)
        if token_axis is not None:
            index[token_axis] = span[0]
        if layer is not None:
            index[leaf.axes.index("layers")] = layer
        views.append(adapter.view(array, tuple(index), tuple(held.index(axis) for axis in axes)))
    if frozen:
        for piece in pieces:
            piece.owner.share()
        return views[0] if axis is None or len(views) == 1 else adapter.hold_together(views, axis)
    return adapter.copy_all(views)[0] if axis is None else adapter.concat_all([(views, axis)])[0]
