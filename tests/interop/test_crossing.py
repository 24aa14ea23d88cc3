"""From each framework to each other: bit-equal, without a copy where that is safe, and never a wrong number."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax_subject
import numpy as np
import pytest
import torch
import torch_subject
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_subject import JaxSubject
from stress import check, survive
from torch_subject import TorchSubject
from transformers import DynamicCache, MistralConfig

from agnostic_cache import KVLayout, KVState, wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.errors import MixedFrameworksError, StructureMismatchError, UnsupportedDtypeError
from agnostic_cache.state.layout import TOKENS
from agnostic_cache.testing import ContainerSuite, Grid, OwnershipSuite
from agnostic_cache.testing.subject import KV

DTYPES = (*TorchSubject.dtypes, Dtype.UINT8, Dtype.INT16, Dtype.UINT16, Dtype.UINT32, Dtype.COMPLEX64)
SHAPE = (2, 5, 3)
TORCH, JAX = TorchSubject(), JaxSubject()


def pointer(array: Any) -> int:
    found: int = array.unsafe_buffer_pointer() if isinstance(array, jax.Array) else array.data_ptr()
    return found


def only(state: KVState) -> Any:
    [leaf] = state.leaves.values()
    return leaf.array


def settle() -> None:
    """Make memory that was freed too early be used for something else."""
    for _ in range(4):
        torch.full((64, 64), 7.0)
        jnp.full((64, 64), 9.0).block_until_ready()


class TestTorchBesideJax(TorchSubject, ContainerSuite, OwnershipSuite):
    """The suites again, where another framework is at hand."""

    def make_foreign(self) -> Any:
        return jnp.ones((2, 3))

    def foreign_state(self) -> KVState:
        return wrap(JAX.kv(4), layout=KV)


class TestJaxBesideTorch(JaxSubject, ContainerSuite, OwnershipSuite):
    """And the other way round."""

    def make_foreign(self) -> Any:
        return torch.ones(2, 3)

    def foreign_state(self) -> KVState:
        return wrap(TORCH.kv(4), layout=KV)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEveryDtype:
    def test_torch_to_jax_and_back(self, dtype: Dtype) -> None:
        tensor = TORCH.make(SHAPE, dtype, 0)
        owned = wrap({"a": tensor}, layout=KVLayout({"a": TOKENS(1)})).copy()
        crossed = owned.to("jax")
        assert crossed.framework == "jax"
        assert only(crossed).dtype.name == dtype
        assert JAX.values(only(crossed)) == TORCH.values(tensor)
        assert pointer(only(crossed)) == pointer(only(owned))  # without a copy
        back = crossed.to("torch")
        assert only(back).dtype is tensor.dtype
        assert torch.equal(only(back).view(torch.uint8), tensor.view(torch.uint8))
        assert pointer(only(back)) == pointer(only(owned))
        leaf, other = crossed.leaves["a"], owned.leaves["a"]
        assert (leaf.role, leaf.axes, crossed.length, crossed.structure) == (
            other.role,
            other.axes,
            owned.length,
            owned.structure,
        )

    def test_jax_to_torch_and_back(self, dtype: Dtype) -> None:
        array = JAX.make(SHAPE, dtype, 0)
        state = wrap({"a": array})
        crossed = state.to("torch")
        assert TORCH.values(only(crossed)) == JAX.values(array)
        assert pointer(only(crossed)) == pointer(array)
        back = crossed.to("jax")
        assert (only(back).dtype, JAX.values(only(back))) == (array.dtype, JAX.values(array))
        assert pointer(only(back)) == pointer(array)

    def test_odd_tensors_cross_with_one_copy(self, dtype: Dtype) -> None:
        for name, tensor in TORCH.odd_arrays(dtype).items():
            owned = wrap({"a": tensor}).copy()
            borrowed = wrap({"a": tensor})
            for state in (owned, borrowed):
                crossed = only(state.to("jax"))
                assert crossed.shape == tuple(tensor.shape), name
                assert JAX.values(crossed) == TORCH.values(tensor), name
                assert crossed.format.layout.major_to_minor == tuple(range(crossed.ndim)), name  # row-major
        for name, array in JAX.odd_arrays(dtype).items():
            crossed = only(wrap({"a": array}).to("torch"))
            assert tuple(crossed.shape) == array.shape, name
            assert TORCH.values(crossed) == JAX.values(array), name

    def test_three_frameworks_in_any_order(self, dtype: Dtype) -> None:
        tensor = TORCH.make(SHAPE, dtype, 0)
        state = wrap({"a": tensor}, layout=KVLayout({"a": TOKENS(1)}))
        for route in (("jax", "host", "torch"), ("host", "jax", "torch"), ("jax", "torch", "host", "torch")):
            end = state
            for framework in route:
                end = KVState.join([end.cut(0, 2), end.cut(2, 5)]).to(framework)
            assert torch.equal(end.unwrap()["a"].view(torch.uint8), tensor.view(torch.uint8)), route


class TestDtypesThatDoNotCross:
    @pytest.fixture
    def x64(self) -> Iterator[None]:
        jax.config.update("jax_enable_x64", True)  # noqa: FBT003 - JAX's own signature
        yield
        jax.config.update("jax_enable_x64", False)  # noqa: FBT003

    @pytest.mark.parametrize("dtype", [Dtype.INT64, Dtype.FLOAT64, Dtype.UINT64, Dtype.COMPLEX128], ids=str)
    def test_64_bits_are_never_narrowed(self, dtype: Dtype) -> None:
        native = {"a": TORCH.make(SHAPE, Dtype.FLOAT32, 0), "b": TORCH.make(SHAPE, dtype, 0)}
        for state in (wrap(native), wrap(native).copy(), wrap(native).to("host")):
            before = {name: state.adapter.checksum(leaf.array) for name, leaf in state.leaves.items()}
            with pytest.raises(UnsupportedDtypeError):
                state.to("jax")
            with pytest.raises(UnsupportedDtypeError):
                state.unwrap(like={"a": jnp.zeros(SHAPE), "b": jnp.zeros(SHAPE)})
            assert {name: state.adapter.checksum(leaf.array) for name, leaf in state.leaves.items()} == before

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("dtype", [Dtype.INT64, Dtype.FLOAT64, Dtype.UINT64, Dtype.COMPLEX128], ids=str)
    def test_64_bits_cross_where_jax_holds_them(self, dtype: Dtype) -> None:
        owned = wrap({"a": TORCH.make(SHAPE, dtype, 0)}).copy()
        crossed = owned.to("jax")
        assert only(crossed).dtype.name == dtype
        assert JAX.values(only(crossed)) == TORCH.values(only(owned))
        assert pointer(only(crossed)) == pointer(only(owned))

    @pytest.mark.parametrize(("narrow", "wide"), [(jnp.int4, torch.int8), (jnp.uint4, torch.uint8)])
    def test_4_bits_widen(self, narrow: Any, wide: torch.dtype) -> None:
        numbers = [0, 1, 7, 3, 5]
        array = jnp.array(numbers if narrow is jnp.uint4 else [0, -1, 7, -8, 5], narrow)
        for crossed in (wrap({"a": array}).to("torch"), wrap({"a": array}).to("host").to("torch")):
            assert only(crossed).dtype is wide
            assert only(crossed).tolist() == array.astype(jnp.int32).tolist()
        back = only(wrap({"a": array}).to("host").to("jax"))
        assert (back.dtype, back.tolist()) == (array.dtype, array.tolist())

    def test_another_dtype_in_a_template_of_the_other_framework_is_refused(self) -> None:
        state = wrap({"a": torch.ones(3)})
        for other in (jnp.zeros(3, jnp.bfloat16), jnp.zeros(3, jnp.int32)):
            with pytest.raises(StructureMismatchError):
                state.unwrap(like={"a": other})


class TestNobodyWritesWhatCrossed:
    """Who may write, donate or free: see `KVState.to`."""

    def test_a_borrowed_tensor_is_copied(self) -> None:
        native: dict[str, Any] = {"a": torch.zeros(4, 4), "b": [torch.ones(4, 4)]}
        crossed = wrap(native).to("jax")
        native["a"].fill_(7)
        native["b"][0].fill_(7)
        assert not crossed.leaves["a"].array.any()
        assert (crossed.leaves["b.0"].array == 1).all()

    def test_borrowed_host_memory_is_copied(self) -> None:
        host = HostArray.empty((64,), Dtype.UINT8)
        states = [wrap([host]).to(framework) for framework in ("jax", "torch")]
        host.memory[:] = bytes([7]) * 64
        assert [int(only(state).max()) for state in states] == [0, 0]

    def test_a_cache_that_never_writes_is_not_copied(self) -> None:
        for cache in (DynamicCache(), DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=6))):
            for layer in range(2):
                cache.update(torch.rand(1, 2, 5, 16), torch.rand(1, 2, 5, 16), layer)
            state = wrap(cache)
            crossed = state.to("jax")
            assert [pointer(leaf.array) for leaf in crossed.leaves.values()] == [
                pointer(leaf.array) for leaf in state.leaves.values()
            ]
            wanted = [np.asarray(leaf.array).copy() for leaf in crossed.leaves.values()]
            for layer in range(2):  # it grows by concatenation
                cache.update(torch.rand(1, 2, 1, 16), torch.rand(1, 2, 1, 16), layer)
            cache.layers.clear()
            settle()
            assert all(map(np.array_equal, [leaf.array for leaf in crossed.leaves.values()], wanted))

    def test_views_that_a_cache_holds_cross_with_a_copy(self) -> None:
        windows = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=6))
        cropped, unaligned = DynamicCache(), DynamicCache()
        for cache in (windows, cropped, unaligned):
            cache.update(torch.rand(1, 2, 9, 16), torch.rand(1, 2, 9, 16), 0)
        cropped.crop(-4)
        held: Any = unaligned.layers[0]
        held.keys = torch.rand(1 + 2 * 9 * 16)[1:].view(1, 2, 9, 16)
        for cache in (windows, cropped, unaligned):
            state = wrap(cache)
            crossed = state.to("jax")
            for name, leaf in state.leaves.items():
                assert np.array_equal(crossed.leaves[name].array, leaf.array.numpy())
            key = state.leaves["layers.0.key"].array
            assert pointer(crossed.leaves["layers.0.key"].array) != key.data_ptr()
            key.zero_()
            assert crossed.leaves["layers.0.key"].array.any()

    def test_extents_of_one_make_no_layout_of_their_own(self) -> None:
        cache = DynamicCache()
        cache.update(torch.rand(1, 1, 4, 16), torch.rand(1, 1, 4, 16), 0)
        held: Any = cache.layers[0]
        held.keys = held.keys.as_strided((1, 1, 4, 16), (7, 999, 16, 1))
        crossed = wrap(cache).to("jax").leaves["layers.0.key"].array
        assert pointer(crossed) == held.keys.data_ptr()
        assert crossed.format.layout.major_to_minor == (0, 1, 2, 3)  # another one would compile another program

    def test_an_import_is_finished_when_it_returns(self) -> None:
        unaligned = torch.zeros((1 << 23) + 1)[1:]
        assert TORCH.adapter.export_dlpack(unaligned).data_ptr() % 64 == 0  # type: ignore[attr-defined]
        for _ in range(3):
            unaligned.zero_()
            array = JAX.adapter.import_dlpack(unaligned)  # type: ignore[attr-defined]
            unaligned.fill_(7)  # JAX copies such memory in the background
            assert not array.any()

    @pytest.mark.parametrize("owned", [False, True])
    def test_what_came_from_jax_may_be_written(self, *, owned: bool) -> None:
        array = jnp.zeros((4, 4))
        state = wrap({"a": array}).copy() if owned else wrap({"a": array})
        crossed = state.to("torch")
        for native in (crossed.unwrap(), crossed.unwrap(), state.to("torch").unwrap()):
            native["a"].fill_(7)
            assert not only(state).any()
            assert not array.any()
            assert not crossed.leaves["a"].array.any()

    def test_what_went_to_jax_may_be_written_afterwards(self) -> None:
        state = wrap({"a": torch.zeros(4, 4)}).copy()
        crossed = state.to("jax")
        state.unwrap()["a"].fill_(7)
        assert not only(crossed).any()

    def test_a_template_of_jax_does_not_share_with_torch(self) -> None:
        state = wrap({"a": torch.ones(4, 4)}).copy()
        filled = state.unwrap(like={"a": jnp.zeros((4, 4))})
        state.unwrap()["a"].fill_(7)
        assert (filled["a"] == 1).all()
        filled["a"].delete()
        settle()
        assert (only(state) == 1).all()

    def test_a_donated_or_deleted_array_leaves_the_tensor(self) -> None:
        ends: list[Callable[[Any], Any]] = [lambda a: a.delete(), jax.jit(lambda a: a + 1, donate_argnums=0)]
        for end in ends:
            array = jnp.arange(4096.0)
            crossed = wrap({"a": array}).to("torch")
            end(array)
            del array
            settle()
            assert only(crossed).tolist() == list(range(4096))

    def test_a_deleted_tensor_leaves_the_array(self) -> None:
        state = wrap({"a": torch.arange(4096.0)}).copy()
        crossed = state.to("jax")
        state.release()
        del state
        settle()
        assert only(crossed).tolist() == list(range(4096))

    def test_releasing_what_crossed_leaves_the_other_side(self) -> None:
        state = wrap({"a": torch.arange(4096.0)}).copy()
        crossed, again = state.to("jax"), state.to("jax")
        crossed.release()
        jax.jit(lambda a: a + 1, donate_argnums=0)(again.unwrap()["a"])
        settle()
        assert only(state).tolist() == list(range(4096))

    def test_forks_of_what_crossed_are_released_one_by_one(self) -> None:
        cache = DynamicCache()
        cache.update(torch.ones(1, 2, 5, 16), torch.ones(1, 2, 5, 16), 0)
        crossed = wrap(cache).to("jax")
        fork = crossed.fork()
        fork.release()
        assert (crossed.leaves["layers.0.key"].array == 1).all()

    def test_the_memory_lives_until_the_last_view(self) -> None:
        before = torch_subject.live_bytes() + jax_subject.live_bytes()
        state = wrap({"a": torch.arange(4096.0)}).copy()
        crossed = state.to("jax")
        state.release()
        assert jax_subject.live_bytes() > 0
        assert crossed.release() == 4096 * 4
        assert torch_subject.live_bytes() + jax_subject.live_bytes() == before


class TestLayouts:
    """Between a cache by token of JAX and one by head of Hugging Face."""

    LAYOUT = KVLayout({"*": TOKENS(1)}, names={"{i}.k": "layers.{i}.key", "{i}.v": "layers.{i}.value"})

    def cache(self, tokens: int) -> Any:
        cache = DynamicCache()
        for layer in range(2):
            cache.update(torch.rand(1, 2, tokens, 8), torch.rand(1, 2, tokens, 8), layer)
        return cache

    def buffers(self, rows: int) -> list[dict[str, jax.Array]]:
        return [{name: jnp.zeros((1, rows, 2, 8)) for name in "kv"} for _ in range(2)]

    def test_torch_fills_buffers_of_jax(self) -> None:
        cache = self.cache(5)
        filled = wrap(cache).unwrap(like=self.buffers(9), layout=self.LAYOUT)
        for layer, held in zip(filled, cache.layers, strict=True):
            assert np.array_equal(layer["k"][:, :5], held.keys.transpose(1, 2).numpy())
            assert np.array_equal(layer["v"][:, :5], held.values.transpose(1, 2).numpy())
            assert not layer["k"][:, 5:].any()

    @pytest.mark.parametrize("cut", [False, True])
    def test_jax_fills_a_cache_of_torch(self, *, cut: bool) -> None:
        cache = self.cache(5)
        filled = wrap(cache).unwrap(like=self.buffers(9), layout=self.LAYOUT)
        state = wrap(filled, layout=self.LAYOUT, length=5)
        before = [np.asarray(array).copy() for layer in filled for array in layer.values()]
        back = (state.cut(0, 5) if cut else state).unwrap(like=DynamicCache())
        for layer, held in zip(back.layers, cache.layers, strict=True):
            assert torch.equal(layer.keys, held.keys)
            assert torch.equal(layer.values, held.values)
        back.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
        assert all(map(np.array_equal, [array for layer in filled for array in layer.values()], before))

    def test_stacked_layers_of_jax_are_layers_of_torch(self) -> None:
        layout = KVLayout(
            {"k": TOKENS(2), "v": TOKENS(2)}, names={"k": "layers.*.key", "v": "layers.*.value"}, stack_axis=0
        )
        cache = self.cache(5)
        filled = wrap(cache).unwrap(like={name: jnp.zeros((2, 1, 9, 2, 8)) for name in "kv"}, layout=layout)
        back = wrap(filled, layout=layout, length=5).unwrap(like=DynamicCache())
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(back.layers, cache.layers, strict=True))
        assert all(torch.equal(a.values, b.values) for a, b in zip(back.layers, cache.layers, strict=True))

    def test_arrays_of_another_memory_order_cross_and_are_templates(self) -> None:
        tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
        array: Any = jax.dlpack.from_dlpack(tensor)
        assert array.format.layout.major_to_minor != (0, 1, 2)
        copied: Any = only(wrap({"a": array}).copy())
        assert copied.format.layout.major_to_minor == (0, 1, 2)
        assert JAX.values(copied) == TORCH.values(tensor)
        for framework in ("torch", "host", "jax"):
            state = wrap({"a": array}, layout=KVLayout({"a": TOKENS(0)})).to(framework)
            assert state.adapter.to_host(only(state)).memory.tobytes() == TORCH.values(tensor)
            joined = KVState.join([state.cut(0, 1), state.cut(1, 4)])
            assert joined.adapter.to_host(only(joined)).memory.tobytes() == TORCH.values(tensor)
        wanted = torch.rand(4, 2, 3)
        filled = wrap({"a": wanted}).unwrap(like={"a": jax.dlpack.from_dlpack(torch.zeros(2, 3, 4).permute(2, 0, 1))})
        assert np.array_equal(filled["a"], wanted.numpy())

    def test_a_template_over_memory_of_torch_is_not_written(self) -> None:
        tensor = torch.zeros(4, 16)
        filled = wrap({"a": jnp.ones((4, 16))}).unwrap(like={"a": jax.dlpack.from_dlpack(tensor)})
        assert (filled["a"] == 1).all()
        assert not tensor.any()  # JAX holds arrays to be constant: who lent it memory has not given that up

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
    def test_sharded_arrays_cross(self, kind: AxisType) -> None:
        mesh = jax.make_mesh((2,), ("heads",), axis_types=(kind,))
        array = jax.device_put(
            jnp.arange(64.0).reshape(1, 8, 2, 4), NamedSharding(mesh, PartitionSpec(None, None, "heads"))
        )
        state = wrap({"a": array}, layout=KVLayout({"a": TOKENS(1)}))
        assert only(state.to("torch")).flatten().tolist() == list(range(64))
        assert tuple(only(state.cut(3, 3).to("torch")).shape) == (1, 0, 2, 4)
        assert (
            wrap({"a": torch.ones(1, 8, 2, 4)})
            .unwrap(like={"a": array})["a"]
            .sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, None, "heads")), 4)
        )


class TestMixing:
    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(lambda: [torch.ones(1), jnp.ones(1)], id="torch first"),
            pytest.param(lambda: {"a": jnp.ones(1), "b": {"c": torch.ones(1)}}, id="jax first"),
            pytest.param(lambda: [jnp.ones(1), HostArray.empty((1,), Dtype.INT8)], id="host last"),
            pytest.param(lambda: (DynamicCache(), jnp.ones(1)), id="a cache and an array"),
            pytest.param(lambda: [jnp.ones(1), DynamicCache()], id="an array and a cache"),
        ],
    )
    def test_frameworks_do_not_mix_in_a_value(self, value: Callable[[], Any]) -> None:
        with pytest.raises(MixedFrameworksError):
            wrap(value())
        with pytest.raises(MixedFrameworksError):
            wrap([torch.ones(1)]).unwrap(like=value())

    def test_states_of_two_frameworks_join_after_crossing(self) -> None:
        layout = KVLayout({"*": TOKENS(0)})
        head, tail = wrap({"a": torch.zeros(2, 3)}, layout=layout), wrap({"a": jnp.ones((1, 3))}, layout=layout)
        with pytest.raises(MixedFrameworksError):
            KVState.join([head, tail])
        joined = KVState.join([head.to("jax"), tail])
        assert Grid.of(JAX.values(only(joined)), (3, 3), 4).take(0, 2, 3) == JAX.grid(only(tail))


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_threads_read_through_the_other_framework_what_others_evict(framework: str) -> None:
    check(survive("stress_crossing", framework))
