"""A recorded trace of conversations, driven through PrefixCache, hits what the replay says."""

from pathlib import Path

import pytest
from toy_model import LAYOUTS

from agnostic_cache import PrefixCache
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.eviction import make_evictor
from agnostic_cache.replay import read_trace, replay

SAMPLE = Path(__file__).parents[1] / "traces" / "mooncake_sample.jsonl"
BLOCK = 8
BLOCK_BYTES = BLOCK * 8
NEXT_TOKEN = 2**32 - 1  # asked behind each prompt, so that all of the prompt may be hit; in no prompt


@pytest.mark.parametrize("capacity", [30, 500, 5000, 20_000])
def test_the_hit_ratio_under_lru_is_that_of_the_replay(capacity: int) -> None:
    trace = read_trace([SAMPLE])
    max_bytes = capacity * BLOCK_BYTES
    cache = PrefixCache(max_bytes, namespace="toy", block_size=BLOCK, layout=LAYOUTS["tokens"], evictor="lru")
    hit_blocks = hit_tokens = 0
    for number, (length, blocks) in enumerate(trace.requests):
        tokens = [token for block in blocks for token in [int(block)] * BLOCK]  # one hash, one block
        with cache.match([*tokens, NEXT_TOKEN]) as match:
            assert match.length % BLOCK == 0
            hits = match.length // BLOCK
        hit_blocks += hits
        hit_tokens += min(hits * trace.block_tokens, length)
        cache.insert(tokens, {"key": HostArray.empty((len(tokens), 2), Dtype.FLOAT32)})
        if number % 50 == 0:  # linear in entries
            assert cache.stats().current_bytes <= max_bytes
    expected = replay(trace, "lru", make_evictor("lru", max_bytes), capacity=capacity, block_bytes=BLOCK_BYTES)
    assert expected.block_hit_ratio == hit_blocks / trace.blocks > 0
    assert expected.token_hit_ratio == hit_tokens / trace.tokens
    assert cache.stats().hit_tokens == hit_blocks * BLOCK
    assert (cache.stats().evictions > 0) == (capacity < trace.unique_blocks)
