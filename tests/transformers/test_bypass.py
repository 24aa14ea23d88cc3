"""What a prefix cannot serve goes past the cache, or is keyed; each of these gives wrong tokens on a naive cache."""

import copy
from types import SimpleNamespace
from typing import Any

import architectures
import hf_structures
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TextIteratorStreamer,
)

from agnostic_cache import PrefixCache, model_fingerprint
from agnostic_cache.errors import CacheBypassWarning
from agnostic_cache_adapters.transformers import cached, generate, reuse
from agnostic_cache_adapters.transformers.release import forward_argument, generate_argument
from agnostic_cache_adapters.transformers.verdicts import verdict_of

NEW = 4
DOCUMENT = hf_structures.tokens(20, seed=3)[0].tolist()
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model() -> Any:
    return hf_structures.llama().model


def make(model: Any) -> PrefixCache:
    return PrefixCache("64MiB", namespace=model_fingerprint(model), block_size=8)


def inputs(*rows: list[int]) -> dict[str, Any]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **SETTINGS}


def primed(model: Any) -> PrefixCache:
    cache = make(model)
    generate(model, cache, **inputs(DOCUMENT))
    return cache


def bypasses(model: Any, given: dict[str, Any], cache: PrefixCache | None = None) -> None:
    """Check that a call goes past the cache, warns once, and gives what it gives without one."""
    cache = cache or primed(model)
    before = cache.stats()
    expected = model.generate(**copy.deepcopy(given))
    with pytest.warns(CacheBypassWarning):
        assert torch.equal(generate(model, cache, **copy.deepcopy(given)), expected)
    assert torch.equal(generate(model, cache, **copy.deepcopy(given)), expected)  # no second warning
    after = cache.stats()
    assert (after.bypassed - before.bypassed, after.entries) == (2, before.entries)
    assert after.hit_tokens == before.hit_tokens


PROMPT = [*DOCUMENT, 5, 6]


def test_an_interior_mask(model: Any) -> None:
    given = inputs(PROMPT)
    given["attention_mask"][0, 5:9] = 0
    bypasses(model, given)


def test_right_padding(model: Any) -> None:
    given = inputs(PROMPT)
    given["attention_mask"][0, -1] = 0
    bypasses(model, given)


def test_prompt_lookup(model: Any) -> None:
    bypasses(model, {**inputs(PROMPT), "prompt_lookup_num_tokens": 3})


def test_an_assistant(model: Any) -> None:
    torch.manual_seed(7)
    assistant = LlamaForCausalLM(LlamaConfig(**hf_structures.SIZES)).eval()
    cache = primed(model)
    expected = model.generate(**inputs(PROMPT), assistant_model=assistant)
    with pytest.warns(CacheBypassWarning):
        out = generate(model, cache, **inputs(PROMPT), assistant_model=assistant)
    assert torch.equal(out, expected)
    assert cache.stats().bypassed == 1


def test_use_cache_false(model: Any) -> None:
    bypasses(model, {**inputs(PROMPT), "use_cache": False})


def test_a_cache_of_the_caller(model: Any) -> None:
    mine = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT[:7]]), **forward_argument(model, mine))
    bypasses(model, {**inputs(PROMPT), **generate_argument(model, mine)})


@pytest.mark.parametrize("name", ["static", "offloaded"])
def test_a_cache_implementation_of_the_caller(model: Any, name: str) -> None:
    if name == "static":
        bypasses(model, {**inputs(PROMPT), "cache_implementation": name, "disable_compile": True})
        return
    cache = primed(model)
    with pytest.warns(CacheBypassWarning), pytest.raises(AssertionError):  # offloading needs an accelerator
        generate(model, cache, **inputs(PROMPT), cache_implementation=name)


def test_what_is_asked_of_the_whole_prompt(model: Any) -> None:
    cache = primed(model)
    given = {**inputs(PROMPT), "output_hidden_states": True, "return_dict_in_generate": True}
    expected = model.generate(**given)
    with pytest.warns(CacheBypassWarning):
        out = generate(model, cache, **given)
    assert out.hidden_states[0][0].shape == expected.hidden_states[0][0].shape


def test_embeddings_instead_of_tokens(model: Any) -> None:
    embedded = model.get_input_embeddings()(torch.tensor([PROMPT])).detach()
    given = {"inputs_embeds": embedded, "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.long), **SETTINGS}
    bypasses(model, given)


def test_an_argument_that_nobody_knows(model: Any) -> None:
    bypasses(model, {**inputs(PROMPT), "num_items_in_batch": 3})


def test_training_mode(model: Any) -> None:
    cache = primed(model)
    model.unused = torch.nn.BatchNorm1d(2)  # acts differently there
    model.train()
    bypasses(model, inputs(PROMPT), cache)


def test_guidance(model: Any) -> None:
    bypasses(model, {**inputs(PROMPT), "guidance_scale": 1.5})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_that_depend_on_the_total_length(rope: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**hf_structures.SIZES, "max_position_embeddings": 16, "rope_parameters": rope})
    model: Any = LlamaForCausalLM(config).eval()
    cache = make(model)
    bypasses(model, inputs(PROMPT), cache)
    for prompt in (PROMPT[:10], PROMPT[:12], PROMPT[:15]):  # below the switch; the last answer goes beyond it
        before = cache.stats().hit_tokens
        given = {**inputs(prompt), "return_dict_in_generate": True, "output_logits": True}
        wanted, got = model.generate(**given), generate(model, cache, **given)
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-4)
    assert cache.stats().hit_tokens - before == 12
    hit = generate(model, cache, **inputs([*PROMPT[:13], 9, 8]))
    assert torch.equal(hit, model.generate(**inputs([*PROMPT[:13], 9, 8])))
    assert cache.stats().bypassed == 2


def test_an_encoder() -> None:
    structure = hf_structures.t5()
    model = structure.model
    cache = make(model)
    given = {"input_ids": hf_structures.tokens(9, seed=1), **SETTINGS}
    bypasses(model, given, cache)


@pytest.mark.parametrize("model_type", ["jamba", "zamba", "recurrent_gemma", "moshi", "prophetnet", "cpmant"])
def test_a_model_that_does_not_go_on_rightly(model_type: str) -> None:
    model = architectures.tiny(model_type, "causal")
    bypasses(model, inputs([*range(40, 70)]), PrefixCache("1MiB", namespace="m", block_size=8))


def test_a_model_that_is_not_in_the_table_is_proven_before_its_first_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(architectures.tiny("jamba", "causal"))
    forward = kind.forward

    def patched(self: Any, *args: Any, **given: Any) -> Any:
        return forward(self, *args, **given)

    monkeypatch.setattr(kind, "forward", patched)
    model = architectures.tiny("jamba", "causal")
    bypasses(model, inputs([*range(40, 70)]), PrefixCache("1MiB", namespace="m", block_size=8))
    assert verdict_of(model).source != "table"


@pytest.mark.parametrize("model_type", ["roformer", "git", "bart"])
def test_rows_behind_padding_where_that_moves_them(model_type: str) -> None:
    model = architectures.tiny(model_type, "causal")
    cache = PrefixCache("1MiB", namespace="m", block_size=8)
    short, long = [*range(40, 70)], [*range(40, 66), *range(80, 90)]
    padded = inputs([0] * (len(long) - len(short)) + short, long)
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    for asked in (padded, inputs(short), inputs(long), padded, inputs(short)):
        given = {**asked, "return_dict_in_generate": True, "output_logits": True}
        wanted, got = model.generate(**given), generate(model, cache, **given)
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-4)
    assert cache.stats().hit_tokens == 26 + len(short) - 1


def test_tokens_that_see_each_other_where_they_are_marked() -> None:
    model = architectures.tiny("hrm_text", "causal")
    cache = PrefixCache("1MiB", namespace="m", block_size=8)
    given = inputs([*range(40, 70)])
    bypasses(model, {**given, "token_type_ids": torch.ones_like(given["input_ids"])}, cache)


def test_virtual_tokens_before_the_prompt(model: Any) -> None:
    cache = primed(model)
    model.active_peft_config = SimpleNamespace(is_prompt_learning=True)  # as PEFT tells it
    bypasses(model, inputs(PROMPT), cache)


def test_blocks_that_cut_rows() -> None:
    model = hf_structures.deepseek_v4().model
    bypasses(model, inputs(PROMPT), PrefixCache("1MiB", namespace="m", block_size=2))


# --- what is keyed -------------------------------------------------------------------------------------------------


def keyed(model: Any, one: dict[str, Any], other: dict[str, Any], *, hits: bool = True) -> None:
    """Check that two calls never meet, and that each meets itself."""
    cache = make(model)
    for given in (one, other):
        before = cache.stats().hit_tokens
        assert torch.equal(generate(model, cache, **given), model.generate(**given))
        assert cache.stats().hit_tokens == before
    for given in (one, other):
        before = cache.stats().hit_tokens
        assert torch.equal(generate(model, cache, **given), model.generate(**given))
        assert (cache.stats().hit_tokens > before) == hits
    assert cache.stats().bypassed == 0


def test_positions_of_ones_own(model: Any) -> None:
    positions = torch.arange(len(PROMPT))[None]
    keyed(model, inputs(PROMPT), {**inputs(PROMPT), "position_ids": positions + 5})
    cache = primed(model)
    before = cache.stats().hit_tokens
    generate(model, cache, **inputs(PROMPT), position_ids=positions)  # what they would be anyway
    assert cache.stats().hit_tokens > before


def test_autocast(model: Any) -> None:
    cache = make(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, cache, **inputs(DOCUMENT))
    before = cache.stats().hit_tokens
    assert torch.equal(generate(model, cache, **inputs(PROMPT)), model.generate(**inputs(PROMPT)))
    assert cache.stats().hit_tokens == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, cache, **inputs(PROMPT))
    assert cache.stats().hit_tokens > before


def test_weights_that_change_in_any_way(model: Any) -> None:
    cache = primed(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1.0  # too little for a sample to see
    before = cache.stats().hit_tokens
    assert torch.equal(generate(model, cache, **inputs(PROMPT)), model.generate(**inputs(PROMPT)))
    assert cache.stats().hit_tokens == before
    assert torch.equal(generate(model, cache, **inputs(PROMPT)), model.generate(**inputs(PROMPT)))
    assert cache.stats().hit_tokens > before


@pytest.mark.parametrize("swap", ["another parameter", "other data"])
def test_weights_that_come_to_lie_where_others_lay(model: Any, swap: str) -> None:
    layer = model.model.layers[0].mlp.up_proj
    memory = bytearray(layer.weight.nbytes)  # an allocator gives out again what was freed; here it is sure to
    original = layer.weight.detach().clone()
    cache = make(model)
    for scale in range(4):
        weights = torch.frombuffer(memory, dtype=original.dtype).view(original.shape)
        weights.copy_(original * scale)
        if swap == "other data":
            layer.weight.data = weights
        else:
            layer.weight = torch.nn.Parameter(weights)
        del weights
        assert torch.equal(generate(model, cache, **inputs(PROMPT)), model.generate(**inputs(PROMPT)))
    assert cache.stats().hit_tokens == 0
    generate(model, cache, **inputs(PROMPT))
    assert cache.stats().hit_tokens > 0


def test_another_model_never_meets_the_first_ones_states(model: Any) -> None:
    cache = PrefixCache("64MiB", namespace="a name of my own", block_size=8)
    torch.manual_seed(9)
    other: Any = LlamaForCausalLM(LlamaConfig(**hf_structures.SIZES)).eval()
    for one in (model, other, model, other):
        assert torch.equal(generate(one, cache, **inputs(PROMPT)), one.generate(**inputs(PROMPT)))
    assert cache.stats().hit_tokens == 2 * (len(PROMPT) - 1)


class Lora(torch.nn.Module):
    """A linear layer with adapters that are switched by name, as PEFT makes them."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.adapters = torch.nn.ParameterDict({name: torch.randn(base.weight.shape) * 0.5 for name in ("one", "two")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        for name in self.active_adapters:
            out = out + x @ self.adapters[name].T
        return out


def test_adapters_that_are_switched(model: Any) -> None:
    torch.manual_seed(1)
    lora = Lora(model.model.layers[0].self_attn.v_proj)
    model.model.layers[0].self_attn.v_proj = lora
    cache = make(model)
    names = []
    for active in ([], ["one"], ["two"], ["one"], []):
        lora.active_adapters = active
        names.append(model_fingerprint(model))
        assert torch.equal(generate(model, cache, **inputs(PROMPT)), model.generate(**inputs(PROMPT)))
    assert len(set(names)) == 3
    assert names[0] == names[4]
    assert cache.stats().hit_tokens == 2 * (len(PROMPT) - 1)


def test_another_dtype_is_another_namespace(model: Any) -> None:
    assert model_fingerprint(model) != model_fingerprint(copy.deepcopy(model).to(torch.bfloat16))
    assert model_fingerprint(model) == model_fingerprint(copy.deepcopy(model))
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.01)
    assert model_fingerprint(sparse) != model_fingerprint(model)


@pytest.fixture
def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**hf_structures.SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def test_images(llava: Any) -> None:
    pixels = torch.randn(2, 1, 3, 8, 8)
    prompt = [3, 1, 1, 1, 1, *DOCUMENT]
    one, other = ({**inputs(prompt), "pixel_values": pixel} for pixel in pixels)
    keyed(llava, one, other)
    cache = make(llava)
    generate(llava, cache, **one)
    second = {**inputs([*prompt, 7, 8]), "pixel_values": pixels[0]}  # another question on the same image
    before = cache.stats().hit_tokens
    assert torch.equal(generate(llava, cache, **second), llava.generate(**second))
    assert cache.stats().hit_tokens - before == len(prompt)
    more = {**inputs([3, 1, 1, 1, 1, 5, 1, 1, 1, 1, 6]), "pixel_values": pixels[:, 0]}  # an image behind the prefix
    for _ in range(2):
        assert torch.equal(generate(llava, cache, **more), llava.generate(**more))


# --- the three doors -----------------------------------------------------------------------------------------------


def test_a_streamer_gets_every_token(model: Any) -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"<{int(i)}>" for i in ids)

    cache = primed(model)
    texts = []
    for call in (model.generate, lambda **given: generate(model, cache, **given)):
        streamer = TextIteratorStreamer(Words(), skip_prompt=True)  # type: ignore[arg-type]
        call(**inputs(PROMPT), streamer=streamer)
        texts.append("".join(streamer))
    assert texts[0] == texts[1]
    assert texts[0].count("<") == NEW


def test_a_block_is_left_as_it_was_entered(model: Any) -> None:
    cache = make(model)
    with reuse(model, cache), reuse(model, cache):
        pass
    assert "generate" not in vars(model)
    with pytest.raises(ZeroDivisionError), reuse(model, cache):
        raise ZeroDivisionError
    assert "generate" not in vars(model)


def test_the_decoding_method_bypasses_too(model: Any) -> None:
    cache = primed(model)
    given = {**inputs(PROMPT), "prompt_lookup_num_tokens": 3}
    with pytest.warns(CacheBypassWarning):
        out = model.generate(**given, custom_generate=cached(cache))
    assert torch.equal(out, model.generate(**given))
    mine = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT[:7]]), **forward_argument(model, mine))
    with pytest.warns(CacheBypassWarning):
        out = model.generate(**inputs(PROMPT), **generate_argument(model, mine), custom_generate=cached(cache))
    assert torch.equal(out, model.generate(**inputs(PROMPT)))


def test_errors_of_generate_come_through_and_store_nothing(model: Any) -> None:
    cache = make(model)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, cache, **{**inputs(PROMPT), "max_new_tokens": -1})
    assert cache.stats().entries == 0
