"""``adfq figure accuracy-bits`` and ``accuracy-cost``: figures of a table's records."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.cli.measure import add_measure, add_measuring, any_failed, find_results
from benchmarks.cli.options import Parser, select
from benchmarks.plan import make_plan
from benchmarks.report.tables import summarize

#: Names of `benchmarks.report.figures.accuracy_cost.COSTS`, which matplotlib would be loaded for.
COSTS = ("forward", "size", "calibration")


def add_kinds(add_kind: Callable[..., Parser]) -> None:
    """Add both kinds."""
    bits = add_kind("accuracy-bits", _draw_accuracy_bits, "accuracies of tables' methods over bit-widths, by model")
    bits.add_argument(
        "--table", nargs="+", default=["1"], metavar="NAME", help="'adfq list tables', or FILE.toml (default: 1)"
    )
    cost = add_kind("accuracy-cost", _draw_accuracy_cost, "a table's accuracies over what they cost")
    cost.add_argument("--table", default="5", metavar="NAME", help="'adfq list tables', or FILE.toml (default: 5)")
    cost.add_argument("--costs", nargs="+", choices=COSTS, default=COSTS, help="a panel each (default: all)")
    for kind in (bits, cost):
        add_measure(kind)
        add_measuring(kind)


def _draw_accuracy_bits(options: argparse.Namespace) -> int:
    from benchmarks.report.figures import accuracy_bits, style  # matplotlib takes its time

    style.check_file(options.file)
    measured = find_results(make_plan(options.table, select(options), options.measure), options)
    summaries = [(results.table, summarize(results.table, results.to_frame())) for results in measured]
    accuracy_bits.draw_accuracy_bits(accuracy_bits.collect_panels(summaries), options.file)
    print(options.file)
    return int(any_failed(measured))


def _draw_accuracy_cost(options: argparse.Namespace) -> int:
    from benchmarks.report.figures import accuracy_cost, style

    style.check_file(options.file)
    (results,) = find_results(make_plan([options.table], select(options), options.measure), options)
    summary = summarize(results.table, results.to_frame())
    accuracy_cost.draw_accuracy_cost(results.table, summary, options.file, options.costs)
    print(options.file)
    return int(any_failed([results]))
