"""ArraySuite: the Adapter contract, one array at a time."""

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.arrays.registry import adapter_for
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache.testing.grid import concat, pattern
from agnostic_cache.testing.subject import Subject

SHAPE = (2, 5, 3)


class ArraySuite(Subject):
    """What an adapter says of arrays, and does to them."""

    def test_an_array_is_known_by_its_type(self) -> None:
        array = self.make(SHAPE, Dtype.FLOAT32, 0)
        assert self.adapter.is_array(array)
        assert adapter_for(array).framework == adapter_for([{"a": (array,)}]).framework == self.framework
        assert not any(self.adapter.is_array(other) for other in (None, 1, "a", [array], {"a": array}, object()))

    def test_describe_tells_shape_dtype_and_device(self, dtype: Dtype) -> None:
        for shape in ((), (1,), (0, 3), SHAPE):
            spec = self.adapter.describe(self.make(shape, dtype, 0))
            assert (spec.shape, spec.dtype) == (shape, dtype)
            assert isinstance(spec.shape, tuple)
            assert spec.device

    def test_seeds_make_different_arrays(self, dtype: Dtype) -> None:
        assert self.values(self.make(SHAPE, dtype, 0)) != self.values(self.make(SHAPE, dtype, 1))

    def test_storages_hold_the_elements(self, dtype: Dtype) -> None:
        one, other = self.make(SHAPE, dtype, 0), self.make(SHAPE, dtype, 0)
        held = self.adapter.storages(one)
        assert sum(storage.nbytes for storage in held) >= self.adapter.describe(one).nbytes
        assert {storage.device for storage in held} == {self.adapter.describe(one).device}
        assert [storage.key for storage in self.adapter.storages(one)] == [storage.key for storage in held]
        assert not {storage.key for storage in held} & {storage.key for storage in self.adapter.storages(other)}

    def test_a_view_keeps_the_whole_storage_alive(self, dtype: Dtype) -> None:
        view = self.make_view(SHAPE, dtype, 0)
        if view is not None:
            assert sum(s.nbytes for s in self.adapter.storages(view)) > self.adapter.describe(view).nbytes

    def test_host_bytes_are_the_elements_in_order(self, dtype: Dtype) -> None:
        for name, array in {"plain": self.make(SHAPE, dtype, 0), **self.odd_arrays(dtype)}.items():
            host = self.adapter.to_host(array)
            assert (host.shape, host.dtype) == self.adapter.describe(array)[:2], name
            assert bytes(host.memory) == self.values(array), name

    def test_arrays_are_made_from_host_bytes(self, dtype: Dtype) -> None:
        for shape in ((), (1,), (0, 3), SHAPE):
            host = HostArray.empty(shape, dtype)
            host.memory[:] = pattern(shape, dtype, 0)
            array = self.adapter.from_host(host)
            assert self.adapter.is_array(array)
            assert self.adapter.describe(array)[:2] == (shape, dtype)
            assert self.values(array) == pattern(shape, dtype, 0)

    def test_copies_are_equal_compact_and_independent(self, dtype: Dtype) -> None:
        adapter = self.adapter
        arrays = [self.make(SHAPE, dtype, 0), *self.odd_arrays(dtype).values()]
        specs, expected = [adapter.describe(array) for array in arrays], [self.values(array) for array in arrays]
        before = {storage.key for array in arrays for storage in adapter.storages(array)}
        promised = adapter.compact_nbytes(arrays)
        copies = adapter.copy_all(arrays)
        held = {storage.key: storage for copy in copies for storage in adapter.storages(copy)}
        assert not before & set(held)
        assert sum(storage.nbytes for storage in held.values()) == sum(promised.values())
        assert sum(promised.values()) <= sum(_padded(spec.nbytes) for spec in specs)
        for array in arrays:
            self.spoil(array)
        assert [self.values(copy) for copy in copies] == expected
        assert [adapter.describe(copy) for copy in copies] == specs

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_rows_are_cut_and_concatenated(self, dtype: Dtype, axis: int) -> None:
        adapter = self.adapter
        sources = [self.make(SHAPE, dtype, 0)]
        if (view := self.make_view(SHAPE, dtype, 1)) is not None:
            sources.append(view)
        grids = [self.grid(source) for source in sources]
        ranges = [(0, 1), (1, 1), (1, SHAPE[axis])]
        pieces = adapter.cut_all([(source, axis, *ends) for source in sources for ends in ranges])
        wanted = [grid.take(axis, *ends) for grid in grids for ends in ranges]
        whole = [pieces[i : i + 3] for i in range(0, len(pieces), 3)]
        joined = adapter.concat_all([(parts, axis) for parts in whole])
        alone = adapter.concat_all([(parts[2:], axis) for parts in whole])
        for source in sources:
            self.spoil(source)
        assert [self.grid(piece) for piece in pieces] == wanted
        for piece in pieces:
            self.spoil(piece)
        assert [self.grid(array) for array in joined] == [concat([grid], axis) for grid in grids]
        assert [self.grid(array) for array in alone] == wanted[2::3]

    def test_counters_are_read_and_rewritten(self) -> None:
        adapter = self.adapter
        for shape in ((), (1,), (3,)):
            like = self.make(shape, Dtype.INT32, 0)
            counter = adapter.with_counter(like, 70_000)
            assert adapter.describe(counter) == adapter.describe(like)
            assert adapter.counter(counter) == 70_000
        assert adapter.counter(adapter.concat_all([([counter, adapter.with_counter(counter, 3)], 0)])[0]) is None

    def test_an_array_stays_on_its_device(self) -> None:
        array = self.make(SHAPE, Dtype.FLOAT32, 0)
        expected = self.values(array)
        placed = self.adapter.place(array, self.adapter.describe(array).device)
        assert self.adapter.describe(placed) == self.adapter.describe(array)
        assert self.values(placed) == expected

    def test_an_unknown_device_is_refused(self) -> None:
        with pytest.raises(StructureMismatchError):
            self.adapter.place(self.make(SHAPE, Dtype.FLOAT32, 0), "no such device")

    def test_release_counts_what_it_frees_once(self) -> None:
        adapter = self.adapter
        before = self.live_bytes()
        arrays = adapter.copy_all([self.make(SHAPE, Dtype.FLOAT32, seed) for seed in range(3)])
        held = {storage.key: storage.nbytes for array in arrays for storage in adapter.storages(array)}
        assert adapter.release(arrays) == sum(held.values()) > 0
        assert arrays == []
        assert adapter.release(arrays) == 0
        assert self.live_bytes() == before

    def test_a_checksum_finds_a_writer(self) -> None:
        one, same, other = (self.make(SHAPE, Dtype.FLOAT32, seed) for seed in (0, 0, 1))
        assert self.adapter.checksum(one) == self.adapter.checksum(same) != self.adapter.checksum(other)
        assert not self.adapter.is_deleted(one)


def _padded(nbytes: int) -> int:
    """A compact copy may round each array up to 64 bytes."""
    return -(-nbytes // 64) * 64
