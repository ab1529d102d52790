"""A metric is one entry; tables, page and regression check follow it, its direction too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adfq.errors import AdfqError
from benchmarks import metrics
from benchmarks.metrics import METRICS, Metric, find_metric
from benchmarks.plan import Entry, Table, load_table
from benchmarks.report.page import Report, render_report
from benchmarks.report.regression import Tolerance, compare
from benchmarks.report.tables import render, summarize, tabulate_results

LOSS = Metric("loss", "loss", "nats", more_is_better=False, digits=3)
Results = list[tuple[Entry, Any]]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """Table 1 under a metric of which less is better."""
    monkeypatch.setattr(metrics, "METRICS", {**METRICS, "loss": LOSS})
    table = load_table("1", "bundled")
    return replace(table, metrics=["loss"], bits=["W4/A4"], models=table.models[:1], seeds=[0, 1])


def measure(table: Table, **losses: float) -> Results:
    return [
        (entry, {"config": entry.cell.config, "metrics": {"loss": losses.get(entry.row.key, 2.0), "images": 5}})
        for entry in table.entries(data="x")
    ]


def test_less_is_better_in_tables_and_on_the_page(table: Table) -> None:
    results = measure(table, full_precision=1.0, repq_vit=1.5, ptq4vit=3.0)
    frame = tabulate_results(table, results)
    best = summarize(table, frame).query("best")
    assert list(best["row"]) == ["repq_vit"]
    text = render(table, frame, "md")
    assert "**1.500 ± 0.000 (+0.500)**" in text
    report = Report.create([(table, results)], lambda cell: "measure")
    (column,) = report.sections[0].columns
    assert column.first == "ascending"
    page = render_report(report, Path("out"))["index.html"]
    assert "1.500 ± 0.000" in page


def test_less_is_better_in_the_regression_check(table: Table) -> None:
    committed = [record for _, record in measure(table)]
    frame = compare([(table, measure(table, repq_vit=3.0, ptq4vit=1.0))], committed, Tolerance())
    moved = frame[frame["quantity"] == "loss"].set_index("row")["status"].to_dict()
    assert (moved["RepQ-ViT"], moved["PTQ4ViT"], moved["Base PTQ"]) == ("worse", "better", "same")


def test_metrics_have_headings_and_a_direction() -> None:
    assert find_metric("top1").heading == "top-1, %"
    assert LOSS.gain(2.0, 1.5) == 0.5
    assert find_metric("top1").gain(2.0, 1.5) == -0.5
    assert LOSS.format(1.0) == "1.000"
    with pytest.raises(AdfqError, match="unknown metric 'charm'; there are top1, top5"):
        find_metric("charm")
