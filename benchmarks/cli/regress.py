"""``adfq regress``: measures tables and says what has changed since results were committed."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from adfq.errors import AdfqError
from benchmarks.bundled import BUNDLED
from benchmarks.cli.measure import add_measuring, create_folder, measure, write_text
from benchmarks.cli.options import Commands, select
from benchmarks.plan import RECORDED, Selection, make_plan
from benchmarks.run.plans import config_key, newest, read_records


def add(commands: Commands) -> None:
    """Add the command."""
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
    add_measuring(regress, store="runs/regress")
    regress.set_defaults(seeds=[RECORDED])


def _regress(options: argparse.Namespace) -> int:
    from benchmarks.report import regression  # junitparser

    selection = select(options)
    plan = make_plan(options.names, selection)
    against = options.against or Path("results") / options.profile
    committed = read_records(against)
    known = newest(committed)
    if not any(config_key(cell.config) in known for cell in plan.cells):
        raise AdfqError(f"no cell of what is to be measured has a record in {against}")
    for path in filter(None, (options.summary, options.junit)):
        _check_file(path)  # now, and not after hours

    tolerance = regression.Tolerance(**options.tolerance)
    # Committed records outside of a selection are not gone.
    whole = not options.names and replace(selection, profile=BUNDLED) == Selection(seeds=RECORDED)
    frame = regression.compare(measure(plan, options), committed, tolerance, whole)
    text = regression.render(frame, tolerance)
    print(text, end="")
    if options.summary:
        _append(options.summary, f"\n### adfq regress\n\n{text}")
    if options.junit:
        write_text(options.junit, regression.to_junit(frame).tostring().decode())
    return 1 if regression.count(frame)["regressions"] else 0


def _check_file(path: Path) -> None:
    from benchmarks.tasks.shared import check_place

    create_folder(path.parent)
    check_place(path)


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
