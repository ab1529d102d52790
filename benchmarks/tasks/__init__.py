"""Tasks: load a model and data, give calibration images, evaluate to metrics. They know nothing of methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import adfq
from adfq.errors import AdfqError
from adfq.methods import Quantization
from benchmarks.cells import Cell
from benchmarks.tasks.classification import attach_classification, load_classification


class Subject(Protocol):
    """A model with its data; in full precision, unless it comes from `load_quantized`."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """All that the task does to images before the model, made of JSON's types."""

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights that were loaded."""

    def calibration_images(self, count: int, seed: int) -> Tensor:
        """`count` images of the training split, preprocessed, B×C×H×W."""

    def evaluation_images(self, count: int) -> Tensor:
        """The first images of the evaluation split, at most `count`, preprocessed, B×C×H×W."""

    def evaluate(self, model: nn.Module, device: torch.device, limit: int | None, batch_size: int) -> dict[str, float]:
        """Metrics of a model on the evaluation split, and ``images``, their number."""


@dataclass(frozen=True)
class Task:
    """How a task makes its subjects.

    Attributes:
        load: the model and data that a cell names.
        attach: a quantized model with the data that its cell names. The cell's preprocessing is a subject's; nothing
            is calibrated.
    """

    load: Callable[[Cell], Subject]
    attach: Callable[[Cell, nn.Module], Subject]


TASKS: Mapping[str, Task] = {"classification": Task(load_classification, attach_classification)}


def load_subject(cell: Cell) -> Subject:
    """Loads what a cell is measured on; AdfqError for an unknown task or anything that cannot be loaded."""
    return _find_task(cell.task).load(cell)


def save_quantized(model: nn.Module, cell: Cell, subject: Subject, file: str | os.PathLike[str]) -> None:
    """Saves the quantized model of a cell with what `load_quantized` needs to know of its subject.

    Raises:
        AdfqError: where `adfq.save` does.
    """
    adfq.save(model, file, notes={"model": cell.model, "preprocessing": dict(subject.preprocessing)})


def load_quantized(file: str, **fields: Any) -> tuple[Cell, Subject]:
    """Loads a quantized model with its data.

    Args:
        file: from `save_quantized`; one from `adfq.save` is preprocessed for as the task finds right.
        **fields: of the cell, as far as the file does not decide them: task, data, limit, batch size, and
            preprocessing that goes before the file's.

    Returns:
        The cell that was quantized, with the file as its checkpoint and every option of the method; its subject.

    Raises:
        AdfqError: for a file that `adfq.load` refuses, an unknown task, unusable data or preprocessing.
    """
    model = adfq.load(file)
    quantization = cast(Quantization, model.quantization)
    architecture, notes = quantization.architecture, quantization.notes
    noted = notes.get("preprocessing", {})
    if not isinstance(noted, Mapping):
        raise AdfqError(f"{file}: its notes have no usable 'preprocessing'")
    given = dict(fields.pop("preprocessing", ()))
    cell = Cell.create(
        **fields,
        model=str(notes.get("model", architecture.name or architecture.cls)),
        checkpoint=file,
        method=quantization.method,
        method_arguments=tuple(sorted(quantization.options.items())),
        bits=str(quantization.bits),
        preprocessing=tuple(sorted({"input_size": architecture.input_size, **noted, **given}.items())),
        calibration_size=quantization.calibration_size,
        seed=quantization.seed,
    )
    return cell, _find_task(cell.task).attach(cell, model)


def _find_task(name: str) -> Task:
    if name not in TASKS:
        raise AdfqError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
