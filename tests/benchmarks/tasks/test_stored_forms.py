"""Detection and segmentation give one number for a data set in whatever form its pictures are stored."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")

from adfq import AdfqError
from benchmarks.bundled.coco import write_coco
from benchmarks.cell import Cell
from benchmarks.tasks import load_subject

CPU = torch.device("cpu")
TASKS = {"detection": ("bundled_mask_rcnn", "mmengine"), "segmentation": ("bundled_sam", "segment_anything")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_coco(root, {"train2017": 1, "val2017": 3})
    return root


def load(task: str, root: Path) -> Any:
    pytest.importorskip(TASKS[task][1])
    return load_subject(Cell.create(task=task, model=TASKS[task][0], data=str(root), method="full_precision"))


def measure(task: str, root: Path) -> dict[str, float]:
    subject = load(task, root)
    metrics: dict[str, float] = subject.evaluate(subject.model, CPU, None, 1)
    return metrics


def rewrite(scenes: Path, root: Path, write: Callable[[Image.Image, Path], None]) -> Path:
    shutil.copytree(scenes, root)
    for file in root.glob("*2017/*.png"):
        with Image.open(file) as image:
            image.load()
        write(image, file)
    return root


def turned(orientation: int) -> Callable[[Image.Image, Path], None]:
    """Return a writer of pixels that are upright once they are turned."""

    def write(image: Image.Image, file: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.rotate({3: 180, 6: 90}[orientation]).save(file, exif=exif)

    return write


def grey(bits: int) -> Callable[[Image.Image, Path], None]:
    def write(image: Image.Image, file: Path) -> None:
        values = np.asarray(image.convert("L"))
        Image.fromarray(values if bits == 8 else values.astype(np.uint16) * 257).save(file)

    return write


@pytest.mark.parametrize("task", TASKS)
def test_no_form_changes_the_number(task: str, scenes: Path, tmp_path: Path) -> None:
    clean = measure(task, scenes)
    for orientation in (3, 6):
        assert measure(task, rewrite(scenes, tmp_path / str(orientation), turned(orientation))) == clean
    pale = measure(task, rewrite(scenes, tmp_path / "8", grey(8)))
    assert measure(task, rewrite(scenes, tmp_path / "16", grey(16))) == pale != clean


def tagged(kind: int, count: int) -> Callable[[Image.Image, Path], None]:
    """Return a writer of JPEG files with an orientation that Pillow takes for damaged, and OpenCV for one."""
    entry = struct.pack("<HHI4s", 0x0112, kind, count, b"\6\0\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return lambda image, file: image.save(file, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("task", TASKS)
def test_damaged_orientations_change_no_number(task: str, scenes: Path, tmp_path: Path) -> None:
    plain = rewrite(scenes, tmp_path / "plain", lambda image, file: image.save(file, "JPEG", quality=95))
    clean = measure(task, plain)
    for kind, count in ((1, 1), (7, 1), (3, 0), (99, 1)):  # BYTE, UNDEFINED, no SHORT, an unknown type
        assert measure(task, rewrite(scenes, tmp_path / f"{kind}", tagged(kind, count))) == clean


@pytest.mark.parametrize("backend", ["cv2", "pillow", None, "turbojpeg"])
@pytest.mark.parametrize("color", ["color", "grayscale"])
def test_no_backend_turns_an_ordinary_image(backend: str | None, color: str, tmp_path: Path) -> None:
    transforms = pytest.importorskip("mmcv.transforms")
    from benchmarks.tasks.detection.images import _UNUSUAL, _Loader

    step = transforms.LoadImageFromFile(color_type=color, imdecode_backend=backend)
    loader, file = _Loader(step), tmp_path / "image.jpg"
    if backend == "turbojpeg":  # it never turns one, and refuses other types
        assert step.color_type == color
    else:
        tagged(3, 1)(Image.new("RGB", (30, 20)), file)
        assert loader({"img_path": str(file), _UNUSUAL: None})["img"].shape[:2] == (20, 30)


@pytest.mark.parametrize("task", TASKS)
def test_a_figure_shows_what_was_measured(task: str, scenes: Path, tmp_path: Path) -> None:
    subject = load(task, rewrite(scenes, tmp_path / "turned", turned(6)))
    (found,) = subject.find(subject.model, CPU, 1)
    first = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())["images"][0]["file_name"]
    assert np.array_equal(found.image, np.asarray(Image.open(scenes / "val2017" / first)))


@pytest.mark.parametrize("task", TASKS)
def test_pictures_of_another_size_are_refused_before_the_work(task: str, scenes: Path, tmp_path: Path) -> None:
    root = rewrite(scenes, tmp_path / "half", lambda image, file: image.reduce(2).save(file))
    with pytest.raises(AdfqError, match=r"val2017/000000\.png has 48×48 pixels, and 96×96 in .*val2017\.json$"):
        load(task, root)
    shutil.rmtree(root / "val2017")
    shutil.copytree(scenes / "val2017", root / "val2017")
    with pytest.raises(AdfqError, match=r"train2017/000000\.png has 48×48 pixels, and 96×96 in .*train2017\.json$"):
        next(load(task, root).calibration_batches(1, 0))


@pytest.mark.parametrize("task", TASKS)
def test_annotations_that_are_left_out_leave_the_number(
    task: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "odd"))
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    odd: list[dict[str, Any]] = [{"segmentation": []}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": None}]
    odd += [{"bbox": [5, 5, 9, 0]}, {"bbox": [96, 5, 9, 9]}, {"category_id": 99}]
    content["annotations"] += [
        {**content["annotations"][0], "id": number, **more} for number, more in enumerate(odd, 900)
    ]
    del content["annotations"][0]["iscrowd"], content["annotations"][0]["area"]
    file.write_text(json.dumps(content))
    assert measure(task, root) == measure(task, scenes)
    reasons = "3 without a mask, 2 with an empty box or one outside the image, 1 of a category that is not listed"
    total = len(content["annotations"])
    assert capsys.readouterr().err == f"adfq: {file}: 6 of {total} annotations are left out: {reasons}\n"
