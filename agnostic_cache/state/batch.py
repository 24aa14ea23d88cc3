"""Taking a batch of sequences apart into one state per row, and stacking states into a batch.

A batch that was padded on the left, as Hugging Face's ``generate`` wants it, has rows in front that stand for nothing.
What is kept of each row begins at its first true token.
"""

from collections.abc import Mapping, Sequence

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import KEEP, LENGTH, TOKENS, WINDOW
from agnostic_cache.errors import LengthMismatchError, MissingLeavesError, StructureMismatchError
from agnostic_cache.state.cutting import counted, cut_rows
from agnostic_cache.state.rows import Rows, check_alike


def split_rows(rows: Rows, lengths: Sequence[int] | None) -> list[Rows]:
    """Return independent rows for each sequence of the batch, from its first true token on.

    Raises:
        StructureMismatchError: See `KVState.split_batch`.
        LengthMismatchError: See `KVState.split_batch`.
    """
    leaves, adapter = _parts_of_the_state(rows), rows.adapter
    axes = {name: axis for name, leaf in leaves.items() if (axis := _batch_axis(name, leaf)) is not None}
    extents = {adapter.describe(leaves[name].array).shape[axis] for name, axis in axes.items()}
    if len(extents) != 1:
        msg = f"the leaves have batches of {sorted(extents)}; a batch has one size in all of them"
        raise StructureMismatchError(msg)
    rest = [leaf.array for name, leaf in leaves.items() if name not in axes]  # counters that all rows share
    split = []
    for row in range(extents.pop()):
        cuts = {(id(leaves[name].array), axis): (leaves[name].array, axis, row, row + 1) for name, axis in axes.items()}
        taken = dict(zip(cuts, adapter.cut_all(list(cuts.values())), strict=True))
        copies = iter(adapter.copy_all(rest))
        own = {
            name: leaf._replace(array=taken[id(leaf.array), axes[name]] if name in axes else next(copies))
            for name, leaf in leaves.items()
        }
        split.append(rows._replace(leaves=own))
    if lengths is None:
        return split
    whole = rows.length
    if len(lengths) != len(split) or not all(0 <= length <= whole for length in lengths):
        msg = f"lengths={list(lengths)} for {len(split)} rows of up to {whole} tokens; pass the true tokens of each row"
        raise LengthMismatchError(msg)
    _check_unstrided(leaves, padded=min(lengths, default=whole) < whole)
    pairs = zip(split, lengths, strict=True)
    return [row if length == whole else cut_rows(row, whole - length, whole) for row, length in pairs]


def stack_rows(parts: Sequence[Rows], length: int | None) -> Rows:
    """Return independent rows that hold the batches of all parts, each padded in front up to `length` tokens.

    Raises:
        LengthMismatchError: See `KVState.stack`.
        MissingLeavesError: See `KVState.stack`.
        StructureMismatchError: See `KVState.stack`.
    """
    check_alike(parts, batches=True)
    first, adapter, lengths = parts[0], parts[0].adapter, sorted({part.length for part in parts})
    if length is None and len(lengths) > 1:
        msg = f"stack of states of {lengths} tokens; cut them to {lengths[0]}, or pass length={lengths[-1]} to pad"
        raise LengthMismatchError(msg)
    length = lengths[-1] if length is None else length
    if lengths[-1] > length:
        msg = f"stack of states of {lengths} tokens into length={length}; pass at least {lengths[-1]}"
        raise LengthMismatchError(msg)
    _check_unstrided(first.leaves, padded=lengths[0] < length)
    stacked = _parts_of_the_state(first)
    joins: list[tuple[Sequence[Array], int]] = []
    for name, leaf in stacked.items():
        axis, role = _batch_axis(name, leaf), leaf.role
        if axis is None:
            continue
        arrays = [part.leaves[name].array for part in parts]
        if isinstance(role, WINDOW):
            arrays, start = _windows(name, parts, role, length)
            stacked[name] = leaf._replace(first=start)
        elif isinstance(role, TOKENS):
            own = [counted(array, role, part.length, adapter) for array, part in zip(arrays, parts, strict=True)]
            arrays = [_padded(array, role.axis, length // role.stride, adapter) for array in own]
        joins.append((arrays, axis))
    done = iter(adapter.concat_all(joins))
    for name, leaf in stacked.items():
        array = leaf.array if _batch_axis(name, leaf) is None else next(done)
        if leaf.role is LENGTH:
            array = adapter.with_counter(array, length)
        stacked[name] = leaf._replace(array=array)
    return first._replace(leaves=stacked, length=length)


def _parts_of_the_state(rows: Rows) -> dict[str, Leaf]:
    return {name: leaf for name, leaf in rows.leaves.items() if leaf.role is not KEEP}


def _batch_axis(name: str, leaf: Leaf) -> int | None:
    """Which axis is the batch; None for a counter of all rows."""
    if "batch" in leaf.axes:
        return leaf.axes.index("batch")
    if leaf.role is LENGTH:
        return None
    msg = f"leaf {name!r} has axes {leaf.axes}, none of which is the batch; name them in the layout"
    raise StructureMismatchError(msg)


def _check_unstrided(leaves: Mapping[str, Leaf], *, padded: bool) -> None:
    for name, leaf in leaves.items():
        if padded and isinstance(leaf.role, TOKENS) and leaf.role.stride > 1:
            msg = (
                f"leaf {name!r} has one row per {leaf.role.stride} tokens, counted from the padding on; compute "
                "prompts of different lengths one by one"
            )
            raise StructureMismatchError(msg)


def _windows(name: str, parts: Sequence[Rows], role: WINDOW, length: int) -> tuple[list[Array], int]:
    """As many of the last rows as every part has, or could have as padding, and the token of the first."""
    adapter, leaves = parts[0].adapter, [part.leaves[name] for part in parts]
    ends = [
        min(adapter.describe(leaf.array).shape[role.axis], part.length - leaf.first)
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    there = [length if leaf.first == 0 else end for leaf, end in zip(leaves, ends, strict=True)]
    shared = min(*there, max(role.width, *ends))  # padding makes up what is needed, and no more
    if shared < min(role.width, length):
        msg = f"window {name!r} holds the last {shared} tokens of a state, and needs {role.width}"
        raise MissingLeavesError(msg)
    cuts = [(leaf.array, role.axis, max(0, end - shared), end) for leaf, end in zip(leaves, ends, strict=True)]
    return [_padded(array, role.axis, shared, adapter) for array in adapter.cut_all(cuts)], length - shared


def _padded(array: Array, axis: int, rows: int, adapter: Adapter) -> Array:
    """Return `array` with rows of zeros in front where it has fewer than `rows`."""
    spec = adapter.describe(array)
    absent = rows - spec.shape[axis]
    if absent <= 0:
        return array
    shape = (*spec.shape[:axis], absent, *spec.shape[axis + 1 :])
    zeros = adapter.place(adapter.from_host(HostArray.empty(shape, spec.dtype)), spec.device)
    return adapter.concat_all([([zeros, array], axis)])[0]
