"""Writing a state into a template that the caller gave up: fixed buffers, a fresh cache, another framework's tree.

Leaves are paired by canonical name and axes by axis name, never by position. A stacked template leaf ``layers.*.key``
takes its layers from ``layers.0.key`` on, and the reverse.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.state.adapter import Adapter, Array, Fill
from agnostic_cache.state.leaf import Leaf
from agnostic_cache.state.registry import adapter_for
from agnostic_cache.state.roles import LENGTH, SNAPSHOT, TOKENS, WINDOW, Hint
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


def fill_template(state: "KVState", like: object, layout: "KVLayout | None") -> Any:
    """Write `state` into `like`; see `KVState.unwrap`."""
    target = adapter_for(like)
    if target.framework != state.framework:
        state = state.to(target.framework)
    adapter = target
    like = adapter.prepare_like(like, state.length, _layers(state))
    flat = flatten(like, adapter)
    if layout is None and len(flat.hints) < len(flat.arrays):
        layout = adapter.known_layout(list(flat.arrays)) or state.layout
    if layout is not None and layout.rotary and state.rotary and layout.rotary != state.rotary:
        msg = f"the state's keys are rotated {state.rotary!r}, the template expects {layout.rotary!r}; recompute them"
        raise StructureMismatchError(msg)
    slots = _slots(flat, layout, adapter)
    given_up = {id(slot.array) for slot in slots.values()}
    arrays: dict[str, Array] = {}
    fills: list[tuple[str, Fill]] = []
    counters: dict[str, Array] = {}
    taken: set[str] = set()
    vacant = _vacant(state._node) - state.leaves.keys() - state.missing
    for name, slot in slots.items():
        if slot.hint is not None and slot.hint.role is LENGTH:
            if slot.array is not None:
                counters[slot.path] = slot.array
            continue
        if slot.array is None and name in vacant:
            continue
        for source_name, leaf, target_layer, source_layer in _sources(name, slot, state.leaves, adapter):
            taken.add(source_name)
            if slot.array is None:
                arrays[slot.path] = _given(state, leaf, slot, adapter, source_layer)
                continue
            fill = _fill(name, leaf, slot, adapter, state.length, target_layer, source_layer)
            if id(leaf.array) in given_up:  # it would be written, or deleted, before it is read
                fill = fill._replace(source=adapter.copy_all([leaf.array])[0])
            fills.append((slot.path, fill))
    left = {name for name, leaf in state.leaves.items() if leaf.role is not LENGTH} - taken
    if left:
        msg = f"the template has no leaf for {sorted(left)[:4]} of the state; pass a layout whose names= map it"
        raise StructureMismatchError(msg)
    # Several fills of one buffer (stacked layers) follow one another; the last handle counts.
    done = adapter.fill_all([fill for _, fill in fills])
    arrays.update({path: array for (path, _), array in zip(fills, done, strict=True)})
    arrays.update({path: adapter.set_counter(counter, state.length) for path, counter in counters.items()})
    return build(flat.node, arrays, state.length, adapter)


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


def _fill(
    name: str,
    leaf: Leaf,
    slot: _Slot,
    adapter: Adapter,
    length: int,
    target_layer: int | None,
    source_layer: int | None,
) -> Fill:
    spec, held = adapter.describe(slot.array), adapter.describe(leaf.array)
    axes = slot.hint.axes if slot.hint is not None and len(slot.hint.axes) == len(spec.shape) else leaf.axes
    if slot.hint is not None and slot.hint.role is SNAPSHOT and leaf.role is not SNAPSHOT:
        axes = leaf.axes  # a layout that says nothing of this leaf
    drop_target = axes.index("layers") if target_layer is not None else None
    drop_source = leaf.axes.index("layers") if source_layer is not None else None
    left = [axis for i, axis in enumerate(axes) if i != drop_target]
    right = [axis for i, axis in enumerate(leaf.axes) if i != drop_source]
    if spec.dtype != held.dtype or sorted(left) != sorted(right) or len(axes) != len(spec.shape):
        msg = (
            f"leaf {name!r} is {held.dtype} {dict(zip(leaf.axes, held.shape, strict=True))} in the state and "
            f"{spec.dtype} {spec.shape} with axes {axes} in the template; "
            "make the template with the state's dtype and axes"
        )
        raise StructureMismatchError(msg)
    tokens = _token_axis(leaf)
    index: list[int | slice] = [slice(None)] * len(axes)
    source_index: list[int | slice] = [slice(None)] * len(leaf.axes)
    if drop_target is not None and target_layer is not None:
        index[drop_target] = target_layer
    if drop_source is not None and source_layer is not None:
        source_index[drop_source] = source_layer
    for i, axis in enumerate(axes):
        if i == drop_target:
            continue
        at = leaf.axes.index(axis)
        if axis == tokens:
            source_index[at], index[i] = _span(name, leaf, slot, held.shape[at], spec.shape[i], length)
        elif spec.shape[i] != held.shape[at]:
            msg = (
                f"leaf {name!r} has {axis}={held.shape[at]} in the state and {spec.shape[i]} in the template; make "
                "a template of the state's shape"
            )
            raise StructureMismatchError(msg)
    order = tuple(right.index(axis) for axis in left)
    return Fill(slot.array, tuple(index), leaf.array, tuple(source_index), order)


def _token_axis(leaf: Leaf) -> str | None:
    return leaf.axes[leaf.role.axis] if isinstance(leaf.role, TOKENS | WINDOW) else None


def _span(name: str, leaf: Leaf, slot: _Slot, rows: int, room: int | None, length: int) -> tuple[slice, slice]:
    """Which rows of a leaf go to which rows of a slot, which has room for any number where `room` is None.

    Where a slot is a window, its rows stand for the last tokens, or for the first where it has room for all of them.

    Raises:
        StructureMismatchError: The slot needs rows that the leaf has no more, has no room for them, or its rows stand
            for another number of tokens.
    """
    role = slot.hint.role if slot.hint is not None and isinstance(slot.hint.role, TOKENS | WINDOW) else leaf.role
    if isinstance(leaf.role, TOKENS):
        first, end, stride = 0, length // leaf.role.stride, leaf.role.stride
    else:
        first, end, stride = leaf.first, min(leaf.first + rows, length), 1
    if isinstance(role, WINDOW):
        needed = max(0, end - role.width)
        begin = needed if room is None else max(0, end - room)
        fits = stride == 1
    else:
        needed = begin = 0
        fits = isinstance(role, TOKENS) and role.stride == stride and (room is None or room >= end)
    low = max(first, begin)
    if not fits or low > needed:
        msg = (
            f"leaf {name!r} is {leaf.role} with rows [{first}, {end}) in the state, and {role} with room for "
            f"{'any' if room is None else room} in the template; make a template of the same role and longer "
            "buffers, or cut the state"
        )
        raise StructureMismatchError(msg)
    return slice(low - first, end - first), slice(low - begin, end - begin)


def _given(state: "KVState", leaf: Leaf, slot: _Slot, adapter: Adapter, layer: int | None) -> Array:
    """An array for a container that has room for one: shared where it never writes in place, else a copy."""
    held = [axis for axis in leaf.axes if layer is None or axis != "layers"]
    # A snapshot is taken as it is: a container that has none yet cannot say of what shape it will be.
    axes = slot.hint.axes if slot.hint is not None and slot.hint.axes else tuple(held)
    if sorted(axes) != sorted(held):
        msg = (
            f"leaf {slot.path!r} has axes {leaf.axes} in the state, its container wants {axes}; name the axes in "
            "the layout"
        )
        raise StructureMismatchError(msg)
    index: list[int | slice] = [slice(None)] * len(leaf.axes)
    if isinstance(leaf.role, TOKENS | WINDOW):
        rows = adapter.describe(leaf.array).shape[leaf.role.axis]
        index[leaf.role.axis] = _span(slot.path, leaf, slot, rows, None, state.length)[0]
    if layer is not None:
        index[leaf.axes.index("layers")] = layer
    order = tuple(held.index(axis) for axis in axes)
    view = adapter.view(leaf.array, tuple(index), order)
    if state.shareable(leaf) and slot.hint is not None and slot.hint.frozen:
        state.share()
        return view
    return adapter.copy_all([view])[0]
