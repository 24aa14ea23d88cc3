"""The adapter of host memory: `HostArray` in, `HostArray` out, standard library only."""

import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, cast

from agnostic_cache.arrays.adapter import Adapter, Array, ArraySpec, Fill, Storage
from agnostic_cache.arrays.host import HostArray, aligned, copy_rows
from agnostic_cache.errors import StructureMismatchError

_ALL = slice(None)


class HostAdapter(Adapter):
    """Keeps states in plain host memory. Freeing drops references: the mapping dies with its last array."""

    framework: ClassVar[str] = "host"

    def is_array(self, value: object) -> bool:
        """See `Adapter.is_array`."""
        return isinstance(value, HostArray)

    def describe(self, array: HostArray) -> ArraySpec:
        """See `Adapter.describe`."""
        return ArraySpec(array.shape, array.dtype, "host")

    def storages(self, array: HostArray) -> Sequence[Storage]:
        """Return the one block that the array lies in."""
        key, nbytes = array.block
        return (Storage(key, nbytes, "host"),)

    def to_host(self, array: HostArray) -> HostArray:
        """Return the array itself."""
        return array

    def from_host(self, host: HostArray) -> HostArray:
        """Return the array itself."""
        return host

    def compact_nbytes(self, arrays: Sequence[HostArray]) -> Mapping[str, int]:
        """Return the size of the one block that `copy_all` allocates, alignment included."""
        return {"host": sum(aligned(array.nbytes) for array in arrays)} if arrays else {}

    def fill_all(self, fills: Sequence[Fill]) -> list[Array]:
        """Write rows in place. Axes keep their order: host memory is for keeping, not for computing.

        Raises:
            StructureMismatchError: The axes of a source and its target are in different orders.
        """
        for fill in fills:
            stacked = any(isinstance(part, int) for part in (*fill.at, *fill.source_at))
            if stacked or list(fill.order) != list(range(len(fill.order))):
                msg = (
                    f"host arrays cannot be stacked or transposed to axes {fill.order}; give the template the "
                    "state's axes"
                )
                raise StructureMismatchError(msg)
        for target, index, source, source_index, _ in fills:
            parts = enumerate(zip(index, source_index, strict=True))
            rows = next((axis for axis, part in parts if part != (_ALL, _ALL)), None)
            if rows is None:
                target.memory[:] = source.memory
            else:
                start, stop, _ = cast("slice", source_index[rows]).indices(source.shape[rows])
                first, _, _ = cast("slice", index[rows]).indices(target.shape[rows])
                copy_rows(target, first, source, start, stop, rows)
        return [fill.target for fill in fills]

    def release(self, arrays: Sequence[Array]) -> int:
        """Drop the references; a block counts as freed where its mapping died with them."""
        blocks = {array.block: _weakly(array.memory.obj) for array in arrays}
        if isinstance(arrays, list):
            arrays.clear()
        return sum(nbytes for (_, nbytes), alive in blocks.items() if alive() is None)


def _weakly(memory: object) -> Callable[[], object | None]:
    if isinstance(memory, mmap.mmap):
        return weakref.ref(memory)
    return lambda: memory  # borrowed from a framework: not ours to free
