"""HostArray: an array in host memory that needs no framework.

Memory is one private anonymous mapping per block of arrays, so that it goes back to the system when the block's last
array dies (measured: small allocations freed one by one gave back nothing). Every array starts on a 64-byte boundary,
because JAX copies what is not aligned so.
"""

import math
import mmap
from collections.abc import Iterable, Sequence

from agnostic_cache.arrays.dtypes import Dtype

ALIGNMENT = 64
_HUGE_PAGE = 2 * 1024 * 1024


def aligned(nbytes: int) -> int:
    """Round a size up to the alignment of arrays in a block."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def row_major_bytes(shape: Sequence[int], dtype: Dtype) -> int:
    """Bytes of a compact array of this shape."""
    return math.prod(shape) * dtype.itemsize


def anonymous_mapping(nbytes: int) -> mmap.mmap:
    """Allocate zeroed memory that goes back to the system when the last view of it dies."""
    mapping = mmap.mmap(-1, max(nbytes, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)  # measured: filling 256 MB falls from 180 ms to 95 ms
    return mapping


class HostArray:
    """A row-major array in host memory: a shape, a dtype and its bytes. No arithmetic.

    Attributes:
        shape: Extents.
        dtype: Element type.
        memory: The bytes, a flat ``"B"`` view of ``prod(shape) * dtype.itemsize`` bytes; keeps its block alive. It may
            be read-only where the array borrows a framework's memory.
        block: Identity and size of the physical block that `memory` lies in: ``(key, nbytes)``.
    """

    __slots__ = ("block", "dtype", "memory", "shape")

    def __init__(self, shape: Sequence[int], dtype: Dtype, memory: memoryview, block: tuple[int, int]) -> None:
        """Borrow `memory` as an array; see `empty_block` for new memory.

        Args:
            shape: Extents.
            dtype: Element type.
            memory: A flat view in format ``"B"`` of exactly the array's bytes.
            block: Physical identity and size, as in the attribute.

        Raises:
            ValueError: `memory` is not of that size.
        """
        if memory.nbytes != row_major_bytes(shape, dtype):
            expected = row_major_bytes(shape, dtype)
            msg = f"memory of {memory.nbytes} bytes cannot be {dtype} {tuple(shape)}: that takes {expected} bytes"
            raise ValueError(msg)
        self.shape = tuple(shape)
        self.dtype = dtype
        self.memory = memory
        self.block = block

    @property
    def nbytes(self) -> int:
        """Bytes of the elements (the block may be larger)."""
        return self.memory.nbytes

    @classmethod
    def empty_block(cls, specs: Iterable[tuple[Sequence[int], Dtype]]) -> list["HostArray"]:
        """Allocate several arrays, zeroed, in one mapping.

        Args:
            specs: Shape and dtype of each array.

        Returns:
            One array per spec, in order; the memory goes back to the system when the last of them dies.
        """
        wanted = list(specs)
        offsets, total = [], 0
        for shape, dtype in wanted:
            offsets.append(total)
            total += aligned(row_major_bytes(shape, dtype))
        mapping = anonymous_mapping(total)
        whole = memoryview(mapping)
        block = (id(mapping), total)  # unique while any of the arrays keeps the mapping alive
        return [
            cls(shape, dtype, whole[offset : offset + row_major_bytes(shape, dtype)], block)
            for (shape, dtype), offset in zip(wanted, offsets, strict=True)
        ]

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Dtype) -> "HostArray":
        """Allocate one zeroed array in a mapping of its own."""
        return cls.empty_block([(shape, dtype)])[0]

    def __repr__(self) -> str:
        """Show shape, dtype and size; never the contents."""
        return f"HostArray(shape={self.shape}, dtype={self.dtype}, nbytes={self.nbytes})"


def copy_rows(target: HostArray, at: int, source: HostArray, start: int, stop: int, axis: int) -> None:
    """Copy rows ``[start, stop)`` of `source` along `axis` to rows ``[at, at + stop - start)`` of `target`.

    Both have the same dtype and the same extents but for `axis`. One memcpy per run of adjacent bytes.
    """
    inner = math.prod(source.shape[axis + 1 :]) * source.dtype.itemsize
    source_run, target_run = source.shape[axis] * inner, target.shape[axis] * inner
    size, source_at, target_at = (stop - start) * inner, start * inner, at * inner
    for _ in range(math.prod(source.shape[:axis]) if size else 0):
        target.memory[target_at : target_at + size] = source.memory[source_at : source_at + size]
        source_at += source_run
        target_at += target_run
