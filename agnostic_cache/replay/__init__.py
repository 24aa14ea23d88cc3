"""Replay: what a cache of a given size and policy would have hit, on a recorded trace of requests."""

from agnostic_cache.replay.belady import replay_belady
from agnostic_cache.replay.simulate import Result, ceiling, replay
from agnostic_cache.replay.traces import Request, Trace, read_trace

__all__ = ["Request", "Result", "Trace", "ceiling", "read_trace", "replay", "replay_belady"]
