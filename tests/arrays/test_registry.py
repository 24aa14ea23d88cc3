"""Which adapter serves a value: none is loaded before its framework is."""

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_memory import HostMemory

from agnostic_cache.arrays.registry import Registry, adapter_for, adapter_named
from agnostic_cache.errors import MissingAdapterError, UnknownValueError

FRAMEWORK = "class Array: ...\nclass Special(Array): ..."
ADAPTERS = """
import shelved
from agnostic_cache.arrays.host_adapter import HostAdapter

class Adapter(HostAdapter):
    framework = "shelved"
    def is_array(self, value): return isinstance(value, shelved.Array)

class Derived(Adapter):
    pass

adapter = Adapter()
"""
POINTS = """
[agnostic_cache.adapters]
shelved = shelved_adapters:adapter
shelved_more = shelved_adapters:Derived
no_such_framework = shelved_adapters:adapter
shelved_broken = shelved_broken_adapter:adapter
"""
NAMES = ("shelved", "shelved_more", "shelved_adapters", "shelved_broken", "shelved_broken_adapter")


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a framework, one that builds on it, and their adapters, which are entry points of a package."""
    (tmp_path / "shelved.py").write_text(FRAMEWORK)
    (tmp_path / "shelved_more.py").write_text("import shelved")
    (tmp_path / "shelved_adapters.py").write_text(ADAPTERS)
    (tmp_path / "shelved_broken.py").write_text("")
    (tmp_path / "shelved_broken_adapter.py").write_text("import no_such_module")
    info = tmp_path / "shelved-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelved\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


def array(kind: str = "Array") -> Any:
    import shelved  # type: ignore[import-not-found]  # noqa: PLC0415 - when a test asks for it

    return getattr(shelved, kind)()


def test_an_adapter_is_loaded_once_its_framework_is() -> None:
    registry = Registry()
    assert [adapter.framework for adapter in registry.adapters()].count("shelved") == 0
    with pytest.raises(UnknownValueError):
        registry.of(object())
    assert "shelved_adapters" not in sys.modules
    assert registry.of(array()).framework == "shelved"
    assert registry.of(array()) is sys.modules["shelved_adapters"].adapter


def test_of_several_that_know_a_value_the_most_derived_serves_it() -> None:
    registry = Registry()
    value = array()
    assert type(registry.of(value)).__name__ == "Adapter"
    __import__("shelved_more")
    assert type(registry.of(value)).__name__ == type(registry.named("shelved")).__name__ == "Derived"


def test_a_value_is_searched_for_its_first_array() -> None:
    @dataclasses.dataclass
    class Record:
        name: str
        value: object

    registry = Registry()
    found = registry.of(array())
    host = HostMemory().array(64)
    for value in (
        [1, "x", None, array()],
        (b"x", {"a": array()}),
        OrderedDict(a=[array("Special")]),
        Record("x", [array()]),
    ):
        assert registry.of(value) is found
    assert registry.of({"a": [], "b": [host], "c": array()}).framework == "host"
    for nothing in (None, 1, "x", b"x", [], {}, {"a": [None, 1.5]}, object(), Record, Record("x", 3), type):
        with pytest.raises(UnknownValueError):
            registry.of(nothing)


def test_an_adapter_that_is_asked_for_by_name_brings_its_framework() -> None:
    registry = Registry()
    assert registry.named("host").framework == "host"
    assert registry.named("shelved").framework == "shelved"
    assert "shelved" in sys.modules


@pytest.mark.parametrize("name", ["no_such_framework", "nobody_adapts_this"])
def test_a_missing_adapter_names_the_extra_to_install(name: str) -> None:
    with pytest.raises(MissingAdapterError, match=rf"agnostic-cache\[{name}\]"):
        Registry().named(name)
    with pytest.raises(MissingAdapterError):
        adapter_named(name)


def test_the_error_of_a_broken_adapter_comes_through() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Registry().named("shelved_broken")
    __import__("shelved_broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Registry().of(object())


def test_one_may_be_registered_by_hand() -> None:
    class Mine(HostMemory):
        framework = "mine"

    registry, mine = Registry(), Mine()
    registry.register("mine", mine)
    assert registry.named("mine") is mine
    assert registry.of(mine.array(64)) is mine  # the most derived
    again = Mine()
    registry.register("mine", again)
    assert registry.named("mine") is again
    assert adapter_for(mine.array(64)).framework != "mine"  # another registry
