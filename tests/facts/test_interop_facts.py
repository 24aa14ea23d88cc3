"""What the design takes for granted of DLPack between torch and JAX. A failure says that one of them has changed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_subject import live_bytes
from peak import RESET, resident_bytes
from torch.utils.dlpack import from_dlpack as to_torch

LARGE = 16 * 1024 * 1024
to_jax: Callable[..., Any] = jax.dlpack.from_dlpack
identity = jax.jit(lambda a: a, donate_argnums=0)


def pointer(array: Any) -> int:
    where: int = array.unsafe_buffer_pointer() if isinstance(array, jax.Array) else array.data_ptr()
    return where


# --- what is a copy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [None, False, True])
def test_jax_aliases_aligned_tensors_whatever_it_is_told(copy: bool | None) -> None:  # noqa: FBT001
    tensor = torch.zeros(1024)
    array = to_jax(tensor, copy=copy)
    assert pointer(array) == pointer(tensor)
    tensor[0] = 7
    assert array[0] == 7  # an array of JAX that changes


def test_real_copies() -> None:
    tensor = torch.zeros(1024)
    array = to_jax(tensor)
    for copied in (jnp.array(array, copy=True), jnp.copy(array), jax.device_put(array, may_alias=False)):
        assert pointer(copied) != pointer(tensor)


def test_torch_aliases_and_may_write_arrays_of_jax() -> None:
    array = jnp.zeros(64)
    tensor = to_torch(array)
    tensor.fill_(2)
    assert (array == 2).all()
    assert not array.is_deleted()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int8, torch.bool])
def test_the_small_dtypes_cross_without_a_copy(dtype: torch.dtype) -> None:
    tensor = torch.zeros(64).to(dtype)
    array = to_jax(tensor)
    assert pointer(array) == pointer(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert to_torch(array).dtype is dtype


def test_64_bits_are_narrowed_silently() -> None:
    for tensor, narrow in (
        (torch.ones(4, dtype=torch.int64), "int32"),
        (torch.ones(4, dtype=torch.float64), "float32"),
    ):
        assert to_jax(tensor).dtype.name == narrow


# --- what does not cross ---------------------------------------------------------------------------------------------


def test_strides() -> None:
    base = torch.zeros(4, 8, 16)
    for tensor in (base[:, :3], base[:, ::2], base[:, :1].expand(4, 5, 16)):
        with pytest.raises(jax.errors.JaxRuntimeError):
            to_jax(tensor)
    permuted = base.permute(2, 0, 1)
    array = to_jax(permuted)
    assert pointer(array) == pointer(base)
    assert array.format.layout.major_to_minor == (1, 2, 0)
    kept: Any = jax.device_put(array, may_alias=False)
    assert kept.format.layout.major_to_minor == (1, 2, 0)
    plain: Any = jnp.copy(array)
    assert plain.format.layout.major_to_minor == (0, 1, 2)


def test_what_is_not_aligned_is_copied_or_refused() -> None:
    tensor = torch.zeros(65)[1:]
    assert pointer(to_jax(tensor)) != pointer(tensor)
    with pytest.raises(ValueError):
        to_jax(tensor, copy=False)


def test_what_is_refused() -> None:
    with pytest.raises(BufferError):
        to_jax(torch.zeros(3, requires_grad=True))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(BufferError):
        to_torch(jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec("x"))))
    with pytest.raises(TypeError):
        torch.zeros(3, dtype=torch.bfloat16).numpy()


# --- whose memory it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["delete", "donate"])
def test_a_tensor_outlives_the_array_that_it_views(end: str) -> None:
    array = jnp.arange(4096.0)
    tensor = to_torch(array)
    if end == "delete":
        array.delete()
        assert array.is_deleted()
    else:
        identity(array)
        assert not array.is_deleted()  # nothing was donated: a copy was made
    jnp.full(4096, 7.0).block_until_ready()
    assert tensor.tolist() == list(range(4096))


def test_donating_what_torch_lent_leaves_the_tensor() -> None:
    tensor = torch.zeros(4096)
    array = to_jax(tensor)
    result = jax.jit(lambda a: a + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    assert pointer(result) != pointer(tensor)
    assert not tensor.any()


def test_each_import_is_a_handle_of_its_own() -> None:
    tensor = torch.zeros(64)
    one, other = to_jax(tensor), to_jax(tensor)
    one.delete()
    assert not other.is_deleted()
    back = to_jax(to_torch(other))
    other.delete()
    assert not back.is_deleted()


def test_jax_counts_what_only_a_tensor_holds() -> None:
    before = live_bytes()
    tensor = to_torch(jnp.zeros(64))
    assert live_bytes() - before == 256
    del tensor
    assert live_bytes() == before


@pytest.mark.skipif(not RESET.exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("order", ["array first", "tensor first"])
def test_memory_is_free_when_the_array_is_deleted_and_the_tensor_gone(order: str) -> None:
    array = jnp.full(LARGE, 3.0).block_until_ready()
    held, before = [to_torch(array)], resident_bytes()
    ends = [array.delete, held.clear]
    for end in ends if order == "array first" else reversed(ends):
        assert before - resident_bytes() < LARGE
        end()
    assert before - resident_bytes() > 3 * LARGE


def test_a_tensor_that_is_resized_does_not_ask_jax() -> None:
    tensor = torch.zeros(1 << 20)
    array = to_jax(tensor)
    where = pointer(array)
    tensor.untyped_storage().resize_(0)
    assert not array.is_deleted()
    assert pointer(array) == where  # and whoever reads it reads memory that is somebody else's: nobody does here
    array.delete()
    with pytest.raises(RuntimeError):
        to_torch(jnp.zeros(64)).untyped_storage().resize_(0)  # memory of JAX is safe from it


def test_a_view_of_what_is_not_computed_yet_waits() -> None:
    array = jnp.full((512, 512), 1e-3)
    result = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, b: b @ a, a))(array)
    assert np.array_equal(to_torch(result).numpy(), np.asarray(result))
