"""The three decoding loops of the demo, behind one face.

A state is the loop's own native cache: a `DynamicCache`, a list of buffers, google-tunix's dict. `warm` uses it up.
`reply` is what a program of one's own looks like: it takes prompts and a `PrefixCache`, and never sees a state.
"""

from __future__ import annotations

import copy
import gc
import time
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import llama_jax
import llama_tunix
from agnostic_cache import KVLayout
from agnostic_cache_adapters.jax import resume, store
from agnostic_cache_adapters.transformers import generate
from agnostic_cache_adapters.transformers.release import cache_of, generate_argument

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agnostic_cache import PrefixCache
    from smollm2 import Weights

CHUNK = llama_jax.CHUNK


def keep_compiled(folder: Path) -> None:
    """Let later runs load what XLA compiles now."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Answer(NamedTuple):
    """Token ids, and the seconds to the first of them, those for the state included."""

    ids: list[int]
    first_seconds: float


class Loop(ABC):
    """A way to compute a prompt and to continue it greedily.

    Attributes:
        name: As in the table.
        framework: Whose arrays its states hold.
        layout: Roles and names of the leaves, where the structure alone does not tell.
    """

    name: ClassVar[str]
    framework: ClassVar[str]
    layout: KVLayout | None = None

    def compile(self, document: list[int], question: list[int]) -> None:
        """Run every shape that is to come once, so that nothing is compiled while it is timed."""
        self.cold(document[:CHUNK], question, new_tokens=2)

    @abstractmethod
    def cold(self, document: list[int], question: list[int], new_tokens: int) -> tuple[Answer, Any]:
        """Answer from nothing; return the answer and a state that stands for `document`."""

    @abstractmethod
    def warm(self, state: Callable[[], Any], document: list[int], question: list[int], new_tokens: int) -> Answer:
        """Answer from a state that stands for `document`; `state` gives one to use up, inside of the timing."""

    @abstractmethod
    def reply(self, tokens: list[int], new_tokens: int, cache: PrefixCache | None = None) -> Answer:
        """Answer a prompt from the longest part of it that `cache` knows, and store what is new of it and the answer.

        Without a cache, answer from nothing.
        """

    @abstractmethod
    def template(self) -> Any:
        """Make an empty state."""

    @abstractmethod
    def small_state(self) -> Any:
        """Make some little state."""

    @abstractmethod
    def fork_by_hand(self, state: Any) -> Any:
        """Do what a careful user does today to keep `state` usable: the cheapest fork or copy that is safe."""

    @abstractmethod
    def live_bytes(self) -> int:
        """Observe how many bytes of arrays are alive in the framework."""


class TorchLoop(Loop):
    """Hugging Face `generate`."""

    name: ClassVar[str] = "torch"
    framework: ClassVar[str] = "torch"

    def __init__(self, model: Any) -> None:
        """Take a model in eval mode."""
        self.model = model

    def cold(self, document: list[int], question: list[int], new_tokens: int) -> tuple[Answer, DynamicCache]:
        """See `Loop.cold`."""
        answer, state = self._run(self.model.generate, document + question, new_tokens)
        state.crop(len(document) - state.get_seq_length())  # views of the first rows
        return answer, state

    def warm(self, state: Callable[[], Any], document: list[int], question: list[int], new_tokens: int) -> Answer:
        """See `Loop.warm`."""

        def from_state(prompt: torch.Tensor, **settings: Any) -> Any:
            return self.model.generate(prompt, **generate_argument(self.model, state()), **settings)

        return self._run(from_state, document + question, new_tokens)[0]

    def reply(self, tokens: list[int], new_tokens: int, cache: PrefixCache | None = None) -> Answer:
        """See `Loop.reply`: what changes in a program is that ``generate(model, cache, ...)`` is called."""
        plain = self.model.generate
        return self._run(plain if cache is None else partial(generate, self.model, cache), tokens, new_tokens)[0]

    @torch.inference_mode()
    def _run(self, generate_: Callable[..., Any], tokens: list[int], new_tokens: int) -> tuple[Answer, DynamicCache]:
        prompt = torch.tensor([tokens])
        clock = _FirstToken()
        result = generate_(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
        )
        return Answer(result.sequences[0, len(tokens) :].tolist(), clock.seconds), cache_of(result)

    def template(self) -> DynamicCache:
        """See `Loop.template`."""
        return DynamicCache(config=self.model.config)

    def small_state(self) -> DynamicCache:
        """See `Loop.small_state`."""
        return self._run(self.model.generate, [0], 1)[1]

    def fork_by_hand(self, state: DynamicCache) -> DynamicCache:
        """Copy the containers: dynamic layers never write their tensors in place."""
        fork = copy.copy(state)
        fork.layers = [copy.copy(layer) for layer in state.layers]
        return fork

    def live_bytes(self) -> int:
        """Add up every storage that a tensor which the collector sees refers to."""
        gc.collect()
        storages = (t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _FirstToken(BaseStreamer):
    """Notes when `generate` gives the first token: it streams the prompt, then one token after the other."""

    def __init__(self) -> None:
        self.begin, self.seconds, self.calls = time.perf_counter(), 0.0, 0

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        self.calls += 1
        if self.calls == 2:  # noqa: PLR2004 - the first call is the prompt
            self.seconds = time.perf_counter() - self.begin

    def end(self) -> None:
        pass


class _BufferLoop(Loop):
    """What both JAX loops share: states are pytrees of buffers that their jitted functions donate."""

    framework: ClassVar[str] = "jax"
    module: ClassVar[Any]

    def __init__(self, weights: Weights, max_len: int) -> None:
        """Take the sizes of the model; states are buffers of `max_len` tokens."""
        self.config, self.max_len = weights.config, max_len
        self.params: Any = None

    def cold(self, document: list[int], question: list[int], new_tokens: int) -> tuple[Answer, Any]:
        """See `Loop.cold`. Prompts are computed in chunks, so that these two calls are one prompt's."""
        begin = time.perf_counter()
        _, state = self.module.prefill(self.params, document, self.template(), 0)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        kept = self.fork_by_hand(state)
        ids, first_seconds = self.warm(lambda: state, document, question, new_tokens)
        return Answer(ids, seconds + first_seconds), kept

    def warm(self, state: Callable[[], Any], document: list[int], question: list[int], new_tokens: int) -> Answer:
        """See `Loop.warm`."""
        begin = time.perf_counter()
        logits, kv = self.module.prefill(self.params, question, state(), len(document))
        logits.block_until_ready()
        first_seconds = time.perf_counter() - begin
        position = len(document) + len(question)
        ids, _ = self.module.decode(self.params, logits, kv, position, new_tokens, self.config.eos)
        return Answer(ids, first_seconds)

    def reply(self, tokens: list[int], new_tokens: int, cache: PrefixCache | None = None) -> Answer:
        """See `Loop.reply`: what changes in a program are the lines with `resume` and `store`."""
        begin = time.perf_counter()
        kv, start = self.template(), 0
        if cache is not None:
            kv, start = resume(cache, tokens, kv, layout=self.layout)
        logits, kv = self.module.prefill(self.params, tokens[start:], kv, start)
        logits.block_until_ready()
        first_seconds = time.perf_counter() - begin
        ids, kv = self.module.decode(self.params, logits, kv, len(tokens), new_tokens, self.config.eos)
        if cache is not None:
            store(cache, [*tokens, *ids[:-1]], kv, layout=self.layout)  # the last token is not computed yet
        return Answer(ids, first_seconds)

    def fork_by_hand(self, state: Any) -> Any:
        """Copy every buffer, since the loop donates them."""
        return jax.tree.map(jnp.copy, state)

    def small_state(self) -> Any:
        """See `Loop.small_state`."""
        return {"small": jnp.zeros((1, 8))}

    def live_bytes(self) -> int:
        """Add up ``jax.live_arrays()``."""
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())


class JaxLoop(_BufferLoop):
    """The plain jitted loop of llama_jax.py."""

    name: ClassVar[str] = "jax"
    module: ClassVar[Any] = llama_jax

    def __init__(self, weights: Weights, max_len: int) -> None:
        """Place the weights, and find the token axes of the buffers."""
        super().__init__(weights, max_len)
        self.params = llama_jax.init_params(weights)
        self.layout = KVLayout.infer(
            lambda length: llama_jax.init_kv(self.config, length),
            names={"{i}.key": "layers.{i}.key", "{i}.value": "layers.{i}.value"},
            rotary="half",
        )

    def compile(self, document: list[int], question: list[int]) -> None:
        """See `Loop.compile`."""
        super().compile(document, question)
        for start in range(llama_jax.LOOK, self.max_len - CHUNK, llama_jax.LOOK):
            llama_jax.prefill(self.params, document[:CHUNK], self.template(), start)
        for length in llama_jax.ROUND, 2 * llama_jax.ROUND:
            llama_jax.prefill(self.params, document[:length], self.template(), 0)

    def template(self) -> llama_jax.KV:
        """See `Loop.template`."""
        return llama_jax.init_kv(self.config, self.max_len)


class TunixLoop(_BufferLoop):
    """google-tunix's own Llama model; its caches are known by their names."""

    name: ClassVar[str] = "tunix"
    module: ClassVar[Any] = llama_tunix

    def __init__(self, weights: Weights, max_len: int) -> None:
        """Load the weights into tunix's model."""
        super().__init__(weights, max_len)
        self.params = llama_tunix.load_params(self.config)

    def template(self) -> llama_tunix.Cache:
        """See `Loop.template`."""
        return llama_tunix.init_cache(self.config, self.max_len)
