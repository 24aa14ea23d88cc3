"""PyTorch as the suites of `agnostic_cache.testing` see it."""

import gc
import math
from collections.abc import Sequence

import torch

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.testing import Subject, pattern


def make(shape: Sequence[int], dtype: Dtype, seed: int) -> torch.Tensor:
    kind = getattr(torch, dtype.value)
    if not math.prod(shape):
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(pattern(shape, dtype, seed)), dtype=kind).view(tuple(shape)).clone()


def values(array: torch.Tensor) -> bytes:
    return bytes(array.detach().contiguous().flatten().view(torch.uint8).tolist())


def live_bytes() -> int:
    """The size of every storage that a tensor of this process keeps alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided and not t.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class TorchSubject(Subject):
    framework = "torch"

    def make(self, shape: Sequence[int], dtype: Dtype, seed: int) -> torch.Tensor:
        return make(shape, dtype, seed)

    def make_view(self, shape: Sequence[int], dtype: Dtype, seed: int) -> torch.Tensor:
        first, second, third = shape
        return make((first + 1, third, 2 * second), dtype, seed)[1:].transpose(1, 2)[:, ::2]

    def make_unaligned(self, shape: Sequence[int], dtype: Dtype, seed: int) -> torch.Tensor:
        return make((math.prod(shape) + 1,), dtype, seed)[1:].view(tuple(shape))

    def values(self, array: torch.Tensor) -> bytes:
        return values(array)

    def spoil(self, array: torch.Tensor) -> None:
        if array.numel():
            flipped = bytearray(byte ^ 1 for byte in values(array))
            array.copy_(torch.frombuffer(flipped, dtype=array.dtype).view(array.shape))

    def live_bytes(self) -> int:
        return live_bytes()
