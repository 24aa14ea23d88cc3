"""The adapter of PyTorch keeps the contract of adapters; and what only tensors do."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from no_metadata import check_adapter
from torch.testing._internal.two_tensor import TwoTensor
from torch_subject import TorchSubject, live_bytes

from agnostic_cache import KVLayout, KVState, SimpleLRUCache, wrap
from agnostic_cache.errors import (
    LayoutUnknownError,
    StructureMismatchError,
    UnknownValueError,
    UnsupportedArrayError,
    UnsupportedDtypeError,
)
from agnostic_cache.state.layout import LENGTH, SNAPSHOT, TOKENS
from agnostic_cache.testing import AdapterSuite
from agnostic_cache_adapters.torch import adapter, on_evict


class TestTorchAdapter(TorchSubject, AdapterSuite):
    """The contract."""


class TestSpecialTensors:
    @pytest.mark.parametrize(
        "refused",
        [
            pytest.param(lambda: torch.ones(3, requires_grad=True), id="requires grad"),
            pytest.param(lambda: torch.ones(3, requires_grad=True) * 2, id="computed with grad"),
            pytest.param(lambda: torch.nn.Parameter(torch.ones(3)), id="parameter"),
            pytest.param(lambda: torch.eye(3).to_sparse(), id="sparse"),
            pytest.param(lambda: torch.empty(3, device="meta"), id="meta"),
            pytest.param(lambda: torch.tensor([1j]).conj(), id="conjugated"),
            pytest.param(lambda: TwoTensor(torch.ones(3), torch.ones(3)), id="wrapper"),
        ],
    )
    def test_a_tensor_that_cannot_be_kept_is_named(self, refused: Callable[[], torch.Tensor]) -> None:
        for value in ({"a": torch.ones(2), "b": refused()}, refused(), [refused()]):
            with pytest.raises(UnsupportedArrayError):
                wrap(value)
        with pytest.raises(UnsupportedArrayError):
            adapter.describe(refused())
        assert on_evict([refused()]) >= 0  # whoever evicts it frees what is there to free

    def test_a_negated_view_never_shows_the_wrong_sign(self) -> None:
        negated = torch.tensor([1 + 2j]).conj().imag  # real, and its bytes say 2
        state = wrap({"a": negated})
        assert state.copy().to("host").to("torch").unwrap()["a"].tolist() == [-2]
        assert state.to("host").to("torch").unwrap()["a"].tolist() == [-2]
        for ask in (adapter.describe, adapter.to_host, adapter.export_dlpack):
            with pytest.raises(UnsupportedArrayError):
                ask(negated)

    def test_a_dtype_outside_the_table_is_named(self) -> None:
        with pytest.raises(UnsupportedDtypeError):
            wrap({"a": torch.empty(3, dtype=torch.float4_e2m1fn_x2)})

    def test_a_template_that_requires_grad_is_refused(self) -> None:
        state = wrap({"a": torch.ones(3)})
        with pytest.raises(UnsupportedArrayError):
            state.unwrap(like={"a": torch.zeros(3, requires_grad=True)})

    def test_resolved_and_detached_tensors_are_kept(self) -> None:
        for tensor in (torch.tensor([1j]).conj().resolve_conj(), torch.ones(3, requires_grad=True).detach()):
            assert torch.equal(wrap({"a": tensor}).copy().unwrap()["a"], tensor)

    def test_a_parameter_without_grad_is_a_tensor(self) -> None:
        parameter = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
        copied = wrap({"a": parameter}).copy().unwrap()["a"]
        assert copied.tolist() == [0, 1, 2]
        assert not copied.requires_grad

    def test_inference_tensors_are_kept_and_filled(self) -> None:
        layout = KVLayout({"a": TOKENS(0)})
        with torch.inference_mode():
            made, buffer = torch.arange(3.0), torch.zeros(5)
            assert wrap({"a": made}, layout=layout).copy().unwrap()["a"].is_inference()
        state = wrap({"a": made}, layout=layout)
        copied = state.copy().unwrap()["a"]
        assert not copied.is_inference()
        copied += 1  # outside of the mode, a copy may be written
        assert made.tolist() == [0, 1, 2]
        joined = KVState.join([state.cut(0, 1), state.cut(1, 3)])
        assert joined.unwrap()["a"].tolist() == [0, 1, 2]
        filled = joined.unwrap(like={"a": buffer})["a"]
        assert filled is buffer
        assert filled.tolist() == [0, 1, 2, 0, 0]
        plain = torch.zeros(5)
        filled = joined.unwrap(like={"a": plain})["a"]
        assert not filled.is_inference()
        filled += 1  # and may go on to be trained on
        assert plain.tolist() == [1, 2, 3, 1, 1]

    def test_what_is_made_in_inference_mode_has_no_grad_outside(self) -> None:
        with torch.inference_mode():
            state = wrap({"a": torch.arange(3.0)}).copy()
        assert state.to("host").to("torch").unwrap()["a"].tolist() == [0, 1, 2]

    def test_a_view_counts_its_whole_storage_and_a_copy_does_not(self) -> None:
        base = torch.zeros(1000)
        state = wrap({"a": base[:10], "b": base[20:30]})
        assert state.nbytes == 4000
        assert sum(state.compact_nbytes().values()) == state.copy().nbytes == 80
        assert state.cut(0, 0).nbytes == 80

    def test_a_permuted_tensor_is_copied_row_major(self) -> None:
        for tensor in (torch.rand(2, 3, 4, 5).permute(0, 3, 1, 2), torch.rand(2, 3).t(), torch.rand(1).expand(4, 3)):
            copied = wrap({"a": tensor}).copy().unwrap()["a"]
            assert copied.is_contiguous()
            assert torch.equal(copied, tensor)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.bool])
    def test_a_large_tensor_is_copied_as_a_small_one(self, dtype: torch.dtype) -> None:
        whole = torch.randint(0, 2, (3, 1 << 20), dtype=torch.uint8).view(dtype)
        for source in (whole, whole[1:], whole.t(), whole[:, ::2]):
            before = live_bytes()
            state = wrap({"a": source}).copy()
            assert live_bytes() - before == state.nbytes == source.nbytes
            leaf, wanted = state.leaves["a"], source.contiguous()
            assert leaf.array.is_contiguous()
            assert torch.equal(leaf.array.view(torch.uint8), wanted.view(torch.uint8))
            leaf.array.view(torch.uint8).fill_(3)  # it is ours to write
            assert wanted.view(torch.uint8).max() <= 1
            del leaf, wanted
            assert state.release() == source.nbytes
            assert live_bytes() == before

    def test_constants_of_torch_ride_along(self) -> None:
        value = {"a": torch.ones(2), "dtype": torch.float16, "device": torch.device("cpu"), "shape": torch.Size([1])}
        native = wrap(value).copy().unwrap()
        assert (native["dtype"], native["device"], native["shape"]) == (torch.float16, torch.device("cpu"), (1,))

    def test_a_set_of_tensors_is_no_state(self) -> None:
        with pytest.raises(UnknownValueError):
            wrap({torch.ones(1)})

    def test_buffers_keep_their_address(self) -> None:
        buffers = [torch.zeros(2, 2, 9, 3), torch.zeros(2, 2, 9, 3)]
        pointers = [buffer.data_ptr() for buffer in buffers]
        layout = KVLayout({"*": TOKENS(2)})
        state = wrap([torch.rand(2, 2, 5, 3), torch.rand(2, 2, 5, 3)], layout=layout)
        slab = torch.zeros(2, 2, 2, 9, 3)
        for template in (buffers, list(slab)):  # chunks of one slab do not overlap, and are filled where they are
            filled = state.unwrap(like=template)
            assert [a.data_ptr() for a in filled] == [a.data_ptr() for a in template]
            assert all(
                torch.equal(a[:, :, :5], leaf.array) for a, leaf in zip(filled, state.leaves.values(), strict=True)
            )
        assert [buffer.data_ptr() for buffer in buffers] == pointers

    def test_an_unknown_device_is_refused(self) -> None:
        for device in ("cuda:99", "nonsense"):
            with pytest.raises(StructureMismatchError):
                wrap({"a": torch.ones(2)}).to("torch", device=device)


class Pair(NamedTuple):
    key: Any
    value: Any


@dataclasses.dataclass
class Entry:
    cache: Any
    scores: Any
    count: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenEntry:
    cache: Any


CONTAINERS: dict[str, Callable[..., Any]] = {
    "dict": lambda a, b: {"a": a, "b": b},
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "namedtuple": Pair,
    "dataclass": Entry,
    "frozen dataclass": lambda a, b: FrozenEntry([a, b]),
    "nesting": lambda a, b: Entry({"x": [Pair(a, {"y": (b,)})]}, (a, b, [b])),
    "one tensor": lambda a, _: a,
}


class TestOnEvict:
    """What ``SimpleLRUCache(8, on_evict=on_evict)`` frees, seen from outside."""

    @pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
    def test_the_memory_of_an_evicted_value_is_free(self, container: Callable[..., Any]) -> None:
        before = live_bytes()
        freed: list[int] = []
        cache = SimpleLRUCache(1, on_evict=lambda value: freed.append(on_evict(value)))
        cache.put("a", container(torch.zeros(100), torch.zeros(50)))
        held = live_bytes() - before
        assert held in {400, 600}
        cache.put("b", container(torch.zeros(10), torch.zeros(5)))
        assert live_bytes() - before in {40, 60}
        assert len(freed) == 1
        assert freed[0] in {0, held}

    @pytest.mark.parametrize("name", ["dict", "list", "dataclass"])
    def test_containers_are_emptied_and_what_was_freed_is_counted(self, name: str) -> None:
        value = CONTAINERS[name](torch.zeros(100), torch.zeros(50))
        assert on_evict(value) == 600
        assert on_evict(value) == 0

    def test_views_free_the_storage_behind_them(self) -> None:
        before = live_bytes()
        value = list(torch.zeros(4, 100))
        assert on_evict(value) == 1600
        assert live_bytes() == before

    def test_memory_that_somebody_else_holds_stays_valid(self) -> None:
        kept, gone = torch.arange(100.0), torch.zeros(50)
        view = kept[10:20]
        whole = kept.untyped_storage().nbytes()
        value = {"a": kept, "b": gone}
        del kept, gone
        assert on_evict(value) == 200
        assert view.untyped_storage().nbytes() == whole  # no storage is ever resized
        assert view.tolist() == [float(i) for i in range(10, 20)]

    def test_a_released_state_leaves_other_holders_their_memory(self) -> None:
        state = wrap({"a": torch.arange(4.0)}).copy()
        held = state.leaves["a"].array
        assert state.release() == 0
        assert held.tolist() == [0, 1, 2, 3]

    def test_what_is_no_tensor_is_left_alone(self) -> None:
        for value in (None, 1, "text", object(), {"a": object()}, [{1, 2}]):
            assert on_evict(value) == 0

    def test_tensors_that_cannot_be_kept_are_dropped_all_the_same(self) -> None:
        before = live_bytes()
        value = [
            torch.eye(3).to_sparse(),
            torch.ones(3, requires_grad=True),
            torch.empty(3, device="meta"),
            torch.ones(2),
        ]
        on_evict(value)
        assert value == []
        assert live_bytes() == before

    def test_a_cycle_of_containers_ends(self) -> None:
        value: dict[str, Any] = {"a": torch.zeros(100)}
        value["self"] = [value]
        assert on_evict(value) == 400


class TestInfer:
    def test_roles_are_inferred_without_allocating(self) -> None:
        def init(length: int) -> dict[str, Any]:
            return {
                "layers": [{"k": torch.zeros(1, length, 2, 8), "v": torch.zeros(1, 2, length, 8)}],
                "conv": torch.zeros(1, 4),
                "cache_index": torch.zeros((), dtype=torch.int32),
            }

        before = live_bytes()
        layout = KVLayout.infer(init, framework="torch", lengths=(10**9, 2 * 10**9))
        assert live_bytes() == before
        roles = [layout.describe(name, 4)[1].role for name in ("layers.0.k", "layers.0.v", "conv", "cache_index")]
        assert roles == [TOKENS(1), TOKENS(2), SNAPSHOT, LENGTH]

    def test_a_cache_without_a_token_axis_is_refused(self) -> None:
        with pytest.raises(LayoutUnknownError):
            KVLayout.infer(lambda _: {"a": torch.zeros(3)}, framework="torch")


def test_no_metadata_is_needed() -> None:
    check_adapter("torch", "torch.ones(2)")
