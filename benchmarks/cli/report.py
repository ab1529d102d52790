"""``adfq report``: everything that was measured, as a page, in Markdown and in LaTeX."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from adfq.errors import AdfqError
from benchmarks.cli.measure import Measured, add_measuring, measure_tables, write_text
from benchmarks.cli.options import Commands, command_line
from benchmarks.plan import table_names
from benchmarks.report.page import Figure, Report, render_report
from benchmarks.report.tables import summarize, tabulate_results


def add(commands: Commands) -> None:
    report = commands.add_parser("report", help="measure tables and write them as a page, in Markdown and in LaTeX")
    report.set_defaults(action=_report)
    report.add_argument("names", nargs="*", metavar="NAME", help="'adfq list tables' (default: all with that profile)")
    report.add_argument(
        "--figures", type=Path, nargs="+", default=(), metavar="FILE", help="what 'adfq figure' has drawn, to show too"
    )
    add_measuring(report, out="runs")


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report.figures import style  # matplotlib takes its time

    for file in options.figures:
        if file.suffix.lower() not in style.SUFFIXES or not file.is_file():
            raise AdfqError(f"there is no figure {file}; figures are {' or '.join(style.SUFFIXES)}")
    names = options.names or table_names(options.profile)
    measured = list(measure_tables(names, options))
    report = Report.create(measured, command_line)
    figures = [*_draw(measured, options.out), *(Figure(file.stem, file.stem, file) for file in options.figures)]
    for name, text in render_report(report, options.out, figures).items():
        write_text(options.out / name, text)
        print(options.out / name)
    return int(report.failed > 0)


def _draw(measured: Sequence[Measured], directory: Path) -> Iterator[Figure]:
    """The figures that records are enough for: a table's first optimized cell, and what its methods cost."""
    from benchmarks.report.figures import accuracy_cost, reconstruction

    for table, results in measured:
        name = f"table{table.name}-{table.profile}"
        optimized = [(entry, record) for entry, record in results if record and record.get("report", {}).get("modules")]
        for entry, record in optimized[:1]:
            file = directory / f"{name}-reconstruction.png"
            reconstruction.draw_reconstruction(reconstruction.collect_reconstruction(record["report"]), file)
            what = f"{entry.row.label} at {entry.cell.bits} on {entry.model.label}, seed {entry.cell.seed}"
            text = f"Error of each module before and after optimization: {what}."
            yield Figure(f"Optimization, table {table.name}", text, file)
        if table.cost and any(record and record.get("cost") for _, record in results):
            file = directory / f"{name}-accuracy-cost.png"
            summary = summarize(table, tabulate_results(table, results))
            first = summary[summary["model"] == table.models[0].key]
            accuracy_cost.draw_accuracy_cost(table, first, file)
            what = f"Accuracy of each row on {table.models[0].label} over what it costs, with the spread over seeds."
            yield Figure(f"Accuracy and cost, table {table.name}", what, file)
