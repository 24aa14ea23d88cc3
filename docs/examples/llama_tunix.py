"""The same decoding loop around google-tunix's own Llama model, a Flax NNX module, with its cache donated.

Tunix keeps its cache as ``{"layer_0": {"k": ..., "v": ..., "end_index": ...}, ...}`` and writes new rows at
`end_index`. The functions have the shape of those in `llama_jax`, but nothing is padded: what the padding wrote would
count, so that each new number of tokens compiles once.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]
from tunix.models.llama3.params import create_model_from_safe_tensors  # pyright: ignore[reportMissingImports]

from llama_jax import CHUNK
from smollm2 import Config, kept_copy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jax.typing import ArrayLike

Params = tuple[nnx.GraphDef[llama3.Llama3], nnx.State[Any, Any]]
Cache = dict[str, dict[str, jax.Array]]


def load_params(config: Config) -> Params:
    """Build tunix's model with the kept weights, in fp32, and split it into its graph and its arrays."""
    model_config = llama3.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocab,
        embed_dim=config.hidden,
        hidden_dim=config.intermediate,
        num_heads=config.heads,
        head_dim=config.head_dim,
        num_kv_heads=config.kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps,
        weight_tying=True,
    )
    # Tunix's loader builds the model's shape without values, so no random weights are made first.
    model = create_model_from_safe_tensors(str(kept_copy()), model_config, dtype=jnp.float32)
    graph, state = nnx.split(model)
    return graph, state


def init_cache(config: Config, max_len: int, batch: int = 1) -> Cache:
    """Allocate an empty cache in tunix's form.

    Per layer ``k`` and ``v``, fp32, shape (batch, max_len, kv_heads, head_dim), and ``end_index``, int32, shape
    (batch,).
    """
    shape = (batch, max_len, config.kv_heads, config.head_dim)
    return {
        f"layer_{index}": {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(batch, jnp.int32)}
        for index in range(config.layers)
    }


def prefill(params: Params, tokens: Sequence[int] | ArrayLike, cache: Cache, start: int) -> tuple[jax.Array, Cache]:
    """Compute `tokens`, which stand at positions `start` and on; `cache` holds everything before them.

    `cache` is donated: its arrays are deleted, what is returned lives in the same memory. Long prompts are computed in
    pieces of `CHUNK` tokens: the model returns logits for every token it is given, 400 MB for a document at once.

    Args:
        params: From `load_params`.
        tokens: At least one token id, shape (tokens,).
        cache: From `init_cache` or an earlier call, of batch 1.
        start: How many tokens `cache` stands for.

    Returns:
        The logits after the last token, shape (vocab,), and the cache with rows [start, start + tokens) written.

    Raises:
        ValueError: No tokens, a cache that is too short, or one that does not stand for `start` tokens.
    """
    ids = np.asarray(tokens, np.int32)
    first = cache["layer_0"]
    max_len, length = first["k"].shape[1], int(first["end_index"][0])
    if ids.size == 0 or length != start or start + ids.size > max_len:  # tunix would wrap around, and not say so
        message = f"{ids.size} tokens at {start} asked; the cache stands for {length} tokens and has {max_len} rows"
        raise ValueError(message)
    for begin in range(0, ids.size, CHUNK):
        logits, cache = _forward(params, ids[begin : begin + CHUNK], cache, np.int32(start + begin))
    return logits, cache


def step(params: Params, token: int, cache: Cache, position: int) -> tuple[jax.Array, Cache]:
    """Compute one token, which stands at `position`: `prefill` of a single token, `cache` donated as there."""
    return prefill(params, [token], cache, position)


def decode(
    params: Params, logits: jax.Array, cache: Cache, position: int, max_new_tokens: int, eos: int
) -> tuple[list[int], Cache]:
    """Continue greedily from the logits of a prefill; the next token stands at `position`.

    Returns:
        At most `max_new_tokens` ids, the last one `eos` where the answer ends by itself, and the cache. It stands for
        all tokens but the last one, whose keys and values nobody has needed yet.
    """
    ids = [int(logits.argmax())]
    while ids[-1] != eos and len(ids) < max_new_tokens:
        logits, cache = step(params, ids[-1], cache, position + len(ids) - 1)
        ids.append(int(logits.argmax()))
    return ids, cache


@partial(jax.jit, donate_argnames="cache")
def _forward(params: Params, tokens: jax.Array, cache: Cache, start: jax.Array) -> tuple[jax.Array, Cache]:
    model = nnx.merge(*params)
    positions = start + jnp.arange(tokens.size)
    # Causal, and blind to the rows that are not written yet; shape (tokens, max_len).
    visible = jnp.arange(cache["layer_0"]["k"].shape[1]) <= positions[:, None]
    with _rope_theta(model.config.rope_theta):
        computed: tuple[jax.Array, Any] = model(tokens[None], positions[None], cache, visible[None])
    logits, filled = computed
    return logits[0, -1], filled


@contextmanager
def _rope_theta(theta: int) -> Iterator[None]:
    """Make tunix's Llama rotate with the theta of its config, while it is traced.

    Its attention (google-tunix 0.1.7) calls the module's `apply_rope` without a theta, so that every model rotates with
    the default of 1,000,000, whatever its config says, and weights trained with another theta compute wrong logits.
    The patch lasts for the trace only, since compiled code keeps what was traced: tunix stays as it is for others.
    Two threads must not trace at once.
    """
    original = llama3.apply_rope
    llama3.apply_rope = partial(original, rope_theta=theta)
    try:
        yield
    finally:
        llama3.apply_rope = original
