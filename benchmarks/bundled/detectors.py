"""Detectors that ship with the project, and the number of scenes that they are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bundled.classifiers import WEIGHTS

CONFIG_FOLDER = Path(__file__).parents[1] / "tasks" / "detection" / "configs"

#: Number of scenes by split: calibration and evaluation.
COUNTS: Mapping[str, int] = {"train2017": 256, "val2017": 200}


@dataclass(frozen=True)
class Detector:
    """Detector that ships with the project.

    Attributes:
        config: path of MMDetection's config.
        checkpoint: path of the weights.
    """

    config: Path
    checkpoint: Path


DETECTORS: Mapping[str, Detector] = {
    f"bundled_{name}": Detector(CONFIG_FOLDER / f"{name}_bundled_swin.py", WEIGHTS / f"bundled_{name}.safetensors")
    for name in ("mask_rcnn", "cascade_mask_rcnn")
}
