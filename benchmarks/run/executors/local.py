"""Executors on this machine: in this process, or side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import loky
import psutil
import torch
from loky.process_executor import BrokenProcessPool

from adfq.errors import AdfqError, NonFiniteError, NotApplicableError, one_line
from benchmarks.cell import Cell
from benchmarks.run.allocator import keep_freed_memory
from benchmarks.run.console import collect_warnings, warn
from benchmarks.run.provenance import environment, provenance
from benchmarks.run.records import Record, now
from benchmarks.run.runner import record_not_applicable, run_cell
from benchmarks.tasks import Subject, load_subject

#: Libraries that compute with threads of their own read these before they are loaded.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

#: A process that has its share of the cores counts no more of them.
CORES = "LOKY_MAX_CPU_COUNT"


@dataclass(frozen=True)
class Job:
    """Cell to measure.

    Attributes:
        cell: the cell.
        known: records of the cell, of any provenance; one that still counts is the result.
        unfinished: folder for finished parts of the cell's method; None, the default, for none.
    """

    cell: Cell
    known: Sequence[Record] = ()
    unfinished: Path | None = None


@dataclass(frozen=True)
class Failure:
    """Reason why a cell could not be measured.

    Attributes:
        error: the reason in one line.
        details: traceback; empty, the default, for none.
        environment: versions and hardware; None, the default, if unknown.
        warnings: messages until then; none by default.
    """

    error: str
    details: str = ""
    environment: Any = None
    warnings: Sequence[str] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Record for the store."""
        return {**asdict(self), "finished": now()}


class LostWorkerError(Exception):
    """Loss of the worker of a cell: its process was killed, for its memory perhaps, or its machine has gone.

    Args:
        message: reason in one line.
        crowded: True if other cells on the machine may be to blame. The cell is then measured again on its own, and has
            failed if its worker is lost again.

    Attributes:
        crowded: see the argument.
    """

    def __init__(self, message: str, crowded: bool) -> None:
        super().__init__(message)
        self.crowded = crowded


class Executor(Protocol):
    """Place where jobs are measured.

    Attributes:
        slots: number of jobs at once.
    """

    slots: int

    def submit(self, job: Job) -> Future[Record | Failure]:
        """Start a job; its future raises LostWorkerError, or AdfqError for the user's mistakes.

        Args:
            job: job to measure.
        """

    def close(self) -> None:
        """End all running jobs."""


def create_local_executor(device: torch.device, jobs: int | None, cell_memory: float | None) -> Executor:
    """Create the executor of this machine.

    Args:
        device: device to run on; ``cuda`` stands for all GPUs.
        jobs: number of cells at once; None for one a GPU, or as many as fit memory and cores; 0 for one after the other
            in this process.
        cell_memory: memory of a cell in GB; None for cells that have the machine for themselves.
    """
    if jobs == 0:
        return InProcess(device)
    if device.type == "cuda":
        every = range(torch.cuda.device_count()) if device.index is None else [device.index]
        devices = [f"cuda:{index}" for index in every]
        return Processes([devices[job % len(devices)] for job in range(jobs or len(devices))])
    return Processes([str(device)] * (jobs or count_processes(cell_memory)))


class InProcess:
    """Executor that measures one job after the other in this process.

    Args:
        device: device to run on.
    """

    slots = 1

    def __init__(self, device: torch.device) -> None:
        self.worker = Worker(device)

    def submit(self, job: Job) -> Future[Record | Failure]:
        """Measure a job at once, see `Executor.submit`."""
        future: Future[Record | Failure] = Future()
        try:
            future.set_result(self.worker.run(job))
        except AdfqError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Do nothing: no job is running."""
        pass


class Processes:
    """Executor that measures jobs side by side, each in a process of its own with its share of the cores.

    Args:
        devices: device of each job that runs at a time.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.slots = len(devices)
        self.free = list(devices)
        self.pool: Any = None

    def submit(self, job: Job) -> Future[Record | Failure]:
        """Start a job on a free device, see `Executor.submit`."""
        device = self.free.pop()
        try:
            inner = self._open().submit(run_in_process, job, device)
        except BrokenProcessPool:  # a process has died in between
            self.pool = None
            inner = self._open().submit(run_in_process, job, device)
        pool, result = self.pool, Future[Record | Failure]()

        def hand_over(done: Any) -> None:
            self.free.append(device)
            error = done.exception()
            if isinstance(error, BrokenProcessPool):  # all jobs of this pool end like this one
                if self.pool is pool:
                    self.pool = None
                message = "its process was killed, by the system for its memory perhaps"
                result.set_exception(LostWorkerError(message, crowded=True))
            elif error is not None:
                result.set_exception(error)
            else:
                result.set_result(done.result())

        inner.add_done_callback(hand_over)
        return result

    def _open(self) -> Any:
        if self.pool is None:
            self.pool = open_pool(self.slots, self.slots)
        return self.pool

    def close(self) -> None:
        """End the processes, and kill those that are measuring."""
        if self.pool is not None:
            # Killed processes leave semaphores behind, about which Python warns.
            self.pool.shutdown(wait=True, kill_workers=len(self.free) < self.slots)
            self.pool = None


def open_pool(processes: int, slots: int) -> Any:
    """Open a pool of processes, each with its share of the cores.

    Args:
        processes: number of processes.
        slots: number of processes that share the cores.
    """
    # It starts a process anew that has grown, as with a larger model.
    warnings.filterwarnings("ignore", "A worker was restarted", UserWarning)
    share = count_threads(slots)
    return loky.ProcessPoolExecutor(
        processes,
        initializer=_prepare_process,
        initargs=(share, os.getpid()),
        env=dict.fromkeys([*_THREADS, CORES], str(share)),
    )


def count_threads(slots: int) -> int:
    """Return the number of threads of each process, at most that of this one (OMP_NUM_THREADS).

    Args:
        slots: number of processes that share the cores.
    """
    return max(1, min(int(loky.cpu_count()) // slots, torch.get_num_threads()))


def count_processes(cell_memory: float | None) -> int:
    """Return the number of cells that fit this machine side by side.

    Args:
        cell_memory: memory of a cell in GB; None for cells that have the machine for themselves.
    """
    if cell_memory is None:
        return 1
    fitting = int(psutil.virtual_memory().available / (1e9 * cell_memory))
    return max(1, min(int(loky.cpu_count()), fitting))


class Worker:
    """Worker that measures cells one after the other; cells on the same model and data share them in memory.

    Args:
        device: device to run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.subject: Subject | None = None
        self.loaded: tuple[Any, ...] | None = None
        self.said: list[str] = []  # while the subject was loaded; holds for all its cells

    def run(self, job: Job) -> Record | Failure:
        """Measure a job; any error but the user's mistakes is a failure of its cell.

        Args:
            job: job to measure.

        Raises:
            AdfqError: for the user's mistakes.
        """
        messages: list[str] = []
        try:
            with collect_warnings() as messages:
                return self._measure(job, messages)
        except Exception as error:
            if isinstance(error, AdfqError) and not isinstance(error, NonFiniteError):
                raise
            self.subject = None  # its state is unknown, and its memory may be needed
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            name = "" if isinstance(error, (RuntimeError, NonFiniteError)) else f"{type(error).__name__}: "
            return Failure(
                f"{name}{one_line(error)}", traceback.format_exc(), environment(self.device, job.cell.task), messages
            )

    def _measure(self, job: Job, messages: list[str]) -> Record:
        cell = job.cell
        wanted = subject_key(cell)
        if self.subject is None or self.loaded != wanted:
            self.subject = None  # two large models need not fit
            self.subject, self.loaded = load_subject(cell), wanted
            self.said = list(messages)
        else:
            messages += self.said
        now = provenance(cell, self.subject)
        for record in job.known:
            if record["provenance"] == now:
                return record
        if any(record["provenance"].get("data", now["data"]) != now["data"] for record in job.known):
            warn(f"the data of {cell.location.data} are not those of earlier records, which do not count any more")
        try:
            record = run_cell(cell, self.subject, self.device, job.unfinished)
        except NotApplicableError as error:
            record = record_not_applicable(cell, self.subject, self.device, str(error))
        return {**record, "warnings": messages}


def subject_key(cell: Cell) -> tuple[Any, ...]:
    """Return what decides a cell's model and data: everything but method, bits and how they are measured."""
    return (
        cell.task,
        cell.model,
        cell.model_arguments,
        cell.pretrained,
        cell.location,
        cell.preprocessing,
        cell.task_arguments,
    )


def run_in_process(job: Job, device: str) -> Record | Failure:
    """Run a job with this process's worker for the device.

    Args:
        job: job to measure.
        device: torch's name of the device.
    """
    return _process_worker(device).run(job)


@cache
def _process_worker(device: str) -> Worker:
    keep_freed_memory()
    return Worker(torch.device(device))


def _prepare_process(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    # With loky as the default, data loaders cannot start processes of their own.
    multiprocessing.set_start_method(None, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    warnings.showwarning = lambda message, *_: warn(str(message))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process with its parent, which cannot end its processes if it is killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    sys.stderr.close()
    os._exit(1)
