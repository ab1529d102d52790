"""Tasks, which load a model and data, give calibration images and evaluate to metrics; they know no method."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import adfq
from adfq.api import Quantization
from adfq.errors import AdfqError
from benchmarks.cell import Cell
from benchmarks.tasks.classification.task import (
    attach_classification,
    classifier_names,
    describe_classification,
    load_classification,
)
from benchmarks.tasks.detection.models import detector_names
from benchmarks.tasks.detection.task import describe_detection, load_detection
from benchmarks.tasks.segmentation.models import sam_names
from benchmarks.tasks.segmentation.task import ARGUMENTS, describe_segmentation, load_segmentation
from benchmarks.tasks.shared import Stopwatch


class Subject(Protocol):
    """Model with its data; in full precision, unless it comes from `load_quantized`."""

    @property
    def model(self) -> nn.Module:
        """Model to quantize or to evaluate."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """Everything that the task does to images before the model, of JSON's types."""

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the loaded weights."""

    @property
    def data_digests(self) -> Mapping[str, Any]:
        """Number of evaluation ``images``, and SHA-256 of the names of each split's images, by split."""

    def calibration_images(self, count: int, seed: int) -> Tensor:
        """Return preprocessed images of the train split, `count`×C×H×W.

        Args:
            count: number of images.
            seed: seed of their choice.
        """

    def evaluation_images(self, count: int) -> Tensor:
        """Return the first images of the evaluation split, preprocessed: B×C×H×W with B at most `count`."""

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """Run the part of a model that is timed.

        Args:
            model: the subject's model or its quantized twin.
            images: preprocessed, B×C×H×W.
        """

    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> dict[str, float]:
        """Return metrics of a model on the evaluation split, and the number of ``images``.

        Args:
            model: the subject's model or its quantized twin.
            device: device to run on.
            limit: largest number of images; None for all.
            batch_size: images a batch.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.
        """


@dataclass(frozen=True)
class Task:
    """Functions and properties of a task.

    Attributes:
        load: function from a cell to its model and data; a task with ``results`` among its options takes these too.
        attach: function from a cell and a quantized model to the model with the cell's data. The cell's preprocessing
            is complete; nothing is calibrated. None if quantized models cannot be saved and loaded.
        model_names: function that returns the names of models.
        describe: function from metrics to a phrase.
        main_metrics: metrics that results are compared by.
        data: example of a user's data.
        batch_size: default number of images a batch in evaluation.
        options: options of the command line that not every task has.
        arguments: those options that decide results (`Cell.task_arguments`), with their defaults.
        libraries: libraries that compute beside torch and timm.
    """

    load: Callable[..., Subject]
    attach: Callable[[Cell, nn.Module], Subject] | None
    model_names: Callable[[], list[str]]
    describe: Callable[[Mapping[str, float]], str]
    main_metrics: tuple[str, ...]
    data: str
    batch_size: int
    options: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()


TASKS: Mapping[str, Task] = {
    "classification": Task(
        load_classification,
        attach_classification,
        classifier_names,
        describe_classification,
        ("top1",),
        data="folder:/path/to/imagenet",
        batch_size=100,
    ),
    "detection": Task(
        load_detection,
        None,
        detector_names,
        describe_detection,
        ("box_ap", "mask_ap"),
        data="/path/to/coco",
        batch_size=1,
        options=("config", "results"),
        libraries=("mmdet", "mmengine", "mmcv"),
    ),
    "segmentation": Task(
        load_segmentation,
        None,
        sam_names,
        describe_segmentation,
        ("mean_iou", "mask_ap"),
        data="/path/to/coco",
        batch_size=1,
        options=("results",),
        arguments=ARGUMENTS,
        libraries=("segment_anything",),
    ),
}


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        AdfqError: for an unknown task.
    """
    if name not in TASKS:
        raise AdfqError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


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


def check_saved(task: str) -> Callable[[Cell, nn.Module], Subject]:
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
    adfq.save(model, file, notes={"model": cell.model, "preprocessing": dict(subject.preprocessing)})


def load_quantized(file: str, **fields: Any) -> tuple[Cell, Subject]:
    """Load a quantized model with its data.

    Args:
        file: from `save_quantized`; for one from `adfq.save`, the task decides the preprocessing.
        **fields: fields of the cell that the file does not decide: task, data, limit, batch size, and preprocessing
            that goes before the file's.

    Returns:
        The cell that was quantized, with the file as its checkpoint and every option of the method; its subject.

    Raises:
        AdfqError: for a file that `adfq.load` refuses, an unknown task, and unusable data or preprocessing.
    """
    attach = check_saved(fields["task"])
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
    return cell, attach(cell, model)
