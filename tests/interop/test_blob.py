"""A state that went through bytes is the state that it was, in its own framework and in the other."""

import mmap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_subject import JaxSubject
from torch_subject import TorchSubject
from transformers import DynamicCache

from agnostic_cache import KVLayout, wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.blob.state_blob import Blob, encode
from agnostic_cache.state.layout import TOKENS
from agnostic_cache.testing.subject import KV
from agnostic_cache_adapters.transformers.release import forward_argument, generate_argument

SUBJECTS = {"torch": TorchSubject(), "jax": JaxSubject()}


@pytest.mark.parametrize("there", SUBJECTS)
@pytest.mark.parametrize("here", SUBJECTS)
@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.FLOAT8_E4M3FN, Dtype.INT8], ids=str)
def test_bits_are_kept(here: str, there: str, dtype: Dtype) -> None:
    stored = wrap(SUBJECTS[here].kv(4, dtype), layout=KV)
    blob = Blob(bytes(encode(stored)))
    blob.verify()
    assert blob.framework == here
    found = blob.state().to(there)
    assert SUBJECTS[there].grids(found) == SUBJECTS[here].grids(stored)


def test_jax_takes_the_arrays_from_a_mapped_file_as_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    stored: dict[str, jax.Array] = {"k": jnp.arange(1000, dtype=jnp.bfloat16), "v": jnp.ones((7, 3))}
    path.write_bytes(bytes(encode(wrap(stored))))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = np.frombuffer(mapped, np.uint8).ctypes.data
    found = Blob(memoryview(mapped)).state().to("jax").unwrap()
    for name, held in stored.items():
        assert start <= found[name].unsafe_buffer_pointer() < start + len(mapped)
        assert jnp.array_equal(found[name], held)


def test_a_cache_that_went_through_bytes_gives_the_same_tokens(model: Any) -> None:
    ids = torch.arange(2, 42)[None]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :30], **forward_argument(model, cache))
    data = bytes(encode(wrap(cache), tokens=ids[0, :30].tolist()))
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    for _ in range(2):  # what the first one did to its cache, the second does not see
        restored: Any = Blob(data).state().to("torch").unwrap()
        assert type(restored) is DynamicCache
        reused = model.generate(ids, **generate_argument(model, restored), max_new_tokens=8, do_sample=False)
        assert torch.equal(plain, reused)


def test_a_template_is_filled_from_bytes() -> None:
    layout = KVLayout({"k": TOKENS(0)}, rotary="half")
    blob = Blob(bytes(encode(wrap({"k": torch.arange(6.0).reshape(3, 2)}, layout=layout))))
    filled = blob.state().unwrap(like={"k": jnp.zeros((5, 2))})
    assert filled["k"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0]]
