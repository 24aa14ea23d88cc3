"""Cutting rows along their tokens, and joining adjacent ones."""

import itertools
from collections.abc import Sequence

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import KEEP, LENGTH, SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.errors import CutRangeError, StructureMismatchError
from agnostic_cache.state.rows import Rows, check_alike, with_arrays


def cut_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Return an independent copy of tokens ``[start, stop)``.

    Raises:
        CutRangeError: See `KVState.cut`.
    """
    leaves, _, adapter, length, missing, _ = rows
    if not 0 <= start <= stop <= length:
        msg = f"cut [{start}, {stop}) of a state of {length} tokens; stay within [0, {length}]"
        raise CutRangeError(msg)
    at_end = stop == length
    cuts: list[tuple[Array, int, int, int]] = []
    pieces: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        role = leaf.role
        if isinstance(role, TOKENS):
            if (start % role.stride and start < stop) or (stop % role.stride and not at_end):
                msg = (
                    f"cut [{start}, {stop}): leaf {name!r} has one row per {role.stride} tokens; cut at multiples of it"
                )
                raise CutRangeError(msg)
            cuts.append((leaf.array, role.axis, start // role.stride, stop // role.stride))
            pieces[name] = leaf
        elif isinstance(role, WINDOW):
            last = min(leaf.first + adapter.describe(leaf.array).shape[role.axis], length)
            low = min(max(start, leaf.first), last)
            high = max(min(stop, last), low)
            cuts.append((leaf.array, role.axis, low - leaf.first, high - leaf.first))
            pieces[name] = leaf._replace(first=min(max(low - start, 0), stop - start))
    snapshots = {name: leaf for name, leaf in leaves.items() if leaf.role is SNAPSHOT}
    done = with_arrays(pieces, adapter.cut_all(cuts))
    if at_end:
        done |= with_arrays(snapshots, adapter.copy_all([leaf.array for leaf in snapshots.values()]))
    else:
        missing |= snapshots.keys()
    return _finished(rows, done, stop - start)._replace(missing=missing)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Return independent rows that stand for the tokens of all parts.

    Raises:
        StructureMismatchError: See `KVState.join`.
        MixedFrameworksError: See `KVState.join`.
    """
    check_alike(parts)
    _check_whole_rows(parts)
    last, adapter = parts[-1], parts[-1].adapter
    joins: list[tuple[Sequence[Array], int]] = []
    pieces: dict[str, Leaf] = {}
    for name, leaf in last.leaves.items():
        role = leaf.role
        if isinstance(role, TOKENS):
            joins.append(([counted(part.leaves[name].array, role, part.length, adapter) for part in parts], role.axis))
            pieces[name] = leaf
        elif isinstance(role, WINDOW):
            arrays, first = _window(name, parts, role)
            joins.append((arrays, role.axis))
            pieces[name] = leaf._replace(first=first)
    snapshots = {name: leaf for name, leaf in last.leaves.items() if leaf.role is SNAPSHOT}
    done = with_arrays(pieces, adapter.concat_all(joins))
    done |= with_arrays(snapshots, adapter.copy_all([leaf.array for leaf in snapshots.values()]))
    return _finished(last, done, sum(part.length for part in parts))


def counted(array: Array, role: TOKENS, length: int, adapter: Adapter) -> Array:
    """Return the rows that count of a `TOKENS` leaf: buffers may be longer than the state."""
    wanted = length // role.stride
    if adapter.describe(array).shape[role.axis] == wanted:
        return array
    return adapter.cut_all([(array, role.axis, 0, wanted)])[0]


def _finished(rows: Rows, done: dict[str, Leaf], length: int) -> Rows:
    """The rows with their leaves in order, counters rewritten, and without what is no part of the state."""
    finished = {}
    for name, leaf in rows.leaves.items():
        if name in done:
            finished[name] = done[name]
        elif leaf.role is LENGTH:
            finished[name] = leaf._replace(array=rows.adapter.with_counter(leaf.array, length))
        elif leaf.role not in {SNAPSHOT, KEEP}:
            msg = f"leaf {name!r} has a role that cannot be cut: {leaf.role}"
            raise StructureMismatchError(msg)
    return rows._replace(leaves=finished, length=length)


def _window(name: str, parts: Sequence[Rows], role: WINDOW) -> tuple[list[Array], int]:
    """The adjacent rows at the end, from the first one that is needed on, and the token of the first."""
    adapter = parts[-1].adapter
    first = end = sum(part.length for part in parts)
    needed = max(0, end - role.width)
    arrays: list[Array] = []
    for part in reversed(parts):
        array, _, _, _, offset = part.leaves[name]
        begin, room = end - part.length, adapter.describe(array).shape[role.axis]
        rows = min(room, part.length - offset)
        low = begin + offset
        if low + rows != first or (first <= needed and arrays):  # a gap, or enough
            break
        skip = min(max(needed - low, 0), rows)
        whole = skip == 0 and rows == room
        arrays.insert(0, array if whole else adapter.cut_all([(array, role.axis, skip, rows)])[0])
        first, end = low + skip, begin
        if low > begin:  # this part's own beginning is not there
            break
    if not arrays:
        arrays = [adapter.cut_all([(parts[-1].leaves[name].array, role.axis, 0, 0)])[0]]
    return arrays, first


def _check_whole_rows(parts: Sequence[Rows]) -> None:
    strides = {leaf.role.stride for part in parts for leaf in part.leaves.values() if isinstance(leaf.role, TOKENS)}
    for part, after in itertools.pairwise(parts):
        if after.length and any(part.length % stride for stride in strides):
            msg = (
                f"join after a part of {part.length} tokens, whose last row is not whole: rows stand for "
                f"{sorted(strides)} tokens; cut it at a multiple"
            )
            raise StructureMismatchError(msg)
