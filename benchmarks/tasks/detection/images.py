"""Images as MMDetection's pipelines take them, read as in all tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from adfq.errors import AdfqError, one_line
from benchmarks.tasks.images import read_unusual


class CheckedImages(Dataset[dict[str, Any]]):
    """MMDetection's data set with one-line errors for unreadable images, which are read as in all tasks.

    Args:
        dataset: a CocoDataset.
        source: file of the annotations, for error messages.
    """

    def __init__(self, dataset: Any, source: Path) -> None:
        from mmcv.transforms import LoadImageFromFile

        self.dataset, self.source = dataset, source
        steps = dataset.pipeline.transforms
        steps[:] = [_Loader(step) if isinstance(step, LoadImageFromFile) else step for step in steps]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset.get_data_info(index)
        path = item["img_path"]
        item[_UNUSUAL] = read_unusual(Path(path), (item["width"], item["height"]), self.source)
        try:
            sample: dict[str, Any] = self.dataset.pipeline(item)
        except Exception as error:  # whatever its steps raise
            raise AdfqError(f"{path}: the config's pipeline fails: {one_line(error)}") from None
        return sample


_UNUSUAL = "unusual_image"


class _Loader:
    """Step of a pipeline that loads ordinary images as MMDetection's own does, and takes unusual ones as read before.

    Ordinary images have no orientation, whatever else a backend makes of their EXIF data.

    Args:
        step: MMDetection's LoadImageFromFile.
    """

    def __init__(self, step: Any) -> None:
        from mmcv.image import io

        self.step = step
        turning = (step.imdecode_backend or io.imread_backend) in ("cv2", "pillow")  # others turn nothing
        if turning and step.color_type in ("color", "grayscale"):
            step.color_type += "_ignore_orientation"

    def __call__(self, item: dict[str, Any]) -> Any:
        pixels: NDArray[Any] | None = item.pop(_UNUSUAL)
        if pixels is None or self.step.color_type == "unchanged":
            return self.step(item)
        if self.step.color_type.startswith("grayscale"):
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))
        else:
            pixels = np.ascontiguousarray(pixels[..., ::-1])  # OpenCV's order
        item["img"] = pixels.astype(np.float32) if self.step.to_float32 else pixels
        item["img_shape"] = item["ori_shape"] = pixels.shape[:2]
        return item
