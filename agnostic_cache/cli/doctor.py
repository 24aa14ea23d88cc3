"""``agnostic-cache doctor``: what works here, what is missing, and the command that installs it."""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.own_adapters import OWN_ADAPTERS
from agnostic_cache.arrays.registry import GROUP as ADAPTERS
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.entry_points import entry_points
from agnostic_cache.errors import AgnosticCacheError
from agnostic_cache.storage.registry import GROUP as STORAGES
from agnostic_cache.version import __version__

# What each extra of a storage is for, and the module that it brings.
_EXTRAS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "xxhash": ("xxhash", "checksums at three times the speed"),
    "zstd": ("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "file:// with compress="),
    "redis": ("redis", "redis:// rediss:// redis+unix:// redis+cluster://"),
})  # fmt: skip


class _Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: str
    fix: str = ""


def doctor() -> None:
    """Tell which adapters and storages work here, on which devices, in which versions."""
    console = Console()
    console.print(f"agnostic-cache {__version__}, Python {platform.python_version()}, "
                  f"{platform.platform()}", highlight=False)  # fmt: skip
    table = Table("", "", "what to do")
    for finding in (*_adapters(), *_storages()):
        table.add_row(*finding)
    console.print(table)


def _adapters() -> list[_Finding]:
    names = sorted({*OWN_ADAPTERS, *entry_points(ADAPTERS)})
    return [_Finding("adapter host", "works"), *map(_adapter, names)]


def _adapter(name: str) -> _Finding:
    """Take an array there and back."""
    if find_spec(name) is None:
        return _Finding(f"adapter {name}", "not installed", f"pip install 'agnostic-cache\\[{name}]'")
    try:
        adapter = adapter_named(name)
        sent = HostArray.empty((64,), Dtype.BFLOAT16)
        sent.memory[:] = bytes(range(128))
        array = adapter.from_host(sent)
        device, back = adapter.describe(array).device, adapter.to_host(array)
    except (AgnosticCacheError, ImportError) as error:
        return _Finding(f"adapter {name} {_version(name)}", f"broken: {error}", "see that its versions fit together")
    state = f"works, on {device}" if back.memory == sent.memory else "broken: other bytes came back"
    return _Finding(f"adapter {name} {_version(name)}", state)


def _storages() -> list[_Finding]:
    found = [_Finding("storage memory:// file://", "works")]
    for extra, (module, purpose) in _EXTRAS.items():
        if _is_there(module):
            found.append(_Finding(f"{extra} {_version(module)}", f"installed: {purpose}"))
        else:
            found.append(_Finding(extra, f"not installed: {purpose}", f"pip install 'agnostic-cache\\[{extra}]'"))
    return found + [_Finding(f"storage {name}://", point.value) for name, point in entry_points(STORAGES).items()]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _version(module: str) -> str:
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return ""
