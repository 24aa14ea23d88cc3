"""JAX as the suites of `agnostic_cache.testing` see it, on four devices."""

import gc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.testing import Subject, pattern

jax.config.update("jax_num_cpu_devices", 4)  # before the first array: some tests shard over them


def make(shape: Sequence[int], dtype: Dtype, seed: int) -> jax.Array:
    data = np.frombuffer(pattern(shape, dtype, seed), np.uint8).view(jnp.dtype(dtype.value))
    array: jax.Array = jax.device_put(data.reshape(shape)).block_until_ready()  # compiles nothing, unlike jnp.array
    return array


def values(array: jax.Array) -> bytes:
    return np.asarray(array).tobytes()


def live_bytes() -> int:
    """The size of every buffer that an array of this process keeps alive and that is not deleted."""
    gc.collect()
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in shards}.values())


class JaxSubject(Subject):
    framework = "jax"

    def make(self, shape: Sequence[int], dtype: Dtype, seed: int) -> Any:
        return make(shape, dtype, seed)

    def values(self, array: Any) -> bytes:
        return values(array)

    def spoil(self, array: Any) -> None:
        array.delete()

    def live_bytes(self) -> int:
        return live_bytes()
