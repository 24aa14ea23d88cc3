"""Writing a state into a template that the caller gave up: fixed buffers, a fresh cache, another framework's tree.

Leaves are paired by canonical name and axes by axis name, never by position. A stacked template leaf ``layers.*.key``
takes its layers from ``layers.0.key`` on, and the reverse. The state may come in adjacent parts, which then need not be
joined first: each part's rows go where they belong.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

from agnostic_cache.arrays.adapter import Array, Fill
from agnostic_cache.arrays.containers import SupportsTemplates
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import KEEP, LENGTH, SNAPSHOT, TOKENS, WINDOW, Hint, Role
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.state.layout import KVLayout, known_layout
from agnostic_cache.state.rows import Rows, row_axis
from agnostic_cache.state.tree import Flat, Node, build, flatten

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ALL = slice(None)

_Slot = tuple[str, Array | None, Hint | None]
"""Of a leaf of the template: its path, its buffer or None where its container takes any array, what is known of it."""
_Place = tuple[tuple[int | slice, ...], tuple[int | slice, ...], tuple[int, ...]]
"""`at`, `source_at` and `order` of a `Fill`; empty where an array is taken as it is."""
_Places = tuple[list[_Place | tuple[()] | None], int | None]
"""Where each part goes, None where it is of no use, and the axis of the template along which they adjoin."""


class Source(NamedTuple):
    """One of the adjacent parts of a state.

    Attributes:
        rows: Its leaves, of the template's framework.
        lasting: Nobody writes its arrays in place, so that a container that never does may share them.
    """

    rows: Rows
    lasting: bool


def fill_template(sources: Sequence[Source], like: object, layout: KVLayout | None) -> tuple[Any, bool]:
    """Write the state that adjacent `sources` make up into `like`; see `KVState.unwrap`.

    Returns:
        The filled template, and whether it shares arrays with the sources.

    Raises:
        StructureMismatchError: It does not fit; nothing was written.
    """
    last, length = sources[-1].rows, sum(source.rows.length for source in sources)
    adapter = last.adapter
    if isinstance(adapter, SupportsTemplates):
        like = adapter.prepare_like(like, length, _count_layers(last))
    flat = flatten(like, adapter)
    if layout is None and len(flat.hints) < len(flat.arrays):
        layout = known_layout(adapter, list(flat.arrays)) or last.layout
    expected = None if layout is None else layout.rotary
    for found in {source.rows.rotary for source in sources} - {None}:
        if expected not in {None, found}:
            msg = f"the state's keys are rotated {found!r}, the template expects {expected!r}; recompute them"
            raise StructureMismatchError(msg)
    filling = _Filling(sources, flat, _slots(flat, layout))
    for name, slot in filling.slots.items():
        try:
            filling.add(name, *slot)
        except StructureMismatchError as error:
            msg = f"leaf {name!r} {error}"
            raise StructureMismatchError(msg) from None
    return filling.write(), filling.shares


def _slots(flat: Flat, layout: KVLayout | None) -> dict[str, _Slot]:
    adapter = flat.adapter
    # A frozen array is not a buffer: others may share it, and its container takes a new one.
    vacant = [*flat.vacant, *(path for path, hint in flat.hints.items() if hint.frozen and path in flat.arrays)]
    slots: dict[str, _Slot] = {path: (path, None, flat.hints[path]) for path in vacant}
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
        slots[name] = (path, array, hint)
    return slots


def _leaf_names(node: Node) -> set[str]:
    """Names of all leaves of a structure, also of those that are not filled yet."""
    return {node.data} if node.kind == "leaf" else set().union(*map(_leaf_names, node.children))


def _count_layers(rows: Rows) -> int:
    """How many layers there are, by name or stacked."""
    named = {int(found[1]) for name in rows.leaves if (found := _LAYER.search(name))}
    stacked = [
        rows.adapter.describe(leaf.array).shape[leaf.axes.index("layers")]
        for leaf in rows.leaves.values()
        if "layers" in leaf.axes
    ]
    return max([len(named), *stacked])


class _Filling:
    """What is to be written where, until all of it is known to fit."""

    def __init__(self, sources: Sequence[Source], flat: Flat, slots: dict[str, _Slot]) -> None:
        self.sources, self.flat, self.adapter, self.slots = sources, flat, flat.adapter, slots
        ends = accumulate(source.rows.length for source in sources)
        self.tokens = [(end - source.rows.length, end) for source, end in zip(sources, ends, strict=True)]
        self.given_up = {id(buffer) for _, buffer, _ in slots.values()}
        last = sources[-1].rows
        any_vacant = any(buffer is None for _, buffer, _ in slots.values())
        self.vacant = _leaf_names(last.node) - last.leaves.keys() - last.missing if any_vacant else set()
        self.arrays: dict[str, Array] = {}
        self.counters: dict[str, Array] = {}
        self.fills: list[tuple[str, Fill]] = []
        self.used: set[str] = set()
        self.lasting = all(source.lasting for source in sources)
        self.shares = False
        self.known: list[tuple[object, _Places]] = []  # a layer asks what the one before has asked

    def add(self, name: str, path: str, buffer: Array | None, hint: Hint | None) -> None:
        """Find what goes to one leaf of the template: a buffer, or None where its container takes any array.

        Raises:
            StructureMismatchError: It does not fit. The text goes on behind the name of the leaf.
        """
        role = None if hint is None else hint.role
        if role is KEEP:
            self.arrays[path] = self.flat.arrays.get(path)
        elif role is LENGTH:
            if buffer is not None:
                self.counters[path] = buffer
        elif buffer is not None or name not in self.vacant:
            for source_name, layer, source_layer in self._pairs(name, buffer, hint):
                self.used.add(source_name)
                self._place(source_name, layer, source_layer, path, buffer, hint)

    def write(self) -> Any:
        """Write all of it, which uses the template up, and return that."""
        length = self.tokens[-1][1]
        left = {
            name
            for source in self.sources
            for name in source.rows.leaves.keys() - self.used
            if source.rows.leaves[name].role not in {LENGTH, KEEP}
        }
        if left:
            msg = f"the template has no leaf for {sorted(left)[:4]} of the state; pass a layout whose names= map it"
            raise StructureMismatchError(msg)
        # Several fills of one buffer (stacked layers, parts) follow one another; the last handle counts.
        done = self.adapter.fill_all([fill for _, fill in self.fills])
        self.arrays.update({path: array for (path, _), array in zip(self.fills, done, strict=True)})
        for path, counter in self.counters.items():
            self.arrays[path] = self.adapter.set_counter(counter, length)
        return build(self.flat.node, self.arrays, length, self.adapter)

    def _pairs(self, name: str, buffer: Array | None, hint: Hint | None) -> list[tuple[str, int | None, int | None]]:
        """Names of the leaves of the state for one of the template, each with its layer in either where stacked."""
        leaves = self.sources[-1].rows.leaves
        if name in leaves:
            return [(name, None, None)]
        if buffer is not None and hint is not None and "layers" in hint.axes:
            count = self.adapter.describe(buffer).shape[hint.axes.index("layers")]
            names = [name.replace("*", str(i)) for i in range(count)]
            if leaves.keys() >= set(names):
                return [(layer, i, None) for i, layer in enumerate(names)]
        stacked = re.sub(r"(^|\.)layers\.\d+\.", r"\1layers.*.", name)
        found = _LAYER.search(name)
        if found and stacked in leaves and "layers" in leaves[stacked].axes:
            return [(stacked, None, int(found[1]))]
        msg = f"of the template is not among the state's, {sorted(leaves)[:4]} ...; pass a layout whose names= map it"
        raise StructureMismatchError(msg)

    def _place(
        self, name: str, layer: int | None, source_layer: int | None, path: str, buffer: Array | None, hint: Hint | None
    ) -> None:
        """Bring what all parts have of one leaf, or of a snapshot what the last one has, into its place."""
        adapter, tokens = self.adapter, self.tokens
        leaves = [leaf for source in self.sources if (leaf := source.rows.leaves.get(name)) is not None]
        if leaves[-1].role is SNAPSHOT:
            leaves, tokens = leaves[-1:], tokens[-1:]
        elif len(leaves) < len(tokens):
            tokens = [span for source, span in zip(self.sources, tokens, strict=True) if name in source.rows.leaves]
        arrays = [leaf.array for leaf in leaves]
        if buffer is None:
            shapes, room = adapter.shapes(arrays), None
        else:
            wanted, specs = adapter.describe(buffer), [adapter.describe(array) for array in arrays]
            other = next((spec for spec in specs if spec.dtype is not wanted.dtype), None)
            if other is not None:
                msg = f"is {other.dtype} in the state and {wanted.dtype} in the template; make it of the state's dtype"
                raise StructureMismatchError(msg)
            shapes, room = [spec.shape for spec in specs], wanted.shape
        asked = (layer, source_layer, hint, room, shapes, tokens, [leaf[1:] for leaf in leaves])
        found = next((places for key, places in self.known if key == asked), None)
        if found is None:
            found = _find_places(leaves, shapes, tokens, hint, room, layer, source_layer)
            self.known.append((asked, found))
        places, axis = found
        if buffer is None:
            views = [
                adapter.view(array, place[1], place[2]) if place else array
                for array, place in zip(arrays, places, strict=True)
                if place is not None
            ]
            # Its very arrays, where the container never writes in place and nobody else does.
            lasting = self.lasting or all(leaf.frozen for leaf in leaves)
            if hint is not None and hint.frozen and lasting:
                self.shares = True
                is_one = axis is None or len(views) == 1
                self.arrays[path] = views[0] if is_one else adapter.hold_together(views, cast("int", axis))
            elif axis is None:
                [self.arrays[path]] = adapter.copy_all(views)
            else:
                [self.arrays[path]] = adapter.concat_all([(views, axis)])
            return
        for array, place in zip(arrays, places, strict=True):
            if place:
                at, source_at, order = place
                # What is written too would be written, or deleted, before it is read.
                source = adapter.copy_all([array])[0] if id(array) in self.given_up else array
                self.fills.append((path, Fill(buffer, at, source, source_at, order)))


def _find_places(
    leaves: Sequence[Leaf],
    shapes: Sequence[tuple[int, ...]],
    tokens: Sequence[tuple[int, int]],
    hint: Hint | None,
    room: tuple[int, ...] | None,
    layer: int | None,
    source_layer: int | None,
) -> _Places:
    """Find which rows of the parts of one leaf go where. Shapes, axes and roles only, no arrays.

    Args:
        leaves: The leaf in each part.
        shapes: Their shapes.
        tokens: First token of each part, and the one behind its last.
        hint: What is known of the template's leaf.
        room: Shape of its buffer; None where its container takes any array.
        layer: Layer of a stacked buffer.
        source_layer: Layer of the stacked leaves.

    Raises:
        StructureMismatchError: They do not fit. The text goes on behind the name of the leaf.
    """
    axes = _template_axes(leaves[-1], hint, room, source_layer)
    wanted = [axis for axis in axes if layer is None or axis != "layers"]
    for leaf, shape in zip(leaves, shapes, strict=True):
        _check_axes(leaf, shape, axes, wanted, room, source_layer)
    role = leaves[-1].role
    token_axis = row_axis(role)
    if token_axis is None:
        spans: Sequence[tuple[slice, slice] | None] = [(_ALL, _ALL) for _ in leaves]
        at = None
    else:
        at = axes.index(leaves[-1].axes[token_axis])
        asked = role if hint is None or row_axis(hint.role) is None else hint.role
        counts = [shape[token_axis] for shape in shapes]
        spans = _find_spans(leaves, counts, tokens, asked, None if room is None else room[at])
    places: list[_Place | tuple[()] | None] = []
    for leaf, shape, span in zip(leaves, shapes, spans, strict=True):
        if span is None:
            places.append(None)
            continue
        rows, target_rows = span
        index: list[int | slice] = [_ALL] * len(axes)
        source_index: list[int | slice] = [_ALL] * len(leaf.axes)
        if layer is not None:
            index[axes.index("layers")] = layer
        if source_layer is not None:
            source_index[leaf.axes.index("layers")] = source_layer
        if token_axis is not None and at is not None:
            source_index[token_axis], index[at] = rows, target_rows
        held = [axis for axis in leaf.axes if source_layer is None or axis != "layers"]
        as_it_is = room is None and axes == leaf.axes and (token_axis is None or rows == slice(0, shape[token_axis]))
        order = tuple(held.index(axis) for axis in wanted)
        places.append(() if as_it_is else (tuple(index), tuple(source_index), order))
    return places, at


def _template_axes(
    leaf: Leaf, hint: Hint | None, room: tuple[int, ...] | None, source_layer: int | None
) -> tuple[str, ...]:
    """Names of the axes of the template's leaf; those of the state's where nothing is known of it."""
    held = leaf.axes if source_layer is None else tuple(axis for axis in leaf.axes if axis != "layers")
    if hint is None or not hint.axes or (room is not None and len(hint.axes) != len(room)):
        return held
    if hint.role is SNAPSHOT and leaf.role is not SNAPSHOT:  # a layout that says nothing of this leaf
        return held
    return hint.axes


def _check_axes(
    leaf: Leaf,
    shape: tuple[int, ...],
    axes: Sequence[str],
    wanted: Sequence[str],
    room: tuple[int, ...] | None,
    source_layer: int | None,
) -> None:
    extents = {axis: n for axis, n in zip(leaf.axes, shape, strict=True) if source_layer is None or axis != "layers"}
    if sorted(extents) != sorted(wanted) or (room is not None and len(axes) != len(room)):
        msg = (
            f"has axes {leaf.axes} of {shape} in the state and {tuple(axes)} of {room or 'any shape'} in the template; "
            "name the axes in the layout, and make the template of the state's shape"
        )
        raise StructureMismatchError(msg)
    token_axis = row_axis(leaf.role)
    for axis, gets in zip(axes, room or (), strict=False):
        if axis in extents and gets != extents[axis] and (token_axis is None or axis != leaf.axes[token_axis]):
            msg = f"has {axis}={extents[axis]} in the state and {gets} in the template; make it of the state's shape"
            raise StructureMismatchError(msg)


def _find_spans(
    leaves: Sequence[Leaf],
    counts: Sequence[int],
    tokens: Sequence[tuple[int, int]],
    asked: Role,
    room: int | None,
) -> list[tuple[slice, slice] | None]:
    """Which rows of each part go to which rows of a buffer, which has room for any number where `room` is None.

    Where the buffer is a window, its rows stand for the last tokens, or for the first where it has room for all.

    Raises:
        StructureMismatchError: The buffer needs rows that the parts have no more, has no room for them, or its rows
            stand for another number of tokens. The text goes on behind the name of the leaf.
    """
    own = leaves[-1].role
    stride = own.stride if isinstance(own, TOKENS) else 1
    end = tokens[-1][1] // stride
    if isinstance(asked, WINDOW):
        needed = max(0, end - asked.width)
        begin = needed if room is None else max(0, end - room)
        fits = stride == 1
    else:
        needed = begin = 0
        fits = isinstance(asked, TOKENS) and asked.stride == stride and (room is None or room >= end)
    spans: list[tuple[slice, slice] | None] = []
    start = reach = 0  # holds: rows [start, reach) are there without a gap
    for leaf, count, (token, behind) in zip(leaves, counts, tokens, strict=True):
        is_window = isinstance(own, WINDOW)
        first = token + leaf.first if is_window else token // stride
        stop = min(first + count, behind) if is_window else token // stride + (behind - token) // stride
        if first > reach:
            start = first
        reach = max(first, stop)
        low = max(first, begin)
        spans.append((slice(low - first, stop - first), slice(low - begin, stop - begin)) if low < stop else None)
    if not any(spans):
        spans[-1] = (slice(0, 0), slice(0, 0))  # a state of no tokens still uses its buffers up
    if not fits or max(start, begin) > needed or reach < end:
        msg = (
            f"is {own} with rows [{start}, {reach}) in the state, and {asked} with room for "
            f"{'any' if room is None else room} in the template; make a template of the same role and longer "
            "buffers, or cut the state"
        )
        raise StructureMismatchError(msg)
    return spans
