"""``adfq report``: everything that was measured, as a page, in Markdown and in LaTeX."""

from __future__ import annotations

import argparse

from benchmarks.commands.measure import add_measuring, measure_tables, write_text
from benchmarks.commands.options import Commands, command_line
from benchmarks.reports.page import Report, render_report
from benchmarks.reports.spec import table_names


def add(commands: Commands) -> None:
    report = commands.add_parser("report", help="measure tables and write them as a page, in Markdown and in LaTeX")
    report.set_defaults(action=_report)
    report.add_argument("names", nargs="*", metavar="NAME", help="'adfq list tables' (default: all with that profile)")
    add_measuring(report, out="runs")


def _report(options: argparse.Namespace) -> int:
    names = options.names or table_names(options.profile)
    report = Report.create(measure_tables(names, options), command_line)
    for name, text in render_report(report, options.out).items():
        write_text(options.out / name, text)
        print(options.out / name)
    return int(report.failed > 0)
