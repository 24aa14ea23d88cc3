"""The three decoding loops of the demo, behind one face.

A state is the loop's own native cache: a `DynamicCache`, a list of buffers, google-tunix's dict. `answer` uses it up.
"""

from __future__ import annotations

import copy
import gc
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import llama_jax
import llama_tunix
from agnostic_cache import KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import LlamaForCausalLM

    from smollm2 import Weights

CHUNK = llama_jax.CHUNK


def keep_compiled(folder: Path) -> None:
    """Let later runs load what XLA compiles now."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Answer(NamedTuple):
    """Token ids, and the seconds from the call (state included) to the first of them."""

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

    @abstractmethod
    def prefill(self, document: list[int]) -> Any:
        """Compute the state of `document`."""

    @abstractmethod
    def answer(self, state: Callable[[], Any], document: list[int], question: list[int], new_tokens: int = 1) -> Answer:
        """Continue `document` + `question` greedily.

        `state` gives what stands for `document`, to be used up, or None for nothing; it is called inside of the timing.
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

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Take a model in eval mode."""
        self.model = model

    @torch.inference_mode()
    def prefill(self, document: list[int]) -> DynamicCache:
        """See `Loop.prefill`."""
        state = self.template()
        self.model(torch.tensor([document]), past_key_values=state, logits_to_keep=1)
        return state

    @torch.inference_mode()
    def answer(self, state: Callable[[], Any], document: list[int], question: list[int], new_tokens: int = 1) -> Answer:
        """See `Loop.answer`."""
        prompt = torch.tensor([document + question])
        clock = _FirstToken()
        ready = state()
        options = {} if ready is None else {"past_key_values": ready}
        tokens = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            **options,
        )
        return Answer(tokens[0, prompt.shape[1] :].tolist(), clock.seconds)

    def template(self) -> DynamicCache:
        """See `Loop.template`."""
        return DynamicCache(config=self.model.config)

    def small_state(self) -> DynamicCache:
        """See `Loop.small_state`."""
        return self.prefill([0])

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

    def prefill(self, document: list[int]) -> Any:
        """See `Loop.prefill`."""
        _, state = self.module.prefill(self.params, document, self.template(), 0)
        return jax.block_until_ready(state)

    def answer(self, state: Callable[[], Any], document: list[int], question: list[int], new_tokens: int = 1) -> Answer:
        """See `Loop.answer`."""
        begin = time.perf_counter()
        kv = state()
        tokens, start = (question, len(document)) if kv is not None else (document + question, 0)
        logits, kv = self.module.prefill(self.params, tokens, kv if kv is not None else self.template(), start)
        logits.block_until_ready()
        first_seconds = time.perf_counter() - begin
        ids, _ = self.module.decode(self.params, logits, kv, start + len(tokens), new_tokens, self.config.eos)
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
