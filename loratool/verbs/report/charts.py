"""Charts as SVG, drawn by matplotlib and inked in the page's own colour of text, so that they can be read in light and dark
themes alike."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import Unsupported
from loratool.text import safe
from loratool.verbs.inspect.block_map import BlockMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK: Final = "#010203"
"""A colour that nothing else is drawn in: `_draw` puts the page's colour of text in its place."""
BLUE, ORANGE = "#3b82f6", "#f97316"
"""Colours that can be read on white and on black."""
_SHADES: Final = "viridis"
BANDS: Final = ((0.1, 0.9, 0.15), (0.25, 0.75, 0.3))
"""The bands of a spectrum: the quantiles from and to which each goes, and its opacity."""


def require_matplotlib() -> None:
    """Imports matplotlib, before anything of it is used; raises `Unsupported` where it is not installed."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise Unsupported("a report is drawn by matplotlib: pip install 'loratool[report]'")
    # While it is imported, matplotlib reads a matplotlibrc of the current folder, which may be a stranger's. In its own
    # folder there is none.
    with chdir(Path(found.origin).parent) if os.path.lexists("matplotlibrc") else nullcontext():
        import matplotlib  # noqa: F401


def heat_map(found: BlockMap) -> str:
    """A chart of ‖ΔW‖ by block and sort of module, blank where there is no module."""
    rows, columns = len(found.rows), len(found.columns)

    def draw(figure: Figure, axes: Axes) -> None:
        # matplotlib leaves NaN blank.
        cells = [[math.nan if cell is None else cell for cell in row] for row in found.cells]
        image = axes.imshow(cells, cmap=_SHADES, vmin=0, aspect="auto")
        # Names come from files of strangers: matplotlib would read a pair of dollar signs as a formula.
        axes.set_xticks(range(columns), map(safe, found.columns), rotation=60, ha="right", parse_math=False)
        axes.set_yticks(range(rows), map(safe, found.rows), parse_math=False)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("‖ΔW‖")
        bar.outline.set_visible(False)

    # Inches: room for labels and the bar of colours, and so much for each cell.
    return _draw(draw, 2.6 + 0.34 * columns, 1.6 + 0.2 * rows, f"‖ΔW‖ of {rows} blocks by {columns} sorts of modules")


def spectra(found: Sequence[Sequence[float]]) -> str:
    """A chart of singular values relative to each module's first: the median over modules, and the quantiles of `BANDS`."""
    longest = max(map(len, found), default=0)
    relative = [[value / values[0] for value in values] for values in found if values and values[0]]
    # Modules have unlike ranks: the k-th column holds only those that have a k-th value.
    columns = [sorted(values[k] for values in relative if k < len(values)) for k in range(longest)]
    columns = [column for column in columns if column]
    from matplotlib.ticker import MaxNLocator

    def draw(figure: Figure, axes: Axes) -> None:
        places = range(1, len(columns) + 1)
        for low, high, alpha in BANDS:
            lows, highs = [_quantile(c, low) for c in columns], [_quantile(c, high) for c in columns]
            axes.fill_between(places, lows, highs, color=BLUE, alpha=alpha, linewidth=0)
        axes.plot(places, [_quantile(c, 0.5) for c in columns], color=BLUE)
        axes.set_xlabel("k")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("σ of the k-th direction, of the first")
        axes.set_ylim(0, 1.05)

    return _draw(draw, 6, 3, f"Spectra of {len(relative)} modules")


def effective_ranks(ranks: Sequence[float], stored: int) -> str:
    """A histogram of the modules' effective ranks, beside the rank that is stored."""

    def draw(figure: Figure, axes: Axes) -> None:
        axes.hist(ranks, bins=min(40, max(8, stored)), range=(0, max(stored, 1)), color=BLUE, alpha=0.8)
        axes.axvline(stored, color=ORANGE, linestyle="--")
        axes.text(stored, axes.get_ylim()[1], " stored", color=ORANGE, va="top", ha="right", rotation=90)
        axes.set_xlabel("effective rank")
        axes.set_ylabel("modules")

    return _draw(draw, 6, 3, f"Effective ranks of {len(ranks)} modules")


def frontier(choices: Sequence[tuple[float, float, float, int]]) -> str:
    """A chart of error against size in MB, at one rank for all modules and at ranks that share as many bytes by worth."""

    def draw(figure: Figure, axes: Axes) -> None:
        sizes = [choice[0] for choice in choices]
        axes.plot(sizes, [100 * choice[1] for choice in choices], color=BLUE, marker="o", label="one rank for all")
        shared = [100 * choice[2] for choice in choices]
        axes.plot(sizes, shared, color=ORANGE, marker="o", linestyle="--", label="shared by worth (--size)")
        for x, error, _, rank in choices:
            axes.annotate(str(rank), (x, 100 * error), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set_xlabel("size in MB")
        axes.set_ylabel("error, % of ‖ΔW‖")
        axes.set_ylim(bottom=0)
        legend = axes.legend(frameon=False)
        for text in legend.get_texts():
            text.set_color(INK)

    return _draw(draw, 6, 3.2, f"Size against error at {len(choices)} ranks")


def matrix(names: Sequence[str], cells: Sequence[Sequence[float | None]]) -> str:
    """A chart of the cosines of adapters, each with each."""
    size = len(names)

    def draw(figure: Figure, axes: Axes) -> None:
        values = [[math.nan if cell is None else cell for cell in row] for row in cells]
        axes.imshow(values, cmap="coolwarm", vmin=-1, vmax=1)
        axes.set_xticks(range(size), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(size), names, parse_math=False)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                shown = "–" if math.isnan(value) else f"{value:.2f}"
                # Dark figures on the pale middle of the colours, light ones on their ends.
                dark = math.isnan(value) or abs(value) < 0.7
                axes.text(j, i, shown, ha="center", va="center", color="#1f2937" if dark else "#f9fafb")
        axes.spines[:].set_visible(False)

    return _draw(draw, 2.5 + 0.8 * size, 1.8 + 0.6 * size, f"Cosines of {size} adapters")


def _draw(draw: Callable[[Figure, Axes], None], width: float, height: float, title: str) -> str:
    """An SVG element that scales with the page, has a title for screen readers, and is the same each time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text (fonttype none), to be searched and in the page's font. A fixed salt gives elements the same names, and
    # no date is written, so that equal adapters make equal pages.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9, "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.6,
    }  # fmt: skip
    with mpl.rc_context():
        # Of matplotlib's own defaults: somebody's matplotlibrc could have LaTeX run on names from an adapter.
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    # In a page there is no XML declaration, and the ink becomes whatever colour text has there.
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the width, up to that which was drawn (a CSS inch is 96 px), and not so small that nobody can read it.
    sizes = f"width:100%;max-width:{width * 96:.0f}px;min-width:{min(width * 96, 480):.0f}px"
    svg = re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"', f'style="{sizes}"', svg, count=1)
    # The first > ends the opening tag. A title is words and numbers of ours, so that nothing in it needs escaping.
    return svg.replace(">", f' role="img" aria-label="{title}"><title>{title}</title>', 1)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of sorted values, interpolated between the two values nearest to it."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
