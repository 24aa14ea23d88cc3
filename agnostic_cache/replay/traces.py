"""Traces: recorded requests, each the blocks of its prompt by hash."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from agnostic_cache.errors import TraceFormatError


class Request(NamedTuple):
    """One prompt.

    Attributes:
        tokens: Its length.
        blocks: The hash of each block, chained: equal hashes mean equal prompts up to there.
    """

    tokens: int
    blocks: tuple[int | str, ...]


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        requests: The requests.
        block_tokens: Tokens of a block; the last block of a prompt may be shorter.
    """

    requests: tuple[Request, ...]
    block_tokens: int

    @cached_property
    def blocks(self) -> int:
        """Blocks of all prompts, repeated ones included."""
        return sum(len(request.blocks) for request in self.requests)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.tokens for request in self.requests)

    @cached_property
    def unique_blocks(self) -> int:
        """Blocks that differ."""
        return len({block for request in self.requests for block in request.blocks})


def read_trace(paths: Iterable[str | PathLike[str]]) -> Trace:
    """Read a trace: JSON lines in Mooncake's format (512-token blocks) or Bailian's (``chat_id`` ..., 16-token blocks).

    Args:
        paths: Files, of one format; several are one trace in that order, with hashes that mean the same in each.

    Raises:
        TraceFormatError: A line does not parse, formats are mixed, or there is no request.
        OSError: A file cannot be read.
    """
    requests: list[Request] = []
    block_tokens: int | None = None
    for path in paths:
        for where, record in _records(Path(path)):
            found = 16 if "chat_id" in record else 512
            if block_tokens not in {None, found}:
                msg = f"{where}: {found}-token blocks after blocks of {block_tokens}; replay one format at a time"
                raise TraceFormatError(msg)
            block_tokens = found
            requests.append(_request(record, where))
    if block_tokens is None:
        msg = "the trace holds no request; give JSON lines with input_length and hash_ids"
        raise TraceFormatError(msg)
    return Trace(tuple(requests), block_tokens)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of a file as a JSON object, and where it stands."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
                msg = f"{where}: not JSON ({error})"
                raise TraceFormatError(msg) from error
            if not isinstance(record, dict):
                msg = f"{where}: a JSON object is wanted, not {type(record).__name__}"
                raise TraceFormatError(msg)
            yield where, record


def _request(record: dict[str, Any], where: str) -> Request:
    tokens, blocks = record.get("input_length"), record.get("hash_ids")
    if type(tokens) is not int or tokens < 0:
        msg = f"{where}: input_length is {tokens!r}; a count of tokens is wanted"
        raise TraceFormatError(msg)
    if not isinstance(blocks, list) or not {type(block) for block in blocks} <= {int, str}:
        msg = f"{where}: hash_ids is no list of numbers or strings"
        raise TraceFormatError(msg)
    return Request(tokens, tuple(blocks))
