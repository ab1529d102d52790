"""Image classification with timm: the task without its libraries, which its functions import when they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.tasks.interface import Task

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.cell import Cell
    from benchmarks.tasks.classification.task import Classification

#: Names that a cell's `task_arguments` may have, with their defaults.
ARGUMENTS: Mapping[str, Any] = {"class_map": None}


def _load(cell: Cell) -> Classification:
    from benchmarks.tasks.classification.task import load_classification

    return load_classification(cell)


def _attach(cell: Cell, model: nn.Module) -> Classification:
    from benchmarks.tasks.classification.task import attach_classification

    return attach_classification(cell, model)


def _model_names() -> list[str]:
    from benchmarks.tasks.classification.models import classifier_names

    return classifier_names()


def describe_classification(metrics: Mapping[str, float]) -> str:
    """Return the metrics as one phrase."""
    return f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} % on {metrics['images']} images"


TASK = Task(
    _load,
    _attach,
    _model_names,
    describe_classification,
    main_metrics=("top1",),
    data="folder:/path/to/imagenet",
    batch_size=100,
    arguments=ARGUMENTS,
    downloads=True,
)
