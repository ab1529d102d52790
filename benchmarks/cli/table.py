"""``adfq table``: measures and prints tables."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from benchmarks.cli.measure import add_measuring, add_out, create_folder, measure, write_text
from benchmarks.cli.options import Commands, select
from benchmarks.plan import make_plan
from benchmarks.report.tables import STYLES


def add(commands: Commands) -> None:
    """Add the command."""
    table = commands.add_parser("table", help="measure and print tables, the paper's or your own")
    table.set_defaults(action=_print_tables)
    table.add_argument("names", nargs="+", metavar="NAME", help="'adfq list tables', or a file of your own, FILE.toml")
    table.add_argument("--format", choices=STYLES, default="md", help="default: %(default)s")
    add_out(table)
    add_measuring(table)


def _print_tables(options: argparse.Namespace) -> int:
    plan = make_plan(options.names, select(options))
    out = options.out or options.store
    create_folder(out)
    gap, failed = "", False
    for results in measure(plan, options):
        text = results.render(options.format)
        write_text(out / f"{results.table.slug}.{STYLES[options.format]}", text)
        tqdm.write(f"{gap}{text}", file=sys.stdout, end="")  # past the bar of the tables to come
        sys.stdout.flush()  # a pipe would hold the table back until the next one
        gap, failed = "\n", failed or results.count("failed") > 0
    return int(failed)
