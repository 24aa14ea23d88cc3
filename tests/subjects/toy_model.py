"""A model without arithmetic, in host memory: each row of its state tells which tokens it was computed from."""

from array import array
from hashlib import blake2b
from typing import Any

from agnostic_cache import KVLayout
from agnostic_cache.arrays.dtypes import Dtype
from agnostic_cache.arrays.host import HostArray
from agnostic_cache.state.layout import SNAPSHOT, TOKENS, WINDOW

WIDTH = 6
LAYOUTS = {
    "tokens": KVLayout({"key": TOKENS(0)}),
    "window": KVLayout({"key": TOKENS(0), "window": WINDOW(0, WIDTH)}),
    "snapshot": KVLayout({"key": TOKENS(0), "state": SNAPSHOT}),
    "all": KVLayout({"key": TOKENS(0), "window": WINDOW(0, WIDTH), "state": SNAPSHOT}),
}


def state_of(tokens: list[int], kind: str = "tokens", *, rows: int = WIDTH, room: int = 0) -> dict[str, Any]:
    """Compute the state of a prompt: of a window the last `rows` rows; of tokens buffers with `room` more rows."""
    values = [_digest(tokens[: i + 1]) for i in range(len(tokens))]
    leaves = {"key": _host(b"".join(values) + bytes(8 * room))}
    if kind in {"window", "all"}:
        leaves["window"] = _host(b"".join(b"w" + value[1:] for value in values[max(0, len(tokens) - rows) :]))
    if kind in {"snapshot", "all"}:
        leaves["state"] = _host(b"s" + _digest(tokens)[1:])
    return leaves


def contents(state: dict[str, Any], kind: str) -> dict[str, bytes]:
    """Return the bytes that matter of a state: of a window, the last rows."""
    found = {name: bytes(array.memory) for name, array in state.items()}
    if kind in {"window", "all"}:
        found["window"] = found["window"][-8 * WIDTH :]
    return found


def _digest(tokens: list[int]) -> bytes:
    return blake2b(array("Q", tokens).tobytes(), digest_size=8).digest()


def _host(raw: bytes) -> HostArray:
    host = HostArray.empty((len(raw) // 8, 2), Dtype.FLOAT32)
    host.memory[:] = raw
    return host
