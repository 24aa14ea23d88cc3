"""The adapter of host memory keeps the contract of adapters."""

import gc
import mmap
from collections.abc import Iterator, Sequence

import pytest

from agnostic_cache import KVLayout, KVState, wrap
from agnostic_cache.arrays.adapter import Adapter, ArraySpec, Storage
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.registry import adapter_named, register_adapter, unregister_adapter
from agnostic_cache.errors import MixedFrameworksError, StructureMismatchError
from agnostic_cache.state.layout import TOKENS
from agnostic_cache.state.tree import Node, build
from agnostic_cache.testing import AdapterSuite, ArraySuite, ContainerSuite, OwnershipSuite, RowsSuite, pattern
from agnostic_cache.testing.container_suite import Entry, Pair
from agnostic_cache.testing.subject import KV


class TestHostAdapter(AdapterSuite):
    framework = "host"
    dtypes = tuple(Dtype)
    transposes = False

    def make(self, shape: Sequence[int], dtype: Dtype, seed: int) -> HostArray:
        array = HostArray.empty(shape, dtype)
        array.memory[:] = pattern(shape, dtype, seed)
        return array

    def make_unaligned(self, shape: Sequence[int], dtype: Dtype, seed: int) -> HostArray:
        data = pattern(shape, dtype, seed)
        memory = memoryview(bytearray(dtype.itemsize + len(data)))
        array = HostArray(shape, dtype, memory[dtype.itemsize :], (id(memory.obj), memory.nbytes))
        array.memory[:] = data
        return array

    def values(self, array: HostArray) -> bytes:
        return bytes(array.memory)

    def spoil(self, array: HostArray) -> None:
        array.memory[:] = bytes(byte ^ 1 for byte in array.memory)

    def live_bytes(self) -> int:
        gc.collect()
        return sum(dict(array.block for array in gc.get_objects() if type(array) is HostArray).values())

    def make_foreign(self) -> "ByteArray":
        return ByteArray((2,), Dtype.INT8, bytearray(2))

    def foreign_state(self) -> KVState:
        return wrap(self.kv(4), layout=KV).to("bytes")

    def test_the_memory_of_a_block_is_private(self) -> None:
        one, other = HostArray.empty_block([((3,), Dtype.INT8), ((5,), Dtype.FLOAT32)])
        assert isinstance(one.memory.obj, mmap.mmap)
        assert one.block == other.block
        assert one.block[1] == 128  # each array starts on a boundary of 64 bytes
        assert bytes(other.memory) == bytes(20)

    def test_a_block_is_freed_with_its_last_array(self) -> None:
        blocks = HostArray.empty_block([((64,), Dtype.INT8)] * 2)
        kept = blocks.pop()
        adapter = adapter_named("host")
        assert adapter.release(blocks) == 0
        last = [kept]
        del kept
        assert adapter.release(last) == 128

    def test_memory_of_the_wrong_size_is_refused(self) -> None:
        with pytest.raises(ValueError):
            HostArray((3,), Dtype.FLOAT32, memoryview(bytearray(11)), (0, 11))

    def test_repr_shows_no_contents(self) -> None:
        assert "18" not in repr(self.make((2, 3), Dtype.INT8, 0)).replace("int8", "")


class ByteArray:
    """The array of a framework that nobody has heard of."""

    def __init__(self, shape: Sequence[int], dtype: Dtype, data: bytearray) -> None:
        self.shape, self.dtype, self.data = tuple(shape), dtype, data


class ByteAdapter(Adapter):
    """The six methods that a third party must write, and nothing else."""

    framework = "bytes"

    def is_array(self, value: object) -> bool:
        return isinstance(value, ByteArray)

    def describe(self, array: ByteArray) -> ArraySpec:
        return ArraySpec(array.shape, array.dtype, "somewhere")

    def storages(self, array: ByteArray) -> Sequence[Storage]:
        return [Storage(id(array.data), len(array.data), "somewhere")]

    def to_host(self, array: ByteArray) -> HostArray:
        return HostArray(array.shape, array.dtype, memoryview(array.data), (id(array.data), len(array.data)))

    def from_host(self, host: HostArray) -> ByteArray:
        return ByteArray(host.shape, host.dtype, bytearray(host.memory))

    def release(self, arrays: Sequence[ByteArray]) -> int:
        freed = sum(len(array.data) for array in {id(array.data): array for array in arrays}.values())
        if isinstance(arrays, list):
            arrays.clear()
        return freed


@pytest.fixture(autouse=True, scope="module")
def of_bytes() -> Iterator[None]:
    register_adapter("bytes", ByteAdapter())
    yield
    unregister_adapter("bytes")


class TestSixMethods(ArraySuite, ContainerSuite, RowsSuite, OwnershipSuite):
    """What an adapter does not write itself is slow, and right."""

    framework = "bytes"

    def make(self, shape: Sequence[int], dtype: Dtype, seed: int) -> ByteArray:
        return ByteArray(shape, dtype, bytearray(pattern(shape, dtype, seed)))

    def values(self, array: ByteArray) -> bytes:
        return bytes(array.data)

    def spoil(self, array: ByteArray) -> None:
        array.data[:] = bytes(byte ^ 1 for byte in array.data)

    def test_there_are_no_buffers_to_fill(self) -> None:
        state = wrap(self.kv(4), layout=KV)
        before = self.grids(state)
        with pytest.raises(StructureMismatchError):
            state.unwrap(like=self.kv(4))
        assert self.grids(state) == before

    def test_no_layout_can_be_inferred(self) -> None:
        with pytest.raises(StructureMismatchError):
            KVLayout.infer(self.kv, framework="bytes")

    def test_host_arrays_are_another_framework(self) -> None:
        with pytest.raises(MixedFrameworksError):
            wrap([HostArray.empty((1,), Dtype.INT8), self.make((1,), Dtype.INT8, 0)])


def test_a_structure_from_bytes_is_rebuilt_without_any_class() -> None:
    array = HostArray.empty((4, 2), Dtype.INT8)
    state = wrap({"a": [array, (array, 3)], "cache_index": 4, "n": None}, layout=KVLayout({"*": TOKENS(0)}))
    arrays = {name: leaf.array for name, leaf in state.leaves.items()}
    built = build(Node.from_json(state.structure), arrays, 4, state.adapter)
    assert built == {"a": [array, (array, 3)], "cache_index": 4, "n": None}


@pytest.mark.parametrize(
    "part", [Dtype.INT8, Entry(None, None), Pair(None, None)], ids=["enum", "dataclass", "namedtuple"]
)
def test_what_a_structure_from_bytes_cannot_name_is_refused(part: object) -> None:
    state = wrap({"a": HostArray.empty((4, 2), Dtype.INT8), "b": part})
    with pytest.raises(StructureMismatchError):
        build(Node.from_json(state.structure), {"a": state.leaves["a"].array}, 0, state.adapter)
