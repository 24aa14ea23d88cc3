"""A program: readers that take borrowed arrays to the other framework through DLPack. Its argument says which ones."""

import sys

import jax
import jax_subject
import numpy as np
import stress_jax
import stress_torch
import torch
import torch_subject
from stress import run
from torch.utils.dlpack import from_dlpack


def jax_with_torch(state: stress_jax.State) -> tuple[float, float]:
    return stress_torch.with_torch({name: from_dlpack(array) for name, array in state.items()})


def torch_with_numpy(state: stress_torch.State) -> tuple[float, float]:
    key, value = (np.from_dlpack(tensor) for tensor in state.values())
    return float(key.min()), float(value.max())


def torch_with_jit(state: stress_torch.State) -> tuple[float, float]:
    return stress_jax.with_jit({name: jax.dlpack.from_dlpack(tensor) for name, tensor in state.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["torch"]:
        ways = {"NumPy": torch_with_numpy, "jit": torch_with_jit, "NumPy too": torch_with_numpy}
        run(stress_torch.make, ways, torch_subject.live_bytes)
    else:
        both = {"torch": jax_with_torch, "NumPy": stress_jax.with_numpy, "torch too": jax_with_torch}
        run(stress_jax.make, both, jax_subject.live_bytes)
