"""Scenes as class folders are those of the bundled data, in any number."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.bundled.class_folders import main, write_class_folders
from benchmarks.bundled.classifiers import SceneClassification
from benchmarks.bundled.scenes import CATEGORIES
from benchmarks.cell import Cell
from benchmarks.tasks import load_subject

COUNTS = {"train": 150, "val": 120}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_class_folders(root, COUNTS)
    return root


def test_folders_hold_the_bundled_scenes_by_class(root: Path) -> None:
    for split, own in (("train", "train"), ("val", "validation")):
        scenes = SceneClassification(own)
        folders = sorted((root / split).iterdir())
        assert [folder.name.partition("_")[2].replace("_", " ") for folder in folders] == list(CATEGORIES)
        found = {int(path.stem): (label, path) for label, folder in enumerate(folders) for path in folder.iterdir()}
        assert sorted(found) == list(range(COUNTS[split]))
        for index in range(0, COUNTS[split], 40):
            label, path = found[index]
            image, category = scenes[index]
            assert label == category
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_a_bundled_classifier_is_as_good_on_folders(root: Path) -> None:
    def top1(data: str, limit: int | None) -> float:
        cell = Cell.create(task="classification", model="bundled_vit", data=data, method="full_precision", limit=limit)
        subject = load_subject(cell)
        return float(subject.evaluate(subject.model, torch.device("cpu"), limit, 60)["top1"])

    assert top1(f"folder:{root}", None) == top1("bundled", COUNTS["val"])


def test_command_line_writes_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["class_folders", str(tmp_path / "new"), "--train", "3", "--val", "2"])
    main()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["train", "val"]
    assert len(list((tmp_path / "new").rglob("*.png"))) == 5
