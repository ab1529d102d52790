"""Comparison of what was measured with records of the same cells measured before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from adfq.registry import method_label
from benchmarks.metrics import find_metric
from benchmarks.plan import Entry, Table
from benchmarks.run.plans import TableResults, config_key, newest, status_of
from benchmarks.run.store import Record

#: Calibration, in forwards of full precision, below which its time is not told apart: that of a small model takes a
#: few tenths of a second, and what else the machine does in them decides how long.
CALIBRATION_FLOOR = 50.0

#: Statuses of regressions, of other moves, and of cells that could not be compared.
REGRESSIONS = ("worse", "slower", "failed")
IMPROVEMENTS = ("better", "faster")
ABSENT = ("new", "gone")

_TIMES = ("forward", "calibration")


@dataclass(frozen=True)
class Tolerance:
    """The largest changes that are no regressions.

    Attributes:
        accuracy: largest loss of a metric in its unit: points of those in %.
        time: factor by which a time, over full precision's forward pass in the same run, may grow.
    """

    accuracy: float = 0.3
    time: float = 1.5

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:g} points, time ×{self.time:g}"


def compare(
    measured: Iterable[TableResults | tuple[Table, Sequence[tuple[Entry, Record | None]]]],
    committed: Iterable[Record],
    tolerance: Tolerance,
    whole: bool = False,
) -> pd.DataFrame:
    """Compare cell by cell; cells are the same if their configurations are.

    Metrics are compared in their unit and direction (`benchmarks.metrics`). Times are compared as multiples of full
    precision's forward pass, of the same model in the same run, and never in seconds: ``forward``, and ``calibration``,
    which counts as `CALIBRATION_FLOOR` where it is shorter. A time has changed only if it has for all seeds of its
    cell: the seed does not decide how long anything takes, and other work on the machine seldom meets every one. So has
    a metric on another processor than the committed one's, whose rounding moves single seeds either way. Times
    measured with other numbers of threads are ``"not compared"``, for more threads speed full precision up more than
    they do simulated quantization.

    Args:
        measured: tables with their cells and outcomes (`TableResults`); one that stands in several is compared once. A
            cell without a record, or whose method is not applicable, is compared only where it has a committed record.
        committed: records to compare with; the record of a cell that was finished last counts.
        tolerance: largest changes that are no regressions.
        whole: True if these are all cells that `committed` should have, so that others of it are ``"gone"``; False by
            default.

    Returns:
        One row a cell and quantity: ``id``, ``task``, ``model`` and ``row`` with their labels, ``bits``, ``seed``,
        ``quantity`` (a metric, ``"forward"`` or ``"calibration"``; empty where the whole cell is meant), ``before``,
        ``now``, ``change`` (points, or the factor of a time), ``status`` (``"same"``, one of `REGRESSIONS`,
        `IMPROVEMENTS`, `ABSENT`, or ``"not compared"``), ``seconds`` that measuring the cell took, and ``other``:
        whether weights or data are known to differ from the committed record's.
    """
    before = newest(committed)
    cells: dict[str, tuple[Entry, Record | None, dict[str, None]]] = {}
    for table, results in measured:
        for entry, record in results:
            first, _, metrics = cells.setdefault(entry.cell.id, (entry, record, {}))
            metrics.update(dict.fromkeys(table.metrics))
            cells[entry.cell.id] = first, record, metrics
    rows: list[dict[str, Any]] = []
    for entry, record, metrics in cells.values():
        old = before.get(config_key(entry.cell.config))
        elsewhere = _environment(old, "processor") != _environment(record, "processor")
        cell = {**_describe(entry), "seconds": _seconds(record), "other": _differ(old, record), "elsewhere": elsewhere}
        status = status_of(record)
        if status in ("n/a", "missing") and old is None:
            continue
        if record is None or status != "measured" or old is None:
            rows.append({**cell, "quantity": "", "status": "new" if status == "measured" else "failed"})
            continue
        rows += [{**cell, **row} for row in _compare_metrics(metrics, old, record, tolerance)]
        reference = entry.cell.in_full_precision
        if reference.id != entry.cell.id:
            new_reference = cells[reference.id][1] if reference.id in cells else None
            of_old, of_new = _times(old, before.get(config_key(reference.config))), _times(record, new_reference)
            comparable = _environment(old, "threads") == _environment(record, "threads")
            rows += [{**cell, **row} for row in _compare_times(of_old, of_new, comparable)]
    if whole:
        there = {config_key(entry.cell.config) for entry, _, _ in cells.values()}
        rows += [_gone(record["config"]) for key, record in before.items() if key not in there]
    columns = [*_COLUMNS, "configuration", "elsewhere"]
    frame = pd.DataFrame(rows, columns=columns)
    _judge_metrics(frame)
    _judge_times(frame, tolerance)
    return frame[list(_COLUMNS)]


_COLUMNS = (
    *("id", "task", "model", "row", "bits", "seed", "quantity", "before", "now", "change", "status", "seconds"),
    "other",
)


def _describe(entry: Entry) -> dict[str, Any]:
    cell = entry.cell
    names = {"task": cell.task, "model": entry.model.label, "row": entry.row.label, "bits": cell.bits}
    return {"id": cell.id, **names, "seed": cell.seed, "configuration": replace(cell, seed=0).id}


def _gone(config: Mapping[str, Any]) -> dict[str, Any]:
    method = str(config.get("method"))
    names = {name: str(config.get(name)) for name in ("task", "model", "bits")}
    row = method_label(method)
    if arguments := config.get("method_arguments"):
        row += f" ({', '.join(f'{key}={value}' for key, value in arguments)})"
    cell = {"id": config_key(config), **names, "row": row, "seed": config.get("seed")}
    return {**cell, "quantity": "", "status": "gone", "other": False}


def _compare_metrics(names: Iterable[str], old: Record, new: Record, tolerance: Tolerance) -> Iterable[dict[str, Any]]:
    for name in names:
        before, now = (_number(record["metrics"].get(name)) for record in (old, new))
        # Rounded, for 91.3 - 91.0 is a little more than 0.3.
        change = round(now - before, 6)
        gain = find_metric(name).gain(0.0, change)
        status = "worse" if gain < -tolerance.accuracy else "better" if gain > tolerance.accuracy else "same"
        if math.isnan(change):
            status = "new" if math.isnan(before) else "failed"
        yield {"quantity": name, "before": before, "now": now, "change": change, "status": status}


def _times(record: Record, reference: Record | None) -> dict[str, float]:
    """Return times in forward passes of full precision; NaN for times that were not measured."""
    forward, calibration = (_cost(record, f"{name}_seconds") for name in _TIMES)
    unit = _cost(reference or {}, "forward_seconds") or math.nan
    floored = max(calibration / unit, CALIBRATION_FLOOR) if calibration == calibration else math.nan
    return {"forward": forward / unit, "calibration": floored if unit == unit else math.nan}


def _compare_times(old: Mapping[str, float], new: Mapping[str, float], comparable: bool) -> Iterable[dict[str, Any]]:
    for name in _TIMES:
        before, now = old[name], new[name]
        change = now / before if before > 0 else math.nan
        status = "same" if comparable and not math.isnan(change) else "not compared"
        yield {"quantity": name, "before": before, "now": now, "change": change, "status": status}


def _judge_metrics(frame: pd.DataFrame) -> None:
    """Count a metric on another processor as moved only if it has moved, the same way, for all seeds."""
    moved = frame[frame["elsewhere"].eq(True) & frame["status"].isin(("worse", "better", "same"))]
    for _, group in moved.groupby(["configuration", "quantity"]):
        if group["status"].nunique() > 1:
            frame.loc[group.index, "status"] = "same"


def _judge_times(frame: pd.DataFrame, tolerance: Tolerance) -> None:
    times = frame[frame["quantity"].isin(_TIMES) & (frame["status"] == "same")]
    for _, group in times.groupby(["configuration", "quantity"]):
        change = group["change"].astype(float).round(6)
        if change.min() > tolerance.time:
            frame.loc[group.index, "status"] = "slower"
        elif change.max() < 1 / tolerance.time:
            frame.loc[group.index, "status"] = "faster"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _cost(record: Mapping[str, Any], name: str) -> float:
    return _number((record.get("cost") or {}).get(name))


def _environment(record: Record | None, name: str) -> Any:
    return ((record or {}).get("environment") or {}).get(name)


def _seconds(record: Record | None) -> float:
    timing = (record or {}).get("timing", {})
    return sum(_number(value) for name, value in timing.items() if name != "loading")  # it is a part of evaluation


def _differ(old: Record | None, new: Record | None) -> bool:
    of_old, of_new = (((record or {}).get("provenance") or {}) for record in (old, new))
    return any(of_old[name] != of_new[name] for name in ("weights", "data") if name in of_old and name in of_new)


def count(frame: pd.DataFrame) -> dict[str, int]:
    """Count the cells by outcome.

    Args:
        frame: from `compare`.

    Returns:
        Numbers of ``cells``, of cells that ``moved`` by more than the tolerance for better or worse, of
        ``regressions``, of ``new`` cells, and of ``gone`` ones, which are not among the cells.
    """
    cells = frame.groupby("id", sort=False)["status"].agg(set)
    counts = {
        "cells": len(cells) - _having(cells, "gone"),
        "moved": _having(cells, *REGRESSIONS, *IMPROVEMENTS),
        "regressions": _having(cells, *REGRESSIONS),
    }
    whole = frame[frame["quantity"] == ""]
    return counts | {status: int((whole["status"] == status).sum()) for status in ABSENT}


def _having(cells: pd.Series[Any], *statuses: str) -> int:
    return sum(1 for found in cells if found & set(statuses))


def render(frame: pd.DataFrame, tolerance: Tolerance) -> str:
    """Return the comparison as Markdown that ends in a newline.

    It has a table of cells that moved, are new or gone, notes, and a last line with the counts.

    Args:
        frame: from `compare`.
        tolerance: tolerance of the comparison.
    """
    moved = frame[~frame["status"].isin(["same", "not compared"])]
    lines = [_line(row) for row in _rows(moved)]
    parts = []
    if lines:
        alignment = [*["left"] * 5, *["right"] * 3, "left"]
        parts.append(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True, colalign=alignment))
    if others := frame[frame["other"].astype(bool)]["id"].nunique():
        parts.append(
            f"{_cells(others)} measured with other weights or data than committed: differences may come from these."
        )
    if skipped := frame[frame["status"] == "not compared"]["id"].nunique():
        parts.append(
            f"Times of {_cells(skipped)} not compared: measured with other numbers of threads, or not measured."
        )
    counts = count(frame)
    line = f"{_cells(counts['cells'])}, {counts['moved']} moved, {counts['regressions']} regression"
    line += "" if counts["regressions"] == 1 else "s"
    line += "".join(f", {counts[status]} {status}" for status in ABSENT if counts[status])
    return "\n\n".join([*parts, f"{line} (tolerance: {tolerance})"]) + "\n"


def _cells(number: int) -> str:
    return f"{number} cell" if number == 1 else f"{number} cells"


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    before, now, change = _print(row)
    where = {"Model": row["model"], "Method": row["row"], "W/A": row["bits"], "Seed": row["seed"]}
    numbers = {"Committed": before, "Now": now, "Change": change}
    return {**where, "What": row["quantity"], **numbers, "Status": row["status"]}


def _print(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return before, now and change as text; empty for what is not there."""
    number = change = "×{:.2f}"
    if row["quantity"] and row["quantity"] not in _TIMES:
        digits = find_metric(row["quantity"]).digits
        number, change = f"{{:.{digits}f}}", f"{{:+.{digits}f}}"
    styles = {"before": number, "now": number, "change": change}
    before, now, by = ("" if pd.isna(row[name]) else style.format(row[name]) for name, style in styles.items())
    return before, now, by


def to_junit(frame: pd.DataFrame) -> JUnitXml:
    """Return the comparison as JUnit XML with a test case for each cell.

    A regression has failed; a cell with nothing to compare with is skipped.
    """
    suite = TestSuite("adfq regress")
    for _, cell in frame.groupby("id", sort=False):
        rows = _rows(cell)
        first = rows[0]
        name = f"{first['row']}, {first['bits']}, seed {first['seed']}"
        seconds = None if pd.isna(first["seconds"]) else round(float(first["seconds"]), 3)
        case = TestCase(name, f"{first['task']}.{first['model']}", seconds)
        messages = [_message(row) for row in rows if row["status"] in REGRESSIONS]
        if messages:
            failure = Failure("; ".join(messages), "regression")
            failure.text = "\n".join(messages)
            case.result = [failure]
        elif first["quantity"] == "" and first["status"] in ABSENT:
            missing = "among the committed records" if first["status"] == "new" else "among the tables' cells any more"
            case.result = [Skipped(f"{first['status']}: not {missing}")]
        suite.add_testcase(case)
    xml = JUnitXml("adfq regress")
    xml.add_testsuite(suite)
    return xml


def _message(row: Mapping[str, Any]) -> str:
    if row["quantity"] == "":
        return "the cell could not be measured"
    before, now, change = _print(row)
    if row["status"] == "failed":
        return f"{row['quantity']} is missing, committed {before}"
    return f"{row['quantity']} {row['status']}: {now}, committed {before} ({change})"
