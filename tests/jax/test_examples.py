"""The JAX example of the README runs, and its answers do not depend on the cache."""

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "jax_loop.py"


def test_readme_shows_the_example_that_is_tested() -> None:
    assert EXAMPLE.read_text("utf-8") in (EXAMPLE.parents[2] / "README.md").read_text("utf-8")


def test_a_document_is_computed_once_and_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))  # as when the program is run by its path
    example = runpy.run_path(str(EXAMPLE))
    model = example["model"]
    config = SimpleNamespace(layers=2, kv_heads=2, head_dim=8)
    params, init_kv = tiny_params(config), partial(model.init_kv, config)
    cache = example["make_cache"](params, init_kv)
    document, questions = list(range(3, 40)), [[50, 51], [52], [53, 54, 55], [50, 51]]
    for question in questions:
        expected = model.generate(params, document + question, init_kv(80), 0, max_new_tokens=16, eos=-1)
        assert example["answer"](params, cache, document + question, init_kv(80)) == expected
    assert cache.stats().hit_tokens == 37 + 37 + 38  # the last question was asked before


def test_a_prompt_that_leaves_no_room_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    model = runpy.run_path(str(EXAMPLE))["model"]
    config = SimpleNamespace(layers=2, kv_heads=2, head_dim=8)
    params, room = tiny_params(config), 80
    kv, logits = model.init_kv(config, room), None
    for length in range(1, room):
        token = length * 7 % 64
        logits, kv = model.step(params, token, kv, length - 1)
        if length in {1, 33, 50, 79}:
            prompt = [token * 7 % 64 for token in range(1, length + 1)]
            padded, _ = model.prefill(params, prompt, model.init_kv(config, room), 0)
            assert jnp.allclose(padded, logits, atol=1e-4)


def test_rows_that_are_not_written_yet_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    model = runpy.run_path(str(EXAMPLE))["model"]
    config = SimpleNamespace(layers=2, kv_heads=2, head_dim=8)
    params, prompt = tiny_params(config), [token * 7 % 64 for token in range(600)]
    monkeypatch.setattr(model, "LOOK", 128)
    few, _ = model.prefill(params, prompt, model.init_kv(config, 700), 0)
    monkeypatch.setattr(model, "LOOK", 1000)
    every, _ = model.prefill(params, prompt, model.init_kv(config, 700), 0)
    assert jnp.allclose(few, every, atol=1e-4)


def tiny_params(config: SimpleNamespace) -> dict[str, object]:
    """Random weights of a two-layer model of 32 hidden features and 64 tokens."""
    keys = iter(jax.random.split(jax.random.key(0), 64))
    hidden, narrow = 32, config.kv_heads * config.head_dim

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * 0.3

    layers = [
        {
            "attention_norm": jnp.ones(hidden),
            "query": normal(hidden, hidden),
            "key": normal(hidden, narrow),
            "value": normal(hidden, narrow),
            "out": normal(hidden, hidden),
            "mlp_norm": jnp.ones(hidden),
            "gate": normal(hidden, hidden),
            "up": normal(hidden, hidden),
            "down": normal(hidden, hidden),
        }
        for _ in range(config.layers)
    ]
    return {
        "embedding": normal(64, hidden),
        "layers": layers,
        "norm": jnp.ones(hidden),
        "norm_eps": jnp.float32(1e-5),
        "frequencies": 10000.0 ** -(jnp.arange(0, config.head_dim, 2) / config.head_dim),
    }
