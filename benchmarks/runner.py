"""Runs cells and records what they give."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import joblib
import numpy
import timm
import torch
import torchvision
from torch import nn
from tqdm import tqdm

import adfq
from adfq.errors import AdfqError
from adfq.methods import FULL_PRECISION, Bits
from benchmarks.cells import Cell
from benchmarks.console import warn
from benchmarks.cost import measure_cost, peak_memory
from benchmarks.results import Record, ResultStore
from benchmarks.tasks import TASKS, Subject, find_task, load_subject

_COST_IMAGES = 32

# mmcv without compiled operators, and builds of it for versions of torch that the original does not cover.
_DISTRIBUTIONS = {"mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv")}


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        AdfqError: for a device that torch does not know or that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AdfqError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def run_cell(cell: Cell, subject: Subject, device: torch.device, resume: Path | None = None) -> Record:
    """Quantizes and evaluates; the record is that of `evaluate_model`, with what quantizing has cost.

    Args:
        resume: `adfq.quantize`.
    """
    model, cost = quantize_model(cell, subject, device, resume)
    return evaluate_model(cell, subject, model, device, cost)


def quantize_model(
    cell: Cell, subject: Subject, device: torch.device, resume: Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The subject's model, quantized as the cell has it, and what that took, without reading images:
    ``calibration_seconds``, and ``calibration_memory`` in MB.
    """
    model = subject.model.to(device)
    arguments: dict[str, Any] = {"seed": cell.seed, **dict(cell.method_arguments)}
    if cell.method != FULL_PRECISION:
        bits = Bits.parse(cell.bits)
        arguments |= {"weight_bits": bits.weight, "activation_bits": bits.activation}
        arguments["calibration"] = subject.calibration_images(cell.calibration_size, cell.seed)
    start = time.perf_counter()
    with peak_memory(device) as peak:
        quantized = adfq.quantize(model, cell.method, resume=resume, **arguments)
    return quantized, {
        "calibration_seconds": time.perf_counter() - start,
        "calibration_memory": peak.megabytes,
    }


def evaluate_model(
    cell: Cell, subject: Subject, model: nn.Module, device: torch.device, cost: Mapping[str, Any] | None = None
) -> Record:
    """Evaluates a cell's model.

    Args:
        cost: of quantizing the model; None for one that was saved.

    Returns:
        The record: ``config``, ``metrics``, ``timing`` (seconds), ``cost`` (`benchmarks.cost`), ``report`` of the
        method, ``environment``, ``provenance``, ``finished``.
    """
    cost = {"calibration_seconds": 0.0} if cost is None else cost
    start = time.perf_counter()
    metrics = subject.evaluate(model, device, cell.limit, cell.batch_size)
    seconds = time.perf_counter() - start
    quantization = getattr(model, "quantization", None)
    # A detector does not take more images at once than it evaluates.
    images = subject.evaluation_images(min(_COST_IMAGES, cell.batch_size))
    return {
        "config": cell.config,
        "metrics": metrics,
        "timing": {"calibration": cost["calibration_seconds"], "evaluation": seconds},
        "cost": {**cost, **measure_cost(model, images, device, subject.forward)},
        "report": {} if quantization is None else quantization.report,
        "environment": environment(device),
        "provenance": provenance(cell, subject),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def run_cells(
    cells: Sequence[Cell], store: ResultStore, device: torch.device, jobs: int = 1
) -> Iterator[tuple[Cell, Record]]:
    """Runs what the store does not have yet, and yields every cell's record in the order given.

    Each record is in the store as soon as its cell is done.

    Args:
        jobs: so many cells at once, each in a process of its own with its share of the cores.
    """
    with tqdm(total=len(cells), desc="cells", unit="cell", delay=2, disable=None) as progress:
        for cell, record in zip(cells, _run_all(cells, store, device, jobs), strict=True):
            progress.set_postfix_str(f"{cell.model} {cell.method} {cell.bits}")
            progress.update()
            yield cell, record


def _run_all(cells: Sequence[Cell], store: ResultStore, device: torch.device, jobs: int) -> Iterator[Record]:
    if jobs == 1:
        yield from map(_Worker(store, device).run, cells)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=threads):
        # One by one, for a cell can take hours.
        parallel = joblib.Parallel(return_as="generator", batch_size=1, pre_dispatch=jobs)
        yield from parallel(joblib.delayed(_run_in_process)(cell, store.directory, str(device)) for cell in cells)


def _run_in_process(cell: Cell, directory: Path, device: str) -> Record:
    warnings.showwarning = lambda message, *_: warn(str(message))
    return _process_worker(directory, device).run(cell)


@cache
def _process_worker(directory: Path, device: str) -> _Worker:
    return _Worker(ResultStore(directory), torch.device(device))


class _Worker:
    """Runs cells one after the other; those on the same model and data share them in memory."""

    def __init__(self, store: ResultStore, device: torch.device) -> None:
        self.store, self.device = store, device
        self.subject: Subject | None = None
        self.loaded: tuple[Any, ...] | None = None

    def run(self, cell: Cell) -> Record:
        # Everything but method, bits and how they are measured.
        wanted = (
            cell.task,
            cell.model,
            cell.model_arguments,
            cell.checkpoint,
            cell.pretrained,
            cell.data,
            cell.preprocessing,
            cell.task_arguments,
        )
        if self.subject is None or self.loaded != wanted:
            self.subject, self.loaded = load_subject(cell), wanted
        record = self.store.get(cell, provenance(cell, self.subject))
        if record is None:
            unfinished = self.store.unfinished(cell)
            record = run_cell(cell, self.subject, self.device, unfinished)
            self.store.put(cell, record)
            shutil.rmtree(unfinished, ignore_errors=True)
        return record


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was measured."""
    return {
        "adfq": adfq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        **{name: _version(name) for task in TASKS.values() for name in task.libraries},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
    }


def provenance(cell: Cell, subject: Subject) -> dict[str, Any]:
    """What a result depends on beside its cell: code, weights, libraries that compute."""
    return {
        "code": code_digest(),
        "weights": subject.weights_digest,
        "torch": torch.__version__,
        "timm": timm.__version__,
        **{name: _version(name) for name in find_task(cell.task).libraries},
    }


def _version(name: str) -> str | None:
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


@cache
def code_digest() -> str:
    """SHA-256 of the source files that decide results: core, baselines, tasks and embedded data."""
    import baselines
    import benchmarks.embedded
    import benchmarks.tasks

    digest = hashlib.sha256()
    for package in (adfq, baselines, benchmarks.tasks, benchmarks.embedded):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
