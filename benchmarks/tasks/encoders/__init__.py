"""Encoders without a classifier: the task without its libraries, which its functions import when they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.tasks.interface import Task

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.cell import Cell
    from benchmarks.tasks.encoders.task import Encoder

#: Names that a cell's `task_arguments` may have, with their defaults.
ARGUMENTS: Mapping[str, Any] = {"class_map": None, "head": None, "features": None, "head_images": None}


def _load(cell: Cell) -> Encoder:
    from benchmarks.tasks.encoders.task import load_encoder

    return load_encoder(cell)


def _attach(cell: Cell, model: nn.Module) -> Encoder:
    from benchmarks.tasks.encoders.task import attach_encoder

    return attach_encoder(cell, model)


def _model_names() -> list[str]:
    from benchmarks.tasks.encoders.models import encoder_names

    return encoder_names()


def describe_encoder(metrics: Mapping[str, float]) -> str:
    """Return the metrics as one phrase."""
    names = {"knn_top1": "k-NN", "prototypes_top1": "prototypes", "ridge_top1": "ridge"}
    parts = [f"{label} top-1 {metrics[key]:.2f} %" for key, label in names.items() if key in metrics]
    if "feature_error" in metrics:  # a quantized file alone has no full precision to compare with
        parts.append(f"feature error {metrics['feature_error']:.2f} %, cosine {metrics['feature_cosine']:.4f}")
    return f"{', '.join(parts)} on {metrics['images']} images"


TASK = Task(
    _load,
    _attach,
    _model_names,
    describe_encoder,
    main_metrics=("knn_top1", "prototypes_top1", "feature_error", "feature_cosine"),
    data="folder:/path/to/imagenet",
    batch_size=100,
    other_metrics=("ridge_top1",),
    arguments=ARGUMENTS,
    downloads=True,
)
