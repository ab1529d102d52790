"""A cell's calibration and evaluation tried on a few images, in a process that may be lost for its memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch
from torch import nn

from adfq.errors import AdfqError, NotApplicableError, one_line
from adfq.method import FULL_PRECISION
from adfq.reconstruction import OptimizingMethod
from adfq.registry import create_method
from benchmarks.cell import Cell
from benchmarks.run.allocator import keep_freed_memory
from benchmarks.run.console import collect_warnings
from benchmarks.run.executors.local import subject_key
from benchmarks.run.measuring import quantize_model
from benchmarks.run.provenance import provenance
from benchmarks.run.records import Record
from benchmarks.run.rehearsal import Cost, Size, measure, rehearse, resident_memory
from benchmarks.tasks import Subject, find_task, load_subject
from benchmarks.tasks.shared import Stopwatch

_MB = 1e6

_EVALUATION = 0.25  # time for trials of evaluation, as a share of that for trials of calibration

# A cell's cost is measured on so many images, once before and three times (`benchmarks.run.cost`).
_COST_IMAGES, _COST_PASSES = 32, 4

#: Reason why a cell cannot be measured on this machine.
TOO_LARGE = "one image at a time does not fit memory"

_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class Loaded:
    """A model with its data, loaded for a forecast.

    Attributes:
        seconds: time that loading took.
        memory: memory of the device that is in use then, in MB.
        host_memory: memory of the process then, in MB.
        measured: for each cell whether it has a record that counts.
        notes: messages while it was loaded.
        refusal: reason why the cells could not be measured; None if they could.
        usable: whether there is a model to try methods on.
    """

    seconds: float
    memory: float
    host_memory: float
    measured: Sequence[bool]
    notes: Sequence[str]
    refusal: str | None = None
    usable: bool = True


@dataclass(frozen=True)
class Trial:
    """Cost of a cell, carried on from trials.

    Attributes:
        calibration: cost of calibration; None for full precision.
        evaluation: cost of evaluation.
        evaluation_images: number of images to evaluate on.
        model: size of the quantized model in memory, in MB.
        not_applicable: reason why the method cannot be applied to the model; None where it can.
        refusal: reason why the cell could not be measured; None if it could.
    """

    calibration: Cost | None = None
    evaluation: Cost | None = None
    evaluation_images: int = 0
    model: float = 0.0
    not_applicable: str | None = None
    refusal: str | None = None


class Stage:
    """Place of trials, with one model and its data at a time.

    Args:
        device: device to run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.subject: Subject | None = None
        self.loaded: tuple[Any, ...] | None = None
        self.refusal: str | None = None
        self.own_weights = True

    def load(self, cells: Sequence[Cell], known: Sequence[Sequence[Record]]) -> Loaded:
        """Load the model and data that cells share. Nothing is downloaded: weights that would be are random ones.

        Args:
            cells: cells of one `subject_key`.
            known: records of each cell, of any provenance.

        Raises:
            AdfqError: for a model or data that cannot be loaded.
        """
        start = time.perf_counter()
        with collect_warnings() as notes:
            subject = self._load(cells[0])
        seconds = time.perf_counter() - start
        memory, host = (resident_memory(device) for device in (self.device, torch.device("cpu")))
        counts = [
            any(self._is_same(record["provenance"], provenance(cell, subject)) for record in records)
            for cell, records in zip(cells, known, strict=True)
        ]
        return Loaded(seconds, memory, host, counts, tuple(notes), self.refusal)

    def _is_same(self, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Return whether a record counts; of weights that are not here nothing is known."""
        if self.own_weights:
            return recorded == now
        return {**recorded, "weights": None} == {**now, "weights": None}

    def _load(self, cell: Cell) -> Subject:
        if self.subject is not None and self.loaded == subject_key(cell):
            return self.subject
        self.subject, self.loaded, self.refusal, self.own_weights = None, subject_key(cell), None, not cell.pretrained
        if cell.pretrained:
            if not find_task(cell.task).downloads:
                try:
                    load_subject(cell)
                except AdfqError as error:
                    self.refusal = str(error)
            cell = replace(cell, pretrained=False)
        self.subject = load_subject(cell)
        self.subject.model.to(self.device)
        return self.subject

    def rehearse(self, cell: Cell, seconds: float) -> Trial:
        """Return the cost of a cell, carried on from trials on a few images.

        Args:
            cell: the cell.
            seconds: time for the trials of calibration, and of evaluation a quarter of that (`rehearse`).
        """
        try:
            with collect_warnings():
                return self._rehearse(cell, seconds)
        except NotApplicableError as error:
            return Trial(not_applicable=str(error))
        except AdfqError as error:
            return Trial(refusal=str(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or any(said in str(error) for said in _OUT_OF_MEMORY):
                return Trial(refusal=TOO_LARGE)
            return Trial(refusal=one_line(error))

    def _rehearse(self, cell: Cell, seconds: float) -> Trial:
        subject, device = self._load(cell), self.device
        calibration, model = None, subject.model
        if cell.method != FULL_PRECISION:
            next(subject.calibration_batches(cell.calibration_size, cell.seed, 1))  # are there as many images?
            made: list[nn.Module] = []

            def calibrate(size: Size) -> Cost:
                made.clear()  # two need not fit
                small = shorten(cell, size)
                return measure(lambda folder: made.append(quantize_model(small, subject, device, folder)[0]), device)

            whole = size_of(cell)
            batches = 1 if whole.images == whole.batch or cell.calibration_batch_size is None else 2
            calibration = rehearse(calibrate, whole, seconds, device, batches)
            (model,) = made
        images = count_images(cell, subject)
        batch = min(cell.batch_size, images)

        def evaluate(size: Size) -> Cost:
            few: Any = subject
            if (heads := _head_images(subject)) is not None:
                few = replace(few, head_images=min(size.images, heads))
            return measure(lambda _: few.evaluate(model, device, size.images, size.batch, Stopwatch()), device)

        heads = _head_images(subject)
        whole = Size(batch, images if heads is None else (images + heads) // 2)  # a trial has as many of both
        evaluation = rehearse(evaluate, whole, _EVALUATION * seconds, device)
        passes = 1 + _COST_PASSES * min(_COST_IMAGES, batch) / images
        return Trial(calibration, evaluation._replace(seconds=passes * evaluation.seconds), images, _size(model))


def _size(model: nn.Module) -> float:
    size: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return size / _MB


def count_images(cell: Cell, subject: Subject) -> int:
    """Return the number of images that a cell is evaluated on."""
    available = int(subject.data_digests["images"])
    return available if cell.limit is None else min(cell.limit, available)


def _head_images(subject: Any) -> int | None:
    """Return the number of training images that evaluation of an encoder makes heads from; None for other tasks."""
    if not hasattr(subject, "head_images"):
        return None
    return int(subject.head_images or len(subject.train))


def size_of(cell: Cell) -> Size:
    """Return the size of a cell's calibration."""
    method = create_method(cell.method, dict(cell.method_arguments))
    iterations = method.iterations if isinstance(method, OptimizingMethod) else 0
    return Size(max(_batches(cell).values()), cell.calibration_size, iterations)


def shorten(cell: Cell, size: Size) -> Cell:
    """Return a cell with a smaller calibration.

    Batch sizes of calibration and of the method (options that end in ``batch_size``) shrink in proportion, and so do
    iterations (options that end in ``iterations``).

    Args:
        cell: the cell.
        size: size of its calibration.
    """
    batches = _batches(cell)
    share = size.batch / max(batches.values())
    smaller = {name: max(1, math.ceil(share * value)) for name, value in batches.items()}
    passed = smaller.pop("calibration_batch_size")
    batch_size = None if cell.calibration_batch_size is None or passed >= size.images else passed
    arguments = {**dict(cell.method_arguments), **smaller}
    if whole := size_of(cell).iterations:
        numbers = _numbers(cell, "iterations")
        arguments |= {name: math.ceil(value * size.iterations / whole) for name, value in numbers.items()}
        arguments["held_back"] = 0.0  # few iterations have as many checks as many
    return replace(
        cell,
        method_arguments=tuple(sorted(arguments.items())),
        calibration_size=size.images,
        calibration_batch_size=batch_size,
    )


def _batches(cell: Cell) -> dict[str, int]:
    """Return the number of images in batches of calibration and of a method, by option."""
    options = _numbers(cell, "batch_size")
    options["calibration_batch_size"] = cell.calibration_batch_size or cell.calibration_size
    return {name: min(value, cell.calibration_size) for name, value in options.items()}


def _numbers(cell: Cell, ending: str) -> dict[str, int]:
    """Return the options of a cell's method whose names have an ending."""
    method = create_method(cell.method, dict(cell.method_arguments))
    return {name: getattr(method, name) for name in method.options() if name.endswith(ending)}


def limit_memory() -> None:
    """Limit this process to the memory that is available, so that a trial fails rather than the machine."""
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        process, available = psutil.Process().memory_info(), psutil.virtual_memory().available
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (process.data + available, hard))


# --- in a process of their own ---------------------------------------------------------------------------------------


@cache
def _process_stage(device: str) -> Stage:
    keep_freed_memory()
    return Stage(torch.device(device))


def load_in_process(device: str, cells: Sequence[Cell], known: Sequence[Sequence[Record]]) -> Loaded:
    """Load a model and data with this process's stage, see `Stage.load`."""
    return _process_stage(device).load(cells, known)


def rehearse_in_process(device: str, cell: Cell, seconds: float) -> Trial:
    """Try a cell with this process's stage, see `Stage.rehearse`."""
    if torch.device(device).type == "cpu":
        limit_memory()
    return _process_stage(device).rehearse(cell, seconds)
