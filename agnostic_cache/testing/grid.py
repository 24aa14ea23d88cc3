"""Grid: an array of opaque items, slow and obvious. What an adapter does is held against it."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple, Self

from agnostic_cache.arrays.dtypes import Dtype


def pattern(shape: Sequence[int], dtype: Dtype, seed: int) -> bytes:
    """Return the row-major bytes of an array of this shape: finite numbers, true bools, unlike those of other seeds.

    >>> len(pattern((2, 3), Dtype.FLOAT16, seed=1))
    12
    """
    mask = {Dtype.BOOL: 0x01, Dtype.INT4: 0x07, Dtype.UINT4: 0x0F}.get(dtype, 0x3F)  # 0x3F: no float of it is NaN
    source = random.Random(f"{seed} {dtype} {tuple(shape)}")  # noqa: S311 - data, not secrets
    return bytes(byte & mask for byte in source.randbytes(math.prod(shape) * dtype.itemsize))


class Grid(NamedTuple):
    """Items by position.

    Attributes:
        shape: Extents.
        items: The bytes of each item, row-major.
    """

    shape: tuple[int, ...]
    items: tuple[bytes, ...]

    @classmethod
    def of(cls, data: bytes, shape: Sequence[int], itemsize: int) -> Self:
        """Read row-major bytes."""
        return cls(tuple(shape), tuple(data[i : i + itemsize] for i in range(0, len(data), itemsize)))

    def take(self, axis: int, start: int, stop: int) -> "Grid":
        """Return rows ``[start, stop)`` along `axis`."""
        kept = [item for at, item in self._places() if start <= at[axis] < stop]
        return Grid((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), tuple(kept))

    def rows(self, axis: int) -> list["Grid"]:
        """Return each row along `axis`, without that axis."""
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        return [Grid(shape, self.take(axis, i, i + 1).items) for i in range(self.shape[axis])]

    def transpose(self, order: Sequence[int]) -> "Grid":
        """Return the axes in another order."""
        moved = {tuple(at[axis] for axis in order): item for at, item in self._places()}
        shape = tuple(self.shape[axis] for axis in order)
        return Grid(shape, tuple(moved[at] for at in itertools.product(*map(range, shape))))

    def _places(self) -> list[tuple[tuple[int, ...], bytes]]:
        return list(zip(itertools.product(*map(range, self.shape)), self.items, strict=True))


def stack(grids: Sequence[Grid], axis: int) -> Grid:
    """Put grids of one shape on top of each other, along a new axis."""
    first = Grid((len(grids), *grids[0].shape), tuple(item for grid in grids for item in grid.items))
    order = list(range(1, len(first.shape)))
    order.insert(axis, 0)
    return first.transpose(order)


def concat(grids: Sequence[Grid], axis: int) -> Grid:
    """Put grids behind each other along `axis`."""
    rows = [row for grid in grids for row in grid.rows(axis)]
    return stack(rows, axis) if rows else grids[0]
