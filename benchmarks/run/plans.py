"""Plans measured, or read from a store without measuring."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from adfq.errors import AdfqError
from adfq.registry import create_method
from benchmarks.cell import Cell
from benchmarks.plan import Entry, Plan, Table
from benchmarks.run.console import warn
from benchmarks.run.records import Record
from benchmarks.run.store import ResultStore

if TYPE_CHECKING:
    import pandas as pd

    from benchmarks.run.executors.local import Executor

#: Outcome of a cell that a store has no record of.
MISSING: Mapping[str, Any] = {"missing": True}

Status = Literal["measured", "failed", "n/a", "missing"]


class TableResults(NamedTuple):
    """A table with its cells in order and the outcome of each.

    Attributes:
        table: the table.
        results: cells with their outcomes: a record; None where measuring has failed;
            ``{"not_applicable": reason}`` where the method cannot be applied to the model; `MISSING`.
    """

    table: Table
    results: Sequence[tuple[Entry, Record | None]]

    def to_frame(self) -> pd.DataFrame:
        """Return one row a cell, with numbers as numbers (`benchmarks.report.tables.tabulate_results`)."""
        from benchmarks.report.tables import tabulate_results

        return tabulate_results(self.table, self.results)

    def render(self, style: str = "md") -> str:
        """Return the table as text.

        Args:
            style: ``"md"``, ``"csv"`` or ``"latex"``.
        """
        from benchmarks.report.tables import render

        return render(self.table, self.to_frame(), style)

    def count(self, status: Status) -> int:
        """Return the number of cells with that status."""
        return sum(status_of(outcome) == status for _, outcome in self.results)


def status_of(outcome: Mapping[str, Any] | None) -> Status:
    """Return the status of a cell's outcome."""
    if outcome is None:
        return "failed"
    if "not_applicable" in outcome:
        return "n/a"
    return "missing" if "missing" in outcome else "measured"


def run_plan(plan: Plan, store: ResultStore | str | Path, executor: Executor | None = None) -> Iterator[TableResults]:
    """Measure the cells of a plan that a store does not have, and yield each table as soon as its cells are done.

    The cells of all tables are in one queue, in the order of the tables, so that no core waits at the end of a table.

    Args:
        plan: result of `benchmarks.plan.make_plan`.
        store: the store, or its folder, which is created where it does not exist.
        executor: place of the work; None for this machine, with as many processes as suit the cells. A given one is not
            closed.

    Raises:
        AdfqError: for the user's mistakes, and for a store that cannot be written.
    """
    from benchmarks.run.executors.local import create_local_executor
    from benchmarks.run.runner import resolve_device
    from benchmarks.run.scheduler import run_cells, summarize_warnings

    store = store if isinstance(store, ResultStore) else ResultStore(Path(store))
    used = executor or create_local_executor(resolve_device("auto"), None, plan.cell_memory)
    outcomes: dict[Cell, Record | None] = {}
    waiting = list(plan.tables)
    try:
        finished = run_cells(_order(plan), store, used)
        while waiting:
            while all(entry.cell in outcomes for entry in waiting[0].entries):
                planned = waiting.pop(0)
                results = TableResults(planned.table, [(entry, outcomes[entry.cell]) for entry in planned.entries])
                if said := summarize_warnings(outcome for _, outcome in results.results):
                    warn(f"table {results.table.name}: {said}")
                yield results
                if not waiting:
                    return
            cell, outcome = next(finished)
            outcomes[cell] = outcome
    finally:
        if executor is None:
            used.close()


def _order(plan: Plan) -> list[Cell]:
    """Return each cell once, table after table, and within a table what takes longest first.

    The last cells of a table decide when it is finished: they should be short ones.
    """
    cells = []
    for planned in plan.tables:
        # Tables have their methods and bit-widths in the order of what they cost.
        backwards = [entry.cell for entry in reversed(planned.entries)]
        cells += sorted(backwards, key=lambda cell: not _optimizes(cell))
    return list(dict.fromkeys(cells))


def _optimizes(cell: Cell) -> bool:
    return create_method(cell.method, cell.method_arguments).trained_iterations > 0


def read_plan(plan: Plan, store: str | Path) -> list[TableResults]:
    """Return the tables of a plan as far as a store has them, without measuring anything.

    A record belongs to a cell whose configuration it has, whatever code it was measured with; the newest counts.

    Args:
        plan: result of `benchmarks.plan.make_plan`; ``check_files=False`` suits data that are elsewhere.
        store: the store's folder.

    Raises:
        AdfqError: for a folder without records and comparisons of exported models.
    """
    opened = ResultStore(Path(store), create=False)
    known = newest(record for _, record in opened.read("*.json"))
    if not known and not any(opened.exports.glob("*.json")):
        raise AdfqError(f"there are no records in {store}")
    failed = {config_key(failure["config"]) for failure in opened.read_failures()}

    def outcome(cell: Cell) -> Record | None:
        key = config_key(cell.config)
        return known[key] if key in known else None if key in failed else dict(MISSING)

    return [
        TableResults(planned.table, [(entry, outcome(entry.cell)) for entry in planned.entries])
        for planned in plan.tables
    ]


def newest(records: Iterable[Record]) -> dict[str, Record]:
    """Return of each configuration the record that was finished last, by `config_key`."""
    in_order = sorted(records, key=lambda record: str(record.get("finished", "")))
    return {config_key(record["config"]): record for record in in_order}


def config_key(config: Mapping[str, Any]) -> str:
    """Return a text that is the same for equal configurations."""
    return json.dumps(config, sort_keys=True)


def read_records(directory: str | Path) -> list[Record]:
    """Return all records of a store; a damaged one is left out, with a line on stderr.

    Raises:
        AdfqError: for a folder without records.
    """
    store = ResultStore(Path(directory), create=False)
    records = [record for _, record in store.read("*.json")]
    if not records:
        raise AdfqError(f"there are no records in {directory}")
    return records
