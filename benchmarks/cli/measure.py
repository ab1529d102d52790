"""What the commands that measure tables share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from adfq.errors import AdfqError
from benchmarks.cli.options import Parser, add_common, add_table, choose_part, table_entries
from benchmarks.plan import Entry, Table, load_table
from benchmarks.run.console import warn
from benchmarks.run.executors.local import Executor, create_local_executor
from benchmarks.run.executors.ray import RayExecutor
from benchmarks.run.runner import resolve_device
from benchmarks.run.scheduler import run_cells, summarize_warnings
from benchmarks.run.store import Record, ResultStore

#: A table with its cells in order, and the record of each; None where measuring has failed.
Measured = tuple[Table, list[tuple[Entry, Record | None]]]


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
        "--jobs",
        type=_count,
        metavar="N",
        help="cells at once, each in a process of its own (default: one a GPU; on a CPU one a core where models are "
        "small); 0 measures them in this process, for debuggers",
    )
    parser.add_argument(
        "--executor", choices=["local", "ray"], default="local", help="where cells run (default: local)"
    )
    parser.add_argument(
        "--address", help="of the Ray cluster (default: RAY_ADDRESS, or else one of this machine alone is started)"
    )
    add_table(parser)
    add_common(parser)


def measure_tables(names: Sequence[str], options: argparse.Namespace) -> Iterator[Measured]:
    """Measures what the store does not have yet, table after table.

    Raises:
        AdfqError: for the user's mistakes, before anything is measured where they can be seen.
    """
    tables = [choose_part(load_table(name, options.profile), options) for name in names]
    if options.data and len({table.task for table in tables}) > 1:
        raise AdfqError("tables of different tasks need different data: regenerate them one after the other")
    device = resolve_device(options.device)
    every = [(table, table_entries(table, options)) for table in tables]
    store = ResultStore(options.out)
    for table, entries in every:
        executor = _create_executor(options, device, table)
        try:
            # Tables end with what takes longest: it comes first, lest the other cores wait for it at last.
            outcomes = dict(run_cells([entry.cell for entry in reversed(entries)], store, executor))
        finally:
            executor.close()
        if said := summarize_warnings(outcomes.values()):
            warn(f"table {table.name}: {said}")
        yield table, [(entry, outcomes[entry.cell]) for entry in entries]


def _create_executor(options: argparse.Namespace, device: torch.device, table: Table) -> Executor:
    if options.executor == "ray":
        if options.jobs is not None:
            raise AdfqError("a Ray cluster runs as many cells as it has room for; leave --jobs out")
        return RayExecutor(device, table.cell_memory, options.address)
    if options.address is not None:
        raise AdfqError("--address is that of a Ray cluster; add --executor ray")
    return create_local_executor(device, options.jobs, table.cell_memory)


def write_text(path: Path, text: str) -> None:
    """Writes a file; AdfqError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdfqError(f"cannot write {path}: {error.strerror}") from None


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
