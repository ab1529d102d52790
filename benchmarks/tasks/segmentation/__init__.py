"""Segmentation with Segment Anything: the task without its libraries, which its functions import when called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.tasks.interface import Task

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.cell import Cell
    from benchmarks.tasks.segmentation.task import Segmentation

#: Prompts from the ground truth; any other name is that of a file.
BOXES, POINTS = "boxes", "points"

#: Names that a cell's `task_arguments` may have, with their defaults.
ARGUMENTS: Mapping[str, Any] = {"prompts": BOXES, "encoder_only": False}

#: COCO's sizes of objects, and the area in pixels that each begins at.
SIZES: Mapping[str, float] = {"small": 0, "medium": 32**2, "large": 96**2}


def _load(cell: Cell, results: str | None = None) -> Segmentation:
    from benchmarks.tasks.segmentation.task import load_segmentation

    return load_segmentation(cell, results)


def _attach(cell: Cell, model: nn.Module, results: str | None = None) -> Segmentation:
    from benchmarks.tasks.segmentation.task import attach_segmentation

    return attach_segmentation(cell, model, results)


def _model_names() -> list[str]:
    from benchmarks.tasks.segmentation.models import sam_names

    return sam_names()


def describe_segmentation(metrics: Mapping[str, float]) -> str:
    """Return the metrics as one phrase."""
    named = [f"{name} {metrics[f'mean_iou_{name}']:.2f}" for name in SIZES if f"mean_iou_{name}" in metrics]
    return (
        f"mean IoU {metrics['mean_iou']:.2f} % ({', '.join(named)}), mask AP {metrics['mask_ap']:.2f}, "
        f"{metrics['instances']} instances in {metrics['images']} images"
    )


TASK = Task(
    _load,
    _attach,
    _model_names,
    describe_segmentation,
    main_metrics=("mean_iou", "mask_ap"),
    data="/path/to/coco",
    batch_size=1,
    calibration_batch_size=1,
    options=("results",),
    arguments=ARGUMENTS,
    libraries=("segment_anything",),
    own_preprocessing=True,
)
