"""Static caches: buffers that are written in place, whose addresses compiled graphs rely on."""

from typing import Any

import pytest
import torch
from hf_structures import PROMPT, ROOM, STRUCTURES, Structure, tokens
from transformers import DynamicCache, StaticCache

from agnostic_cache import wrap
from agnostic_cache.errors import StructureMismatchError
from agnostic_cache_adapters.transformers.release import forward_argument

IDS = tokens(PROMPT)
KINDS = ["llama_static", "gemma3_static", "deepseek_v32_static"]


@pytest.fixture(scope="module", params=KINDS)
def structure(request: pytest.FixtureRequest) -> Structure:
    return STRUCTURES[request.param]()


def tensors(cache: Any) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{name}": child
        for i, layer in enumerate(cache.layers)
        for name, child in vars(layer).items()
        if isinstance(child, torch.Tensor)
    }


def addresses(cache: Any) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors(cache).items()}


@pytest.mark.parametrize("length", [1, 4, 6, 7, PROMPT - 1])
@pytest.mark.parametrize("used", [0, 3, 12])
def test_a_template_is_filled_in_place(structure: Structure, length: int, used: int) -> None:
    kept = wrap(structure.prefill(IDS[:, :length])).copy()
    like = structure.prefill(tokens(used, seed=1)) if used else structure.fresh()
    before = addresses(like)
    native = kept.unwrap(like=like)
    assert type(native) is StaticCache
    if used:
        assert addresses(native) == before
    assert int(native.get_seq_length()) == length
    assert wrap(native).length == length
    assert structure.answer(IDS, native) == structure.answer(IDS)


@pytest.mark.parametrize("length", [4, 6, 7, PROMPT - 1])
def test_static_and_dynamic_caches_fill_each_other(structure: Structure, length: int) -> None:
    dynamic = DynamicCache(config=structure.model.config)
    from_dynamic = wrap(structure.prefill(IDS[:, :length], dynamic)).unwrap(like=structure.prefill(tokens(9, seed=2)))
    static = wrap(structure.prefill(IDS[:, :length]))
    from_static = static.unwrap(like=DynamicCache(config=structure.model.config))
    assert (type(from_dynamic), type(from_static)) == (StaticCache, DynamicCache)
    assert structure.answer(IDS, from_dynamic) == structure.answer(IDS, from_static) == structure.answer(IDS)


def test_one_buffer_serves_one_prefix_after_another(structure: Structure) -> None:
    kept = [wrap(structure.prefill(IDS[:, :length])).copy() for length in (15, 4, 9)]
    native = structure.prefill(tokens(2, seed=3))
    before = addresses(native)
    for state in kept:
        native = state.unwrap(like=native)
        assert structure.answer(IDS, native) == structure.answer(IDS)
        assert addresses(native) == before


def test_a_buffer_without_room_is_refused_and_left_alone() -> None:
    structure = STRUCTURES["llama_static"]()
    kept = wrap(structure.prefill(IDS)).copy()
    short: Any = StaticCache(config=structure.model.config, max_cache_len=PROMPT - 1)
    structure.prefill(IDS[:, :5], short)
    before = {name: tensor.clone() for name, tensor in tensors(short).items()}
    with pytest.raises(StructureMismatchError):
        kept.unwrap(like=short)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(short).items())


def test_a_compiled_model_goes_on_without_compiling_again() -> None:
    structure = STRUCTURES["llama_static"]()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    step: Any = torch.compile(structure.model.forward, backend=backend, dynamic=False)

    def go_on(cache: Any) -> list[int]:
        found, token = [], IDS[:, -1:]
        for _ in range(3):
            with torch.no_grad():
                logits = step(token, **forward_argument(structure.model, cache), use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(token))
        return found

    wanted = structure.answer(IDS, count=3)
    kept = wrap(structure.prefill(IDS[:, :-1])).copy()
    native = structure.prefill(IDS[:, :-1])
    assert go_on(native) == wanted
    compiled, before = len(graphs), addresses(native)
    assert compiled
    for _ in range(3):
        native = kept.unwrap(like=native)
        assert addresses(native) == before
        assert go_on(native) == wanted
    assert len(graphs) == compiled
    assert {tensor.shape[2] for tensor in tensors(native).values() if tensor.ndim == 4} == {ROOM}
