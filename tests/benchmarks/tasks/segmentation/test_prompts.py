"""Prompts: points lie deepest in their masks, boxes within their images, and files are checked before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from adfq import AdfqError
from benchmarks.tasks.annotations import clip_box
from benchmarks.tasks.segmentation.prompts import innermost_point, point_prompts, read_prompts

IMAGE: dict[str, Any] = {"id": 3, "width": 20, "height": 10}
TRUTH: tuple[list[dict[str, Any]], ...] = ([IMAGE, {"id": "b", "width": 5, "height": 5}], [{"id": 1}, {"id": 7}])
FOUND = {"image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4.5], "score": 0.25}


def deepest(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """By the definition: of every pixel of the mask, the distance to every other pixel, the frame around included."""
    padded = np.pad(mask, 1)
    inside, outside = np.argwhere(padded), np.argwhere(~padded)
    distances = ((inside[:, None] - outside) ** 2).sum(-1).min(1)
    y, x = inside[distances.argmax()] - 1
    return int(x), int(y)


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_the_innermost_point_of_any_mask(mask: NDArray[np.bool_]) -> None:
    if mask.any():
        assert innermost_point(mask) == deepest(mask)
    else:
        assert innermost_point(mask) == (0, 0)


def test_innermost_points_that_are_seen_at_once() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:12, 10:17] = True
    assert innermost_point(mask) == (13, 8)
    mask[8, 13] = False  # a hole where the middle was: the corners of a ring are as deep everywhere, the first counts
    assert innermost_point(mask) == deepest(mask) != (13, 8)
    assert innermost_point(np.ones((7, 31), bool)) == (3, 3)  # the image's edge is one of the mask
    blob = np.hypot(*(np.mgrid[:200, :300] - np.array([120, 70])[:, None, None])) < 60
    assert innermost_point(blob | np.eye(200, 300, dtype=bool)) == (70, 120)


def test_a_point_for_each_mask() -> None:
    masks = np.zeros((2, 9, 9), bool)
    masks[0, 1:4, 2:5] = masks[1, 8, 8] = True
    prompts = point_prompts(masks, [5, 6])
    assert prompts.points is not None
    assert prompts.points.tolist() == [[3, 2], [8, 8]]
    assert (prompts.categories, prompts.boxes, prompts.scores, len(prompts)) == ([5, 6], None, None, 2)
    assert len(point_prompts(masks[:0], [])) == 0


def test_boxes_end_where_the_image_does() -> None:
    assert clip_box([1, 2, 3, 4], IMAGE, "file") == (1, 2, 4, 6)
    assert clip_box([-5, -0.5, 30, 3], IMAGE, "file") == (0, 0, 20, 2.5)
    assert clip_box([19.5, 9.5, 5, 5], IMAGE, "file") == (19.5, 9.5, 20, 10)


@pytest.mark.parametrize("box", [[20, 0, 5, 5], [0, -5, 5, 5], [1, 1, 0, 5], [1, 1, 5, 0.0], [1, 1, 1e-30, 1]])
def test_boxes_without_a_part_in_the_image(box: list[float]) -> None:
    assert clip_box(box, IMAGE, "file") is None


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([1, 1, -5, 2], "has a negative width"),
        ([1, 1, 5, -2], "has a negative height"),
        ([1, 1, 5, True], "is not x, y, width and height"),
        ([1, 1, 5], "is not x, y, width and height"),
        ([1, 1, 5, float("inf")], "is not x, y, width and height"),
        ([1, 1, 5, 10**400], "is not x, y, width and height"),
        ([1, 1, 5, "5"], "is not x, y, width and height"),
        ([1, 1, 5, None], "is not x, y, width and height"),
        ("5\n5", "is not x, y, width and height"),
    ],
)
def test_boxes_that_are_none(box: Any, problem: str) -> None:
    with pytest.raises(AdfqError, match=rf"^found\.json: the box .* in image 3 {problem}") as caught:
        clip_box(box, IMAGE, "found.json")
    assert "\n" not in str(caught.value)


def test_a_detectors_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    more = {"image_id": "b", "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1, "segmentation": None, "id": 5}
    nothing = [{**FOUND, "bbox": box} for box in ([1, 2, 0, 4.5], [30, 0, 5, 5])]
    file.write_text(json.dumps([FOUND, more, *nothing, {**FOUND, "bbox": [0, 0, 1, 1], "score": 0.5, "image_id": 3.0}]))
    read = read_prompts(str(file), *TRUTH)
    assert capsys.readouterr().err == f"adfq: {file}: 2 of 5 boxes are left out: 2 empty or outside their image\n"
    first, second = (read[key] for key in (3, "b"))
    assert first.boxes is not None
    assert first.boxes.tolist() == [[1, 2, 4, 6.5], [0, 0, 1, 1]]
    assert first.points is None
    assert (list(first.categories), list(first.scores or ())) == ([7, 7], [0.25, 0.5])
    assert second.boxes is not None
    assert second.boxes.tolist() == [[0, 0, 5, 5]]
    file.write_text("[]")
    assert read_prompts(str(file), *TRUTH) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read prompts {file}: "),
        ('{"annotations": []}', "{file} has no prompts: it is not a list of COCO's results"),
        ('[{"score": 1, "score": 0.5}]', 'cannot read prompts {file}: an object has the key "score" twice$'),
        ("[3]", "{file} has no prompts: one of its results has no 'image_id'"),
        ('[{"image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4]}]', "one of its results has no 'score'"),
        ({"image_id": 4}, "{file} has a box in image 4, which the data do not have"),
        ({"image_id": [4]}, r"{file}: a box: its image_id \[4\] is neither a whole number nor a text"),
        ({"image_id": "3"}, '{file}: a box: its image_id "3" is a text'),
        ({"category_id": 2}, "{file} has a box of category 2, which the data do not have"),
        ({"score": "high"}, '{file}: the score "high" in image 3 is not a number'),
        ({"score": float("nan")}, "{file}: the score NaN in image 3 is not a number"),
        ({"bbox": [3, 0, -5, 5]}, r"{file}: the box \[3, 0, -5, 5\] in image 3 has a negative width"),
    ],
)
def test_files_that_are_no_prompts(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(content if isinstance(content, str) else json.dumps([FOUND, {**FOUND, **content}]))
    with pytest.raises(AdfqError, match=message.format(file=file)) as caught:
        read_prompts(str(file), *TRUTH)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdfqError, match="there are no prompts box; give boxes, points or a file of COCO's results"):
        read_prompts("box", *TRUTH)
    with pytest.raises(AdfqError, match=f"cannot read prompts {tmp_path}: "):
        read_prompts(str(tmp_path), *TRUTH)
