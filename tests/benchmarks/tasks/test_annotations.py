"""One rule for COCO's annotations: a number is that of the clean data, or of those without what a warning counts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("pycocotools")

from adfq import AdfqError
from benchmarks.run.console import collect_warnings
from benchmarks.tasks.coco import CocoSplit, average_precisions

Content = dict[str, Any]


def polygon(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def clean() -> Content:
    """Return four images of 40×30 with two objects of different categories each, and a crowd in the first."""
    boxes = [[number, 2, 10, 8] for number in range(4)] + [[20, 10 + number, 8, 12] for number in range(4)]
    annotations: list[Content] = [
        {
            "id": number,
            "image_id": (number - 1) % 4 + 1,
            "category_id": 3 if number <= 4 else 5,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [polygon(*box)],
        }
        for number, box in enumerate(boxes, 1)
    ]
    crowd = {"size": [30, 40], "counts": [0, 300, 900]}
    annotations.append({**annotations[0], "id": 90, "image_id": 1, "iscrowd": 1, "segmentation": crowd, "area": 300})
    images = [{"id": number, "file_name": f"{number}.png", "width": 40, "height": 30} for number in range(1, 5)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    for number in range(1, 5):
        Image.new("RGB", (40, 30)).save(root / f"{number}.png")
    return root


def measure(content: Content | bytes, root: Path, masks: bool = True, limit: int | None = None) -> dict[str, float]:
    """Return average precisions of fixed detections, some of them off, of which the last is of no object."""
    file = root / "instances.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    split = CocoSplit(file, root, ["a", "b"], masks)
    split.check(limit)
    truth = split.read_truth(limit)
    found: dict[str, list[Content]] = {"bbox": [], "segm": []}
    ids = [image["id"] for image in truth["images"]], [category["id"] for category in truth["categories"]]
    for place, entry in enumerate(clean()["annotations"][: 2 * len(ids[0])]):
        image, category = ids[0][place % len(ids[0])], ids[1][[3, 5].index(entry["category_id"])]
        x, y, width, height = entry["bbox"]
        item = {"image_id": image, "category_id": category, "score": 0.9 - place / 20}
        found["bbox"].append({**item, "bbox": [x + place % 3, y, width, height]})
        mask = np.zeros((30, 40), bool)
        mask[y : y + height, x + place % 2 : x + width] = True
        from benchmarks.bundled.coco import encode_mask

        found["segm"].append({**item, "segmentation": encode_mask(mask)})
    kinds = ("bbox", "segm") if masks else ("bbox",)
    return {name: value for kind in kinds for name, value in average_precisions(kind, truth, found[kind]).items()}


def set_field(number: int, field: str, value: Any) -> Callable[[Content], Any]:
    return lambda content: content["annotations"][number].update({field: value})


def add(**fields: Any) -> Callable[[Content], Any]:
    return lambda content: content["annotations"].append({**content["annotations"][1], "id": 50, **fields})


def drop(field: str) -> Callable[[Content], Any]:
    return lambda content: [annotation.pop(field) for annotation in content["annotations"][:8]]


def _rename_ids(change: Callable[[Any], Any]) -> Callable[[Content], None]:
    def rename(content: Content) -> None:
        for kind, field in (("images", "image_id"), ("categories", "category_id")):
            for entry in content[kind]:
                entry["id"] = change(entry["id"])
            for annotation in content["annotations"]:
                annotation[field] = change(annotation[field])

    return rename


#: Changes that leave the number, and their warnings.
HARMLESS: dict[str, tuple[Callable[[Content], Any], str]] = {
    "no crowd flag": (drop("iscrowd"), ""),
    "null crowd flag": (set_field(2, "iscrowd", None), ""),
    "false crowd flag": (set_field(2, "iscrowd", False), ""),
    "true crowd flag": (set_field(8, "iscrowd", True), ""),
    "no area": (drop("area"), ""),
    "null area": (set_field(1, "area", None), ""),
    "no ids": (drop("id"), ""),
    "null id": (set_field(1, "id", None), ""),
    "text as id": (set_field(1, "id", "one"), ""),
    "flat polygon": (set_field(1, "segmentation", polygon(1, 2, 10, 8)), ""),
    "polygon and a line": (set_field(1, "segmentation", [polygon(1, 2, 10, 8), [1, 2, 3, 4], []]), ""),
    "text ids": (_rename_ids(lambda number: f"n{number}"), ""),
    "float ids": (_rename_ids(lambda number: number if isinstance(number, str) else float(number)), ""),
    "huge ids": (_rename_ids(lambda number: number if isinstance(number, str) else number + 2**80), ""),
    "float sizes": (lambda content: content["images"][0].update(width=40.0), ""),
    "other order": (lambda content: content["annotations"].reverse(), ""),
    "no width": (add(bbox=[5, 5, 0, 5]), "1 with an empty box or one outside the image"),
    "outside": (add(bbox=[40, 5, 5, 5]), "1 with an empty box or one outside the image"),
    "far outside": (add(bbox=[-1e300, 5, 5, 5]), "1 with an empty box or one outside the image"),
    "no polygons": (add(segmentation=[]), "1 without a mask"),
    "null mask": (add(segmentation=None), "1 without a mask"),
    "empty object": (add(segmentation={}), "1 without a mask"),
    "two corners": (add(segmentation=[[1, 2, 3, 4]]), "1 without a mask"),
    "flat two corners": (add(segmentation=[1, 2, 3, 4]), "1 without a mask"),
    "no pixels": (add(segmentation={"size": [30, 40], "counts": [1200]}), "1 without a mask"),
    "a line": (add(segmentation=[[1, 1, 2, 2, 3, 3]]), "1 without a mask"),
    "other image": (add(image_id=77), "1 of an image that is not listed"),
    "other category": (add(category_id=4), "1 of a category that is not listed"),
    "repeated": (lambda content: content["annotations"].append(dict(content["annotations"][1])), "1 repeated"),
}

#: Changes that leave no clear number, and the reason.
AMBIGUOUS: dict[str, tuple[Callable[[Content], Any], str]] = {
    "negative width": (set_field(1, "bbox", [5, 5, -3, 5]), "has a negative width"),
    "text in a box": (set_field(1, "bbox", [5, 5, "3", 5]), "is not x, y, width and height"),
    "flag in a box": (set_field(1, "bbox", [5, 5, True, 5]), "is not x, y, width and height"),
    "nan in a box": (set_field(1, "bbox", [5, 5, float("nan"), 5]), "is not x, y, width and height"),
    "inf in a box": (set_field(1, "bbox", [5, 5, float("inf"), 5]), "is not x, y, width and height"),
    "huge box": (set_field(1, "bbox", [5, 5, 10**400, 5]), "is not x, y, width and height"),
    "long box": (set_field(1, "bbox", [5, 5, 3, 5, 6]), "is not x, y, width and height"),
    "no box": (drop("bbox"), "is not x, y, width and height"),
    "text as crowd flag": (set_field(1, "iscrowd", "0"), 'its iscrowd "0" is neither 0 nor 1'),
    "2 as crowd flag": (set_field(1, "iscrowd", 2), "its iscrowd 2 is neither 0 nor 1"),
    "nan as crowd flag": (set_field(1, "iscrowd", float("nan")), "is neither 0 nor 1"),
    "empty text as area": (set_field(1, "area", ""), "annotation 2 has no number as its area$"),
    "flag as area": (set_field(1, "area", False), "annotation 2 has no number as its area$"),
    "empty list as area": (set_field(1, "area", []), "annotation 2 has no number as its area$"),
    "box and area far too large": (
        lambda content: content["annotations"][1].update(bbox=[0, 0, 1e6, 1e6], area=9e11),
        r"annotation 2: the box \[0, 0, 1000000\.0, 1000000\.0\] reaches far beyond its image$",
    ),
    "box from far away": (set_field(1, "bbox", [-41, 5, 50, 5]), r"the box \[-41, 5, 50, 5\] reaches far beyond"),
    "negative area": (set_field(1, "area", -5), "has no number as its area"),
    "text as area": (set_field(1, "area", "80"), "has no number as its area"),
    "huge area": (set_field(1, "area", 1e11), "has an area of 100000000000.0 pixels, its image 1200"),
    "odd polygon": (set_field(1, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "an x and a y for each corner"),
    "mask of another size": (
        set_field(1, "segmentation", {"size": [40, 30], "counts": [1000, 200]}),
        "its mask is 30×40 pixels, its image 40×30",
    ),
    "shared id": (add(id=2, bbox=[9, 9, 5, 5]), "annotation 2 shares its id with another one"),
    "text for a number": (set_field(1, "category_id", "3"), 'its category_id "3" is a text'),
    "flag as image": (set_field(1, "image_id", True), "its image_id true is neither a whole number nor a text"),
    "half an image": (set_field(1, "image_id", 1.5), "is neither a whole number nor a text"),
    "null category": (set_field(1, "category_id", None), "is neither a whole number nor a text"),
    "no image": (drop("image_id"), "has no 'image_id'"),
    "no object": (lambda content: content["annotations"].append(3), "one of its annotations is no object"),
    "images share an id": (lambda content: content["images"][1].update(id=1), "images share an id"),
    "images share an id as numbers": (lambda content: content["images"][1].update(id=1.0), "images share an id"),
    "categories share an id": (lambda content: content["categories"][1].update(id=3), "categories share an id"),
    "other order of categories": (lambda content: content["categories"].reverse(), "in another order"),
    "list as id": (lambda content: content["images"][0].update(id=[1]), "neither a whole number nor a text"),
    "flag as width": (lambda content: content["images"][0].update(width=True), "has no height and width in pixels"),
    "half a pixel": (lambda content: content["images"][0].update(width=40.5), "has no height and width in pixels"),
    "nan as width": (lambda content: content["images"][0].update(width=float("nan")), "no height and width in"),
    "number as name": (lambda content: content["images"][0].update(file_name=3), "has no text as its file_name"),
    "other width": (lambda content: content["images"][0].update(width=41), "its mask is 40×30 pixels, its image 41×30"),
    "other height": (lambda content: content["images"][3].update(height=31), "4.png has 40×30 pixels, and 40×31 in"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_left_out_or_completed_leaves_the_number(name: str, root: Path) -> None:
    change, warning = HARMLESS[name]
    content = clean()
    change(content)
    with collect_warnings() as said:
        assert measure(content, root) == measure(clean(), root)
    expected = f"{root / 'instances.json'}: 1 of 10 annotations are left out: {warning}"
    assert said == ([expected] if warning else [])


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_is_ambiguous_is_refused_before_the_work(name: str, root: Path) -> None:
    change, message = AMBIGUOUS[name]
    content = clean()
    change(content)
    with pytest.raises(AdfqError, match=message) as caught:
        measure(content, root)
    assert "\n" not in str(caught.value)


def test_the_number_shows_other_objects(root: Path) -> None:
    without = clean()
    del without["annotations"][1]
    assert measure(without, root) != measure(clean(), root)
    assert 20 < measure(clean(), root)["box_ap"] < 90
    assert measure(clean(), root, limit=2) != measure(clean(), root)


JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, "", "1", "x", -1, 1.5, 10**400, float("nan"), float("-inf"), [], [[]], {}, [None]]
)
FIELDS = st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "segmentation"])


def attempt(content: Content, root: Path, masks: bool) -> dict[str, float] | str:
    """Return the number, or the line that says why there is none."""
    try:
        return measure(content, root, masks)
    except AdfqError as error:
        return str(error)


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(HARMLESS)), max_size=3, unique=True),
    junk=st.none() | st.tuples(FIELDS, JUNK),
    masks=st.booleans(),
)
def test_any_oddities_give_the_number_or_one_line(
    names: list[str], junk: tuple[str, Any] | None, masks: bool, root: Path
) -> None:
    content, less = clean(), clean()
    changed = content["annotations"][5]
    less["annotations"].pop(5)
    last = ("repeated", "other order")  # others go by places in the clean order
    for name in sorted(names, key=lambda name: name in last and 1 + last.index(name)):
        change, warning = HARMLESS[name]
        if masks or warning != "1 without a mask":  # without masks it is an object
            change(content)
    if junk is not None:
        changed[junk[0]] = copy.deepcopy(junk[1])
    with collect_warnings() as said:
        found = attempt(content, root, masks)
    if isinstance(found, str):
        assert "\n" not in found
        assert junk is not None or len(names) > 1
    elif junk is None or not said:
        assert found == measure(clean(), root, masks)
    else:
        assert found in (measure(clean(), root, masks), measure(less, root, masks))


@pytest.mark.parametrize("box", [[-40, 5, 50, 5], [5, -40, 9, 120], [5, 5, 75, 75]])
def test_boxes_may_reach_a_little_beyond_their_image(box: list[int], root: Path) -> None:
    content = clean()
    content["annotations"][1]["bbox"] = box
    assert measure(content, root)["mask_ap"] == measure(clean(), root)["mask_ap"]


@pytest.mark.parametrize(("place", "key"), [('"area": 80', "area"), ('"width": 40', "width"), ('"categories": ', "x")])
def test_a_key_that_is_there_twice(place: str, key: str, root: Path) -> None:
    text = json.dumps(clean())
    twice = text.replace(place, f'"{key}": 1, "{key}": 2, {place}', 1)
    assert twice != text
    with pytest.raises(AdfqError, match=rf'^cannot read .*instances\.json: an object has the key "{key}" twice$'):
        measure(twice.encode(), root)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_encodings_of_the_file(encoding: str, root: Path) -> None:
    assert measure(json.dumps(clean()).encode(encoding), root) == measure(clean(), root)
