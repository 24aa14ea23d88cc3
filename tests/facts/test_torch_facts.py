"""What the design takes for granted of torch. A failure here says that torch has changed, not that we are wrong."""

import mmap
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack
from torch_subject import live_bytes


def pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# --- storages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda tensor: tensor[:, 3:4], id="narrow"),
        pytest.param(lambda tensor: tensor.transpose(0, 1), id="transpose"),
        pytest.param(lambda tensor: tensor.detach(), id="detach"),
        pytest.param(lambda tensor: tensor.contiguous(), id="contiguous"),
        pytest.param(from_dlpack, id="DLPack"),
    ],
)
def test_a_view_keeps_the_whole_storage(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    before = live_bytes()
    tensor = torch.zeros(64, 64)
    where = tensor.data_ptr()
    part = view(tensor)
    del tensor
    assert live_bytes() - before == part.untyped_storage().nbytes() == 64 * 64 * 4
    assert pointer(part) == where
    del part
    assert live_bytes() == before


def test_a_clone_is_compact() -> None:
    part = torch.zeros(64, 64).transpose(0, 1)[:, ::2]
    copied = part.clone(memory_format=torch.contiguous_format)
    assert copied.is_contiguous()
    assert copied.untyped_storage().nbytes() == copied.nbytes == 64 * 32 * 4


def test_a_weak_reference_tells_when_a_storage_dies() -> None:
    tensor = torch.zeros(64)
    part, reference = tensor[:3], StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    del tensor
    assert not reference.expired()  # type: ignore[no-untyped-call]
    del part
    assert reference.expired()  # type: ignore[no-untyped-call]


def test_a_tensor_over_a_buffer_keeps_the_buffer() -> None:
    mapping = mmap.mmap(-1, 64)
    tensor, reference = torch.frombuffer(memoryview(mapping), dtype=torch.float32), weakref.ref(mapping)
    tensor.fill_(1)
    assert mapping[:4] == b"\x00\x00\x80?"
    del mapping
    part = tensor[:3]
    del tensor
    assert reference() is not None
    del part
    assert reference() is None


def test_fresh_memory_is_aligned() -> None:
    assert {torch.empty(n).data_ptr() % 64 for n in (1, 3, 100, 1 << 20)} == {0}


RESIZED = """
import torch
tensor = torch.zeros(1 << 24)
other = tensor.detach()
tensor.untyped_storage().resize_(0)
assert other.shape == (1 << 24,) and other.untyped_storage().nbytes() == 0
print("asked", flush=True)
print(other.sum())
print("answered")
"""


def test_a_storage_that_is_resized_is_freed_under_whoever_reads_it() -> None:
    done = subprocess.run([sys.executable, "-c", RESIZED], check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "asked\n", done.stderr  # an error, or the end of the process, by version


def test_resizing_asks_no_dlpack_consumer() -> None:
    tensor = torch.zeros(64)
    consumer = tensor.__dlpack__()
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0
    assert "dltensor" in repr(consumer)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_buffers_of_either_mode_may_be_written_in_inference_mode() -> None:
    with torch.inference_mode():
        made, other = torch.zeros(4), torch.zeros(4)
    with pytest.raises(RuntimeError):
        other.add_(1)
    for buffer in (made, torch.zeros(4)):
        where = buffer.data_ptr()
        with torch.inference_mode():
            buffer[1:3].copy_(torch.ones(2))
        assert (buffer.tolist(), buffer.data_ptr()) == ([0, 1, 1, 0], where)


def test_lazy_conjugation_and_negation_share_the_bytes() -> None:
    plain = torch.tensor([1 + 2j])
    imaginary = plain.conj().imag
    assert (plain.conj().is_conj(), imaginary.is_neg()) == (True, True)
    assert pointer(imaginary) == pointer(plain.conj()) == pointer(plain)
    with pytest.raises((BufferError, RuntimeError)):
        plain.conj().__dlpack__()


def test_what_dlpack_does_not_export() -> None:
    for tensor in (torch.zeros(3, requires_grad=True), torch.zeros(3).to_sparse()):
        with pytest.raises(BufferError):
            tensor.__dlpack__()


def test_the_meta_device_has_shapes_and_no_memory() -> None:
    with torch.device("meta"):
        tensor: Any = torch.zeros(1 << 20, 1 << 20)
    assert tensor.is_meta
    assert tensor.shape == (1 << 20, 1 << 20)
