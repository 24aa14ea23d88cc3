"""Types of every kind through a cache; ``nox -s architectures`` asks all that transformers has.

Each call is compared with plain ``generate``, tokens and logits: questions on a document, one again, shorter prompts,
turns of a chat, batches, what comes after them, beams, sampling, ``exact=True``, and a `StateCache`.
"""

from typing import Any, NamedTuple

import pytest
from architecture_calls import BYPASS, REUSE, check


class Kind(NamedTuple):
    """What comes of a type, and how its tiny model differs from the default."""

    verdict: str = REUSE
    family: str = "causal"
    fields: dict[str, Any] = {}  # noqa: RUF012 - never written to


# By its length, the same for prompts of up to 64 tokens, and another for longer ones.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": Kind(),  # full attention
    "gpt2": Kind(),  # learned positions
    "bloom": Kind(),  # positions in the scores
    "mistral": Kind(),  # windows alone
    "gemma3": Kind(),  # windows and full attention
    "gpt_oss": Kind(),  # with sinks and experts
    "llama4_text": Kind(),  # chunks
    "mixtral": Kind(),  # experts
    "deepseek_v3": Kind(),  # latent attention
    "deepseek_v32": Kind(),  # with an indexer
    "deepseek_v4": Kind(),  # compressed attention
    "gemma3n_text": Kind(),  # layers that share a cache
    "phi3": Kind(fields={"rope_parameters": LONGROPE}),  # below the length at which its rope switches
    "qwen3_next": Kind(),  # recurrent and full attention
    "kimi_linear": Kind(),  # of another kind
    "falcon_h1": Kind(),  # both in one layer
    "inkling_text": Kind(),  # a convolution and a window in one layer
    "lfm2": Kind(),  # convolutions
    "hrm_text": Kind(),  # a prompt that may be attended to in both directions
    "bert": Kind(),  # an encoder that decodes
    "mamba": Kind(BYPASS),  # recurrent alone
    "openai-gpt": Kind(BYPASS),  # no cache
    "rwkv": Kind(BYPASS),  # a state of its own class
    "t5": Kind(BYPASS, "seq2seq"),  # an encoder
    "internvl": Kind(family="image-text"),  # asked by text alone
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_hit_is_what_plain_generate_computes(model_type: str) -> None:
    expected = KINDS[model_type]
    result = check(model_type, expected.family, expected.fields)
    assert (result.verdict, result.weak) == (expected.verdict, False), result.reason
