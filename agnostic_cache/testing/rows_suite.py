"""RowsSuite: what a cut and a join do to each role of a leaf."""

import itertools
import random
from typing import Any

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.roles import KEEP, LENGTH, SNAPSHOT, TOKENS, WINDOW
from agnostic_cache.errors import CutRangeError, MissingLeavesError, StructureMismatchError
from agnostic_cache.state.cutting import join_rows
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.rows import check_complete
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.testing.subject import KV, Subject

LENGTH_TOKENS = 7
WINDOW_LENGTH = 20


class RowsSuite(Subject):
    """``join([cut(0, a), cut(a, b), cut(b, n)])`` is the whole again, whatever the role."""

    @pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
    def test_cuts_join_to_the_whole(self, dtype: Dtype, axis: int) -> None:
        shape = [2, 3, 1, 2]
        shape[axis] = LENGTH_TOKENS
        names = ("a", "b")
        state = wrap(
            {name: self.make(shape, dtype, i) for i, name in enumerate(names)}, layout=KVLayout({"*": TOKENS(axis)})
        )
        whole = self.grids(state)
        for marks in ((), (3,), (0, 7), (2, 2, 5), (1, 2, 3, 4, 5, 6)):
            parts = self.pieces(state, marks)
            for part, (start, stop) in zip(parts, itertools.pairwise([0, *marks, LENGTH_TOKENS]), strict=True):
                assert part.length == stop - start
                assert self.grids(part) == {name: whole[name].take(axis % 4, start, stop) for name in names}
            joined = KVState.join(parts)
            assert joined.length == LENGTH_TOKENS
            assert self.grids(joined) == whole

    def pieces(self, state: KVState, marks: tuple[int, ...]) -> list[KVState]:
        """Cut a state at each mark."""
        return [state.cut(start, stop) for start, stop in itertools.pairwise([0, *marks, state.length])]

    def test_cuts_and_joins_are_independent_and_compact(self) -> None:
        source = self.kv(6)
        state = wrap(source, layout=KV)
        whole = self.grids(state)
        cuts = [state.cut(0, 4), state.cut(4, 6)]
        for array in self.arrays_of(source):
            self.spoil(array)
        joined = KVState.join(cuts)
        assert joined.nbytes == sum(joined.compact_nbytes().values()) <= 4 * _padded(2 * 6 * 2 * 3 * 4)
        assert cuts[1].nbytes == sum(cuts[1].compact_nbytes().values()) <= 4 * _padded(2 * 2 * 2 * 3 * 4)
        alone = KVState.join([joined])
        for part in cuts:
            for leaf in part.leaves.values():
                self.spoil(leaf.array)
        assert self.grids(joined) == whole
        for leaf in joined.leaves.values():
            self.spoil(leaf.array)
        assert self.grids(alone) == whole

    def test_buffers_longer_than_the_state_give_their_rows(self) -> None:
        source = self.kv(9)
        state = wrap(source, layout=KV, length=5)
        for marks in ((), (2,), (0, 3, 5)):
            joined = KVState.join(self.pieces(state, marks))
            assert {self.grid(leaf.array).shape[1] for leaf in joined.leaves.values()} == {5}
            assert self.grids(joined) == self.grids(state)
        with pytest.raises(CutRangeError):
            state.cut(0, 6)
        copied = state.copy()
        assert copied.length == 5
        assert self.grids(KVState.join([copied, state.cut(0, 2)])) == self.grids(KVState.join([state, state.cut(0, 2)]))

    def test_strided_rows_are_cut_at_their_boundaries(self) -> None:
        layout = KVLayout({"dense": TOKENS(0), "sparse": TOKENS(0, 4)})
        value = {"dense": self.make((11, 2), Dtype.FLOAT32, 0), "sparse": self.make((2, 3), Dtype.FLOAT32, 1)}
        state = wrap({**value, "rest": self.make((2,), Dtype.FLOAT32, 2)}, layout=layout, length=11)
        assert state.length == 11
        joined = KVState.join(self.pieces(state, (4, 8)))
        assert (joined.length, self.grids(joined)) == (11, self.grids(state))
        assert [self.grid(part.leaves["sparse"].array).shape[0] for part in self.pieces(state, (4, 8))] == [1, 1, 0]
        empty = state.cut(11, 11)  # behind a row that is not whole, and yet at a place where a state can end
        assert (empty.length, self.grid(empty.leaves["sparse"].array).shape) == (0, (0, 3))
        for start, stop in ((0, 5), (3, 8), (2, 11)):
            with pytest.raises(CutRangeError):
                state.cut(start, stop)
        with pytest.raises(StructureMismatchError):
            KVState.join([state, state.cut(8, 11)])  # the row of tokens [8, 12) would be lost

    def test_a_window_is_rebuilt_from_the_rows_of_blocks(self) -> None:
        width, source = 6, self.make((2, WINDOW_LENGTH, 3), Dtype.FLOAT32, 0)
        # Every row of the window was recorded, as a prefill does that stores block by block.
        recorded = wrap({"w": source}, layout=KVLayout({"w": WINDOW(1, width)}), length=WINDOW_LENGTH)
        whole = self.grid(source)
        for block in (1, 4, 5, 10):
            blocks = self.pieces(recorded, tuple(range(block, WINDOW_LENGTH, block)))
            for count in range(1, len(blocks) + 1):
                joined = KVState.join(blocks[:count])
                end = count * block
                self.holds_the_end(joined, end, width, whole)
                assert self.grid(joined.unwrap()["w"]) == whole.take(1, max(0, end - width), end)

    def holds_the_end(self, state: KVState, end: int, width: int, whole: Any) -> None:
        """Assert that the only window of `state` is the last `width` rows before token `end`."""
        leaf = state.leaves["w"]
        assert (state.length, leaf.first) == (end, max(0, end - width))
        assert self.grid(leaf.array) == whole.take(1, leaf.first, end)

    def test_a_cut_that_lacks_rows_of_a_window_does_not_unwrap(self) -> None:
        width = 6
        native = {"w": self.make((2, width, 3), Dtype.FLOAT32, 0)}  # the last rows of 20 tokens
        state = wrap(native, layout=KVLayout({"w": WINDOW(1, width)}), length=WINDOW_LENGTH)
        whole = self.grid(native["w"])
        assert state.unwrap()["w"] is native["w"]
        for stop in range(1, WINDOW_LENGTH):
            with pytest.raises(MissingLeavesError):
                state.cut(0, stop).unwrap()
        with pytest.raises(MissingLeavesError):
            KVState.join([state.cut(0, 10), state.cut(10, 12)]).unwrap()
        for middle in (0, 10, 14, 17, 20):
            joined = KVState.join(self.pieces(state, (middle,)))
            assert self.grid(joined.unwrap()["w"]) == whole
        # A gap in the rows is not bridged: block [14, 17) is replaced by one whose rows are gone.
        with pytest.raises(MissingLeavesError):
            KVState.join([state.cut(0, 14), state.cut(0, 3), state.cut(17, 20)]).unwrap()
        assert self.grid(state.cut(0, 0).unwrap()["w"]).shape == (2, 0, 3)

    def test_windows_that_do_not_adjoin_are_not_joined(self) -> None:
        whole = self.make((6, 2), Dtype.FLOAT32, 0)
        recorded = wrap({"w": whole}, layout=KVLayout({"w": WINDOW(0, 6)}), length=6)
        head, tail = recorded.cut(0, 4).rows, recorded.cut(4, 6).rows
        [(name, leaf)] = head.leaves.items()
        for kept in (1, 2, 3):  # of tokens [0, 4), and nobody has the rows behind them
            short = leaf._replace(array=self.adapter.cut_all([(leaf.array, 0, 0, kept)])[0])
            joined = join_rows([head._replace(leaves={name: short}), tail])
            assert (joined.length, joined.leaves[name].first) == (6, 4)
            assert self.grid(joined.leaves[name].array) == self.grid(whole).take(0, 4, 6)
            with pytest.raises(MissingLeavesError):
                check_complete(joined)

    def test_a_window_of_a_short_state_holds_all_of_it(self) -> None:
        native = {"w": self.make((2, 8, 3), Dtype.FLOAT32, 0)}
        state = wrap(native, layout=KVLayout({"w": WINDOW(1, 8)}), length=5)  # three rows are yet to come
        for marks in ((), (2,), (1, 1, 4)):
            joined = KVState.join(self.pieces(state, marks))
            self.holds_the_end(joined, 5, 8, self.grid(native["w"]))
        counted = {**native, "cache_index": self.adapter.with_counter(self.make((), Dtype.INT32, 0), WINDOW_LENGTH)}
        layout = KVLayout({"w": WINDOW(1, 8), "cache_index": LENGTH})
        self.holds_the_end(wrap(native, layout=layout, length=20), 20, 8, _Shifted(self.grid(native["w"]), 12))
        self.holds_the_end(wrap(counted, layout=layout), 20, 8, _Shifted(self.grid(native["w"]), 12))

    def test_a_snapshot_is_left_behind_unless_the_cut_ends_with_the_state(self) -> None:
        native = {"k": self.make((6, 2), Dtype.FLOAT32, 0), "s": self.make((2, 2), Dtype.FLOAT32, 1)}
        state = wrap(native, layout=KVLayout({"k": TOKENS(0)}))
        whole = self.grids(state)
        head, tail = state.cut(0, 4), state.cut(4, 6)
        assert head.missing == {"s"}
        assert not tail.missing
        assert list(head.leaves) == ["k"]
        with pytest.raises(MissingLeavesError):
            head.unwrap()
        with pytest.raises(MissingLeavesError):
            head.unwrap(like=native)
        assert head.copy().missing == head.to("host").missing == head.cut(1, 4).missing == {"s"}
        joined = KVState.join([head, tail])
        assert not joined.missing
        for array in native.values():
            self.spoil(array)
        assert self.grids(joined) == whole
        assert KVState.join([joined, head]).missing == {"s"}
        with pytest.raises(MissingLeavesError):
            KVState.join([joined, head]).unwrap()

    def test_counters_follow_the_length(self) -> None:
        layout = KVLayout({"k": TOKENS(0), "cache_index": LENGTH})
        counter = self.adapter.with_counter(self.make((3,), Dtype.INT32, 0), 6)
        state = wrap({"k": self.make((8, 2), Dtype.FLOAT32, 0), "cache_index": counter, "end_index": 6}, layout=layout)
        head, tail = state.cut(0, 4), state.cut(4, 6)
        for piece, length in ((head, 4), (tail, 2), (KVState.join([head, tail, tail]), 8), (state.copy(), 6)):
            native = piece.unwrap()
            assert (self.adapter.counter(native["cache_index"]), native["end_index"]) == (length, length)
            assert self.adapter.describe(native["cache_index"]) == self.adapter.describe(counter)
            assert wrap(native, layout=layout).length == length

    def test_what_is_kept_is_no_part_of_the_state(self) -> None:
        layout = KVLayout({"k": TOKENS(1), "mask": KEEP}, axes={"mask": ("rows", "columns")})
        native = {"k": self.make((2, 6, 3), Dtype.FLOAT32, 0), "mask": self.make((9, 9), Dtype.BOOL, 1)}
        state = wrap(native, layout=layout)
        assert (state.length, state.leaves["mask"].role) == (6, KEEP)
        assert state.unwrap()["mask"] is native["mask"]
        whole = self.grids(state)
        assert self.grids(state.copy()) == self.grids(state.to("host").to(self.framework)) == whole
        head, tail = state.cut(0, 4), state.cut(4, 6)
        [row, other] = state.split_batch()
        made = [head, tail, state.cut(0, 6), row]
        made += [KVState.join([head, tail]), KVState.join([state]), KVState.join([state, tail])]
        made += [KVState.stack([row, other]), KVState.stack([state, state])]
        for part in made:
            assert (list(part.leaves), part.missing) == (["k"], frozenset())
            with pytest.raises(StructureMismatchError):  # nobody knows the mask of a cache of that length
                part.unwrap()
        assert self.grids(KVState.join([head, tail])) == {"k": whole["k"]}

    def test_a_trimmed_state_stands_for_fewer_tokens(self) -> None:
        layout = KVLayout({"k": TOKENS(0), "cache_index": LENGTH})
        counter = self.adapter.with_counter(self.make((), Dtype.INT32, 0), 6)
        native = {
            "k": self.make((6, 2), Dtype.FLOAT32, 0),
            "s": self.make((2, 2), Dtype.FLOAT32, 1),
            "cache_index": counter,
        }
        state = wrap(native, layout=layout)
        rows = self.grids(state)["k"]
        trimmed = state.trimmed(4)
        assert (trimmed.length, set(trimmed.missing)) == (4, {"s"})
        assert trimmed.leaves["k"].array is native["k"]
        assert self.adapter.counter(trimmed.leaves["cache_index"].array) == 4
        assert self.grids(KVState.join([trimmed, state.cut(4, 6)])) == self.grids(state)
        assert self.grids(trimmed.cut(1, 4))["k"] == rows.take(0, 1, 4)
        assert list(state.trimmed(6).leaves) == list(state.leaves)
        assert trimmed.release() == 0
        for length in (-1, 7):
            with pytest.raises(CutRangeError):
                state.trimmed(length)

    def test_leaves_of_a_role_are_left_out(self) -> None:
        native = {"k": self.make((6, 2), Dtype.FLOAT32, 0), "s": self.make((2, 2), Dtype.FLOAT32, 1)}
        state = wrap(native, layout=KVLayout({"k": TOKENS(0)}))
        rows = state.without(SNAPSHOT)
        assert (list(rows.leaves), set(rows.missing), rows.length) == (["k"], {"s"}, 6)
        assert rows.leaves["k"].array is native["k"]
        assert list(state.without(TOKENS(0)).leaves) == ["s"]
        with pytest.raises(MissingLeavesError):
            rows.unwrap()
        assert list(state.leaves) == ["k", "s"]

    def test_any_sequence_of_cuts_and_joins_is_a_sequence_of_rows(self) -> None:
        layout = KVLayout({"t": TOKENS(1), "w": WINDOW(0, 3), "cache_index": LENGTH})
        source = random.Random(0)
        whole = self.make((1, 12), Dtype.INT8, 0)
        counter = self.adapter.with_counter(self.make((), Dtype.INT32, 0), 12)
        state = wrap({"t": whole, "w": self.make((12, 1), Dtype.INT8, 1), "cache_index": counter}, layout=layout)
        rows = self.grids(state)
        pool = [(state, list(range(12)))]
        for _ in range(25):
            (one, a), (other, b) = source.choice(pool), source.choice(pool)
            if source.random() < 0.5 and len(a) + len(b) < 40:
                made, tokens = KVState.join([one, other]), [*a, *b]
            else:
                start = source.randint(0, len(a))
                stop = source.randint(start, len(a))
                made, tokens = one.cut(start, stop), a[start:stop]
            pool.append((made, tokens))
            leaf, grids = made.leaves["w"], self.grids(made)
            assert made.length == self.adapter.counter(made.leaves["cache_index"].array) == len(tokens)
            assert list(grids["t"].items) == [rows["t"].items[i] for i in tokens]
            held = grids["w"].items  # whatever rows it claims to hold are the right ones
            assert list(held) == [rows["w"].items[i] for i in tokens[leaf.first : leaf.first + len(held)]]

    def test_what_does_not_belong_together_does_not_join(self) -> None:
        state = wrap(self.kv(4), layout=KV)
        half = wrap(self.kv(4, Dtype.FLOAT16), layout=KV)
        one_layer = wrap({"layers": self.kv(4)["layers"][:1]}, layout=KV)
        renamed = wrap({"blocks": self.kv(4)["layers"]}, layout=KVLayout({"*": TOKENS(1)}))
        other_axis = wrap(self.kv(2), layout=KVLayout({"*": TOKENS(2)}))
        unlike = wrap({"layers": tuple(self.kv(4)["layers"])}, layout=KV)
        layouts = [KVLayout({"a": role}) for role in (TOKENS(1, 4), WINDOW(1, 4))]
        strided, window = (
            wrap({"a": self.make((1, 4, 2), Dtype.INT8, 0)}, layout=layout, length=4) for layout in layouts
        )
        with pytest.raises(StructureMismatchError):
            KVState.join([strided, window])
        batch = {"layers": [{n: self.make((1, 4, 2, 3), Dtype.FLOAT32, 0) for n in ("key", "value")}] * 2}
        for other in (half, one_layer, renamed, other_axis, unlike, wrap(batch, layout=KV)):
            for parts in ([state, other], [other, state], [state, state, other]):
                with pytest.raises(StructureMismatchError):
                    KVState.join(parts)
        with pytest.raises(StructureMismatchError):
            KVState.join([])

    def test_states_of_two_rotary_conventions_do_not_join(self) -> None:
        roles = {"layers.{i}.key": TOKENS(1), "layers.{i}.value": TOKENS(1)}
        half, interleaved = (
            wrap(self.kv(4), layout=KVLayout(roles, rotary=rotary)) for rotary in ("half", "interleaved")
        )
        with pytest.raises(StructureMismatchError):
            KVState.join([half, interleaved])
        assert KVState.join([half, wrap(self.kv(4), layout=KV)]).length == 8


class _Shifted:
    """A grid whose first row along axis 1 stands for a later token."""

    def __init__(self, grid: Any, first: int) -> None:
        self.grid, self.first = grid, first

    def take(self, axis: int, start: int, stop: int) -> Any:
        return self.grid.take(axis, start - self.first, stop - self.first)


def _padded(nbytes: int) -> int:
    """A compact copy may round each array up to 64 bytes."""
    return -(-nbytes // 64) * 64
