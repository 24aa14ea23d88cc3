"""Which adapter serves a value: none is loaded before its framework is."""

import dataclasses
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_memory import HostMemory

from agnostic_cache.arrays import registry as registries
from agnostic_cache.arrays.registry import (
    Registry,
    adapter_for,
    adapter_named,
    register_adapter,
    unregister_adapter,
)
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
torch = shelved_broken_adapter:adapter
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


class Mine(HostMemory):
    framework = "mine"


def test_one_may_be_registered_by_hand() -> None:
    registry, mine = Registry(), Mine()
    registry.register("mine", mine)
    assert registry.named("mine") is mine
    assert registry.of(mine.array(64)) is mine  # the most derived
    again = Mine()
    registry.register("mine", again)
    assert registry.named("mine") is again
    assert adapter_for(mine.array(64)).framework != "mine"  # another registry


def test_what_was_registered_by_hand_may_be_taken_back() -> None:
    register_adapter("mine", Mine())
    unregister_adapter("mine")
    for unknown in ("mine", "host"):
        with pytest.raises(MissingAdapterError):
            unregister_adapter(unknown)
    with pytest.raises(MissingAdapterError):
        adapter_named("mine")
    assert adapter_for(HostMemory().array(64)).framework == adapter_named("host").framework == "host"


def test_one_that_is_registered_by_hand_hides_the_one_of_its_name_until_it_is_taken_back() -> None:
    registry, mine = Registry(), Mine()
    registry.register("shelved", mine)
    __import__("shelved")
    with pytest.raises(UnknownValueError):
        registry.of(array())
    assert "shelved_adapters" not in sys.modules
    registry.unregister("shelved")
    found = registry.of(array())
    registry.register("shelved", mine)
    registry.offer("shelved", found)
    assert registry.named("shelved") is mine
    registry.unregister("shelved")
    assert registry.of(array()) is found


def test_a_module_that_offers_its_adapter_needs_no_entry_point() -> None:
    registry, mine = Registry(), Mine()
    registry.offer("mine", mine)
    assert registry.named("mine") is registry.of(mine.array(64)) is mine


def test_an_entry_point_replaces_no_adapter_of_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = sys.modules.get("agnostic_cache_adapters.torch", types.SimpleNamespace(adapter=Mine()))
    monkeypatch.setitem(sys.modules, "agnostic_cache_adapters.torch", loaded)
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch", types.ModuleType("torch")))
    assert loaded.adapter in Registry().adapters()


def test_of_two_packages_with_one_name_the_first_on_the_path_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "first" / "first-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: first\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[agnostic_cache.adapters]\nshelved = shelved_adapters:Derived\n")
    monkeypatch.syspath_prepend(info.parent)
    assert type(Registry().named("shelved")).__name__ == "Derived"


@pytest.mark.parametrize("error", [ImportError, KeyError, OSError, UnicodeDecodeError("utf-8", b"", 0, 1, "x")])
def test_metadata_that_cannot_be_read_is_no_metadata(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception] | Exception
) -> None:
    def fail(**_: str) -> None:
        raise error

    monkeypatch.setattr("importlib.metadata.entry_points", fail)
    assert Registry().named("host").framework == "host"
    assert len(caplog.records) == 1


def test_an_error_names_the_type_that_no_adapter_knows() -> None:
    @dataclasses.dataclass
    class Record:
        config: object
        held: object

    __import__("shelved_more")
    registry = Registry()
    registry.register("shelved", Mine())  # so that nothing knows its arrays
    registry.register("shelved_more", Mine())
    shaped = type("Shaped", (), {"shape": (), "__module__": "elsewhere"})()
    for value in (array(), [array()], {"a": [None, {"b": (array(),)}]}, OrderedDict(a=Record(None, [array()]))):
        with pytest.raises(UnknownValueError, match=r"shelved\.Array.*register"):
            registry.of(value)
    with pytest.raises(UnknownValueError, match=r"elsewhere\.Shaped"):  # rather than what comes before it
        registry.of([Record(object(), "x"), shaped])
    with pytest.raises(UnknownValueError, match=r"builtins\.dict holds no array"):
        registry.of({"a": [], "b": None})


def test_an_error_tells_how_to_get_an_adapter_of_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "OWN_ADAPTERS", {"shelved_own": "no_such_module.shelved_own"})
    monkeypatch.setitem(sys.modules, "shelved_own", types.ModuleType("shelved_own"))
    value = type("Tensor", (), {"__module__": "shelved_own.sub"})()
    with pytest.raises(
        UnknownValueError, match=r"shelved_own\.sub\.Tensor.*agnostic-cache\[shelved_own\].*no_such_module"
    ):
        Registry().of({"x": value})
    monkeypatch.delitem(sys.modules, "shelved_own")
    with pytest.raises(MissingAdapterError, match=r"agnostic-cache\[shelved_own\]"):
        Registry().named("shelved_own")
