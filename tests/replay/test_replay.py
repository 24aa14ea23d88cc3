"""Replay: what it reads, what it counts, and that the optimum is one."""

import json
from collections import OrderedDict
from itertools import combinations, takewhile
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agnostic_cache.errors import TraceFormatError
from agnostic_cache.eviction import POLICIES, make_evictor
from agnostic_cache.replay import Request, Result, Trace, ceiling, read_trace, replay, replay_belady

SAMPLE = Path(__file__).parents[1] / "traces" / "mooncake_sample.jsonl"


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def request(tokens: int = 1024, blocks: Any = (1, 2)) -> dict[str, Any]:
    return {"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": list(blocks)}


def run(trace: Trace, policy: str, capacity: int) -> Result:
    if policy == "belady":
        return replay_belady(trace, capacity=capacity)
    evictor = make_evictor(policy, capacity * 10)
    return replay(trace, policy, evictor, capacity=capacity, block_bytes=10)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_mooncake(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", request(1000), request(512, [1])), write(tmp_path / "b", request(0, []))]
    trace = read_trace(paths)
    assert trace == Trace((Request(1000, (1, 2)), Request(512, (1,)), Request(0, ())), 512)
    assert (trace.blocks, trace.unique_blocks, trace.tokens) == (3, 2, 1512)


def test_bailian(tmp_path: Path) -> None:
    record = request(40, ["a", "b", "c"]) | {"chat_id": 1, "parent_chat_id": -1, "type": "text", "turn": 1}
    trace = read_trace([write(tmp_path / "a", record, record | {"parent_chat_id": 1, "turn": 2})])
    assert trace.block_tokens == 16
    assert trace.requests == (Request(40, ("a", "b", "c")),) * 2
    assert ceiling(trace)[1:] == (3, 0.5, 0.5)  # 48 tokens of blocks, of which 40 are there


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"[1]",
        b"\xff",
        b"{}",
        b'{"input_length": 1}',
        b'{"input_length": -1, "hash_ids": []}',
        b'{"input_length": "1", "hash_ids": []}',
        b'{"input_length": true, "hash_ids": []}',
        b'{"input_length": 1, "hash_ids": 1}',
        b'{"input_length": 1, "hash_ids": [[1]]}',
        b'{"input_length": 1, "hash_ids": [null]}',
        b'{"chat_id": 1, "input_length": 1, "hash_ids": [1]}',  # another format
        b"[" * 100_000,
    ],
)
def test_a_line_that_does_not_parse_is_named(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "trace.jsonl", request(), request())
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(TraceFormatError) as caught:
        read_trace([path])
    assert "trace.jsonl" in str(caught.value)
    assert "3" in str(caught.value)


def test_a_trace_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError):
        read_trace([write(tmp_path / "a")])
    with pytest.raises(OSError, match="nowhere"):
        read_trace([tmp_path / "nowhere"])


# --- counting --------------------------------------------------------------------------------------------------------


def test_a_prompt_hits_its_longest_prefix() -> None:
    trace = Trace(
        (Request(1500, (1, 2, 3)), Request(1100, (1, 2, 9)), Request(900, (7, 2)), Request(1536, (1, 2, 3))), 512
    )
    result = run(trace, "lru", 100)
    assert result.block_hit_ratio == 5 / 11  # 2, and not the 2 behind 7, and 3
    assert result.token_hit_ratio == (1024 + 1536) / (1500 + 1100 + 900 + 1536)
    assert ceiling(trace)[2:] == result[2:] == run(trace, "belady", 100)[2:]


def test_the_end_of_a_prompt_leaves_first_and_only_after_the_request() -> None:
    trace = Trace((Request(2048, (1, 2, 3, 4)), Request(2048, (1, 2, 3, 4))), 512)
    assert run(trace, "lru", 3).block_hit_ratio == 3 / 8
    assert run(trace, "lru", 1).block_hit_ratio == 1 / 8


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_beats_the_optimum_and_all_reach_the_ceiling(policy: str) -> None:
    trace = read_trace([SAMPLE])
    for capacity in (50, 500, 5000):
        ours, best = run(trace, policy, capacity), run(trace, "belady", capacity)
        assert 0 < ours.block_hit_ratio <= best.block_hit_ratio
        assert 0 < ours.token_hit_ratio <= best.token_hit_ratio
    if policy != "quota":  # half of the room for everybody together
        assert run(trace, policy, trace.unique_blocks)[2:] == ceiling(trace)[2:]
    assert run(trace, "belady", trace.unique_blocks)[2:] == ceiling(trace)[2:]


def plain_hits(trace: Trace, policy: str, capacity: int) -> int:
    """Hit blocks, in plain lines."""
    uses = [[i for i, one in enumerate(trace.requests) if block in one.blocks] for block in range(trace.unique_blocks)]
    cache: OrderedDict[Any, None] = OrderedDict()
    hits = 0
    for now, one in enumerate(trace.requests):
        hits += len(list(takewhile(cache.__contains__, one.blocks)))
        for block in reversed(one.blocks):
            cache[block] = None
            if policy == "lru":
                cache.move_to_end(block)
        if policy == "belady":
            following = {block: next((use for use in uses[block] if use > now), inf) for block in cache}
            depth = {block: i for i, block in enumerate(one.blocks)}
            for block in sorted(cache, key=lambda block: (following[block], depth.get(block, 0)))[capacity:]:
                del cache[block]
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@pytest.mark.parametrize("policy", ["fifo", "lru", "belady"])
@pytest.mark.parametrize("capacity", [100, 1000])
def test_the_sample(policy: str, capacity: int) -> None:
    whole = read_trace([SAMPLE])
    trace = Trace(whole.requests[:150], whole.block_tokens)
    assert set(range(trace.unique_blocks)) == {block for one in trace.requests for block in one.blocks}
    wanted = plain_hits(trace, policy, capacity) / trace.blocks
    assert run(trace, policy, capacity).block_hit_ratio == pytest.approx(wanted)


def best_of_all(requests: tuple[Request, ...], capacity: int) -> int:
    """Hit blocks of single-block requests, by trying everything."""
    states: dict[frozenset[Any], int] = {frozenset(): 0}
    for _, (block,) in requests:
        ahead: dict[frozenset[Any], int] = {}
        for state, hits in states.items():
            there = state | {block}
            for keep in combinations(sorted(there), min(capacity, len(there))):
                kept = frozenset(keep)
                ahead[kept] = max(ahead.get(kept, 0), hits + (block in state))
        states = ahead
    return max(states.values())


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_is_one(seed: int) -> None:
    source = Random(seed)
    requests = tuple(Request(512, (source.randrange(6),)) for _ in range(30))
    for capacity in (1, 2, 3):
        found = replay_belady(Trace(requests, 512), capacity=capacity).block_hit_ratio * 30
        assert round(found) == best_of_all(requests, capacity)


def test_progress_adds_up() -> None:
    trace, done = read_trace([SAMPLE]), list[int]()
    replay(trace, "lru", make_evictor("lru", 100), capacity=10, block_bytes=10, progress=done.append)
    assert sum(done) == 400
    replay_belady(trace, capacity=10, progress=done.append)
    assert sum(done) == 800
