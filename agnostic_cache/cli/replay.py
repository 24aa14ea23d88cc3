"""``agnostic-cache replay``: what would a cache of this size and policy have hit?"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agnostic_cache.errors import AgnosticCacheError, InvalidSizeError, MissingExtraError, UnknownPolicyError
from agnostic_cache.eviction.registry import POLICIES, make_evictor
from agnostic_cache.replay.belady import replay_belady
from agnostic_cache.replay.simulate import Result, ceiling
from agnostic_cache.replay.simulate import replay as simulate
from agnostic_cache.replay.traces import Trace, read_trace
from agnostic_cache.sizes import parse_size

_ALL = [name for name in POLICIES if name not in {"quota", "ttl"}]  # these two need tenants, and a clock
_SHARES = (0.005, 0.01, 0.05, 0.1, 0.2)  # of the blocks that differ, where no capacity is given
_GOALS = (0.5, 0.8, 0.95)  # of the hits without a limit


def replay(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE...", help="JSON lines of Mooncake or Bailian; several are one trace."),
    ],
    *,
    capacity: Annotated[
        str, typer.Option(help="Blocks (1000,3000) or sizes (10GiB,64GiB); by default shares of the trace.")
    ] = "",
    policy: Annotated[str, typer.Option(help=f"'all', or names: {', '.join(POLICIES)}.")] = "all",
    block_bytes: Annotated[str, typer.Option(help="What a block takes in the cache.")] = "10MiB",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them there (extra 'plot').")] = None,
) -> None:
    """Replay recorded requests: which policy hits how much, at which capacity, and what more would be worth.

    The offline optimum (Belady) is always among the results: no policy can do better.
    """
    terminal = Console(stderr=True)
    try:
        size = parse_size(_number(block_bytes))
        names = _policies(policy)
        draw = _drawer(plot) if plot is not None else None
        trace = read_trace(traces)
        results = _run(trace, names, _capacities(capacity, size, trace), size, terminal)
        top = ceiling(trace)
        needs = {name: _needs([one for one in results if one.policy == name], top, size) for name in (*names, "belady")}
        _show(results, needs, top, size)
        if json_path is not None:
            found = _found(trace, results, top) | {"block_bytes": size, "bytes_needed": needs}
            json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if draw is not None:
            draw(plot, results, top, size)
    except (AgnosticCacheError, OSError) as error:
        terminal.print(f"agnostic-cache replay: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _found(trace: Trace, results: Sequence[Result], top: Result) -> dict[str, Any]:
    return {
        "results": [result._asdict() for result in results],
        "ceiling": top.block_hit_ratio,
        "token_ceiling": top.token_hit_ratio,
        "unique_blocks": trace.unique_blocks,
        "blocks": trace.blocks,
        "requests": len(trace.requests),
    }


def _run(
    trace: Trace, names: Sequence[str], capacities: Sequence[int], block_bytes: int, terminal: Console
) -> list[Result]:
    results = []
    with Progress(console=terminal, transient=True) as bar:
        task = bar.add_task("", total=(len(names) + 1) * len(capacities) * len(trace.requests))
        for blocks in capacities:
            for name in names:
                bar.update(task, description=f"{name}, {blocks:,} blocks")
                results.append(
                    simulate(
                        trace,
                        name,
                        make_evictor(name, blocks * block_bytes),
                        capacity=blocks,
                        block_bytes=block_bytes,
                        progress=lambda done: bar.advance(task, done),
                    )
                )
            bar.update(task, description=f"belady, {blocks:,} blocks")
            results.append(replay_belady(trace, capacity=blocks, progress=lambda done: bar.advance(task, done)))
    return results


def _show(results: Iterable[Result], needs: dict[str, dict[str, int | None]], top: Result, block_bytes: int) -> None:
    """Print what was found, to the standard output."""
    screen = Console()
    table = Table(title="Hit ratio, of blocks and of tokens")
    for column in ("capacity, blocks", "bytes", "policy", "blocks", "tokens"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    last = None
    for result in results:
        if last not in {None, result.capacity}:
            table.add_section()
        last = result.capacity
        table.add_row(
            f"{result.capacity:,}",
            _gib(result.capacity * block_bytes),
            result.policy,
            f"{result.block_hit_ratio:.4f}",
            f"{result.token_hit_ratio:.4f}",
        )
    table.add_section()
    table.add_row(
        f"{top.capacity:,}",
        _gib(top.capacity * block_bytes),
        "no limit",
        f"{top.block_hit_ratio:.4f}",
        f"{top.token_hit_ratio:.4f}",
    )
    screen.print(table)
    wanted = Table(title="Bytes needed for a share of the attainable hits (between the capacities: interpolated)")
    wanted.add_column("policy")
    for goal in _GOALS:
        wanted.add_column(f"{goal:.0%}", justify="right")
    for name, need in needs.items():
        wanted.add_row(name, *("-" if nbytes is None else _gib(nbytes) for nbytes in need.values()))
    screen.print(wanted)


def _needs(results: Sequence[Result], top: Result, block_bytes: int) -> dict[str, int | None]:
    """Return the bytes for each share of the attainable hits, on straight lines between the capacities replayed."""
    points = [
        (0, 0.0),
        *((one.capacity, one.block_hit_ratio) for one in sorted(results, key=lambda one: one.capacity)),
        (top.capacity, top.block_hit_ratio),
    ]
    needs: dict[str, int | None] = {}
    for goal in _GOALS:
        wanted, found = goal * top.block_hit_ratio, None
        for (low, less), (high, more) in pairwise(points):
            if less < wanted <= more:
                found = round((low + (high - low) * (wanted - less) / (more - less)) * block_bytes)
                break
        needs[f"{goal:g}"] = found
    return needs


def _policies(text: str) -> list[str]:
    names = [name for part in text.split(",") for name in (_ALL if part.strip() == "all" else [part.strip()])]
    for name in names:
        if name not in POLICIES and name != "belady":
            msg = f"policy {name!r} is unknown; known: all, {', '.join(POLICIES)}"
            raise UnknownPolicyError(msg)
    return list(dict.fromkeys(name for name in names if name != "belady"))


def _capacities(text: str, block_bytes: int, trace: Trace) -> list[int]:
    """Return capacities in blocks, each once, the smallest first."""
    if not text.strip():
        return sorted({max(1, round(share * trace.unique_blocks)) for share in _SHARES})
    found = set()
    for part in text.split(","):
        number = _number(part)
        blocks = number if isinstance(number, int) else parse_size(number) // block_bytes
        if blocks < 1:
            msg = f"capacity {part.strip()!r} holds no block of {block_bytes:,} bytes; give more"
            raise InvalidSizeError(msg)
        found.add(blocks)
    return sorted(found)


def _number(text: str) -> int | str:
    """Return an int where the text is one, and the text where it is more than that."""
    text = text.strip()
    return int(text) if text.lstrip("+-").isdecimal() and text.isascii() else text


def _gib(nbytes: int) -> str:
    return f"{nbytes / 1024**3:,.1f} GiB"


def _drawer(path: Path) -> Any:
    """Return what draws; asked for before the work, which would be in vain without it."""
    try:
        from agnostic_cache.cli.plot import KINDS, draw  # noqa: PLC0415 - behind an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        msg = "--plot needs an extra: pip install 'agnostic-cache[plot]'"
        raise MissingExtraError(msg) from error
    if path.suffix.removeprefix(".").lower() not in KINDS:
        msg = f"cannot draw into {path.name!r}; name a file that ends in one of {', '.join(sorted(KINDS))}"
        raise typer.BadParameter(msg, param_hint="--plot")
    return draw
