"""Taking a batch of sequences apart into one state per row, and stacking states into a batch.

A batch that was padded on the left, as Hugging Face's ``generate`` wants it, has rows in front that stand for nothing.
What is kept of each row begins at its first true token.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import LENGTH, TOKENS, WINDOW
from agnostic_cache.errors import LengthMismatchError, MissingLeavesError, StructureMismatchError
from agnostic_cache.state.cutting import check_alike, counted

if TYPE_CHECKING:
    from agnostic_cache.state.kv_state import KVState

Leaves = Mapping[str, Leaf]


def split_leaves(leaves: Leaves, adapter: Adapter) -> list[dict[str, Leaf]]:
    """Return independent leaves for each row of the batch.

    Raises:
        StructureMismatchError: See `KVState.split_batch`.
    """
    axes = {name: axis for name, leaf in leaves.items() if (axis := _batch_axis(name, leaf)) is not None}
    extents = {name: adapter.describe(leaves[name].array).shape[axis] for name, axis in axes.items()}
    if len(set(extents.values())) != 1:
        msg = f"the leaves have batches of {sorted(set(extents.values()))}; a batch has one size in all of them"
        raise StructureMismatchError(msg)
    rest = [leaf.array for name, leaf in leaves.items() if name not in axes]  # counters that all rows share
    rows = []
    for row in range(next(iter(extents.values()))):
        cuts = {(id(leaves[name].array), axis): (leaves[name].array, axis, row, row + 1) for name, axis in axes.items()}
        taken = dict(zip(cuts, adapter.cut_all(list(cuts.values())), strict=True))
        copies = iter(adapter.copy_all(rest))
        rows.append(
            {
                name: leaf._replace(array=taken[id(leaf.array), axes[name]] if name in axes else next(copies))
                for name, leaf in leaves.items()
            }
        )
    return rows


def check_row_lengths(leaves: Leaves, rows: int, length: int, lengths: Sequence[int]) -> None:
    """Raise where `lengths` are not those of the rows of a padded batch; see `KVState.split_batch`."""
    if len(lengths) != rows or not all(0 <= count <= length for count in lengths):
        msg = f"lengths={list(lengths)} for {rows} rows of up to {length} tokens; pass the true tokens of each row"
        raise LengthMismatchError(msg)
    _check_unstrided(leaves, padded=min(lengths, default=length) < length)


def stack_leaves(parts: Sequence["KVState"], length: int) -> dict[str, Leaf]:
    """Return independent leaves that hold the batches of all parts, each padded in front up to `length` tokens.

    Raises:
        MissingLeavesError: See `KVState.stack`.
        StructureMismatchError: See `KVState.stack`.
    """
    check_alike(parts, batches=True)
    first = parts[0]
    adapter, lengths = first._adapter, [part.length for part in parts]
    _check_unstrided(first.leaves, padded=min(lengths) < length)
    stacked: dict[str, Leaf] = {}
    joins: list[tuple[Sequence[Array], int]] = []
    for name, leaf in first.leaves.items():
        leaves, axis = [part.leaves[name] for part in parts], _batch_axis(name, leaf)
        if axis is None:
            stacked[name] = leaf._replace(array=adapter.with_counter(leaf.array, length))
            continue
        stacked[name] = leaf
        if isinstance(leaf.role, WINDOW):
            arrays, start = _windows(name, leaves, lengths, length, adapter)
            stacked[name] = leaf._replace(first=start)
        elif isinstance(leaf.role, TOKENS):
            at, stride = leaf.role.axis, leaf.role.stride
            trimmed = [counted(part, adapter, count) for part, count in zip(leaves, lengths, strict=True)]
            arrays = [_padded(array, at, length // stride, adapter) for array in trimmed]
        else:
            arrays = [leaf.array for leaf in leaves]
        joins.append((arrays, axis))
    done = iter(adapter.concat_all(joins))
    for name, leaf in stacked.items():
        if _batch_axis(name, leaf) is not None:
            array = next(done)
            if leaf.role is LENGTH:
                array = adapter.with_counter(array, length)
            stacked[name] = leaf._replace(array=array)
    return stacked


def _batch_axis(name: str, leaf: Leaf) -> int | None:
    """Which axis is the batch; None for a counter of all rows."""
    if "batch" in leaf.axes:
        return leaf.axes.index("batch")
    if leaf.role is LENGTH:
        return None
    msg = f"leaf {name!r} has axes {leaf.axes}, none of which is the batch; name them in the layout"
    raise StructureMismatchError(msg)


def _check_unstrided(leaves: Leaves, *, padded: bool) -> None:
    for name, leaf in leaves.items():
        if padded and isinstance(leaf.role, TOKENS) and leaf.role.stride > 1:
            msg = (
                f"leaf {name!r} has one row per {leaf.role.stride} tokens, counted from the padding on; compute "
                "prompts of different lengths one by one"
            )
            raise StructureMismatchError(msg)


def _windows(
    name: str, leaves: Sequence[Leaf], lengths: Sequence[int], length: int, adapter: Adapter
) -> tuple[list[Array], int]:
    """As many of the last rows as every part has, or could have as padding, and the token of the first."""
    rows, ends = [], []
    for leaf, count in zip(leaves, lengths, strict=True):
        assert isinstance(leaf.role, WINDOW)  # noqa: S101 - for the type checker; the caller asked
        held = adapter.describe(leaf.array).shape[leaf.role.axis]
        ends.append(min(held, count - leaf.first))
        rows.append(length if leaf.first == 0 else ends[-1])
    role = leaves[0].role
    assert isinstance(role, WINDOW)  # noqa: S101 - as above
    shared = min(*rows, max(role.width, *ends))  # padding makes up what is needed, and no more
    if shared < min(role.width, length):
        msg = f"window {name!r} holds the last {shared} tokens of a state, and needs {role.width}"
        raise MissingLeavesError(msg)
    arrays = []
    for leaf, end in zip(leaves, ends, strict=True):
        last = adapter.cut_all([(leaf.array, role.axis, max(0, end - shared), end)])[0]
        arrays.append(_padded(last, role.axis, shared, adapter))
    return arrays, length - shared


def _padded(array: Array, axis: int, rows: int, adapter: Adapter) -> Array:
    """Return `array` with rows of zeros in front where it has fewer than `rows`."""
    spec = adapter.describe(array)
    absent = rows - spec.shape[axis]
    if absent <= 0:
        return array
    shape = (*spec.shape[:axis], absent, *spec.shape[axis + 1 :])
    zeros = adapter.place(adapter.from_host(HostArray.empty(shape, spec.dtype)), spec.device)
    return adapter.concat_all([([zeros, array], axis)])[0]
