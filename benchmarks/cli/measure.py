"""Options and steps of the commands that measure or read tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from adfq.errors import AdfqError
from benchmarks.cli.options import Parser, add_common, add_table
from benchmarks.plan import Plan
from benchmarks.run.plans import TableResults, read_plan, run_plan

if TYPE_CHECKING:
    from benchmarks.run.executors.local import Executor


def add_measuring(parser: Parser, store: str = "runs") -> None:
    """Add the options of the store, of measuring, and of the cells.

    Args:
        parser: parser of a command.
        store: the default of ``--store``.
    """
    add_store(parser, store)
    parser.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="cells at once, each in a process of its own (default: one a GPU; on a CPU one a core where models are "
        "small); 0 measures them in this process, for debuggers",
    )
    parser.add_argument(
        "--executor", choices=["local", "ray"], default="local", help="place of the work (default: local)"
    )
    parser.add_argument(
        "--address",
        help="address of the Ray cluster (default: RAY_ADDRESS, or else one of this machine alone is started)",
    )
    add_table(parser)
    add_common(parser)


def add_store(parser: Parser, default: str = "runs") -> None:
    """Add --store."""
    parser.add_argument(
        "--store", type=Path, default=Path(default), metavar="DIR", help=f"folder of the records (default: {default})"
    )


def add_out(parser: Parser) -> None:
    """Add --out, which is for files made from records."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of what is written, created if need be (default: the store's)"
    )


def add_measure(parser: Parser) -> None:
    """Add --measure, for commands that only read a store without it."""
    parser.add_argument("--measure", action="store_true", help="measure the cells that the store has no record of")


def find_results(plan: Plan, options: argparse.Namespace) -> list[TableResults]:
    """Return the tables of a plan as the store has them; with ``--measure``, measured where it does not.

    Raises:
        AdfqError: for a store without records, and for options of measuring without ``--measure``.
    """
    if options.measure:
        return list(measure(plan, options))
    given = [f"--{name}" for name in ("jobs", "address") if getattr(options, name) is not None]
    given += ["--executor"] * (options.executor != "local")
    if given:
        raise AdfqError(f"nothing is measured without --measure: add it, or leave {', '.join(given)} out")
    return read_plan(plan, options.store)


def measure(plan: Plan, options: argparse.Namespace) -> Iterator[TableResults]:
    """Measure a plan as the options of `add_measuring` say, and yield its tables one by one."""
    with closing(_create_executor(plan, options)) as executor:
        yield from run_plan(plan, options.store, executor)


def _create_executor(plan: Plan, options: argparse.Namespace) -> Executor:
    from benchmarks.run.executors.local import create_local_executor
    from benchmarks.run.executors.ray import RayExecutor
    from benchmarks.run.runner import resolve_device

    device = resolve_device(options.device)
    if options.executor == "ray":
        if options.jobs is not None:
            raise AdfqError("a Ray cluster runs as many cells as it has room for; leave --jobs out")
        return RayExecutor(device, plan.cell_memory, options.address)
    if options.address is not None:
        raise AdfqError("--address is that of a Ray cluster; add --executor ray")
    return create_local_executor(device, options.jobs, plan.cell_memory)


def any_failed(results: Iterable[TableResults]) -> bool:
    """Return whether a cell of any table has failed."""
    return any(table.count("failed") for table in results)


def create_folder(folder: Path) -> None:
    """Create a folder for files where it does not exist.

    Raises:
        AdfqError: if it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdfqError(f"cannot write to {folder}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        AdfqError: if it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdfqError(f"cannot write {path}: {error.strerror}") from None


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
