"""Containers of a framework that are no dict, list, tuple, NamedTuple or dataclass: taken apart, and put together."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from agnostic_cache.arrays.roles import Hint
from agnostic_cache.errors import StructureMismatchError


class Opened(NamedTuple):
    """A container taken apart.

    Attributes:
        kind: Name under which `SupportsContainers.close` puts it together, ``"<framework>.<class>"``.
        children: Child values by name. A child that is None and has a hint is a leaf that is not filled yet.
        data: JSON-able rest.
        hints: What is known of children that are arrays.
        length: Tokens that the container says it stands for, or None where it does not say.
        native: What helps `close` in this process and cannot be written down (a type, a tree definition); must not keep
            the container's arrays alive.
    """

    kind: str
    children: Mapping[str, Any]
    data: Any = None
    hints: Mapping[str, Hint] = {}
    length: int | None = None
    native: Any = None


@runtime_checkable
class SupportsContainers(Protocol):
    """Capability of an adapter: it knows containers of its framework."""

    def open(self, value: object) -> Opened | None:
        """Take a container of this framework apart, or return None where it is none. Copies nothing."""

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:
        """Put a container together from what `open` gave; `native` is None where the structure came from bytes.

        `length` is that of the state; 0 where none of its containers stated one and no counter was read yet.

        Raises:
            StructureMismatchError: This adapter does not know `kind` (see `unknown_kind`), or needs `native` for it.
        """


@runtime_checkable
class SupportsEmptying(Protocol):
    """Capability of an adapter: it lets its containers drop their arrays. Without it, they keep them until they die."""

    def take_apart(self, value: object) -> list[Any] | None:
        """Empty a container of this framework of its children and return them, or None where `value` is none.

        What is emptied need not work any more: this serves `on_evict`, whose argument nobody uses afterwards.
        """


@runtime_checkable
class SupportsTemplates(Protocol):
    """Capability of an adapter: its empty templates want to be made ready before they are filled."""

    def prepare_like(self, like: object, length: int, layers: int) -> object:
        """Make an empty template ready to be filled with `layers` layers."""


def unknown_kind(framework: str, kind: str) -> StructureMismatchError:
    """Return the error of an adapter that cannot put a container of this `kind` together."""
    return StructureMismatchError(f"the {framework} adapter cannot build a {kind!r} here; pass like= with a fresh one")
