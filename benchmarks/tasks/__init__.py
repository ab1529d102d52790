"""Tasks, which load a model and data, give calibration images and evaluate to metrics; they know no method.

A task is an entry point of the group ``adfq.tasks``, in any installed package: a `Task`, loaded when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

import adfq
from adfq.errors import AdfqError
from adfq.installed import find_point, find_points
from benchmarks.cell import Cell
from benchmarks.tasks.interface import Subject, Task

if TYPE_CHECKING:
    from torch import nn

    from adfq.api import Quantization

ENTRY_POINT_GROUP = "adfq.tasks"

# Tasks of saved models by the package of their family; other families are classifiers, or encoders without a head.
_TASKS_OF_PACKAGES = {"mmdet": "detection", "segment_anything": "segmentation", "adfq": "segmentation"}
_OWN_TASKS = ("classification", "encoders", "detection", "segmentation")  # other packages' take what they like


def task_names() -> tuple[str, ...]:
    """Return the names of all installed tasks, sorted."""
    return tuple(sorted({point.name for point in find_points(entry_points, ENTRY_POINT_GROUP)}))


@cache
def find_task(name: str) -> Task:
    """Return a task.

    Args:
        name: the name of its entry point.

    Raises:
        AdfqError: for a name that no installed package has, for a task that cannot be imported, and for an entry point
            that is no `Task`.
    """
    point = find_point(entry_points, ENTRY_POINT_GROUP, name)
    if point is None:
        raise AdfqError(f"unknown task {name!r}; there are {', '.join(task_names())}")
    try:
        task = point.load()
    except (ImportError, AttributeError) as error:
        raise AdfqError(f"task {name}: {point.value} cannot be imported: {error}") from None
    if not isinstance(task, Task):
        raise AdfqError(f"task {name}: {point.value} is not a benchmarks.tasks.Task")
    return task


def load_subject(cell: Cell, results: str | None = None) -> Subject:
    """Load a cell's model and data.

    Args:
        cell: cell to measure.
        results: prefix of the files that a task with results writes them to; None, the default, for none.

    Raises:
        AdfqError: for an unknown task, and a model or data that cannot be loaded.
    """
    task = find_task(cell.task)
    return task.load(cell) if results is None else task.load(cell, results)


def check_saved(task: str) -> Callable[..., Subject]:
    """Return a task's `attach`.

    Args:
        task: name of a task.

    Raises:
        AdfqError: for a task whose quantized models cannot be saved and loaded.
    """
    attach = find_task(task).attach
    if attach is None:
        raise AdfqError(f"quantized models cannot be saved to a file, or loaded from one, for {task} yet")
    return attach


def save_quantized(model: nn.Module, cell: Cell, subject: Subject, file: str | os.PathLike[str]) -> None:
    """Save the quantized model of a cell, with the notes that `load_quantized` needs.

    Args:
        model: from `adfq.quantize`.
        cell: cell that was measured.
        subject: the cell's subject.
        file: path to write, or to replace.

    Raises:
        AdfqError: as `adfq.save`.
    """
    notes: dict[str, Any] = {"model": cell.model}
    if not find_task(cell.task).own_preprocessing:
        notes["preprocessing"] = dict(subject.preprocessing)
    if cell.calibration_batch_size is not None:
        notes["calibration_batch_size"] = cell.calibration_batch_size
    adfq.save(model, file, notes=notes)


def task_of(model: nn.Module) -> str:
    """Return the task of a quantized model by its kind.

    Args:
        model: from `adfq.load`.
    """
    family = cast("Quantization", model.quantization).architecture.family
    if task := _TASKS_OF_PACKAGES.get(family.partition(".")[0]):
        return task
    return "classification" if getattr(model, "num_classes", 0) else "encoders"


def load_quantized(file: str, results: str | None = None, **fields: Any) -> tuple[Cell, Subject]:
    """Load a quantized model with its data.

    Args:
        file: from `save_quantized`; for one from `adfq.save`, the task decides the preprocessing.
        results: prefix of the files that a task with results writes them to; None, the default, for none.
        **fields: fields of the cell that the file does not decide: task, data, limit, batch size, and preprocessing
            that goes before the file's. Without a task, it is `task_of` the model.

    Returns:
        The cell that was quantized, with the file as its checkpoint and every option of the method; its subject.

    Raises:
        AdfqError: for a file that `adfq.load` refuses, an unknown task and that of other models, and unusable data or
            preprocessing.
    """
    if "task" in fields:
        check_saved(fields["task"])  # before the file is read
    model = adfq.load(file)
    own = task_of(model)
    task = fields.setdefault("task", own)
    if task != own and task in _OWN_TASKS and {task, own} & set(_TASKS_OF_PACKAGES.values()):
        raise AdfqError(f"{file}: a {type(model).__name__} is a model for {own}, not for {task}")
    attach = check_saved(task)
    quantization = cast("Quantization", model.quantization)
    architecture, notes = quantization.architecture, quantization.notes
    preprocessing = dict(fields.pop("preprocessing", ()))
    if not find_task(task).own_preprocessing:
        noted = notes.get("preprocessing", {})
        if not isinstance(noted, Mapping):
            raise AdfqError(f"{file}: its notes have no usable 'preprocessing'")
        preprocessing = {"input_size": architecture.input_size, **noted, **preprocessing}
    cell = Cell.create(
        **fields,
        model=str(notes.get("model", architecture.name or architecture.cls)),
        checkpoint=file,
        method=quantization.method,
        method_arguments=tuple(sorted(quantization.options.items())),
        bits=str(quantization.bits),
        preprocessing=tuple(sorted(preprocessing.items())),
        calibration_size=quantization.calibration_size,
        calibration_batch_size=notes.get("calibration_batch_size"),
        seed=quantization.seed,
    )
    return cell, attach(cell, model) if results is None else attach(cell, model, results)
