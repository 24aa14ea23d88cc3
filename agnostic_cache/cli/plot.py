"""Plot: hit ratio over capacity, a line per policy. Needs the extra ``plot``."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from agnostic_cache.replay.simulate import Result

_GIB = 1024**3
_COLOURS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # C3 is the default policy's

KINDS = frozenset(FigureCanvasAgg.get_supported_filetypes())
"""Endings of image files."""


def draw(path: Path, results: Sequence[Result], top: Result, block_bytes: int) -> None:
    """Draw the results into an image whose kind the name's ending says.

    Args:
        path: Where to write it.
        results: Of each policy at each capacity.
        top: What no limit gives.
        block_bytes: Bytes of a block.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = {
        name: sorted((one.capacity * block_bytes / _GIB, one.token_hit_ratio) for one in results if one.policy == name)
        for name in dict.fromkeys(one.policy for one in results)
    }
    if "belady" in lines:
        sizes, ratios = zip(*lines.pop("belady"), strict=True)
        axes.plot(sizes, ratios, color="0.45", linestyle="--", label="optimum (Belady)")
    axes.axhline(top.token_hit_ratio, color="0.45", linewidth=0.8, linestyle=":", label="no limit")
    last = {name: line[-1][1] for name, line in lines.items()}
    colours = dict(zip(sorted(lines), cycle(_COLOURS), strict=False))
    for name in sorted(lines, key=last.__getitem__, reverse=True):
        strong = name == "adaptive"
        sizes, ratios = zip(*lines[name], strict=True)
        axes.plot(
            sizes,
            ratios,
            label=name,
            marker="o",
            markersize=4,
            linewidth=2.6 if strong else 1.4,
            color="C3" if strong else colours[name],
            zorder=3 if strong else 2,
        )
    axes.set_xscale("log")
    ticks = sorted({x for line in lines.values() for x, _ in line})
    axes.set_xticks(ticks, minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.3g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda _x, _: ""))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("What a cache of this size saves", loc="left")
    axes.set_xlabel(f"size of the cache, GiB (blocks of {block_bytes / 2**20:,.3g} MiB)")
    axes.set_ylabel("prompt tokens not computed again")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
