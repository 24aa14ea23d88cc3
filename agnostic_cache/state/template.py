"""Writing a state into a template that the caller gave up: fixed buffers, a fresh cache, another framework's tree.

Leaves are paired by canonical name and axes by axis name, never by position. A stacked template leaf ``layers.*.key``
takes its layers from ``layers.0.key`` on, and the reverse. The state may come in adjacent parts, which then need not be
joined first: each part's rows go where they belong.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from agnostic_cache.arrays.adapter import Adapter, Array, Fill
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_for
from agnostic_cache.arrays.roles import LENGTH, SNAPSHOT, TOKENS, WINDOW, Hint, Role
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.state.placing import Held, extent_of, find_moves, find_spans
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

    @property
    def role(self) -> Role | None:
        return None if self.hint is None else self.hint.role


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


class _Part(NamedTuple):
    """One of the adjacent parts of a state: its leaves, the token that it begins with, and its tokens."""

    owner: "KVState"
    leaves: Mapping[str, Leaf]
    begin: int
    length: int


def fill_template(parts: Sequence["KVState"], like: object, layout: "KVLayout | None") -> Any:
    """Write the adjacent `parts` of a state into `like`; see `KVState.unwrap`."""
    adapter = adapter_for(like)
    parts = [part if part.framework == adapter.framework else part.to(adapter.framework) for part in parts]
    last, lengths = parts[-1], [part.length for part in parts]
    length = sum(lengths)
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
    placed = [
        _Part(part, part.leaves, end - count, count)
        for part, count, end in zip(parts, lengths, accumulate(lengths), strict=True)
    ]
    slots = _slots(flat, layout, adapter)
    given_up = {id(slot.array) for slot in slots.values()}
    arrays: dict[str, Array] = {}
    fills: list[tuple[str, Fill]] = []
    counters: dict[str, Array] = {}
    taken: set[str] = set()
    any_vacant = any(slot.array is None for slot in slots.values())
    vacant = _vacant(last._node) - last.leaves.keys() - last.missing if any_vacant else ()
    for name, slot in slots.items():
        if slot.role is LENGTH:
            if slot.array is not None:
                counters[slot.path] = slot.array
            continue
        if slot.array is None and name in vacant:
            continue
        rows = _shared_rows(name, slot, parts, adapter)
        if rows is not None:
            arrays[slot.path] = rows
            taken.add(name)
            continue
        pieces = _pieces(name, slot, placed, adapter)
        taken.update(piece.name for piece in pieces)
        if slot.array is None:
            arrays[slot.path] = _given(pieces, slot, adapter, length)
            continue
        for fill in _fills(name, slot, pieces, adapter, length):
            if id(fill.source) in given_up:  # it would be written, or deleted, before it is read
                fill = fill._replace(source=adapter.copy_all([fill.source])[0])  # noqa: PLW2901
            fills.append((slot.path, fill))
    left = {name for part in placed for name in part.leaves.keys() - taken if part.leaves[name].role is not LENGTH}
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


def _shared_rows(name: str, slot: _Slot, parts: Sequence["KVState"], adapter: Adapter) -> Array | None:
    """What `_given` comes to where a container grows and every part has plain rows: found in a fifth of its time.

    Returns:
        The parts' rows as they are, or None where there is more to look at.
    """
    hint = slot.hint
    if slot.array is not None or hint is None or not hint.frozen or type(hint.role) is not TOKENS:
        return None
    leaves = [part._leaves.get(name) for part in parts]
    if any(leaf is None or leaf[1:4] != hint for leaf in leaves):  # role, axes, frozen
        return None
    axis, stride = hint.role.axis, hint.role.stride
    arrays: list[Array] = [leaf.array for leaf in leaves if leaf is not None]
    for i, (part, shape) in enumerate(zip(parts, adapter.check_all(arrays), strict=True)):
        rows, rest = divmod(part.length, stride)
        if rest or shape[axis] < rows:
            return None
        if shape[axis] > rows:  # the last block, up to where two prompts part
            index = [slice(None)] * len(shape)
            index[axis] = slice(0, rows)
            arrays[i] = adapter.view(arrays[i], tuple(index), tuple(range(len(shape))))
    for part in parts:
        part.share()
    return arrays[0] if len(arrays) == 1 else adapter.hold_together(arrays, axis)


def _pieces(name: str, slot: _Slot, parts: Sequence[_Part], adapter: Adapter) -> list[_Piece]:
    """What each part has for a slot; of a snapshot, only what the last part has."""
    last = parts[-1]
    found: list[_Piece] = []
    for part in parts:
        owner, leaves, begin, length = part
        if part is not last and name in owner.missing:
            continue
        for wanted, leaf, target_layer, source_layer in _sources(name, slot, leaves, adapter):
            if part is last or leaf.role is not SNAPSHOT:
                found.append(_Piece(wanted, leaf, target_layer, source_layer, begin, length, owner))
    return found


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
    spec = adapter.describe(slot.array)
    fills = []
    for layer in {piece.target_layer: None for piece in pieces}:  # in order
        of_layer = [piece for piece in pieces if piece.target_layer == layer]
        held = tuple(map(_held, of_layer))
        try:
            moves = find_moves(held, spec, slot.hint, layer, length)
        except StructureMismatchError as error:
            raise _named(name, error) from None
        for piece, move in zip(of_layer, moves, strict=True):
            if move is not None:
                at, source_at, order = move
                fills.append(Fill(slot.array, at, piece.leaf.array, source_at, order))
    return fills


def _held(piece: _Piece) -> Held:
    name, (_, role, axes, _, first), _, layer, begin, length, owner = piece
    return Held(owner.spec(name), role, axes, first, layer, begin, length)


def _named(name: str, error: StructureMismatchError) -> StructureMismatchError:
    return StructureMismatchError(f"leaf {name!r} {error}")


def _given(pieces: Sequence[_Piece], slot: _Slot, adapter: Adapter, length: int) -> Array:
    """An array for a container that has room for one: shared where it never writes in place, else a copy."""
    arrays = [piece.leaf.array for piece in pieces]
    shapes = adapter.check_all(arrays)
    rows = [
        shape[piece.leaf.role.axis] if isinstance(piece.leaf.role, TOKENS | WINDOW) else 0
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
    extents = [
        extent_of(piece.leaf.role, piece.leaf.first, piece.begin, piece.length, count)
        for piece, count in zip(pieces, rows, strict=True)
    ]
    try:
        spans = find_spans(tuple(extents), pieces[-1].leaf.role, slot.role, None, length)
    except StructureMismatchError as error:
        raise _named(slot.path, error) from None
    frozen = slot.hint is not None and slot.hint.frozen
    views: list[Array] = []
    axis: int | None = None
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
