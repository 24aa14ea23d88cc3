"""PyTorch tensors, in any nesting of dict, list, tuple and dataclass.

Freeing is dropping references: a storage somebody else still reads stays valid until they let go. ``resize_(0)`` is
never used, because with a DLPack consumer alive it is a use-after-free. On CUDA, freed blocks go back to the device
when the caching allocator holds more than `WATERMARK_BYTES` of them, not at each eviction.
"""

import ctypes
import functools
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.dlpack import from_dlpack

from agnostic_cache.arrays.adapter import Adapter, ArraySpec, Fill, Storage
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import ALIGNMENT, HostArray
from agnostic_cache.arrays.leaf import Leaf
from agnostic_cache.arrays.registry import adapter_named, offer_adapter
from agnostic_cache.arrays.roles import SNAPSHOT
from agnostic_cache.errors import StructureMismatchError, UnsupportedArrayError, UnsupportedDtypeError
from agnostic_cache.state.tree import flatten, strip
from agnostic_cache_adapters.torch_cuda import mark_read, pinned_copy

WATERMARK_BYTES: Final = 512 * 1024 * 1024
"""Freed memory that the CUDA allocator may hold back before it is told to return it."""

_DTYPES: dict[torch.dtype, Dtype] = {
    getattr(torch, dtype.value): dtype for dtype in Dtype if dtype not in (Dtype.INT4, Dtype.UINT4)
}
_COMPLEX = (Dtype.COMPLEX64, Dtype.COMPLEX128)
_REAL: Final = frozenset(_DTYPES) - {torch.complex64, torch.complex128}
_storage = functools.partial(tuple.__new__, Storage)  # at a third of the time of Storage(...)
_LARGE_BYTES: Final = 2 * 1024 * 1024
_STRIDED: Final = frozenset({torch.strided})
_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_SAMPLED: Final = 1024  # elements of a parameter that its sample reads from a device
_ADAPTER_FIELDS: Final = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
_CONSTANTS: Final = (torch.dtype, torch.device, torch.Size)
_TORCH: dict[Dtype, torch.dtype] = {dtype: name for name, dtype in _DTYPES.items()}
_TORCH |= {Dtype.INT4: torch.int8, Dtype.UINT4: torch.uint8}  # no arithmetic on torch.int4: one byte per element


_requires_grad, _is_meta, _dtype, _layout, _shape = map(
    operator.attrgetter, ("requires_grad", "is_meta", "dtype", "layout", "shape")
)


class TorchAdapter(Adapter):
    """Keeps tensors of any device and dtype of the table."""

    framework: ClassVar[str] = "torch"

    def __init__(self) -> None:
        """Start with no device seen."""
        self._devices: dict[torch.device, str] = {}

    def _device_name(self, device: torch.device) -> str:
        name = self._devices.get(device)  # str(device) costs more than all else in describe()
        return name if name is not None else self._devices.setdefault(device, str(device))

    def is_array(self, value: object) -> bool:
        """See `Adapter.is_array`."""
        return isinstance(value, torch.Tensor)

    def describe(self, array: torch.Tensor) -> ArraySpec:
        """See `Adapter.describe`."""
        dtype = _DTYPES.get(array.dtype)
        if array.requires_grad or dtype is None or array.layout is not torch.strided or array.is_meta:
            raise _refusal(array)
        if _wraps(array):
            raise _refusal(array)
        # The imaginary part of a conjugated tensor is real, and negated: its bytes have the wrong sign.
        if array.is_neg() or (dtype in _COMPLEX and array.is_conj()):
            raise _refusal(array)
        return ArraySpec(tuple(array.shape), dtype, self._device_name(array.device))

    def storages(self, array: torch.Tensor) -> Sequence[Storage]:
        """Return the one storage behind the tensor, at its full size."""
        if array.layout is not torch.strided or _wraps(array):
            raise _refusal(array)
        storage = array.untyped_storage()
        nbytes = storage.nbytes()
        return (Storage(storage.data_ptr(), nbytes, self._device_name(array.device)),) if nbytes else ()

    def to_host(self, array: torch.Tensor) -> HostArray:
        """Return the bytes of the tensor: a view of contiguous CPU memory, else a copy; from CUDA a pinned one."""
        spec = self.describe(array)
        host = pinned_copy(array) if array.is_cuda else array.detach().cpu().contiguous()
        if not host.numel():
            return HostArray.empty(spec.shape, spec.dtype)
        buffer: Any = (_Bytes * spec.nbytes).from_address(host.data_ptr())
        buffer.owner = host  # the view keeps the tensor's memory alive
        storage = host.untyped_storage()
        return HostArray(spec.shape, spec.dtype, memoryview(buffer).cast("B"), (storage.data_ptr(), storage.nbytes()))

    def from_host(self, host: HostArray) -> torch.Tensor:
        """Return a CPU tensor over the memory of `host`, or over a copy where that is read-only."""
        if not host.nbytes:
            return torch.empty(host.shape, dtype=_TORCH[host.dtype])
        if host.memory.readonly:
            source, host = host, HostArray.empty(host.shape, host.dtype)
            host.memory[:] = source.memory
        return torch.frombuffer(host.memory, dtype=_TORCH[host.dtype]).view(host.shape)

    def export_dlpack(self, array: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself where it is contiguous and aligned, else a contiguous copy."""
        self.describe(array)
        plain = array.detach()
        if not plain.is_contiguous() or plain.data_ptr() % ALIGNMENT:
            plain = plain.clone(memory_format=torch.contiguous_format)
        # Extents of 1 keep odd strides, which JAX would turn into a layout of its own and a compilation of its own.
        return plain.view(plain.shape)

    def import_dlpack(self, exported: Any) -> torch.Tensor:
        """Return a tensor over the exported memory; waits until that is computed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the memory is read-only: nobody here writes it
            return from_dlpack(exported)

    def release(self, arrays: Sequence[torch.Tensor]) -> int:
        """Drop the references, and count the storages that died with them."""
        held = {}
        cuda = False
        array = storage = None
        for array in arrays:
            if array.layout is not torch.strided or _wraps(array):
                continue  # `on_evict` drops what no cache would have kept
            storage = array.untyped_storage()
            held[storage.data_ptr()] = (_alive(storage), storage.nbytes())
            cuda = cuda or array.is_cuda
        del array, storage
        if isinstance(arrays, list):
            arrays.clear()
        freed = sum(nbytes for alive, nbytes in held.values() if not alive())
        if cuda and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > WATERMARK_BYTES:
            torch.cuda.empty_cache()
        return freed

    def is_queued(self, device: str) -> bool:
        """See `Adapter.is_queued`."""
        return device.startswith("cuda")

    def mark_read(self, arrays: Sequence[torch.Tensor]) -> None:
        """See `Adapter.mark_read`."""
        mark_read(arrays)

    def check_all(self, arrays: Sequence[torch.Tensor]) -> Sequence[tuple[int, ...]]:
        """See `Adapter.check_all`."""
        odd = any(map(_requires_grad, arrays)) or any(map(_is_meta, arrays))
        odd = odd or not _PLAIN.issuperset(map(type, arrays))
        if odd or not _REAL.issuperset(map(_dtype, arrays)) or not _STRIDED.issuperset(map(_layout, arrays)):
            for array in arrays:
                self.describe(array)
        return list(map(_shape, arrays))

    def storages_all(self, arrays: Sequence[torch.Tensor]) -> list[Storage]:
        """See `Adapter.storages_all`."""
        found: dict[int, Storage] = {}
        device, name = None, ""
        for array in arrays:
            storage = array.untyped_storage()
            key, nbytes = storage.data_ptr(), storage.nbytes()
            if nbytes and key not in found:
                if array.device != device:
                    device, name = array.device, self._device_name(array.device)
                found[key] = _storage((key, nbytes, name))
        return list(found.values())

    def held_elsewhere(self, arrays: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors with more references than a leaf's own; forks share the very tensor objects."""
        return [array for array, count in zip(arrays, _references(arrays), strict=True) if count > _LEAF_REFERENCES]

    def watch(self, arrays: Sequence[torch.Tensor]) -> list[tuple[int, Callable[[], bool]]]:
        """Watch storages through weak references."""
        storages = {s.data_ptr(): s for s in (array.untyped_storage() for array in arrays)}
        return [(s.nbytes(), _alive(s)) for s in storages.values()]

    def copy_all(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy each tensor, contiguous."""
        mark_read(arrays)
        return [self._copy(array) for array in arrays]

    def _copy(self, array: torch.Tensor) -> torch.Tensor:
        plain = type(array) is torch.Tensor and array.is_cpu and array.is_contiguous() and not array.is_neg()
        if not plain or array.nbytes < _LARGE_BYTES:
            return array.clone(memory_format=torch.contiguous_format)
        # Huge pages, and one thread, which leaves the others to whoever computes meanwhile. On two shared cores `clone`
        # takes twice as long, with every thread of torch and small pages (measured: 200 and 100 ms for 256 MB).
        copy = self.from_host(HostArray.empty(array.shape, _DTYPES[array.dtype]))
        ctypes.memmove(copy.data_ptr(), array.data_ptr(), array.nbytes)  # other Python threads run meanwhile
        return copy

    def cut_all(self, cuts: Sequence[tuple[torch.Tensor, int, int, int]]) -> list[torch.Tensor]:
        """Clone the rows, contiguous."""
        mark_read(cut[0] for cut in cuts)
        return [
            array.narrow(axis, start, stop - start).clone(memory_format=torch.contiguous_format)
            for array, axis, start, stop in cuts
        ]

    def concat_all(self, joins: Sequence[tuple[Sequence[torch.Tensor], int]]) -> list[torch.Tensor]:
        """Concatenate; one part alone is cloned."""
        mark_read(array for arrays, _ in joins for array in arrays)
        return [torch.cat(list(arrays), dim=axis) for arrays, axis in joins]

    def counter(self, array: torch.Tensor) -> int | None:
        """See `Adapter.counter`."""
        first = array.flatten()[0]
        return int(first) if bool((array == first).all()) else None

    def with_counter(self, array: torch.Tensor, value: int) -> torch.Tensor:
        """See `Adapter.with_counter`."""
        return torch.full_like(array, value)

    def set_counter(self, array: torch.Tensor, value: int) -> torch.Tensor:
        """Write in place; addresses stay, so that compiled graphs stay valid."""
        with torch.inference_mode():
            return array.fill_(value)

    def place(self, array: torch.Tensor, device: str) -> torch.Tensor:
        """Return the tensor on a device that torch names, such as ``cuda:0``."""
        try:
            return array.to(device)
        except (RuntimeError, AssertionError) as error:  # no such name, no such device, a torch built without it
            msg = f"torch cannot place a tensor on device {device!r} here: {error}"
            raise StructureMismatchError(msg) from error

    def view(self, array: torch.Tensor, index: tuple[int | slice, ...], order: tuple[int, ...]) -> torch.Tensor:
        """Return a view."""
        return array[index].permute(order)

    def fill_all(self, fills: Sequence[Fill]) -> list[torch.Tensor]:
        """Write in place; addresses stay, so that compiled graphs stay valid."""
        mark_read(fill.source for fill in fills)
        with torch.inference_mode():  # also buffers that were made in inference mode may be written
            for target, index, source, source_index, order in fills:
                target[index].copy_(source[source_index].permute(order))
        return [fill.target for fill in fills]

    def model_parts(self, model: object) -> tuple[str, Mapping[str, torch.Tensor]] | None:
        """Return configuration, active adapters, parameters and buffers of a module."""
        if not isinstance(model, torch.nn.Module):
            return None
        config: Any = getattr(model, "config", None)
        described = config.to_json_string() if hasattr(config, "to_json_string") else ""
        words = f"{type(model).__qualname__} {described} {active_adapters(model)}"
        tensors = (*model.named_parameters(), *model.named_buffers())
        return words, {name: tensor.detach() for name, tensor in tensors}

    def sample(self, array: torch.Tensor) -> bytes:
        """Read from the device only what is sampled."""
        if array.is_cpu or not array.is_contiguous():
            return super().sample(array)
        flat = array.view(-1)
        return bytes(self.to_host(flat[:: max(flat.numel() // _SAMPLED, 1)].contiguous()).memory)

    def is_constant(self, value: object) -> bool:
        """See `Adapter.is_constant`."""
        return isinstance(value, _CONSTANTS)

    def abstract_specs(self, init_fn: Callable[[int], object], length: int) -> Mapping[str, ArraySpec]:
        """Evaluate `init_fn` on the meta device."""
        with torch.device("meta"):
            flat = flatten(init_fn(length), self)
        return {name: ArraySpec(tuple(t.shape), _DTYPES[t.dtype], "meta") for name, t in flat.arrays.items()}


def _wraps(array: Any) -> bool:
    """Whether a tensor has no memory of its own, but stands for others."""
    return type(array) not in _PLAIN and is_traceable_wrapper_subclass(array)


class _Bytes(ctypes.c_ubyte):
    """A byte whose array type is ours, so that an array of them may carry the owner of its memory."""


def _refusal(array: torch.Tensor) -> UnsupportedArrayError | UnsupportedDtypeError:
    """The error that says why a tensor cannot be kept."""
    if array.requires_grad:
        why = "requires grad; call .detach() on it, or compute it under torch.no_grad()"
    elif array.layout is not torch.strided:
        why = f"has layout {array.layout}; call .to_dense() on it"
    elif _wraps(array):
        why = f"wraps other tensors in a {type(array).__qualname__}; store those, or the tensor that they stand for"
    elif array.is_meta:
        why = "lies on the meta device and has no data"
    elif array.dtype not in _DTYPES:
        msg = f"a tensor of {array.dtype} cannot be kept; convert it to one of {', '.join(map(str, _DTYPES))}"
        return UnsupportedDtypeError(msg)
    else:
        why = "is a conjugated or negated view; call .resolve_conj().resolve_neg() on it"
    return UnsupportedArrayError(f"a {array.dtype} tensor of shape {tuple(array.shape)} cannot be kept: it {why}")


def _alive(storage: torch.UntypedStorage) -> Callable[[], bool]:
    reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return lambda: not reference.expired()


def _references(arrays: list[Any]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


def _leaf_references() -> int:
    """What `_references` says of an array that a leaf alone holds: measured, since it differs between Pythons."""
    leaf = Leaf(object(), SNAPSHOT, ())
    return _references([leaf.array])[0]


_LEAF_REFERENCES: Final = _leaf_references()


def active_adapters(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Say which adapters (LoRA and its kin, as PEFT adds them) compute in which module, and which are merged."""
    return [
        (name, repr([getattr(module, field, None) for field in _ADAPTER_FIELDS]))
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")
    ]


adapter = TorchAdapter()
offer_adapter("torch", adapter)


def on_evict(value: object) -> int:
    """Free the device memory of a value that leaves a cache: any nesting of tensors, containers and dataclasses.

    Drops every reference that the containers hold; memory that somebody else still reads is theirs from then on. Serves
    ``SimpleLRUCache(8, on_evict=on_evict)`` and `StateCache`.

    >>> from agnostic_cache import SimpleLRUCache
    >>> cache = SimpleLRUCache(8, on_evict=on_evict)

    Args:
        value: What left; unusable afterwards.

    Returns:
        The bytes that were seen to be freed.
    """
    best = adapter_named("torch")
    return best.release(strip(value, best))
