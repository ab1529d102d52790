"""A cell is a value: equal experiments are equal, and the id follows the configuration alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adfq import AdfqError
from benchmarks.cell import Cell, Location, data_set_name

FIELDS = {"task": "classification", "model": "bundled_vit", "data": "bundled"}


def test_spelling_of_bits_does_not_make_another_experiment() -> None:
    cells = {Cell.create(method="base_ptq", bits=bits, **FIELDS) for bits in ("W4A4", "W4/A4", "w4a4")}
    assert len(cells) == 1


def test_full_precision_is_one_experiment_whatever_would_be_quantized() -> None:
    first = Cell.create(method="full_precision", bits="W3A3", seed=1, calibration_size=16, **FIELDS)
    second = Cell.create(method="full_precision", **FIELDS)
    assert first == second
    assert first.bits == "W32/A32"


@pytest.mark.parametrize("batch_size", [32, 33, 10**6, None])
def test_a_batch_of_all_calibration_images_is_no_experiment_of_its_own(batch_size: int | None) -> None:
    cell = Cell.create(method="base_ptq", calibration_batch_size=batch_size, **FIELDS)
    assert cell == Cell.create(method="base_ptq", **FIELDS)
    assert "calibration_batch_size" not in cell.config
    assert Cell.create(method="full_precision", calibration_batch_size=1, **FIELDS).calibration_batch_size is None


def test_smaller_batches_are_experiments_of_their_own() -> None:
    cells = [Cell.create(method="base_ptq", calibration_batch_size=size, **FIELDS) for size in (1, 31, None)]
    assert len({cell.id for cell in cells}) == 3
    assert cells[0].config["calibration_batch_size"] == 1
    assert {cell.in_full_precision for cell in cells} == {Cell.create(method="full_precision", **FIELDS)}


@pytest.mark.parametrize("name", ["model_arguments", "preprocessing", "task_arguments"])
def test_lists_are_values_as_tuples_are(name: str) -> None:
    one, other = (Cell.create(method="base_ptq", **FIELDS, **{name: (("x", x),)}) for x in ([1, [2]], (1, (2,))))
    assert {one: 1}[other]


@pytest.mark.usefixtures("methods_read_once")
def test_committed_records_are_found() -> None:
    files = list((Path(__file__).parents[2] / "results").glob("*/records/*.json"))
    assert len(files) > 100
    for file in files:
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        cell = Cell.create(**{name: freeze(value) for name, value in config.items()})
        assert (cell.config, cell.id) == (config, file.stem.partition("-")[0])


def freeze(value: Any) -> Any:
    return tuple(map(freeze, value)) if isinstance(value, list) else value


def test_the_id_is_stable_and_tells_configurations_apart() -> None:
    cell = Cell.create(method="base_ptq", **FIELDS)
    # Records of earlier runs are found by it: changing how it is made orphans them all.
    assert cell.id == "56184b9470cc4dee"
    others = [
        Cell.create(method="base_ptq", **{**FIELDS, **change})
        for change in ({"seed": 1}, {"limit": 5}, {"method_arguments": (("range", "mse"),)}, {"checkpoint": "x.pth"})
    ]
    assert len({cell.id, *(other.id for other in others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "unknown"}, "there are full_precision, adalog, adfq_vit"),
        ({"method": "base_ptq", "bits": "4"}, "write W4A4"),
        ({"method": "base_ptq", "bits": "W4A9"}, "from 2 to 8"),
        ({"method": "base_ptq", "method_arguments": (("colour", 1),)}, "it has range"),
        ({"method": "full_precision", "method_arguments": (("range", "mse"),)}, "it has none"),
        ({"method": "base_ptq", "model_arguments": (("a", {"b": 1}),)}, "a must be a number, a text or a list"),
        ({"method": "base_ptq", "model_arguments": (("a", b"1"),)}, "a must be a number, a text or a list"),
        ({"method": "base_ptq", "seed": 2**63}, "seed must have at most 64 bits"),
        ({"method": "full_precision", "bits": "W99A99"}, "from 2 to 8"),
        ({"method": "base_ptq", "calibration_batch_size": 0}, "whole number of at least 1, got 0"),
        ({"method": "base_ptq", "calibration_batch_size": "4"}, "whole number of at least 1, got '4'"),
    ],
)
def test_mistakes_say_what_there_is(change: dict[str, object], message: str) -> None:
    with pytest.raises(AdfqError, match=message):
        Cell.create(**{**FIELDS, **change})


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bundled", "bundled"),
        ("folder:/x/imagenet", "imagenet"),
        ("folder:/x/imagenet/", "imagenet"),
        ("/path/to/coco", "coco"),
        ("../data/coco", "coco"),
        ("/path/to:here/coco", "coco"),
        ("torch/fashion_mnist:/x/imagenet", "fashion_mnist"),
        ("tfds/imagenet2012:ROOT", "imagenet2012"),
        ("any", "any"),
    ],
)
def test_a_data_set_has_a_name(spec: str, name: str) -> None:
    assert data_set_name(spec) == name


def test_a_folder_is_named_though_it_is_only_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_set_name("folder:.") == data_set_name(".") == tmp_path.name


@pytest.mark.parametrize(
    ("task", "here", "there"),
    [
        (
            "classification",
            {"model": "vit_tiny_patch16_224.a", "data": "folder:/x/imagenet", "checkpoint": "/x/vit.v1.safetensors"},
            {"model": "vit_tiny_patch16_224.a", "data": "folder:imagenet", "checkpoint": "vit.v1.pth"},
        ),
        (
            "detection",
            {"model": "/x/configs/mine.py", "data": "/x/coco"},
            {"model": "mine.py", "data": "../coco/"},
        ),
        (
            "segmentation",
            {"model": "vit_b", "data": "/x/coco", "task_arguments": (("prompts", "/x/found.json"),)},
            {"model": "vit_b", "data": "coco", "task_arguments": (("prompts", "./found.json"),)},
        ),
    ],
)
def test_an_experiment_is_the_same_wherever_its_files_lie(
    task: str, here: dict[str, Any], there: dict[str, Any]
) -> None:
    first, second = (Cell.create(task=task, method="base_ptq", **fields) for fields in (here, there))
    assert first == second
    assert hash(first) == hash(second)
    assert first.id == second.id
    assert not any(os.sep in str(value) for value in first.config.values() if value != "W4/A4")
    assert first.location != second.location
    assert first.location.data == here["data"]
    assert first.location.checkpoint == here.get("checkpoint")


def test_files_are_located_by_what_names_them() -> None:
    fields = {"method": "base_ptq", "data": "/x/coco"}
    cell = Cell.create(task="segmentation", model="vit_b", task_arguments=(("prompts", "a/found.json"),), **fields)
    assert cell.task_arguments == (("prompts", "found.json"),)
    assert cell.location == Location("/x/coco", files=(("prompts", "a/found.json"),))
    assert cell.location.file("prompts", "boxes") == "a/found.json"
    assert cell.location.file("model", "vit_b") == "vit_b"
    packaged = Cell.create(task="detection", model="mmdet::swin/a.py", **fields)
    assert packaged.model == packaged.location.file("model", packaged.model) == "mmdet::swin/a.py"


def test_a_data_set_may_be_given_a_name() -> None:
    named = Cell.create(method="base_ptq", task="classification", model="m", data="folder:/x/y", data_name="imagenet")
    assert named.data == "imagenet"
    assert named.location.data == "folder:/x/y"
