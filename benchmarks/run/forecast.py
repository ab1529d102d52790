"""Forecast of a plan: cells, images, memory, disk and time, tried on a few images before anything starts."""

from __future__ import annotations

import heapq
import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from adfq.errors import AdfqError
from benchmarks.cell import Cell
from benchmarks.plan import Entry, Plan
from benchmarks.run.console import warn
from benchmarks.run.executors.local import create_local_executor, open_pool, subject_key
from benchmarks.run.provenance import environment
from benchmarks.run.records import Record
from benchmarks.run.rehearsal import available_memory
from benchmarks.run.runner import resolve_device
from benchmarks.run.store import ResultStore
from benchmarks.run.trials import TOO_LARGE, Loaded, Stage, Trial, load_in_process, rehearse_in_process

#: Time for the trials of a method on a model, in seconds.
SECONDS = 30.0

_KILLED = "its process was killed, by the system for its memory perhaps"


@dataclass(frozen=True)
class RowForecast:
    """Forecast of the cells of a method on a model, which differ in bit-widths and seed.

    Attributes:
        model: label of the model.
        method: label of the row.
        cells: number of cells to measure.
        measured: number of further cells that have a record which counts.
        calibration_images: calibration images of a cell.
        evaluation_images: evaluation images of a cell.
        seconds: time of a cell, with reading images and without loading the model; None if nothing is known.
        memory: memory of a cell on the device in MB, with the model, and on a CPU with the whole process; None if
            nothing is known.
        host_memory: memory of the cell's process in MB; the same as `memory` on a CPU.
        calibration_memory: peak memory of calibration in MB, above the loaded model, as in a record.
        evaluation_memory: peak memory of evaluation in MB, above the quantized model, as in a record.
        resume: size of the folder for the interrupted optimization of a cell, in MB.
        temporary: size of a cell's temporary files, in MB.
        not_applicable: reason why the method cannot be applied to the model; None where it can.
        refusal: reason why no cell could be measured; None if they could.
    """

    model: str
    method: str
    cells: int
    measured: int
    calibration_images: int = 0
    evaluation_images: int = 0
    seconds: float | None = None
    memory: float | None = None
    host_memory: float | None = None
    calibration_memory: float | None = None
    evaluation_memory: float | None = None
    resume: float = 0.0
    temporary: float = 0.0
    not_applicable: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Forecast:
    """Forecast of a plan on this machine.

    Attributes:
        rows: forecasts by model and method, in the order of the tables.
        device: name of the device's type, ``cpu`` or ``cuda``.
        environment: the machine, its device and versions (`benchmarks.run.provenance.environment`).
        jobs: number of cells at once, and of those on one device.
        available_memory: free memory of the device, in MB.
        available_host_memory: free memory of this machine, in MB; the same on a CPU.
        free_resume: free bytes in MB where the store is.
        free_temporary: free bytes in MB where temporary files are.
        loading: time that models and data take to load, in seconds.
        took: time of the forecast itself, in seconds.
        notes: messages on models, such as that of random weights.
    """

    rows: Sequence[RowForecast]
    device: str
    environment: dict[str, Any]
    jobs: int
    jobs_a_device: int
    available_memory: float
    available_host_memory: float
    free_resume: float
    free_temporary: float
    loading: float
    took: float
    notes: Sequence[str]

    @property
    def cells(self) -> int:
        """Number of cells to measure."""
        return sum(row.cells for row in self.rows)

    @property
    def measured(self) -> int:
        """Number of cells that have a record which counts."""
        return sum(row.measured for row in self.rows)

    @property
    def calibration_images(self) -> int:
        """Number of calibration images that all cells to measure read."""
        return sum(row.cells * row.calibration_images for row in self.rows)

    @property
    def evaluation_images(self) -> int:
        """Number of evaluation images that all cells to measure read."""
        return sum(row.cells * row.evaluation_images for row in self.rows)

    @property
    def seconds(self) -> float:
        """Time that all cells to measure take with `jobs` at once, with loading of models."""
        return self.loading + sum(row.cells * (row.seconds or 0.0) for row in self.rows) / self.jobs

    def most(self, name: str, jobs: int) -> float:
        """Return the most that some cells take at once.

        Args:
            name: ``memory``, ``host_memory``, ``resume`` or ``temporary``.
            jobs: number of cells at once.
        """
        each = (getattr(row, name) or 0.0 for row in self.rows for _ in range(min(row.cells, jobs)))
        return sum(heapq.nlargest(jobs, each))

    @property
    def refusals(self) -> list[str]:
        """A line for each row whose cells cannot be measured at all, with the reason."""
        return [f"{row.model}, {row.method}: {row.refusal}" for row in self.rows if row.cells and row.refusal]

    @property
    def misfits(self) -> list[str]:
        """A line for each row whose cells will not fit memory or disk, and for all that do not fit side by side."""
        limits = {
            "memory": (self.available_memory, "memory", self.jobs_a_device),
            "host_memory": (self.available_host_memory, "memory of this machine", self.jobs),
            "resume": (self.free_resume, "disk in the store", self.jobs),
            "temporary": (self.free_temporary, "disk for temporary files", self.jobs),
        }
        if self.device == "cpu":
            del limits["host_memory"]
        lines = []
        for name, (limit, what, jobs) in limits.items():
            alone = [row for row in self.rows if row.cells and (getattr(row, name) or 0.0) > limit]
            lines += [
                f"{row.model}, {row.method}: {gigabytes(getattr(row, name))} of {what}, {gigabytes(limit)} are free"
                for row in alone
            ]
            if not alone and self.most(name, jobs) > limit:
                lines.append(
                    f"{jobs} cells at once: {gigabytes(self.most(name, jobs))} of {what}, {gigabytes(limit)} are free; "
                    "--jobs sets another number"
                )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the forecast and its totals in JSON's types; sizes are in MB, times in seconds."""
        totals = ("cells", "measured", "calibration_images", "evaluation_images", "seconds", "misfits", "refusals")
        return {**asdict(self), **{name: getattr(self, name) for name in totals}}


def gigabytes(megabytes: float | None) -> str:
    """Return a size in text: ``1.2 GB``; empty for None."""
    if megabytes is None:
        return ""
    return f"{megabytes / 1e3:.1f} GB" if megabytes < 99.5e3 else f"{megabytes / 1e3:,.0f} GB"


def forecast(
    plan: Plan,
    store: ResultStore | str | Path,
    device: torch.device | None = None,
    jobs: int | None = None,
    seconds: float = SECONDS,
) -> Forecast:
    """Return a forecast of `run_plan`: each method is tried on each model, on a few images.

    Nothing is downloaded and nothing written: a model whose weights would be downloaded has random ones.

    Args:
        plan: result of `benchmarks.plan.make_plan`.
        store: the store, or its folder, which need not exist. Cells that it has count as measured.
        device: device to measure on; None for a GPU where there is one, else the CPU.
        jobs: cells at once, as for `benchmarks.run.executors.local.create_local_executor`; 0 tries them in this
            process.
        seconds: time for the trials of a method on a model. Large models take longer, because some trials are made in
            any case (`benchmarks.run.rehearsal.rehearse`).

    Raises:
        AdfqError: for a device that cannot be used.
    """
    start = time.perf_counter()
    device = device or resolve_device("auto")
    folder = store.directory if isinstance(store, ResultStore) else Path(store)
    slots = create_local_executor(device, jobs, plan.cell_memory).slots
    devices = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    available, host, resume, temporary = _free(device, folder)
    groups = _group(plan)
    rows: list[RowForecast] = []
    notes: list[str] = []
    loading = 0.0
    with closing(_Place(device, slots, here=jobs == 0)) as place, _progress(groups, seconds) as done:
        for group in groups:
            loaded = place.load(list(group), _known(folder, group))
            loading += loaded.seconds
            notes += loaded.notes
            for same in _by_row(group):
                rows.append(_forecast_row(place, same, dict(zip(group, loaded.measured, strict=True)), loaded, seconds))
                done()
    return Forecast(
        rows=rows,
        device=device.type,
        environment=environment(device),
        jobs=slots,
        jobs_a_device=math.ceil(slots / devices),
        available_memory=available,
        available_host_memory=host,
        free_resume=resume,
        free_temporary=temporary,
        loading=loading,
        took=time.perf_counter() - start,
        notes=list(dict.fromkeys(notes)),
    )


def _free(device: torch.device, folder: Path) -> tuple[float, float, float, float]:
    """Return free memory of the device and of the machine, and free disk of the store and for temporary files."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    resume, temporary = (shutil.disk_usage(path).free / 1e6 for path in (there, tempfile.gettempdir()))
    return available_memory(device), available_memory(torch.device("cpu")), resume, temporary


def _group(plan: Plan) -> list[dict[Cell, Entry]]:
    """Return the cells of a plan, with their first place in a table, by model and data."""
    groups: dict[tuple[Any, ...], dict[Cell, Entry]] = defaultdict(dict)
    for planned in plan.tables:
        for entry in planned.entries:
            groups[subject_key(entry.cell)].setdefault(entry.cell, entry)
    return list(groups.values())


def _by_row(group: Mapping[Cell, Entry]) -> list[list[Entry]]:
    """Return cells that differ in bit-widths and seed alone."""
    rows: dict[Cell, list[Entry]] = defaultdict(list)
    for cell, entry in group.items():
        rows[replace(cell, bits="", seed=0)].append(entry)
    return list(rows.values())


def _known(folder: Path, cells: Iterable[Cell]) -> list[list[Record]]:
    """Return the records of each cell, of any provenance."""
    try:
        store = ResultStore(folder, create=False)
    except AdfqError:  # none yet
        return [[] for _ in cells]
    return [store.known(cell, set_aside=False) for cell in cells]


@contextmanager
def _progress(groups: Sequence[Mapping[Cell, Entry]], seconds: float) -> Iterator[Callable[[], object]]:
    count = sum(len(_by_row(group)) for group in groups)
    models = "1 model" if len(groups) == 1 else f"{len(groups)} models"
    warn(f"trying {count} rows of {models} on a few images, about {1.5 * seconds:.0f} s each and longer where slow")
    with tqdm(total=count, desc="forecast", unit="row", disable=None) as bar:
        yield bar.update


def _forecast_row(
    place: _Place, entries: Sequence[Entry], measured: Mapping[Cell, bool], loaded: Loaded, seconds: float
) -> RowForecast:
    waiting = [entry.cell for entry in entries if not measured[entry.cell]]
    first = entries[0]
    row = RowForecast(first.model.label, first.row.label, len(waiting), len(entries) - len(waiting))
    if not waiting:
        return row
    row = replace(row, calibration_images=first.cell.calibration_size, refusal=loaded.refusal)
    if not loaded.usable:
        return row
    trial = place.rehearse(waiting[0], seconds)
    row = replace(
        row,
        evaluation_images=trial.evaluation_images,
        not_applicable=trial.not_applicable,
        refusal=loaded.refusal or trial.refusal,
    )
    if trial.evaluation is None:
        return row
    evaluation, calibration = trial.evaluation, trial.calibration
    both = [cost for cost in (calibration, evaluation) if cost]
    return replace(
        row,
        seconds=sum(cost.seconds for cost in both),
        memory=_known_size(max(cost.memory for cost in both)),
        host_memory=_known_size(max(cost.host_memory for cost in both)),
        calibration_memory=_known_size(calibration.memory - loaded.memory) if calibration else 0.0,
        evaluation_memory=_known_size(max(0.0, evaluation.memory - loaded.memory - trial.model)),
        resume=max(cost.resume for cost in both),
        temporary=max(cost.temporary for cost in both),
    )


def _known_size(megabytes: float) -> float | None:
    return None if math.isnan(megabytes) else megabytes


class _Place:
    """Process that trials run in, or this one.

    Args:
        device: device to run on.
        slots: number of processes that will share the cores.
        here: whether trials run in this process.
    """

    def __init__(self, device: torch.device, slots: int, here: bool) -> None:
        self.device, self.slots = device, slots
        self.stage = Stage(device) if here else None
        self.pool: Any = None

    def load(self, cells: Sequence[Cell], known: Sequence[Sequence[Record]]) -> Loaded:
        """Load a model and data, see `Stage.load`; a model that cannot be loaded is a refusal."""
        try:
            if self.stage:
                return self.stage.load(cells, known)
            loaded: Loaded = self._submit(load_in_process, cells, known)
            return loaded
        except (AdfqError, BrokenProcessPool) as error:
            reason = str(error) if isinstance(error, AdfqError) else _KILLED
            return Loaded(0.0, 0.0, 0.0, [False] * len(cells), (), reason, usable=False)

    def rehearse(self, cell: Cell, seconds: float) -> Trial:
        """Try a cell, see `Stage.rehearse`; a process that is lost is a refusal."""
        if self.stage:
            return self.stage.rehearse(cell, seconds)
        try:
            trial: Trial = self._submit(rehearse_in_process, cell, seconds)
            return trial
        except BrokenProcessPool:
            return Trial(refusal=f"{TOO_LARGE}: {_KILLED}")

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.pool is None:
            self.pool = open_pool(1, self.slots)
        try:
            return self.pool.submit(function, str(self.device), *arguments).result()
        except BrokenProcessPool:
            self.pool = None
            raise

    def close(self) -> None:
        """End the process."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, kill_workers=True)
            self.pool = None
