"""``adfq table``: measures and prints tables."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from adfq.errors import AdfqError
from benchmarks.cli.measure import add_measuring, add_out, create_folder, measure, write_text
from benchmarks.cli.options import Commands, select
from benchmarks.plan import Plan, make_plan
from benchmarks.report.tables import STYLES


def add(commands: Commands) -> None:
    """Add the command."""
    table = commands.add_parser("table", help="measure and print tables, the paper's or your own")
    table.set_defaults(action=_print_tables)
    table.add_argument("names", nargs="+", metavar="NAME", help="'adfq list tables', or a file of your own, FILE.toml")
    table.add_argument("--format", choices=STYLES, default="md", help="default: %(default)s")
    table.add_argument(
        "--dry-run",
        action="store_true",
        help="say how many cells and images there are, and how much memory, disk and time they take; measure nothing",
    )
    table.add_argument("--json", action="store_true", help="the forecast of --dry-run as one JSON object")
    add_out(table)
    add_measuring(table)


def _print_tables(options: argparse.Namespace) -> int:
    from benchmarks.tasks.shared import check_place

    plan = make_plan(options.names, select(options))
    if options.dry_run:
        return _print_forecast(plan, options)
    if options.json:
        raise AdfqError("--json is for the forecast of --dry-run; --format csv gives a table as data")
    out = options.out or options.store
    create_folder(out)
    places = [out / f"{planned.table.slug}.{STYLES[options.format]}" for planned in plan.tables]
    for place in places:
        check_place(place)
    gap, failed = "", False
    for results, place in zip(measure(plan, options), places, strict=True):
        text = results.render(options.format)
        write_text(place, text)
        tqdm.write(f"{gap}{text}", file=sys.stdout, end="")  # past the bar of the tables to come
        sys.stdout.flush()  # a pipe would hold the table back until the next one
        gap, failed = "\n", failed or results.count("failed") > 0
    return int(failed)


def _print_forecast(plan: Plan, options: argparse.Namespace) -> int:
    """Print the forecast of a plan; return 2 if it has cells that cannot be measured at all."""
    from benchmarks.report.forecast import render_forecast
    from benchmarks.run.forecast import forecast
    from benchmarks.run.runner import resolve_device

    if options.executor != "local":
        raise AdfqError("--dry-run tries methods on this machine; leave --executor out")
    found = forecast(plan, options.store, resolve_device(options.device), options.jobs)
    print(json.dumps(found.to_json()) if options.json else render_forecast(found))
    return 2 if found.refusals else 0
