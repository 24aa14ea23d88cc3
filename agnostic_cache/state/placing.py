"""Placing: which rows of the pieces of a state go where in a buffer. Shapes, axes and roles only, no arrays.

The layers of a model ask the same questions one after another, so the answers are remembered.
"""

import functools
from typing import NamedTuple

from agnostic_cache.arrays.adapter import ArraySpec
from agnostic_cache.arrays.roles import SNAPSHOT, TOKENS, WINDOW, Hint, Role
from agnostic_cache.errors import StructureMismatchError


class Held(NamedTuple):
    """What is known of a piece without its array, so that the pieces of one layer and of the next compare equal."""

    spec: ArraySpec
    role: Role
    axes: tuple[str, ...]
    first: int
    layer: int | None  # of a stacked leaf
    begin: int
    length: int


Move = tuple[tuple[int | slice, ...], tuple[int | slice, ...], tuple[int, ...]]
"""`at`, `source_at` and `order` of a `Fill`."""


@functools.lru_cache(maxsize=64)  # the layers of a model ask the same, one after another
def find_moves(
    pieces: tuple[Held, ...], spec: ArraySpec, hint: Hint | None, layer: int | None, length: int
) -> list[Move | None]:
    """Which rows of the pieces go where in a slot, or in one `layer` of it; None for a piece that is of no use.

    Raises:
        StructureMismatchError: They do not fit. The text goes on behind the name of the leaf.
    """
    fits = [_checked(piece, spec, hint, layer) for piece in pieces]
    extents = [
        extent_of(piece.role, piece.first, piece.begin, piece.length, rows)
        for piece, (_, rows, _) in zip(pieces, fits, strict=True)
    ]
    spans = find_spans(tuple(extents), pieces[-1].role, None if hint is None else hint.role, fits[0][2], length)
    return [
        None if span is None else _move(piece, axes, layer, span)
        for piece, (axes, _, _), span in zip(pieces, fits, spans, strict=True)
    ]


def _checked(piece: Held, spec: ArraySpec, hint: Hint | None, layer: int | None) -> tuple[tuple[str, ...], int, int]:
    """Axes of the slot, and the rows that the piece has and the slot has room for; raises where they do not fit."""
    held = piece.spec
    axes = hint.axes if hint is not None and len(hint.axes) == len(spec.shape) else piece.axes
    if hint is not None and hint.role is SNAPSHOT and piece.role is not SNAPSHOT:
        axes = piece.axes  # a layout that says nothing of this leaf
    left = [axis for axis in axes if layer is None or axis != "layers"]
    right = [axis for axis in piece.axes if piece.layer is None or axis != "layers"]
    if spec.dtype != held.dtype or sorted(left) != sorted(right) or len(axes) != len(spec.shape):
        msg = (
            f"is {held.dtype} {dict(zip(piece.axes, held.shape, strict=True))} in the state and "
            f"{spec.dtype} {spec.shape} with axes {axes} in the template; "
            "make the template with the state's dtype and axes"
        )
        raise StructureMismatchError(msg)
    tokens = _token_axis(piece)
    rows = room = 0
    for axis in left:
        has, gets = held.shape[piece.axes.index(axis)], spec.shape[axes.index(axis)]
        if axis == tokens:
            rows, room = has, gets
        elif gets != has:
            msg = f"has {axis}={has} in the state and {gets} in the template; make a template of the state's shape"
            raise StructureMismatchError(msg)
    return axes, rows, room


def _move(piece: Held, axes: tuple[str, ...], layer: int | None, span: tuple[slice, slice]) -> Move:
    index: list[int | slice] = [slice(None)] * len(axes)
    source_index: list[int | slice] = [slice(None)] * len(piece.axes)
    if layer is not None:
        index[axes.index("layers")] = layer
    if piece.layer is not None:
        source_index[piece.axes.index("layers")] = piece.layer
    tokens = _token_axis(piece)
    if tokens is not None:
        source_index[piece.axes.index(tokens)], index[axes.index(tokens)] = span
    right = [axis for axis in piece.axes if piece.layer is None or axis != "layers"]
    order = tuple(right.index(axis) for axis in axes if layer is None or axis != "layers")
    return tuple(index), tuple(source_index), order


def _token_axis(piece: Held) -> str | None:
    return piece.axes[piece.role.axis] if isinstance(piece.role, TOKENS | WINDOW) else None


Extent = tuple[int, int, int | None, int]
"""Of a piece: the token that it begins with, its tokens, of a window its first row, and its rows."""


def extent_of(role: Role, first: int, begin: int, length: int, rows: int) -> Extent:
    """Return what `find_spans` asks of a piece."""
    return begin, length, None if type(role) is TOKENS else first, rows


@functools.lru_cache(maxsize=64)
def find_spans(
    extents: tuple[Extent, ...], own: Role, asked: Role | None, room: int | None, length: int
) -> list[tuple[slice, slice] | None]:
    """Which rows of each piece go to which rows of a slot, which has room for any number where `room` is None.

    Where a slot is a window, its rows stand for the last tokens, or for the first where it has room for all of them.

    Args:
        extents: The pieces.
        own: Their role.
        asked: That of the slot, where it has one.
        room: Rows of the slot.
        length: Tokens of all pieces.

    Raises:
        StructureMismatchError: The slot needs rows that the pieces have no more, has no room for them, or its rows
            stand for another number of tokens. The text goes on behind the name of the leaf.
    """
    if not isinstance(own, TOKENS | WINDOW):
        return [(slice(None), slice(None)) for _ in extents]
    role = asked if isinstance(asked, TOKENS | WINDOW) else own
    stride = own.stride if isinstance(own, TOKENS) else 1
    end = length // stride
    if isinstance(role, WINDOW):
        needed = max(0, end - role.width)
        begin = needed if room is None else max(0, end - room)
        fits = stride == 1
    else:
        needed = begin = 0
        fits = role.stride == stride and (room is None or room >= end)
    spans: list[tuple[slice, slice] | None] = []
    start = reach = 0  # holds: rows [start, reach) are there without a gap
    for i, (token, tokens, window, count) in enumerate(extents):
        first = token // stride if window is None else token + window
        stop = first + tokens // stride if window is None else min(first + count, token + tokens)
        if first > reach:
            start = first
        reach = max(first, stop)
        low = max(first, begin)
        if low < stop:
            spans.append((slice(low - first, stop - first), slice(low - begin, stop - begin)))
        elif i == len(extents) - 1 and not any(spans):  # a state of no tokens still uses its buffers up
            spans.append((slice(0, 0), slice(0, 0)))
        else:
            spans.append(None)
    if not fits or max(start, begin) > needed or reach < end:
        msg = (
            f"is {own} with rows [{start}, {reach}) in the state, and {role} with room for "
            f"{'any' if room is None else room} in the template; make a template of the same role and longer "
            "buffers, or cut the state"
        )
        raise StructureMismatchError(msg)
    return spans
