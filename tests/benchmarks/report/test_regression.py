"""What counts as a regression, what as moved, and what is not compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from junitparser import Failure, JUnitXml, Skipped

from adfq.method import FULL_PRECISION
from benchmarks.plan import Entry, Table, load_table
from benchmarks.report.regression import CALIBRATION_FLOOR, Tolerance, compare, count, render, to_junit
from benchmarks.run.store import Record

Results = list[tuple[Table, list[tuple[Entry, Record | None]]]]
TOLERANCE = Tolerance()


def choose(name: str, *rows: str, seeds: Sequence[int] = (0,), bits: str = "W3/A3") -> Table:
    """A part of a table of the bundled profile."""
    table = load_table(name, "bundled")
    return replace(table, rows=[row for row in table.rows if row.key in rows], seeds=seeds, bits=[bits])


@pytest.fixture
def table() -> Table:
    return choose("1", "repq_vit")


def measure(*tables: Table) -> Results:
    """As if measured: full precision's forward takes 0.1 s, another one 0.3 s, and calibration 200 forwards."""
    results: Results = []
    for table in tables:
        records: list[tuple[Entry, Record | None]] = []
        for entry in table.entries(data="bundled"):
            plain = entry.cell.method == FULL_PRECISION
            cost = {"forward_seconds": 0.1 if plain else 0.3, "calibration_seconds": 0.0 if plain else 20.0}
            record = {
                "config": entry.cell.config,
                "metrics": {**dict.fromkeys(table.metrics, 80.0), "images": 10},
                "cost": cost,
                "timing": {"calibration": cost["calibration_seconds"], "evaluation": 1.5},
                "environment": {"threads": 1},
                "provenance": {"code": "a", "weights": "b", "data": "c"},
                "finished": "2026-01-01T00:00:00+00:00",
            }
            records.append((entry, record))
        results.append((table, records))
    return results


def records_of(results: Results) -> list[Record]:
    return [copy.deepcopy(record) for _, entries in results for _, record in entries if record]


def pick(results: Results, method: str, model: str = "bundled_vit", seed: int = 0) -> Record:
    (record,) = [
        record
        for record in (record for _, entries in results for _, record in entries if record)
        if (record["config"]["method"], record["config"]["model"], record["config"]["seed"]) == (method, model, seed)
    ]
    return record


def drop(results: Results, method: str, model: str = "bundled_vit") -> Results:
    """The same with failed cells."""
    return [
        (
            table,
            [
                (entry, None if (entry.cell.method, entry.model.key) == (method, model) else record)
                for entry, record in entries
            ],
        )
        for table, entries in results
    ]


def statuses(frame: pd.DataFrame) -> dict[tuple[str, str], str]:
    """What is not the same, by model and quantity."""
    frame = frame[frame["status"] != "same"]
    return dict(zip(zip(frame["model"], frame["quantity"], strict=True), frame["status"], strict=True))


def test_the_same_again_is_no_regression(table: Table) -> None:
    results = measure(table)
    frame = compare(results, records_of(results), TOLERANCE, whole=True)
    assert statuses(frame) == {}
    # Of both models, the metric of two cells and the two times of one.
    assert len(frame) == 2 * (2 + 2)
    assert count(frame) == {"cells": 4, "moved": 0, "regressions": 0, "new": 0, "gone": 0}
    assert render(frame, TOLERANCE) == ("4 cells, 0 moved, 0 regressions (tolerance: accuracy 0.3 points, time ×1.5)\n")


@pytest.mark.parametrize(
    ("before", "now", "status"),
    [
        (91.3, 91.0, "same"),  # their difference is a little more than 0.3 in floating point
        (91.0, 91.3, "same"),
        (91.3, 90.95, "worse"),
        (90.95, 91.3, "better"),
        (80.0, 80.0, "same"),
    ],
)
def test_a_metric_may_lose_the_tolerance_and_no_more(table: Table, before: float, now: float, status: str) -> None:
    results = measure(table)
    committed = records_of(results)
    pick(results, "repq_vit")["metrics"]["top1"] = now
    for record in committed:
        if record["config"] == pick(results, "repq_vit")["config"]:
            record["metrics"]["top1"] = before
    frame = compare(results, committed, TOLERANCE)
    assert statuses(frame) == ({} if status == "same" else {("Bundled ViT", "top1"): status})
    assert count(frame)["regressions"] == (status == "worse")
    assert count(frame)["moved"] == (status != "same")


def test_every_metric_of_the_table_is_compared() -> None:
    results = measure(choose("2", "repq_vit"))
    committed = records_of(results)
    pick(results, "repq_vit", "bundled_mask_rcnn")["metrics"] |= {"box_ap": 79.0, "mask_ap": 81.0, "images": 9}
    frame = compare(results, committed, TOLERANCE)
    label = "Bundled Mask R-CNN"
    assert statuses(frame) == {(label, "box_ap"): "worse", (label, "mask_ap"): "better"}
    assert count(frame)["moved"] == count(frame)["regressions"] == 1


def test_a_metric_that_is_missing_now_is_a_regression_and_one_that_was_missing_is_new(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)
    del pick(results, "repq_vit")["metrics"]["top1"]
    del next(record for record in committed if record["config"]["model"] == "bundled_swin")["metrics"]["top1"]
    frame = compare(results, committed, TOLERANCE)
    assert statuses(frame) == {("Bundled ViT", "top1"): "failed", ("Bundled Swin", "top1"): "new"}
    assert count(frame)["regressions"] == 1
    assert count(frame)["new"] == 0  # the cell is not


def test_loading_is_not_counted_beside_the_evaluation_that_it_is_a_part_of(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)  # older ones do not tell
    pick(results, "repq_vit")["timing"]["loading"] = 1.0
    frame = compare(results, committed, TOLERANCE)
    assert set(frame[frame["row"] != "Full precision"]["seconds"]) == {21.5}


@pytest.mark.parametrize(("seconds", "status"), [(0.45, None), (0.46, "slower"), (0.2, None), (0.19, "faster")])
def test_time_is_a_multiple_of_full_precisions_in_the_same_run(
    table: Table, seconds: float, status: str | None
) -> None:
    results = measure(table)
    committed = records_of(results)
    pick(results, "repq_vit")["cost"]["forward_seconds"] = seconds
    for record in committed:  # a machine half as fast
        record["cost"] = {name: 2 * value for name, value in record["cost"].items()}
    frame = compare(results, committed, TOLERANCE)
    assert statuses(frame) == ({("Bundled ViT", "forward"): status} if status else {})
    assert count(frame)["regressions"] == (status == "slower")


def test_two_models_have_their_own_references(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)
    for method in (FULL_PRECISION, "repq_vit"):  # one model takes ten times as long, whatever the method
        for name, value in pick(results, method, "bundled_swin")["cost"].items():
            pick(results, method, "bundled_swin")["cost"][name] = 10 * value
    assert statuses(compare(results, committed, TOLERANCE)) == {}
    pick(results, FULL_PRECISION, "bundled_swin")["cost"]["forward_seconds"] = 0.1
    assert statuses(compare(results, committed, TOLERANCE)) == {
        ("Bundled Swin", "forward"): "slower",
        ("Bundled Swin", "calibration"): "slower",
    }


@pytest.mark.parametrize(
    ("before", "now", "status"),
    [
        (0.1 * CALIBRATION_FLOOR, 0.01 * CALIBRATION_FLOOR, None),
        (0.1 * CALIBRATION_FLOOR, 1.0 * CALIBRATION_FLOOR, None),
        (0.1 * CALIBRATION_FLOOR, 1.49 * CALIBRATION_FLOOR, None),
        (0.1 * CALIBRATION_FLOOR, 1.51 * CALIBRATION_FLOOR, "slower"),
        (2.0 * CALIBRATION_FLOOR, 2.9 * CALIBRATION_FLOOR, None),
        (2.0 * CALIBRATION_FLOOR, 3.1 * CALIBRATION_FLOOR, "slower"),
    ],
)
def test_short_calibrations_are_not_told_apart_but_long_ones_from_them(
    table: Table, before: float, now: float, status: str | None
) -> None:
    results = measure(table)
    record = pick(results, "repq_vit")
    record["cost"]["calibration_seconds"] = 0.1 * before
    committed = records_of(results)
    record["cost"]["calibration_seconds"] = 0.1 * now
    frame = compare(results, committed, TOLERANCE)
    assert statuses(frame) == ({("Bundled ViT", "calibration"): status} if status else {})


def test_time_has_changed_only_if_it_has_for_every_seed() -> None:
    results = measure(choose("1", "repq_vit", seeds=(0, 1, 2)))
    committed = records_of(results)
    for seed in (0, 1):
        pick(results, "repq_vit", seed=seed)["cost"]["forward_seconds"] = 0.6
    assert statuses(compare(results, committed, TOLERANCE)) == {}
    pick(results, "repq_vit", seed=2)["cost"]["forward_seconds"] = 0.5
    frame = compare(results, committed, TOLERANCE)
    assert list(frame[frame["status"] == "slower"]["change"]) == pytest.approx([2.0, 2.0, 5 / 3])
    assert count(frame)["regressions"] == 3


@pytest.mark.parametrize(("processor", "first"), [("a", "worse"), ("b", None)])
def test_on_another_processor_a_metric_has_moved_only_if_it_has_for_every_seed(
    processor: str, first: str | None
) -> None:
    results = measure(choose("1", "repq_vit", seeds=(0, 1)))
    for _, entries in results:
        for _, record in entries:
            assert record is not None
            record["environment"]["processor"] = "a"
    committed = records_of(results)
    for seed in (0, 1):
        pick(results, "repq_vit", seed=seed)["environment"]["processor"] = processor
    pick(results, "repq_vit", seed=0)["metrics"]["top1"] = 75.0
    moved = {} if first is None else {("Bundled ViT", "top1"): first}
    assert statuses(compare(results, committed, TOLERANCE)) == moved
    pick(results, "repq_vit", seed=1)["metrics"]["top1"] = 85.0  # the other way
    assert count(compare(results, committed, TOLERANCE))["regressions"] == len(moved)
    pick(results, "repq_vit", seed=1)["metrics"]["top1"] = 79.0
    frame = compare(results, committed, TOLERANCE)
    assert list(frame[frame["status"] == "worse"]["change"]) == [-5.0, -1.0]


def test_metrics_of_other_seeds_are_not_mixed() -> None:
    results = measure(choose("1", "repq_vit", seeds=(0, 1)))
    for seed, value in ((0, 70.0), (1, 75.0)):
        pick(results, "repq_vit", seed=seed)["metrics"]["top1"] = value
    committed = records_of(results)
    assert statuses(compare(results, committed, TOLERANCE)) == {}
    seeds = measure(choose("1", "repq_vit", seeds=(2,)))
    frame = compare(seeds, committed, TOLERANCE)
    assert set(frame[frame["status"] == "new"]["seed"]) == {2}
    assert count(frame) == {"cells": 4, "moved": 0, "regressions": 0, "new": 2, "gone": 0}


def test_times_of_other_numbers_of_threads_are_not_compared_and_it_is_said(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)
    pick(results, "repq_vit")["environment"]["threads"] = 2
    pick(results, "repq_vit")["cost"]["forward_seconds"] = 9.0
    frame = compare(results, committed, TOLERANCE)
    assert set(statuses(frame).values()) == {"not compared"}
    assert count(frame)["moved"] == 0
    assert "Times of 1 cell not compared" in render(frame, TOLERANCE)


def test_times_without_a_reference_are_not_compared(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)
    frame = compare(drop(results, FULL_PRECISION), committed, TOLERANCE)
    assert statuses(frame) == {
        ("Bundled ViT", ""): "failed",
        ("Bundled ViT", "forward"): "not compared",
        ("Bundled ViT", "calibration"): "not compared",
    }
    old = [{name: value for name, value in record.items() if name != "cost"} for record in committed]
    assert set(statuses(compare(results, old, TOLERANCE)).values()) == {"not compared"}


@pytest.mark.parametrize("known", [True, False])
def test_a_failed_cell_is_a_regression_whether_it_was_known_or_not(table: Table, known: bool) -> None:
    results = measure(table)
    committed = [record for record in records_of(results) if known or record["config"]["method"] == FULL_PRECISION]
    frame = compare(drop(results, "repq_vit"), committed, TOLERANCE)
    assert statuses(frame)["Bundled ViT", ""] == "failed"
    assert count(frame)["regressions"] == 1


def test_new_and_gone_cells_are_said_and_no_regressions(table: Table) -> None:
    results = measure(table)
    committed = records_of(measure(choose("1", "base_ptq")))
    frame = compare(results, committed, TOLERANCE, whole=True)
    assert count(frame) == {"cells": 4, "moved": 0, "regressions": 0, "new": 2, "gone": 2}
    text = render(frame, TOLERANCE)
    assert text.endswith("4 cells, 0 moved, 0 regressions, 2 new, 2 gone (tolerance: accuracy 0.3 points, time ×1.5)\n")
    assert "RepQ-ViT" in text
    assert "Base PTQ" in text
    # Of a part, what else there is says nothing.
    assert count(compare(results, committed, TOLERANCE))["gone"] == 0


def test_cells_that_tables_share_are_compared_once() -> None:
    tables = [choose("1", "adfq_vit"), choose("4", "ppoq_slq_amo", "ppoq"), choose("5", "adfq_vit")]
    results = measure(*tables)
    frame = compare(results, records_of(results), TOLERANCE, whole=True)
    assert not frame.duplicated(["id", "quantity"]).any()
    # Two models under full precision and ADFQ-ViT, and one row of table 4 alone.
    assert count(frame)["cells"] == 2 * 2 + 1
    assert statuses(frame) == {}


def test_of_two_records_of_a_cell_the_one_finished_last_counts(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)
    outdated = [{**record, "metrics": {"top1": 10.0}, "finished": "2025-01-01"} for record in committed]
    assert statuses(compare(results, [*committed, *outdated], TOLERANCE)) == {}


@pytest.mark.parametrize("what", ["weights", "data"])
def test_other_weights_or_data_are_said(table: Table, what: str) -> None:
    results = measure(table)
    committed = records_of(results)
    committed[0]["provenance"][what] = "other"
    assert "1 cell measured with other weights or data" in render(compare(results, committed, TOLERANCE), TOLERANCE)
    del committed[0]["provenance"][what]
    assert "weights or data" not in render(compare(results, committed, TOLERANCE), TOLERANCE)


def test_what_moved_is_a_markdown_table(table: Table) -> None:
    results = measure(table)
    committed = records_of(results)
    pick(results, "repq_vit")["metrics"]["top1"] = 78.5
    pick(results, "repq_vit", "bundled_swin")["cost"]["forward_seconds"] = 0.9
    text = render(compare(results, committed, TOLERANCE), TOLERANCE)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:4]]
    assert lines[0] == ["Model", "Method", "W/A", "Seed", "What", "Committed", "Now", "Change", "Status"]
    assert lines[2] == ["Bundled ViT", "RepQ-ViT", "W3/A3", "0", "top1", "80.00", "78.50", "-1.50", "worse"]
    assert lines[3] == ["Bundled Swin", "RepQ-ViT", "W3/A3", "0", "forward", "×3.00", "×9.00", "×3.00", "slower"]
    assert text.splitlines()[-1].startswith("4 cells, 2 moved, 2 regressions (")


@pytest.fixture
def read_back() -> Callable[[pd.DataFrame], dict[tuple[str, str], Any]]:
    def read(frame: pd.DataFrame) -> dict[tuple[str, str], Any]:
        (suite,) = JUnitXml.fromstring(to_junit(frame).tostring().decode())
        cases = {(case.classname, case.name): case for case in suite}
        assert (suite.tests, suite.failures, suite.skipped) == (
            len(cases),
            sum(isinstance(result, Failure) for case in cases.values() for result in case.result),
            sum(isinstance(result, Skipped) for case in cases.values() for result in case.result),
        )
        return cases

    return read


def test_junit_has_a_case_a_cell_with_the_numbers(
    table: Table, read_back: Callable[[pd.DataFrame], dict[tuple[str, str], Any]]
) -> None:
    results = measure(table)
    committed = records_of(results)
    record = pick(results, "repq_vit")
    record["metrics"]["top1"], record["cost"]["forward_seconds"] = 78.5, 0.9
    cases = read_back(compare(results, committed, TOLERANCE))
    assert len(cases) == 4
    case = cases["classification.Bundled ViT", "RepQ-ViT, W3/A3, seed 0"]
    assert case.time == 21.5
    (failure,) = case.result
    assert isinstance(failure, Failure)
    assert failure.text.splitlines() == [
        "top1 worse: 78.50, committed 80.00 (-1.50)",
        "forward slower: ×9.00, committed ×3.00 (×3.00)",
    ]
    assert cases["classification.Bundled Swin", "RepQ-ViT, W3/A3, seed 0"].is_passed


def test_junit_of_failed_new_and_gone_cells(
    table: Table, read_back: Callable[[pd.DataFrame], dict[tuple[str, str], Any]]
) -> None:
    committed = records_of(measure(choose("1", "base_ptq")))
    cases = read_back(compare(drop(measure(table), "repq_vit"), committed, TOLERANCE, whole=True))
    assert {key: type(case.result[0]) for key, case in cases.items() if case.result} == {
        ("classification.Bundled ViT", "RepQ-ViT, W3/A3, seed 0"): Failure,
        ("classification.Bundled Swin", "RepQ-ViT, W3/A3, seed 0"): Skipped,
        ("classification.bundled_vit", "Base PTQ, W3/A3, seed 0"): Skipped,
        ("classification.bundled_swin", "Base PTQ, W3/A3, seed 0"): Skipped,
    }
