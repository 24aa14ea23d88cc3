"""The law of reuse, for every structure: same answers, what is kept stays as it was, every byte counted and freed."""

import functools
import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_structures import PROMPT, STRUCTURES, Structure, tokens
from torch_subject import live_bytes, values
from transformers import DynamicCache, EncoderDecoderCache

from agnostic_cache import KVState, StateCache, wrap
from agnostic_cache.errors import CutRangeError, MissingLeavesError, StructureMismatchError
from agnostic_cache.state.layout import LENGTH, TOKENS
from agnostic_cache.state.tree import Node, build
from agnostic_cache_adapters.transformers import on_evict

IDS = tokens(PROMPT)
KEPT = PROMPT - 2


@functools.cache
def made(name: str) -> Structure:
    return STRUCTURES[name]()


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> Structure:
    return made(request.param)


def bits(state: KVState) -> dict[str, bytes]:
    return {name: values(leaf.array) for name, leaf in state.leaves.items()}


def without(structure: Structure, ids: torch.Tensor, length: int) -> list[int]:
    """What is answered where nothing is kept."""
    known = _answers.setdefault(id(structure), {})
    asked = (*ids[0].tolist(), 0 if structure.exact else length)
    if asked not in known:
        known[asked] = structure.answer(ids, None if structure.exact else structure.prefill(ids[:, :length]))
    return known[asked]


_answers: dict[int, dict[tuple[int, ...], list[int]]] = {}


def test_any_prefix_that_the_roles_allow(structure: Structure) -> None:
    whole = wrap(structure.prefill(IDS[:, :KEPT])).copy()
    assert whole.length == KEPT
    reused = []
    for length in range(1, KEPT + 1):
        try:
            native = whole.cut(0, length).unwrap()
        except (CutRangeError, MissingLeavesError):
            continue
        assert structure.answer(IDS, native) == without(structure, IDS, length), length
        reused.append(length)
    assert reused == list(range(max(1, KEPT - structure.reach), KEPT + 1))


def test_a_prefix_that_was_kept_when_it_was_computed(structure: Structure) -> None:
    cache = StateCache("1MiB")
    for length in range(1, KEPT + 1):
        cache.put(length, structure.prefill(IDS[:, :length]))
        assert structure.answer(IDS, cache.get(length)) == without(structure, IDS, length), length


def test_what_is_kept_in_the_middle_of_a_prefill(structure: Structure) -> None:
    cache, native = StateCache("1MiB"), None
    for start in range(0, PROMPT - 1, 5):
        native = structure.prefill(IDS[:, start : min(start + 5, PROMPT - 1)], native)
        cache.put(start, native)
    for start in range(0, PROMPT - 1, 5) if structure.exact else []:
        assert structure.answer(IDS, cache.get(start)) == without(structure, IDS, 0), start


def test_what_is_kept_survives_ten_reuses(structure: Structure) -> None:
    cache = StateCache("1MiB")
    cache.put("a", structure.prefill(IDS[:, :KEPT]))
    with cache.borrow("a", raw=True) as kept:
        assert kept is not None
        before = bits(kept)
        where = {leaf.array.data_ptr() for leaf in kept.leaves.values()}
    for seed in range(10):
        ids = torch.cat([IDS[:, :KEPT], tokens(1 + seed % 3, seed)], dim=1)
        native = cache.get("a")
        forked = wrap(native)
        assert ({leaf.array.data_ptr() for leaf in forked.leaves.values()} == where) is structure.shared
        assert structure.answer(ids, native) == without(structure, ids, KEPT)
        with cache.borrow("a", raw=True) as kept:
            assert kept is not None
            assert bits(kept) == before
    assert structure.answer(IDS, cache.get("a")) == without(structure, IDS, KEPT)


def test_every_byte_is_counted_and_freed(structure: Structure) -> None:
    cache = StateCache("1MiB")
    native: Any = structure.prefill(IDS[:, :KEPT])
    before = live_bytes()
    cache.put("a", native)
    with cache.borrow("a", raw=True) as kept:
        assert kept is not None
        assert live_bytes() - before == cache.current_bytes == kept.nbytes
    cache.remove("a")
    assert live_bytes() == before
    cache.put("a", native, move=True)
    del native
    held = cache.current_bytes
    now = live_bytes()
    cache.clear()
    assert now - live_bytes() == held


def test_on_evict_frees_all_of_it(structure: Structure) -> None:
    structure.prefill(IDS[:, :KEPT])
    before = live_bytes()
    native = structure.prefill(IDS[:, :KEPT])
    held = live_bytes() - before
    assert held > 0
    assert on_evict(native) == held
    assert live_bytes() == before


def test_a_fork_and_its_source_outlive_each_other(structure: Structure) -> None:
    cache = StateCache("1MiB")
    before = live_bytes()
    cache.put("a", structure.prefill(IDS[:, :KEPT]))
    fork = cache.get("a")
    cache.remove("a")
    assert structure.answer(IDS, fork) == without(structure, IDS, KEPT)
    del fork
    assert live_bytes() == before


def test_a_borrowed_state_is_the_native_type_around_the_same_memory(structure: Structure) -> None:
    cache = StateCache("1MiB")
    native = structure.prefill(IDS[:, :KEPT])
    cache.put("a", native)
    with cache.borrow("a", raw=True) as kept, cache.borrow("a") as lent:
        assert kept is not None
        assert type(lent) is type(native)
        names = kept.leaves.keys()
        state = wrap(lent)
        assert state.leaves.keys() == names
        assert state.length == KEPT
        for name in (name for name in names if kept.leaves[name].role is not LENGTH):
            assert state.leaves[name].array.data_ptr() == kept.leaves[name].array.data_ptr()


def test_parts_are_joined_and_put_into_a_fresh_cache(structure: Structure) -> None:
    whole = wrap(structure.prefill(IDS[:, :KEPT])).copy()
    wanted = without(structure, IDS, KEPT)
    for at in (1, 4, 8, 16):
        try:
            parts = [whole.cut(0, at), whole.cut(at, KEPT)]
        except CutRangeError:
            assert any(at % leaf.role.stride for leaf in whole.leaves.values() if isinstance(leaf.role, TOKENS))
            continue
        assert structure.answer(IDS, KVState.join(parts).unwrap()) == wanted, at
        if structure.known:
            assert structure.answer(IDS, KVState.join(parts).unwrap(like=structure.fresh())) == wanted, at


def test_a_structure_is_rebuilt_from_json(structure: Structure) -> None:
    state = wrap(structure.prefill(IDS[:, :KEPT])).copy()
    node = Node.from_json(json.loads(json.dumps(state.structure)))
    arrays = {name: leaf.array for name, leaf in state.leaves.items()}
    if type(structure.fresh()) in {DynamicCache, EncoderDecoderCache}:
        assert structure.answer(IDS, build(node, arrays, KEPT, state.adapter)) == without(structure, IDS, KEPT)
    else:
        with pytest.raises(StructureMismatchError):
            build(node, arrays, KEPT, state.adapter)


@pytest.fixture(autouse=True, scope="module")
def models() -> Iterator[None]:
    yield
    made.cache_clear()
    _answers.clear()
    gc.collect()
