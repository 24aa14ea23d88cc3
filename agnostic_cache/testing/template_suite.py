"""TemplateSuite: states written into buffers that the caller gives up, ``unwrap(like=...)``."""

import itertools
from typing import Any

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.roles import KEEP, LENGTH, TOKENS, WINDOW, Role
from agnostic_cache.errors import MissingLeavesError, StructureMismatchError
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.testing.grid import concat, stack
from agnostic_cache.testing.subject import KV, Subject

STACKED = KVLayout(
    {"keys": TOKENS(2), "values": TOKENS(2)},
    names={"keys": "layers.*.key", "values": "layers.*.value"},
    stack_axis=0,
)


class TemplateSuite(Subject):
    """Leaves and axes are paired by name; rows past the end, and templates that do not fit, stay as they were."""

    def test_rows_go_to_the_front_and_the_rest_stays(self, dtype: Dtype) -> None:
        state = wrap(self.kv(4, dtype), layout=KV).copy()
        for room in (4, 5, 9):
            template = self.kv(room, dtype, seed=100)
            behind = [self.grid(array).take(1, 4, room) for array in self.arrays_of(template)]
            filled = state.unwrap(like=template)
            wanted = [concat(pair, 1) for pair in zip(self.grids(state).values(), behind, strict=True)]
            assert [self.grid(array) for array in self.arrays_of(filled)] == wanted
            assert self.grids(wrap(filled, layout=KV, length=4)) == self.grids(state)

    def test_buffers_are_used_up(self) -> None:
        template = self.kv(9, seed=100)
        arrays = self.arrays_of(template)
        filled = self.arrays_of(wrap(self.kv(4), layout=KV).unwrap(like=template))
        if self.adapter.mutable:
            assert [id(array) for array in filled] == [id(array) for array in arrays]
        else:
            assert all(self.adapter.is_deleted(array) for array in arrays)
        assert not any(self.adapter.is_deleted(array) for array in filled)

    def test_a_state_is_loaded_again_and_again(self) -> None:
        state = wrap(self.kv(4), layout=KV).copy()
        wanted = self.grids(state)
        for seed in range(5):
            filled = state.unwrap(like=self.kv(6, seed=100 * seed))
            assert self.grids(wrap(filled, layout=KV, length=4)) == wanted
            for array in self.arrays_of(filled):
                self.spoil(array)
        assert self.grids(state) == wanted

    def test_of_a_longer_buffer_only_the_state_is_written(self) -> None:
        state = wrap(self.kv(9), layout=KV, length=4)
        template = self.kv(6, seed=100)
        behind = [self.grid(array).take(1, 4, 6) for array in self.arrays_of(template)]
        filled = self.arrays_of(state.unwrap(like=template))
        assert [self.grid(array).take(1, 4, 6) for array in filled] == behind
        assert [self.grid(array).take(1, 0, 4) for array in filled] == list(self.grids(state).values())

    def test_arrays_of_any_shape_are_filled(self, dtype: Dtype) -> None:
        for name, array in {"plain": self.make((2, 5, 3), dtype, 0), **self.odd_arrays(dtype)}.items():
            wanted = self.grid(array)
            template = {"a": self.make(wanted.shape, dtype, 100), "n": 1}
            filled = wrap({"a": array, "n": 2}).unwrap(like=template)
            assert self.grid(filled["a"]) == wanted, name

    def test_unusual_buffers_are_filled(self, dtype: Dtype) -> None:
        for name, buffer in self.odd_arrays(dtype).items():
            shape = self.grid(buffer).shape
            state = wrap({"a": self.make(shape, dtype, 100)})
            wanted = self.grids(state)
            filled = state.unwrap(like={"a": buffer})
            assert {"a": self.grid(filled["a"])} == wanted, name

    def test_counters_are_set(self) -> None:
        layout = KVLayout({"k": TOKENS(0), "cache_index": LENGTH, "end_index": LENGTH})
        counter = self.adapter.with_counter(self.make((3,), Dtype.INT32, 0), 0)
        template = {"k": self.make((8, 2), Dtype.FLOAT32, 9), "cache_index": counter, "end_index": 0}
        state = wrap({"k": self.make((5, 2), Dtype.FLOAT32, 0)}, layout=layout)
        filled = state.unwrap(like=template, layout=layout)
        assert (self.adapter.counter(filled["cache_index"]), filled["end_index"]) == (5, 5)
        assert wrap(filled, layout=layout).length == 5

    def test_what_is_kept_stays_the_templates_own(self) -> None:
        layout = KVLayout({"k": TOKENS(0), "mask": KEEP})
        state = wrap(
            {"k": self.make((5, 2), Dtype.FLOAT32, 0), "mask": self.make((5, 5), Dtype.BOOL, 1)}, layout=layout
        )
        joined = KVState.join([state.cut(0, 2), state.cut(2, 5)])
        for part, given in ((state, layout), (state, None), (joined, layout), (joined, None)):
            template = {"k": self.make((8, 2), Dtype.FLOAT32, 2), "mask": self.make((8, 8), Dtype.BOOL, 3)}
            mask, wanted = template["mask"], self.values(template["mask"])
            filled = part.unwrap(like=template, layout=given)
            assert filled["mask"] is mask
            assert self.values(filled["mask"]) == wanted
            assert self.grid(filled["k"]).take(0, 0, 5) == self.grids(state)["k"]

    def test_adjacent_parts_fill_a_template_like_the_whole(self) -> None:
        layout = KVLayout({"k": TOKENS(0), "w": WINDOW(0, 2)})
        native = {name: self.make((6, 2), Dtype.FLOAT32, i) for i, name in enumerate(("k", "w", "s"))}
        state = wrap(native, layout=layout)
        wanted = self.grids(state)
        for marks in ((), (3,), (0, 2, 5, 6)):
            parts = [state.cut(start, stop) for start, stop in itertools.pairwise((0, *marks, 6))]
            template = {name: self.make((6, 2), Dtype.FLOAT32, 9) for name in native}
            filled = KVState.fill(parts, template, layout)
            assert {name: self.grid(filled[name]) for name in ("k", "s")} == {name: wanted[name] for name in ("k", "s")}
            assert self.grid(filled["w"]).take(0, 4, 6) == wanted["w"].take(0, 4, 6)
        with pytest.raises(StructureMismatchError):  # nobody has the snapshot of that end
            KVState.fill([state.cut(0, 3), state.cut(3, 5)], {name: native[name] for name in native}, layout)

    def test_one_buffer_under_two_names_becomes_two(self) -> None:
        state = wrap({"key": self.make((4, 2), Dtype.FLOAT32, 0), "value": self.make((4, 2), Dtype.FLOAT32, 1)})
        zeros = self.make((4, 2), Dtype.FLOAT32, 2)
        filled = state.unwrap(like={"key": zeros, "value": zeros})
        assert {name: self.grid(array) for name, array in filled.items()} == self.grids(state)

    def test_a_state_fills_the_buffers_it_borrows(self) -> None:
        source = {"key": self.make((4, 2), Dtype.FLOAT32, 0), "value": self.make((4, 2), Dtype.FLOAT32, 1)}
        state = wrap(source)
        wanted = self.grids(state)
        filled = state.unwrap(like={"key": source["value"], "value": source["key"]})
        assert {name: self.grid(array) for name, array in filled.items()} == wanted

    # --- other layouts -----------------------------------------------------------------------------------------------

    def test_axes_are_matched_by_name(self, dtype: Dtype) -> None:
        state = wrap({"k": self.make((2, 5, 3, 4), dtype, 0)}, layout=KVLayout({"k": TOKENS(1)}))
        buffer = self.make((2, 3, 6, 4), dtype, 1)
        behind = self.grid(buffer).take(2, 5, 6)
        layout = KVLayout({"k": TOKENS(2)})
        if not self.transposes:
            with pytest.raises(StructureMismatchError):
                state.unwrap(like={"k": buffer}, layout=layout)
            return
        filled = state.unwrap(like={"k": buffer}, layout=layout)
        assert self.grid(filled["k"]) == concat([self.grids(state)["k"].transpose((0, 2, 1, 3)), behind], 2)
        back = wrap(filled, layout=layout, length=5).unwrap(
            like={"k": self.make((2, 5, 3, 4), dtype, 2)}, layout=KVLayout({"k": TOKENS(1)})
        )
        assert self.grid(back["k"]) == self.grids(state)["k"]

    def test_layers_are_stacked_and_taken_apart(self, dtype: Dtype) -> None:
        state = wrap(self.kv(4, dtype), layout=KV)
        template = {name: self.make((2, 2, 6, 2, 3), dtype, i) for i, name in enumerate(("keys", "values"))}
        behind = {name: self.grid(array).take(2, 4, 6) for name, array in template.items()}
        if not self.transposes:
            with pytest.raises(StructureMismatchError):
                state.unwrap(like=template, layout=STACKED)
            return
        filled = state.unwrap(like=template, layout=STACKED)
        grids = self.grids(state)
        for name, part in (("keys", "key"), ("values", "value")):
            layers = stack([grids[f"layers.{i}.{part}"] for i in range(2)], 0)
            assert self.grid(filled[name]) == concat([layers, behind[name]], 2)
        stacked = wrap(filled, layout=STACKED, length=4)
        apart = stacked.unwrap(like=self.kv(7, dtype, seed=100), layout=KV)
        assert self.grids(wrap(apart, layout=KV, length=4)) == grids
        parts = [stacked.cut(0, 1), stacked.cut(1, 4)]
        assert self.grids(KVState.join(parts)) == self.grids(stacked)

    def test_a_window_is_written_where_its_tokens_belong(self) -> None:
        native = {"w": self.make((6, 2), Dtype.FLOAT32, 0)}  # of the 12 tokens, the last six
        state = wrap(native, layout=KVLayout({"w": WINDOW(0, 4)}), length=12)
        rows = self.grid(native["w"])
        wanted = {4: rows.take(0, 2, 6), 5: rows.take(0, 1, 6), 6: rows}
        for room in (4, 5, 6, 9, 12, 15):
            buffer = self.make((room, 2), Dtype.FLOAT32, room)
            whole = self.grid(buffer)
            filled = state.unwrap(like={"w": buffer})
            first = max(0, 12 - room)  # the token of the first row
            at = 6 - first if room > 6 else 0
            held = wanted.get(room, rows)
            end = at + held.shape[0]
            assert self.grid(filled["w"]) == concat([whole.take(0, 0, at), held, whole.take(0, end, room)], 0)
            again = wrap(filled, layout=KVLayout({"w": WINDOW(0, 4)}), length=12)
            assert self.grid(again.cut(8, 12).leaves["w"].array) == rows.take(0, 2, 6)
        with pytest.raises(StructureMismatchError):
            state.unwrap(like={"w": self.make((3, 2), Dtype.FLOAT32, 1)})

    def test_a_window_of_one_row_is_no_row_per_token(self) -> None:
        native = {"a": self.make((5, 2), Dtype.FLOAT32, 0)}
        state = wrap(native, layout=KVLayout({"a": TOKENS(0)})).copy()
        roles: tuple[Role, Role] = (TOKENS(0, 1), WINDOW(0, 1))
        for role in (*roles, *reversed(roles)):
            layout, buffer = KVLayout({"a": role}), self.make((3, 2), Dtype.FLOAT32, 1)
            if isinstance(role, WINDOW):
                filled = state.unwrap(like={"a": buffer}, layout=layout)
                assert self.grid(filled["a"]) == self.grid(native["a"]).take(0, 2, 5)
            else:
                with pytest.raises(StructureMismatchError):
                    state.unwrap(like={"a": buffer}, layout=layout)

    # --- what does not fit -------------------------------------------------------------------------------------------

    def test_a_template_that_does_not_fit_is_refused_and_untouched(self) -> None:
        state = wrap(self.kv(4), layout=KV).copy()
        wanted = self.grids(state)
        kv = self.kv(4)
        templates: dict[str, Any] = {
            "too short": self.kv(3),
            "another dtype": self.kv(4, Dtype.INT32),
            "one leaf more": {"layers": [*self.kv(4)["layers"], self.kv(4)["layers"][0]]},
            "one leaf less": {"layers": self.kv(4)["layers"][:1]},
            "another batch": {"layers": self.layers((1, 4, 2, 3))},
            "other heads": {"layers": self.layers((2, 4, 3, 3))},
            "axes swapped": {"layers": self.layers((2, 2, 4, 3))},
            "one axis less": {"layers": self.layers((2, 4, 6))},
            "other names, same shapes": {"blocks": self.kv(4)["layers"]},
            "other leaves, same shapes": {"layers": [{"k": two["key"], "v": two["value"]} for two in kv["layers"]]},
        }  # fmt: skip
        for name, template in templates.items():
            arrays = [array for layers in template.values() for layer in layers for array in layer.values()]
            before = [self.values(array) for array in arrays]
            with pytest.raises(StructureMismatchError):
                state.unwrap(like=template)
            assert [self.values(array) for array in arrays] == before, name
        assert self.grids(state) == wanted

    def layers(self, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """Return two layers of keys and values of any shape."""
        return [{n: self.make(shape, Dtype.FLOAT32, i) for n in ("key", "value")} for i in range(2)]

    def test_nothing_is_written_where_one_leaf_does_not_fit(self) -> None:
        state = wrap(self.kv(4), layout=KV)
        template = self.kv(6, seed=100)
        template["layers"][1]["value"] = self.make((2, 3, 2, 3), Dtype.FLOAT32, 1)
        before = [self.values(array) for array in self.arrays_of(template)]
        with pytest.raises(StructureMismatchError):
            state.unwrap(like=template)
        assert [self.values(array) for array in self.arrays_of(template)] == before

    @pytest.mark.parametrize(
        ("held", "wanted"),
        [
            (WINDOW(0, 3), TOKENS(0)),  # rows of the past are gone
            (WINDOW(0, 3), WINDOW(0, 6)),  # a wider window needs rows that are gone
            (TOKENS(0), TOKENS(0, 2)),  # a row would stand for other tokens
        ],
    )
    def test_a_leaf_of_another_role_is_refused(self, held: Role, wanted: Role) -> None:
        state = wrap({"a": self.make((6, 2), Dtype.FLOAT32, 0)}, layout=KVLayout({"a": held}), length=6)
        if isinstance(held, WINDOW):
            state = KVState.join([state.cut(0, 2), state.cut(2, 6)])
        with pytest.raises(StructureMismatchError):
            state.unwrap(like={"a": self.make((6, 2), Dtype.FLOAT32, 1)}, layout=KVLayout({"a": wanted}))

    def test_a_state_with_missing_leaves_fills_nothing(self) -> None:
        native = {"k": self.make((6, 2), Dtype.FLOAT32, 0), "s": self.make((2, 2), Dtype.FLOAT32, 1)}
        head = wrap(native, layout=KVLayout({"k": TOKENS(0)})).cut(0, 4)
        template = {"k": self.make((6, 2), Dtype.FLOAT32, 2), "s": self.make((2, 2), Dtype.FLOAT32, 3)}
        before = [self.values(array) for array in template.values()]
        with pytest.raises(MissingLeavesError):
            head.unwrap(like=template)
        assert [self.values(array) for array in template.values()] == before

    @pytest.mark.parametrize(
        ("held", "wanted", "fits"),
        [("half", "interleaved", False), ("half", "half", True), (None, "half", True), ("half", None, True)],
    )
    def test_keys_keep_their_rotary_convention(self, held: str | None, wanted: str | None, *, fits: bool) -> None:
        state = wrap({"k": self.make((4, 2), Dtype.FLOAT32, 0)}, layout=KVLayout({"k": TOKENS(0)}, rotary=held))
        template = {"k": self.make((4, 2), Dtype.FLOAT32, 1)}
        layout = KVLayout({"k": TOKENS(0)}, rotary=wanted)
        if fits:
            assert self.grid(state.unwrap(like=template, layout=layout)["k"]) == self.grids(state)["k"]
        else:
            with pytest.raises(StructureMismatchError):
                state.unwrap(like=template, layout=layout)

    def test_a_state_of_the_host_fills_a_template_of_this_framework(self, dtype: Dtype) -> None:
        state = wrap(self.kv(4, dtype), layout=KV)
        host = state.to("host")
        filled = host.unwrap(like=self.kv(6, dtype, seed=100))
        assert self.grids(wrap(filled, layout=KV, length=4)) == self.grids(state)
        assert host.framework == "host"
        assert wrap(filled).framework == self.framework
