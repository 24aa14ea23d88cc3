"""The adapter of Hugging Face caches keeps the contract of adapters, and reused prefixes generate the same tokens."""

import dataclasses
import functools
import json
import threading
from collections import Counter, UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_structures import SIZES
from no_metadata import check_adapter
from torch_subject import TorchSubject, live_bytes
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    QuantizedCache,
)

from agnostic_cache import KVLayout, KVState, SimpleLRUCache, wrap
from agnostic_cache.errors import LengthMismatchError, MissingLeavesError, StructureMismatchError, UnknownValueError
from agnostic_cache.state.layout import SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.state.tree import Node, build
from agnostic_cache.testing import AdapterSuite
from agnostic_cache_adapters.transformers import TransformersAdapter, on_evict
from agnostic_cache_adapters.transformers.release import cache_of, forward_argument, generate_argument

WINDOW_TOKENS = 6
PROMPT = 14


class TestTransformersAdapter(TorchSubject, AdapterSuite):
    def test_the_most_derived_adapter_serves_torch(self) -> None:
        assert isinstance(self.adapter, TransformersAdapter)


class Tiny:
    """A model of random weights, its prompt, and what it answers without any reuse."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.config = model.config
        self.ids = torch.randint(2, 64, (1, PROMPT))
        self.wanted = self.generate(self.ids, None)

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, cache: Any) -> list[int]:
        given = generate_argument(self.model, cache)
        out = self.model.generate(ids, **given, max_new_tokens=3, do_sample=False)
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    @torch.no_grad()
    def prefill(self, length: int, cache: Any = None, *, start: int = 0) -> Any:
        given = forward_argument(self.model, cache)
        return cache_of(self.model(self.ids[:, start:length], **given, use_cache=True))

    def recorded(self, length: int) -> DynamicCache:
        """Prefill a cache that keeps every row of its windows."""
        cache = DynamicCache(config=self.config)
        for layer in cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()
        self.prefill(length, cache)
        return cache


@pytest.fixture(scope="module")
def llama() -> Tiny:
    torch.manual_seed(0)
    return Tiny(LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture(scope="module")
def mistral() -> Tiny:
    torch.manual_seed(0)
    return Tiny(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW_TOKENS)))


@pytest.fixture(params=["llama", "mistral"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    found: Tiny = request.getfixturevalue(request.param)
    return found


def kv(length: int, layers: int = 2, seed: int = 0, cache: Any = None) -> Any:
    """Return a cache of random rows."""
    source = torch.Generator().manual_seed(seed)
    cache = DynamicCache() if cache is None else cache
    for layer in range(layers):
        cache.update(*torch.rand(2, 1, 2, length, 8, generator=source), layer)
    return cache


def sliding(window: int, layers: int = 2) -> DynamicCache:
    """Return an empty cache of sliding windows."""
    return DynamicCache(config=MistralConfig(**{**SIZES, "num_hidden_layers": layers}, sliding_window=window))


def tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def bits(state: KVState) -> list[torch.Tensor]:
    return [leaf.array.clone() for leaf in state.leaves.values()]


def pointers(cache: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors(cache)]


class TestReuse:
    """A prefix that was kept answers as the whole prompt does."""

    def test_any_prefix_of_full_attention(self, llama: Tiny) -> None:
        state = wrap(llama.prefill(PROMPT))
        for length in range(1, PROMPT):
            assert llama.generate(llama.ids, state.cut(0, length).unwrap()) == llama.wanted, length

    def test_any_prefix_of_a_recorded_window(self, mistral: Tiny) -> None:
        state = wrap(mistral.recorded(PROMPT))
        for length in range(1, PROMPT):
            assert mistral.generate(mistral.ids, state.cut(0, length).unwrap()) == mistral.wanted, length

    def test_a_window_that_has_moved_on_is_refused(self, mistral: Tiny) -> None:
        state = wrap(mistral.prefill(PROMPT - 1))
        for length in range(1, PROMPT - 1):
            with pytest.raises(MissingLeavesError):
                state.cut(0, length).unwrap()
        assert mistral.generate(mistral.ids, state.cut(0, PROMPT - 1).unwrap()) == mistral.wanted
        short = wrap(mistral.prefill(WINDOW_TOKENS - 1))
        for length in range(1, WINDOW_TOKENS):
            assert mistral.generate(mistral.ids, short.cut(0, length).unwrap()) == mistral.wanted, length

    def test_blocks_that_were_stored_as_the_prompt_was_computed(self, tiny: Tiny) -> None:
        block, cache, blocks = 4, DynamicCache(config=tiny.config), []
        for end in range(block, PROMPT, block):
            tiny.prefill(end, cache, start=end - block)
            blocks.append(wrap(cache).cut(end - block, end))
        for count in range(1, len(blocks) + 1):
            joined = KVState.join(blocks[:count])
            assert joined.length == count * block
            assert tiny.generate(tiny.ids, joined.copy().unwrap()) == tiny.wanted
            assert tiny.generate(tiny.ids, joined.unwrap(like=DynamicCache(config=tiny.config))) == tiny.wanted

    @pytest.mark.parametrize("recorded", [False, True])
    def test_templates_of_every_kind(self, tiny: Tiny, *, recorded: bool) -> None:
        length = PROMPT - 1
        state = wrap(tiny.recorded(length) if recorded else tiny.prefill(length)).copy()
        used = kv(3, cache=DynamicCache(config=tiny.config))
        for like in (DynamicCache(config=tiny.config), used):
            assert tiny.generate(tiny.ids, state.unwrap(like=like)) == tiny.wanted

    def test_a_full_cache_fills_windows(self, mistral: Tiny) -> None:
        full = wrap(mistral.prefill(PROMPT - 1, DynamicCache())).copy()
        assert {leaf.role for leaf in full.leaves.values()} == {TOKENS(2)}
        windows = full.unwrap(like=DynamicCache(config=mistral.config))
        assert {tensor.shape[2] for tensor in tensors(windows)} == {WINDOW_TOKENS - 1}
        assert mistral.generate(mistral.ids, windows) == mistral.wanted
        assert mistral.generate(mistral.ids, full.unwrap(like=DynamicCache())) == mistral.wanted

    def test_what_is_kept_survives_ten_reuses(self, tiny: Tiny) -> None:
        kept = wrap(tiny.prefill(10)).copy()
        before, where = bits(kept), [leaf.array.data_ptr() for leaf in kept.leaves.values()]
        for seed in range(10):
            suffix = torch.randint(2, 64, (1, 2), generator=torch.Generator().manual_seed(seed))
            ids = torch.cat([tiny.ids[:, :10], suffix], dim=1)
            fork = kept.fork().unwrap()
            assert pointers(fork) == where  # nothing was copied
            tiny.generate(ids, fork)
            assert all(map(torch.equal, bits(kept), before))
        assert tiny.generate(tiny.ids, kept.fork().unwrap()) == tiny.wanted

    def test_a_static_cache_is_copied_for_each_reuse(self, llama: Tiny) -> None:
        cache = llama.prefill(10, StaticCache(config=llama.config, max_cache_len=32))
        kept = wrap(cache, length=10).copy()
        before = bits(kept)
        for _ in range(2):
            fork = kept.fork().unwrap()
            assert type(fork) is StaticCache
            assert llama.generate(llama.ids, fork) == llama.wanted
            assert all(map(torch.equal, bits(kept), before))
        shorter = kept.cut(0, 9)
        assert {leaf.array.shape[2] for leaf in shorter.leaves.values() if leaf.role == TOKENS(2)} == {9}
        native = shorter.unwrap()
        assert [tensor.shape[2] for tensor in tensors(native)] == [32] * 4  # room as before
        assert llama.generate(llama.ids, native) == llama.wanted

    def test_a_state_goes_through_host_memory(self, tiny: Tiny) -> None:
        kept = wrap(tiny.prefill(PROMPT - 1)).to("host")
        parts = [kept.cut(0, 4), kept.cut(4, PROMPT - 1)]
        back = KVState.join(parts).to("torch")
        assert tiny.generate(tiny.ids, back.unwrap()) == tiny.wanted

    def test_rows_by_token_and_rows_by_head_are_the_same_state(self, llama: Tiny) -> None:
        state = wrap(llama.prefill(PROMPT - 1))
        layout = KVLayout({"*": TOKENS(1)}, names={"{i}.k": "layers.{i}.key", "{i}.v": "layers.{i}.value"})
        buffers = {str(i): {name: torch.zeros(1, 20, 2, 8) for name in "kv"} for i in range(2)}
        native = state.unwrap(like=buffers, layout=layout)
        for i in range(2):
            rows = state.leaves[f"layers.{i}.value"].array.transpose(1, 2)
            assert torch.equal(native[str(i)]["v"], torch.cat([rows, torch.zeros(1, 21 - PROMPT, 2, 8)], dim=1))
        back = wrap(native, layout=layout, length=PROMPT - 1)
        caches = [back.unwrap(like=like) for like in (DynamicCache(), DynamicCache(config=llama.config))]
        for buffer in native.values():  # borrowed, and written by its owner
            buffer["k"].zero_()
            buffer["v"].zero_()
        assert [llama.generate(llama.ids, cache) for cache in caches] == [llama.wanted] * 2


class TestStructure:
    def test_leaves_have_canonical_names_and_axes(self) -> None:
        leaves = wrap(kv(5)).leaves
        assert list(leaves) == ["layers.0.key", "layers.0.value", "layers.1.key", "layers.1.value"]
        assert {leaf.axes for leaf in leaves.values()} == {("batch", "heads", "tokens", "dim")}
        assert {leaf.role for leaf in leaves.values()} == {TOKENS(2)}
        windows = wrap(kv(9, cache=sliding(4))).leaves
        assert list(windows) == list(leaves)
        assert {(leaf.role, leaf.first) for leaf in windows.values()} == {(WINDOW(2, 3), 6)}

    def test_a_cache_comes_back_fresh_around_its_tensors(self) -> None:
        for cache in (kv(5), kv(9, cache=sliding(4)), kv(5, cache=DynamicCache(config=LlamaConfig(**SIZES)))):
            back = wrap(cache).unwrap()
            assert type(back) is DynamicCache
            assert back is not cache
            assert back.layers is not cache.layers
            assert [type(layer) for layer in back.layers] == [type(layer) for layer in cache.layers]
            assert all(layer is not other for layer, other in zip(back.layers, cache.layers, strict=True))
            assert pointers(back) == pointers(cache)
            assert back.get_seq_length() == cache.get_seq_length()
            before = [tensor.shape for tensor in tensors(cache)]
            kv(1, cache=back)  # grows the one, not the other
            assert [tensor.shape for tensor in tensors(cache)] == before

    def test_a_structure_from_json_is_a_cache_again(self) -> None:
        for cache in (kv(5), kv(9, cache=sliding(4))):
            state = wrap(cache)
            node = Node.from_json(json.loads(json.dumps(state.structure)))
            arrays = {name: leaf.array for name, leaf in state.leaves.items()}
            back = build(node, arrays, state.length, state.adapter)
            assert type(back) is DynamicCache
            assert [vars(layer).keys() for layer in back.layers] == [vars(layer).keys() for layer in cache.layers]
            assert pointers(back) == pointers(cache)
            assert back.get_seq_length() == cache.get_seq_length()
        unknown = wrap(kv(5, cache=Remembering()))
        node = Node.from_json(unknown.structure)
        with pytest.raises(StructureMismatchError):
            build(node, {}, 5, unknown.adapter)

    def test_layers_that_hold_nothing_ride_along(self) -> None:
        cache = kv(5)
        cache.layers[1:1] = [DummyLayer(), DynamicLayer()]
        back = wrap(cache).copy().unwrap()
        assert [type(layer) for layer in back.layers] == [DynamicLayer, DummyLayer, DynamicLayer, DynamicLayer]
        assert [layer.is_initialized for layer in back.layers] == [True, True, False, True]

    def test_a_cache_that_was_initialised_early_is_empty(self) -> None:
        def early() -> DynamicCache:
            cache = DynamicCache(config=LlamaConfig(**SIZES))
            cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
            return cache

        with pytest.raises(UnknownValueError):
            wrap(early())
        filled = wrap(kv(5)).unwrap(like=early())
        assert pointers(filled) != pointers(kv(5))
        assert filled.get_seq_length() == 5

    def test_no_rows_are_a_state_too(self) -> None:
        for cache in (kv(5), kv(9, cache=sliding(4))):
            empty = wrap(cache).cut(0, 0)
            native = empty.unwrap()
            assert native.get_seq_length() == 0
            assert wrap(native).length == 0
            assert kv(3, cache=native).get_seq_length() == 3

    def test_lengths_that_differ_between_layers_are_refused(self) -> None:
        cache = kv(5)
        cache.layers[1] = kv(4).layers[1]
        with pytest.raises(LengthMismatchError):
            wrap(cache)
        for length in (4, 6):
            with pytest.raises(LengthMismatchError):
                wrap(kv(5), length=length)

    def test_an_empty_cache_is_no_state(self) -> None:
        for value in (DynamicCache(), DynamicCache(config=LlamaConfig(**SIZES)), [DynamicCache()]):
            with pytest.raises(UnknownValueError):
                wrap(value)

    def test_cross_attention_is_a_snapshot_that_forks_share(self) -> None:
        pair = EncoderDecoderCache(kv(5), kv(3, seed=1))
        state = wrap(pair).copy()
        assert state.length == 5
        assert state.leaves["self_attention_cache.layers.1.key"].role == TOKENS(2)
        crossed = {name for name in state.leaves if name.startswith("cross_attention_cache.layers.")}
        assert {state.leaves[name].role for name in crossed} == {SNAPSHOT}
        assert len(crossed) == 4
        assert state.cut(0, 4).missing == crossed
        fork = state.fork().unwrap()
        assert type(fork) is EncoderDecoderCache
        assert fork.is_updated == {0: True, 1: True}
        assert set(pointers(fork.cross_attention_cache)) == {state.leaves[name].array.data_ptr() for name in crossed}
        fork.reset()
        assert pair.is_updated == {0: True, 1: True}
        assert state.fork().unwrap().is_updated == {0: True, 1: True}
        parts = [state.cut(0, 2), state.cut(2, 5)]
        joined = KVState.join(parts).unwrap(like=EncoderDecoderCache(DynamicCache(), DynamicCache()))
        assert joined.is_updated == {0: True, 1: True}
        for half, seed in ((joined.self_attention_cache, 0), (joined.cross_attention_cache, 1)):
            length = half.get_seq_length()
            assert all(map(torch.equal, tensors(half), tensors(kv(length, seed=seed))))

    def test_a_cropped_cache_keeps_its_storage_and_a_copy_does_not(self) -> None:
        cache = kv(20)
        cache.crop(-15)
        state = wrap(cache)
        assert state.length == 5
        assert state.copy().nbytes == 4 * 2 * 5 * 8 * 4
        assert state.nbytes > state.copy().nbytes


class Remembering(DynamicCache):
    """A cache of a user, that holds a tensor beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.arange(4)


class Pair(EncoderDecoderCache):
    """A pair of caches of a user."""

    def __init__(self, *caches: Any) -> None:
        super().__init__(*caches)
        self.notes = [1]


class CountingLayer(DynamicLayer):
    """A layer that nobody here has seen: it writes in place what it counts."""

    notes: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = torch.zeros(3)
        self.flags = {"used": False}

    def use(self) -> None:
        self.counts += 1
        self.flags["used"] = True


class TestUnknownClasses:
    def test_an_unknown_layer_is_a_snapshot_and_copied(self) -> None:
        cache = kv(5)
        cache.layers.append(CountingLayer())
        cache.update(torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8), 2)
        state = wrap(cache)
        names = {name for name, leaf in state.leaves.items() if leaf.role is SNAPSHOT}
        assert names == {"layers.2.keys", "layers.2.values", "layers.2.counts"}
        assert state.cut(0, 4).missing == names
        kept = state.copy()
        before = bits(kept)
        for _ in range(2):
            fork = kept.fork().unwrap()
            layer = fork.layers[2]
            assert type(layer) is CountingLayer
            assert layer.flags == {"used": False}
            layer.use()
            fork.layers[2].keys.zero_()
            assert all(map(torch.equal, bits(kept), before))
        assert pointers(kept.fork().unwrap())[:4] == [leaf.array.data_ptr() for leaf in kept.leaves.values()][:4]
        with pytest.raises(StructureMismatchError):
            state.unwrap(like=DynamicCache())

    def test_a_cache_of_another_class_keeps_what_it_holds(self) -> None:
        cache = kv(5, cache=Remembering())
        kept = wrap(cache).copy()
        assert "seen" in kept.leaves
        cache.seen.zero_()
        fork = kept.fork().unwrap()
        assert type(fork) is Remembering
        assert fork.seen.tolist() == [0, 1, 2, 3]
        fork.seen.zero_()
        assert kept.leaves["seen"].array.tolist() == [0, 1, 2, 3]

    def test_recurrent_states_are_copied_with_their_flags(self) -> None:
        layer = LinearAttentionLayer()
        layer.update_conv_state(torch.rand(1, 4, 3))
        layer.update_recurrent_state(torch.rand(1, 2, 4))
        cache = kv(5)
        cache.layers.append(layer)
        kept = wrap(cache).copy()
        assert kept.cut(0, 4).missing == {"layers.2.conv_states_0", "layers.2.recurrent_states_0"}
        before = bits(kept)
        fork = kept.fork().unwrap()
        fork.layers[2].reset()
        assert all(map(torch.equal, bits(kept), before))
        again = kept.fork().unwrap().layers[2]
        assert again.has_previous_state == layer.has_previous_state != fork.layers[2].has_previous_state
        assert all(map(torch.equal, bits(wrap([again])), bits(wrap([layer]))))

    def test_a_quantised_layer_is_a_snapshot(self) -> None:
        cache = QuantizedCache("fp8", config=LlamaConfig(**SIZES))
        kv(5, cache=cache)
        state = wrap(cache, length=5)
        assert {leaf.role for leaf in state.leaves.values()} == {SNAPSHOT}
        fork = state.fork().unwrap()
        assert [type(layer) for layer in fork.layers] == [type(layer) for layer in cache.layers]
        one, other = (kv(1, seed=7, cache=c) for c in (fork, state.fork().unwrap()))
        assert all(map(torch.equal, bits(wrap(one, length=6)), bits(wrap(other, length=6))))
        assert cache.get_seq_length() == 5

    def test_what_a_stranger_counts_is_not_shared(self) -> None:
        cache = kv(5)
        layer = CountingLayer()
        layer.notes = {"seen": [1], "of": {"a": Counter()}}
        layer.update(*torch.rand(2, 1, 2, 5, 8))
        cache.layers.append(layer)
        kept = wrap(cache).copy()
        for owner in (cache, kept.fork().unwrap(), kept.fork().unwrap()):
            assert owner.layers[2].notes["seen"] == [1]
            owner.layers[2].notes["seen"].append(2)
            owner.layers[2].notes["of"]["a"]["b"] += 1
        assert kept.fork().unwrap().layers[2].notes == {"seen": [1], "of": {"a": Counter()}}

    @pytest.mark.parametrize(
        "hidden",
        [
            pytest.param(lambda: UserDict(a=torch.ones(2)), id="a dict of another kind"),
            pytest.param(lambda: {"a": [SimpleNamespace(b=torch.ones(2))], "c": torch.ones(2)}, id="an object"),
            pytest.param(lambda: torch.nn.Linear(2, 2), id="a module"),
            pytest.param(lambda: functools.partial(print, torch.ones(2)), id="a call"),
            pytest.param(threading.Lock, id="what cannot be copied"),
        ],
    )
    def test_what_cannot_be_walked_or_copied_is_refused(self, hidden: Callable[[], Any]) -> None:
        cache = kv(5)
        cache.layers.append(CountingLayer())
        cache.update(*torch.rand(2, 1, 2, 5, 8), 2)
        vars(cache.layers[2])["hidden"] = hidden()
        with pytest.raises(UnknownValueError):
            wrap(cache)

    def test_a_strangers_length_is_what_generation_goes_on_from(self) -> None:
        cache = QuantizedCache("fp8", config=LlamaConfig(**SIZES))
        kv(5, cache=cache)
        assert wrap(cache).length == 5
        with pytest.raises(LengthMismatchError):
            wrap(cache, length=4)

    def test_a_pair_of_another_class_keeps_what_it_holds(self) -> None:
        pair = Pair(kv(5), kv(3))
        fork: Any = wrap(pair).copy().unwrap()
        assert type(fork) is Pair
        assert fork.notes == [1]
        fork.notes.append(2)
        assert pair.notes == [1]
        assert fork.is_updated == {0: True, 1: True}
        filled = wrap(pair).unwrap(like=Pair(DynamicCache(), DynamicCache()))
        assert filled.is_updated == {0: True, 1: True}
        node = Node.from_json(wrap(pair).structure)
        with pytest.raises(StructureMismatchError):
            build(node, {}, 5, wrap(pair).adapter)


class TestTemplates:
    def test_a_used_cache_is_replaced_and_not_written(self) -> None:
        kept = wrap(kv(5)).copy()
        before = bits(kept)
        handed = kept.fork().unwrap()
        loaded = wrap(kv(5, seed=1)).unwrap(like=handed)  # a caller gives up what the cache gave out
        assert all(map(torch.equal, bits(kept), before))
        assert all(map(torch.equal, tensors(loaded), tensors(kv(5, seed=1))))

    @pytest.mark.parametrize(
        "like",
        [
            pytest.param(
                lambda: DynamicCache(config=LlamaConfig(**{**SIZES, "num_hidden_layers": 3})), id="more layers"
            ),
            pytest.param(
                lambda: DynamicCache(config=LlamaConfig(**{**SIZES, "num_hidden_layers": 1})), id="fewer layers"
            ),
            pytest.param(lambda: kv(5, layers=1), id="fewer layers, used"),
            pytest.param(lambda: StaticCache(config=LlamaConfig(**SIZES), max_cache_len=4), id="static, too short"),
            pytest.param(
                lambda: kv(4, cache=StaticCache(config=LlamaConfig(**SIZES), max_cache_len=4)),
                id="static, used, too short",
            ),
            pytest.param(lambda: [DynamicCache()], id="in a list"),
        ],
    )
    def test_another_structure_is_refused(self, like: Callable[[], Any]) -> None:
        state = wrap(kv(5)).copy()
        before = bits(state)
        with pytest.raises(StructureMismatchError):
            state.unwrap(like=like())
        assert all(map(torch.equal, bits(state), before))

    def test_a_window_does_not_pass_for_the_whole(self) -> None:
        state = wrap(kv(9, cache=sliding(4)))
        for like in (DynamicCache(), sliding(6), DynamicCache(config=LlamaConfig(**SIZES))):
            with pytest.raises(StructureMismatchError):
                state.unwrap(like=like)
        assert state.unwrap(like=sliding(3)).layers[0].keys.shape[2] == 2

    def test_a_window_that_is_not_full_is_the_whole(self) -> None:
        for like in (DynamicCache(), sliding(9)):
            assert wrap(kv(3, cache=sliding(6))).unwrap(like=like).get_seq_length() == 3


@dataclasses.dataclass
class ImageEntry:
    """What mellea keeps: a cache, the tokens it stands for, and what was computed on the way."""

    kv_cache: DynamicCache | None
    merged_token_ids: Any
    merged_attention: Any
    q_end: int = -1
    scores: Any = None


def entry() -> ImageEntry:
    scores = (torch.rand(1, 64), torch.rand(1, 64))
    return ImageEntry(kv(6), torch.arange(6)[None], torch.ones(1, 6), q_end=4, scores=scores)


class TestEntriesOfMellea:
    def test_they_come_back_as_they_were(self) -> None:
        value = entry()
        for back in (wrap(value).unwrap(), wrap(value).copy().unwrap(), wrap(value).to("host").to("torch").unwrap()):
            assert type(back) is ImageEntry
            assert type(back.kv_cache) is DynamicCache
            assert all(map(torch.equal, tensors(back.kv_cache), tensors(value.kv_cache)))
            assert torch.equal(back.merged_token_ids, value.merged_token_ids)
            assert type(back.scores) is tuple
            assert all(map(torch.equal, back.scores, value.scores))
            assert back.q_end == 4
        assert wrap(value).length == 6

    def test_an_evicted_one_is_freed(self) -> None:
        before = live_bytes()
        freed: list[int] = []
        cache = SimpleLRUCache(1, on_evict=lambda value: freed.append(on_evict(value)))
        cache.put("a", entry())
        held = live_bytes() - before
        cache.put("b", ImageEntry(None, None, None))
        assert live_bytes() == before
        assert freed == [held]


class TestOnEvict:
    @pytest.fixture(params=["dynamic", "sliding", "static", "unknown", "encoder-decoder"])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Any]:
        config = LlamaConfig(**SIZES)
        makers: dict[str, Callable[[], Any]] = {
            "dynamic": lambda: kv(5),
            "sliding": lambda: kv(9, cache=sliding(4)),
            "static": lambda: kv(5, cache=StaticCache(config=config, max_cache_len=9)),
            "unknown": lambda: kv(5, cache=Remembering()),
            "encoder-decoder": lambda: EncoderDecoderCache(kv(5), kv(3)),
        }
        return makers[request.param]

    def test_the_memory_of_a_cache_is_free(self, make: Callable[[], Any]) -> None:
        make()
        before = live_bytes()
        value = make()
        held = live_bytes() - before
        assert held > 0
        freed = on_evict(value)
        assert live_bytes() == before
        assert freed == held

    def test_what_a_fork_shares_is_the_forks(self) -> None:
        kept = wrap(kv(5)).copy()
        fork = kept.fork().unwrap()
        before = [tensor.clone() for tensor in tensors(fork)]
        assert kept.shared_nbytes() == kept.nbytes
        assert kept.release() == 0
        assert all(map(torch.equal, tensors(fork), before))
        assert on_evict(fork) == 4 * 2 * 5 * 8 * 4


def test_no_metadata_is_needed() -> None:
    check_adapter("transformers", "__import__('torch').ones(2)")
