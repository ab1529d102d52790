"""Masks in COCO's forms, polygons and run lengths, checked before they are trusted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adfq.errors import AdfqError, one_line


def cocotools(part: str) -> Any:
    """Import a module of pycocotools, which only tasks on COCO's data need.

    Args:
        part: name of the module.

    Raises:
        AdfqError: if pycocotools is not installed.
    """
    try:
        return importlib.import_module(f"pycocotools.{part}")
    except ImportError as error:
        raise AdfqError(f"COCO's data need pycocotools: pip install pycocotools ({one_line(error)})") from None


def read_mask(segmentation: Any, height: int, width: int, name: str = "a mask") -> NDArray[np.bool_]:
    """Return a mask height×width.

    Args:
        segmentation: mask in one of COCO's forms, see `read_rle`.
        height: height of the image in pixels.
        width: width of the image in pixels.
        name: name of the mask in error messages.

    Raises:
        AdfqError: as `read_rle`, and for a mask without polygons.
    """
    rle = read_rle(segmentation, height, width, name)
    if rle is None:
        raise AdfqError(f"{name} has no polygons")
    mask: NDArray[np.uint8] = cocotools("mask").decode(rle)
    return mask.astype(bool)


def read_rle(segmentation: Any, height: int, width: int, name: str) -> dict[str, Any] | None:
    """Return a mask as checked run lengths of pycocotools.

    Polygons with fewer than three corners are left out, as MMDetection and Detectron2 do it.

    Args:
        segmentation: mask in one of COCO's forms: polygons, which add up, a single polygon, or run lengths, compressed
            or not.
        height: height of the image in pixels.
        width: width of the image in pixels.
        name: name of the mask in error messages.

    Returns:
        None for null, an empty list, an empty object, and a list without polygons of three corners.

    Raises:
        AdfqError: for other forms, and a mask of another size.
    """
    if segmentation is None or segmentation in ([], {}):
        return None
    rle: dict[str, Any]
    if isinstance(segmentation, list):
        polygons = _check_polygons(segmentation, height, width, name)
        if not polygons:
            return None
        rle = cocotools("mask").merge(cocotools("mask").frPyObjects(polygons, height, width))
        return rle
    try:
        size, counts = list(segmentation["size"]), segmentation["counts"]
        counts = _decompress(counts) if isinstance(counts, (str, bytes)) else list(counts)
    except (KeyError, TypeError, ValueError):
        raise AdfqError(f"{name} is neither polygons nor run lengths") from None
    if size != [height, width]:
        raise AdfqError(f"{name} is {_times(size)} pixels, its image {_times([height, width])}")
    # pycocotools does not look: what run lengths leave out it fills with whatever lies in memory.
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
        raise AdfqError(f"{name}: its run lengths do not add up to {height * width} pixels")
    rle = cocotools("mask").frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return rle


def _check_polygons(polygons: list[Any], height: int, width: int, name: str) -> list[list[float]]:
    """Return the polygons that have three or more corners."""
    if all(map(is_number, polygons)):  # a single polygon
        polygons = [polygons]
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(is_number, polygon)):
            raise AdfqError(f"{name}: a polygon has to be numbers, an x and a y for each corner")
    kept = [polygon for polygon in polygons if len(polygon) >= 6]
    for polygon in kept:
        if reaches_far(polygon, height, width):  # pycocotools needs memory for every pixel of an outline
            raise AdfqError(f"{name} reaches far beyond its image")
    return kept


def reaches_far(corners: Sequence[float], height: int, width: int) -> bool:
    """Return True for corners that are farther away from an image than it is long.

    Args:
        corners: x and y of each corner in pixels.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    side = max(height, width)
    return min(corners) < -side or max(corners) > 2 * side


def _times(size: Sequence[Any]) -> str:
    """Return height and width in the usual order, width first."""
    return "×".join(str(side)[:20] for side in reversed(size))


def _decompress(text: str | bytes) -> list[int]:
    """Return the numbers of COCO's compressed run lengths.

    A character holds six bits, five of a number and one that tells if the number goes on. From the fourth number on,
    numbers are differences to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        digit = character - ord("0")
        if not 0 <= digit < 64:
            raise ValueError
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last of the number, with its sign
            value -= (digit >> 4 & 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError
    return counts


def is_number(value: Any) -> bool:
    """Return True for a finite number from JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
