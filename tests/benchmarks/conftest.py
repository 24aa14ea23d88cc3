"""Races between ours and its peers: interleaved, reported as ratios, never asserted.

- `race` times contenders in one run, each round giving every one its turn, so that a busy
  machine slows all of them alike.
- `report` notes a figure. All figures are printed at the end of the session, one line
  each, and are in pytest-benchmark's ``--benchmark-json`` under ``extra_info``. What
  pytest-benchmark itself reports of a race is the time of whole rounds.
- With ``--benchmark-disable`` each contender runs once, untimed, and nothing is reported.
"""

from __future__ import annotations

import gc
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pytest_benchmark.fixture import BenchmarkFixture
    from transformers import DynamicCache

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PREFIX = 2048
"""Tokens of the document that `demo` has the state of."""


class Figure(NamedTuple):
    """What one benchmark found."""

    name: str
    ours: float
    peer: float | None
    target: float | None
    unit: str

    @property
    def judged(self) -> float:
        """The ratio to the peer, or without a peer the figure itself."""
        return self.ours if self.peer is None else self.ours / self.peer

    @property
    def verdict(self) -> str:
        """``ok`` or ``MISS``; a dash where there is no target."""
        if self.target is None:
            return "-"
        return "ok" if self.judged <= self.target else "MISS"

    def cells(self) -> tuple[str, ...]:
        """Return the figure as a row of the table."""
        if self.peer is None:
            peer, ratio, target = "-", "-", _quantity(self.target, self.unit)
        else:
            peer, ratio = _quantity(self.peer, self.unit), f"{self.judged:.3f}"
            target = "-" if self.target is None else f"{self.target:.2f}"
        return (self.name, _quantity(self.ours, self.unit), peer, ratio, target, self.verdict)


class Race:
    """The `race` fixture: times contenders against each other, once per test."""

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self.benchmark = benchmark

    def __call__(
        self,
        contenders: Mapping[str, Callable[[], object]],
        *,
        rounds: int = 50,
        inner: int = 1,
        before: Callable[[], object] | None = None,
        of: Callable[[Iterable[float]], float] = median,
    ) -> dict[str, float]:
        """Give each contender its turn, round after round; no garbage is collected in a turn.

        Args:
            contenders: What to time, by name.
            rounds: How often each has its turn; every other round in reverse order.
            inner: Calls per turn, timed as one. What takes under 10 us loops by itself,
                since a call of it adds some 50 ns.
            before: Called before each turn, untimed.
            of: What becomes of a contender's times. On two busy cores the ratio of two
                medians stays within 5 % of its mean, that of two minima within 25 %.

        Returns:
            Seconds per call, by name; NaN where benchmarks are disabled.
        """
        timed = self.benchmark.enabled
        calls = range(inner if timed else 1)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        turns = list(contenders.items())

        def one_round() -> None:
            for name, contender in turns:
                if before is not None:
                    before()
                with _without_collector():
                    start = perf_counter()
                    for _ in calls:
                        contender()
                    elapsed = perf_counter() - start
                times[name].append(elapsed / len(calls))
            turns.reverse()

        # Where pytest-benchmark is disabled, it runs one round.
        self.benchmark.pedantic(one_round, rounds=rounds)  # type: ignore[no-untyped-call]
        return {name: of(found) if timed else math.nan for name, found in times.items()}


class Report:
    """The `report` fixture: notes figures, to be printed at the end of the session."""

    def __init__(self, benchmark: BenchmarkFixture, figures: list[Figure]) -> None:
        self.benchmark = benchmark
        self.figures = figures

    def __call__(self, name: str, ours: float, peer: float | None, target: float | None, *, unit: str = "s") -> None:
        """Note a figure; do nothing where benchmarks are disabled.

        Args:
            name: What was measured, and against what.
            ours: What ours took.
            peer: What the peer took, or None to judge `ours` by itself.
            target: The most that ``ours / peer`` should be, or without a peer `ours`;
                None for a figure that is only told.
            unit: What `ours` and `peer` are measured in: ``s``, ``B``.
        """
        if self.benchmark.disabled:
            return
        figure = Figure(name, ours, peer, target, unit)
        self.benchmark.extra_info[name] = figure._asdict() | {"judged": figure.judged}
        self.figures.append(figure)


FIGURES = pytest.StashKey[list[Figure]]()


@pytest.fixture
def race(benchmark: BenchmarkFixture) -> Race:
    return Race(benchmark)


@pytest.fixture
def report(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Report:
    return Report(benchmark, pytestconfig.stash.setdefault(FIGURES, []))


class Demo(NamedTuple):
    """A real model, and a document of which it has read the first `PREFIX` tokens."""

    model: Any
    tokenizer: Any
    tokens: list[int]
    state: DynamicCache


@pytest.fixture(scope="session")
def demo() -> Demo:
    """SmolLM2, a document of 2,048 tokens and 128 to go on with, and the state of the document."""
    import torch  # noqa: PLC0415 - most benchmarks need none
    from transformers import DynamicCache  # noqa: PLC0415

    from agnostic_cache_adapters.transformers.release import forward_argument  # noqa: PLC0415

    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2  # noqa: PLC0415 - an example, found by its path
    finally:
        sys.path.remove(str(EXAMPLES))
    model, tokenizer = smollm2.load_torch()
    tokens = smollm2.document(tokenizer, PREFIX + 128)
    state = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([tokens[:PREFIX]]), **forward_argument(model, state), logits_to_keep=1)
    return Demo(model, tokenizer, tokens, state)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures as one table, a line of its own for each."""
    figures = config.stash.get(FIGURES, [])
    if not figures:
        return
    terminalreporter.section("figures")
    head = ("", "ours", "peer", "ratio", "target", "")
    rows = [head, *(figure.cells() for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, *numbers = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        label = "      " if row is head else "FIGURE"
        terminalreporter.write_line("  ".join((label, name, *numbers)))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector off."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _quantity(value: float | None, unit: str) -> str:
    """Return `value` with three digits and a prefix: 1.2e-7 ``s`` as ``120 ns``."""
    if value is None:
        return "-"
    power = max(-3, min(3, math.floor(math.log10(abs(value)) / 3))) if value else 0
    prefix = ("n", "u", "m", "", "k", "M", "G")[power + 3]
    return f"{value / 1000**power:.3g} {prefix}{unit}"
