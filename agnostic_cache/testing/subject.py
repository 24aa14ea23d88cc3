"""Subject: what the suites ask of the framework that is tested."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from agnostic_cache.arrays.adapter import Adapter, Array
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.registry import adapter_named
from agnostic_cache.arrays.roles import TOKENS, WINDOW
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.testing.grid import Grid


class Subject(ABC):
    """Makes and reads arrays by the framework's own means, never by those of the adapter that is tested.

    Attributes:
        framework: Name of the framework; its adapter is registered, by entry point or by hand.
        dtypes: What it must keep. A test that takes ``dtype`` runs once for each.
        transposes: Whether `KVState.unwrap` can write into templates whose axes are in another order, or stacked.
    """

    framework: ClassVar[str]
    dtypes: ClassVar[Sequence[Dtype]] = (
        Dtype.FLOAT32,
        Dtype.FLOAT16,
        Dtype.BFLOAT16,
        Dtype.FLOAT8_E4M3FN,
        Dtype.FLOAT8_E5M2,
        Dtype.INT8,
        Dtype.INT32,
        Dtype.BOOL,
    )
    transposes: ClassVar[bool] = True

    @abstractmethod
    def make(self, shape: Sequence[int], dtype: Dtype, seed: int) -> Array:
        """Return a new array; `pattern` gives bytes for it. Other seeds, other elements."""

    @abstractmethod
    def values(self, array: Array) -> bytes:
        """Return the elements of `array`, row-major."""

    @abstractmethod
    def spoil(self, array: Array) -> None:
        """Do the worst that somebody who holds `array` may do: overwrite each element, or delete it."""

    def make_view(self, shape: Sequence[int], dtype: Dtype, seed: int) -> Array | None:  # noqa: ARG002
        """Return an array of larger memory that is not contiguous, or None where the framework has no views."""
        return None

    def make_unaligned(self, shape: Sequence[int], dtype: Dtype, seed: int) -> Array | None:  # noqa: ARG002
        """Return an array that starts at an odd multiple of its item size, or None where there is no such thing."""
        return None

    def live_bytes(self) -> int | None:
        """Return the bytes of all arrays that live in this process, as the framework sees them, or None."""
        return None

    # --- what the suites build with these ----------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that takes ``dtype`` once for each of `dtypes`."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    @property
    def adapter(self) -> Adapter:
        """The adapter that is tested."""
        return adapter_named(self.framework)

    def grid(self, array: Array) -> Grid:
        """Read an array."""
        spec = self.adapter.describe(array)
        return Grid.of(self.values(array), spec.shape, spec.dtype.itemsize)

    def grids(self, state: KVState) -> dict[str, Grid]:
        """Read every leaf, as far as it counts: a buffer may have more rows than the state has tokens."""
        return {name: self._counted(state, name) for name in state.leaves}

    def _counted(self, state: KVState, name: str) -> Grid:
        leaf = state.leaves[name]
        grid = self.grid(leaf.array)
        if isinstance(leaf.role, TOKENS):
            return grid.take(leaf.role.axis, 0, state.length // leaf.role.stride)
        if isinstance(leaf.role, WINDOW):
            return grid.take(leaf.role.axis, 0, min(grid.shape[leaf.role.axis], state.length - leaf.first))
        return grid

    def odd_arrays(self, dtype: Dtype) -> dict[str, Array]:
        """Return arrays that are easily got wrong."""
        arrays = {
            "no elements": self.make((2, 0, 3), dtype, 1),
            "no axes": self.make((), dtype, 2),
            "extents of one": self.make((1, 5, 1), dtype, 3),
            "a view": self.make_view((2, 5, 3), dtype, 4),
            "unaligned": self.make_unaligned((2, 5, 3), dtype, 5),
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def kv(self, rows: int, dtype: Dtype = Dtype.FLOAT32, seed: int = 0) -> dict[str, Any]:
        """Return a cache of two layers, keys and values (batch 2, tokens, heads 2, dim 3); see `KV`."""
        shape = (2, rows, 2, 3)
        return {
            "layers": [
                {"key": self.make(shape, dtype, seed + 2 * i), "value": self.make(shape, dtype, seed + 2 * i + 1)}
                for i in range(2)
            ]
        }

    def arrays_of(self, kv: Mapping[str, Any]) -> list[Array]:
        """Return the arrays of `kv` in its order."""
        return [array for layer in kv["layers"] for array in layer.values()]


KV = KVLayout({"layers.{i}.key": TOKENS(1), "layers.{i}.value": TOKENS(1)})
"""The layout of `Subject.kv`."""
