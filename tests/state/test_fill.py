"""Containers that grow and never write in place: they share what nobody writes, and get copies of the rest."""

from collections.abc import Mapping
from typing import Any

import pytest

from agnostic_cache import KVState, wrap
from agnostic_cache.arrays.containers import Opened
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.host_adapter import HostAdapter
from agnostic_cache.arrays.registry import register_adapter
from agnostic_cache.arrays.roles import TOKENS, Hint
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.state.kv_state import Ownership


class Rows:
    def __init__(self, array: HostArray | None = None, *, frozen: bool = True) -> None:
        self.array, self.frozen = array, frozen


class Growing(HostAdapter):
    framework = "growing"

    def is_array(self, value: object) -> bool:
        return type(value) is Array

    def from_host(self, host: HostArray) -> "Array":
        return Array(host.shape, host.dtype, host.memory, host.block)

    def open(self, value: object) -> Opened | None:
        if not isinstance(value, Rows):
            return None
        hints = {"x": Hint(TOKENS(0), ("tokens",), frozen=value.frozen)}
        return Opened("growing.rows", {"x": value.array}, value.frozen, hints)

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:  # noqa: ARG002
        return Rows(children["x"], frozen=data)


class Array(HostArray):
    """What no other adapter takes for its own."""


@pytest.fixture(autouse=True, scope="module")
def growing() -> None:
    register_adapter("growing", Growing())


def rows(*values: int) -> Array:
    made = HostArray.empty((len(values),), Dtype.UINT8)
    made.memory[:] = bytes(values)
    return Array(made.shape, made.dtype, made.memory, made.block)


def test_one_part_is_shared_as_it_is() -> None:
    state = wrap(Rows(rows(1, 2, 3))).copy()
    filled = state.unwrap(like=Rows())
    assert filled.array is state.leaves["x"].array
    assert state.ownership is Ownership.SHARED


def test_a_part_that_its_owner_may_write_is_copied() -> None:
    source = rows(1, 2, 3)
    filled = wrap(Rows(source, frozen=False)).unwrap(like=Rows())
    assert bytes(filled.array.memory) == bytes(source.memory)
    assert filled.array.block != source.block


def test_parts_adjoin_in_their_order() -> None:
    parts = [wrap(Rows(rows(*values))) for values in ((1, 2), (), (3,), (4, 5))]
    assert bytes(KVState.fill(parts, Rows()).array.memory) == bytes([1, 2, 3, 4, 5])
    assert bytes(KVState.fill(parts, Rows(rows(9, 9))).array.memory) == bytes([1, 2, 3, 4, 5])


def test_a_container_that_is_empty_in_the_state_stays_empty() -> None:
    state = wrap([Rows(rows(1)), Rows()])
    assert state.unwrap(like=[Rows(), Rows()])[1].array is None
    with pytest.raises(StructureMismatchError):
        wrap([Rows(rows(1))]).unwrap(like=[Rows(), Rows()])
