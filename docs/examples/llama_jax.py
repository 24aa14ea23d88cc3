"""A Llama decoding loop in plain JAX, with a donated cache of fixed length.

It is what a JAX user writes by hand: parameters in a pytree, one preallocated buffer per layer for keys and one for
values, a jitted forward that consumes these buffers and returns them filled further. `start` is a traced number, so one
compilation serves every start; numbers of tokens and rows are rounded up, so that few compilations serve all prompts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.typing import ArrayLike

    from smollm2 import Config, Weights

Params = dict[str, Any]
KV = list[dict[str, jax.Array]]

CHUNK = 128  # tokens that one call computes; see prefill
ROUND = 32  # a shorter call is padded to this, or to twice as many, and so on: for fewer shapes to compile
LOOK = (
    1024  # a whole chunk looks at a multiple of so many rows: rows that nobody has written yet take as long as others
)


def init_params(weights: Weights) -> Params:
    """Turn Hugging Face weights into the pytree that this file computes with: arrays only, projections (in, out)."""
    config, arrays = weights

    def transposed(name: str) -> jax.Array:
        return jnp.asarray(np.ascontiguousarray(arrays[f"{name}.weight"].T))

    def layer(at: str) -> Params:
        return {
            "attention_norm": jnp.asarray(arrays[f"{at}.input_layernorm.weight"]),
            "query": transposed(f"{at}.self_attn.q_proj"),
            "key": transposed(f"{at}.self_attn.k_proj"),
            "value": transposed(f"{at}.self_attn.v_proj"),
            "out": transposed(f"{at}.self_attn.o_proj"),
            "mlp_norm": jnp.asarray(arrays[f"{at}.post_attention_layernorm.weight"]),
            "gate": transposed(f"{at}.mlp.gate_proj"),
            "up": transposed(f"{at}.mlp.up_proj"),
            "down": transposed(f"{at}.mlp.down_proj"),
        }

    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return {
        "embedding": jnp.asarray(arrays["model.embed_tokens.weight"]),
        "layers": [layer(f"model.layers.{index}") for index in range(config.layers)],
        "norm": jnp.asarray(arrays["model.norm.weight"]),
        "norm_eps": jnp.float32(config.norm_eps),
        "frequencies": jnp.asarray(config.rope_theta**-exponents),  # radians per position, shape (head_dim / 2,)
    }


def init_kv(config: Config, max_len: int) -> KV:
    """Allocate empty buffers: per layer ``key`` and ``value``, fp32, shape (1, max_len, kv_heads, head_dim)."""
    shape = (1, max_len, config.kv_heads, config.head_dim)
    return [{"key": jnp.zeros(shape), "value": jnp.zeros(shape)} for _ in range(config.layers)]


def prefill(params: Params, tokens: Sequence[int] | ArrayLike, kv: KV, start: int) -> tuple[jax.Array, KV]:
    """Compute `tokens`, which stand at positions `start` and on; `kv` holds everything before them.

    `kv` is donated: its arrays are deleted, what is returned lives in the same memory. Long prompts are computed in
    pieces of `CHUNK` tokens, which bounds the scores held at once, and the last piece is padded, so that prompts of any
    length share compiled code. What the padding writes lies behind the prompt: no token looks there, and the next one
    overwrites it.

    Args:
        params: From `init_params`.
        tokens: At least one token id, shape (tokens,).
        kv: From `init_kv` or an earlier call.
        start: How many tokens `kv` stands for.

    Returns:
        The logits after the last token, shape (vocab,), and the buffers with rows [start, start + tokens) written.

    Raises:
        ValueError: No tokens, or buffers that are too short for them.
    """
    ids = np.asarray(tokens, np.int32)
    max_len = kv[0]["key"].shape[1]
    if ids.size == 0 or start + ids.size > max_len:  # dynamic_update_slice would shift the rows, and not say so
        message = f"{ids.size} tokens at {start} asked; the cache has {max_len} rows"
        raise ValueError(message)
    for begin in range(0, ids.size, CHUNK):
        piece = ids[begin : begin + CHUNK]
        padded = max(ROUND, 1 << (piece.size - 1).bit_length()) if piece.size > 1 else 1
        if start + begin + padded > max_len:  # no room for it: compiles once more, for this very length
            padded = piece.size
        tokens = np.pad(piece, (0, padded - piece.size))
        look = min(-(-(start + begin + CHUNK) // LOOK) * LOOK, max_len) if padded == CHUNK else max_len
        logits, kv = _forward(params, tokens, kv, np.int32(start + begin), np.int32(piece.size), look)
    return logits, kv


def step(params: Params, token: int, kv: KV, position: int) -> tuple[jax.Array, KV]:
    """Compute one token, which stands at `position`: `prefill` of a single token, `kv` donated as there."""
    return prefill(params, [token], kv, position)


def decode(
    params: Params, logits: jax.Array, kv: KV, position: int, max_new_tokens: int, eos: int
) -> tuple[list[int], KV]:
    """Continue greedily from the logits of a prefill; the next token stands at `position`.

    Returns:
        At most `max_new_tokens` ids, the last one `eos` where the answer ends by itself, and the buffers. These stand
        for all tokens but the last one, whose keys and values nobody has needed yet.
    """
    ids = [int(logits.argmax())]
    while ids[-1] != eos and len(ids) < max_new_tokens:
        logits, kv = step(params, ids[-1], kv, position + len(ids) - 1)
        ids.append(int(logits.argmax()))
    return ids, kv


def generate(
    params: Params, tokens: Sequence[int] | ArrayLike, kv: KV, start: int, max_new_tokens: int, eos: int
) -> list[int]:
    """Prefill `tokens` at `start` and answer greedily; see `prefill` and `decode`. `kv` is used up."""
    logits, kv = prefill(params, tokens, kv, start)
    ids, _ = decode(params, logits, kv, start + np.size(tokens), max_new_tokens, eos)
    return ids


@partial(jax.jit, donate_argnames="kv", static_argnames="look")
def _forward(
    params: Params, tokens: jax.Array, kv: KV, start: jax.Array, count: jax.Array, look: int
) -> tuple[jax.Array, KV]:
    """Compute `tokens`, of which the first `count` are the prompt's, from the first `look` rows; see `prefill`."""
    positions = start + jnp.arange(tokens.size)
    angles = positions[:, None] * params["frequencies"]
    rotation = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # each of shape (tokens, 1, head_dim / 2)
    # Causal, and blind to the rows that are not written yet; shape (tokens, look).
    visible = jnp.arange(look) <= positions[:, None]

    hidden = params["embedding"][tokens][None]
    filled = []
    # Unrolled: on a CPU a lax.scan copies each layer's weights and rows on every step, which made a step five times
    # slower.
    for layer, rows in zip(params["layers"], kv, strict=True):
        hidden, written = _layer(layer, hidden, rows, start, rotation, visible, params["norm_eps"])
        filled.append(written)
    last = _norm(hidden[0, count - 1], params["norm"], params["norm_eps"])
    return params["embedding"] @ last, filled


@jax.jit  # traced once, not once per layer
def _layer(
    layer: Params,
    hidden: jax.Array,
    rows: dict[str, jax.Array],
    start: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    visible: jax.Array,
    norm_eps: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute one layer; return what the next one takes, and the rows with those of the new tokens."""
    attended, written = _attend(layer, _norm(hidden, layer["attention_norm"], norm_eps), rows, start, rotation, visible)
    hidden += attended
    normed = _norm(hidden, layer["mlp_norm"], norm_eps)
    return hidden + (jax.nn.silu(normed @ layer["gate"]) * (normed @ layer["up"])) @ layer["down"], written


def _attend(
    layer: Params,
    hidden: jax.Array,
    rows: dict[str, jax.Array],
    start: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    visible: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attend from the new tokens, shape (1, tokens, hidden), to the rows; return the mix and the rows with theirs."""
    kv_heads, dim = rows["key"].shape[2:]
    queries, keys, values = (
        (hidden @ layer[name]).reshape(*hidden.shape[:2], -1, dim) for name in ("query", "key", "value")
    )
    keys = jax.lax.dynamic_update_slice_in_dim(rows["key"], _rotate(keys, *rotation), start, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(rows["value"], values, start, axis=1)

    # The heads that share a key-value head are folded into its query axis: the products are plain batched matmuls.
    # A five-axis einsum, or repeated keys, says the same and is up to three times slower on a long prefill.
    queries = _rotate(queries, *rotation).swapaxes(1, 2)  # (1, heads, tokens, dim)
    folded = queries.reshape(1, kv_heads, -1, dim)
    look = visible.shape[1]
    scores = jnp.einsum("bhqd,bshd->bhqs", folded, keys[:, :look]) / jnp.sqrt(dim).astype(keys.dtype)
    scores = scores.reshape(*queries.shape[:3], -1)  # (1, heads, tokens, look)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).reshape(*folded.shape[:3], -1)
    mixed = jnp.einsum("bhqs,bshd->bhqd", weights, values[:, :look]).reshape(queries.shape)
    return mixed.swapaxes(1, 2).reshape(hidden.shape) @ layer["out"], {"key": keys, "value": values}


def _norm(hidden: jax.Array, weight: jax.Array, eps: jax.Array) -> jax.Array:
    return hidden * jax.lax.rsqrt(jnp.square(hidden).mean(axis=-1, keepdims=True) + eps) * weight


def _rotate(heads: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads, shape (1, tokens, heads, dim), by their positions, in the halves convention of Hugging Face."""
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
