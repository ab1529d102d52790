"""Schedule of cells, each of which is recorded as soon as it is measured."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from benchmarks.cell import Cell
from benchmarks.run.console import warn
from benchmarks.run.executors.local import Executor, Failure, Job, LostWorkerError
from benchmarks.run.records import Record
from benchmarks.run.store import ResultStore

#: Record of a cell that was measured, or whose method cannot be applied (``not_applicable``); None for a failed one.
Outcome = Record | None

#: Interval of checks for a cell that another process measures, in seconds.
_PATIENCE = 1.0

#: Number of times that a cell may lose its worker through no fault of its own.
_LOSSES = 3

Running = dict["Future[Record | Failure]", tuple[Cell, FileLock]]


def run_cells(cells: Sequence[Cell], store: ResultStore, executor: Executor) -> Iterator[tuple[Cell, Outcome]]:
    """Measure the cells that the store has no record of, and yield each as it finishes.

    Each record is in the store before its cell is yielded. A cell that another process is measuring on the same store
    is waited for. A cell whose worker was lost is measured again (`LostWorkerError`). A failure is recorded, and the
    rest goes on.

    Args:
        cells: cells to measure, those that begin first at the front; repeated ones are measured and yielded once.
        store: store of records.
        executor: place to measure at.

    Raises:
        AdfqError: for the user's mistakes, and if a record cannot be written. Earlier measurements are recorded.
    """
    return _Run(store, executor, cells).run()


def summarize_warnings(outcomes: Iterable[Outcome]) -> str | None:
    """Return one line about the cells whose records have warnings; None where no record has any.

    Args:
        outcomes: all cells, failed ones among them.
    """
    outcomes = list(outcomes)
    count = sum(bool(outcome and outcome.get("warnings")) for outcome in outcomes)
    if not count:
        return None
    return f"{count} of {len(outcomes)} cells had warnings; 'adfq results show ID' has them"


class _Run:
    def __init__(self, store: ResultStore, executor: Executor, cells: Sequence[Cell]) -> None:
        self.store, self.executor = store, executor
        self.waiting = list(dict.fromkeys(cells))
        self.lost: list[Cell] = []
        self.losses: Counter[Cell] = Counter()
        self.running: Running = {}

    def run(self) -> Iterator[tuple[Cell, Outcome]]:
        try:
            with tqdm(total=len(self.waiting), desc="cells", unit="cell", delay=2, disable=None) as bar:
                while self.waiting or self.running or self.lost:
                    blocked = self._start()
                    if not self.running:
                        time.sleep(_PATIENCE)
                        continue
                    done, _ = wait(self.running, _PATIENCE if blocked else None, FIRST_COMPLETED)
                    for finished in filter(None, map(self._finish, done)):
                        bar.update()
                        yield finished
        finally:
            for _, lock in self.running.values():
                lock.release()

    def _start(self) -> bool:
        """Fill the executor's slots, and return True if other processes have cells that it would take."""
        if not self.waiting and not self.running and self.lost:
            alone = self.lost.pop(0)
            if not self._submit(alone):
                self.lost.append(alone)
                return True
            return False
        taken = []
        for cell in self.waiting:
            if len(self.running) == self.executor.slots:
                break
            if self._submit(cell):
                taken.append(cell)
        blocked = len(self.running) < self.executor.slots and len(taken) < len(self.waiting)
        self.waiting = [cell for cell in self.waiting if cell not in taken]
        return blocked

    def _submit(self, cell: Cell) -> bool:
        lock = self.store.lock(cell)
        if lock is None:
            return False
        try:
            future = self.executor.submit(Job(cell, self.store.known(cell), self.store.unfinished(cell)))
        except BaseException:
            lock.release()
            raise
        self.running[future] = cell, lock
        return True

    def _finish(self, future: Future[Record | Failure]) -> tuple[Cell, Outcome] | None:
        """Record a result; return None for a cell that is to be measured again."""
        cell, lock = self.running[future]
        try:
            result = self._result(cell, future)
            if result is None:
                return None
            if isinstance(result, Failure):
                self.store.put_failure(cell, result.record)
                warn(f"{cell.model}, {cell.method}, {cell.bits}, seed {cell.seed} failed: {result.error}")
                return cell, None
            if self.store.get(cell, result["provenance"]) is None:
                self.store.put(cell, result)
                shutil.rmtree(self.store.unfinished(cell), ignore_errors=True)
            return cell, result
        finally:
            del self.running[future]
            lock.release()

    def _result(self, cell: Cell, future: Future[Any]) -> Record | Failure | None:
        """Return the result of a cell; None for a cell that is to be measured again."""
        try:
            result: Record | Failure = future.result()
        except LostWorkerError as error:
            self.losses[cell] += 1
            if self.losses[cell] > (1 if error.crowded else _LOSSES):
                return Failure(str(error))
            (self.lost if error.crowded else self.waiting).append(cell)
            return None
        return result
