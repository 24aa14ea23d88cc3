"""Which adapter serves a value: by type, lazily, and only where its framework is already imported.

An adapter is an entry point of the group ``agnostic_cache.adapters`` whose name is the top-level module of what it
adapts. It is loaded once that module is in ``sys.modules``: a value of a framework cannot exist before. Where several
loaded adapters know a value, the most derived class wins (transformers over torch, flax over jax).
"""

import sys
from collections import OrderedDict
from typing import TYPE_CHECKING

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.records import field_names
from agnostic_cache.errors import MissingAdapterError, UnknownValueError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

GROUP = "agnostic_cache.adapters"
_SCALARS = (str, bytes, int, float)


class Registry:
    """The adapters of this process. Reads entry points on the first value that it does not know yet."""

    def __init__(self) -> None:
        """Start with the host adapter alone."""
        self._loaded: dict[str, Adapter] = {"host": HostAdapter()}
        self._ranked: list[Adapter] = list(self._loaded.values())
        self._waiting: dict[str, EntryPoint] | None = None

    def adapters(self) -> list[Adapter]:
        """Return the adapters whose frameworks are imported, most derived first."""
        if self._waiting is None:
            from importlib import metadata  # noqa: PLC0415 - half the time of importing this package

            self._waiting = {point.name: point for point in metadata.entry_points(group=GROUP)}
        for name in [name for name in self._waiting if name in sys.modules]:
            self._load(name)
        return self._ranked

    def _load(self, name: str) -> None:
        waiting = self._waiting or {}
        point = waiting.get(name)
        if point is None or name in self._loaded:
            return
        loaded = point.load()  # a broken package's own error comes through
        # Publish before forgetting: another thread that misses it among the waiting must find it among the loaded.
        self.register(name, loaded() if isinstance(loaded, type) else loaded)
        waiting.pop(name, None)

    def register(self, name: str, adapter: Adapter) -> None:
        """Add an adapter by hand, in place of one of that name. For tests and notebooks; packages use entry points."""
        self._loaded = {**self._loaded, name: adapter}
        self._ranked = sorted(self._loaded.values(), key=lambda adapter: -len(type(adapter).__mro__))

    def named(self, name: str) -> Adapter:
        """Return the best adapter whose entry point or framework is called `name`, importing it where needed.

        Raises:
            MissingAdapterError: There is none, or its framework is not installed.
        """
        ranked = [adapter for adapter in self.adapters() if adapter.framework == name]
        if ranked:
            return ranked[0]
        if self._waiting is not None and name in self._waiting and _is_installed(name):
            self._load(name)
        if name in self._loaded:
            return self._loaded[name]
        known = sorted({*self._loaded, *(self._waiting or ())})
        msg = f"no adapter {name!r} here (known: {', '.join(known)}); pip install 'agnostic-cache[{name}]'"
        raise MissingAdapterError(msg)

    def of(self, value: object) -> Adapter:
        """Return the adapter of the first array or opaque container in `value`.

        Raises:
            UnknownValueError: It holds nothing that a loaded adapter knows.
        """
        adapter = _find(value, self.adapters())
        if adapter is None:
            known = ", ".join(sorted(self._loaded))
            msg = (
                f"no adapter knows {type(value).__module__}.{type(value).__qualname__} (loaded: {known}); "
                "pass arrays of a framework whose extra is installed, or register an adapter for it"
            )
            raise UnknownValueError(msg)
        return adapter


def _find(value: object, ranked: list[Adapter]) -> Adapter | None:
    if value is None or isinstance(value, _SCALARS):
        return None
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        children: Iterable[object] = value.values()  # type: ignore[attr-defined]
    elif kind is list or kind is tuple:
        children = value  # type: ignore[assignment]
    else:
        for adapter in ranked:
            if adapter.is_array(value):
                return adapter
        if isinstance(value, list | tuple):
            children = value
        else:
            for adapter in ranked:
                if adapter.containers is not None and adapter.containers.open(value) is not None:
                    return adapter
            names = field_names(value)
            if names is None:
                return None
            children = (getattr(value, name) for name in names)
    return next((found for child in children if (found := _find(child, ranked)) is not None), None)


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec  # noqa: PLC0415 - as above

    return find_spec(name) is not None


_process = Registry()  # what a process has imported is state of the process: this is its view of sys.modules


def adapter_for(value: object) -> Adapter:
    """Return the adapter of the first array or opaque container in `value`.

    Raises:
        UnknownValueError: It holds nothing that a loaded adapter knows.
    """
    return _process.of(value)


def loaded_adapters() -> list[Adapter]:
    """Return the adapters whose frameworks are imported, most derived first."""
    return _process.adapters()


def adapter_named(name: str) -> Adapter:
    """Return the adapter of a framework by name, importing it where needed.

    Raises:
        MissingAdapterError: There is none, or its framework is not installed.
    """
    return _process.named(name)


def register_adapter(name: str, adapter: Adapter) -> None:
    """Add an adapter by hand for this process; installed packages use the entry-point group instead."""
    _process.register(name, adapter)
