"""Adapter: what may be done to the arrays of one framework.

Six methods are abstract. The rest have defaults that are right and slow, because they go through host memory: an
adapter overrides what its framework does faster. What only some frameworks have is a Protocol beside this file, and an
adapter has it where it has its methods: containers that are no dict, list, tuple or dataclass (`SupportsContainers`),
models (`SupportsModels`), streams (`SupportsStreams`), an exchange of memory (`SupportsDLPack`).
`agnostic_cache.testing.AdapterSuite` tests all of it.
"""

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from agnostic_cache.arrays.containers import Opened, SupportsContainers, SupportsEmptying, SupportsTemplates
from agnostic_cache.arrays.dlpack import SupportsDLPack
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import ALIGNMENT, HostArray, copy_rows, row_major_bytes
from agnostic_cache.arrays.models import SupportsModels
from agnostic_cache.arrays.streams import SupportsStreams
from agnostic_cache.errors import StructureMismatchError

__all__ = [
    "Adapter",
    "Array",
    "ArraySpec",
    "Fill",
    "Opened",
    "Storage",
    "SupportsContainers",
    "SupportsDLPack",
    "SupportsEmptying",
    "SupportsModels",
    "SupportsStreams",
    "SupportsTemplates",
]

Array = Any
"""An array of the adapter's framework. The core never looks inside."""

_SAMPLES = 64  # pieces of an array that `sample` reads


class ArraySpec(NamedTuple):
    """Shape, element type and device name of an array."""

    shape: tuple[int, ...]
    dtype: Dtype
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of a compact array of this shape."""
        return row_major_bytes(self.shape, self.dtype)


class Storage(NamedTuple):
    """One physical piece of memory that an array keeps alive.

    Attributes:
        key: Equal for two arrays of one framework exactly while they keep the same piece alive.
        nbytes: Its whole size, of which the array may be a small view.
        device: Name of the device that it lies on.
    """

    key: Hashable
    nbytes: int
    device: str


class Fill(NamedTuple):
    """One write of `Adapter.fill_all`: ``target[at] = transpose(source[source_at], order)``.

    Attributes:
        target: The buffer, which the caller gave up.
        at: An int (a layer of a stacked buffer) or a slice per axis of the target.
        source: What to write. Never written.
        source_at: An int or a slice per axis of the source.
        order: Axes of ``source[source_at]`` in the order of ``target[at]``.
    """

    target: Array
    at: tuple[int | slice, ...]
    source: Array
    source_at: tuple[int | slice, ...]
    order: tuple[int, ...]


class Adapter(ABC):
    """The arrays of one framework. Safe to share between threads.

    Attributes:
        framework: Name of the framework, as in `KVState.framework`.
        mutable: Whether arrays can be written in place by whoever holds them (torch: yes; JAX: no).
        forkable: Whether several owners may hold one array: dropping a reference is all that release does to it.
    """

    framework: ClassVar[str]
    mutable: ClassVar[bool] = True
    forkable: ClassVar[bool] = True

    # --- abstract ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def is_array(self, value: object) -> bool:
        """Say whether `value` is an array of this framework. Must be fast, and must not raise."""

    @abstractmethod
    def describe(self, array: Array) -> ArraySpec:
        """Return shape, dtype and device.

        Raises:
            UnsupportedArrayError: The array can never be kept (requires grad, sparse, meta, conjugated ...).
            DeletedArrayError: It was deleted or donated.
            UnsupportedDtypeError: Its dtype is not in the table.
        """

    @abstractmethod
    def storages(self, array: Array) -> Sequence[Storage]:
        """Return every piece of memory that `array` keeps alive, all addressable shards included.

        Raises:
            UnsupportedArrayError: As `describe`.
            DeletedArrayError: As `describe`.
        """

    @abstractmethod
    def to_host(self, array: Array) -> HostArray:
        """Return the elements in row-major order: over the array's own memory where possible, else a copy.

        Blocks until the array is computed. The result is never written, and keeps what it borrows alive.
        """

    @abstractmethod
    def from_host(self, host: HostArray) -> Array:
        """Make an array on the default device over `host`'s memory where possible, else a copy.

        `host` is never written afterwards, by anybody.

        Raises:
            UnsupportedDtypeError: This framework cannot hold the dtype without changing values.
        """

    @abstractmethod
    def release(self, arrays: Sequence[Array]) -> int:
        """Free `arrays`, which nobody reads any more; each array is named once.

        The caller has dropped every other reference of its own; the list is emptied where it is a list. Freeing an
        array that is already gone is a no-op.

        Returns:
            The bytes that were seen to be freed: memory that somebody else keeps alive is not counted.
        """

    # --- memory ------------------------------------------------------------------------------------------------------

    def shapes(self, arrays: Sequence[Array]) -> Sequence[tuple[int, ...]]:
        """Return the shape of each of many arrays, all of which can be kept.

        Raises:
            UnsupportedArrayError: As `describe`.
            DeletedArrayError: As `describe`.
            UnsupportedDtypeError: As `describe`.
        """
        return [self.describe(array).shape for array in arrays]

    def storages_all(self, arrays: Sequence[Array]) -> list[Storage]:
        """Return every piece of memory that any of `arrays` keeps alive, once.

        Raises:
            UnsupportedArrayError: As `describe`.
            DeletedArrayError: As `describe`.
        """
        return list({storage.key: storage for array in arrays for storage in self.storages(array)}.values())

    def copy_all(self, arrays: Sequence[Array]) -> list[Array]:
        """Return an independent, compact, row-major copy of each array on its own device."""
        sources = [self.to_host(array) for array in arrays]
        blocks = HostArray.empty_block([(source.shape, source.dtype) for source in sources])
        for target, source in zip(blocks, sources, strict=True):
            target.memory[:] = source.memory
        return [self.from_host(target) for target in blocks]

    def compact_nbytes(self, arrays: Sequence[Array]) -> Mapping[str, int]:
        """Return the bytes per device that `copy_all` of these arrays will keep alive. Validates every array."""
        total: dict[str, int] = {}
        for array in arrays:
            spec = self.describe(array)
            total[spec.device] = total.get(spec.device, 0) + spec.nbytes
        return total

    def held_elsewhere(self, arrays: list[Array]) -> list[Array]:  # noqa: ARG002
        """Return those of `arrays` that somebody besides the cache entry refers to, as far as can be told."""
        return []

    def watch(self, arrays: Sequence[Array]) -> list[tuple[int, Callable[[], bool]]]:  # noqa: ARG002
        """Return size and a liveness test per storage of `arrays`; the test keeps nothing alive."""
        return []

    def place(self, array: Array, device: str) -> Array:
        """Return `array` on `device`, itself where it already lies there.

        Raises:
            StructureMismatchError: This framework knows no such device.
        """
        if device != self.describe(array).device:
            msg = f"{self.framework} arrays cannot be placed on device {device!r}"
            raise StructureMismatchError(msg)
        return array

    def checksum(self, array: Array) -> int:
        """Return a checksum of the elements, to find a borrower that wrote (``debug=True``)."""
        return zlib.crc32(self.to_host(array).memory)

    def is_deleted(self, array: Array) -> bool:  # noqa: ARG002
        """Say whether somebody deleted or donated `array`."""
        return False

    def sample(self, array: Array) -> bytes:
        """Return some of the bytes of `array`, spread over all of it and the same every time."""
        memory = self.to_host(array).memory
        step = max(len(memory) // _SAMPLES // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        return b"".join(memory[at : at + ALIGNMENT] for at in range(0, len(memory), step))

    def is_constant(self, value: object) -> bool:  # noqa: ARG002
        """Say whether `value` is an immutable little thing (a dtype, a device) that containers may carry along."""
        return False

    # --- rows --------------------------------------------------------------------------------------------------------

    def cut_all(self, cuts: Sequence[tuple[Array, int, int, int]]) -> list[Array]:
        """Return an independent, compact copy of rows ``[start, stop)`` for each ``(array, axis, start, stop)``."""
        sources = [self.to_host(array) for array, _, _, _ in cuts]
        shapes = [
            (*source.shape[:axis], stop - start, *source.shape[axis + 1 :])
            for source, (_, axis, start, stop) in zip(sources, cuts, strict=True)
        ]
        blocks = HostArray.empty_block([(s, source.dtype) for s, source in zip(shapes, sources, strict=True)])
        for target, source, (_, axis, start, stop) in zip(blocks, sources, cuts, strict=True):
            copy_rows(target, 0, source, start, stop, axis)
        return [self.from_host(target) for target in blocks]

    def concat_all(self, joins: Sequence[tuple[Sequence[Array], int]]) -> list[Array]:
        """Return the concatenation of each list of arrays along its axis: independent, compact."""
        results = []
        for arrays, axis in joins:
            sources = [self.to_host(array) for array in arrays]
            rows = sum(source.shape[axis] for source in sources)
            first = sources[0]
            target = HostArray.empty((*first.shape[:axis], rows, *first.shape[axis + 1 :]), first.dtype)
            at = 0
            for source in sources:
                copy_rows(target, at, source, 0, source.shape[axis], axis)
                at += source.shape[axis]
            results.append(self.from_host(target))
        return results

    def hold_together(self, arrays: Sequence[Array], axis: int) -> Any:
        """Return what a frozen container takes in place of the concatenation of `arrays`: here that, which is a copy.

        An adapter whose container joins its rows with the next ones anyway may hand over the parts, which nobody
        writes.
        """
        return self.concat_all([(arrays, axis)])[0]

    def fill_all(self, fills: Sequence[Fill]) -> list[Array]:
        """Write rows into buffers that the caller gave up, and return the buffers to use instead.

        Args:
            fills: What goes where; targets are consumed.

        Returns:
            For each fill, the array that now holds the result: the target itself, written in place, where arrays are
            mutable; a new handle otherwise.
        """
        msg = f"{self.framework} has no buffers to fill ({len(fills)} asked for); unwrap without like="
        raise StructureMismatchError(msg)

    def view(self, array: Array, index: tuple[int | slice, ...], order: tuple[int, ...]) -> Array:
        """Return ``array[index]`` with its axes in another order; may share memory."""
        shape = self.describe(array).shape
        whole = all(part in (slice(None), slice(0, n)) for part, n in zip(index, shape, strict=True))
        if whole and list(order) == list(range(len(order))):
            return array
        msg = f"{self.framework} arrays cannot be viewed with axes {order}; store and load in one layout"
        raise StructureMismatchError(msg)

    def counter(self, array: Array) -> int | None:
        """Read a `LENGTH` leaf: its value where all elements agree, else None. Blocks until it is computed."""
        host = self.to_host(array)
        size = host.dtype.itemsize
        values = {int.from_bytes(host.memory[i : i + size], "little", signed=True) for i in range(0, host.nbytes, size)}
        return values.pop() if len(values) == 1 else None

    def with_counter(self, array: Array, value: int) -> Array:
        """Return a new array like `array`, every element of which is `value`."""
        like = self.describe(array)
        host = HostArray.empty(like.shape, like.dtype)
        item = value.to_bytes(like.dtype.itemsize, "little", signed=True)
        host.memory[:] = item * (host.nbytes // len(item))
        return self.place(self.from_host(host), like.device)

    def set_counter(self, array: Array, value: int) -> Array:
        """Set every element of a `LENGTH` leaf that the caller gave up, in place where arrays are mutable."""
        return self.with_counter(array, value)

    # --- what only some frameworks have ------------------------------------------------------------------------------

    @functools.cached_property  # `isinstance` with a Protocol takes 10 us, as long as putting ten layers together
    def containers(self) -> SupportsContainers | None:
        """This adapter, where its framework has containers of its own; else None."""
        return self if isinstance(self, SupportsContainers) else None

    @functools.cached_property
    def streams(self) -> SupportsStreams | None:
        """This adapter, where its framework has streams that it must be told of; else None."""
        return self if isinstance(self, SupportsStreams) else None
