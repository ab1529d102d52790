"""COCO's masks and averages: every form of a mask means the same, and what is none is one clear line."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from adfq import AdfqError
from benchmarks.tasks.coco import average_precisions
from benchmarks.tasks.masks import read_mask

rle = pytest.importorskip("pycocotools.mask")

SQUARE = np.zeros((6, 8), bool)
SQUARE[1:4, 2:7] = True
# Column by column.
RUN_LENGTHS = [13, 3, 3, 3, 3, 3, 3, 3, 3, 3, 8]


def compress(mask: NDArray[np.bool_]) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 1, 7, 1, 7, 4, 2, 4]],
        [2, 1, 7, 1, 7, 4, 2, 4],
        [[2, 1, 7, 4], [2, 1, 7, 1, 7, 4, 2, 4], []],
        {"size": [6.0, 8.0], "counts": RUN_LENGTHS},
        [[2, 1, 4, 1, 4, 4, 2, 4], [4.0, 1.0, 7.0, 1.0, 7.0, 4.0, 4.0, 4.0]],
        {"size": [6, 8], "counts": RUN_LENGTHS},
        compress(SQUARE),
    ],
)
def test_a_mask_is_the_same_in_every_form(segmentation: Any) -> None:
    assert np.array_equal(read_mask(segmentation, 6, 8), SQUARE)


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_run_lengths_are_read_as_pycocotools_writes_them(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(read_mask(compress(mask), *mask.shape), mask)


@given(st.binary(max_size=12) | st.text(max_size=12) | st.lists(st.integers() | st.floats() | st.text()))
def test_whatever_stands_for_run_lengths_is_read_or_refused(counts: Any) -> None:
    with suppress(AdfqError):
        assert read_mask({"size": [6, 8], "counts": counts}, 6, 8).shape == (6, 8)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("", "is neither polygons nor run lengths"),
        (None, "has no polygons"),
        ([[]], "has no polygons"),
        ({"size": [6, 8]}, "is neither polygons nor run lengths"),
        ({"size": 6, "counts": []}, "is neither polygons nor run lengths"),
        ({"size": [6, 8], "counts": 48}, "is neither polygons nor run lengths"),
        ({"size": [6, 8], "counts": "é"}, "is neither polygons nor run lengths"),
        ({"size": [6, 8], "counts": "o"}, "is neither polygons nor run lengths"),  # the number goes on
        ({"size": [6, 8], "counts": "11"}, "its run lengths do not add up to 48 pixels"),
        ({"size": [6, 8], "counts": [20, 27]}, "its run lengths do not add up to 48 pixels"),
        ({"size": [6, 8], "counts": [50, -2]}, "its run lengths do not add up to 48 pixels"),
        ({"size": [6, 8], "counts": [24, 24.0]}, "its run lengths do not add up to 48 pixels"),
        ({"size": [8, 6], "counts": RUN_LENGTHS}, "is 6×8 pixels, its image 8×6"),
        ([], "has no polygons"),
        ([[1, 2, 3, 4]], "has no polygons"),
        ([1, 2, 3, 4], "has no polygons"),
        ([[1, 2, 3, 4, 5, 6], 7], "a polygon has to be numbers"),
        ({"size": [6, 8], "counts": [47, True]}, "its run lengths do not add up to 48 pixels"),
        ([[1, 2, 3, 4, 5]], "a polygon has to be numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon has to be numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon has to be numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "a polygon has to be numbers"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "reaches far beyond its image"),
    ],
)
def test_what_is_no_mask(segmentation: Any, message: str) -> None:
    with pytest.raises(AdfqError, match=f"^annotation 7: its mask:? {message}"):
        read_mask(segmentation, 6, 8, "annotation 7: its mask")


def test_an_object_counts_whatever_its_id() -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    truth = {"images": [{"id": 1}], "annotations": [{**box, "id": 0}], "categories": [{"id": 1, "name": "cat"}]}
    assert average_precisions("bbox", truth, [{**box, "score": 0.5}])["box_ap"] == pytest.approx(100)


@pytest.mark.parametrize("ids", [[1, 2, 3], ["a", "b", "c"], [7, "7", 2**70]])
def test_ids_of_any_kind_count_alike(ids: list[Any]) -> None:
    box = {"bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    objects = [{**box, "image_id": image, "category_id": category} for image in ids for category in ids]
    truth = {"images": [{"id": item} for item in ids], "annotations": objects}
    truth["categories"] = [{"id": item, "name": str(item)} for item in ids]
    found = [{**item, "score": 0.5} for item in objects[:5]]
    assert average_precisions("bbox", truth, found)["box_ap"] == pytest.approx(100 * (67 + 67 + 34) / 303)
