"""Detection with MMDetection: the task without its libraries, which its functions import when they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from benchmarks.tasks.interface import Task

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.cell import Cell
    from benchmarks.tasks.detection.task import Detection


def _load(cell: Cell, results: str | None = None) -> Detection:
    from benchmarks.tasks.detection.task import load_detection

    return load_detection(cell, results)


def _attach(cell: Cell, model: nn.Module, results: str | None = None) -> Detection:
    from benchmarks.tasks.detection.task import attach_detection

    return attach_detection(cell, model, results)


def _model_names() -> list[str]:
    from benchmarks.tasks.detection.models import detector_names

    return detector_names()


def describe_detection(metrics: Mapping[str, float]) -> str:
    """Return the metrics as one phrase."""
    found = ", ".join(f"{kind} AP {metrics[f'{kind}_ap']:.2f}" for kind in ("box", "mask") if f"{kind}_ap" in metrics)
    errors = [value for name, value in metrics.items() if name.startswith("feature_error_")]
    off = f"; backbone features off by {', '.join(f'{100 * error:.1f} %' for error in errors)}" if any(errors) else ""
    return f"{found} on {metrics['images']} images{off}"


TASK = Task(
    _load,
    _attach,
    _model_names,
    describe_detection,
    main_metrics=("box_ap", "mask_ap"),
    data="/path/to/coco",
    batch_size=1,
    calibration_batch_size=1,
    options=("config", "results"),
    libraries=("mmdet", "mmengine", "mmcv"),
    own_preprocessing=True,
)
