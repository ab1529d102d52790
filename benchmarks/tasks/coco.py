"""Data sets in COCO's format, checked before they are trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from adfq.errors import AdfqError
from benchmarks.tasks.shared import one_line

_IMAGE = ("id", "file_name", "height", "width")
_CATEGORY = ("id", "name")
_ANNOTATION = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


@dataclass(frozen=True)
class CocoSplit:
    """One split of a data set.

    Attributes:
        file: its annotations.
        folder: its images.
        classes: the model's, in the order of its outputs.
        masks: whether objects need a mask.
    """

    file: Path
    folder: Path
    classes: Sequence[str]
    masks: bool

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """What the annotations say of each image.

        Raises:
            AdfqError: for annotations that are not there or not COCO's, other categories than the model's, and images
                that are missing.
        """
        content = self._read()
        images: list[dict[str, Any]] = content["images"]
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        names = [image["file_name"] for image in images]
        missing = [name for name in names if name not in present and not (self.folder / name).is_file()]
        if missing:
            raise AdfqError(f"{self.file} names {_some(missing)}, which {self.folder} does not have")
        return images

    def write_images(self, chosen: Iterable[int], file: Path) -> None:
        """Writes annotations of the chosen images, in that order and without what is to be found in them."""
        images = [self.images[index] for index in chosen]
        categories = [{"id": number, "name": name} for number, name in enumerate(self.classes, 1)]
        _write(file, {"images": images, "annotations": [], "categories": categories})

    def write_truth(self, count: int, file: Path) -> None:
        """Writes all that is known of the first `count` images.

        Raises:
            AdfqError: where there is nothing to be found in them.
        """
        content = self._read()
        images = content["images"][:count]
        ids = {image["id"] for image in images}
        annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
        if all(annotation["iscrowd"] for annotation in annotations):
            raise AdfqError(f"{self.file}: there is nothing to be found in its first {count} images")
        _write(file, {"images": images, "annotations": annotations, "categories": content["categories"]})

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
        self._check_categories([category["name"] for category in content["categories"]])
        if len({image["id"] for image in content["images"]}) < len(content["images"]):
            raise AdfqError(f"{self.file}: images share an id")
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

    def _check_categories(self, found: Sequence[str]) -> None:
        lacking = [name for name in self.classes if name not in found]
        besides = [name for name in found if name not in self.classes]
        if lacking or besides:
            parts = [f"it lacks {_some(lacking)}"] if lacking else []
            parts += [f"it has {_some(besides)} besides"] if besides else []
            raise AdfqError(f"categories of {self.file} do not match the model's classes: {', and '.join(parts)}")
        # Labels are places in this list.
        if list(found) != list(self.classes):
            raise AdfqError(f"categories of {self.file} are in another order than the model's classes")


class CheckedImages(Dataset[dict[str, Any]]):
    """MMDetection's data set, whose unreadable images are errors that name the file.

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


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _some(names: Sequence[Any], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(map(str, names[:shown]))}{more}"
