"""What the commands that measure tables share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from adfq.errors import AdfqError
from benchmarks.commands.options import Parser, add_common, add_table, choose_part, positive, table_entries
from benchmarks.reports.spec import Entry, Table, load_table
from benchmarks.results import Record, ResultStore
from benchmarks.runner import resolve_device, run_cells


def add_measuring(parser: Parser, out: str, option: str = "--out") -> None:
    """The options of `measure_tables`; `out` is where records go by default, and `option` says where else."""
    parser.add_argument(
        option,
        dest="out",
        type=Path,
        default=Path(out),
        metavar="DIR",
        help=f"what is measured and made (default: {out})",
    )
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="cells at once (default: 1; one a core where models are small)"
    )
    add_table(parser)
    add_common(parser)


def measure_tables(
    names: Sequence[str], options: argparse.Namespace
) -> Iterator[tuple[Table, list[tuple[Entry, Record | None]]]]:
    """Measures what the store does not have yet, table after table.

    Yields:
        Each table with its cells in order, and the record of each; None where measuring has failed.

    Raises:
        AdfqError: for the user's mistakes, before anything is measured where they can be seen.
    """
    tables = [choose_part(load_table(name, options.profile), options) for name in names]
    if options.data and len({table.task for table in tables}) > 1:
        raise AdfqError("tables of different tasks need different data: regenerate them one after the other")
    device = resolve_device(options.device)
    every = [(table, table_entries(table, options)) for table in tables]
    for table, entries in every:
        jobs = options.jobs or (1 if device.type == "cuda" else table.jobs)
        results = run_cells([entry.cell for entry in entries], ResultStore(options.out), device, jobs)
        yield table, list(zip(entries, (record for _, record in results), strict=True))


def write_text(path: Path, text: str) -> None:
    """Writes a file; AdfqError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdfqError(f"cannot write {path}: {error.strerror}") from None
