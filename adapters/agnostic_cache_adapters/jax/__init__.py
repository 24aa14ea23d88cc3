"""JAX arrays, in any pytree.

Freeing is ``delete()`` on each top-level array, once, and never on a shard: deleting a shard's array crashes the next
user of the whole. A NumPy or DLPack view that is alive keeps the memory until it dies; no JAX API tells of such views.

On CPU, cutting, joining and filling run as plain memory copies on the buffers: no compilation per length, and a tenth
of the time of eager slices. On other devices they are JAX operations.
"""

import ctypes
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding, SingleDeviceSharding

from agnostic_cache.arrays.adapter import Adapter, ArraySpec, Fill, Opened, Storage
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import ALIGNMENT, HostArray
from agnostic_cache.arrays.registry import adapter_named, offer_adapter
from agnostic_cache.errors import (
    DeletedArrayError,
    StructureMismatchError,
    UnsupportedArrayError,
    UnsupportedDtypeError,
)
from agnostic_cache.state.layout import LENGTH, TOKENS, KVLayout
from agnostic_cache.state.tree import flatten, strip
from agnostic_cache_adapters.jax.loop import resume, store

__all__ = ["TUNIX", "JaxAdapter", "adapter", "on_evict", "resume", "store"]

TUNIX = KVLayout(
    {"layer_{i}.k": TOKENS(1), "layer_{i}.v": TOKENS(1), "layer_{i}.end_index": LENGTH},
    names={
        "layer_{i}.k": "layers.{i}.key",
        "layer_{i}.v": "layers.{i}.value",
        "layer_{i}.end_index": "layers.{i}.length",
    },
    axes={"layer_{i}.end_index": ("batch",)},
    rotary="half",
)
"""google-tunix: ``{"layer_<i>": {"k", "v": (batch, tokens, heads, dim), "end_index": (batch,)}}``."""

_SAMPLED = 1024  # elements of a parameter that its sample reads from a device
_PYTREE = "jax.pytree"
_WIDE = {"int64", "uint64", "float64", "complex128"}
# At a third of the time of Storage(...) and ArraySpec(...).
_storage = functools.partial(tuple.__new__, Storage)
_spec = functools.partial(tuple.__new__, ArraySpec)
_PACKED = {"int4", "uint4"}  # two elements to a byte, in memory of which NumPy sees an unpacked copy


class JaxAdapter(Adapter):
    """Keeps arrays of any device, sharding and dtype of the table."""

    framework: ClassVar[str] = "jax"
    mutable: ClassVar[bool] = False
    forkable: ClassVar[bool] = False

    def __init__(self) -> None:
        """Start with no dtype and no sharding seen."""
        self._dtypes: dict[np.dtype[Any], Dtype] = {}
        self._devices: dict[Any, str] = {}

    # --- one array ---------------------------------------------------------------------------------------------------

    def is_array(self, value: object) -> bool:
        """See `Adapter.is_array`."""
        return isinstance(value, jax.Array)

    def describe(self, array: jax.Array) -> ArraySpec:
        """See `Adapter.describe`. A tracer inside ``jit`` is an `UnsupportedArrayError`."""
        self._check(array)
        return _spec((array.shape, self._dtype(array), self._device_name(array)))

    def storages(self, array: jax.Array) -> Sequence[Storage]:
        """Return the buffer of each addressable shard."""
        self._check(array)
        if array.size == 0:
            return ()
        if type(array.sharding) is SingleDeviceSharding:
            return (Storage(array.unsafe_buffer_pointer(), _nbytes(array), self._device_name(array)),)
        shards = (shard.data for shard in array.addressable_shards)
        return [Storage(part.unsafe_buffer_pointer(), part.nbytes, self._device_name(part)) for part in shards]

    def to_host(self, array: jax.Array) -> HostArray:
        """Return the bytes of the array: a read-only view of row-major CPU memory, else a copy. Waits for the array."""
        spec = self.describe(array)
        if not array.size:
            return HostArray.empty(spec.shape, spec.dtype)
        plain = np.ascontiguousarray(_host_view(array)).reshape(array.shape)
        if array.dtype.name in _PACKED:
            plain = plain.astype(_widened(array))  # NumPy leaves the upper half of a negative byte empty
        memory = plain.reshape(-1).view(np.uint8).data
        return HostArray(spec.shape, spec.dtype, memory, (plain.ctypes.data, plain.nbytes))

    def from_host(self, host: HostArray) -> jax.Array:
        """Return an array on the default device, on CPU over the memory of `host`."""
        self._check_width(host.dtype.value)
        flat = np.frombuffer(host.memory, dtype=np.uint8)
        dtype = jnp.dtype(host.dtype.value)
        packed = host.dtype.value in _PACKED
        return _take((flat.view(np.int8).astype(dtype) if packed else flat.view(dtype)).reshape(host.shape))

    def export_dlpack(self, array: jax.Array) -> jax.Array:
        """Return the array itself where it is row-major on one device, else a copy; 4-bit integers widen to 8 bits."""
        self._check(array)
        if array.dtype.name in _PACKED:
            return array.astype(_widened(array))
        if type(array.sharding) is not SingleDeviceSharding:
            return _take(_host_view(array))
        return array

    def import_dlpack(self, exported: Any) -> jax.Array:
        """Return an array over the exported memory."""
        self._check_width(str(exported.dtype).rpartition(".")[2])
        imported: jax.Array = jax.dlpack.from_dlpack(exported)
        return imported.block_until_ready()  # an unaligned source is copied asynchronously

    def release(self, arrays: Sequence[jax.Array]) -> int:
        """Delete each array that is not deleted yet, and count its buffers."""
        freed = 0
        for array in arrays:
            if not isinstance(array, Tracer) and not array.is_deleted():
                freed += _nbytes(array)
                array.delete()
        if isinstance(arrays, list):
            arrays.clear()
        return freed

    def is_deleted(self, array: jax.Array) -> bool:
        """See `Adapter.is_deleted`."""
        return array.is_deleted()

    # --- faster than the defaults ------------------------------------------------------------------------------------

    def check_all(self, arrays: Sequence[jax.Array]) -> Sequence[tuple[int, ...]]:
        """See `Adapter.check_all`."""
        for array in arrays:
            self._check(array)
            self._dtype(array)
        return [array.shape for array in arrays]

    def storages_all(self, arrays: Sequence[jax.Array]) -> list[Storage]:
        """See `Adapter.storages_all`."""
        found: dict[Hashable, Storage] = {}
        for array in arrays:
            self._check(array)
            if type(array.sharding) is not SingleDeviceSharding:
                found.update({storage.key: storage for storage in self.storages(array)})
            elif nbytes := _nbytes(array):
                key = array.unsafe_buffer_pointer()
                found[key] = _storage((key, nbytes, self._device_name(array)))
        return list(found.values())

    def compact_nbytes(self, arrays: Sequence[jax.Array]) -> Mapping[str, int]:
        """Return the bytes per device: a copy has the sharding of its source."""
        total: dict[str, int] = {}
        for array in arrays:
            for storage in self.storages(array):
                total[storage.device] = total.get(storage.device, 0) + storage.nbytes
        return total

    def copy_all(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Copy all arrays on their devices, in one call: 60 of them cost a third of 60 calls.

        ``device_put(may_alias=False)`` copies for real, keeps the sharding, and compiles nothing per shape.
        """
        for array in arrays:
            self._check(array)
        rows = [array if _is_row_major(array) else jnp.copy(array) for array in arrays]
        copies: list[jax.Array] = jax.device_put(rows, [array.sharding for array in arrays], may_alias=False)
        return copies

    def cut_all(self, cuts: Sequence[tuple[jax.Array, int, int, int]]) -> list[jax.Array]:
        """Copy the rows."""
        results = []
        for array, axis, start, stop in cuts:
            self._check(array)
            if _on_host(array):
                index = (slice(None),) * axis + (slice(start, stop),)
                results.append(_take(_compact(_host_view(array)[index]), array.sharding))
            else:
                results.append(jax.lax.slice_in_dim(array, start, stop, axis=axis).copy())
        return results

    def concat_all(self, joins: Sequence[tuple[Sequence[jax.Array], int]]) -> list[jax.Array]:
        """Concatenate."""
        results = []
        for arrays, axis in joins:
            if all(map(_on_host, arrays)):
                views = [_host_view(array) for array in arrays]
                shape = list(views[0].shape)
                shape[axis] = sum(view.shape[axis] for view in views)
                joined = np.concatenate(views, axis=axis, out=_aligned(tuple(shape), views[0].dtype))
                results.append(_take(joined, arrays[0].sharding))
            else:
                results.append(jnp.concatenate(arrays, axis=axis))
        return results

    def with_counter(self, array: jax.Array, value: int) -> jax.Array:
        """See `Adapter.with_counter`."""
        filled: jax.Array = jax.device_put(np.full(array.shape, value, array.dtype), array.sharding)
        return filled

    def place(self, array: jax.Array, device: str) -> jax.Array:
        """Return a copy on a device, named ``<platform>:<id>``."""
        found = {f"{d.platform}:{d.id}": d for d in (*jax.devices(), *jax.devices("cpu"))}
        if device not in found:
            raise _no_device(device, sorted(found))
        placed: jax.Array = jax.device_put(array, found[device], may_alias=False)
        return placed

    def fill_all(self, fills: Sequence[Fill]) -> list[jax.Array]:
        """Write into the buffers that the caller gave up; the old handles are deleted, as by donation.

        On CPU this *is* a donation, to an identity: its result is a handle that nobody else has, over the same memory,
        or, where a view of the old array is alive, over a copy of it. So the bytes can be written directly, at the
        speed of memcpy, with no compilation per length and no clamping at the end of the buffer.
        """
        for fill in fills:
            if fill.source.is_deleted():  # before anything is given up
                self._check(fill.source)
        targets = list({id(fill.target): fill.target for fill in fills}.values())
        owned = dict(zip(map(id, targets), _claim(self._apart(targets)), strict=True))
        for target in targets:
            if not target.is_deleted():
                target.delete()  # donation left it because of a view, which stays valid
        views = {
            key: _writable(held) for key, held in owned.items() if _on_host(held) and held.dtype.name not in _PACKED
        }
        for target, index, source, source_index, order in fills:
            view = views.get(id(target))
            if view is not None and _on_host(source):
                view[index] = np.asarray(source)[source_index].transpose(order)
            else:
                held = owned[id(target)]
                block = jnp.transpose(source[source_index], order)
                block = jnp.expand_dims(block, [axis for axis, part in enumerate(index) if isinstance(part, int)])
                if not block.sharding.is_equivalent_to(held.sharding, block.ndim):
                    block = jax.device_put(block, held.sharding)
                owned[id(target)] = _write(held, block, _starts(index))
                views.pop(id(target), None)  # of the memory that was given up just now
        return [owned[id(fill.target)] for fill in fills]

    def sample(self, array: jax.Array) -> bytes:
        """Read from the device only what is sampled."""
        if _on_host(array):
            return super().sample(array)
        return np.asarray(jnp.ravel(array)[:: max(array.size // _SAMPLED, 1)]).tobytes()

    def is_constant(self, value: object) -> bool:
        """See `Adapter.is_constant`."""
        return isinstance(value, np.dtype | np.generic)

    # --- containers --------------------------------------------------------------------------------------------------

    def open(self, value: object) -> Opened | None:
        """Take any registered pytree node apart, one level."""
        if jax.tree_util.all_leaves([value]):
            return None
        paths, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)
        children = {_key_name(path): child for path, child in paths}
        if len(children) != len(paths):
            children = {str(i): child for i, (_, child) in enumerate(paths)}
        return Opened(_PYTREE, children, type(value).__qualname__, native=treedef)

    def close(self, kind: str, children: Mapping[str, Any], data: Any, length: int, native: Any) -> object:
        """Put a pytree node together."""
        if kind != _PYTREE or native is None:
            return super().close(kind, children, data, length, native)
        return jax.tree_util.tree_unflatten(native, list(children.values()))

    def take_apart(self, value: object) -> list[Any] | None:
        """Return the children of any registered pytree node; it is not emptied, but its arrays will be deleted."""
        opened = self.open(value)
        return None if opened is None else list(opened.children.values())

    def known_layout(self, names: Sequence[str]) -> KVLayout | None:
        """Know google-tunix's caches by their names."""
        return TUNIX if all(TUNIX.declares(name) for name in names) else None

    def abstract_specs(self, init_fn: Callable[[int], object], length: int) -> Mapping[str, ArraySpec]:
        """Evaluate ``jax.eval_shape`` of `init_fn`."""
        shapes = jax.eval_shape(functools.partial(init_fn, length))
        flat = flatten(shapes, _AbstractAdapter())
        return {name: ArraySpec(s.shape, Dtype.of(s.dtype.name), "abstract") for name, s in flat.arrays.items()}

    # --- inside ------------------------------------------------------------------------------------------------------

    def _apart(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """The arrays; copies of those that lie in the memory of one before, as a buffer is donated once."""
        seen: set[Any] = set()
        apart = []
        for array in arrays:
            keys = {storage.key for storage in self.storages(array)}
            apart += self.copy_all([array]) if keys & seen else [array]
            seen |= keys
        return apart

    def _check(self, array: jax.Array) -> None:
        if isinstance(array, Tracer):
            msg = "a JAX array inside jit is a tracer and holds no data; call the cache outside of the jitted function"
            raise UnsupportedArrayError(msg)
        if array.is_deleted():
            msg = (
                f"a {array.dtype} array of shape {array.shape} was deleted or donated; store it before a donating "
                "call, and use what that call returns"
            )
            raise DeletedArrayError(msg)
        if type(array.sharding) is not SingleDeviceSharding and not array.is_fully_addressable:
            msg = (
                f"a {array.dtype} array of shape {array.shape} has shards on other hosts; keep each host's part, its "
                "addressable_shards, in a cache of its own"
            )
            raise UnsupportedArrayError(msg)

    def _dtype(self, array: jax.Array) -> Dtype:
        dtype = self._dtypes.get(array.dtype)  # the name of a NumPy dtype costs 12 us
        return dtype if dtype is not None else self._dtypes.setdefault(array.dtype, Dtype.of(array.dtype.name))

    def _check_width(self, name: str) -> None:
        if name in _WIDE and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            msg = (
                f"JAX holds no {name} here and would narrow it silently; set jax_enable_x64, or convert the state first"
            )
            raise UnsupportedDtypeError(msg)

    def _device_name(self, array: jax.Array) -> str:
        name = self._devices.get(array.sharding)
        if name is None:
            devices: Iterable[Any] = array.sharding.device_set
            names = sorted(f"{device.platform}:{device.id}" for device in devices)
            name = self._devices.setdefault(array.sharding, ",".join(names))
        return name


def _no_device(device: str, known: list[str]) -> StructureMismatchError:
    return StructureMismatchError(f"JAX has no device {device!r} here; known: {', '.join(known)}")


class _AbstractAdapter(JaxAdapter):
    """Sees shapes where the real one sees arrays."""

    def is_array(self, value: object) -> bool:
        return isinstance(value, jax.ShapeDtypeStruct)


def _key_name(path: tuple[Any, ...]) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(path[-1], attribute):
            return str(getattr(path[-1], attribute))
    return str(path[-1])


def _nbytes(array: jax.Array) -> int:
    """The bytes of all addressable shards."""
    if type(array.sharding) is SingleDeviceSharding:
        return array.size * array.dtype.itemsize
    return sum(shard.data.nbytes for shard in array.addressable_shards) if array.size else 0


def _is_row_major(array: Any) -> bool:
    """Whether the elements lie in order. Arrays that DLPack brought need not, and `device_put` keeps their order."""
    layout = array.format.layout
    return layout is None or tuple(layout.major_to_minor) == tuple(range(array.ndim))


def _on_host(array: jax.Array) -> bool:
    return _is_host(array.sharding)


@functools.lru_cache(maxsize=64)  # to look takes 2 us
def _is_host(sharding: Sharding) -> bool:
    devices: Iterable[Any] = sharding.device_set
    return type(sharding) is SingleDeviceSharding and all(device.platform == "cpu" for device in devices)


def _host_view(array: jax.Array) -> np.ndarray[Any, Any]:
    """The elements: over the array's memory on CPU; copied, shard by shard, elsewhere. Waits for the array."""
    if type(array.sharding) is SingleDeviceSharding:
        return np.asarray(array)
    # np.asarray of a sharded array keeps a host copy on it that even delete() does not free.
    result = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards if array.size else ():
        result[shard.index] = np.asarray(shard.data)
    return result


def _widened(array: jax.Array) -> str:
    return str(array.dtype.name.replace("4", "8"))


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Fresh memory on a 64-byte boundary, which is what JAX takes without a copy; np.empty gives 16."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _compact(view: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result = _aligned(view.shape, view.dtype)
    np.copyto(result, view)
    return result


def _take(private: np.ndarray[Any, Any], where: Sharding | None = None) -> jax.Array:
    """An array over memory that is never written again; waits, because what is not aligned is copied later."""
    taken: jax.Array = jax.device_put(private, where).block_until_ready()
    return taken


@functools.partial(jax.jit, donate_argnums=0)
def _identity(arrays: list[jax.Array]) -> list[jax.Array]:
    return arrays


@functools.partial(jax.jit, donate_argnums=0)
def _write(target: jax.Array, block: jax.Array, starts: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(target, block, starts)


def _starts(index: tuple[int | slice, ...]) -> tuple[int, ...]:
    return tuple(part if isinstance(part, int) else part.start or 0 for part in index)


def _claim(targets: list[jax.Array]) -> list[jax.Array]:
    """New handles over the same memory, or over copies of it where a view is alive; the old ones are deleted."""
    claimed: list[jax.Array] = jax.block_until_ready(_identity(targets))
    return claimed


def _writable(array: jax.Array) -> np.ndarray[Any, Any]:
    """The memory of an array whose one handle is ours."""
    nbytes = array.size * array.dtype.itemsize
    buffer = (ctypes.c_ubyte * nbytes).from_address(array.unsafe_buffer_pointer())
    return np.frombuffer(memoryview(buffer), np.uint8).view(array.dtype).reshape(array.shape)


adapter = JaxAdapter()
offer_adapter("jax", adapter)


def on_evict(value: object) -> int:
    """Free the device memory of a value that leaves a cache: any pytree, containers and dataclasses.

    Deletes every array in it, once, and empties mutable containers. Nobody may be reading the arrays: a race of
    ``delete()`` with a reader aborts the process, which is why `StateCache` calls it only when no borrow is left.

    >>> from agnostic_cache import SimpleLRUCache
    >>> cache = SimpleLRUCache(8, on_evict=on_evict)

    Args:
        value: What left; unusable afterwards.

    Returns:
        The bytes of the arrays that were deleted; a live NumPy or DLPack view keeps its memory until it dies.
    """
    best = adapter_named("jax")
    return best.release(strip(value, best))
