"""Rule for COCO's annotations, which all tasks follow: some are left out and counted, some completed, some refused.

Left out are annotations that COCO's tools leave out: those of an image or category that is not listed, with an empty
box or one outside the image, without a mask where masks count, and repetitions. Completed are ``iscrowd`` (0), ``area``
(that of the mask, or of the box) and ``id``. Everything else that is not COCO's format is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adfq.errors import AdfqError
from benchmarks.tasks.masks import cocotools, is_number, reaches_far, read_rle
from benchmarks.tasks.shared import shown

#: Part of a box within an image: x0, y0, x1, y1 in pixels.
Corners = tuple[float, float, float, float]


class _LeftOutError(Exception):
    """Annotation that is left out, with the reason."""


def check_objects(
    annotations: Sequence[Any],
    images: Mapping[Any, Mapping[str, Any]],
    listed: Iterable[Any],
    categories: Iterable[Any],
    masks: bool,
    file: Path,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the annotations of some images by the rule of this module.

    Args:
        annotations: entries of the file, not yet checked.
        images: entries of the images that count, by id, checked.
        listed: ids of all images of the file.
        categories: ids of all categories of the file.
        masks: True if objects need a mask.
        file: path of the annotations, for error messages.

    Returns:
        Annotations with ``image_id``, ``category_id``, ``bbox``, ``area``, ``iscrowd`` (0 or 1), and, where masks
        count, ``segmentation`` as run lengths of pycocotools; the numbers of annotations left out by reason.

    Raises:
        AdfqError: for an annotation that is refused.
    """
    every_image, every_category, prefix = Ids(listed), Ids(categories), f"{file}: annotation"
    kept: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    known: dict[Any, Any] = {}
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise AdfqError(f"{file} is not a file of COCO's annotations: one of its annotations is no object")
        name = f"{prefix} {annotation.get('id', f'number {number + 1}')!r:.80}"
        try:
            image = every_image.find(annotation, "image_id", name)
            if image is None:
                raise _LeftOutError("of an image that is not listed")
            if image not in images:
                continue
            _check_repetition(annotation, known, name)
            category = every_category.find(annotation, "category_id", name)
            if category is None:
                raise _LeftOutError("of a category that is not listed")
            kept.append(_complete(annotation, images[image], category, masks, name))
        except _LeftOutError as reason:
            left_out[str(reason)] += 1
    return kept, left_out


class Ids:
    """Ids of images or categories.

    Args:
        ids: ids from `check_id`.
    """

    def __init__(self, ids: Iterable[Any]) -> None:
        self.ids = set(ids)
        self.texts = {str(item) for item in self.ids}

    def find(self, entry: Mapping[str, Any], field: str, name: str) -> Any:
        """Return the id that a field of an entry refers to; None for one that is not among the ids.

        Args:
            entry: entry that refers to an image or a category.
            field: field with the id.
            name: name of the entry in error messages.

        Raises:
            AdfqError: for a missing id, one that is no id, and a text in place of a number or the other way round.
        """
        if field not in entry:
            raise AdfqError(f"{name} has no {field!r}")
        found = check_id(entry[field], f"{name}: its {field}")
        if found in self.ids:
            return found
        if str(found) in self.texts:
            raise AdfqError(f"{name}: its {field} {shown(found)} is a {'text' if isinstance(found, str) else 'number'}")
        return None


def check_id(value: Any, name: str) -> Any:
    """Return an id, a whole number or a text.

    Args:
        value: value from JSON.
        name: name of the value in error messages.

    Raises:
        AdfqError: for other values.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise AdfqError(f"{name} {shown(value)} is neither a whole number nor a text")
    return value


def clip_box(box: Any, image: Mapping[str, Any], name: str) -> Corners | None:
    """Return the part of a box within an image; None for an empty box and one outside the image.

    Args:
        box: x, y, width, height in pixels, from a file and not yet checked.
        image: COCO's entry with ``id``, ``width`` and ``height``.
        name: name of the box's file or annotation in error messages.

    Raises:
        AdfqError: unless the box is four numbers, width and height not negative.
    """
    problem = ""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        problem = "is not x, y, width and height"
    elif box[2] < 0 or box[3] < 0:
        problem = f"has a negative {'width' if box[2] < 0 else 'height'}"
    if problem:
        raise AdfqError(f"{name}: the box {shown(box)} in image {image['id']} {problem}")
    x, y, width, height = box
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, image["width"]), min(y + height, image["height"])
    return None if x1 <= x0 or y1 <= y0 else (x0, y0, x1, y1)


def count_left_out(left_out: Counter[str], total: int, things: str) -> str:
    """Return one line on what is left out.

    Args:
        left_out: numbers by reason.
        total: number of all.
        things: their name in the plural.
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return f"{left_out.total()} of {total} {things} are left out: {reasons}"


def _check_repetition(annotation: dict[str, Any], known: dict[Any, Any], name: str) -> None:
    """Raise _LeftOutError for an annotation that stands there twice, AdfqError for another one with its id."""
    if annotation.get("id") is None:  # its whole content stands for the id
        number: Any = None, json.dumps(annotation, sort_keys=True)
    else:
        number = check_id(annotation["id"], f"{name}: its id")
    if number not in known:
        known[number] = annotation
        return
    if known[number] != annotation:
        raise AdfqError(f"{name} shares its id with another one")
    raise _LeftOutError("repeated")


def _complete(
    annotation: dict[str, Any], image: Mapping[str, Any], category: Any, masks: bool, name: str
) -> dict[str, Any]:
    if clip_box(annotation.get("bbox"), image, name) is None:
        raise _LeftOutError("with an empty box or one outside the image")
    crowd = _read_crowd(annotation.get("iscrowd"), name)
    box, size = annotation["bbox"], (image["height"], image["width"])
    entry = {"image_id": image["id"], "category_id": category, "bbox": box, "iscrowd": crowd}
    pixels = 0.0
    if masks:
        entry["segmentation"] = read_rle(annotation.get("segmentation"), *size, f"{name}: its mask")
        pixels = float(cocotools("mask").area(entry["segmentation"])) if entry["segmentation"] else 0.0
        if not pixels:
            raise _LeftOutError("without a mask")
    if reaches_far([*box[:2], box[0] + box[2], box[1] + box[3]], *size):
        raise AdfqError(f"{name}: the box {shown(box)} reaches far beyond its image")
    area, most = annotation.get("area"), image["height"] * image["width"]
    area = 0 if area is None else area
    if not is_number(area) or area < 0:
        raise AdfqError(f"{name} has no number as its area")
    if area > max(most, box[2] * box[3]):  # COCO's evaluation would ignore it
        raise AdfqError(f"{name} has an area of {shown(area)} pixels, its image {most}")
    return {**entry, "area": area or pixels or min(box[2] * box[3], most)}


def _read_crowd(value: Any, name: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, (bool, int, float)) or value not in (0, 1) or math.isnan(value):
        raise AdfqError(f"{name}: its iscrowd {shown(value)} is neither 0 nor 1")
    return int(value)
