"""Images with their annotations, as Segment Anything takes them, and the masks that it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from adfq.errors import NonFiniteError
from benchmarks.tasks.coco import CocoSplit
from benchmarks.tasks.masks import cocotools
from benchmarks.tasks.segmentation.prompts import Prompts
from benchmarks.tasks.shared import first_non_finite

_PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Scene:
    """Annotations of an image, with masks as run lengths.

    Attributes:
        image: COCO's entry of the image.
        annotations: COCO's annotations of the image, crowds included.
    """

    image: Mapping[str, Any]
    annotations: Sequence[Mapping[str, Any]]

    @property
    def instances(self) -> list[Mapping[str, Any]]:
        """Annotations without crowds."""
        return [annotation for annotation in self.annotations if not annotation["iscrowd"]]

    @property
    def rles(self) -> list[Any]:
        """Masks of the instances as run lengths."""
        return [annotation["segmentation"] for annotation in self.instances]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """Masks of the instances, N×H×W."""
        shape = len(self.rles), self.image["height"], self.image["width"]
        return np.array([cocotools("mask").decode(mask) for mask in self.rles], bool).reshape(shape)


class ScaledImages(Dataset[Tensor]):
    """Data set of a split's images, scaled by `scale`.

    Args:
        split: split that the images are from.
        images: COCO's entries of the images.
        side: longer side in pixels.
    """

    def __init__(self, split: CocoSplit, images: Sequence[Mapping[str, Any]], side: int) -> None:
        self.split, self.images, self.side = split, images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return scale(self.split.read_pixels(self.images[index]), self.side)


def scale(pixels: NDArray[np.uint8], side: int) -> Tensor:
    """Return an image H×W×3 scaled to a longer side of so many pixels: 3×h×w, values 0 to 255."""
    from segment_anything.utils.transforms import ResizeLongestSide

    return torch.from_numpy(ResizeLongestSide(side).apply_image(pixels)).permute(2, 0, 1).contiguous()


def segment(
    predictor: Any, image: Tensor, size: tuple[int, int], prompts: Prompts
) -> Iterator[tuple[NDArray[np.bool_], list[float]]]:
    """Yield masks n×H×W and their n predicted IoUs, for some prompts after the other.

    A box has one mask, as SAM's authors have it. A point has three, and the one with the best predicted IoU counts.

    Args:
        predictor: segment_anything's SamPredictor.
        image: 3×h×w, from `scale`.
        size: height and width before scaling, which the masks have.
        prompts: prompts of the image.
    """
    sam = predictor.model
    image = image.to(sam.device)
    predictor.set_torch_image(image[None], size)
    by_point = prompts.points is not None
    if by_point:
        points = predictor.transform.apply_coords_torch(torch.from_numpy(prompts.points), size)[:, None].to(sam.device)
        asked = {"point_coords": points, "point_labels": torch.ones(points.shape[:2], device=sam.device)}
    else:
        asked = {"boxes": predictor.transform.apply_boxes_torch(torch.from_numpy(prompts.boxes), size).to(sam.device)}
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = {key: value[start : start + _PROMPTS_AT_ONCE] for key, value in asked.items()}
        masks, ious, logits = predictor.predict_torch(
            some.get("point_coords"), some.get("point_labels"), some.get("boxes"), multimask_output=by_point
        )
        if not all(output.isfinite().all() for output in (predictor.features, ious, logits)):
            record = {"image": image, "original_size": size, **some}
            name = first_non_finite(sam, [record], multimask_output=by_point)
            raise NonFiniteError(f"{name}: the output is not finite")
        best = ious.argmax(1)
        chosen = torch.arange(len(best)), best.cpu()
        yield masks.cpu()[chosen].numpy(), ious.cpu()[chosen].tolist()
