"""The adapter of JAX keeps the contract of adapters; and what only JAX arrays do: deletion, donation, sharding."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_subject import JaxSubject, live_bytes, make, values
from no_metadata import check_adapter

from agnostic_cache import KVLayout, KVState, SimpleLRUCache, wrap
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.errors import (
    DeletedArrayError,
    LayoutUnknownError,
    LengthMismatchError,
    StructureMismatchError,
    UnknownValueError,
    UnsupportedArrayError,
    UnsupportedDtypeError,
)
from agnostic_cache.state.layout import LENGTH, SNAPSHOT, TOKENS
from agnostic_cache.testing import AdapterSuite, pattern
from agnostic_cache_adapters.jax import adapter, on_evict

KV = KVLayout({"*": TOKENS(1)})


class TestJaxAdapter(JaxSubject, AdapterSuite):
    dtypes = (*JaxSubject.dtypes, Dtype.INT4)  # two elements to a byte


@jax.jit
def add_one(kv: Any) -> Any:
    return jax.tree.map(lambda a: a + 1, kv)


donating = jax.jit(lambda kv: jax.tree.map(lambda a: a + 1, kv), donate_argnums=0)


def kv(rows: int = 8, value: float = 0.0) -> dict[str, jax.Array]:
    return {"k": jnp.full((1, rows, 2, 4), value), "v": jnp.full((1, rows, 2, 4), value + 0.5)}


class TestArraysThatCannotBeKept:
    def test_a_deleted_or_donated_array_is_named(self) -> None:
        deleted, donated = kv(), kv()
        deleted["v"].delete()
        donating(donated)
        for value in (deleted, donated, [deleted["v"]]):
            with pytest.raises(DeletedArrayError):
                wrap(value)
        for ask in (adapter.describe, adapter.storages, adapter.to_host):
            with pytest.raises(DeletedArrayError):
                ask(deleted["v"])
        assert adapter.is_deleted(donated["k"])

    def test_a_state_whose_arrays_were_donated_is_named(self) -> None:
        native = kv()
        state = wrap(native, layout=KV)
        donating(native)
        uses: list[Callable[[], object]] = [
            state.copy,
            state.fork,
            lambda: state.cut(0, 4),
            lambda: KVState.join([state, state]),
            lambda: state.to("host"),
            lambda: state.to("jax"),
            lambda: state.unwrap(like=kv()),
            lambda: state.nbytes,
            state.compact_nbytes,
        ]
        for use in uses:
            with pytest.raises(DeletedArrayError):
                use()
        assert state.checksums() == {"k": None, "v": None}

    def test_a_deleted_template_is_named(self) -> None:
        template = kv()
        template["v"].delete()
        with pytest.raises(DeletedArrayError):
            wrap(kv(), layout=KV).unwrap(like=template)
        assert not template["k"].is_deleted()

    def test_a_tracer_is_named(self) -> None:
        kept = wrap({"a": jnp.ones(3)})
        traced = []

        def step(array: Any) -> Any:
            for value in (array, {"a": array}, [{"a": array + 1}]):
                with pytest.raises(UnsupportedArrayError):
                    wrap(value)
            with pytest.raises(UnsupportedArrayError):
                kept.unwrap(like={"a": array})
            assert on_evict([array]) == 0
            traced.append(array)
            return array

        jax.jit(step)(jnp.ones(3))
        jax.eval_shape(lambda array: step(array), jnp.ones(3))  # noqa: PLW0108 - jit has cached the trace of `step`
        jax.vmap(lambda array: step(array))(jnp.ones((2, 3)))  # noqa: PLW0108
        assert len(traced) == 3

    def test_other_arrays_are_named(self) -> None:
        with pytest.raises(UnsupportedDtypeError):
            wrap({"a": jax.random.key(0)})
        with pytest.raises(UnknownValueError):
            wrap({"a": jnp.ones(2), "b": np.ones(2)})

    def test_a_shape_is_no_array(self) -> None:
        with pytest.raises(UnknownValueError):
            wrap({"a": jax.ShapeDtypeStruct((3,), jnp.float32)})


class TestWidth:
    """JAX narrows 64 bits silently; the house refuses."""

    @pytest.fixture
    def x64(self) -> Iterator[None]:
        jax.config.update("jax_enable_x64", True)  # noqa: FBT003 - JAX's own signature
        yield
        jax.config.update("jax_enable_x64", False)  # noqa: FBT003

    @pytest.mark.parametrize("dtype", [Dtype.INT64, Dtype.UINT64, Dtype.FLOAT64, Dtype.COMPLEX128])
    def test_64_bits_are_refused(self, dtype: Dtype) -> None:
        state = wrap({"a": HostArray.empty((3,), dtype), "b": HostArray.empty((3,), Dtype.INT8)})
        with pytest.raises(UnsupportedDtypeError):
            state.to("jax")

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("dtype", [Dtype.INT64, Dtype.UINT64, Dtype.FLOAT64, Dtype.COMPLEX128])
    def test_64_bits_are_kept_where_jax_holds_them(self, dtype: Dtype) -> None:
        array = make((2, 3), dtype, 0)
        assert array.dtype.name == dtype
        back = wrap({"a": array}).to("host").to("jax").unwrap()["a"]
        assert (back.dtype, values(back)) == (array.dtype, pattern((2, 3), dtype, 0))


class Pair(NamedTuple):
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    key: Any
    value: Any
    size: int = dataclasses.field(default=3, metadata={"static": True})


@jax.tree_util.register_pytree_with_keys_class
class Custom:
    """A container that only JAX can take apart."""

    def __init__(self, arrays: Any, note: str) -> None:
        self.arrays, self.note = arrays, note

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("arrays"), self.arrays)], self.note

    @classmethod
    def tree_unflatten(cls, note: str, children: Any) -> "Custom":
        [arrays] = children
        return cls(arrays, note)


@jax.tree_util.register_pytree_node_class
class Nameless:
    """A container whose children have no names."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = arrays

    def tree_flatten(self) -> Any:
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Nameless":
        return cls(*children)


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda a, b: {"a": a, "b": b},
    "list": lambda a, b: [a, b],
    "namedtuple": Pair,
    "registered dataclass": Registered,
    "custom pytree": lambda a, b: Custom({"a": a, "b": [b]}, "note"),
    "nameless pytree": Nameless,
    "nesting": lambda a, b: {"x": [Custom((a,), "x"), Registered(b, None, 7)], "y": None},
    "pytree in dataclass": lambda a, b: Registered(Nameless(a), Custom(b, "y")),
    "partial": lambda a, b: jax.tree_util.Partial(max, a, b=b),
}


def same_structure(one: Any, other: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(one), jax.tree.structure(other)]
    return bool(structures[0] == structures[1])


class TestPytrees:
    @pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
    def test_any_pytree_comes_back(self, container: Callable[[Any, Any], Any]) -> None:
        value = container(jnp.arange(3.0), jnp.arange(4))
        state = wrap(value)
        assert len(state.leaves) == 2
        for back in (state.unwrap(), state.copy().unwrap(), state.to("host").to("jax").unwrap()):
            assert type(back) is type(value)
            assert back is not value
            assert same_structure(back, value)
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, value)))

    @pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
    def test_any_pytree_is_a_template(self, container: Callable[[Any, Any], Any]) -> None:
        value, template = (container(jnp.arange(3.0) + i, jnp.arange(4) + i) for i in range(2))
        back = wrap(value).unwrap(like=template)
        assert same_structure(back, value)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, value)))

    @pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
    def test_the_memory_of_an_evicted_pytree_is_free(self, container: Callable[[Any, Any], Any]) -> None:
        before = live_bytes()
        freed: list[int] = []
        cache = SimpleLRUCache(1, on_evict=lambda value: freed.append(on_evict(value)))
        value = container(jnp.zeros(100), jnp.zeros(50))
        arrays = jax.tree.leaves(value)
        cache.put("a", value)
        assert live_bytes() - before == 600
        cache.put("b", None)
        assert freed == [600]
        assert live_bytes() == before
        assert all(array.is_deleted() for array in arrays)

    def test_leaves_are_named_by_their_keys(self) -> None:
        value = Custom({"a": jnp.ones(1), "b": [jnp.ones(2)]}, "note")
        assert list(wrap({"c": value, "n": Nameless(jnp.ones(3))}).leaves) == ["c.arrays.a", "c.arrays.b.0", "n.0"]


class TestOnEvict:
    def test_an_array_is_deleted_once(self) -> None:
        array = jnp.zeros(100)
        assert on_evict({"a": array, "b": [array]}) == 400
        assert on_evict([array]) == 0
        array = jnp.zeros(100)
        alias = jax.device_put(array, jax.devices()[0])
        assert on_evict((array, alias)) == 400

    def test_containers_are_emptied(self) -> None:
        value = {"a": [jnp.zeros(1)]}
        on_evict(value)
        assert value == {}

    def test_a_view_that_somebody_holds_stays_valid(self) -> None:
        array = jnp.arange(100)
        view = np.asarray(array)
        on_evict([array])
        assert array.is_deleted()
        assert view.tolist() == list(range(100))

    def test_what_is_no_array_is_left_alone(self) -> None:
        for value in (None, 1, "text", object(), {"a": object()}, np.ones(3), [{1}]):
            assert on_evict(value) == 0

    def test_arrays_without_a_buffer_of_their_own_are_deleted(self) -> None:
        empty, key = jnp.zeros((0, 3)), jax.random.key(0)
        on_evict([empty, key])
        assert empty.is_deleted()
        assert key.is_deleted()


class TestDonation:
    """A donating loop uses up what it is given, and the kept state stays."""

    def test_what_is_handed_out_may_be_donated(self) -> None:
        kept = wrap(kv(8, 1.0), layout=KV).copy()
        before = {name: values(leaf.array) for name, leaf in kept.leaves.items()}
        for handed in (
            kept.copy().unwrap(),
            kept.fork().unwrap(),
            kept.unwrap(like=kv(9)),
            kept.cut(0, 8).unwrap(),
            KVState.join([kept]).unwrap(),
            kept.to("jax").unwrap(),
            kept.to("host").to("jax").unwrap(),
        ):
            donating(handed)
            assert all(array.is_deleted() for array in handed.values())
            assert {name: values(leaf.array) for name, leaf in kept.leaves.items()} == before

    def test_host_memory_outlives_donated_arrays(self) -> None:
        native = kv(8, 1.0)
        wanted = {name: values(array) for name, array in native.items()}
        host = wrap(native, layout=KV).to("host")
        donating(native)
        donating(host.to("jax").unwrap())
        assert {name: bytes(leaf.array.memory) for name, leaf in host.leaves.items()} == wanted

    def test_a_template_gives_up_its_memory(self) -> None:
        template = kv(16)
        where = {name: array.unsafe_buffer_pointer() for name, array in template.items()}
        filled = wrap(kv(8, 1.0), layout=KV).unwrap(like=template)
        assert all(array.is_deleted() for array in template.values())
        assert {name: array.unsafe_buffer_pointer() for name, array in filled.items()} == where
        again = wrap(kv(4, 2.0), layout=KV).unwrap(like=filled)
        assert {name: array.unsafe_buffer_pointer() for name, array in again.items()} == where
        assert again["k"][0, :, 0, 0].tolist() == [2.0] * 4 + [1.0] * 4 + [0.0] * 8

    def test_a_view_of_a_template_is_not_written(self) -> None:
        template = kv(16)
        view = np.asarray(template["k"])
        filled = wrap(kv(8, 1.0), layout=KV).unwrap(like=template)
        assert all(array.is_deleted() for array in template.values())
        assert not view.any()
        assert filled["k"][0, :, 0, 0].tolist() == [1.0] * 8 + [0.0] * 8

    def test_a_template_over_memory_of_numpy_is_not_written(self) -> None:
        raw = np.zeros(16 * 8 + 16, np.float32)
        lent = raw[-raw.ctypes.data % 64 // 4 :][: 16 * 8].reshape(
            1, 16, 2, 4
        )  # aligned, so that JAX takes it as it is
        template = {"k": jax.device_put(lent), "v": jnp.zeros((1, 16, 2, 4))}
        assert template["k"].unsafe_buffer_pointer() == lent.ctypes.data
        filled = wrap(kv(8, 1.0), layout=KV).unwrap(like=template)
        assert filled["k"][0, :, 0, 0].tolist() == [1.0] * 8 + [0.0] * 8
        assert not lent.any()

    @pytest.mark.parametrize(
        "alias",
        [
            pytest.param(lambda array: array, id="itself"),
            pytest.param(lambda array: jax.device_put(array, jax.devices()[0]), id="another handle"),
            pytest.param(lambda array: array.addressable_shards[0].data, id="its shard"),
        ],
    )
    def test_aliases_of_one_buffer_become_two(self, alias: Callable[[Any], Any]) -> None:
        zeros = jnp.zeros((1, 8, 2, 4))
        filled = wrap(kv(8, 1.0), layout=KV).unwrap(like={"k": zeros, "v": alias(zeros)})
        assert (filled["k"] == 1.0).all()
        assert (filled["v"] == 1.5).all()
        assert zeros.is_deleted()

    def test_a_template_that_is_refused_is_not_donated(self) -> None:
        template = {**kv(16), "v": jnp.zeros((1, 4, 2, 4))}
        with pytest.raises(StructureMismatchError):
            wrap(kv(8), layout=KV).unwrap(like=template)
        assert not any(array.is_deleted() for array in template.values())

    def test_no_length_compiles_anything(self) -> None:
        kept = wrap(kv(60, 1.0), layout=KV).copy()
        template = add_one(kv(64))
        template = donating(kept.cut(0, 1).unwrap(like=template))  # compiles the program of the loop, and ours
        compiled: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
        jax.jit(lambda a: a * 3.5)(jnp.ones(3)).block_until_ready()
        assert any("compile" in event for event in compiled)  # the listener hears
        compiled.clear()
        for length in range(5, 55):
            part = kept.cut(0, length)
            joined = KVState.join([part, kept.cut(length, length + 3)])
            template = donating(joined.copy().unwrap(like=template))
            joined.release()
        assert [event for event in compiled if "compile" in event] == []
        assert template["k"][0, :57, 0, 0].tolist() == [2.0] * 57


class TestShardedArrays:
    @pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
    def shardings(self, request: pytest.FixtureRequest) -> list[NamedSharding]:
        mesh = jax.make_mesh((2,), ("heads",), axis_types=(request.param,))
        return [NamedSharding(mesh, spec) for spec in (PartitionSpec(None, None, "heads"), PartitionSpec())]

    def test_every_shard_counts_and_is_freed(self, shardings: list[NamedSharding]) -> None:
        for sharding, nbytes in zip(shardings, (256, 512), strict=True):
            array = jax.device_put(jnp.arange(64.0).reshape(1, 8, 2, 4), sharding)
            state = wrap([array], layout=KV)
            assert state.nbytes == nbytes
            assert len({storage.device for storage in state.storages()}) == 2
            before = live_bytes()
            copy = state.copy()
            assert sum(state.compact_nbytes().values()) == copy.nbytes == live_bytes() - before == nbytes
            assert copy.leaves["0"].array.sharding == sharding
            assert copy.release() == nbytes
            assert live_bytes() == before
            assert on_evict([array]) == nbytes
            assert array.is_deleted()

    def test_rows_and_crossings_are_those_of_the_whole(self, shardings: list[NamedSharding]) -> None:
        whole = jnp.arange(64.0).reshape(1, 8, 2, 4)
        for sharding in shardings:
            state = wrap([jax.device_put(whole, sharding)], layout=KV)
            parts = [state.cut(0, 3), state.cut(3, 3), state.cut(3, 8)]
            for part, start, stop in zip(parts, (0, 3, 3), (3, 3, 8), strict=True):
                assert part.leaves["0"].array.shape == (1, stop - start, 2, 4)
                if stop > start:  # JAX itself cannot read a sharded array of no elements
                    assert values(part.leaves["0"].array) == values(whole[:, start:stop])
            for back in (KVState.join(parts), state.copy(), state.fork(), state.to("host").to("jax")):
                assert np.array_equal(back.unwrap()[0], whole)
            template = jax.device_put(jnp.zeros((1, 16, 2, 4)), sharding)
            [filled] = state.unwrap(like=[template])
            assert template.is_deleted()
            assert filled.sharding.is_equivalent_to(sharding, 4)
            assert np.array_equal(filled[:, :8], whole)
            assert not filled[:, 8:].any()

    def test_a_state_moves_to_another_device(self) -> None:
        state = wrap([jnp.arange(4.0)])
        names = [f"{device.platform}:{device.id}" for device in jax.devices()]
        assert [*state.compact_nbytes()] == names[:1]
        moved = state.to("jax", device=names[1])
        assert [*moved.compact_nbytes()] == names[1:2]
        assert moved.unwrap()[0].tolist() == [0, 1, 2, 3]
        with pytest.raises(StructureMismatchError):
            state.to("jax", device="cpu:9")


class TestInfer:
    def test_dicts_lists_and_stacked_layers(self) -> None:
        def per_layer(length: int) -> Any:
            return {
                "layers": [{"k": jnp.zeros((1, length, 2, 4)), "v": jnp.zeros((1, 2, length, 4))} for _ in range(2)]
            }

        layout = KVLayout.infer(per_layer)
        state = wrap(per_layer(9), layout=layout)
        assert state.length == 9
        assert [leaf.role for leaf in state.leaves.values()] == [TOKENS(1), TOKENS(2)] * 2

        def stacked(length: int) -> Any:
            return (jnp.zeros((2, 1, length, 2, 4)), jnp.zeros((2, 1, length, 2, 4)))

        names = {"0": "layers.*.key", "1": "layers.*.value"}
        layout = KVLayout.infer(stacked, names=names, stack_axis=0)
        leaves = wrap(stacked(9), layout=layout).leaves
        assert list(leaves) == ["layers.*.key", "layers.*.value"]
        assert {leaf.axes for leaf in leaves.values()} == {("layers", "batch", "tokens", "heads", "dim")}

    def test_nothing_is_allocated(self) -> None:
        before = live_bytes()
        KVLayout.infer(lambda length: jnp.zeros((length, 1 << 20)), lengths=(1 << 20, 1 << 21))
        assert live_bytes() == before

    def test_what_is_not_sure_is_a_snapshot(self) -> None:
        def init(length: int) -> Any:
            return {
                "sure": jnp.zeros((1, length, 2)),
                "ring": jnp.zeros((1, min(length, 512), 2)),
                "square": jnp.zeros((length, length)),
                "one more": jnp.zeros((1, length + 1)),
                "strided": jnp.zeros((length // 4, 2)),
                "fixed": jnp.zeros((1, 7)),
                "cache_index": jnp.zeros((), jnp.int32),
                "end_index": jnp.zeros(()),
                "cache_index*": jnp.zeros((), jnp.int32),
            }

        layout = KVLayout.infer(init)
        roles = {name: layout.describe(name, array.ndim)[1].role for name, array in init(8).items()}
        assert roles == {**dict.fromkeys(roles, SNAPSHOT), "sure": TOKENS(1), "cache_index": LENGTH}

    def test_names_are_literal(self) -> None:
        layout = KVLayout.infer(
            lambda length: {"a*": jnp.zeros((length, 2)), "ab": jnp.zeros((2, length)), "{i}": jnp.zeros(3)}
        )
        assert [layout.describe(name, 2)[1].role for name in ("a*", "ab", "{i}", "0")] == [
            TOKENS(0),
            TOKENS(1),
            SNAPSHOT,
            SNAPSHOT,
        ]

    @pytest.mark.parametrize(
        "init",
        [
            pytest.param(
                lambda length: {"a": jnp.zeros(length)} if length < 1200 else {"b": jnp.zeros(length)}, id="names"
            ),
            pytest.param(lambda length: [jnp.zeros(length)] * (length // 512), id="count"),
            pytest.param(lambda _: {"a": jnp.zeros((1, 4))}, id="no token axis"),
            pytest.param(lambda length: {"a": jnp.zeros((1,) * (length // 512))}, id="rank"),
        ],
    )
    def test_a_cache_that_says_nothing_is_refused(self, init: Callable[[int], Any]) -> None:
        with pytest.raises(LayoutUnknownError):
            KVLayout.infer(init)

    def test_a_rotary_convention_is_one_of_two(self) -> None:
        with pytest.raises(LayoutUnknownError):
            KVLayout.infer(jnp.zeros, rotary="sideways")


def tunix(end: int | list[int], rows: int = 16, layers: int = 2) -> dict[str, Any]:
    ends = [end] * layers if isinstance(end, int) else end
    return {
        f"layer_{i}": {
            "k": make((1, rows, 2, 4), Dtype.BFLOAT16, 2 * i),
            "v": make((1, rows, 2, 4), Dtype.BFLOAT16, 2 * i + 1),
            "end_index": jnp.full((1,), ends[i], jnp.int32),
        }
        for i in range(layers)
    }


class TestTunix:
    """A cache of google-tunix is known by its names."""

    def test_its_layout_is_known(self) -> None:
        state = wrap(tunix(7))
        assert (state.length, state.rotary) == (7, "half")
        assert list(state.leaves) == [f"layers.{i}.{name}" for i in range(2) for name in ("key", "value", "length")]
        head = state.cut(0, 5)
        assert head.unwrap()["layer_1"]["end_index"].tolist() == [5]
        filled = head.unwrap(like=tunix(0))
        assert filled["layer_0"]["end_index"].tolist() == [5]
        assert np.array_equal(filled["layer_1"]["k"][:, :5], state.leaves["layers.1.key"].array[:, :5])
        assert wrap(filled).length == 5

    def test_counters_that_disagree_are_refused(self) -> None:
        for value in (tunix([7, 6]), tunix(17), tunix(-1)):
            with pytest.raises(LengthMismatchError):
                wrap(value)
        with pytest.raises(LengthMismatchError):
            wrap(tunix(7), length=6)
        batch = tunix(7)
        batch["layer_0"]["end_index"] = jnp.array([7, 6], jnp.int32)
        with pytest.raises(LengthMismatchError):
            wrap(batch)

    def test_keys_of_the_other_rotary_convention_are_refused(self) -> None:
        names = {"{i}.k": "layers.{i}.key", "{i}.v": "layers.{i}.value"}
        layout = KVLayout({"*": TOKENS(1)}, names=names, rotary="interleaved")
        value = [{name: make((1, 5, 2, 4), Dtype.BFLOAT16, 0) for name in "kv"} for _ in range(2)]
        with pytest.raises(StructureMismatchError):
            wrap(value, layout=layout).unwrap(like=tunix(0))


def test_no_metadata_is_needed() -> None:
    check_adapter("jax", "jax.numpy.ones(2)")
