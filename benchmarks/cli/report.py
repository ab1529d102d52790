"""``adfq report``: the records of tables as a page, in Markdown and in LaTeX."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from adfq.errors import AdfqError
from benchmarks.cli.command_line import command_line
from benchmarks.cli.measure import (
    add_measure,
    add_measuring,
    add_out,
    any_failed,
    create_folder,
    find_results,
    write_text,
)
from benchmarks.cli.options import Commands, select
from benchmarks.plan import Entry, make_plan
from benchmarks.report.page import Figure, Report, render_report
from benchmarks.report.tables import summarize
from benchmarks.run.plans import TableResults, status_of
from benchmarks.run.store import Record, ResultStore


def add(commands: Commands) -> None:
    """Add the command."""
    report = commands.add_parser(
        "report",
        help="write the records of tables as a page, in Markdown and in LaTeX",
        description="Writes tables as one page that needs nothing else, as Markdown and as LaTeX, from the records of "
        "a store. Cells without a record stay empty, unless --measure is given.",
    )
    report.set_defaults(action=_report)
    report.add_argument(
        "names", nargs="*", metavar="NAME", help="'adfq list tables', or FILE.toml (default: all with that profile)"
    )
    report.add_argument(
        "--figures", type=Path, nargs="+", default=(), metavar="FILE", help="pictures of 'adfq figure', to show too"
    )
    add_out(report)
    add_measure(report)
    add_measuring(report)


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report.figures import style  # matplotlib takes its time

    for file in options.figures:
        if file.suffix.lower() not in style.SUFFIXES or not file.is_file():
            raise AdfqError(f"there is no figure {file}; figures are {' or '.join(style.SUFFIXES)}")
    plan = make_plan(options.names, select(options), check_files=options.measure)
    out = options.out or options.store
    if options.measure:
        create_folder(out)  # now, and not after hours
    measured = find_results(plan, options)
    create_folder(out)
    figures = [*_draw(measured, out), *(Figure(file.stem, file.stem, file) for file in options.figures)]
    exports = ResultStore(options.store, create=False).read_exports()
    for name, text in render_report(Report.create(measured, command_line, exports), out, figures).items():
        write_text(out / name, text)
        print(out / name)
    return int(any_failed(measured))


def _draw(measured: Sequence[TableResults], folder: Path) -> Iterator[Figure]:
    """Draw the figures for which records are enough: accuracy over bits; of a table, errors of modules, and costs."""
    from benchmarks.report.figures import accuracy_bits, accuracy_cost, reconstruction

    summaries = [(results.table, summarize(results.table, results.to_frame())) for results in measured]
    panels = accuracy_bits.collect_panels(summaries)
    if panels:
        file = folder / "accuracy-bits.png"
        accuracy_bits.draw_accuracy_bits(panels, file)
        text = f"Accuracy of each method over bit-widths: {', '.join(panel.title for panel in panels)}."
        yield Figure("Accuracy over bit-widths", text, file, opening=True)
    drawn = set()
    for (table, results), (_, summary) in zip(measured, summaries, strict=True):
        for entry, record in _first_optimized(results):
            if entry.cell.model in drawn:
                continue
            drawn.add(entry.cell.model)
            file = folder / f"{table.slug}-reconstruction.png"
            reconstruction.draw_reconstruction(reconstruction.collect_reconstruction(record["report"]), file)
            what = f"{entry.row.label} at {entry.cell.bits} on {entry.model.label}, seed {entry.cell.seed}"
            text = f"Error of each module before and after optimization: {what}."
            yield Figure(f"Optimization, table {table.name}", text, file)
        if (table.cost or table.training) and accuracy_cost.is_drawable(summary):
            file = folder / f"{table.slug}-accuracy-cost.png"
            costs = tuple(accuracy_cost.COSTS) if table.cost else ("calibration",)
            accuracy_cost.draw_accuracy_cost(table, summary, file, costs)
            what = "Accuracy of each row over its cost, with the spread over seeds."
            yield Figure(f"Accuracy and cost, table {table.name}", what, file)


def _first_optimized(results: Sequence[tuple[Entry, Record | None]]) -> list[tuple[Entry, Record]]:
    """Return the first cell of a table whose record has errors of optimized modules, if there is one."""
    found = (
        (entry, outcome)
        for entry, outcome in results
        if outcome and status_of(outcome) == "measured" and outcome.get("report", {}).get("modules")
    )
    return list(islice(found, 1))
