"""A program: readers that call NumPy and jitted functions on borrowed JAX arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jax_subject import live_bytes
from stress import ELEMENTS, run

State = dict[str, jax.Array]


def make(value: float) -> State:
    both = jax.device_put([np.full(ELEMENTS, value, np.float32) for _ in range(2)])
    return dict(zip("kv", both, strict=True))


def with_numpy(state: State) -> tuple[float, float]:
    key, value = (np.asarray(array) for array in state.values())
    return float(key.min()), float(value.max())


@jax.jit
def least_and_greatest(state: State) -> jax.Array:
    return jnp.stack([state["k"].min(), state["v"].max()])


def with_jit(state: State) -> tuple[float, float]:
    low, high = least_and_greatest(state).tolist()
    return low, high


if __name__ == "__main__":
    run(make, {"NumPy": with_numpy, "jit": with_jit, "NumPy too": with_numpy, "jit too": with_jit}, live_bytes)
