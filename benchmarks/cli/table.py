"""``adfq table``: measures and prints the paper's tables."""

from __future__ import annotations

import argparse

from benchmarks.cli.measure import add_measuring, measure_tables, write_text
from benchmarks.cli.options import Commands
from benchmarks.report.tables import STYLES, render, tabulate_results


def add(commands: Commands) -> None:
    table = commands.add_parser("table", help="measure and print tables of the paper")
    table.set_defaults(action=_print_tables)
    table.add_argument("names", nargs="+", metavar="NAME", help="'adfq list tables'")
    table.add_argument("--format", choices=STYLES, default="md")
    add_measuring(table, out="runs")


def _print_tables(options: argparse.Namespace) -> int:
    gap, failed = "", False
    for table, results in measure_tables(options.names, options):
        text = render(table, tabulate_results(table, results), options.format)
        write_text(options.out / f"table{table.name}-{table.profile}.{STYLES[options.format]}", text)
        print(gap, text, sep="", end="")
        gap, failed = "\n", failed or any(record is None for _, record in results)
    return int(failed)
