"""Rows: the leaves of a state as plain data. What owns them, and how long they live, is `KVState`'s."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.roles import KEEP, TOKENS, WINDOW, Role
from agnostic_cache.errors import MissingLeavesError, MixedFrameworksError, StructureMismatchError
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.tree import Node


class Rows(NamedTuple):
    """Named leaves of one framework, how they nest, and how many tokens they stand for.

    Attributes:
        leaves: By canonical name, in the order of the structure.
        node: The structure.
        adapter: Adapter of the arrays.
        length: Tokens that count; arrays may have more rows.
        missing: Names of `SNAPSHOT` leaves that a cut had to leave behind.
        layout: The layout that named the leaves, or None where their containers did.
    """

    leaves: Mapping[str, Leaf]
    node: Node
    adapter: Adapter
    length: int
    missing: frozenset[str] = frozenset()
    layout: KVLayout | None = None

    @property
    def rotary(self) -> str | None:
        """Convention of the rotary embedding in the keys, or None where unknown."""
        return self.layout.rotary if self.layout is not None else None

    def arrays(self) -> list[Array]:
        """Return every array once, in order."""
        return list({id(leaf.array): leaf.array for leaf in self.leaves.values()}.values())

    def same_structure(self, other: "Rows") -> bool:
        """Say whether both nest their leaves alike."""
        return self.node is other.node or self.node.to_json() == other.node.to_json()


def with_arrays(leaves: Mapping[str, Leaf], arrays: Sequence[Array]) -> dict[str, Leaf]:
    """Return the leaves around other arrays, one for each, in their order."""
    return {name: leaf._replace(array=array) for (name, leaf), array in zip(leaves.items(), arrays, strict=True)}


def row_axis(role: Role) -> int | None:
    """Return the axis that has rows of tokens, or None for a role without one."""
    return role.axis if isinstance(role, TOKENS | WINDOW) else None


def check_complete(rows: Rows) -> None:
    """Raise where a cut left leaves behind, or the rows of a window are not there.

    Raises:
        MissingLeavesError: It has, or they are not.
    """
    if rows.missing:
        shown = ", ".join(sorted(rows.missing)[:4])
        msg = (
            f"{len(rows.missing)} leaves are only valid at another length and were left behind by a cut: {shown}; "
            "join up to a stored boundary"
        )
        raise MissingLeavesError(msg)
    for name, leaf in rows.leaves.items():
        if isinstance(leaf.role, WINDOW):
            end = leaf.first + rows.adapter.describe(leaf.array).shape[leaf.role.axis]
            if leaf.first > max(0, rows.length - leaf.role.width) or end < rows.length:
                held = f"tokens [{leaf.first}, {end}) of {rows.length}"
                msg = f"window {name!r} holds {held}, and needs the last {leaf.role.width}"
                raise MissingLeavesError(msg)


def check_alike(parts: Sequence[Rows], *, batches: bool = False) -> None:
    """Raise where `parts` are not rows of one model's cache.

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
    frameworks = {part.adapter.framework for part in parts}
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


def _kinds(rows: Rows, *, batches: bool) -> dict[str, tuple[object, ...]]:
    """What must agree between parts: everything but values and the extent of the token axis, or of the batch."""
    kinds: dict[str, tuple[object, ...]] = {}
    for name, leaf in rows.leaves.items():
        if leaf.role is KEEP:
            continue
        spec = rows.adapter.describe(leaf.array)
        free = {row_axis(leaf.role), leaf.axes.index("batch") if batches and "batch" in leaf.axes else None}
        shape = tuple(-1 if axis in free else extent for axis, extent in enumerate(spec.shape))
        kinds[name] = (str(spec.dtype), shape, leaf.role, leaf.axes)
    return kinds
