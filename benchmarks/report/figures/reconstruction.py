"""Errors before and after ADFQ-ViT's module-wise optimization (AMO), module by module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from adfq.errors import AdfqError
from benchmarks.report.figures import style


def collect_reconstruction(report: Mapping[str, Any]) -> pd.DataFrame:
    """Return the reconstruction errors in a method's report.

    Args:
        report: report of a record, or of a quantized model's `Quantization`.

    Returns:
        One row a module, in the order of the forward pass: ``module``, ``before``, ``after``, ``kept``, as in
        `adfq.reconstruction.Result`.

    Raises:
        AdfqError: for a report without optimized modules.
    """
    modules = report.get("modules")
    if not modules:
        raise AdfqError("no module was optimized, so that there are no errors before and after it")
    return pd.DataFrame([{"module": name, **result} for name, result in modules.items()])


def draw_reconstruction(frame: pd.DataFrame, file: Path) -> None:
    """Draw errors of `collect_reconstruction`, and write them.

    Args:
        frame: from `collect_reconstruction`.
        file: path to write, ``.png`` or ``.svg``.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    style.save(plot_reconstruction(frame), file)


def plot_reconstruction(frame: pd.DataFrame) -> Figure:
    """Return a figure with a row for each module, from the error before to the error after.

    A module that did not keep its optimized state has another mark.

    Args:
        frame: from `collect_reconstruction`.
    """
    figure = style.make_figure(0.75 * style.PAGE_WIDTH, style.rows_height(len(frame)), layout="constrained")
    axes = figure.subplots()
    y, kept = np.arange(len(frame)), frame["kept"].to_numpy(bool)
    axes.hlines(y, frame[["before", "after"]].min(axis=1), frame[["before", "after"]].max(axis=1), color=style.GREY)
    before, after, worse = style.COLORS[5], style.COLORS[4], style.COLORS[0]
    marks: list[tuple[str, Any, dict[str, Any]]] = [
        ("before", y, {"marker": "o", "facecolor": "white", "edgecolor": before, "label": "calibrated"}),
        ("after", y[kept], {"marker": "o", "color": after, "label": "optimized"}),
        ("after", y[~kept], {"marker": "X", "color": worse, "label": "optimized, no better: stays as calibrated"}),
    ]
    for column, places, look in marks:
        if len(places):
            axes.scatter(frame[column].to_numpy()[places], places, s=16, linewidth=1.2, zorder=3, **look)
    axes.set_xscale("log")
    style.list_rows(axes, list(frame["module"]))
    axes.set_xlabel("reconstruction error (squared)")
    style.dress(axes)
    axes.tick_params(axis="x", which="minor", labelsize=style.POINTS)
    figure.legend(loc="outside lower center", ncols=3, fontsize=style.POINTS, frameon=False)
    return figure
