"""Style of all figures: colours, sizes, files, and names of layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adfq.errors import AdfqError
from benchmarks.tasks.shared import check_place

SUFFIXES = (".png", ".svg")

#: Okabe and Ito's, which colour-blind people tell apart. Neighbours differ in brightness too.
COLORS = ("#D55E00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#E69F00", "#CC79A7")
GREY = "#808080"  # for lines that lead the eye
POINTS = 6.5  # the smallest text
DPI = 200
#: Width of a figure that fills a page's text, in inches.
PAGE_WIDTH = 7.0
_ROW = 0.14  # height of a layer's row, in inches

# The path of a block in a layer's name, and the layer's name within the block.
_BLOCK = re.compile(r"(?P<block>(?:[a-z_]\w*\.)*?(?:[a-z_]\w*\.\d+\.)+)", re.IGNORECASE)


def check_file(file: Path) -> None:
    """Raise AdfqError for a file that no figure can be written to."""
    if file.suffix.lower() not in SUFFIXES:
        raise AdfqError(f"cannot draw {file}: figures are {' or '.join(SUFFIXES)}")
    check_place(file)


def make_figure(width: float, height: float, **options: Any) -> Figure:
    """Create an empty figure that knows the size of text; no window, no global state.

    Args:
        width: width in inches.
        height: height in inches.
        **options: further arguments of matplotlib's Figure.
    """
    figure = Figure((width, height), dpi=DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, file: Path, **options: Any) -> None:
    """Write a figure.

    Args:
        figure: figure to write.
        file: path with one of `SUFFIXES`.
        **options: further arguments of matplotlib's savefig.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    check_file(file)
    try:
        figure.savefig(file, format=file.suffix[1:].lower(), dpi=DPI, **options)
    except OSError as error:
        raise AdfqError(f"cannot write {file}: {error.strerror}") from None


def rows_height(rows: int) -> float:
    """Return the height of a chart with so many rows, its axis, title and legend, in inches."""
    return 1.1 + _ROW * max(rows, 4)


def list_rows(axes: Axes, names: Sequence[str]) -> None:
    """Make the y axis a list of names, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#D9D9D9", linewidth=0.5)


def dress(axes: Axes) -> None:
    """Set text sizes and thin lines; the grid stays behind the data."""
    axes.tick_params(labelsize=POINTS, width=0.6)
    axes.xaxis.label.set_fontsize(POINTS + 1)
    axes.yaxis.label.set_fontsize(POINTS + 1)
    axes.title.set_fontsize(POINTS + 1.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_linewidth(0.6)


def name_sites(layers: Sequence[str], roles: Sequence[str]) -> list[str]:
    """Return short names: ``blocks.0 qkv`` for ``blocks.0.attn.qkv``, or the layer's whole name if that is not unique.

    Args:
        layers: names of layers.
        roles: role of each layer.
    """
    short = []
    for layer, role in zip(layers, roles, strict=True):
        found = _BLOCK.match(layer)
        short.append(f"{found['block'].rstrip('.')} {role}" if found else layer)
    times = Counter(short)
    return [name if times[name] == 1 else layer for name, layer in zip(short, layers, strict=True)]
