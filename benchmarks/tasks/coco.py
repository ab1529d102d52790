"""Data sets in COCO's format, checked before they are trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adfq.errors import AdfqError, one_line
from benchmarks.bundled import BUNDLED
from benchmarks.bundled.detectors import COUNTS
from benchmarks.run.console import warn
from benchmarks.tasks.annotations import check_id, check_objects, count_left_out
from benchmarks.tasks.images import check_size, read_image
from benchmarks.tasks.masks import cocotools, is_number
from benchmarks.tasks.shared import check_place, digest_file, read_json

#: Kinds of detections by the names of COCO's tools.
KINDS: Mapping[str, str] = {"bbox": "box", "segm": "mask"}

# COCO's summary begins with these.
_AVERAGES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

# Most detections of an image that count: the first number for AP, the last for the other averages. These are
# MMDetection's; COCO's own are smaller.
_MOST_FOUND = (100, 300, 1000)


@dataclass(frozen=True)
class CocoSplit:
    """Split of a data set in COCO's format.

    Attributes:
        file: path of the annotations.
        folder: path of the images.
        classes: the model's classes, in the order of its outputs; None for a model without classes.
        masks: True if objects need a mask.
    """

    file: Path
    folder: Path
    classes: Sequence[str] | None
    masks: bool
    _truths: dict[int | None, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def images(self) -> list[dict[str, Any]]:
        """COCO's entries of the images.

        Raises:
            AdfqError: for annotations that are missing or not COCO's, other categories than the model's, and missing
                images.
        """
        return self._listed[0]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """COCO's entries of the categories.

        Raises:
            AdfqError: as `images`.
        """
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        content = self._read()
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        names = [image["file_name"] for image in content["images"]]
        missing = [name for name in names if name not in present and not (self.folder / name).is_file()]
        if missing:
            raise AdfqError(f"{self.file} names {_some(missing)}, which {self.folder} does not have")
        return content["images"], content["categories"]

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the annotations, which name the images; None without annotations."""
        return digest_file(self.file) if self.file.is_file() else None

    def write_images(self, chosen: Iterable[int], file: Path) -> None:
        """Write the chosen images' entries, in that order and without their objects.

        Args:
            chosen: indices into `images`.
            file: path to write.
        """
        images = [self.images[index] for index in chosen]
        categories = [{"id": number, "name": name} for number, name in enumerate(self.classes or (), 1)]
        content = {"images": images, "annotations": [], "categories": categories}
        file.write_text(json.dumps(content), encoding="utf-8")

    def check(self, limit: int | None) -> None:
        """Check the ground truth of the first images and, by their headers, their sizes.

        Args:
            limit: largest number of images; None for all.

        Raises:
            AdfqError: as `read_truth`, and for an image that cannot be read or has another size than its entry.
        """
        for image in self.read_truth(limit)["images"]:
            check_size(self.folder / image["file_name"], (image["width"], image["height"]), self.file)

    def read_pixels(self, image: Mapping[str, Any]) -> NDArray[np.uint8]:
        """Read an image as H×W×3, red, green, blue.

        Args:
            image: COCO's entry of the image.

        Raises:
            AdfqError: for an image that cannot be read, or has another size than its entry.
        """
        return read_image(self.folder / image["file_name"], (image["width"], image["height"]), self.file)

    def read_truth(self, limit: int | None) -> dict[str, Any]:
        """Return the ground truth of the first images: ``images``, ``annotations`` and ``categories``.

        Annotations follow the rule of `benchmarks.tasks.annotations`. A warning counts those that are left out.

        Args:
            limit: largest number of images; None for all.

        Raises:
            AdfqError: if there are no images or no objects, and for an annotation that is refused.
        """
        if limit not in self._truths:
            self._truths[limit] = self._read_truth(limit)
        return self._truths[limit]

    def _read_truth(self, limit: int | None) -> dict[str, Any]:
        content = self._read()
        images = content["images"][:limit]
        if not images:
            raise AdfqError("there are no images to evaluate on")
        by_id = {image["id"]: image for image in images}
        listed, categories = ([entry["id"] for entry in content[kind]] for kind in ("images", "categories"))
        annotations, left_out = check_objects(content["annotations"], by_id, listed, categories, self.masks, self.file)
        if all(annotation["iscrowd"] for annotation in annotations):
            missing = f" ({count_left_out(left_out, left_out.total(), 'annotations')})" if left_out else ""
            raise AdfqError(f"{self.file}: there is nothing to be found in its first {len(images)} images{missing}")
        if left_out:
            total = len(annotations) + sum(left_out.values())
            warn(f"{self.file}: {count_left_out(left_out, total, 'annotations')}")
        return {"images": images, "annotations": annotations, "categories": content["categories"]}

    def _read(self) -> dict[str, Any]:
        """Read the file; images and categories are checked, annotations are not."""
        try:
            content = read_json(self.file)
        except FileNotFoundError:
            raise AdfqError(f"there is no {self.file}, with COCO's annotations of {self.folder}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise AdfqError(f"cannot read {self.file}: {one_line(error)}") from None
        lists = {kind: self._find_list(content, kind) for kind in ("images", "annotations", "categories")}
        lists["images"] = [self._check_image(image) for image in lists["images"]]
        lists["categories"] = [self._check_entry(entry, "categories", ("id", "name")) for entry in lists["categories"]]
        for kind in ("images", "categories"):
            if len({entry["id"] for entry in lists[kind]}) < len(lists[kind]):
                raise AdfqError(f"{self.file}: {kind} share an id")
        if self.classes is not None:
            self._check_categories([category["name"] for category in lists["categories"]], self.classes)
        return lists

    def _find_list(self, content: Any, kind: str) -> list[Any]:
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise AdfqError(f"{self.file} is not a file of COCO's annotations: it has no list {kind!r}")
        return entries

    def _check_entry(self, entry: Any, kind: str, fields: Iterable[str]) -> dict[str, Any]:
        for name in fields:
            if not isinstance(entry, dict) or name not in entry:
                raise AdfqError(f"{self.file} is not a file of COCO's annotations: one of its {kind} has no {name!r}")
        return {**entry, "id": check_id(entry["id"], f"{self.file}: an id of its {kind},")}

    def _check_image(self, entry: Any) -> dict[str, Any]:
        image = self._check_entry(entry, "images", ("id", "file_name", "height", "width"))
        if not isinstance(image["file_name"], str):
            raise AdfqError(f"{self.file}: image {image['id']} has no text as its file_name")
        sides = {side: image[side] for side in ("height", "width")}
        if not all(is_number(value) and value > 0 and value == int(value) for value in sides.values()):
            raise AdfqError(f"{self.file}: image {image['id']} has no height and width in pixels")
        return {**image, **{side: int(value) for side, value in sides.items()}}

    def _check_categories(self, found: Sequence[str], classes: Sequence[str]) -> None:
        lacking = [name for name in classes if name not in found]
        besides = [name for name in found if name not in classes]
        if lacking or besides:
            parts = [f"it lacks {_some(lacking)}"] if lacking else []
            parts += [f"it has {_some(besides)} besides"] if besides else []
            raise AdfqError(f"categories of {self.file} do not match the model's classes: {', and '.join(parts)}")
        # Labels are places in this list.
        if list(found) != list(classes):
            raise AdfqError(f"categories of {self.file} are in another order than the model's classes")


def digest_splits(train: CocoSplit | None, validation: CocoSplit) -> dict[str, Any]:
    """Return `benchmarks.tasks.Subject.data_digests` of a data set.

    Args:
        train: split to calibrate on; None for a quantized model.
        validation: split to evaluate on.
    """
    digests = {"images": len(validation.images), "validation": validation.digest}
    return digests if train is None else {**digests, "train": train.digest}


def find_root(spec: str) -> Path:
    """Return the folder of a data set.

    Args:
        spec: ``bundled`` for scenes, which are drawn into a temporary folder, or a folder.

    Raises:
        AdfqError: if there is no such folder.
    """
    if spec == BUNDLED:
        return Path(_draw_scenes(tuple(COUNTS.items())).name)
    root = Path(spec).absolute()
    if root.is_dir():
        return root
    if ":" in spec:
        raise AdfqError(f"cannot read data {spec!r}; write bundled, or the folder of COCO's annotations and images")
    raise AdfqError(f"there is no {'directory ' if root.exists() else ''}{spec}")


@cache  # within a process; the directory goes with it
def _draw_scenes(counts: tuple[tuple[str, int], ...]) -> TemporaryDirectory[str]:
    cocotools("mask")
    from benchmarks.bundled.coco import write_coco

    directory = TemporaryDirectory()
    try:
        write_coco(Path(directory.name), dict(counts))
    except OSError as error:
        raise AdfqError(f"cannot write scenes to {directory.name}: {one_line(error)}") from None
    return directory


def average_precisions(kind: str, truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return COCO's average precisions in percent, unrounded.

    Names are ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ``box_ap_medium`` and ``box_ap_large``, or
    ``mask_ap`` …. A size that no object has gives no average.

    Args:
        kind: one of `KINDS`.
        truth: ground truth from `CocoSplit.read_truth`.
        found: detections in COCO's format.
    """
    coco, evaluating = cocotools("coco"), cocotools("cocoeval")
    if kind == "segm":  # by its mask an object is small or large, which boxes would overrule
        found = [{key: value for key, value in item.items() if key != "bbox"} for item in found]
    truth, found = _number_ids(truth, found)
    with redirect_stdout(StringIO()):
        expected = coco.COCO()
        expected.dataset = truth
        expected.createIndex()
        evaluation = evaluating.COCOeval(expected, expected.loadRes(found) if found else coco.COCO(), kind)
        evaluation.params.maxDets = list(_MOST_FOUND)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = zip(_AVERAGES, evaluation.stats, strict=False)
    return {f"{KINDS[kind]}_{name}": 100 * float(value) for name, value in values if value >= 0}


def _number_ids(
    truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return copies with ids that pycocotools can compare; whole numbers stay, texts are numbered in their order."""
    numbers: dict[str, Mapping[Any, int]] = {}
    for kind in ("images", "categories"):
        ids = [entry["id"] for entry in truth[kind]]
        plain = all(isinstance(item, int) and abs(item) < 2**63 for item in ids)
        numbers[kind] = {item: item if plain else number for number, item in enumerate(ids, 1)}

    def number(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        fields = (("image_id", "images"), ("category_id", "categories"))
        return [{**item, **{name: numbers[kind][item[name]] for name, kind in fields}} for item in items]

    # An object with the id 0 could not be found.
    annotations = [{**item, "id": place} for place, item in enumerate(number(truth["annotations"]), 1)]
    listed = {kind: [{**entry, "id": ids[entry["id"]]} for entry in truth[kind]] for kind, ids in numbers.items()}
    return {**truth, **listed, "annotations": annotations}, number(found)


def check_results(prefix: str, kinds: Iterable[str]) -> None:
    """Raise AdfqError, before the work, for an empty prefix or unless ``PREFIX.KIND.json`` can be written after it.

    Args:
        prefix: beginning of the path.
        kinds: kinds of results.
    """
    if not prefix:
        raise AdfqError("--results is empty")
    for kind in kinds:
        path = Path(f"{prefix}.{kind}.json")
        check_place(path)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise AdfqError(f"cannot write {path}: permission denied")


def _some(names: Sequence[Any], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(map(str, names[:shown]))}{more}"
