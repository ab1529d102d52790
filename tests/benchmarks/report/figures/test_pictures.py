"""Figures are files of the kind asked for, and show what was found."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from adfq import AdfqError
from benchmarks.report.figures.pictures import Detections, compare_masks, draw_detections, read_coco
from benchmarks.tasks.segmentation.task import Segmented

GREY = np.full((40, 60, 3), 128, np.uint8)
NOTHING = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros((0, 40, 60), bool))


def detect(count: int, scored: bool = True) -> Detections:
    """So many detections of many categories, with masks that leave a margin in their boxes."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 30, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 10, (count, 2))], 1)
    y, x = np.mgrid[:40, :60]
    masks = np.array([(x > x0 + 2) & (x < x1 - 2) & (y > y0 + 2) & (y < y1 - 2) for x0, y0, x1, y1 in boxes])
    return Detections(boxes, np.arange(count) % 24, rng.uniform(0.5, 1, count) if scored else None, masks)


def read(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_row_for_each_image_and_a_column_for_each_method(tmp_path: Path) -> None:
    wide, tall = GREY, np.full((60, 40, 3), 128, np.uint8)
    box = Detections(np.array([[5, 5, 20, 20]]), np.array([1]))
    names = ["cat", "dog"]
    draw_detections([wide, tall], {"A": [box, box], "B": [box, box]}, names, tmp_path / "two.png", width=1.0)
    draw_detections([wide], {"A": [box]}, names, tmp_path / "one.png", width=1.0)
    (height, width, _), (single_height, single_width, _) = (
        read(tmp_path / name).shape for name in ("two.png", "one.png")
    )
    assert width - single_width == pytest.approx(200, abs=20)  # pixels an inch
    assert height - single_height == pytest.approx(1.5 * 200, abs=20)


def test_svg_is_svg_with_the_image_in_it(tmp_path: Path) -> None:
    draw_detections([GREY], {"Full precision": [detect(3)]}, [str(i) for i in range(24)], tmp_path / "figure.SVG")
    root = ElementTree.parse(tmp_path / "figure.SVG").getroot()
    assert root.tag.endswith("}svg")
    assert root.find(".//{http://www.w3.org/2000/svg}image") is not None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [0, 1, 80])
@pytest.mark.parametrize("scored", [True, False])
def test_any_number_of_detections(tmp_path: Path, count: int, scored: bool) -> None:
    found = detect(count, scored) if count else NOTHING
    draw_detections([GREY], {"": [found]}, [f"category {i}" for i in range(24)], tmp_path / "figure.png")
    picture = read(tmp_path / "figure.png")
    assert picture.shape[1] > picture.shape[0]
    assert (picture.min(2) < picture.max(2)).any() == bool(count)  # colours are those of detections


def test_masks_are_translucent(tmp_path: Path) -> None:
    image = GREY.copy()
    image[:, 30:] = 64
    whole = Detections(np.array([[0, 0, 60, 40]]), np.array([0]), None, np.ones((1, 40, 60), bool))
    draw_detections([image], {"": [whole]}, None, tmp_path / "figure.png")
    picture = read(tmp_path / "figure.png").astype(int)
    height, width, _ = picture.shape
    left, right = picture[height // 2, width // 4], picture[height // 2, 3 * width // 4]
    assert left[0] > left[1] > left[2]  # vermilion over grey
    assert (left - right).tolist() == pytest.approx([0.65 * 64] * 3, abs=3)


def test_points_have_a_white_rim_and_no_box(tmp_path: Path) -> None:
    point = Detections(np.array([[30, 20, 30, 20]]), np.array([4]), points=True)
    draw_detections([GREY], {"": [point]}, None, tmp_path / "figure.png")
    picture = read(tmp_path / "figure.png").astype(int)
    height, width, _ = picture.shape
    inside = picture[20:-20, 20:-20]  # without the margin
    red, green, blue = picture[height // 2, width // 2]
    assert red > green > blue  # the first colour
    rim = np.argwhere((inside == 255).all(2)) + 20
    assert len(rim)
    assert np.abs(rim.mean(0) - [height / 2, width / 2]).max() < 3
    assert np.ptp(rim, 0).max() < 30


def test_what_is_not_sure_is_left_out(tmp_path: Path) -> None:
    sure, unsure = np.array([0.9, 0.8]), np.array([0.9, 0.2])
    two = detect(2)
    found = [Detections(two.boxes, two.labels, scores, two.masks) for scores in (sure, unsure)]
    one = Detections(two.boxes[:1], two.labels[:1], unsure[:1], two.masks[:1] if two.masks is not None else None)
    for name, shown in (("two", found[0]), ("unsure", found[1]), ("one", one)):
        draw_detections([GREY], {"": [shown]}, ["cat", "dog"], tmp_path / f"{name}.png")
    pictures = {name: read(tmp_path / f"{name}.png") for name in ("two", "unsure", "one")}
    assert np.array_equal(pictures["unsure"], pictures["one"])
    assert not np.array_equal(pictures["unsure"], pictures["two"])


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.png.gz"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdfqError, match=r"figures are \.png or \.svg"):
        draw_detections([GREY], {"": [NOTHING]}, None, tmp_path / name)


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    for name, problem in (("nowhere/figure.png", "there is no directory"), ("taken.png", "it is a directory")):
        with pytest.raises(AdfqError, match=rf"cannot write .*{name}: {problem}"):
            draw_detections([GREY], {"": [NOTHING]}, None, tmp_path / name)


def test_cocos_boxes_and_every_kind_of_mask() -> None:
    square = np.zeros((6, 8), np.uint8, order="F")
    square[1:4, 2:5] = 1
    counts = [13, 3, 3, 3, 3, 3, 20]  # by column, beginning with zeros
    kinds = [rle.encode(square), {"size": [6, 8], "counts": counts}, [[2, 1, 5, 1, 5, 4, 2, 4]]]
    items = [{"bbox": [2, 1, 3, 3], "category_id": 7, "score": 0.5, "segmentation": kind} for kind in kinds]
    found = read_coco(items, [3, 7], 6, 8)
    assert found.boxes.tolist() == [[2, 1, 5, 4]] * 3
    assert found.labels.tolist() == [1] * 3
    assert found.scores is not None
    assert found.scores.tolist() == [0.5] * 3
    assert found.masks is not None
    assert all(np.array_equal(mask, square.astype(bool)) for mask in found.masks)


def test_masks_beside_the_prompts_that_asked_for_them() -> None:
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:9, 5:9] = masks[1, 20:30, 20:30] = True
    boxes, points = np.array([[5.0, 5, 9, 9], [20, 20, 30, 30]]), np.array([[6.0, 6], [25, 25]])
    truth, found = compare_masks(Segmented(GREY, boxes, None, masks, ~masks, [0.9, 0.1]))
    assert truth is not None
    for shown, expected in ((truth, masks), (found, ~masks)):
        assert np.array_equal(shown.boxes, boxes)
        assert shown.labels.tolist() == [0, 1]
        assert shown.scores is None
        assert not shown.points
        assert shown.masks is not None
        assert np.array_equal(shown.masks, expected)
    _, found = compare_masks(Segmented(GREY, None, points, masks, ~masks, [0.9, 0.1]))
    assert found.points
    assert found.boxes.tolist() == [[6.5] * 4, [25.5] * 4]


def test_what_a_detector_is_not_sure_of_is_not_drawn() -> None:
    boxes, masks = np.array([[5.0, 5, 9, 9], [20, 20, 30, 30]]), np.ones((2, 40, 60), bool)
    truth, found = compare_masks(Segmented(GREY, boxes, None, None, masks, [0.1, 0.9]))
    assert truth is None
    assert found.above(0.3).labels.tolist() == [1]


def test_nothing_of_cocos() -> None:
    found = read_coco([], [1], 6, 8)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
