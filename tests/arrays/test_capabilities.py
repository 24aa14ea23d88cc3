"""What only some frameworks have is found by the methods that their adapters have."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agnostic_cache import wrap
from agnostic_cache.arrays.adapter import Adapter
from agnostic_cache.arrays.containers import Opened, SupportsContainers, SupportsEmptying, SupportsTemplates
from agnostic_cache.arrays.dlpack import SupportsDLPack
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.models import SupportsModels
from agnostic_cache.arrays.streams import SupportsStreams
from agnostic_cache.errors import StructureMismatchError, UnknownValueError
from agnostic_cache.state.tree import Node, build, strip


class Box:
    def __init__(self, array: HostArray | None) -> None:
        self.array = array


class Boxes(HostAdapter):
    """Knows one container, and has the two methods for that."""

    def open(self, value: object) -> Opened | None:
        return Opened("host.box", {"x": value.array}) if isinstance(value, Box) else None

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:  # noqa: ARG002
        return Box(children["x"])


class Queued(HostAdapter):
    def __init__(self) -> None:
        self.read: list[HostArray] = []

    def is_queued(self, device: str) -> bool:
        return device == "host"

    def mark_read(self, arrays: Sequence[HostArray]) -> None:
        self.read += arrays


def array() -> HostArray:
    return HostArray.empty((4,), Dtype.UINT8)


def test_six_methods_are_abstract() -> None:
    assert {"is_array", "describe", "storages", "to_host", "from_host", "release"} == Adapter.__abstractmethods__


def test_an_adapter_of_arrays_alone_has_no_capability() -> None:
    adapter = HostAdapter()
    every = (
        SupportsContainers, SupportsEmptying, SupportsTemplates, SupportsDLPack, SupportsModels, SupportsStreams,
    )  # fmt: skip
    assert not any(isinstance(adapter, capability) for capability in every)
    assert adapter.containers is None
    assert adapter.streams is None
    state = wrap({"a": array()})
    state.mark_read()
    assert not state.is_queued(["host"])
    with pytest.raises(UnknownValueError):
        wrap([array(), Box(array())], adapter=adapter)
    with pytest.raises(StructureMismatchError):
        build(Node("another.container"), {}, 0, adapter)


def test_two_methods_make_a_container_known() -> None:
    adapter, held = Boxes(), array()
    assert isinstance(adapter, SupportsContainers)
    back = wrap([Box(held)], adapter=adapter).unwrap()
    assert type(back[0]) is Box
    assert back[0].array is held
    assert strip([Box(held)], adapter) == [held]


def test_streams_are_told_what_is_read() -> None:
    adapter, held = Queued(), array()
    state = wrap({"a": held, "b": held}, adapter=adapter)
    assert state.is_queued(["elsewhere", "host"])
    assert not state.is_queued(["elsewhere"])
    state.mark_read()
    assert adapter.read == [held]
