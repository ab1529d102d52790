"""Prompts of Segment Anything: boxes or points of the ground truth, or boxes of a detector."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adfq.errors import AdfqError, one_line
from benchmarks.run.console import warn
from benchmarks.tasks.annotations import Ids, clip_box, count_left_out
from benchmarks.tasks.masks import is_number
from benchmarks.tasks.segmentation import BOXES, POINTS
from benchmarks.tasks.shared import read_json, shown

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


def read_prompts(
    file: str, images: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
) -> dict[Hashable, Prompts]:
    """Read the boxes of a detector from a file of results in COCO's format, by the image's id.

    An empty box and one outside its image are left out, which a warning says.

    Args:
        file: path to read.
        images: entries of the images that the file may name.
        categories: entries of the categories that the file may name.

    Raises:
        AdfqError: for a file that is missing or no list of results, other images and categories, and boxes that
            `clip_box` refuses.
    """
    try:
        found = read_json(Path(file))
    except FileNotFoundError:
        raise AdfqError(f"there are no prompts {file}; give {BOXES}, {POINTS} or a file of COCO's results") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdfqError(f"cannot read prompts {file}: {one_line(error)}") from None
    if not isinstance(found, list):
        raise AdfqError(f"{file} has no prompts: it is not a list of COCO's results")
    by_id, known = {image["id"]: image for image in images}, Ids(category["id"] for category in categories)
    places = (("image_id", Ids(by_id), "in image"), ("category_id", known, "of category"))
    chosen = defaultdict(list)
    left_out: Counter[str] = Counter()
    for item in found:
        lacking = [field for field in _FIELDS if not isinstance(item, dict) or field not in item]
        if lacking:
            raise AdfqError(f"{file} has no prompts: one of its results has no {lacking[0]!r}")
        image, category = (ids.find(item, field, f"{file}: a box") for field, ids, _ in places)
        for (field, _, place), value in zip(places, (image, category), strict=True):
            if value is None:
                raise AdfqError(f"{file} has a box {place} {shown(item[field])}, which the data do not have")
        if not is_number(item["score"]):
            raise AdfqError(f"{file}: the score {shown(item['score'])} in image {image} is not a number")
        box = clip_box(item["bbox"], by_id[image], file)
        if box is None:
            left_out["empty or outside their image"] += 1
        else:
            chosen[image].append((box, category, float(item["score"])))
    if left_out:
        said = f"{file}: {count_left_out(left_out, len(found), 'boxes')}"
        if not chosen:
            raise AdfqError(said)
        warn(said)
    return {image: box_prompts(*zip(*boxes, strict=True)) for image, boxes in chosen.items()}
