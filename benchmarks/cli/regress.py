"""``adfq regress``: measures tables and says what has changed since results were committed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from adfq.errors import AdfqError
from benchmarks.cli.measure import add_measuring, measure_tables, write_text
from benchmarks.cli.options import Commands, choose_part, table_entries
from benchmarks.plan import load_table, table_names
from benchmarks.run.console import warn
from benchmarks.run.store import Record

# Of a table's part: with one of these, committed records of other cells are not gone.
_PART = ("models", "methods", "bits", "seeds", "data", "checkpoints", "calibration_size", "limit", "batch_size")
# What a record need not have to be compared.
_OPTIONAL = ("cost", "environment", "provenance")


def add(commands: Commands) -> None:
    regress = commands.add_parser(
        "regress",
        help="measure tables again and compare with committed results",
        description="Measures tables and compares each cell with a committed record of the same configuration. Exit "
        "code 1 for regressions: a metric that has lost more than the tolerance, a forward pass or a calibration "
        "(in forwards of full precision, for all seeds) that takes longer than the tolerance, a cell that fails.",
    )
    regress.set_defaults(action=_regress)
    regress.add_argument("names", nargs="*", metavar="NAME", help="tables (default: all that have the profile)")
    regress.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="folder with the committed records/*.json (default: results/PROFILE)",
    )
    regress.add_argument(
        "--tolerance",
        type=_tolerance,
        default={},
        metavar="accuracy=POINTS,time=FACTORx",
        help="either or both (default: accuracy=0.3,time=1.5x)",
    )
    regress.add_argument("--summary", type=Path, metavar="FILE", help="append what is printed, as Markdown")
    regress.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML with a test case a cell")
    add_measuring(regress, out="runs/regress")


def _regress(options: argparse.Namespace) -> int:
    from benchmarks.report import regression  # junitparser

    names = list(dict.fromkeys(options.names)) or table_names(options.profile)
    against = options.against or Path("results") / options.profile
    committed = _read_records(against)
    _check_overlap(names, options, committed, against)
    for path in filter(None, (options.summary, options.junit)):
        _make_parent(path)  # now, and not after hours

    tolerance = regression.Tolerance(**options.tolerance)
    whole = not options.names and all(getattr(options, name) is None for name in _PART)
    frame = regression.compare(measure_tables(names, options), committed, tolerance, whole)
    text = regression.render(frame, tolerance)
    print(text, end="")
    if options.summary:
        _append(options.summary, f"\n### adfq regress\n\n{text}")
    if options.junit:
        write_text(options.junit, regression.to_junit(frame).tostring().decode())
    return 1 if regression.count(frame)["regressions"] else 0


def _read_records(directory: Path) -> list[Record]:
    """The records under a folder; a line on stderr for each that cannot be read. AdfqError if there is none."""
    records = []
    for path in sorted((directory / "records").glob("*.json")):
        try:
            record: Record = json.loads(path.read_text(encoding="utf-8"))
            parts = (record["config"], record["metrics"], *(record.get(name, {}) for name in _OPTIONAL))
            if not all(isinstance(part, dict) for part in parts):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            warn(f"cannot read the record {path}; it is not compared")
            continue
        records.append(record)
    if not records:
        raise AdfqError(f"there are no records in {directory / 'records'}")
    return records


def _check_overlap(
    names: Sequence[str], options: argparse.Namespace, committed: Sequence[Record], against: Path
) -> None:
    """Raises AdfqError where there is nothing to compare: it would be found after hours, or never."""
    tables = [choose_part(load_table(name, options.profile), options) for name in names]
    cells = [entry.cell for table in tables for entry in table_entries(table, options)]
    known = [record["config"] for record in committed]
    if not any(cell.config in known for cell in cells):
        raise AdfqError(f"no cell of what is to be measured has a record in {against / 'records'}")


def _make_parent(path: Path) -> None:
    if path.is_dir():
        raise AdfqError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdfqError(f"cannot write {path}: {error.strerror}") from None


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise AdfqError(f"cannot write {path}: {error.strerror}") from None


def _tolerance(text: str) -> dict[str, float]:
    least = {"accuracy": 0.0, "time": 1.0}
    chosen: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            number = float(value.removesuffix("x") if name == "time" else value)
        except ValueError:
            number = math.nan
        if name not in least or name in chosen or not least[name] <= number < math.inf:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a tolerance such as accuracy=0.3,time=1.5x (points from 0, and a factor from 1)"
            )
        chosen[name] = number
    return chosen
