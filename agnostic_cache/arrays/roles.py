"""Roles: how a leaf of a state behaves when the state is cut or joined along its tokens."""

import enum
from dataclasses import dataclass
from typing import Final, NamedTuple

LENGTH_NAMES: Final = ("cache_index", "end_index", "cumulative_length")
"""Last parts of the names under which integer leaves are counters of tokens."""


@dataclass(frozen=True, slots=True)
class TOKENS:
    """One row along `axis` for every `stride` tokens. A cut takes the rows, a join concatenates them.

    Source: full attention has stride 1; compressed attention (DeepSeek-V4 style) 4 or 128.
    """

    axis: int
    stride: int = 1


@dataclass(frozen=True, slots=True)
class WINDOW:
    """Rows along `axis`, of which only those of tokens ``[length - width, length)`` are needed to go on.

    A layer whose attention window is ``w`` tokens, the current one included, needs ``width = w - 1`` rows of the past.
    """

    axis: int
    width: int


class Whole(enum.Enum):
    """The roles that have no token axis."""

    SNAPSHOT = "snapshot"
    """Valid at exactly `length`: recurrent and convolution states, quantised layers, anything unknown."""
    LENGTH = "length"
    """A counter whose every element equals `length`; rewritten by cut, join and unwrap."""
    KEEP = "keep"
    """No part of the state (a mask, the state of a random generator): declared, never inferred."""


SNAPSHOT: Final = Whole.SNAPSHOT
LENGTH: Final = Whole.LENGTH
KEEP: Final = Whole.KEEP
Role = TOKENS | WINDOW | Whole


class Hint(NamedTuple):
    """What an adapter knows of one array that it found in a container of its own.

    Attributes:
        role: The leaf's role.
        axes: Name of each axis: ``batch``, ``heads``, ``tokens``, ``dim``, ``layers``, or ``axis_<i>``.
        frozen: The container never writes, donates or deletes this array in place, so that several may share it.
    """

    role: Role
    axes: tuple[str, ...]
    frozen: bool = False


def axis_names(ndim: int, token_axis: int | None = None, stack_axis: int | None = None) -> tuple[str, ...]:
    """Name the axes of a leaf from where its tokens (and stacked layers) lie.

    The other axes are, in their order, ``batch``, ``heads``, ``dim`` where there are three of them, ``batch``, ``dim``
    where there are two; anything else is numbered.

    >>> axis_names(4, token_axis=1)
    ('batch', 'tokens', 'heads', 'dim')
    """
    names: dict[int, str] = {}
    if stack_axis is not None:
        names[stack_axis % ndim] = "layers"
    if token_axis is not None:
        names[token_axis % ndim] = "tokens"
    others = [i for i in range(ndim) if i not in names]
    known = {3: ("batch", "heads", "dim"), 2: ("batch", "dim")}.get(len(others)) if token_axis is not None else None
    names.update(zip(others, known or (f"axis_{i}" for i in others), strict=True))
    return tuple(names[i] for i in range(ndim))
