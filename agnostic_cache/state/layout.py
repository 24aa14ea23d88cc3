"""What each leaf of a state means, and which canonical name and axes it has in this package.

A role says how a leaf behaves when a state is cut or joined along its tokens. A `KVLayout` says which role each leaf of
one user's cache has. Roles are declared by an adapter that knows the structure, given by the user, or inferred from two
shapes; what none of these covers is `SNAPSHOT`, which is always right and never cut.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.roles import KEEP, LENGTH, LENGTH_NAMES, SNAPSHOT, TOKENS, WINDOW, Hint, Role, axis_names
from agnostic_cache.errors import LayoutUnknownError, StructureMismatchError
from agnostic_cache.state.infer import infer_roles

__all__ = ["KEEP", "LENGTH", "LENGTH_NAMES", "SNAPSHOT", "TOKENS", "WINDOW", "Hint", "KVLayout", "Role", "axis_names"]


class _Pattern(NamedTuple):
    """A name with ``{i}`` for a layer number and ``*`` for anything, and the canonical name that it maps to."""

    source: re.Pattern[str]
    target: str

    @classmethod
    def of(cls, pattern: str, target: str) -> "_Pattern":
        source = re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)", 1).replace(r"\{i\}", r"(?P=i)")
        return cls(re.compile(source.replace(r"\*", ".*")), target)

    def apply(self, name: str) -> str | None:
        match = self.source.fullmatch(name)
        if match is None:
            return None
        return self.target.replace("{i}", match.groupdict().get("i") or "")


class KVLayout:
    """Which role, axes and canonical name each leaf of a user's cache has.

    >>> layout = KVLayout({"layer_{i}.k": TOKENS(1)}, names={"layer_{i}.k": "layers.{i}.key"})
    >>> layout.describe("layer_3.k", ndim=4)
    ('layers.3.key', Hint(role=TOKENS(axis=1, stride=1), axes=('batch', 'tokens', 'heads', 'dim'), frozen=False))

    Immutable, and safe to share between threads.

    Attributes:
        rotary: ``"half"`` or ``"interleaved"`` where the convention of the rotary embedding in the keys is known, else
            None. Two known conventions that differ never exchange states.
        stack_axis: Axis of stacked layers in every leaf, as in ``[layers, batch, tokens, heads, dim]``, or None.
    """

    __slots__ = ("_axes", "_described", "_names", "_roles", "rotary", "stack_axis")

    def __init__(
        self,
        roles: Mapping[str, Role] | None = None,
        *,
        names: Mapping[str, str] | None = None,
        axes: Mapping[str, Sequence[str]] | None = None,
        stack_axis: int | None = None,
        rotary: str | None = None,
    ) -> None:
        """Declare a layout.

        Args:
            roles: Role per leaf name. A name is the path in the native value joined with dots (``layers.0.k``); ``{i}``
                stands for a layer number, ``*`` for anything; the first pattern that matches counts. A negative token
                axis counts from the end. Leaves that nothing matches are `SNAPSHOT`.
            names: Canonical name per leaf name, same patterns; ``{i}`` carries the layer number over. A stacked leaf is
                known as ``layers.*.key``. Leaves that nothing matches keep their own name.
            axes: Axis names per leaf name, same patterns, where `axis_names` guesses wrong.
            stack_axis: Axis of stacked layers, the same in every leaf.
            rotary: ``"half"`` or ``"interleaved"``.

        Raises:
            LayoutUnknownError: `rotary` is neither.
        """
        if rotary not in {None, "half", "interleaved"}:
            msg = f"rotary={rotary!r} is not a known convention; pass 'half', 'interleaved' or None"
            raise LayoutUnknownError(msg)
        self._roles = [(_Pattern.of(name, ""), role) for name, role in (roles or {}).items()]
        self._axes = [(_Pattern.of(name, ""), tuple(value)) for name, value in (axes or {}).items()]
        self._names = [_Pattern.of(name, target) for name, target in (names or {}).items()]
        self.stack_axis = stack_axis
        self.rotary = rotary
        # A cache has the same names every time, and looking for one tries a pattern per leaf.
        self._described: dict[tuple[str, int], tuple[str, Hint]] = {}

    def declares(self, name: str) -> bool:
        """Say whether a role is declared for the leaf `name`."""
        return any(pattern.apply(name) is not None for pattern, _ in self._roles)

    def describe(self, name: str, ndim: int) -> tuple[str, Hint]:
        """Return the canonical name of the leaf `name` and what is known of it.

        Raises:
            StructureMismatchError: The declared axes do not fit an array of `ndim` axes.
        """
        found = self._described.get((name, ndim))
        return found if found is not None else self._described.setdefault((name, ndim), self._describe(name, ndim))

    def _describe(self, name: str, ndim: int) -> tuple[str, Hint]:
        role = next((role for pattern, role in self._roles if pattern.apply(name) is not None), SNAPSHOT)
        axes = next((axes for pattern, axes in self._axes if pattern.apply(name) is not None), None)
        canonical = next((found for pattern in self._names if (found := pattern.apply(name)) is not None), name)
        token_axis = None
        if isinstance(role, TOKENS | WINDOW):
            if not -ndim <= role.axis < ndim:
                msg = f"leaf {name!r} has {ndim} axes, but its role is {role}; mend the axis in the layout"
                raise StructureMismatchError(msg)
            token_axis = role.axis % ndim
            role = replace(role, axis=token_axis)
        if axes is None:
            stacked = self.stack_axis if token_axis is not None else None
            axes = axis_names(ndim, token_axis, stacked)
        elif len(axes) != ndim:
            msg = f"leaf {name!r} has {ndim} axes, but its layout names {axes}; name each axis once"
            raise StructureMismatchError(msg)
        return canonical, Hint(role, axes)

    @classmethod
    def infer(
        cls,
        init_fn: Callable[[int], object],
        *,
        lengths: tuple[int, int] = (1024, 1536),
        names: Mapping[str, str] | None = None,
        stack_axis: int | None = None,
        rotary: str | None = None,
        framework: str = "jax",
    ) -> "KVLayout":
        """Find the token axis of every leaf by comparing the shapes that `init_fn` gives at two lengths.

        Nothing is allocated: shapes come from the framework's abstract evaluation (``jax.eval_shape``; the meta device
        in torch). A leaf is `TOKENS` where exactly one axis changed and had extent n at both lengths; an integer leaf
        whose name ends like `LENGTH_NAMES` is `LENGTH`; everything else is `SNAPSHOT`. Windows and rings are declared,
        never inferred: a ring shorter than both lengths looks like a snapshot, which is safe.

        Args:
            init_fn: Takes a length in tokens, returns the empty cache for it.
            lengths: Two lengths that no window, ring or padding of the model confuses.
            names: As in `KVLayout`.
            stack_axis: As in `KVLayout`.
            rotary: As in `KVLayout`.
            framework: Whose arrays `init_fn` makes.

        Raises:
            LayoutUnknownError: The two caches have different leaves, or no leaf has a token axis.
        """
        # Inferred names are literal: a path may hold characters that patterns use.
        layout = cls(names=names, stack_axis=stack_axis, rotary=rotary)
        found = infer_roles(init_fn, lengths, framework)
        layout._roles = [(_Pattern(re.compile(re.escape(name)), ""), role) for name, role in found.items()]
        return layout


@runtime_checkable
class SupportsLayouts(Protocol):
    """Capability of an adapter: it knows caches of its framework by the names of their leaves."""

    def known_layout(self, names: Sequence[str]) -> KVLayout | None:
        """Return the layout of a cache whose leaves have these names, where its conventions are public knowledge."""


def known_layout(adapter: Adapter, names: Sequence[str]) -> KVLayout | None:
    """Return the layout by which an adapter knows a cache whose leaves have these names, or None."""
    return adapter.known_layout(names) if isinstance(adapter, SupportsLayouts) else None
