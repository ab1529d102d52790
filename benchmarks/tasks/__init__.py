"""Tasks: load a model and data, give calibration images, evaluate to metrics. They know nothing of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from adfq.errors import AdfqError
from benchmarks.cells import Cell
from benchmarks.tasks.classification import load_classification


class Subject(Protocol):
    """A model in full precision with its data."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights that were loaded."""

    def calibration_images(self, count: int, seed: int) -> Tensor:
        """`count` images of the training split, preprocessed, B×C×H×W."""

    def evaluate(self, model: nn.Module, device: torch.device, limit: int | None, batch_size: int) -> dict[str, float]:
        """Metrics of a model on the evaluation split, and ``images``, their number."""


TASKS: Mapping[str, Callable[[Cell], Subject]] = {"classification": load_classification}


def load_subject(cell: Cell) -> Subject:
    """Loads what a cell is measured on; AdfqError for an unknown task or anything that cannot be loaded."""
    if cell.task not in TASKS:
        raise AdfqError(f"unknown task {cell.task!r}; there are {', '.join(TASKS)}")
    return TASKS[cell.task](cell)
