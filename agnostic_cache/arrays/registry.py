"""Which adapter serves a value: by type, lazily, and only where its framework is already imported.

The project's own adapters stand in the table `OWN_ADAPTERS`, those of third parties are entry points of the group
``agnostic_cache.adapters``; both under the top-level module of what they adapt. An adapter is imported once that module
is in ``sys.modules``: a value of a framework cannot exist before. A module of an adapter that is imported by itself
offers its adapter, so that nothing has to be found. Where several adapters know a value, the most derived class wins
(transformers over torch, flax over jax).
"""

import sys
from collections import OrderedDict
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.own_adapters import OWN_ADAPTERS
from agnostic_cache.arrays.records import field_names
from agnostic_cache.entry_points import entry_points
from agnostic_cache.errors import MissingAdapterError, UnknownValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

GROUP = "agnostic_cache.adapters"
_SCALARS = (str, bytes, int, float)
_FRAMEWORKS = {"jaxlib": "jax"}  # package that the type of an array comes from, where it is another
_VENDOR = __name__.removesuffix("agnostic_cache.arrays.registry")  # "vendor." where both packages are copied to vendor/


class Registry:
    """The adapters of this process. Reads entry points when it is first asked for an adapter."""

    def __init__(self) -> None:
        """Start with the host adapter alone."""
        self._found: dict[str, Adapter] = {"host": HostAdapter()}
        self._registered: dict[str, Adapter] = {}  # by hand; each hides what was found under its name
        self._ranked: list[Adapter] = list(self._found.values())
        self._waiting: dict[str, Callable[[], Any]] | None = None

    def adapters(self) -> list[Adapter]:
        """Return the adapters whose frameworks are imported, most derived first."""
        if self._waiting is None:
            third_parties = {name: point.load for name, point in entry_points(GROUP).items()}
            own = {name: partial(_load_own, module) for name, module in OWN_ADAPTERS.items()}
            self._waiting = {**third_parties, **own}  # an installed package replaces none of ours by its mere presence
        for name in [name for name in self._waiting if name in sys.modules]:
            self._load(name)
        return self._ranked

    def _load(self, name: str) -> None:
        waiting = self._waiting or {}
        load = waiting.get(name)
        if load is None or name in self._registered:
            return
        if name not in self._found:
            loaded = load()  # a broken package's own error comes through
            # Publish before forgetting: another thread that misses it among the waiting must find it among the found.
            if loaded is not None:
                self.offer(name, loaded() if isinstance(loaded, type) else loaded)
        waiting.pop(name, None)

    def offer(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, but for those registered by hand, which keep their names."""
        self._found = {**self._found, name: adapter}
        self._rank()

    def register(self, name: str, adapter: Adapter) -> None:
        """Add an adapter by hand, in place of one of that name."""
        self._registered = {**self._registered, name: adapter}
        self._rank()

    def unregister(self, name: str) -> None:
        """Undo `register`.

        Raises:
            MissingAdapterError: None was registered by hand under that name.
        """
        if name not in self._registered:
            msg = f"no adapter is registered by hand as {name!r} (registered: {', '.join(self._registered) or 'none'})"
            raise MissingAdapterError(msg)
        self._registered = {other: adapter for other, adapter in self._registered.items() if other != name}
        self._rank()

    def _by_name(self) -> dict[str, Adapter]:
        return {**self._found, **self._registered}

    def _rank(self) -> None:
        self._ranked = sorted(self._by_name().values(), key=lambda adapter: -len(type(adapter).__mro__))

    def named(self, name: str) -> Adapter:
        """Return the best adapter that is called `name`, or whose framework is, importing it where needed.

        Raises:
            MissingAdapterError: There is none, or its framework is not installed.
        """
        ranked = [adapter for adapter in self.adapters() if adapter.framework == name]
        if ranked:
            return ranked[0]
        if self._waiting is not None and name in self._waiting and _is_installed(name):
            self._load(name)
        by_name = self._by_name()
        if name in by_name:
            return by_name[name]
        known = ", ".join(sorted({*by_name, *(self._waiting or ())}))
        msg = f"no adapter {name!r} here (known: {known}); {_how_to_get(name)}"
        raise MissingAdapterError(msg)

    def of(self, value: object) -> Adapter:
        """Return the adapter of the first array or opaque container in `value`.

        Raises:
            UnknownValueError: It holds nothing that a loaded adapter knows.
        """
        adapter = _find(value, self.adapters())
        if adapter is None:
            raise UnknownValueError(_refusal(value, self._by_name()))
        return adapter


def _load_own(module: str) -> object:
    """Import an adapter of this project.

    None where its module is not there, as in a copy of the core alone, and where it builds on a framework that is not:
    who takes tokenizers from transformers needs no torch.
    """
    name = f"{_VENDOR}{module}"
    try:
        return import_module(name).adapter
    except ModuleNotFoundError as error:
        if error.name in OWN_ADAPTERS or f"{name}.".startswith(f"{error.name}."):
            return None
        raise


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
                if adapter.open(value) is not None:
                    return adapter
            names = field_names(value)
            if names is None:
                return None
            children = (getattr(value, name) for name in names)
    return next((found for child in children if (found := _find(child, ranked)) is not None), None)


def _refusal(value: object, known: "Iterable[str]") -> str:
    """Say which type in a value no adapter knows: that of its first array, or of its first other object."""
    unknown = list(_unknown(value))
    if not unknown:
        return f"a value of type {_name(value)} holds no array; put arrays into it"
    array = next((item for item in unknown if hasattr(type(item), "shape")), unknown[0])
    where = "" if array is value else f", which a value of type {_name(value)} holds"
    package = type(array).__module__.partition(".")[0]
    framework = _FRAMEWORKS.get(package, package)
    hint = f"pass arrays of {', '.join(OWN_ADAPTERS)}, or register an adapter for this type"
    if framework in OWN_ADAPTERS and framework not in known:
        hint = _how_to_get(framework)
    return f"no adapter knows {_name(array)}{where} (adapters here: {', '.join(sorted(known))}); {hint}"


def _how_to_get(framework: str) -> str:
    hint = f"pip install 'agnostic-cache[{framework}]'"
    if framework in OWN_ADAPTERS:
        module = f"{_VENDOR}{OWN_ADAPTERS[framework]}"
        hint += f", or in a copy of the sources make {module} importable (it lies in the folder adapters) and import it"
    return hint


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _unknown(value: object) -> "Iterator[object]":
    """Yield what `_find` asks the adapters about, in a value of which no adapter knows anything."""
    if value is None or isinstance(value, _SCALARS):
        return
    if isinstance(value, dict):
        children: Iterable[object] = value.values()
    elif isinstance(value, list | tuple):
        children = value
    elif (names := field_names(value)) is not None:
        children = [getattr(value, name) for name in names]
    else:
        yield value
        return
    for child in children:
        yield from _unknown(child)


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
    """Add an adapter by hand for this process, in place of any other of that name, until `unregister_adapter`.

    For tests and notebooks. A package names its adapter as an entry point, and offers it; see `offer_adapter`.
    """
    _process.register(name, adapter)


def unregister_adapter(name: str) -> None:
    """Undo `register_adapter`: what the table or an entry point has under that name serves again.

    Raises:
        MissingAdapterError: None was registered by hand under that name.
    """
    _process.unregister(name)


def offer_adapter(name: str, adapter: Adapter) -> None:
    """Add the adapter of a module that is being imported; one registered by hand under that name stays.

    The last line of a module with an adapter: importing it is then enough, also where it cannot be found by its entry
    point, as in a frozen program.
    """
    _process.offer(name, adapter)
