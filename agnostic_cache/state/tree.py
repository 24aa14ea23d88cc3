"""Taking a native value apart into named arrays and a structure, and putting it together again.

The core walks dict, list, tuple, NamedTuple and dataclass; an adapter opens what else its framework has. The structure
is a tree of `Node`: all of it that can be written down is JSON-able, and no class is ever imported by a name found in
data: types live in `Node.native`, which only a process that took the value apart has.
"""

import enum
import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.containers import Opened, SupportsEmptying, unknown_kind
from agnostic_cache.arrays.records import field_names
from agnostic_cache.arrays.registry import adapter_for
from agnostic_cache.arrays.roles import LENGTH_NAMES, Hint
from agnostic_cache.errors import MixedFrameworksError, StructureMismatchError, UnknownValueError


class Node(NamedTuple):
    """One container, array or constant of a structure.

    Attributes:
        kind: ``leaf`` (data is the leaf's name), ``keep`` (a leaf that is no part of the state), ``const``, ``length``
            (an int that equals the state's length), ``dict``, ``list``, ``tuple``, ``namedtuple``, ``dataclass``, or a
            kind of the adapter's own.
        data: JSON-able.
        keys: Names of the children: str or int.
        children: One node per key.
        native: A type, constant or tree definition that cannot be written down; None after a round trip through JSON.
    """

    kind: str
    data: Any = None
    keys: tuple[str | int, ...] = ()
    children: tuple["Node", ...] = ()
    native: Any = None

    def to_json(self) -> dict[str, Any]:
        """Return the node as plain dicts and lists."""
        plain: dict[str, Any] = {"kind": self.kind}
        if self.data is not None:
            plain["data"] = self.data
        if self.keys:
            plain["keys"] = list(self.keys)
            plain["children"] = [child.to_json() for child in self.children]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Node":
        """Rebuild a node from `to_json`, without what could not be written down."""
        children = tuple(cls.from_json(child) for child in plain.get("children", ()))
        return cls(str(plain["kind"]), plain.get("data"), tuple(plain.get("keys", ())), children)


_OURS = frozenset({"leaf", "keep", "const", "length", "dict", "list", "tuple", "namedtuple", "dataclass"})
_KEYS = frozenset({str, int})
_SCALARS = frozenset({str, int, float, bool})


def _named_leaves(path: str, keys: tuple[str | int, ...]) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """Path of each child of a container, and its node where it is an array."""
    names = tuple(_below(path, key) for key in keys)
    return names, tuple(Node("leaf", name) for name in names)


# The caches of one model have the same names every time.
_known_leaves = functools.lru_cache(maxsize=4096)(_named_leaves)


class Flat(NamedTuple):
    """A value taken apart.

    Attributes:
        node: Its structure; leaves carry path names.
        arrays: Array per path name, in walking order. One array may stand under several names.
        hints: What containers said of their arrays, also of those that are not filled yet.
        vacant: Path names of leaves that containers have room for but do not hold.
        lengths: Every length in tokens that a container stated.
        adapter: The one adapter that all arrays belong to.
    """

    node: Node
    arrays: dict[str, Array]
    hints: dict[str, Hint]
    vacant: list[str]
    lengths: list[int]
    adapter: Adapter


def flatten(value: object, adapter: Adapter | None = None) -> Flat:
    """Take `value` apart. Copies nothing.

    Args:
        value: Any nesting of dict, list, tuple, NamedTuple and dataclass, with arrays and containers of one framework.
        adapter: Whose arrays to expect; by default that of the first array or opaque container.

    Raises:
        UnknownValueError: Something in it is neither.
        MixedFrameworksError: It holds arrays of several frameworks.
    """
    found = adapter if adapter is not None else adapter_for(value)
    walk = _Walk(found)
    return Flat(walk.visit(value, ""), walk.arrays, walk.hints, walk.vacant, walk.lengths, found)


def _below(path: str, key: object) -> str:
    """The path of a child; a container of one nameless child lends it its own."""
    text = str(key)
    if "%" in text or "." in text:
        text = text.replace("%", "%25").replace(".", "%2E")
    return f"{path}.{text}" if path and text else path or text


class _Walk:
    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.opener = adapter.containers
        self.is_array = adapter.is_array
        self.containers: set[type] = {dict, list, tuple}  # no arrays for sure; of many layers, the first is asked
        self.arrays: dict[str, Array] = {}
        self.hints: dict[str, Hint] = {}
        self.vacant: list[str] = []
        self.lengths: list[int] = []

    def visit(self, value: Any, path: str) -> Node:
        if not self.is_array(value):
            return self._container(value, path)
        self.arrays[path or "value"] = value
        return Node("leaf", path or "value")

    def _container(self, value: Any, path: str) -> Node:  # noqa: PLR0911 - one return per kind of node reads best
        kind = type(value)
        if kind is dict or kind is OrderedDict:
            keys, native = tuple(value), None if kind is dict else OrderedDict
            return Node("dict", None, keys, self._children(keys, value.values(), path), native)
        if kind is list or kind is tuple:
            keys = tuple(range(len(value)))
            return Node(kind.__name__, None, keys, self._children(keys, value, path))
        if value is None or kind in _SCALARS:
            if type(value) is int and path.rsplit(".", 1)[-1] in LENGTH_NAMES:
                self.lengths.append(value)
                return Node("length")
            return Node("const", value)
        if isinstance(value, tuple) and (names := getattr(value, "_fields", None)) is not None:
            return self._named("namedtuple", value, names, path)
        opened = self.opener.open(value) if self.opener is not None else None
        if opened is not None:
            self.containers.add(kind)
            return self._opened(opened, path)
        if isinstance(value, enum.Enum) or self.adapter.is_constant(value):
            return Node("const", {"type": kind.__qualname__}, native=value)
        names = field_names(value)
        if names is not None:
            return self._named("dataclass", value, names, path)
        return self._unknown(value, path)

    def _children(
        self, keys: tuple[Any, ...], values: Iterable[Any], path: str, hints: Mapping[str, Hint] | None = None
    ) -> tuple[Node, ...]:
        if _KEYS.issuperset(map(type, keys)):
            names, leaves = _known_leaves(path, keys)
        else:
            bad = [key for key in keys if not isinstance(key, str | int)]
            if bad:
                msg = f"a dict key at {path or 'the top'!r} is {bad[0]!r}; use str or int keys in a state"
                raise UnknownValueError(msg)
            names, leaves = _named_leaves(path, keys)  # a bool, say, which a memory would take for an int
        nodes, is_array, arrays, containers = list(leaves), self.is_array, self.arrays, self.containers
        for i, child in enumerate(values):
            name = names[i]
            if hints and (hint := hints.get(keys[i])) is not None:
                self.hints[name] = hint
                if child is None:
                    self.vacant.append(name)
                    continue
            elif type(child) in containers or not is_array(child):
                nodes[i] = self._container(child, name)
                continue
            if name in arrays:
                msg = f"two leaves are called {name!r}; do not mix int and str keys that read alike"
                raise UnknownValueError(msg)
            arrays[name] = child
        return tuple(nodes)

    def _named(self, kind: str, value: object, names: Sequence[str], path: str) -> Node:
        keys = tuple(names)
        nodes = self._children(keys, [getattr(value, name) for name in keys], path)
        return Node(kind, type(value).__qualname__, keys, nodes, type(value))

    def _opened(self, opened: Opened, path: str) -> Node:
        kind, children, data, hints, length, native = opened
        if length is not None:
            self.lengths.append(length)
        keys = tuple(children)
        return Node(kind, data, keys, self._children(keys, children.values(), path, hints), native)

    def _unknown(self, value: object, path: str) -> Node:
        where = f"at {path!r} " if path else ""
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            other = adapter_for(value).framework
        except UnknownValueError:
            msg = (
                f"{name} {where}is nothing that the {self.adapter.framework} adapter knows; store arrays and "
                "containers of arrays"
            )
            raise UnknownValueError(msg) from None
        msg = f"{name} {where}is {other} in a value of {self.adapter.framework}; store one framework per value"
        raise MixedFrameworksError(msg)


def build(node: Node, arrays: Mapping[str, Array], length: int, adapter: Adapter) -> Any:  # noqa: PLR0911
    """Put a value together from its structure: fresh containers around the given arrays.

    Args:
        node: The structure.
        arrays: Array per leaf name of the structure.
        length: What counters are set to.
        adapter: Adapter of the arrays.

    Raises:
        StructureMismatchError: A container cannot be rebuilt in this process; the caller needs a template.
    """
    kind, data, keys, nodes, native = node
    if kind not in _OURS:  # first, and in one go: a cache has a container per layer
        named: Any = {
            key: arrays.get(child.data) if child.kind == "leaf" else build(child, arrays, length, adapter)
            for key, child in zip(keys, nodes, strict=True)
        }
        if adapter.containers is None:
            raise unknown_kind(adapter.framework, kind)
        return adapter.containers.close(kind, named, data, length, native)
    if kind == "keep" and data not in arrays:
        msg = f"leaf {data!r} is no part of the state, so that no cut or join has it; pass like= with a template"
        raise StructureMismatchError(msg)
    if kind in {"leaf", "keep"}:
        return arrays.get(data)  # None where a container has room for a leaf that it does not hold yet
    if kind == "const":
        return _constant(node)
    if kind == "length":
        return length
    children = [
        arrays.get(child.data) if child.kind == "leaf" else build(child, arrays, length, adapter) for child in nodes
    ]
    if kind == "dict":
        return (native or dict)(zip(keys, children, strict=True))
    if kind == "list":
        return children
    if kind == "tuple":
        return tuple(children)
    if native is None:
        msg = f"{kind} {data} cannot be rebuilt from its name alone; pass like= with a fresh one"
        raise StructureMismatchError(msg)
    if kind == "namedtuple":
        return native(*children)
    # Fields are set without __init__, which may compute, validate or allocate: this value has been valid before.
    value = object.__new__(native)
    for key, child in zip(keys, children, strict=True):
        object.__setattr__(value, str(key), child)
    return value


def _constant(node: Node) -> Any:
    if node.native is None and isinstance(node.data, Mapping):
        what = node.data["type"]
        msg = f"a constant of type {what} cannot be rebuilt from its name alone; pass like= with a fresh value"
        raise StructureMismatchError(msg)
    return node.data if node.native is None else node.native


def strip(value: Any, adapter: Adapter) -> list[Array]:
    """Return every array of `adapter`'s framework in `value`, once, and empty the containers of them.

    Lenient, unlike `flatten`: what it does not know it leaves alone. dicts and lists are cleared, fields of dataclasses
    and of the adapter's own containers set to None; tuples cannot be emptied and keep their references.
    """
    found: dict[int, Array] = {}
    _strip(value, adapter, found, set())
    return list(found.values())


def _strip(value: Any, adapter: Adapter, found: dict[int, Array], seen: set[int]) -> None:
    if adapter.is_array(value):
        found[id(value)] = value
        return
    if id(value) in seen or value is None or isinstance(value, str | bytes | int | float | type):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        children: list[Any] = list(value.values())
        value.clear()
    elif isinstance(value, list):
        children = list(value)
        value.clear()
    elif isinstance(value, tuple):
        children = list(value)
    elif (taken := _taken_apart(value, adapter)) is not None:
        children = taken
    elif (names := field_names(value)) is not None:
        children = [getattr(value, name) for name in names]
        for name, child in zip(names, children, strict=True):
            if not isinstance(child, str | bytes | int | float | type | None):
                object.__setattr__(value, name, None)
    else:
        return
    for child in children:
        _strip(child, adapter, found, seen)


def _taken_apart(value: object, adapter: Adapter) -> list[Any] | None:
    """The children of a container of the framework's own, which is emptied where its adapter knows how."""
    if isinstance(adapter, SupportsEmptying):
        return adapter.take_apart(value)
    opened = adapter.containers.open(value) if adapter.containers is not None else None
    return None if opened is None else list(opened.children.values())
