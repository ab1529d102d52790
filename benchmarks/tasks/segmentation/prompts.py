"""Prompts of Segment Anything: boxes or points of the ground truth, or boxes of a detector."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adfq.errors import AdfqError
from benchmarks.tasks.masks import is_number
from benchmarks.tasks.segmentation import BOXES, POINTS
from benchmarks.tasks.shared import one_line

_FIELDS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True)
class Prompts:
    """Prompts of one image: N boxes or N points.

    Attributes:
        categories: N category ids of the objects to segment.
        boxes: N×4 in pixels: x0, y0, x1, y1, within the image; None for points.
        points: N×2 in pixels: x, y, whole numbers in the middle of a pixel; None for boxes.
        scores: N scores of the detector that has found the boxes; None for ground truth.
    """

    categories: Sequence[Any]
    boxes: NDArray[np.float64] | None = None
    points: NDArray[np.float64] | None = None
    scores: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.categories)


def box_prompts(boxes: Sequence[Sequence[float]], categories: Sequence[Any], scores: Any = None) -> Prompts:
    """Return prompts by boxes.

    Args:
        boxes: N boxes from `clip_box`.
        categories: N category ids.
        scores: N scores of a detector; None, the default, for ground truth.
    """
    return Prompts(categories, boxes=np.array(boxes, np.float64).reshape(-1, 4), scores=scores)


def point_prompts(masks: NDArray[np.bool_], categories: Sequence[Any]) -> Prompts:
    """Return prompts by the innermost point of each mask.

    Args:
        masks: N×H×W.
        categories: N category ids.
    """
    points = [innermost_point(mask) for mask in masks]
    return Prompts(categories, points=np.array(points, np.float64).reshape(-1, 2))


def innermost_point(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return x and y of the pixel that is farthest from all pixels outside the mask, the image's surroundings included.

    The first of several such pixels counts, row by row. For an empty mask it is the first pixel.

    Args:
        mask: H×W.
    """
    # A mask's bounding box is enough, and images are large.
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    # The distance within each column, squared, and from it the least of a row's columns …
    row = np.arange(len(inside))[:, None]
    above = np.maximum.accumulate(np.where(inside, 0, row))
    below = np.minimum.accumulate(np.where(inside, len(inside), row)[::-1])[::-1]
    vertical = np.minimum(row - above, below - row) ** 2
    distance = vertical.copy()
    for step in count(1):
        if step**2 >= distance.max():  # … none of which is nearer from here on
            break
        distance[:, step:] = np.minimum(distance[:, step:], vertical[:, :-step] + step**2)
        distance[:, :-step] = np.minimum(distance[:, :-step], vertical[:, step:] + step**2)
    y, x = divmod(int(distance.argmax()), distance.shape[1])
    return left + x - 1, top + y - 1


def clip_box(box: Any, image: Mapping[str, Any], file: str | Path) -> tuple[float, float, float, float]:
    """Return the part of a box within an image, x0, y0, x1, y1 in pixels.

    Args:
        box: x, y, width, height in pixels, from a file and not yet checked.
        image: COCO's entry with ``id``, ``width`` and ``height``.
        file: file that the box is from, for error messages.

    Raises:
        AdfqError: unless the box is four numbers, not empty and partly within the image.
    """
    name = f"{file}: the box {_shown(box)} in image {image['id']}"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise AdfqError(f"{name} is not x, y, width and height")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise AdfqError(f"{name} is empty")
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, image["width"]), min(y + height, image["height"])
    if x1 <= x0 or y1 <= y0:
        raise AdfqError(f"{name} lies outside it, which is {image['width']}×{image['height']} pixels")
    return x0, y0, x1, y1


def read_prompts(file: str, truth: Mapping[str, Any]) -> dict[Hashable, Prompts]:
    """Read the boxes of a detector from a file of results in COCO's format, by the image's id.

    Args:
        file: path to read.
        truth: ground truth with ``images`` and ``categories``, which the file may name.

    Raises:
        AdfqError: for a file that is missing or no list of results, images or categories that are not in `truth`, and
            boxes that `clip_box` refuses.
    """
    try:
        found = json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        raise AdfqError(f"there are no prompts {file}; give {BOXES}, {POINTS} or a file of COCO's results") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdfqError(f"cannot read prompts {file}: {one_line(error)}") from None
    if not isinstance(found, list):
        raise AdfqError(f"{file} has no prompts: it is not a list of COCO's results")
    images = {image["id"]: image for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    chosen = defaultdict(list)
    for item in found:
        lacking = [field for field in _FIELDS if not isinstance(item, dict) or field not in item]
        if lacking:
            raise AdfqError(f"{file} has no prompts: one of its results has no {lacking[0]!r}")
        for field, known, place in (("image_id", images, "in image"), ("category_id", categories, "of category")):
            if not isinstance(item[field], Hashable) or item[field] not in known:
                raise AdfqError(f"{file} has a box {place} {_shown(item[field])}, which the data do not have")
        if not is_number(item["score"]):
            raise AdfqError(f"{file}: the score {_shown(item['score'])} in image {item['image_id']} is not a number")
        box = clip_box(item["bbox"], images[item["image_id"]], file)
        chosen[item["image_id"]].append((box, item["category_id"], float(item["score"])))
    return {image: box_prompts(*zip(*boxes, strict=True)) for image, boxes in chosen.items()}


def _shown(value: Any) -> str:
    """Return a value from JSON in one line of at most 80 characters."""
    return json.dumps(value)[:80]
