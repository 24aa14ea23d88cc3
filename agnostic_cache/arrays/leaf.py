"""Leaf: one named array of a state, and what is known of it."""

from typing import NamedTuple

from agnostic_cache.arrays.adapter import Array
from agnostic_cache.arrays.roles import Role


class Leaf(NamedTuple):
    """One named array of a state.

    Attributes:
        array: The framework's own array. Shape: one extent per name in `axes`.
        role: What a cut and a join do to it.
        axes: Name of each axis: ``batch``, ``heads``, ``tokens``, ``dim``, ``layers``, or ``axis_<i>``.
        frozen: Its native container never writes, donates or deletes it in place.
        first: For `WINDOW`: the token, counted from the start of the state, that its first row stands for.
    """

    array: Array
    role: Role
    axes: tuple[str, ...]
    frozen: bool = False
    first: int = 0
