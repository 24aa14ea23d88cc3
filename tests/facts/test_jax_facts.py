"""What the design takes for granted of JAX. A test that fails here says that JAX has changed, not that we are wrong."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_subject import live_bytes
from peak import RESET, resident_bytes

LARGE = 16 * 1024 * 1024
"""Elements of an array that is seen in the memory of the process: 64 MiB."""

donating = jax.jit(lambda a: a + 1, donate_argnums=0)
identity = jax.jit(lambda a: a, donate_argnums=0)


def aligned(elements: int, at: int = 0) -> np.ndarray[Any, Any]:
    """Zeros that begin `at` bytes after a boundary of 64."""
    raw = np.zeros(elements + 32, np.float32)
    start = (-raw.ctypes.data % 64 + at) // 4
    return raw[start : start + elements]


def spread(array: jax.Array, *axes: str | None) -> jax.Array:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    placed: jax.Array = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
    return placed


def pointer(array: jax.Array) -> int:
    where: int = array.unsafe_buffer_pointer()
    return where


# --- donation and deletion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [donating, lambda array: array.delete()], ids=["donation", "deletion"])
def test_it_ends_every_alias(end: Callable[[jax.Array], object]) -> None:
    array = jnp.zeros(64)
    other = jax.device_put(array, jax.devices()[0])
    whole = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])
    part, reshaped = array[:32], array.reshape(8, 8)
    assert jnp.asarray(array) is array
    assert jax.device_put(array) is array
    assert other is not array
    assert pointer(other) == pointer(array) == pointer(whole)
    end(array)
    assert array.is_deleted()
    assert other.is_deleted()
    assert whole.is_deleted()
    assert not part.is_deleted()  # these are copies
    assert not reshaped.is_deleted()
    array.delete()  # and again does nothing


def test_only_a_copy_shields_from_donation() -> None:
    copiers: list[Callable[[Any], Any]] = [
        jnp.copy,
        lambda array: jnp.array(array, copy=True),
        lambda array: jax.device_put(array, may_alias=False),
        lambda array: jax.device_put(array, array.sharding, may_alias=False),
    ]
    for copier in copiers:
        array = jnp.arange(64.0)
        copied = copier(array)
        assert pointer(copied) != pointer(array)
        donating(array)
        assert copied.tolist() == list(range(64))


def test_donation_to_an_identity_gives_a_new_handle_on_the_same_memory() -> None:
    array = jnp.arange(64.0)
    where = pointer(array)
    taken = identity(array)
    assert array.is_deleted()
    assert pointer(taken) == where


def test_donation_does_nothing_while_a_view_is_alive() -> None:
    array = jnp.arange(64.0)
    view = np.asarray(array)
    assert not view.flags.writeable
    taken = identity(array)
    assert not array.is_deleted()
    assert pointer(taken) != pointer(array)
    assert np.shares_memory(view, np.asarray(array))
    assert view.tolist() == list(range(64))


def test_what_is_deleted_still_says_what_it_was() -> None:
    array = jnp.zeros((4, 8))
    array.delete()
    assert (array.shape, array.dtype, array.nbytes, array.size) == ((4, 8), jnp.float32, 128, 32)
    assert type(array.sharding) is jax.sharding.SingleDeviceSharding
    for use in (np.asarray, repr, lambda a: a + 1, lambda a: a.addressable_shards):
        with pytest.raises((RuntimeError, ValueError)):
            use(array)


@pytest.mark.skipif(not RESET.exists(), reason="the kernel does not tell")
class TestMemory:
    def test_delete_frees_at_once(self) -> None:
        array = jnp.zeros(LARGE).block_until_ready()
        held, before = array, resident_bytes()
        array.delete()
        assert before - resident_bytes() > 3 * LARGE
        assert held.is_deleted()

    def test_a_view_keeps_what_is_deleted(self) -> None:
        array = jnp.full(LARGE, 3.0).block_until_ready()
        view, before = np.asarray(array), resident_bytes()
        array.delete()
        assert array.is_deleted()
        assert before - resident_bytes() < LARGE
        assert view[0] == view[-1] == 3.0
        del view
        assert before - resident_bytes() > 3 * LARGE

    def test_an_array_in_use_is_freed_when_the_computation_ends(self) -> None:
        array = jnp.full((1024, 1024), 1e-3)
        result = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, b: b @ a, a))(array)
        array.delete()
        assert np.isfinite(result).all()


# --- shards ----------------------------------------------------------------------------------------------------------

SHARD = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
array = jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec("x")))
array.addressable_shards[1].data.delete()
assert not array.is_deleted()
print("asked", flush=True)
print(jax.jit(lambda a: a + 1)(array), flush=True)
print("answered")
"""


def test_deleting_a_shard_breaks_the_whole_which_does_not_know() -> None:
    done = subprocess.run([sys.executable, "-c", SHARD], check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "asked\n", done.stderr  # an error, or the end of the process, by version


def test_reading_a_sharded_array_whole_leaves_a_copy_that_delete_does_not_free() -> None:
    array = spread(jnp.zeros(64), "x")
    whole = np.asarray(array)
    shards = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    assert whole.ctypes.data not in shards  # a copy, and the array keeps it
    copy = weakref.ref(whole)
    del whole
    array.delete()
    assert copy() is not None
    del array
    gc.collect()
    assert copy() is None


def test_deleting_the_whole_deletes_its_shards() -> None:
    array = spread(jnp.zeros(8), "x")
    shards = [shard.data for shard in array.addressable_shards]
    assert [shard.nbytes for shard in shards] == [8] * 4
    array.delete()
    assert all(shard.is_deleted() for shard in shards)
    single = jnp.zeros(8)
    assert single.addressable_shards[0].data is single


def test_a_copy_keeps_its_sharding() -> None:
    for array in (spread(jnp.arange(8.0), "x"), spread(jnp.arange(8.0))):
        [copied] = jax.device_put([array], [array.sharding], may_alias=False)
        assert copied.sharding == array.sharding
        array.delete()
        assert not copied.is_deleted()
        assert np.array_equal(copied, np.arange(8.0))


# --- host memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("may_alias", [None, False, True])
def test_device_put_aliases_aligned_memory_whatever_it_is_told(may_alias: bool | None) -> None:  # noqa: FBT001
    memory = aligned(1024)
    array = jax.device_put(memory, may_alias=may_alias).block_until_ready()
    assert pointer(array) == memory.ctypes.data
    memory[0] = 7
    assert array[0] == 7


def test_what_is_not_aligned_is_copied_when_the_array_is_ready() -> None:
    memory = aligned(1 << 20, at=16)
    array = jax.device_put(memory)  # the copy is made in the background: wait before the memory is used again
    array.block_until_ready()
    memory[:] = 7
    assert not array.any()


def test_numpy_sees_the_memory_of_an_array_and_another_copy_of_4_bits() -> None:
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8):
        array = jnp.zeros(64, dtype)
        assert np.asarray(array).ctypes.data == pointer(array)
    packed = jnp.array([1, -2, 3, -4], jnp.int4)
    assert np.asarray(packed).nbytes == packed.nbytes == 4
    assert np.asarray(packed).ctypes.data != pointer(packed)


def test_64_bits_are_narrowed_silently() -> None:
    assert jnp.asarray(np.array([1], np.int64)).dtype == jnp.int32
    assert jax.device_put(np.array([1.0])).dtype == jnp.float32


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_an_update_that_reaches_over_the_end_is_moved() -> None:
    written = jax.lax.dynamic_update_slice(jnp.zeros(10), jnp.ones(4), (8,))
    assert written.tolist() == [0] * 6 + [1] * 4


def test_each_length_of_an_eager_slice_compiles_and_no_copy_does() -> None:
    compiled: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    array = jnp.zeros((1, 73, 2))
    compiled.clear()
    for length in range(20, 24):
        array[:, :length].block_until_ready()
    assert len(compiled) == 4
    compiled.clear()
    for length in range(40, 44):
        copied = jax.device_put(np.zeros((1, length, 2), np.float32))
        jax.device_put(copied, may_alias=False).block_until_ready()
    assert compiled == []


def test_abstract_evaluation_allocates_nothing() -> None:
    before = live_bytes()
    spec: Any = jax.eval_shape(lambda: jnp.zeros((1 << 20, 1 << 20)))
    assert live_bytes() == before
    assert spec.shape == (1 << 20, 1 << 20)


def test_the_cpu_says_nothing_of_its_memory() -> None:
    assert jax.devices()[0].memory_stats() is None
