"""``agnostic-cache replay``, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agnostic_cache.eviction import make_evictor
from agnostic_cache.replay import ceiling, read_trace, replay, replay_belady

SAMPLE = Path(__file__).parents[1] / "traces" / "mooncake_sample.jsonl"
NO_EXTRA = """
import sys
sys.modules[{name!r}] = None
sys.argv = ["agnostic-cache", *{arguments!r}]
from agnostic_cache.cli.__main__ import main
main()
"""


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "agnostic_cache.cli", "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def without(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    program = NO_EXTRA.format(name=name, arguments=["replay", *map(str, arguments)])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_results_as_json_and_a_plot(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    done = run(SAMPLE, "--capacity", "1000,100", "--policy", "all", "--json", out, "--plot", plot)
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    trace = read_trace([SAMPLE])
    assert found["unique_blocks"] == trace.unique_blocks
    assert found["ceiling"] == ceiling(trace).block_hit_ratio
    results = {(one["policy"], one["capacity"]): one for one in found["results"]}
    assert len(results) == len(found["results"]) == 14
    for capacity in (100, 1000):
        for policy in ("lru", "fifo", "lfu", "s3fifo", "gdsf", "adaptive", "belady"):
            one = results[policy, capacity]
            evictor = make_evictor(policy if policy != "belady" else "lru", f"{capacity * 10}MiB")
            wanted = (
                replay_belady(trace, capacity=capacity)
                if policy == "belady"
                else replay(trace, policy, evictor, capacity=capacity, block_bytes=10 * 1024**2)
            )
            assert one == wanted._asdict()
            assert f"{one['block_hit_ratio']:.4f}" in done.stdout
    needed = found["bytes_needed"]
    assert set(needed) == {"adaptive", "fifo", "gdsf", "lfu", "lru", "s3fifo", "belady"}
    assert (
        0 < needed["belady"]["0.5"] < needed["lru"]["0.5"] < needed["lru"]["0.95"] < trace.unique_blocks * 10 * 1024**2
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_capacities_may_be_sizes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(SAMPLE, "--capacity", "1GiB,64,1000MiB", "--policy", "lru", "--block-bytes", "16MiB", "--json", out)
    assert done.returncode == 0, done
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [one["capacity"] for one in results if one["policy"] == "lru"] == [62, 64]


def test_without_capacities_it_takes_shares_of_the_trace() -> None:
    done = run(SAMPLE, "--policy", "fifo")
    assert done.returncode == 0, done
    assert done.stdout.count("fifo") == 6  # five capacities, and what is needed


def test_several_files_are_one_trace(tmp_path: Path) -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    halves = [tmp_path / "first", tmp_path / "second"]
    for path, part in zip(halves, (lines[:100], lines[100:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    arguments = ("--capacity", "500", "--policy", "lru")
    assert run(*halves, *arguments).stdout == run(SAMPLE, *arguments).stdout


def test_a_line_that_does_not_parse(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 1, "hash_ids": [1]}\n{"input_length": 1, "hash_ids"\n', encoding="utf-8")
    message = refused(run(path))
    assert "trace.jsonl" in message
    assert "line 2" in message


@pytest.mark.parametrize("capacity", ["0", "-5", "100,0", "9MiB", "much", "1.5", ",", "0GiB", "-1GiB"])
def test_a_capacity_that_holds_no_block(capacity: str) -> None:
    refused(run(SAMPLE, f"--capacity={capacity}"))


@pytest.mark.parametrize("size", ["0", "-1", "much"])
def test_a_block_of_no_size(size: str) -> None:
    refused(run(SAMPLE, f"--block-bytes={size}"))


def test_an_unknown_policy_lists_the_known_ones() -> None:
    message = refused(run(SAMPLE, "--policy", "lru,magic"))
    assert "'magic'" in message
    assert all(name in message for name in ("lru", "s3fifo", "gdsf", "ttl", "quota", "adaptive"))


def test_no_trace(tmp_path: Path) -> None:
    refused(run())
    assert "nowhere" in refused(run(tmp_path / "nowhere.jsonl"))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for option in ("--json", "--plot"):
        refused(run(SAMPLE, "--capacity", 10, "--policy", "lru", option, tmp_path / "nowhere" / "out.png"))
    refused(run(SAMPLE, "--capacity", 10, "--policy", "lru", "--plot", tmp_path / "out.strange"))


def test_a_missing_extra_is_named() -> None:
    assert "agnostic-cache[cli]" in refused(without("typer", SAMPLE))
    assert "agnostic-cache[plot]" in refused(without("matplotlib", SAMPLE, "--plot", "out.png"))
