"""BatchSuite: a batch comes apart into its rows, and goes together again."""

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.roles import LENGTH, SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.errors import LengthMismatchError, StructureMismatchError
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.testing.grid import concat
from agnostic_cache.testing.subject import KV, Subject

ROWS = 7
BATCH = 3


class BatchSuite(Subject):
    """``stack(state.split_batch())`` is the whole again; padding is left out, and put in."""

    @pytest.mark.parametrize("axis", [0, 1, 3])
    def test_a_batch_splits_and_stacks(self, dtype: Dtype, axis: int) -> None:
        state = self._batch(dtype, axis)
        whole = self.grids(state)
        rows = state.split_batch()
        assert [row.length for row in rows] == [ROWS] * BATCH
        for i, row in enumerate(rows):
            assert {name: grid.take(axis, i, i + 1) for name, grid in whole.items()} == self.grids(row)
        assert self.grids(KVState.stack(rows)) == whole
        assert self.grids(KVState.stack([KVState.stack(rows[:2]), rows[2]])) == whole

    def _batch(self, dtype: Dtype, axis: int) -> KVState:
        names = ["heads", "tokens", "dim"]
        names.insert(axis, "batch")
        shape = [{"batch": BATCH, "heads": 2, "tokens": ROWS, "dim": 3}[name] for name in names]
        layout = KVLayout({"*": TOKENS(names.index("tokens"))}, axes={"*": names})
        return wrap({name: self.make(shape, dtype, i) for i, name in enumerate("ab")}, layout=layout)

    def test_rows_and_batches_are_independent(self) -> None:
        source = self.kv(6)
        state = wrap(source, layout=KV)
        whole = self.grids(state)
        rows = state.split_batch()
        for array in self.arrays_of(source):
            self.spoil(array)
        stacked = KVState.stack(rows)
        for row in rows:
            for leaf in row.leaves.values():
                self.spoil(leaf.array)
        assert self.grids(stacked) == whole

    def test_what_was_padded_begins_at_its_first_token(self) -> None:
        state = wrap(self.kv(6), layout=KV)
        whole = self.grids(state)
        for lengths in ([6, 6], [4, 6], [0, 1]):
            for i, row in enumerate(state.split_batch(lengths)):
                assert row.length == lengths[i]
                wanted = {name: grid.take(0, i, i + 1).take(1, 6 - lengths[i], 6) for name, grid in whole.items()}
                assert self.grids(row) == wanted
        for lengths in ([6], [6, 6, 6], [7, 6], [6, -1]):
            with pytest.raises(LengthMismatchError):
                state.split_batch(lengths)

    def test_shorter_states_are_padded_in_front(self) -> None:
        parts = [wrap(self.kv(rows, seed=rows), layout=KV) for rows in (3, 5)]
        stacked = KVState.stack(parts, length=6)
        assert stacked.length == 6
        for name, grid in self.grids(stacked).items():
            for i, part in enumerate(parts):
                rows, own = grid.take(0, 2 * i, 2 * i + 2), self.grid(part.leaves[name].array)
                assert rows.take(1, 6 - part.length, 6) == own
                assert not any(map(any, rows.take(1, 0, 6 - part.length).items))
        assert [row.length for row in stacked.split_batch([3, 3, 5, 5])] == [3, 3, 5, 5]
        for length in (None, 4):
            with pytest.raises(LengthMismatchError):
                KVState.stack(parts, length=length)

    def test_buffers_are_stacked_as_far_as_they_count(self) -> None:
        parts = [wrap(self.kv(room), layout=KV, length=4) for room in (6, 9)]
        stacked = KVState.stack(parts)
        assert stacked.length == 4
        for name, grid in self.grids(stacked).items():
            wanted = concat([self.grid(part.leaves[name].array).take(1, 0, 4) for part in parts], 0)
            assert self.grid(stacked.leaves[name].array) == grid == wanted

    def test_each_role_has_its_rows(self) -> None:
        layout = KVLayout(
            {"full": TOKENS(1), "ring": WINDOW(1, 3), "end_index": LENGTH, "step": LENGTH},
            axes={"state": ("batch", "dim"), "end_index": ("batch",)},
        )
        counter = self.adapter.with_counter(self.make((2,), Dtype.INT32, 0), 5)
        state = wrap(
            {
                "full": self.make((2, 5, 2, 3), Dtype.FLOAT32, 0),
                "ring": self.make((2, 3, 2, 3), Dtype.FLOAT32, 1),
                "state": self.make((2, 4), Dtype.FLOAT32, 2),
                "end_index": counter,
                "step": self.adapter.with_counter(self.make((), Dtype.INT32, 0), 5),
            },
            layout=layout,
        )
        assert state.leaves["state"].role is SNAPSHOT
        rows = state.split_batch([4, 5])
        assert [self._shapes(row) for row in rows] == [
            {"full": (1, count, 2, 3), "ring": (1, 3, 2, 3), "state": (1, 4), "end_index": (1,), "step": ()}
            for count in (4, 5)
        ]
        stacked = KVState.stack(rows, length=6)
        assert self._shapes(stacked)["end_index"] == (2,)
        for row in (*rows, stacked):
            assert {self.adapter.counter(row.leaves[name].array) for name in ("end_index", "step")} == {row.length}
        for name in ("ring", "state"):
            assert self.grid(stacked.leaves[name].array) == self.grid(state.leaves[name].array)
        assert stacked.leaves["ring"].first == 3

    def test_every_row_of_a_window_that_all_have_is_stacked(self) -> None:
        layout = KVLayout({"w": WINDOW(1, 3)})
        values = [self.make((1, 8, 2), Dtype.FLOAT32, seed) for seed in range(2)]
        stacked = KVState.stack([wrap({"w": value}, layout=layout, length=8) for value in values])  # all recorded
        assert self.grid(stacked.leaves["w"].array) == concat([self.grid(value) for value in values], 0)
        assert stacked.leaves["w"].first == 0

    def test_of_a_window_that_is_not_full_padding_makes_up_the_rest(self) -> None:
        layout = KVLayout({"w": WINDOW(1, 4)})
        values = {rows: self.make((1, rows, 2), Dtype.FLOAT32, rows) for rows in (2, 3)}
        states = [wrap({"w": value}, layout=layout, length=rows) for rows, value in values.items()]
        stacked = KVState.stack(states, length=5)
        grid = self.grid(stacked.leaves["w"].array)
        assert (grid.shape, stacked.leaves["w"].first) == ((2, 4, 2), 1)
        for i, own in enumerate(map(self.grid, values.values())):
            assert grid.take(0, i, i + 1).take(1, 4 - own.shape[1], 4) == own

    def _shapes(self, state: KVState) -> dict[str, tuple[int, ...]]:
        return {name: self.adapter.describe(leaf.array).shape for name, leaf in state.leaves.items()}

    def test_a_leaf_without_a_batch_is_refused(self) -> None:
        state = wrap({"a": self.make((2, 3), Dtype.FLOAT32, 0)})
        with pytest.raises(StructureMismatchError):
            state.split_batch()
        with pytest.raises(StructureMismatchError):
            KVState.stack([state, state])

    def test_batches_of_two_sizes_in_one_state_are_refused(self) -> None:
        value = {name: self.make((count, 4, 2, 3), Dtype.FLOAT32, 0) for name, count in (("a", 2), ("b", 3))}
        with pytest.raises(StructureMismatchError):
            wrap(value, layout=KVLayout({"*": TOKENS(1)})).split_batch()

    def test_rows_of_several_tokens_are_never_padded(self) -> None:
        layout = KVLayout({"a": TOKENS(1), "b": TOKENS(1, stride=2)})
        value = {"a": self.make((2, 6, 2, 3), Dtype.FLOAT32, 0), "b": self.make((2, 3, 2, 3), Dtype.FLOAT32, 1)}
        state = wrap(value, layout=layout, length=6)
        rows = state.split_batch([6, 6])
        assert self.grids(KVState.stack(rows)) == self.grids(state)
        with pytest.raises(StructureMismatchError):
            state.split_batch([6, 4])
        with pytest.raises(StructureMismatchError):
            KVState.stack(rows, length=8)

    def test_one_array_under_two_names_stays_one(self) -> None:
        array = self.make((2, 4, 2, 3), Dtype.FLOAT32, 0)
        state = wrap({"a": array, "b": array}, layout=KVLayout({"*": TOKENS(1)}))
        for row in state.split_batch():
            assert row.leaves["a"].array is row.leaves["b"].array

    def test_states_that_differ_do_not_stack(self) -> None:
        state = wrap(self.kv(4), layout=KV)
        others = [
            wrap(self.kv(4, dtype=Dtype.FLOAT16), layout=KV),
            wrap(self.kv(4)["layers"][0], layout=KVLayout({"*": TOKENS(1)})),
        ]
        for other in others:
            with pytest.raises(StructureMismatchError):
                KVState.stack([state, other])
        with pytest.raises(StructureMismatchError):
            KVState.stack([])

    def test_a_stack_counts_and_frees_its_bytes(self) -> None:
        before = self.live_bytes()
        stacked = KVState.stack([wrap(self.kv(4, seed=seed), layout=KV) for seed in (0, 1)])
        if before is not None:
            assert self.live_bytes() == before + stacked.nbytes
        assert stacked.release() > 0
        assert self.live_bytes() == before
