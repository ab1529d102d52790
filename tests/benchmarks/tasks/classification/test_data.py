"""Data sets are opened as timm opens them, and checked: layout, classes, broken files."""

from __future__ import annotations

import tarfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from adfq import AdfqError
from benchmarks.tasks.classification.data import CheckedDataset, count_classes, open_splits


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three training and one validation image each; every picture has its own brightness."""
    level = 0
    for split, count in (("train", 3), ("val", 1)):
        for category in ("cat", "dog"):
            folder = tmp_path / split / category
            folder.mkdir(parents=True)
            for index in range(count):
                level += 20
                Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{index}.png")
    return tmp_path


def open_checked(root: Path, split: str, spec: str = "folder") -> CheckedDataset:
    splits = dict(zip(("train", "validation"), open_splits(f"{spec}:{root}", classes=2), strict=True))
    return CheckedDataset(splits[split], "RGB", pil_to_tensor)


def read(root: Path, split: str, spec: str = "folder") -> list[tuple[Tensor, int]]:
    dataset = open_checked(root, split, spec)
    return [dataset[index] for index in range(len(dataset))]


def test_splits_do_not_mix(root: Path) -> None:
    train, validation = read(root, "train"), read(root, "validation")
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 1]
    assert [label for _, label in validation] == [0, 1]
    assert [int(image[0, 0, 0]) for image, _ in train] == [20, 40, 60, 80, 100, 120]
    assert [int(image[0, 0, 0]) for image, _ in validation] == [140, 160]


def test_tars_are_read_as_folders_are(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    packed = tmp_path_factory.mktemp("tars")
    for split in ("train", "val"):
        with tarfile.open(packed / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    for split in ("train", "validation"):
        for (image, label), (expected, expected_label) in zip(read(packed, split), read(root, split), strict=True):
            assert label == expected_label
            assert (image == expected).all()


@pytest.mark.parametrize("gone", ["train", "val"])
def test_a_missing_split_says_what_was_expected(root: Path, gone: str) -> None:
    (root / gone).rename(root / "elsewhere")
    with pytest.raises(AdfqError, match=r"expected .*/train/CLASS/IMAGE and .*/val/CLASS/IMAGE"):
        open_splits(f"folder:{root}", classes=2)


def test_the_number_of_classes_must_fit_the_model(root: Path) -> None:
    with pytest.raises(AdfqError, match="has 2 classes, the model has 1000"):
        open_splits(f"folder:{root}", classes=1000)


def test_classes_are_counted(root: Path) -> None:
    assert count_classes(f"folder:{root}") == 2
    assert count_classes("bundled") == 24
    with pytest.raises(AdfqError, match="train has no validation split"):
        count_classes(f"torch/folder:{root}/train")
    with pytest.raises(AdfqError, match="write bundled, folder:ROOT"):
        count_classes(f"fodler:{root}")


def test_a_broken_image_is_named_and_never_replaced_by_its_neighbour(root: Path) -> None:
    broken = root / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    dataset = open_checked(root, "train")
    assert int(dataset[0][0][0, 0, 0]) == 20
    with pytest.raises(AdfqError, match=f"cannot read {broken}"):
        dataset[1]


def test_an_image_that_cannot_be_preprocessed_is_named(root: Path) -> None:
    def fail(image: Image.Image) -> Tensor:
        raise MemoryError

    dataset = CheckedDataset(open_splits(f"folder:{root}", 2)[1], "RGB", fail)
    with pytest.raises(AdfqError, match=f"^cannot preprocess {root}/val/cat/0.png: MemoryError$"):
        dataset[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder", "write bundled, folder:ROOT or torch/NAME:ROOT"),
        ("folder:", "write bundled"),
        ("folder:/no/such/place", "there is no /no/such/place"),
        ("torch/fashion_mnist:{root}", "cannot open the train split of torch/fashion_mnist"),
        ("fodler:{root}", "cannot read data 'fodler:.*'; write bundled, folder:ROOT or torch/NAME:ROOT"),
        ("Folder:{root}", "write bundled, folder:ROOT"),
        (":{root}", "write bundled, folder:ROOT"),
        ("troch/folder:{root}", "write bundled, folder:ROOT"),
        ("torch/folder:{root}/val", "/val has no train split; expected .*/val/train/CLASS and .*/val/val/CLASS"),
        ("torch/image_folder:{root}/val", "/val has no train split"),
        ("torch/magic:{root}", "Unknown torchvision dataset magic"),
        ("bundled", "bundled has 24 classes, the model has 2"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(root: Path, spec: str, message: str) -> None:
    with pytest.raises(AdfqError, match=message) as caught:
        open_splits(spec.format(root=root), classes=2)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_an_error(root: Path) -> None:
    for image in (root / "train").rglob("*.png"):
        image.unlink()
    with pytest.raises(AdfqError, match=f"{root}/train has no images; expected {root}/train/CLASS/IMAGE"):
        open_splits(f"folder:{root}", classes=2)


def test_another_list_of_files_has_another_digest(root: Path) -> None:
    def digest(split: str) -> str:
        return open_checked(root, split).digest

    first = {split: digest(split) for split in ("train", "validation")}
    assert first == {split: digest(split) for split in first}
    assert first["train"] != first["validation"]
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "9.png")
    assert digest("train") != first["train"]
    assert digest("validation") == first["validation"]


def test_images_that_are_no_files_have_a_digest_by_their_labels() -> None:
    def digest(targets: list[int]) -> str:
        dataset = MagicMock(spec=["targets", "__len__"], targets=targets)
        return CheckedDataset(dataset, "RGB", pil_to_tensor).digest

    assert digest([0, 1, 1]) == digest([0, 1, 1])
    assert len({digest([0, 1, 1]), digest([1, 0, 1]), digest([0, 1])}) == 3
