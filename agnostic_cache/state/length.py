"""How many tokens leaves stand for: read from counters and rows, and held against what somebody says."""

from collections.abc import Iterable, Mapping

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import LENGTH, TOKENS
from agnostic_cache.errors import LengthMismatchError


def check_room(rows: Iterable[tuple[str, int, int]], length: int) -> None:
    """Raise where a `TOKENS` leaf, given as name, rows and stride, has fewer rows than `length` tokens take.

    Raises:
        LengthMismatchError: It has, or `length` is negative.
    """
    if length < 0:
        msg = f"length={length} is negative; pass the number of tokens that the state stands for"
        raise LengthMismatchError(msg)
    for name, count, stride in rows:
        if (count + 1) * stride <= length:
            msg = (
                f"length={length}, but leaf {name!r} has {count} rows of {stride} tokens; pass the state that these "
                "tokens were computed into"
            )
            raise LengthMismatchError(msg)


def read_length(leaves: Mapping[str, Leaf], adapter: Adapter, stated: int | None) -> int:
    """Read the length from counters, or from token axes that all agree where there are none.

    Args:
        leaves: The leaves of a state.
        adapter: Their adapter.
        stated: What somebody says the length is, or None.

    Raises:
        LengthMismatchError: Counters, rows and `stated` disagree.
    """
    rows = [
        (name, adapter.describe(leaf.array).shape[leaf.role.axis], leaf.role.stride)
        for name, leaf in leaves.items()
        if isinstance(leaf.role, TOKENS)
    ]
    counters = {
        name: adapter.counter(leaf.array)
        for name, leaf in leaves.items()
        if leaf.role is LENGTH and 0 not in adapter.describe(leaf.array).shape
    }
    found = set(counters.values()) | ({stated} if stated is not None else set())
    values = found or {count * stride for _, count, stride in rows}
    length = values.pop() if len(values) == 1 else None
    if length is None:
        shown = dict(list(counters.items())[:4]) or {name: count * stride for name, count, stride in rows[:4]}
        msg = f"the leaves disagree on the length in tokens: {shown}, asked for {stated}; pass length="
        raise LengthMismatchError(msg)
    check_room(rows, length)
    return length
