"""Accuracy over cost: every measured row is a point, and every point has a label that hides no other."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from adfq import AdfqError
from benchmarks.plan import Table, load_table
from benchmarks.report.figures.accuracy_cost import COSTS, draw_accuracy_cost, plot_accuracy_cost
from benchmarks.report.tables import summarize, tabulate_results


def summary_of(table: Table, **missing: Any) -> pd.DataFrame:
    """Every row of a table, measured; all but full precision lie close to each other."""
    results: list[Any] = []
    for index, entry in enumerate(table.entries(data="bundled")):
        full = entry.cell.method == "full_precision"
        cost = {"forward_seconds": 1.0 if full else 2 + index / 40, "size": 1.7 if full else 0.25}
        cost["calibration_seconds"] = 0.0 if full else 1.0 + index
        record = {"metrics": {"top1": 93.0 if full else 84 + index % 7 / 10}, "cost": cost}
        results.append((entry, None if entry.row.key in missing else record))
    return summarize(table, tabulate_results(table, results))


def test_a_point_with_error_bar_for_each_row_over_each_cost() -> None:
    table = load_table("5", "bundled")
    table = replace(table, seeds=table.recorded_seeds)
    summary = summary_of(table)
    figure = plot_accuracy_cost(table, summary)
    quantized = summary[summary["method"] != "full_precision"]
    assert len(figure.axes) == len(COSTS)
    for axes, cost in zip(figure.axes, COSTS.values(), strict=True):
        points = np.array([[bar.lines[0].get_xydata()[0]] for bar in axes.containers]).reshape(-1, 2)
        assert np.allclose(points, quantized[[cost.column, "mean"]])
        for bar, std in zip(axes.containers, quantized["std"], strict=True):
            (segment,) = bar.lines[2][0].get_segments()
            assert np.ptp(segment[:, 1]) == pytest.approx(2 * std)
    shapes = {(bar.lines[0].get_marker(), to_hex(bar.lines[0].get_color())) for bar in figure.axes[0].containers}
    methods = quantized["method"].nunique()
    assert [len(set(kind)) for kind in zip(*shapes, strict=True)] == [methods, methods]


def test_a_panel_for_each_model_and_bit_width() -> None:
    table = replace(load_table("1", "bundled"), bits=["W4/A4", "W3/A3"])
    summary = summary_of(table)
    figure = plot_accuracy_cost(table, summary, ["calibration"])
    titles = [axes.get_ylabel() for axes in figure.axes]
    assert titles == [f"Bundled {model}, {bits}, top-1, %" for model in ("ViT", "Swin") for bits in table.bits]
    places = [axes.get_position() for axes in figure.axes]
    assert places[0].x0 == places[1].x0 < places[2].x0 == places[3].x0
    assert places[0].y0 == places[2].y0 > places[1].y0
    for axes, place in zip(figure.axes, product(("bundled_vit", "bundled_swin"), table.bits), strict=True):
        rows = summary[(summary["model"] == place[0]) & (summary["bits"] == place[1])]
        points = [bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers]
        assert points == rows[["calibration_seconds", "mean"]].to_numpy().tolist()
        assert axes.get_xscale() == "log"
        assert len({bar.lines[0].get_marker() for bar in axes.containers}) == 4
    assert {axes.get_xscale() for axes in plot_accuracy_cost(table, summary, ["size", "forward"]).axes} == {"linear"}


@pytest.mark.parametrize(("table", "bits"), [("5", ["W3/A3"]), ("1", ["W6/A6", "W4/A4", "W3/A3"])])
def test_labels_are_inside_the_canvas_and_hide_no_other(table: str, bits: list[str]) -> None:
    spec = replace(load_table(table, "bundled"), bits=bits)
    figure = plot_accuracy_cost(spec, summary_of(spec))
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        assert len(labels) == len(axes.containers) + 1
        assert len({text.get_text() for text in labels}) == len(labels)
        boxes = [super(Annotation, text).get_window_extent() for text in labels]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        whole = axes.get_tightbbox()
        assert whole is not None
        for box in (*boxes, whole):
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def test_what_has_failed_is_left_out_and_costs_can_be_chosen(tmp_path: Path) -> None:
    table = replace(load_table("5", "bundled"), seeds=[0])
    (axes,) = plot_accuracy_cost(table, summary_of(table, ptq4vit=None), ["size"]).axes
    assert len(axes.containers) == len(table.rows) - 1
    assert "PTQ4ViT" not in {text.get_text() for text in axes.texts}
    draw_accuracy_cost(table, summary_of(table), tmp_path / "cost.svg", ["size"])
    assert "<svg" in (tmp_path / "cost.svg").read_text()
    with pytest.raises(AdfqError, match="table 5 has no row that was measured beside full precision"):
        plot_accuracy_cost(table, summary_of(table, full_precision=None))
