"""JAX on a CUDA device, and across to torch: memory is free before the call returns, and streams wait."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agnostic_cache import KVLayout, StateCache, wrap
from agnostic_cache.eviction import PutStatus
from agnostic_cache.state.layout import TOKENS

SHAPE = (1, 4096, 1024)
NBYTES = 2 * 4096 * 1024 * 4
LAYOUT = KVLayout({"*": TOKENS(1)})


def kv(value: float = 0.0) -> dict[str, jax.Array]:
    state: dict[str, jax.Array] = jax.block_until_ready({name: jnp.full(SHAPE, value) for name in "kv"})
    return state


def used() -> int:
    jnp.zeros(1).block_until_ready()
    stats: Any = jax.devices()[0].memory_stats()
    nbytes: int = stats["bytes_in_use"]
    return nbytes


@jax.jit
def slowly(array: jax.Array) -> jax.Array:
    """Multiply for some tenths of a second; returns what it is given, for it is the unit matrix times a number."""
    unit = jnp.eye(4096)
    result: jax.Array = jax.lax.fori_loop(0, 200, lambda _, one: one @ unit, array)
    return result


def test_jax_computes_on_the_device() -> None:
    assert jax.devices()[0].platform == "gpu"


@pytest.mark.parametrize("move", [False, True])
def test_the_memory_of_what_is_evicted_is_free_when_put_returns(*, move: bool) -> None:
    before = used()
    cache = StateCache(2 * NBYTES)
    for key in range(5):
        state = kv(key)
        assert cache.put(key, state, move=move) is PutStatus.LEGAL
        del state
        with cache.borrow(key) as lent:
            jax.block_until_ready(lent)
        del lent
        assert used() - before == cache.current_bytes == min(key + 1, 2) * NBYTES
    cache.clear()
    assert used() == before


def test_a_computation_in_flight_reads_what_it_was_given() -> None:
    cache = StateCache(2 * NBYTES)
    cache.put("a", {"x": jnp.eye(4096) * 3}, move=True)
    slowly(jnp.eye(4096)).block_until_ready()
    with cache.borrow("a") as lent:
        result = slowly(lent["x"])  # type: ignore[index]
    cache.remove("a")
    rubbish = [jnp.full((4096, 4096), -1.0) for _ in range(8)]
    assert float(jnp.trace(result)) == 3 * 4096
    del rubbish


def test_a_template_is_filled_up_to_its_end() -> None:
    rows = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
    for length in (1, 9, 15, 16):
        state = wrap({"k": rows}, layout=LAYOUT).cut(0, length)
        template = jnp.zeros((1, 16, 2, 8))
        filled = state.unwrap(like={"k": template})
        assert template.is_deleted()
        assert np.array_equal(filled["k"][:, :length], rows[:, :length])
        assert not filled["k"][:, length:].any()


def test_jax_reads_what_torch_has_still_to_compute() -> None:
    state = wrap({"x": torch.zeros(4096, 1024, device="cuda")}).copy()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # noqa: SLF001 - a kernel that only takes time
    state.leaves["x"].array.fill_(7)
    crossed = state.to("jax")
    array = crossed.leaves["x"].array
    assert array.unsafe_buffer_pointer() == state.leaves["x"].array.data_ptr()
    assert bool((array == 7).all())


def test_torch_reads_what_jax_has_still_to_compute() -> None:
    slowly(jnp.eye(4096)).block_until_ready()
    array = slowly(jnp.eye(4096) * 5)
    tensor = wrap({"x": array}).to("torch").leaves["x"].array
    assert tensor.is_cuda
    assert float(tensor.trace()) == 5 * 4096


def test_memory_that_crossed_lives_until_both_are_gone() -> None:
    before = torch.cuda.memory_allocated()
    state = wrap({"x": torch.full((4096, 1024), 3.0, device="cuda")}).copy()
    crossed = state.to("jax")
    state.release()
    rubbish = [torch.full((4096, 1024), -1.0, device="cuda") for _ in range(4)]
    assert bool((crossed.leaves["x"].array == 3).all())
    crossed.release()
    del rubbish
    assert torch.cuda.memory_allocated() == before
