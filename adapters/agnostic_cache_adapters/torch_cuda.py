"""What tensors on CUDA devices need beyond those on the CPU: streams that read, and pinned copies on the host.

A kernel reads after the call that starts it has returned. torch gives freed memory to whoever allocates next on the
stream that it was allocated on, which waits for the kernels of that stream and of those that it was told of.
"""

import functools
from collections.abc import Iterable

import torch


def mark_read(arrays: Iterable[torch.Tensor]) -> None:
    """Tell the allocator that the current stream reads `arrays`: their memory is not used again before it has."""
    for array in arrays:
        if array.is_cuda:  # where it was allocated on this very stream, this does nothing
            array.record_stream(torch.cuda.current_stream(array.device))


def pinned_copy(array: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into pinned memory of the host, contiguous, on a stream of its own.

    Blocks until the copy is there, without the interpreter's lock; kernels on other streams go on meanwhile.
    """
    host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
    source = array.detach().contiguous()
    copying = _copying_stream(array.device)
    copying.wait_stream(torch.cuda.current_stream(array.device))  # what computes it
    with torch.cuda.stream(copying):
        host.copy_(source, non_blocking=True)
        done = copying.record_event()
    source.record_stream(copying)
    done.synchronize()
    return host


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
