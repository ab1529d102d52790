"""Image classification data sets through timm, checked before they are trusted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset

from adfq.errors import AdfqError
from benchmarks.bundled import BUNDLED
from benchmarks.bundled.classifiers import SceneClassification
from benchmarks.bundled.scenes import CATEGORIES
from benchmarks.tasks.shared import digest_names

_SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "test", "eval")}


class CheckedDataset(Dataset[tuple[Tensor, int]]):
    """Map-style data set whose unreadable images are errors that name the file; timm passes them over.

    Args:
        dataset: data set of pairs (PIL image, label).
        mode: PIL mode that images are converted to, "RGB" or "L".
        transform: function from a PIL image to a tensor C×H×W.
    """

    def __init__(self, dataset: Any, mode: str, transform: Callable[[Image.Image], Tensor]) -> None:
        self.dataset, self.mode, self.transform = dataset, mode, transform
        if hasattr(dataset, "_max_retries"):
            dataset._max_retries = 1  # timm would silently count the following image in a broken one's place

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def digest(self) -> str:
        """SHA-256 of the files' names in order, or of the labels for images without files."""
        filenames = getattr(self.dataset, "filenames", None)
        names = filenames() if filenames else getattr(self.dataset, "targets", range(len(self)))
        return digest_names(map(str, names))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.dataset[index]
            return self.transform(image.convert(self.mode)), int(label)
        except (OSError, RuntimeError) as error:
            filename = getattr(self.dataset, "filename", None)
            name = filename(index, absolute=True) if filename else f"image {index}"
            # timm's RuntimeError only counts its attempts.
            reason = error if isinstance(error, OSError) else "damaged, or not an image"
            raise AdfqError(f"cannot read {name}: {reason}") from None


def open_split(spec: str, split: str, classes: int) -> Any:
    """Open one split of a data set.

    Args:
        spec: ``bundled``; ``folder:ROOT`` for class folders (or tars of them) under ROOT/train and ROOT/val; any other
            of timm's data set names with its root, such as ``torch/fashion_mnist:ROOT``.
        split: ``"train"`` or ``"validation"``.
        classes: number of the model's classes.

    Returns:
        Map-style data set of pairs (PIL image, label).

    Raises:
        AdfqError: for a spec that cannot be read, missing data, another layout, and another number of classes.
    """
    dataset, found = _open(spec, split)
    if found not in (classes, None):
        raise AdfqError(f"{spec} has {found} classes, the model has {classes}")
    return dataset


def count_classes(spec: str) -> int | None:
    """Return the number of classes of a data set; None if it does not tell.

    Args:
        spec: see `open_split`.

    Raises:
        AdfqError: for a data set whose validation split cannot be opened.
    """
    return _open(spec, "validation")[1]


def _open(spec: str, split: str) -> tuple[Any, int | None]:
    """Open a split, and count its classes if it tells."""
    if spec == BUNDLED:
        return SceneClassification(split), len(CATEGORIES)
    name, colon, root = spec.partition(":")
    if not colon or not root:
        raise AdfqError(f"cannot read data {spec!r}; write bundled, folder:ROOT or torch/NAME:ROOT")
    if not os.path.exists(root):
        raise AdfqError(f"there is no {root}")
    try:
        if name == "folder":
            dataset: Any = create_dataset("", root=_find_split(Path(root), split), search_split=False)
        else:
            dataset = create_dataset(name, root=root, split=split, download=False)
    except AdfqError:
        raise
    except Exception as error:  # readers of many libraries stand behind timm's names
        raise AdfqError(f"cannot open the {split} split of {spec}: {' '.join(str(error).split())}") from None
    if not hasattr(dataset, "__getitem__"):
        raise AdfqError(f"{spec} can only be read in order; calibration needs random access")
    reader = getattr(dataset, "reader", dataset)
    found = getattr(reader, "class_to_idx", None) or getattr(dataset, "classes", None)
    return dataset, None if found is None else len(found)


def _find_split(root: Path, split: str) -> str:
    for folder in _SPLIT_FOLDERS[split]:
        for path in (root / folder, root / f"{folder}.tar"):
            if path.exists():
                return str(path)
    first = _SPLIT_FOLDERS[split][0]
    raise AdfqError(
        f"{root} has no {first} split; expected {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE, or train.tar and "
        "val.tar with such folders"
    )
