"""Data sets in COCO's format, checked before they are trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from adfq.errors import AdfqError
from benchmarks.bundled import BUNDLED
from benchmarks.bundled.detectors import COUNTS
from benchmarks.tasks.masks import cocotools
from benchmarks.tasks.shared import check_place, digest_file, one_line

#: Kinds of detections by the names of COCO's tools.
KINDS: Mapping[str, str] = {"bbox": "box", "segm": "mask"}

# COCO's summary begins with these.
_AVERAGES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

# Most detections of an image that count: the first number for AP, the last for the other averages. These are
# MMDetection's; COCO's own are smaller.
_MOST_FOUND = (100, 300, 1000)

_IMAGE = ("id", "file_name", "height", "width")
_CATEGORY = ("id", "name")
_ANNOTATION = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


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

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """COCO's entries of the images.

        Raises:
            AdfqError: for annotations that are missing or not COCO's, other categories than the model's, and missing
                images.
        """
        content = self._read()
        images: list[dict[str, Any]] = content["images"]
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        names = [image["file_name"] for image in images]
        missing = [name for name in names if name not in present and not (self.folder / name).is_file()]
        if missing:
            raise AdfqError(f"{self.file} names {_some(missing)}, which {self.folder} does not have")
        return images

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

    def read_truth(self, limit: int | None) -> dict[str, Any]:
        """Return the ground truth of the first images: ``images``, ``annotations`` and ``categories``.

        Args:
            limit: largest number of images; None for all.

        Raises:
            AdfqError: if there are no images or no objects.
        """
        content = self._read()
        images = content["images"][:limit]
        if not images:
            raise AdfqError("there are no images to evaluate on")
        ids = {image["id"] for image in images}
        annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
        if all(annotation["iscrowd"] for annotation in annotations):
            raise AdfqError(f"{self.file}: there is nothing to be found in its first {len(images)} images")
        return {"images": images, "annotations": annotations, "categories": content["categories"]}

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            raise AdfqError(f"there is no {self.file}, with COCO's annotations of {self.folder}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise AdfqError(f"cannot read {self.file}: {one_line(error)}") from None
        self._check_entries(content, "images", _IMAGE)
        self._check_entries(content, "annotations", (*_ANNOTATION, *(["segmentation"] if self.masks else [])))
        self._check_entries(content, "categories", _CATEGORY)
        if self.classes is not None:
            self._check_categories([category["name"] for category in content["categories"]], self.classes)
        if len({image["id"] for image in content["images"]}) < len(content["images"]):
            raise AdfqError(f"{self.file}: images share an id")
        for image in content["images"]:
            if not all(isinstance(image[side], int) and image[side] > 0 for side in ("height", "width")):
                raise AdfqError(f"{self.file}: image {image['id']} has no height and width in pixels")
        checked: dict[str, Any] = content
        return checked

    def _check_entries(self, content: Any, kind: str, fields: Iterable[str]) -> None:
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise AdfqError(f"{self.file} is not a file of COCO's annotations: it has no list {kind!r}")
        for entry in entries:
            for field in fields:
                if not isinstance(entry, dict) or field not in entry:
                    raise AdfqError(
                        f"{self.file} is not a file of COCO's annotations: one of its {kind} has no {field!r}"
                    )

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


def digest_splits(train: CocoSplit, validation: CocoSplit) -> dict[str, Any]:
    """Return `benchmarks.tasks.Subject.data_digests` of a data set.

    Args:
        train: split to calibrate on.
        validation: split to evaluate on.
    """
    return {"images": len(validation.images), "validation": validation.digest, "train": train.digest}


class CheckedImages(Dataset[dict[str, Any]]):
    """MMDetection's data set with one-line errors for unreadable images.

    Args:
        dataset: a CocoDataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.dataset.get_data_info(index)["img_path"]
        try:
            with Image.open(path) as image:
                # OpenCV would fill up with grey what a damaged file lacks. At an eighth of its size a JPEG is read
                # in no time.
                image.draft("L", (1, 1))
                image.load()
        except Exception as error:  # readers of many formats
            raise AdfqError(f"cannot read {path}: {one_line(error)}") from None
        try:
            sample: dict[str, Any] = self.dataset[index]
        except Exception as error:  # whatever its steps raise
            raise AdfqError(f"{path}: the config's pipeline fails: {one_line(error)}") from None
        return sample


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


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image: H×W×3, red, green, blue.

    Args:
        path: path of the image.

    Raises:
        AdfqError: for a file that cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # readers of many formats
        raise AdfqError(f"cannot read {path}: {one_line(error)}") from None


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
    with redirect_stdout(StringIO()):
        expected = coco.COCO()
        # An object with the id 0 could not be found.
        annotations = [{**annotation, "id": number} for number, annotation in enumerate(truth["annotations"], 1)]
        expected.dataset = {**truth, "annotations": annotations}
        expected.createIndex()
        evaluation = evaluating.COCOeval(expected, expected.loadRes(found) if found else coco.COCO(), kind)
        evaluation.params.maxDets = list(_MOST_FOUND)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = zip(_AVERAGES, evaluation.stats, strict=False)
    return {f"{KINDS[kind]}_{name}": 100 * float(value) for name, value in values if value >= 0}


def check_results(prefix: str, kinds: Iterable[str]) -> None:
    """Raise AdfqError, before the work, unless ``PREFIX.KIND.json`` can be written after it.

    Args:
        prefix: beginning of the path.
        kinds: kinds of results.
    """
    for kind in kinds:
        path = Path(f"{prefix}.{kind}.json")
        check_place(path)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise AdfqError(f"cannot write {path}: permission denied")


def _some(names: Sequence[Any], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(map(str, names[:shown]))}{more}"
