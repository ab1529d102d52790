"""Image classification data sets through timm, checked before they are trusted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset

from adfq.errors import AdfqError, one_line
from benchmarks.bundled import BUNDLED
from benchmarks.bundled.classifiers import SceneClassification
from benchmarks.bundled.scenes import CATEGORIES
from benchmarks.run.console import warn
from benchmarks.tasks.classification.class_folders import (
    ClassFolders,
    check_folder,
    natural_key,
    read_class_map,
    read_differences,
    some,
    visible_folders,
)
from benchmarks.tasks.images import as_rgb
from benchmarks.tasks.shared import digest_names

# timm's prefixes of data sets; it takes any other word for a folder of its own.
_LIBRARIES = ("torch", "hfds", "hfids", "tfds", "wds")

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
        if hasattr(dataset, "input_img_mode"):
            dataset.input_img_mode = ""  # timm would cut values of 16 bits
        if hasattr(dataset, "loader"):
            dataset.loader = Image.open  # torchvision, too

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
            image = as_rgb(image).convert(self.mode)
        except Exception as error:  # readers of many formats
            # timm's RuntimeError only counts its attempts.
            reason = "damaged, or not an image" if isinstance(error, RuntimeError) else one_line(error)
            raise AdfqError(f"cannot read {self._name(index)}: {reason}") from None
        try:
            return self.transform(image), int(label)
        except Exception as error:  # a strip of pixels that takes more than the memory when it is resized, for one
            raise AdfqError(f"cannot preprocess {self._name(index)}: {one_line(error)}") from None

    def _name(self, index: int) -> str:
        filename = getattr(self.dataset, "filename", None)
        return filename(index, absolute=True) if filename else f"image {index}"


def open_splits(
    spec: str, classes: int | None, class_map: str | None = None, calibrated: bool = True
) -> tuple[Any, Any]:
    """Open the splits of a data set and compare their classes.

    Args:
        spec: ``bundled``; ``folder:ROOT`` for class folders (or tars of them) under ROOT/train and ROOT/val; any other
            of timm's data set names with its root, such as ``torch/fashion_mnist:ROOT``.
        classes: number of the model's classes; None for a model without any.
        class_map: file of `read_class_map`, for class folders; None, the default, for the natural order of their names.
        calibrated: whether the train split is opened; True by default.

    Returns:
        Map-style data sets of pairs (PIL image, label) for training and validation; None for a train split that is not
        opened.

    Raises:
        AdfqError: for a spec or class map that cannot be read, missing data, another layout, splits with different
            classes, and another number of classes than the model's.
    """
    labels = None if class_map is None else read_class_map(class_map)
    if labels is not None and not spec.startswith("folder:"):
        raise AdfqError(f"{spec} has classes of its own; a class map is for folder:ROOT")
    train = _open(spec, "train", labels) if calibrated else None
    validation = _open(spec, "validation", labels)
    if isinstance(validation, ClassFolders):
        _compare_folders(spec, train, validation, mapped=labels is not None)
    elif train is not None and _class_names(train) != _class_names(validation):
        raise AdfqError(
            f"the splits of {spec} have different classes: {_differences(*map(_class_names, (train, validation)))}"
        )
    for dataset in filter(None, (train, validation)):
        names = _class_names(dataset)
        if names is not None and classes is not None and len(names) != classes:
            raise AdfqError(f"{spec} has {len(names)} classes, the model has {classes}")
    return train, validation


def count_classes(spec: str) -> int | None:
    """Return the number of classes of a data set; None if it does not tell.

    Args:
        spec: see `open_splits`.

    Raises:
        AdfqError: for a data set whose validation split cannot be opened.
    """
    names = _class_names(_open(spec, "validation", None))
    return None if names is None else len(names)


def _open(spec: str, split: str, labels: Mapping[str, int] | None) -> Any:
    if spec == BUNDLED:
        return SceneClassification(split)
    name, _, root = spec.partition(":")
    library, slash, reader = name.partition("/")
    if not root or not (name == "folder" or (slash and library.lower() in _LIBRARIES)):
        raise AdfqError(f"cannot read data {spec!r}; write bundled, folder:ROOT or torch/NAME:ROOT")
    if not os.path.exists(root):
        raise AdfqError(f"there is no {root}")
    if name == "folder":
        return ClassFolders(_find_split(Path(root), split), labels)
    is_folder = library.lower() == "torch" and reader.rpartition("/")[2].lower() in ("folder", "image_folder")
    if is_folder:
        check_folder(root)
    try:
        dataset: Any = create_dataset(name, root=root, split=split, download=False)
    except Exception as error:  # readers of many libraries stand behind timm's names
        raise AdfqError(f"cannot open the {split} split of {spec}: {one_line(error)}") from None
    if not hasattr(dataset, "__getitem__"):
        raise AdfqError(f"{spec} can only be read in order; calibration needs random access")
    if is_folder:  # torchvision's reader, which passes files over
        if dataset.root == root:  # timm takes all images for each split
            raise AdfqError(f"{root} has no {split} split; expected {root}/train/CLASS and {root}/val/CLASS")
        differences = read_differences(dataset.root, (path for path, _ in dataset.samples))
        if differences:
            raise AdfqError(f"torchvision's reader {differences}; give folder:{root}")
    return dataset


def _class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes in the order of their labels; None if it does not tell."""
    if isinstance(dataset, SceneClassification):
        return [str(name) for name in CATEGORIES]
    if isinstance(dataset, ClassFolders):
        return dataset.names
    labels = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    names = sorted(labels, key=lambda name: labels[name]) if labels else getattr(dataset, "classes", None)
    return None if names is None else [str(name) for name in names]


def _compare_folders(spec: str, train: ClassFolders | None, validation: ClassFolders, mapped: bool) -> None:
    """Raise AdfqError for splits with different class folders; with a class map, warn."""
    if train is not None:
        names = train.in_folders
    else:  # a quantized model's train split need not be there
        root = Path(spec.partition(":")[2])
        folder = next((root / name for name in _SPLIT_FOLDERS["train"] if (root / name).is_dir()), None)
        names = validation.in_folders if folder is None else frozenset(visible_folders(folder))
    if names != validation.in_folders:
        said = f"the splits of {spec} have different class folders: {_differences(names, validation.in_folders)}"
        if not mapped:
            raise AdfqError(f"{said}; with --class-map FILE, each class has its label wherever it is")
        warn(said)
    pairs = zip(validation.names, sorted(validation.names), strict=True)
    moved = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if moved is not None and not mapped:
        warn(
            f"class folders of {spec} are in natural order, as timm has them ({moved[0]} before {moved[1]}); "
            "for torchvision's order or another one give --class-map FILE"
        )


def _differences(train: Iterable[str] | None, validation: Iterable[str] | None) -> str:
    ours, theirs = list(train or ()), list(validation or ())
    lacking = sorted(set(ours) - set(theirs), key=natural_key)
    besides = sorted(set(theirs) - set(ours), key=natural_key)
    parts = [f"validation lacks {some(lacking)}"] if lacking else []
    parts += [f"train lacks {some(besides)}"] if besides else []
    return ", and ".join(parts) or "their order"


def _find_split(root: Path, split: str) -> Path:
    for folder in _SPLIT_FOLDERS[split]:
        for path in (root / folder, root / f"{folder}.tar"):
            if path.exists():
                return path
    first = _SPLIT_FOLDERS[split][0]
    raise AdfqError(
        f"{root} has no {first} split; expected {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE, or train.tar and "
        "val.tar with such folders"
    )
