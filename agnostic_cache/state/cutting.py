"""Cutting a state's leaves along their tokens, and joining the leaves of adjacent states."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import LENGTH, SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.errors import CutRangeError, MixedFrameworksError, StructureMismatchError

if TYPE_CHECKING:
    from agnostic_cache.state.kv_state import KVState

Leaves = Mapping[str, Leaf]


def cut_leaves(
    leaves: Leaves, adapter: Adapter, length: int, start: int, stop: int
) -> tuple[dict[str, Leaf], frozenset[str]]:
    """Return independent copies of tokens ``[start, stop)``, and the names of snapshots that stay behind.

    Raises:
        CutRangeError: See `KVState.cut`.
    """
    if not 0 <= start <= stop <= length:
        msg = f"cut [{start}, {stop}) of a state of {length} tokens; stay within [0, {length}]"
        raise CutRangeError(msg)
    at_end = stop == length
    cuts: list[tuple[Array, int, int, int]] = []
    rows: dict[str, Leaf] = {}
    whole = {name: leaf for name, leaf in leaves.items() if leaf.role is SNAPSHOT and at_end}
    for name, leaf in leaves.items():
        role = leaf.role
        if isinstance(role, TOKENS):
            if (start % role.stride and start < stop) or (stop % role.stride and not at_end):
                msg = (
                    f"cut [{start}, {stop}): leaf {name!r} has one row per {role.stride} tokens; cut at multiples of it"
                )
                raise CutRangeError(msg)
            cuts.append((leaf.array, role.axis, start // role.stride, stop // role.stride))
            rows[name] = leaf
        elif isinstance(role, WINDOW):
            last = min(leaf.first + adapter.describe(leaf.array).shape[role.axis], length)
            low = min(max(start, leaf.first), last)
            high = max(min(stop, last), low)
            cuts.append((leaf.array, role.axis, low - leaf.first, high - leaf.first))
            rows[name] = leaf._replace(first=min(max(low - start, 0), stop - start))
    pieces = _paired(rows, adapter.cut_all(cuts)) | _copies(whole, adapter)
    lost = frozenset(name for name, leaf in leaves.items() if leaf.role is SNAPSHOT and not at_end)
    return _finish(leaves, pieces, adapter, stop - start, lost), lost


def join_leaves(parts: Sequence[Leaves], lengths: Sequence[int], adapter: Adapter) -> dict[str, Leaf]:
    """Return independent leaves that stand for the tokens of all parts; see `KVState.join`."""
    last, length = parts[-1], sum(lengths)
    joins: list[tuple[Sequence[Array], int]] = []
    rows: dict[str, Leaf] = {}
    for name, leaf in last.items():
        role = leaf.role
        if isinstance(role, TOKENS):
            pieces = [counted(part[name], adapter, n) for part, n in zip(parts, lengths, strict=True)]
            joins.append((pieces, role.axis))
            rows[name] = leaf
        elif isinstance(role, WINDOW):
            pieces, first = _window([part[name] for part in parts], lengths, adapter, role)
            joins.append((pieces, role.axis))
            rows[name] = leaf._replace(first=first)
    snapshots = {name: leaf for name, leaf in last.items() if leaf.role is SNAPSHOT}
    joined = _paired(rows, adapter.concat_all(joins)) | _copies(snapshots, adapter)
    return _finish(last, joined, adapter, length, frozenset())


def _paired(leaves: Leaves, arrays: Sequence[Array]) -> dict[str, Leaf]:
    return {name: leaf._replace(array=array) for (name, leaf), array in zip(leaves.items(), arrays, strict=True)}


def _copies(leaves: Leaves, adapter: Adapter) -> dict[str, Leaf]:
    return _paired(leaves, adapter.copy_all([leaf.array for leaf in leaves.values()]))


def _finish(leaves: Leaves, done: Leaves, adapter: Adapter, length: int, lost: frozenset[str]) -> dict[str, Leaf]:
    """The leaves in their order, counters rewritten."""
    result = {}
    for name, leaf in leaves.items():
        if name in done:
            result[name] = done[name]
        elif leaf.role is LENGTH:
            result[name] = leaf._replace(array=adapter.with_counter(leaf.array, length))
        elif name not in lost:
            msg = f"leaf {name!r} has a role that cannot be cut: {leaf.role}"
            raise StructureMismatchError(msg)
    return result


def counted(leaf: Leaf, adapter: Adapter, length: int) -> Array:
    """The rows of a TOKENS leaf that count: buffers may be longer than the state."""
    assert isinstance(leaf.role, TOKENS)  # noqa: S101 - for the type checker; the caller asked
    wanted = length // leaf.role.stride
    if adapter.describe(leaf.array).shape[leaf.role.axis] == wanted:
        return leaf.array
    return adapter.cut_all([(leaf.array, leaf.role.axis, 0, wanted)])[0]


def _window(leaves: Sequence[Leaf], lengths: Sequence[int], adapter: Adapter, role: WINDOW) -> tuple[list[Array], int]:
    """The adjacent rows at the end, from the first one that is needed on, and the token of the first."""
    first = end = sum(lengths)
    needed = max(0, end - role.width)
    arrays: list[Array] = []
    for leaf, length in zip(reversed(leaves), reversed(lengths), strict=True):
        begin = end - length
        room = adapter.describe(leaf.array).shape[role.axis]
        rows = min(room, length - leaf.first)
        low = begin + leaf.first
        if low + rows != first or (first <= needed and arrays):  # a gap, or enough
            break
        skip = min(max(needed - low, 0), rows)
        whole = skip == 0 and rows == room
        arrays.insert(0, leaf.array if whole else adapter.cut_all([(leaf.array, role.axis, skip, rows)])[0])
        first, end = low + skip, begin
        if low > begin:  # this part's own beginning is not there
            break
    if not arrays:
        arrays = [adapter.cut_all([(leaves[-1].array, role.axis, 0, 0)])[0]]
    return arrays, first


def check_joinable(parts: Sequence["KVState"]) -> None:
    """Raise where `parts` are not adjacent pieces of one model's cache; see `KVState.join`."""
    check_alike(parts)
    strides = {leaf.role.stride for part in parts for leaf in part.leaves.values() if isinstance(leaf.role, TOKENS)}
    for part, after in itertools.pairwise(parts):
        if after.length and any(part.length % stride for stride in strides):
            msg = (
                f"join after a part of {part.length} tokens, whose last row is not whole: rows stand for "
                f"{sorted(strides)} tokens; cut it at a multiple"
            )
            raise StructureMismatchError(msg)


def check_alike(parts: Sequence["KVState"], *, batches: bool = False) -> None:
    """Raise where `parts` are not states of one model's cache.

    Args:
        parts: At least one.
        batches: They may be of different batch sizes, and must hold all their leaves.

    Raises:
        StructureMismatchError: They are not.
        MixedFrameworksError: They are of different frameworks.
    """
    if not parts:
        msg = "join of no parts; pass at least one KVState"
        raise StructureMismatchError(msg)
    first = parts[0]
    frameworks = {part.framework for part in parts}
    if len(frameworks) > 1:
        msg = f"join of states of {sorted(frameworks)}; call .to() on the others first"
        raise MixedFrameworksError(msg)
    rotary = {part.rotary for part in parts} - {None}
    if len(rotary) > 1:
        msg = f"join of states whose keys are rotated differently: {sorted(map(str, rotary))}; recompute some of them"
        raise StructureMismatchError(msg)
    kinds = _kinds(first, batches=batches)
    for part in parts[1:]:
        if not part.same_structure(first):
            msg = "join of states whose containers differ; join pieces of one model's cache"
            raise StructureMismatchError(msg)
        other = _kinds(part, batches=batches)
        for name in kinds.keys() & other.keys():
            if kinds[name] != other[name]:
                msg = f"join of states that differ in leaf {name!r}: {kinds[name]} and {other[name]}"
                raise StructureMismatchError(msg)
        unmatched = {
            name for name in kinds.keys() ^ other.keys() if batches or name not in first.missing | part.missing
        }
        if unmatched:
            msg = f"join of states with different leaves: {sorted(unmatched)[:4]}"
            raise StructureMismatchError(msg)


def _kinds(state: "KVState", *, batches: bool) -> dict[str, Any]:
    """What must agree between parts: everything but values and the extent of the token axis, or of the batch."""
    kinds = {}
    for name, leaf in state.leaves.items():
        spec = state.adapter.describe(leaf.array)
        shape = list(spec.shape)
        if isinstance(leaf.role, TOKENS | WINDOW):
            shape[leaf.role.axis] = -1
        if batches and "batch" in leaf.axes:
            shape[leaf.axes.index("batch")] = -1
        kinds[name] = (str(spec.dtype), tuple(shape), leaf.role, leaf.axes)
    return kinds
