"""OwnershipSuite: who may write, and who frees: copy, fork, crossing, release."""

import pytest

from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.roles import TOKENS
from agnostic_cache.errors import MixedFrameworksError, ReleasedError
from agnostic_cache.state.kv_state import KVState
from agnostic_cache.state.layout import KVLayout
from agnostic_cache.state.wrapping import wrap
from agnostic_cache.testing.subject import KV, Subject


class OwnershipSuite(Subject):
    """A copy is nobody else's; what crossed is written by nobody; what is owned alone is freed when it is released."""

    def test_a_copy_outlives_its_source(self, dtype: Dtype) -> None:
        source = {"plain": self.make((2, 5, 3), dtype, 0), **self.odd_arrays(dtype)}
        state = wrap(source, layout=KVLayout({"plain": TOKENS(1)}))
        wanted = self.grids(state)
        copy, fork, again = state.copy(), state.fork(), state.copy().copy()
        assert copy.structure == state.structure
        assert copy.length == state.length
        assert copy.nbytes == sum(state.compact_nbytes().values()) == sum(copy.compact_nbytes().values())
        assert copy.nbytes <= state.nbytes + 64 * len(source)
        for array in source.values():
            self.spoil(array)
        assert self.grids(copy) == self.grids(fork) == self.grids(again) == wanted

    def test_what_unwrap_hands_out_is_the_callers(self) -> None:
        kept = wrap(self.kv(4), layout=KV).copy()
        wanted = self.grids(kept)
        for _ in range(3):
            for handed in (kept.copy().unwrap(), kept.fork().unwrap()):
                for array in self.arrays_of(handed):
                    self.spoil(array)
            assert self.grids(kept) == wanted

    def test_tied_arrays_stay_tied_and_count_once(self) -> None:
        array = self.make((2, 5, 3), Dtype.FLOAT32, 0)
        alone, tied = wrap({"a": array}), wrap({"a": array, "b": [array]})
        assert tied.nbytes == alone.nbytes
        assert tied.compact_nbytes() == alone.compact_nbytes()
        for state in (tied.copy(), tied.fork(), tied.to("host"), tied.to("host").to(self.framework)):
            assert state.leaves["a"].array is state.leaves["b.0"].array
        copy = tied.copy()
        assert copy.nbytes == alone.copy().nbytes
        native = copy.unwrap()
        assert native["a"] is native["b"][0]

    def test_host_and_back_is_bit_equal(self, dtype: Dtype) -> None:
        for name, array in {"plain": self.make((2, 5, 3), dtype, 0), **self.odd_arrays(dtype)}.items():
            wanted = self.grid(array)
            state = wrap({"a": array}, layout=KVLayout({"a": TOKENS(1)}) if len(wanted.shape) > 1 else None)
            host = state.to("host")
            back = host.to(self.framework)
            assert (host.framework, back.framework) == ("host", self.framework)
            assert host.length == back.length == state.length
            assert host.structure == back.structure == state.structure
            leaf = host.leaves["a"]
            assert (leaf.role, leaf.axes) == (state.leaves["a"].role, state.leaves["a"].axes)
            assert (leaf.array.shape, leaf.array.dtype) == self.adapter.describe(array)[:2], name
            assert self.grid(back.unwrap()["a"]) == wanted, name
            self.spoil(array)  # a borrowed array was copied, or may only be deleted
            assert bytes(host.leaves["a"].array.memory) == b"".join(wanted.items), name
            assert self.grid(back.leaves["a"].array) == wanted, name

    def test_nobody_writes_what_crossed(self) -> None:
        owned = wrap(self.kv(4), layout=KV).copy()
        wanted = self.grids(owned)
        host = owned.to("host")
        back = host.to(self.framework)
        for state in (owned, back):
            for array in self.arrays_of(state.unwrap()):
                self.spoil(array)
        assert self.grids(host.to(self.framework)) == wanted

    def test_crossing_to_the_same_framework_copies(self) -> None:
        source = self.kv(4)
        state = wrap(source, layout=KV)
        wanted = self.grids(state)
        moved = state.to(self.framework)
        placed = state.to(self.framework, device=next(iter(state.compact_nbytes())))
        for array in self.arrays_of(source):
            self.spoil(array)
        assert self.grids(moved) == self.grids(placed) == wanted

    def test_release_frees_what_is_owned_and_says_how_much(self) -> None:
        source = self.kv(4)
        before = self.live_bytes()
        for make in (
            KVState.copy,
            KVState.fork,
            lambda state: state.cut(0, 2),
            lambda state: KVState.join([state] * 2),
        ):
            state = make(wrap(source, layout=KV))
            nbytes = state.nbytes
            if before is not None:
                assert self.live_bytes() == before + nbytes
            assert state.release() == nbytes > 0
            assert state.release() == 0
            assert self.live_bytes() == before

    def test_a_borrowed_state_frees_nothing(self) -> None:
        source = self.kv(4)
        state = wrap(source, layout=KV)
        wanted = self.grids(state)
        assert state.release() == 0
        assert self.grids(wrap(source, layout=KV)) == wanted
        given = wrap(source, layout=KV).copy()
        native = given.unwrap()  # from here on the arrays are the caller's
        assert given.release() == 0
        assert self.grids(wrap(native, layout=KV)) == wanted

    def test_a_released_state_refuses_every_use(self) -> None:
        released, moved = (wrap(self.kv(4), layout=KV).copy() for _ in range(2))
        other = wrap(self.kv(4), layout=KV)
        released.release()
        kept = moved.move()
        for state in (released, moved):
            for use in (
                lambda s: s.leaves,
                lambda s: s.nbytes,
                lambda s: s.storages(),
                lambda s: s.compact_nbytes(),
                lambda s: s.copy(),
                lambda s: s.fork(),
                lambda s: s.cut(0, 1),
                lambda s: KVState.join([s, other]),
                lambda s: KVState.join([other, s]),
                lambda s: s.to("host"),
                lambda s: s.to(self.framework),
                lambda s: s.unwrap(),
                lambda s: s.unwrap(like=self.kv(4)),
                lambda s: s.move(),
                lambda s: s.lend(),
                lambda s: s.checksums(),
            ):
                with pytest.raises(ReleasedError):
                    use(state)
            assert "KVState" in repr(state)
        assert kept.release() > 0

    def test_a_lent_state_ends_without_freeing(self) -> None:
        kept = wrap(self.kv(4), layout=KV).copy()
        wanted = self.grids(kept)
        lent = kept.lend()
        assert self.grids(lent) == wanted
        assert lent.release() == 0
        with pytest.raises(ReleasedError):
            lent.unwrap()
        assert self.grids(kept) == wanted

    def test_checksums_find_who_wrote(self) -> None:
        kept = wrap(self.kv(4), layout=KV).copy()
        before = kept.checksums()
        assert kept.copy().checksums() == before == kept.checksums()
        self.spoil(kept.leaves["layers.1.key"].array)
        after = kept.checksums()
        assert {name for name in before if before[name] != after[name]} == {"layers.1.key"}

    def test_states_of_two_frameworks_do_not_join(self) -> None:
        state = wrap(self.kv(4), layout=KV)
        other = self.foreign_state()
        for parts in ([state, other], [other, state]):
            with pytest.raises(MixedFrameworksError):
                KVState.join(parts)

    def foreign_state(self) -> KVState:
        """Return a state of another framework than the one that is tested."""
        return wrap(self.kv(4), layout=KV).to("host")
