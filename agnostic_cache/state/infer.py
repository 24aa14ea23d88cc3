"""Finding the roles of leaves by comparing the shapes that a cache has at two lengths."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from agnostic_cache.arrays.adapter import ArraySpec
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.arrays.roles import LENGTH, LENGTH_NAMES, SNAPSHOT, TOKENS, Role
from agnostic_cache.errors import LayoutUnknownError, StructureMismatchError


@runtime_checkable
class SupportsShapes(Protocol):
    """Capability of an adapter: its framework tells the shapes of what a function returns without computing it."""

    def abstract_specs(self, init_fn: Callable[[int], object], length: int) -> Mapping[str, ArraySpec]:
        """Return name and spec of each leaf of ``init_fn(length)`` without allocating it."""
        ...


def infer_roles(init_fn: Callable[[int], object], lengths: tuple[int, int], framework: str) -> dict[str, Role]:
    """Return the role of each leaf of what `init_fn` makes; see `KVLayout.infer`.

    Raises:
        LayoutUnknownError: The two caches have different leaves, or no leaf has a token axis.
        StructureMismatchError: The framework tells no shapes without allocating.
    """
    adapter = adapter_named(framework)
    if not isinstance(adapter, SupportsShapes):
        msg = f"the {framework} adapter cannot evaluate {init_fn!r} without allocating; declare KVLayout(roles=...)"
        raise StructureMismatchError(msg)
    short, long = (adapter.abstract_specs(init_fn, length) for length in lengths)
    if short.keys() != long.keys():
        msg = f"init_fn gives different leaves at lengths {lengths}: {sorted(short.keys() ^ long.keys())}"
        raise LayoutUnknownError(msg)
    roles = {name: _role(name, spec, long[name].shape, lengths) for name, spec in short.items()}
    if not any(isinstance(role, TOKENS) for role in roles.values()):
        shown = {name: (spec.shape, long[name].shape) for name, spec in list(short.items())[:4]}
        msg = (
            f"no leaf of init_fn has one axis that follows the lengths {lengths}; found {shown}; declare "
            "KVLayout(roles=...)"
        )
        raise LayoutUnknownError(msg)
    return roles


def _role(name: str, spec: ArraySpec, longer: tuple[int, ...], lengths: tuple[int, int]) -> Role:
    changed = [axis for axis, pair in enumerate(zip(spec.shape, longer, strict=False)) if pair[0] != pair[1]]
    same_rank = len(spec.shape) == len(longer)
    if same_rank and len(changed) == 1 and (spec.shape[changed[0]], longer[changed[0]]) == lengths:
        return TOKENS(changed[0])
    if spec.dtype.is_integer and name.rsplit(".", 1)[-1] in LENGTH_NAMES:
        return LENGTH
    return SNAPSHOT
