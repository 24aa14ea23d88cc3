"""The real mellea with our caches: its backend on a tiny model made here, no download."""

# mellea is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import gc
from typing import Any

import pytest
import torch
from byte_model import byte_model
from mellea import MelleaSession
from mellea.backends import ModelOption
from mellea.backends.cache import Cache as TheirCache
from mellea.backends.cache import SimpleLRUCache as TheirLRUCache
from mellea.backends.huggingface import HFAloraCacheInfo, LocalHFBackend, _cleanup_kv_cache
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

from agnostic_cache import Cache, SimpleLRUCache, StateCache
from agnostic_cache_adapters.torch import on_evict
from agnostic_cache_adapters.transformers.release import generate_argument

NEW_TOKENS = 4
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, torch.device]:
    model, tokenizer = byte_model()
    tokenizer.chat_template = TEMPLATE
    return tokenizer, model, torch.device("cpu")


class Noting:
    """A cache that notes what it is given: mellea makes keys of addresses."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.given: list[tuple[int, HFAloraCacheInfo]] = []

    def put(self, key: int, value: HFAloraCacheInfo) -> None:
        self.given.append((key, value))
        self.cache.put(key, value)

    def get(self, key: int) -> Any:
        return self.cache.get(key)

    def current_size(self) -> int:
        size: int = self.cache.current_size()
        return size


def backend(parts: tuple[Any, Any, torch.device], cache: Any) -> LocalHFBackend:
    return LocalHFBackend("local/tiny", cache=cache, custom_config=parts)


def ask(backend: LocalHFBackend, text: str) -> str:
    session = MelleaSession(backend=backend)
    answer = session.chat(text, model_options={ModelOption.MAX_NEW_TOKENS: NEW_TOKENS})
    return str(answer.content)


def tensors(value: HFAloraCacheInfo) -> list[torch.Tensor]:
    layers: Any = value.kv_cache.layers if value.kv_cache is not None else []
    rows = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return [*rows, value.merged_token_ids, value.merged_attention, *(value.scores or ())]


def watched(arrays: list[torch.Tensor]) -> list[Any]:
    """Refer to storages without keeping them alive."""
    return [StorageWeakRef(array.untyped_storage()) for array in arrays]  # type: ignore[no-untyped-call]


def test_our_caches_have_the_methods_of_theirs() -> None:
    for name in TheirCache.__abstractmethods__:
        assert callable(getattr(Cache, name))


def test_our_on_evict_frees_what_their_clean_up_leaves(parts: tuple[Any, Any, torch.device]) -> None:
    caches: dict[str, Any] = {"theirs": TheirLRUCache(1, _cleanup_kv_cache), "ours": SimpleLRUCache(1, on_evict)}
    freed = {}
    for name, kind in caches.items():
        cache = Noting(kind)
        ask(backend(parts, cache), "one")
        [(key, value)] = cache.given
        looked_at: Any = value.kv_cache  # by somebody, still
        storages = watched([tensor for layer in looked_at.layers for tensor in (layer.keys, layer.values)])
        cache.put(key + 1, HFAloraCacheInfo(None, None, None))
        assert cache.current_size() == 1
        gc.collect()
        freed[name] = [storage.expired() for storage in storages]
        assert looked_at is not None
    assert freed == {"theirs": [False] * 4, "ours": [True] * 4}


def test_every_answer_is_put_and_the_oldest_leaves(parts: tuple[Any, Any, torch.device]) -> None:
    without = backend(parts, None)
    wanted = [ask(without, text) for text in ("one", "two", "three")]
    cache = Noting(SimpleLRUCache(2, on_evict))
    ours = backend(parts, cache)
    assert [ask(ours, text) for text in ("one", "two", "three")] == wanted
    assert len(cache.given) == 3
    assert cache.current_size() == 2
    (first, _), *others = cache.given
    assert first in dict(others) or ours.cache_get(first) is None
    for key, value in others:
        assert ours.cache_get(key) is value


def test_state_cache_hands_back_the_type_that_was_put(parts: tuple[Any, Any, torch.device]) -> None:
    states = StateCache("1MiB")
    cache = Noting(states)
    ours = backend(parts, cache)
    ask(ours, "one")
    [(key, value)] = cache.given
    model, ids = parts[1], value.merged_token_ids[None]
    wanted = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()
    with states.borrow(key) as lent:
        found: Any
        for found in (lent, ours.cache_get(key), ours.cache_get(key)):
            assert type(found) is HFAloraCacheInfo
            assert type(found.kv_cache) is DynamicCache
            assert found.q_end == value.q_end
            assert type(found.scores) is type(value.scores)
            assert all(map(torch.equal, tensors(found), tensors(value)))
    for _ in range(2):  # what is handed out may be used up
        found = ours.cache_get(key)
        fork = generate_argument(model, found.kv_cache)
        reused = model.generate(ids, **fork, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert reused.tolist() == wanted


def test_state_cache_keeps_its_budget_of_bytes(parts: tuple[Any, Any, torch.device]) -> None:
    probe = Noting(StateCache("1MiB"))
    ask(backend(parts, probe), "one")
    room = 2 * probe.cache.current_bytes
    cache = Noting(states := StateCache(room))
    ours = backend(parts, cache)
    for text in ("one", "two", "six", "ten"):  # as long as one another
        ask(ours, text)
        assert 0 < states.current_bytes <= room
    assert states.stats().puts == 4
    with states.borrow(cache.given[-1][0], raw=True) as kept:
        assert kept is not None
        storages = watched([leaf.array for leaf in kept.leaves.values()])
    assert not any(storage.expired() for storage in storages)
    states.clear()
    assert all(storage.expired() for storage in storages)
