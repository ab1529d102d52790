"""Accuracy over cost: a table's rows as points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from benchmarks.plan import Model, Table
from benchmarks.report.figures import style


@dataclass(frozen=True)
class Cost:
    """Column of `benchmarks.report.tables.summarize`, and its axis.

    Attributes:
        column: name of the column.
        label: label of the axis.
        log: whether the axis is logarithmic.
    """

    column: str
    label: str
    log: bool = False


@dataclass(frozen=True)
class Panel:
    """Measured rows of one model at one bit-width.

    Attributes:
        title: label of the vertical axis.
        rows: rows of `benchmarks.report.tables.summarize`, without full precision.
        full: the row of full precision.
    """

    title: str
    rows: pd.DataFrame
    full: pd.Series[float]


#: By the name that users choose them by.
COSTS = {
    "forward": Cost("relative_forward", "forward pass (simulated), × full precision's time"),
    "size": Cost("size", "packed size, MB"),
    "calibration": Cost("calibration_seconds", "calibration and optimization, s", log=True),
}

_MARKERS = "os^Dv<>P"
_COLORS = [style.COLORS[index] for index in (5, 1, 2, 4, 0, 6)]
_LEADER = {"arrowstyle": "-", "color": style.GREY, "linewidth": 0.4, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0}
_LINE = 1.35 * style.POINTS / 72  # from label to label, in inches
# In inches.
_WIDTH, _LEFT, _ABOVE, _BELOW, _CHARACTER = 3.6, 0.5, 0.15, 0.45, 0.055


def draw_accuracy_cost(table: Table, summary: pd.DataFrame, file: Path, costs: Sequence[str] = tuple(COSTS)) -> None:
    """Draw a table's first metric over the cost of each row, and write it.

    Args:
        table: measured table.
        summary: `benchmarks.report.tables.summarize` of the table.
        file: path to write, ``.png`` or ``.svg``.
        costs: names of `COSTS`, a panel each; all by default.

    Raises:
        AdfqError: for another kind of file or one that cannot be written, and if no row was measured.
    """
    style.save(plot_accuracy_cost(table, summary, costs), file)


def is_drawable(summary: pd.DataFrame) -> bool:
    """Return whether a summary has a measured row, beside full precision, with its cost."""
    measured = summary.dropna(subset=["mean"])
    return measured["method"].nunique() > 1 and FULL_PRECISION in set(measured["method"]) and "size" in measured


def plot_accuracy_cost(table: Table, summary: pd.DataFrame, costs: Sequence[str] = tuple(COSTS)) -> Figure:
    """Return a figure with a panel for each cost, bit-width and model; error bars are standard deviations over seeds.

    Models stand side by side. Full precision is a line.

    Args:
        table: measured table.
        summary: `benchmarks.report.tables.summarize` of the table.
        costs: names of `COSTS`, a panel each; all by default.

    Raises:
        AdfqError: if no row was measured beside full precision.
    """
    columns = [panels for model in table.models if (panels := _panels(table, summary, model))]
    if not columns:
        raise AdfqError(f"table {table.name} has no row that was measured beside full precision")
    every = [panel for panels in columns for panel in panels]
    panel_height = max(2.0, _LINE * (2 + max(len(panel.rows) for panel in every)))
    names = [label for panel in every for label in [*panel.rows["label"], panel.full["label"]]]
    panel_width = _LEFT + _WIDTH + 0.05 * _WIDTH + _CHARACTER * (1 + max(map(len, names)))
    each, lines = panel_height + _BELOW + _ABOVE, max(map(len, columns))
    width, height = len(columns) * panel_width, len(costs) * lines * each
    figure = style.make_figure(width, height)
    for (index, name), (column, panels) in product(enumerate(costs), enumerate(columns)):
        for line, panel in enumerate(panels):
            left, bottom = column * panel_width + _LEFT, height - (index * lines + line + 1) * each + _BELOW
            axes = figure.add_axes((left / width, bottom / height, _WIDTH / width, panel_height / height))
            _draw(axes, panel, COSTS[name], methods=list(dict.fromkeys(row.method for row in table.rows)))
            axes.set_ylabel(panel.title)
            style.dress(axes)
            _write_labels(axes, panel.rows, panel.full, COSTS[name].column, panel_height)
    return figure


def _panels(table: Table, summary: pd.DataFrame, model: Model) -> list[Panel]:
    """Return a panel for each bit-width of a model; none without full precision."""
    metric = next(iter(table.metrics))
    measured = summary[(summary["metric"] == metric) & (summary["model"] == model.key)].dropna(subset=["mean"])
    full, rows = (measured[(measured["method"] == FULL_PRECISION) == wanted] for wanted in (True, False))
    if full.empty:
        return []
    several = len(table.bits) > 1
    return [
        Panel(f"{model.label}{f', {bits}' if several else ''}, {table.metric(metric).heading}", group, full.iloc[0])
        for bits, group in rows.groupby("bits", sort=False)
    ]


def _draw(axes: Axes, panel: Panel, cost: Cost, methods: Sequence[str]) -> None:
    full = panel.full
    if cost.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for row in panel.rows.to_dict("records"):
        index = methods.index(row["method"])
        # A method that is measured under several settings has filled marks under its own name.
        color, fill = _COLORS[index % len(_COLORS)], "full" if row["row"] == row["method"] else "none"
        axes.errorbar(
            row[cost.column],
            row["mean"],
            None if np.isnan(row["std"]) else row["std"],
            marker=_MARKERS[index % len(_MARKERS)],
            color=color,
            fillstyle=fill,
            markersize=5,
            markeredgewidth=1,
            markeredgecolor="black" if fill == "full" else color,
            elinewidth=0.8,
            capsize=2,
            zorder=3,
        )
    axes.axhline(full["mean"], color="black", linewidth=0.8, linestyle=(0, (4, 2)))
    axes.grid(color="#D9D9D9", linewidth=0.5)
    axes.set_xlabel(cost.label + (f" (full precision: {full[cost.column]:.3g})" if cost.column == "size" else ""))
    axes.margins(x=0.06, y=0.06)


def _write_labels(axes: Axes, rows: pd.DataFrame, full: pd.Series[float], column: str, height: float) -> None:
    """Write labels beside the panel, in the order of the points, with a line to each; no label hides another."""
    named = pd.concat([rows, full.to_frame().T]).reset_index(drop=True)
    right = axes.get_xlim()[1]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # labels change neither
    x, y = named[column].where(named["method"] != FULL_PRECISION, right).astype(float), named["mean"].astype(float)
    order = np.lexsort((-x, y))
    places = axes.transAxes.inverted().transform(axes.transData.transform(np.column_stack([x, y])))[order, 1]
    for index, place in zip(order, _spread(places, _LINE / height), strict=True):
        axes.annotate(
            named["label"][index],
            (x[index], y[index]),
            (1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=style.POINTS,
            arrowprops=_LEADER,
            annotation_clip=False,
        )


def _spread(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Move places between 0 and 1, in ascending order, apart to a gap, by as little as possible."""
    ranks = gap * np.arange(len(places))
    pools: list[tuple[float, int]] = []  # neighbours that touch, about the middle of where they belong
    for place in (places - ranks).tolist():
        middle, size = place, 1
        while pools and pools[-1][0] > middle:
            other, count = pools.pop()
            middle, size = (middle * size + other * count) / (size + count), size + count
        pools.append((middle, size))
    middles, sizes = zip(*pools, strict=True)
    return np.asarray(np.clip(np.repeat(middles, sizes), 0, 1 - ranks[-1]) + ranks)
