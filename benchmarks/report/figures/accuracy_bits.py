"""Accuracy over bit-widths: the methods of tables side by side, a panel for each model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from benchmarks.metrics import Metric
from benchmarks.plan import Table
from benchmarks.report.figures import style

_COLUMNS = 3
# In inches.
_PANEL, _LEGEND = 2.1, 0.35
_ASIDE = 0.05  # from method to method, of the distance between bit-widths
_MARKERS = "osD^vP*X<>"
#: Dark enough for thin lines on white; neighbours differ in brightness too, and markers tell them apart in grey.
_COLORS = [style.COLORS[index] for index in (4, 5, 2, 0, 6, 1)]


@dataclass(frozen=True)
class Panel:
    """Measured rows of one model of a table, under the table's first metric.

    Attributes:
        title: label of the model.
        metric: metric of the vertical axis.
        rows: measured rows of `benchmarks.report.tables.summarize`, full precision included.
    """

    title: str
    metric: Metric
    rows: pd.DataFrame


def collect_panels(summaries: Iterable[tuple[Table, pd.DataFrame]]) -> list[Panel]:
    """Return a panel for each model that was measured at several bit-widths.

    Args:
        summaries: tables with their `benchmarks.report.tables.summarize`.
    """
    panels = []
    for table, summary in summaries:
        key = table.metrics[0]
        measured = summary[summary["metric"] == key].dropna(subset=["mean"])
        for model in table.models:
            rows = measured[measured["model"] == model.key]
            if rows[rows["method"] != FULL_PRECISION]["bits"].nunique() > 1:
                panels.append(Panel(model.label, table.metric(key), rows))
    return panels


def draw_accuracy_bits(panels: Sequence[Panel], file: Path) -> None:
    """Draw panels, and write them.

    Args:
        panels: from `collect_panels`.
        file: path to write, ``.png`` or ``.svg``.

    Raises:
        AdfqError: without panels, for another kind of file, and for one that cannot be written.
    """
    style.save(plot_accuracy_bits(panels), file)


def plot_accuracy_bits(panels: Sequence[Panel]) -> Figure:
    """Return a line for each method over bit-widths, with its spread over seeds; full precision is a dashed line.

    Raises:
        AdfqError: without panels.
    """
    if not panels:
        raise AdfqError("there is no model that was measured at several bit-widths")
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width = style.PAGE_WIDTH if columns > 1 else 0.6 * style.PAGE_WIDTH
    figure = style.make_figure(width, rows * _PANEL + _LEGEND, layout="constrained")
    labels = list(dict.fromkeys(label for panel in panels for label in _quantized(panel)["label"]))
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), panel, labels)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [*labels, *(name for name in handles if name not in labels)]
    entries = [handles[name] for name in names]
    figure.legend(entries, names, loc="outside lower center", ncols=6, fontsize=style.POINTS + 1, frameon=False)
    return figure


def _quantized(panel: Panel) -> pd.DataFrame:
    return panel.rows[panel.rows["method"] != FULL_PRECISION]


def _draw_panel(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    rows = _quantized(panel)
    widths = sorted(rows["bits"].unique(), key=lambda bits: [int(number) for number in re.findall(r"\d+", bits)])
    for label, group in rows.groupby("label", sort=False):
        index = labels.index(str(label))
        aside = _ASIDE * (index - (len(labels) - 1) / 2)  # so that no point hides another of the same height
        group = group.assign(place=group["bits"].map(widths.index) + aside).sort_values("place")
        axes.errorbar(
            group["place"],
            group["mean"],
            group["std"].fillna(0.0),
            label=str(label),
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
        )
    full = panel.rows[panel.rows["method"] == FULL_PRECISION]
    if not full.empty:
        dashes = (0, (4, 2))
        axes.axhline(full["mean"].iloc[0], color="black", linewidth=0.9, linestyle=dashes, label=full["label"].iloc[0])
    axes.set_xticks(range(len(widths)), widths)
    axes.set_xlim(-0.25, len(widths) - 0.75)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.metric.heading)
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.5)
    style.dress(axes)
