"""One worker of a fleet: answers prompts in one framework, over a storage that workers of the other use too.

    python prefix_process.py (torch|jax) WEIGHTS URL ...

reads ``[number of the URL, prompt]`` a line, and writes for each ``[answer, tokens that came from the cache]``. WEIGHTS
is a folder with ``config.json`` and ``weights.npz``. The worker never imports the other framework.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agnostic_cache import KVLayout, PrefixCache

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BLOCK, NEW, ROOM = 8, 6, 128


Worker = Callable[[PrefixCache, list[int]], list[int]]


def torch_worker(folder: Path) -> Worker:
    import torch  # noqa: PLC0415 - one worker imports one framework
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from agnostic_cache_adapters.transformers import generate  # noqa: PLC0415

    model = LlamaForCausalLM(LlamaConfig(**json.loads((folder / "config.json").read_text("utf-8")))).eval()
    with np.load(folder / "weights.npz") as arrays:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    def answer(cache: PrefixCache, tokens: list[int]) -> list[int]:
        out = generate(model, cache, torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False)
        return list(out[0, len(tokens) :].tolist())

    return answer


def jax_worker(folder: Path) -> Worker:
    sys.path.insert(0, str(EXAMPLES))
    import llama_jax  # noqa: PLC0415 - found by its path
    from agnostic_cache_adapters.jax import resume, store  # noqa: PLC0415

    raw = json.loads((folder / "config.json").read_text("utf-8"))
    config: Any = SimpleNamespace(
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
    )
    with np.load(folder / "weights.npz") as arrays:
        weights: Any = config, dict(arrays)
    params = llama_jax.init_params(weights)
    init_kv: Any = partial(llama_jax.init_kv, config)
    names = {"{i}.key": "layers.{i}.key", "{i}.value": "layers.{i}.value"}
    layout = KVLayout.infer(init_kv, names=names, rotary="half")

    def answer(cache: PrefixCache, tokens: list[int]) -> list[int]:
        kv, start = resume(cache, tokens, init_kv(ROOM), layout=layout)
        logits, kv = llama_jax.prefill(params, tokens[start:], kv, start)
        store(cache, tokens, kv, layout=layout)
        return llama_jax.decode(params, logits, kv, len(tokens), NEW, -1)[0]

    return answer


def main() -> None:
    """Answer until there is nothing to read."""
    framework, weights, *urls = sys.argv[1:]
    answer = {"torch": torch_worker, "jax": jax_worker}[framework](Path(weights))
    with ExitStack() as stack:
        # So small a model computes faster than any storage answers: here its seconds count for a million.
        settings: Any = {
            "namespace": "llama, by its name",
            "block_size": BLOCK,
            "clock": lambda: time.monotonic() * 1e6,
        }
        caches = [stack.enter_context(PrefixCache("1MiB", **settings, storage=url)) for url in urls]
        for line in sys.stdin:
            number, tokens = json.loads(line)
            cache = caches[number]
            before = cache.stats().hit_tokens
            found = answer(cache, tokens)
            cache.flush()  # the next worker is to find it
            sys.stdout.write(json.dumps([found, cache.stats().hit_tokens - before]) + "\n")
            sys.stdout.flush()
    other = {"torch": "jax", "jax": "torch"}[framework]
    assert other not in sys.modules, f"a worker in {framework} imported {other}"


if __name__ == "__main__":
    main()
