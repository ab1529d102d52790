"""Class folders: every image counts or is named, and a label is the same whatever lies beside it."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from adfq import AdfqError
from benchmarks.bundled.classifiers import SceneClassification
from benchmarks.bundled.scenes import CATEGORIES
from benchmarks.cell import Cell
from benchmarks.tasks import load_subject
from benchmarks.tasks.classification.class_folders import ClassFolders, read_class_map
from benchmarks.tasks.classification.data import CheckedDataset, open_splits

LEVELS = count(1)


def draw(file: Path, level: int | None = None) -> int:
    """Write an image of one brightness, and return it."""
    level = next(LEVELS) % 256 if level is None else level
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(file, **({"lossless": True} if file.suffix == ".webp" else {}))
    return level


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            draw(tmp_path / split / name / "0.png")
    return tmp_path


def pack(folder: Path, file: Path, prefix: str = ".") -> Path:
    with tarfile.open(file, "w") as tar:
        tar.add(folder, arcname=prefix)
    return file


def labels(root: Path, class_map: dict[str, int] | None = None) -> dict[str, int]:
    dataset = ClassFolders(root, class_map)
    return {dataset.filename(index): dataset[index][1] for index in range(len(dataset))}


def test_every_type_that_pillow_reads_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "a.PNG",
        "b.webp",
        "c.bmp",
        "d.tif",
        "e.tiff",
        "f.gif",
        "g.jfif",
        "h.jpe",
        "i.ppm",
        "j.tga",
        "k.jp2",
        "l.pcx",
    ]
    levels = [draw(tmp_path / "set" / "ant" / name) for name in names]
    shutil.copy(tmp_path / "set" / "ant" / "a.PNG", tmp_path / "set" / "ant" / "z")  # by its content
    for place in (tmp_path / "set", pack(tmp_path / "set", tmp_path / "set.tar")):
        dataset = ClassFolders(place)
        assert dataset.filenames() == [f"ant/{name}" for name in (*names, "z")]
        found = [int(np.asarray(dataset[index][0].convert("L"))[0, 0]) for index in range(len(dataset))]
        assert found == pytest.approx([*levels, levels[0]], abs=1)
    assert capsys.readouterr().err == ""


def test_other_files_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "val" / "ant" / "notes.txt").write_text("text")
    assert len(ClassFolders(root / "val")) == 3
    assert capsys.readouterr().err == f"adfq: {root}/val: 1 file is no image and does not count: ant/notes.txt\n"
    (root / "val" / "ant" / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(AdfqError, match=r"val has images that cannot be read: ant/1\.HEIC; convert or remove them"):
        ClassFolders(root / "val")


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/0.png",
        "ant/.ipynb_checkpoints/0.png",
        "ant/._0.png",
        "__MACOSX/ant/0.png",
        ".x.png",
        ".git/a/b.png",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_hidden_names_are_no_data(name: str, packed: bool, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(root / "val" / name)
    place = pack(root / "val", root / "packed.tar") if packed else root / "val"
    assert labels(place) == {"ant/0.png": 0, "bee/0.png": 1, "cow/0.png": 2}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("lacking", "stray", "message"),
    [
        ("bee", ".ipynb_checkpoints", "validation lacks bee; with --class-map"),
        ("bee", "zebra", "validation lacks bee, and train lacks zebra; with"),
        (None, "zebra", "have different class folders: train lacks zebra; with"),
        ("bee", None, "have different class folders: validation lacks bee; with"),
    ],
)
def test_splits_with_different_classes_are_refused(
    lacking: str | None, stray: str | None, message: str, packed: bool, root: Path
) -> None:
    if lacking:
        shutil.rmtree(root / "val" / lacking)
    if stray:
        draw(root / "val" / stray / "0.png")
    for calibrated in (True,) if packed else (True, False):  # the train split of a quantized model is looked at as well
        if packed:
            for split in ("train", "val"):
                pack(root / split, root / f"{split}.tar")
                shutil.rmtree(root / split)
        with pytest.raises(AdfqError, match=message):
            open_splits(f"folder:{root}", 3, calibrated=calibrated)


def test_torchvisions_reader_passes_nothing_over(root: Path) -> None:
    assert [len(split) for split in open_splits(f"torch/folder:{root}", 3)] == [3, 3]
    draw(root / "val" / "ant" / "1.gif")
    with pytest.raises(AdfqError, match=rf"torchvision's reader leaves out ant/1\.gif; give folder:{root}"):
        open_splits(f"torch/folder:{root}", 3)
    (root / "val" / "ant" / "1.gif").unlink()
    draw(root / "val" / ".ipynb_checkpoints" / "0.png")
    shutil.rmtree(root / "val" / "bee")
    with pytest.raises(AdfqError, match=r"torchvision's reader counts \.ipynb_checkpoints/0\.png; give folder"):
        open_splits(f"torch/folder:{root}", 3)
    shutil.rmtree(root / "val" / ".ipynb_checkpoints")
    draw(root / "val" / "zebra" / "0.png")
    with pytest.raises(AdfqError, match=r"have different classes: validation lacks bee, and train lacks zebra"):
        open_splits(f"torch/folder:{root}", 3)


@pytest.mark.parametrize("spec", ["folder", "torch/folder"])
def test_each_reader_reads_16_bits_and_orientations(spec: str, root: Path) -> None:
    values = np.arange(128, dtype=np.uint16).reshape(8, 16) * 512
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(root / "val" / "ant" / "0.png", exif=exif)
    dataset = CheckedDataset(open_splits(f"{spec}:{root}", 3)[1], "L", pil_to_tensor)
    assert np.array_equal(dataset[0][0][0].numpy(), np.rot90(values >> 8, -1))


def test_a_quantized_model_needs_no_train_split(root: Path) -> None:
    shutil.rmtree(root / "train")
    train, validation = open_splits(f"folder:{root}", 3, calibrated=False)
    assert train is None
    assert len(validation) == 3


def test_a_class_map_gives_each_class_its_label(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "val" / "bee")
    file = root / "names.txt"
    file.write_text("cow\nbee\nant\nape\n")
    _, validation = open_splits(f"folder:{root}", 4, str(file))
    assert [validation[index][1] for index in range(2)] == [2, 0]
    said = f"the splits of folder:{root} have different class folders: validation lacks bee"
    assert capsys.readouterr().err == f"adfq: {said}\n"
    with pytest.raises(AdfqError, match="has 4 classes, the model has 3"):
        open_splits(f"folder:{root}", 3, str(file))
    file.write_text("cow\nbee\n")
    with pytest.raises(AdfqError, match=r"train has class folders that are not in the class map: ant$"):
        open_splits(f"folder:{root}", 2, str(file))
    with pytest.raises(AdfqError, match="bundled has classes of its own; a class map is for folder:ROOT"):
        open_splits("bundled", 24, str(file))


def test_classes_are_in_natural_order_which_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for number in range(12):
            draw(tmp_path / split / str(number) / "0.png")
    _, validation = open_splits(f"folder:{tmp_path}", 12)
    assert [(validation.filename(index), validation[index][1]) for index in range(12)] == [
        (f"{number}/0.png", number) for number in range(12)
    ]
    error = capsys.readouterr().err
    assert "are in natural order, as timm has them (2 before 10); for torchvision's order or" in error
    assert error.count("\n") == 1
    order = tmp_path / "order.json"
    order.write_text(json.dumps(sorted(map(str, range(12)))))
    _, validation = open_splits(f"folder:{tmp_path}", 12, str(order))
    assert validation[2][1] == 4  # 0, 1, 10, 11, 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [["B", "a"], ["cat", "Cat"], ["²", "1"], ["a10", "a9"]])
def test_any_names_have_one_order(names: list[str], tmp_path: Path) -> None:
    for name in names:
        draw(tmp_path / name / "0.png")
    assert sorted(labels(tmp_path).values()) == [0, 1]
    assert labels(tmp_path) == labels(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("overview.png", "has images outside of class folders: overview.png"),
        ("ant/more/0.png", "has images in folders of several levels"),
        ("other/ant/0.png", "has images in folders of several levels"),
    ],
)
def test_unclear_layouts_are_refused(name: str, message: str, root: Path) -> None:
    draw(root / "val" / name)
    for place in (root / "val", pack(root / "val", root / "packed.tar")):
        with pytest.raises(AdfqError, match=message):
            ClassFolders(place)


def test_folders_above_the_classes_and_tars_of_tars(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = [0, 1, 2]
    above = pack(root / "val", root / "above.tar", "data/val")
    assert list(labels(above).values()) == expected
    parts = tmp_path_factory.mktemp("parts")
    for name in ("ant", "bee", "cow"):
        pack(root / "val" / name, parts / f"{name}.tar")
    nested = pack(parts, root / "nested.tar")
    dataset, flat = ClassFolders(nested), ClassFolders(root / "val")
    assert [dataset[index][1] for index in range(3)] == expected
    for index in range(3):
        assert np.array_equal(np.asarray(dataset[index][0]), np.asarray(flat[index][0]))


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_files_that_are_no_tars(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "val.tar").write_bytes(content)
    with pytest.raises(AdfqError, match=r"val\.tar") as caught:
        ClassFolders(tmp_path / "val.tar")
    assert "\n" not in str(caught.value)


def test_links_in_tars_are_refused(root: Path) -> None:
    with tarfile.open(root / "val.tar", "w") as tar:
        link = tarfile.TarInfo("ant/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
    with pytest.raises(AdfqError, match=r"cannot read ant/1\.png in .*val\.tar: it is a link"):
        ClassFolders(root / "val.tar")


@pytest.mark.parametrize("padding", [0, 9216])  # others than Python and GNU tar end with two blocks alone
def test_damaged_tars_are_refused(padding: int, root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with tarfile.open(pack(root / "val", root / "val.tar")) as tar:
        headers, end = [member.offset for member in tar], tar.offset
    whole = (root / "val.tar").read_bytes()[:end]
    blocks = bytes(1024 + padding)
    damaged = {
        "before a member": whole[: headers[-1]],
        "within a header": whole[: headers[-1] + 100],
        "behind the last member": whole,
        "within the end": whole + bytes(512),
        "bytes behind the end": whole + blocks + whole + blocks,
        **{
            f"header {header}, {kind}": whole[:header] + block + whole[header + 512 :] + blocks
            for header in headers[1:]
            for kind, block in (("zeros", bytes(512)), ("other bytes", b"x" * 512))
        },
    }
    (root / "val.tar").write_bytes(whole + blocks)
    assert list(labels(root / "val.tar").values()) == [0, 1, 2]
    for kind, content in damaged.items():
        (root / "val.tar").write_bytes(content)
        outer = pack(root / "val.tar", tmp_path_factory.mktemp("outer") / "outer.tar", "val.tar")
        for place, name in ((root / "val.tar", root / "val.tar"), (outer, f"{outer}/val")):
            with pytest.raises(AdfqError) as caught:
                ClassFolders(place)
            assert str(caught.value) == f"cannot read {name}: it is damaged or cut off", kind


def test_an_image_that_is_twice_in_a_tar_is_refused(root: Path) -> None:
    with tarfile.open(pack(root / "val", root / "val.tar"), "a") as tar:
        tar.add(root / "val" / "bee", "bee")
    with pytest.raises(AdfqError, match=r"val\.tar has bee/0\.png twice; pack it again without old versions of images"):
        ClassFolders(root / "val.tar")


@pytest.mark.parametrize("spec", ["folder", "torch/folder"])
def test_links_that_lead_upwards_are_refused(spec: str, root: Path) -> None:
    for name in ("ant", "bee"):
        (root / "val" / name / "up").symlink_to("..")
    with pytest.raises(AdfqError, match=r"cannot read .*/up: it is a link to a folder that it is in"):
        open_splits(f"{spec}:{root}", 3)


@pytest.mark.parametrize("spec", ["folder", "torch/folder"])
@pytest.mark.parametrize("name", ["1.png", "notes"])
def test_pipes_and_links_to_nothing_are_refused(name: str, spec: str, root: Path) -> None:
    for create in (os.mkfifo, lambda place: place.symlink_to(root / "nowhere")):
        create(root / "val" / "ant" / name)
        with pytest.raises(AdfqError, match=rf"{name}: it is no regular file, or a link to nothing"):
            open_splits(f"{spec}:{root}", 3)
        (root / "val" / "ant" / name).unlink()


def test_pipes_in_place_of_tars_and_class_maps_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (ClassFolders, lambda place: read_class_map(str(place))):
        with pytest.raises(AdfqError, match=r"cannot read .*pipe: it is no regular file"):
            read(tmp_path / "pipe")


def test_names_need_not_be_utf8(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "ant").rename(os.fsdecode(bytes(root / split / "a") + b"\xff"))
        shutil.copy(root / split / "bee" / "0.png", os.fsdecode(bytes(root / split / "bee") + b"/\xff.png"))
    (root / "val" / "bee" / "notes.txt").with_name(os.fsdecode(b"\xff.txt")).write_text("text")
    dataset = CheckedDataset(open_splits(f"folder:{root}", 3)[1], "RGB", pil_to_tensor)
    assert len(dataset) == 4
    assert len(dataset.digest) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "there is no class map"),
        ("a.txt", b"\xff\xfe\xff", "cannot read class map"),
        ("a.json", b"{", "cannot read class map"),
        ("a.json", b"3", "it has to be names, or labels by name"),
        ("a.txt", b"", "it has to be names, or labels by name"),
        ("a.txt", b"ant\n\ncow\n", "it has to be names, or labels by name"),
        ("a.json", b"[1, 2]", "it has to be names, or labels by name"),
        ("a.txt", b"ant\nant\n", "it names ant twice"),
        ("a.json", b'{"ant": 0, "cow": 2}', "its labels are not 0 to 1, each once"),
        ("a.json", b'{"ant": 0, "ant": 1, "cow": 0}', 'cannot read class map .*: an object has the key "ant" twice'),
        ("a.json", b'{"ant": 0, "cow": 0}', "its labels are not 0 to 1, each once"),
        ("a.json", b'{"ant": 0, "cow": true}', "its labels are not 0 to 1, each once"),
        ("a.json", b'{"0": ["n01", "tench"]}', "its labels are not 0 to 0, each once"),
    ],
)
def test_files_that_are_no_class_maps(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AdfqError, match=message) as caught:
        read_class_map(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_forms_of_a_class_map(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "\ufeffant\r\nbee \r\n\r\n"),
        ("a.json", '["ant", "bee"]'),
        ("b.json", '{"bee": 1, "ant": 0}'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read_class_map(str(tmp_path / name)) == {"ant": 0, "bee": 1}


def _turned(image: Image.Image, file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90).save(file.with_suffix(".png"), exif=exif)


def _grey(bits: int) -> Callable[[Image.Image, Path], None]:
    def write(image: Image.Image, file: Path) -> None:
        values = np.asarray(image.convert("L"))
        Image.fromarray(values if bits == 8 else values.astype(np.uint16) * 257).save(file.with_suffix(".png"))

    return write


def _mixed(image: Image.Image, file: Path) -> None:
    suffix = (".webp", ".bmp", ".tif", ".png")[int(file.name) % 4]
    more: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    image.save(file.with_suffix(suffix), **more)


def accuracy(root: Path, write: Callable[[Image.Image, Path], None]) -> tuple[float, float]:
    """Return top-1 accuracy of a bundled model on 40 scenes in class folders, and their number."""
    scenes = SceneClassification("validation")
    for name in CATEGORIES:
        (root / "val" / name).mkdir(parents=True)
    taken = dict.fromkeys(range(len(CATEGORIES)), 0)
    for index in range(300):
        image, label = scenes[index]
        if taken[label] < 2:
            taken[label] += 1
            write(image, root / "val" / CATEGORIES[label] / str(index))
    (root / "train").symlink_to(root / "val")
    (root / "names.txt").write_text("\n".join(CATEGORIES))
    arguments = (("class_map", str(root / "names.txt")),)
    fields = {"model": "bundled_vit", "data": f"folder:{root}", "method": "full_precision"}
    cell = Cell.create(task="classification", task_arguments=arguments, **fields)
    subject = load_subject(cell)
    assert cell.config["task_arguments"] == [["class_map", "names.txt"]]
    assert len(subject.data_digests["class_map"]) == 64
    metrics = subject.evaluate(subject.model, torch.device("cpu"), None, 48)
    return metrics["top1"], metrics["images"]


def test_no_form_changes_the_number(tmp_path: Path) -> None:
    clean = accuracy(tmp_path / "clean", lambda image, file: image.save(file.with_suffix(".png")))
    assert clean[0] > 80
    assert clean[1] == 48
    assert accuracy(tmp_path / "turned", _turned) == clean
    assert accuracy(tmp_path / "mixed", _mixed) == clean
    pale = accuracy(tmp_path / "8", _grey(8))
    assert accuracy(tmp_path / "16", _grey(16)) == pale
